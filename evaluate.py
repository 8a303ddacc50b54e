"""Measure and draw what a LAVAE has learnt, on the 10,000 test images.

    reconstruct    D(E(x))                                  Table I, Fig. 3
    augment        D(E(x) L_i)                              Table I, Fig. 3
    compose        D(E(x) L_1 L_2)                          Table I, Fig. 3
    reverse        D(E(x) L_2 L_1)                          Fig. 3
    invert         D(E(A_i x) L_i^-1)                       Fig. 4
    any to any     D(E(v) L_from^-1 L_to)
    transfer       D_B(E(x) L_i)                            Fig. 6
    the CVAEs                                               Table I, Figs. 8 and 9

    python evaluate.py                          # every run under runs/, baselines inside them too
    python evaluate.py runs/flip_lr+flip_ud     # this one
    python evaluate.py runs/seed0 runs/seed1    # these, and their mean and standard deviation
    python evaluate.py --heatmap                # the runs of train.py --heatmap, and the heat-map

Prints the tables, and writes evaluation.json and the figures to the run folder. BCE is in nats an
image. Latents of images are posterior means, without noise. In order: numbers, tables, projections
to the plane, what figures share, the figures, the command line. It is the last script to read.
"""

import argparse
import base64
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import combinations, cycle, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor, nn

import lavae
from adabelief import AdaBelief
from augment import (AUGMENTATIONS, DATA_DIR, ORDERS, PAIRS, all_views, box, class_names, grid,
                     like_mnist, load_images, one_line_errors, one_of_each, save, table,
                     text, titled, view_names, views)
from lavae import BLOCK, CVAE, LAVAE, LatentMap, apply_in_order, matrix_power, order_error, pixels

LABELS = {"lavae": "LAVAE", "cvae": "CVAE, naive", "cvae-paired": "CVAE, paired",
          "vae": "VAE of originals"}
PAPER_TABLE = {"flip_lr+flip_ud": {  # Table I; it gives the last row's total as 695.68
    "lavae": [68.34, 75.89, 71.30, 81.57], "cvae": [98.11, 260.18, 351.79, 279.82],
    "cvae-paired": [99.15, 99.16, 99.26, 299.12]}}
PAIR_NAMES = ["+".join(pair) for pair in PAIRS]
PAPER_TOTALS = {  # the authors' slides 13 and 21, {trained on: {transferred to: total}}
    source: dict(zip(PAIR_NAMES, totals)) for source, totals in zip(PAIR_NAMES, (
        (297.10, 696.23, 447.01, 564.09), (499.22, 500.86, 607.79, 336.65),
        (440.25, 730.68, 329.20, 491.55), (304.04, 781.76, 915.97, 516.54)))}

# ---------------------------------------------------------------- numbers


def tensors(images: np.ndarray, augs: Sequence[str], device: torch.device) -> list[Tensor]:
    """The 2^K views of uint8 images (N, H, W), on the device."""
    return [torch.from_numpy(v).to(device) for v in all_views(images, augs)]


@torch.no_grad()
def decoded(decoder: nn.Module, z: Tensor, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Decode latents (N, latent_dim), and compare with uint8 images (N, 28, 28).

    Returns the logits, in blocks, and the BCE of each image in nats: float64 (N,), on the CPU.
    """
    logits = [decoder(block) for block in z.split(BLOCK)]
    bces = [F.binary_cross_entropy_with_logits(block, pixels(x, block.dtype), reduction="none")
            .flatten(1).sum(1) for block, x in zip(logits, images.split(BLOCK))]
    return logits, torch.cat(bces).cpu().double()


def nats(decoder: nn.Module, z: Tensor, images: Tensor) -> float:
    """The mean BCE of `decoded`, nats an image."""
    return decoded(decoder, z, images)[1].mean().item()


def score(decoder: nn.Module, z: Tensor, images: Tensor) -> tuple[float, float]:
    """(`nats`, identity). The identity is the share of drawn pictures whose own image is nearest to
    them (L2) among all images."""
    logits, bces = decoded(decoder, z, images)
    targets = pixels(images, z.dtype).flatten(1)
    squares = targets.square().sum(1)
    nearest = [(squares - 2 * block.sigmoid().flatten(1) @ targets.T).argmin(1)  # + |D(z)|^2
               for block in logits]
    hits = (torch.cat(nearest) == torch.arange(len(z), device=z.device)).sum().item()
    return bces.mean().item(), hits / len(z)


def with_total(row: dict[str, float]) -> dict[str, float]:
    """The row and its sum, which the paper calls the total."""
    return row | {"total": sum(row.values())}


def reverse(model: LAVAE, z: Tensor) -> Tensor:
    """z L_K .. L_2 L_1: all maps, in the reverse order of the last view."""
    return apply_in_order(z, reversed(model.maps))


def pattern_counts(maps: Sequence[Tensor]) -> dict[str, int]:
    """How many latent directions each pattern of signs has: {"++": 5, "-+": 4, ..}.

    "+" is an eigenvalue 1 and "-" is -1, a sign for each map. For involutions (d, d) that commute,
    the product of the projections (I +- L_i) / 2 is the projection to a joint eigenspace, and its
    trace is the dimension of this space.
    """
    identity_matrix = torch.eye(len(maps[0]), dtype=maps[0].dtype)
    projections = {"": identity_matrix}
    for L in maps:
        projections = {signs + sign: P @ (identity_matrix + (1 if sign == "+" else -1) * L) / 2
                       for signs, P in projections.items() for sign in "+-"}
    return {signs: round(P.trace().item()) for signs, P in projections.items()}


def powers(x, maps: Sequence[Callable], exponents: Sequence[int]):
    """Apply each map to x as many times as its exponent says, the first map first."""
    return apply_in_order(x, (f for f, n in zip(maps, exponents) for _ in range(n)))


def elements(augs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The group that augmentations generate: {"rotate_cw^2+flip_lr": (2, 1), ..}, with exponents.

    Two products are one element if they do the same to a square without symmetry. Empty if one of
    the augmentations has no order.
    """
    square, found = np.arange(4, dtype=np.uint8).reshape(1, 2, 2), {}
    words = product(*(range(ORDERS.get(aug, 0)) for aug in augs))
    for exponents in sorted(words, key=lambda word: (max(word), sum(word))):  # views come first
        picture = powers(square, [AUGMENTATIONS[aug] for aug in augs], exponents)
        found.setdefault(picture.tobytes(), exponents)
    return {"+".join(f"{aug}^{n}" if n > 1 else aug
                     for aug, n in zip(augs, exponents) if n) or "orig": exponents
            for exponents in found.values()}


def group(model: LAVAE) -> dict:
    """The structure of the maps: do they commute, and what do they keep?

    "commutator" is |L_i L_j - L_j L_i|, a Frobenius norm. "products" is |I - (L_i L_j)^2|: it is 0
    for two flips, and for a flip and a turn. "eigenvalues" are [real, imaginary]. "directions" are
    `pattern_counts`, or None where the maps are no commuting involutions.
    """
    maps = {aug: f.L.cpu().double() for aug, f in zip(model.augs, model.maps)}
    pairs = [(f"{a}, {b}", maps[a], maps[b]) for a, b in combinations(maps, 2)]
    commutator = {pair: torch.linalg.norm(L @ M - M @ L).item() for pair, L, M in pairs}
    squares = [order_error(L, 2).sqrt().item() for L in maps.values()]
    return {
        "products": {pair: order_error(L @ M, 2).sqrt().item() for pair, L, M in pairs
                     if all(aug in ORDERS for aug in pair.split(", "))},
        "commutator": commutator,
        "eigenvalues": {aug: sorted([v.real, v.imag] for v in torch.linalg.eigvals(L).tolist())
                        for aug, L in maps.items()},
        "directions": (pattern_counts([*maps.values()])
                       if max([*squares, *commutator.values()]) < 0.5 else None)}


def half_way(model: LAVAE, L: Tensor, z: Tensor) -> dict[str, float]:
    """What half an augmentation does to latents z (N, latent_dim).

    "length": the mean length of z L^(1/2), as a share of z's. "re-encoded": how far
    E(D(z L^(1/2))) is from z L^(1/2), root mean square, as a share of its length.
    """
    half = z @ matrix_power(L, 0.5)
    away = model.encoder(model.decoder(half).sigmoid())[0] - half
    return {"length": (half.norm(dim=1) / z.norm(dim=1)).mean().item(),
            "re-encoded": (away.norm() / half.norm()).item()}


def correctly_classified(train: Sequence[Tensor], test: Sequence[Tensor]) -> list[Tensor]:
    """Train a probe, a small classifier, to name the view of a latent, and test it.

    train, test: the latents of each view, (N, latent_dim). The probe has a hidden layer of 64 units
    and learns for 5 epochs, with a fixed seed. Returns for each view whether the probe is right on
    each test latent, (N,) bool.
    """
    z = torch.cat([*train])
    y = torch.arange(len(train), device=z.device).repeat_interleave(len(train[0]))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        probe = nn.Sequential(nn.Linear(z.shape[1], 64), nn.ReLU(), nn.Linear(64, len(train)))
        optimizer = AdaBelief(probe.to(z.device).parameters(), lr=1e-2)
        for _ in range(5):
            for index in torch.randperm(len(z)).to(z.device).split(500):
                loss = F.cross_entropy(probe(z[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return [probe(z_v).argmax(1) == v for v, z_v in enumerate(test)]


@torch.no_grad()
def row_of(model: CVAE | LAVAE, latents: Sequence[Tensor], images: Sequence[Tensor]) -> dict:
    """A row of Table I, and the identity of each view. latents: see `latents_of_views`; images: the
    views, uint8 (N, 28, 28) each."""
    names = view_names(model.augs)
    bces, identity = zip(*(score(model.decoder, z, v) for z, v in zip(latents, images)))
    told = model.arguments.get("condition")  # of a CVAE; the paper's is told the view
    return with_total(dict(zip(names, bces))) | {"identity": dict(zip(names, identity))} | (
        {"told": told} if told in ("digit", "both") else {})


def latents_of_views(model: CVAE | LAVAE, x: np.ndarray, y: np.ndarray,
                     device: torch.device) -> list[Tensor]:
    """What the decoder must be given to draw each view of originals x, uint8 (N, 28, 28).

    y: their digits (N,), for a CVAE that is told them, or None.
    """
    told = {"labels": torch.from_numpy(y).long().to(device)} if getattr(
        model, "by_digit", False) else {}
    z = model.encode(torch.from_numpy(x).to(device), **told)
    return [model.to_view(z, v, **told) for v in range(2 ** len(model.augs))]


@torch.no_grad()
def measure(model: LAVAE, data: Sequence[np.ndarray], device: torch.device) -> dict:
    """All numbers of a LAVAE in evaluation.json. data: as `load_images` returns it."""
    x_train, _, x, _ = data
    names, images = view_names(model.augs), tensors(x, model.augs, device)
    encoded = [model.encode(v) for v in images]
    z, mapped = encoded[0], views(encoded[0], model.maps)
    row, functions = row_of(model, mapped, images), [AUGMENTATIONS[aug] for aug in model.augs]
    train = views(model.encode(torch.from_numpy(x_train[:20_000]).to(device)), model.maps)
    correct = torch.stack(correctly_classified(train, mapped)).cpu()

    def each(latents):  # the nats of every view, each drawn from its latents
        return {name: nats(model.decoder, z, x) for name, z, x in zip(names, latents, images)}

    any_to_any = {"orig": {name: row[name] for name in names}} | {
        name: each(views(model.from_view(encoded[v], v), model.maps))
        for v, name in enumerate(names) if v}
    row |= {
        "reverse": nats(model.decoder, reverse(model, z), images[-1]),
        "direct": each(encoded),
        "inverse": {name: any_to_any[name]["orig"] for name in names[1:]},
        "order_error": {aug: f.order_error(ORDERS[aug], z).item()
                        for aug, f in zip(model.augs, model.maps) if aug in ORDERS},
        "any_to_any": any_to_any, "probe_accuracy": correct.double().mean().item(),
        "group": group(model) if isinstance(model.maps[0], LatentMap) else None,
        "half": {aug: half_way(model, f.L, z[:2000]) for aug, f in zip(model.augs, model.maps)
                 if aug in ORDERS and isinstance(f, LatentMap)},
        "elements": {name: row[name] if name in names else nats(
            model.decoder, powers(z, model.maps, exponents),
            torch.from_numpy(powers(x, functions, exponents)).to(device))
            for name, exponents in elements(model.augs).items()}}
    transfer = {}
    for augs, (key, head) in zip(model.transfers, model.heads.items()):
        bces = torch.stack([decoded(head, z_v, x_v)[1]
                            for z_v, x_v in zip(mapped, tensors(x, augs, device))])
        transfer[key] = with_total(dict(zip(view_names(augs), bces.mean(1).tolist())))
        for words, chosen in (("correctly_classified", correct), ("wrongly_classified", ~correct)):
            transfer[key][words] = bces[chosen].mean().item() if chosen.any() else None
    return {"lavae": row, "transfer": transfer}


# ---------------------------------------------------------------- tables


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence]]) -> None:
    """Print rows of (label, cells) under column heads. A cell is a number, a text or None."""
    rows = [[label, *("" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in values)]
            for label, values in ((title, columns), *rows)]
    first, *widths = (2 + max(7, *map(len, column)) for column in zip(*rows))
    print()
    for label, *cells in rows:
        print(label.ljust(first) + "".join(c.rjust(w) for c, w in zip(cells, widths)).rstrip())


def models_of(result: dict) -> dict[str, dict]:
    """The rows of Table I that an evaluation has: of the LAVAE and of the baselines."""
    rows = result | result.get("baselines", {})
    return {name: rows[name] for name in LABELS if name in rows}


def of_paper(numbers: dict[str, dict], dataset: str, source: str) -> dict:
    """The paper's numbers for these augmentations, from PAPER_TABLE by the name of --model, or from
    PAPER_TOTALS by target pair. Empty where it has none. It has them for MNIST only."""
    return numbers.get(source, {}) if dataset == "mnist" else {}


def label_of(name: str, row: dict) -> str:
    """The label of a model's row."""
    told = {"digit": ", told the digit", "both": ", told view and digit"}
    return LABELS[name] + told.get(row.get("told"), "")


def report(dataset: str, augs: Sequence[str], result: dict) -> None:
    """Print the tables of a run, with the paper's numbers below ours where there are any."""
    source, names, models = "+".join(augs), view_names(augs), models_of(result)
    columns, nothing, rows = [*names, "total"], [None] * len(names), []
    totals = of_paper(PAPER_TOTALS, dataset, source)
    paper = {"lavae": [*nothing, totals[source]]} if totals else {}
    paper |= {name: [*views, sum(views)]
              for name, views in of_paper(PAPER_TABLE, dataset, source).items()}
    for name, row in models.items():
        rows.append((label_of(name, row), [row[c] for c in columns]))
        if name in paper and "told" not in row:
            rows.append(("  paper", paper[name]))
    print_table("Table I, nats an image", columns, rows)
    if "cvae-paired" in paper and "cvae-paired" in models:
        print("(the paper gives 695.68 as the total of its last row, which adds up to 596.69)")
    print_table("identity preserved, %", names, [
        (label_of(name, row), [100 * v for v in row["identity"].values()])
        for name, row in models.items()])
    if "lavae" not in result:
        return

    row = result["lavae"]
    print_table("LAVAE, any view to any", columns, [
        *((f"from {name}", with_total(v).values()) for name, v in row["any_to_any"].items()),
        ("direct, D(E(view))", with_total(row["direct"]).values()),
        ("reverse composition", [*nothing[1:], row["reverse"], None])])
    print(f"a probe names the view of a latent, z L, with {row['probe_accuracy']:.1%} accuracy")
    for name, square in row["order_error"].items():
        print(f"|I - L^{ORDERS[name]}|^2 of {name}: {square:.1e}")
    if row["group"]:
        for key, formula in (("commutator", "L1 L2 - L2 L1"), ("products", "I - L1 L2 L1 L2")):
            for name, norm in row["group"][key].items():
                print(f"|{formula}| of {name}: {norm:.1e}")
        if row["group"]["directions"]:
            print(f"latent directions that {' and '.join(augs)} keep (+) or reverse (-): "
                  + ", ".join(f"{k} {v}" for k, v in row["group"]["directions"].items()))
    if len(row["elements"]) > len(names):
        print_table("the whole group", ["nats", "shown"], [
            (name, [value, "yes" if name in names else "never"])
            for name, value in row["elements"].items()])
    report_transfers(result["transfer"], totals)


def report_transfers(transfers: dict[str, dict], paper: dict[str, float]) -> None:
    """Print the row of each transfer, with the paper's total below it where there is one."""
    for target, row in transfers.items():
        columns = [*view_names(target.split("+")), "total"]
        rows = [("LAVAE, D_B(E(x) L)", [row[c] for c in columns])]
        if target in paper:
            rows.append(("  paper", [*[None] * (len(columns) - 1), paper[target]]))
        print_table(f"transfer to {target}", columns, rows)
        print("a view: " + ", ".join(f"{row[key]:.1f} where the probe names it {word}"
                                     for key, word in (("correctly_classified", "correctly"),
                                                       ("wrongly_classified", "wrongly"))
                                     if row[key] is not None))


def no_repeats(runs: Sequence["Run"]) -> str:
    """Which settings differ between runs that should differ in their seeds alone. "": none."""
    first = runs[0].settings
    differ = [key for key in first if key not in ("seed", "device")
              and any(run.settings.get(key) != first[key] for run in runs)]
    if not differ and len({one.settings["seed"] for one in runs}) < len(runs):
        return "nothing: two have one seed, and are copies"
    return ", ".join(differ)


def report_seeds(group: Sequence["Run"]) -> None:
    """Print the mean and standard deviation of runs that differ in their seeds alone."""
    if why := no_repeats(group):
        print(f"no mean of {' and '.join(str(one.folder) for one in group)}: they differ in {why}")
        return
    augs, results = group[0].augs, [one.result for one in group]
    columns, rows = [*view_names(augs), "total", "identity, %"], []
    for name in LABELS:
        found = [models_of(result)[name] for result in results if name in models_of(result)]
        if len(found) > 1:
            values = [[row[c] for row in found] for c in columns[:-1]]
            values.append([100 * statistics.mean(row["identity"].values()) for row in found])
            rows.append((f"{LABELS[name]}, {len(found)} runs", [spread(v) for v in values]))
    if rows:
        print_table(f"{group[0].folder}, .., mean +- sd", columns, rows)
    if len(group) > 1 and "lavae" in results[0]:
        ours = [result["lavae"] for result in results]
        print("LAVAE, direct, total:", spread([sum(row["direct"].values()) for row in ours]))
        print("LAVAE, reverse minus composition:",
              spread([row["reverse"] - row[view_names(augs)[-1]] for row in ours]))
        print("LAVAE, probe accuracy, %:", spread([100 * row["probe_accuracy"] for row in ours]))
        for target in results[0]["transfer"]:
            print(f"LAVAE, transfer to {target}, total:",
                  spread([result["transfer"][target]["total"] for result in results]))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard deviation, as text."""
    return f"{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}"


def heatmap_row(results: Sequence[dict]) -> dict[str, list[float]]:
    """A row of the heat-map, from evaluations of one source that differ in their seeds alone:
    {"native": totals, "probe_accuracy": .., target: totals}. "native": of the first decoder."""
    return {"native": [result["lavae"]["total"] for result in results],
            "probe_accuracy": [result["lavae"]["probe_accuracy"] for result in results],
            **{target: [result["transfer"][target]["total"] for result in results]
               for target in results[0]["transfer"]}}


def save_heatmap(runs: Sequence["Run"]) -> None:
    """Print the heat-map of the runs, {source: row}, and write it beside the first run's folder.

    Several runs of one source are averaged. Raises OSError; ValueError: these differ in more than
    their seeds.
    """
    folder, dataset, table = runs[0].folder.parent, runs[0].dataset, {}
    for source in dict.fromkeys("+".join(run.augs) for run in runs):
        group = [run for run in runs if "+".join(run.augs) == source]
        if why := no_repeats(group):
            raise ValueError(f"the runs of {source} differ in {why}: name heat-maps that differ in "
                             "their seeds alone")
        table[source] = heatmap_row([one.result for one in group])
    report_heatmap(dataset, table)
    (folder / "heatmap.json").write_text(json.dumps(table, indent=1))
    save(heatmap(dataset, table), folder / "heatmap.png")
    print(f"  {folder / 'heatmap.png'}")


def cell_of(row: dict, source: str, target: str) -> list[float]:
    """The totals of a cell of the heat-map; on the diagonal those of the first decoder."""
    return row.get("native" if source == target else target, [])


def beside_paper(dataset: str, table: dict) -> list[tuple[str, str, float, float]]:
    """(source, target, mean total, the paper's total) of each cell that the paper has, too."""
    return [(source, target, statistics.mean(totals), paper) for source, row in table.items()
            for target, paper in of_paper(PAPER_TOTALS, dataset, source).items()
            if (totals := cell_of(row, source, target))]


def report_heatmap(dataset: str, table: dict) -> None:
    """Print the heat-map, and how many of its cells are below the paper's."""
    targets = [*dict.fromkeys(key for row in table.values() for key in row)]
    print_table("trained on; transferred to", targets, [
        (source, [statistics.mean(row[key]) * (100 if key == "probe_accuracy" else 1)
                  if key in row else None for key in targets]) for source, row in table.items()])
    if cells := beside_paper(dataset, table):
        print(f"{sum(ours < paper for *_, ours, paper in cells)} of {len(cells)} cells are below "
              "the paper's; on the diagonal the first decoder counts")


# ---------------------------------------------------------------- projections to the plane


def pca(x: np.ndarray, k: int = 2) -> np.ndarray:
    """Principal components, by SVD: (N, d) to the k directions of largest variance, (N, k)."""
    x = x - x.mean(0)
    directions = np.linalg.svd(x, full_matrices=False)[2][:k]
    largest = np.abs(directions).argmax(1)  # whose sign is +, so that figures do not flip
    return x @ (directions * np.sign(directions[np.arange(k), largest])[:, None]).T


def fast_ica(x: np.ndarray, k: int = 2, seed: int = 0) -> np.ndarray:
    """Independent components, by FastICA with log cosh: (N, d) to (N, k) of unit variance.

    The first k principal components are scaled to unit variance. Then they are rotated until each
    is as far from a normal distribution as possible. A step is w <- E[x g(w x)] - E[g'(w x)] w with
    g = tanh, for each direction w; then the directions are made orthogonal again.
    """
    white = pca(x.astype(np.float64), k)
    white /= white.std(0).clip(min=1e-12)  # a collapsed latent has no variance
    W = np.linalg.qr(np.random.default_rng(seed).standard_normal((k, k)))[0]
    for _ in range(1000):
        g = np.tanh(white @ W.T)
        u, _, v = np.linalg.svd(g.T @ white / len(white) - (1 - g ** 2).mean(0)[:, None] * W)
        W, before = u @ v, W  # (W W^T)^(-1/2) W
        if np.abs(1 - np.abs((W * before).sum(1))).max() < 1e-10:
            break
    return white @ W.T


def tsne(x: np.ndarray, perplexity: float = 30, steps: int = 1000) -> np.ndarray:
    """Exact t-SNE, (N, d) to (N, 2): neighbours stay neighbours, but distances mean little.

    P says how near two points are in d dimensions, under Gaussians whose width gives each point
    `perplexity` neighbours. Q says the same in the plane, under Student's t. Gradient descent with
    momentum and gains minimises KL(P || Q), in the first 250 steps with 12 P. It starts at the
    principal components, and the learning rate is N / 48, at least 25. A step needs time and memory
    of N^2, so take some thousands of points at most.
    """
    x = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    n = len(x)
    distances = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    low, high, beta = torch.zeros(n, 1), torch.full((n, 1), math.inf), torch.ones(n, 1)
    beta /= distances[distances.isfinite()].mean()
    distances -= distances.min(1, keepdim=True).values  # beyond the nearest neighbour's
    for _ in range(50):  # bisect for the widths: entropy = log(perplexity)
        p = torch.exp(-beta * distances)
        total = p.sum(1, keepdim=True)
        p /= total
        entropy = total.log() + (p * (beta * distances.nan_to_num(0, 0))).sum(1, keepdim=True)
        narrow = entropy > math.log(perplexity)  # the Gaussian must become narrower
        low, high = torch.where(narrow, beta, low), torch.where(narrow, high, beta)
        beta = torch.where(high.isinf(), beta * 2, (low + high) / 2)
    P = ((p + p.T) / (2 * n)).clamp_(min=1e-12)

    y = torch.from_numpy(pca(x.numpy(), 2).astype(np.float32))  # (N, 2), moved by the gradient
    y *= 1e-4 / y[:, 0].std()
    velocity, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(n / 48, 25)
    for step in range(steps):
        early = step < 250
        squares = y.square().sum(1)
        t = (squares[:, None] + squares).addmm_(y, y.T, alpha=-2).add_(1).reciprocal_()
        t.fill_diagonal_(0)
        pull = torch.mul(t, -1 / t.sum()).add_(P, alpha=12 if early else 1).mul_(t)
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        same = (gradient * velocity) > 0
        gains = torch.where(same, gains * 0.8, gains + 0.2).clamp_(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gains * gradient
        y += velocity
    return (y - y.mean(0)).numpy()


# ---------------------------------------------------------------- figures: what they share


@torch.no_grad()
def draw(decoder: nn.Module, z: Tensor) -> np.ndarray:
    """Latents (N, latent_dim) to pictures, uint8 (N, 28, 28)."""
    return (decoder(z).sigmoid() * 255).round().byte().cpu().numpy()


@dataclass
class Run:
    """What the figures are made from: a trained run, and the digits that all figures show."""
    folder: Path
    models: dict[str, LAVAE | CVAE]  # by the name of --model
    dataset: str  # its name
    data: Sequence[np.ndarray]  # as load_images gives it
    digits: np.ndarray  # uint8 (n, 28, 28), one image of each class
    labels: np.ndarray  # (n,), their classes
    columns: Sequence[str]  # (n,), what these are called
    device: torch.device
    seed: int

    def __post_init__(self):
        """names: of the views. products: what follows z in the formula of each view, and last in
        that of the reverse composition: "", " L1", " L2", " L1 L2", " L2 L1"."""
        first = next(iter(self.models.values()))
        self.augs, self.settings, self.names = first.augs, first.settings, view_names(first.augs)
        order = range(1, len(self.augs) + 1)
        self.products = [*views("", [lambda s, i=i: f"{s} L{i}" for i in order]),
                         "".join(f" L{i}" for i in reversed(order))]

    @cached_property
    def result(self) -> dict:
        """What evaluation.json holds. It is measured when it is first needed."""
        x, y = self.data[2:]
        images = tensors(x, self.augs, self.device)
        rows = {name: row_of(model, latents_of_views(model, x, y, self.device), images)
                for name, model in self.models.items() if name != "lavae"}
        if "lavae" not in self.models:
            return rows
        ours = measure(self.models["lavae"], self.data, self.device)
        return ours | ({"baselines": rows} if rows else {})

    def model(self, name: str = "lavae") -> LAVAE | CVAE:
        """The model of this name. Raises NotAvailable: the run has none."""
        require(name in self.models, "a LAVAE" if name == "lavae" else
             f"the model {name}: train it with `python train.py --baselines`")
        return self.models[name]

    def planar(self) -> LAVAE:
        """The LAVAE. Raises NotAvailable: it has one latent only, which cannot be drawn in a plane.
        """
        require(self.model().latent_dim >= 2,
             "latents of two numbers or more: train with another --latent-dim")
        return self.model()

    def linear(self) -> LAVAE:
        """The LAVAE. Raises NotAvailable: its maps are not matrices."""
        require(isinstance(self.model().maps[0], LatentMap),
                "linear maps: train without --latent-map")
        return self.model()

    def encode(self, images: np.ndarray) -> Tensor:
        """Latents of uint8 images (N, 28, 28)."""
        return self.model().encode(torch.from_numpy(images).to(self.device))

    def through_maps(self, z: Tensor, formula: str = "D(z{})",
                     decoder: nn.Module | None = None) -> list[tuple[str, np.ndarray]]:
        """Draw latents (N, latent_dim) as each view, and last in the reverse composition.

        Returns rows of a grid, (formula, pictures). decoder: a head, instead of the first decoder.
        """
        model = self.model()
        latents = [*views(z, model.maps), reverse(model, z)]
        return [(formula.format(L), draw(decoder or model.decoder, z_v))
                for L, z_v in zip(self.products, latents)]


class NotAvailable(ValueError):
    """A run cannot have this figure. The message says what it would need."""


def require(there: bool, what: str) -> None:
    """Raises NotAvailable: what a figure needs is not there."""
    if not there:
        raise NotAvailable(f"needs {what}")


def spaced(groups: Iterable[Sequence]) -> list:
    """The rows of all groups for a grid, with a gap between one group and the next."""
    return [row for group in groups for row in (*group, None)][:-1]


def view_rows(augs: Sequence[str], digits: np.ndarray, *drawn: Sequence[tuple]) -> list:
    """Rows of a grid: for each view the images, and below them what was drawn of it.

    drawn: lists with (label, pictures) for each view.
    """
    return spaced(zip(zip(view_names(augs), all_views(digits, augs)), *drawn))


COLOURS = [(31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14),
           (23, 190, 207), (227, 119, 194), (127, 127, 127)]


Series = tuple[str, Sequence, str]  # label, points (N, 2), style: dots, rings, line or path


def chart(title: str, panels: Sequence[Sequence[tuple[str, Sequence[Series]]]], side: int = 420,
          axes: tuple[str, str] | None = None, reach: float | None = None) -> Image.Image:
    """Rows of panels (heading, series) under a title and a legend. A label has one colour in all.

    axes: the names of x and y. With them both axes begin at 0 and have round ticks. reach: without
    names, both axes go from -reach to reach; else the points fill the panel.
    """
    labels = dict.fromkeys(label for row in panels for _, series in row for label, *_ in series)
    colours = dict(zip(labels, cycle(COLOURS)))
    entries = [table([[box((14, 14), colour), text(label)]]) for label, colour in colours.items()]
    room = max(1, (side + 24) * max(map(len, panels)) // max(entry.width + 16 for entry in entries))
    legend = table([entries[i:i + room] for i in range(0, len(entries), room)], "l", gap=16)
    return titled(title, legend, table([[table([
        [text(heading)], [panel(side, series, colours, axes, reach)]], "c")
        for heading, series in row] for row in panels], "c", gap=24))


def panel(side: int, series: Sequence[Series], colours: dict[str, tuple],
          axes: tuple[str, str] | None, reach: float | None) -> Image.Image:
    """A square with points and lines in it, see `chart`."""
    page = Image.new("RGB", (side, side), "white")
    pen = ImageDraw.Draw(page)
    every = np.concatenate([np.asarray(points, float) for _, points, _ in series])
    low, high = (every.min(0), every.max(0)) if reach is None else np.outer([-reach, reach], [1, 1])
    if axes:
        ticks = [round_ticks(top) for top in high]
        low, high = np.zeros(2), np.array([values[-1] for values in ticks])
    if reach is not None:  # a cross at 0
        pen.line((0, side / 2, side, side / 2), "silver", 2)
        pen.line((side / 2, 0, side / 2, side), "silver", 2)
    span, dots = np.where(high > low, high - low, 1), []
    for label, points, style in sorted(series, key=lambda one: one[2]):  # dots come later, on top
        at = ((np.asarray(points, float) - low) / span * [1, -1] + [0, 1]) * (side - 24) + 12
        if style in ("line", "path"):
            pen.line([*map(tuple, at)], colours[label], 4, "curve")
        radius = {"dots": max(2, side // 140), "rings": 9, "path": 5, "line": 0}[style]
        dots += [(x, y, radius, style == "rings", colours[label]) for x, y in at if radius]
    rng = np.random.default_rng(0)  # in random order, so that no series hides another
    for x, y, r, hollow, colour in sorted(dots, key=lambda dot: (dot[2], rng.random())):
        pen.ellipse((x - r, y - r, x + r, y + r), None if hollow else colour, colour, 4)
    page = ImageOps.expand(page, 1, "silver")
    return with_axes(page, axes, ticks) if axes else page


def round_ticks(top: float, most: int = 6) -> list[float]:
    """Ticks from 0 to `top` or a little more, in steps of 1, 2 or 5 times a power of ten; at most
    `most` + 1 of them."""
    step = next(step for power in range(-9, 10) for digit in (1, 2, 5)
                if (step := digit * 10.0 ** power) * most >= top)
    return [step * i for i in range(max(1, math.ceil(top / step)) + 1)]


def with_axes(page: Image.Image, names: Sequence[str], ticks: Sequence[Sequence[float]]
              ) -> Image.Image:
    """Add the names of the axes, x and y, and their ticks to a panel."""
    left, room = 100, page.width - 26  # the panel has a margin of 13 pixels
    whole = Image.new("RGB", (page.width + left + 20, page.height + 70), "white")
    whole.paste(page, (left, 10))
    pen = ImageDraw.Draw(whole)
    for axis, values in enumerate(ticks):
        for value in values:
            share, label = value / values[-1], text(f"{value:g}", 20)
            x = left + 13 + room * share if axis == 0 else left
            y = 10 + page.height - 13 - room * share if axis else 10 + page.height
            pen.line((x, y, x + 8 * axis, y - 8 * (1 - axis)), "black", 2)
            x, y = (x - label.width / 2, y + 2) if axis == 0 else (x - label.width,
                                                                   y - label.height / 2)
            whole.paste(label, (round(x), round(y)))
    name, turned = text(names[0], 22), text(names[1], 22).rotate(90, expand=True)
    whole.paste(name, (left + (page.width - name.width) // 2, whole.height - name.height))
    whole.paste(turned, (0, 10 + (page.height - turned.height) // 2))
    return whole


def bar_chart(title: str, bars: Sequence[tuple[str, float, float | None]]) -> Image.Image:
    """Horizontal bars. bars: (label, value, the paper's value or None), in nats an image."""
    scale, rows = 1000 / max(v for _, *values in bars for v in values if v is not None), []
    for label, value, paper in bars:
        rows += [[], [text(label, 28), box((round(value * scale), 56), COLOURS[0],
                                           (f"{value:.0f}", 28), ink="white")]]
        rows += [[None, box((round(paper * scale), 36), (200, 60, 40), (f"paper {paper:.0f}", 22),
                            ink="white")]] if paper is not None else []
    return titled(title, table(rows[1:], "rl"))


def heatmap(dataset: str, numbers: dict) -> Image.Image:
    """The heat-map of `save_heatmap` as a picture: rows are sources, columns are targets."""
    keys = [key for row in numbers.values() for key in row]
    columns = [key for key in dict.fromkeys([*PAPER_TOTALS, *keys]) if key in keys and "+" in key]
    rows = [[None, *(text(c.replace("+", "\n"), 26) for c in [*columns, "probe+accuracy"])]]
    for source, row in numbers.items():
        paper = of_paper(PAPER_TOTALS, dataset, source)
        rows.append([text(source.replace("+", "\n"), 26),
                     *(heatmap_cell(row, source, c, paper.get(c)) for c in columns),
                     text(f"{statistics.mean(row['probe_accuracy']):.1%}", 44)])
    colours = "blue: below the paper's, red: above; " if dataset == "mnist" else f"{dataset}; "
    return titled("Trained on a pair (rows), drawn as another (columns): nats, all four views",
                  table(rows), text(f"{colours}on the diagonal the decoder of stage 1, and beneath "
                                    "it a new one", 26))


def heatmap_cell(row: dict, source: str, target: str, paper: float | None) -> Image.Image | None:
    """A cell of the heat-map: the mean total and the paper's, on the diagonal also a new decoder's.
    It is blue where ours is lower than the paper's, and red where it is higher."""
    totals, notes = cell_of(row, source, target), []
    if not totals:
        return None
    value = statistics.mean(totals)
    share = 0 if not paper else max(-1, min(1, 2 * math.log(value / paper)))
    fade = round(255 - 130 * abs(share))
    if source == target and target in row:
        notes.append(f"new decoder {statistics.mean(row[target]):.0f}")
    notes += [f"paper {paper:.0f}"] if paper else []
    return box((250, 150), (255, fade, fade) if share > 0 else (fade, fade, 255),
               (f"{value:.0f}", 44), *((note, 26) for note in notes))


# ---------------------------------------------------------------- the paper's figures


def fig3_views(run):
    """Fig. 3: every view drawn from the original's latent"""
    drawn = run.through_maps(run.encode(run.digits), "D(E(x){})")
    formula, pictures = drawn[-1]
    return grid(f"Augment in latent space: {' and '.join(run.augs)}", run.columns, [
        *view_rows(run.augs, run.digits, drawn), None, (f"reverse {formula}", pictures)])


def fig4_inverses(run):
    """Fig. 4: every view back to the original"""
    model = run.model()
    rows = [("orig", run.digits), ("D(E(x))", draw(model.decoder, run.encode(run.digits)))]
    views_of_digits = all_views(run.digits, run.augs)
    for v, (name, view, L) in enumerate(zip(run.names, views_of_digits, run.products)):
        if v:
            inverse = f"({L.strip()})^-1" if L.count("L") > 1 else f"{L.strip()}^-1"
            z = model.from_view(run.encode(view), v)
            rows += [None, (f"v = {name}", view), (f"D(E(v) {inverse})", draw(model.decoder, z))]
    return grid(f"Back to the original: {' and '.join(run.augs)}", run.columns, rows)


def fig5_recursion(run, rounds=7):
    """Fig. 5: encode, map, decode, and again, seven rounds; two of the paths in the ICA plane"""
    model, path, rows = run.planar(), [run.encode(run.digits)], [("x", run.digits)]
    for k in range(1, rounds + 1):
        rows.append((f"round {k}", draw(model.decoder, model.maps[0](path[-1]))))
        path.append(run.encode(rows[-1][1]))
    path = torch.stack(path).cpu().numpy()  # (rounds + 1, n, latent_dim)
    moved = drift(path, ORDERS.get(run.augs[0]))
    stable, unstable = moved.argmin(), moved.argmax()
    latents = [run.encode(v[:400]).cpu().numpy() for v in all_views(run.data[2], run.augs)]
    plane = fast_ica(np.concatenate([*latents, path[:, stable], path[:, unstable]]))
    parts = np.split(plane, np.cumsum([400] * len(latents) + [rounds + 1]))
    series = [(name, part, "dots") for name, part in zip(run.names, parts)]
    series += [(f"{word}: {run.columns[i]}", part, "path") for word, i, part in zip(
        ("stable", "unstable"), (stable, unstable), parts[len(latents):])]
    return table([[
        grid(f"x <- D(E(x) L1), again and again: {run.augs[0]}", run.columns, rows, cell=72),
        chart("Test latents and two paths, ICA", [[("", series)]], side=500)]])


def drift(path: np.ndarray, order: int | None) -> np.ndarray:
    """How far each of n paths, (rounds + 1, n, d), is from where it should be: (n,).

    After a multiple of `order` rounds a path should be back at its start. Without an order, it
    should not move any more in the last round.
    """
    rounds = len(path) - 1
    a, b = (0, rounds - rounds % order) if order else (rounds - 1, rounds)
    return np.linalg.norm(path[b] - path[a], axis=1)


def fig6_transfer(run):
    """Fig. 6: the same latents drawn by the decoder of each transfer"""
    model, z = run.model(), run.encode(run.digits)
    require(bool(model.transfers), "a transfer: train with --transfer")
    return {f"fig6_{key}": grid(
        f"Same latents, new decoder: {' and '.join(run.augs)} to {' and '.join(augs)}", run.columns,
        view_rows(augs, run.digits, run.through_maps(z, "D_B(E(x){})", head)))
        for augs, (key, head) in zip(model.transfers, model.heads.items())}


def fig8_cvae(run):
    """Fig. 8: the naive CVAE, its condition changed"""
    model = run.model("cvae")
    names, latents = run.names, latents_of_views(model, run.digits, run.labels, run.device)
    by_digit = model.arguments["condition"] == "digit"  # it knows of no views
    if by_digit:
        z, names = latents[0][:, :model.latent_dim], run.columns
        latents = [model.to_view(z, 0, torch.full((len(z),), label, device=run.device))
                   for label in run.labels.tolist()]
    drawn = [(f"D(z, {name})", draw(model.decoder, z)) for name, z in zip(names, latents)]
    return grid("Naive CVAE: the condition changed", run.columns, [("x", run.digits), *drawn]
                if by_digit else view_rows(run.augs, run.digits, drawn))


def fig9_paired_cvae(run):
    """Fig. 9: the CVAE that is trained like a LAVAE, beside the LAVAE"""
    drawn = [[(label, draw(model.decoder, z))
              for z in latents_of_views(model, run.digits, run.labels, run.device)]
             for label, model in (("CVAE", run.model("cvae-paired")), ("LAVAE", run.model()))]
    return grid("CVAE trained like a LAVAE, and the LAVAE", run.columns,
                view_rows(run.augs, run.digits, *drawn))


def fig10_projections(run, n=200):
    """Fig. 10: images, latents and mapped latents in the plane, by PCA, ICA and t-SNE"""
    n = min(n, 4000 // len(run.names))  # t-SNE compares each point with each
    images = all_views(run.data[2][:n], run.augs)
    z = run.encode(images[0])
    clouds = {"images": np.concatenate(images).reshape(-1, images[0][0].size) / 255,
              "latents E(view)": np.concatenate([run.encode(v).cpu().numpy() for v in images]),
              "mapped E(x) L": torch.cat(views(z, run.planar().maps)).cpu().numpy()}
    return chart(f"{n} test digits, all views", [[
        (f"{cloud}, {name}", [(view, part, "dots") for view, part in zip(
            run.names, np.split(project(points), len(images)))])
        for cloud, points in clouds.items()]
        for name, project in (("PCA", pca), ("ICA", fast_ica), ("t-SNE", tsne))], side=260)


def sampling(run):
    """new digits and their views: z uniform in the bounding box of the training images' latents"""
    z = run.encode(run.data[0][:10_000])
    share = torch.from_numpy(np.random.default_rng(run.seed).random((10, z.shape[1]), np.float32))
    low, high = z.min(0).values, z.max(0).values
    return grid("Sampled from the bounding box of the originals' latents", [""] * 10,
                run.through_maps(low + share.to(z) * (high - low)))


def interpolation(run):
    """from one test digit to another in a straight line, and its views"""
    z = run.encode(run.digits[[2 % len(run.digits), 7 % len(run.digits)]])
    t = torch.linspace(0, 1, 10).to(z)[:, None]
    return grid("Interpolation in latent space, z = (1 - t) E(x) + t E(y)",
                [f"{v:.2f}" for v in t[:, 0].tolist()], run.through_maps((1 - t) * z[0] + t * z[1]))


# ---------------------------------------------------------------- more figures


def any_to_any(run):
    """one digit from every view to every view"""
    one = len(run.digits) * 7 // 10  # of ten digits the 7: all its views look different
    model, rows = run.model(), []
    for v, (name, view) in enumerate(zip(run.names, all_views(run.digits[one:one + 1], run.augs))):
        drawn = run.through_maps(model.from_view(run.encode(view), v))[:-1]
        rows.append((f"from {name}", [view[0], *(pictures[0] for _, pictures in drawn)]))
    return grid("Any view to any view: D(E(v) L_from^-1 L_to)",
                ["v", *(f"to {name}" for name in run.names)], rows, 168 if len(rows) <= 4 else 72)


def table1(run):
    """the totals of Table I as bars"""
    rows, paper = models_of(run.result), of_paper(PAPER_TABLE, run.dataset, "+".join(run.augs))
    require(len(rows) > 1, "baselines: train them with `python train.py --baselines`")
    return bar_chart("Table I: total of all views, nats an image", [
        (label_of(name, row), row["total"],
         sum(paper[name]) if name in paper and "told" not in row else None)
        for name, row in rows.items()])


def group_elements(run):
    """every element of the group that turns and flips generate; some are never shown in training"""
    functions, found = [AUGMENTATIONS[aug] for aug in run.augs], elements(run.augs)
    require(len(found) > len(run.names),
            "augmentations with more products than views, like rotate_cw")
    model, z, rows = run.linear(), run.encode(run.digits), []
    for name, exponents in found.items():
        letters = "".join(f" L{i}^{n}" if n > 1 else f" L{i}"
                          for i, n in enumerate(exponents, 1) if n)
        new = "" if name in run.names else ", never shown"
        rows += [None, (name + new, powers(run.digits, functions, exponents)),
                 (f"D(E(x){letters})", draw(model.decoder, powers(z, model.maps, exponents)))]
    return grid(f"The group of {' and '.join(run.augs)}", run.columns, rows[1:], cell=56)


def eigenvalues(run):
    """the eigenvalues of each map around the unit circle"""
    turn, panels, found = np.linspace(0, 2 * math.pi, 200), [], group(run.linear())["eigenvalues"]
    for name, values in found.items():
        near = {word: sum(abs(complex(*v) - at) < 0.1 for v in values)
                for word, at in (("+1", 1), ("-1", -1), ("+i", 1j), ("-i", -1j))}
        heading = ", ".join(f"{n} at {word}" for word, n in near.items() if n)
        panels.append((f"{name}: {heading or 'none at a root'}", [
            ("unit circle", np.stack([np.cos(turn), np.sin(turn)], 1), "line"),
            ("eigenvalue", values, "rings")]))
    reach = max(1, *(abs(complex(*v)) for values in found.values() for v in values))
    return chart("Eigenvalues of the maps, in the complex plane", [panels], 560, reach=1.1 * reach)


def partial_augmentation(run):
    """half an augmentation: L^t beside the blend (1 - t) I + t L"""
    ts = np.linspace(0, 1, 9)
    steps = [part_of(run, t) for t in ts]
    return grid(f"Part of {run.augs[0]}", [f"t = {t:.2f}" for t in ts], spaced(
        [(f"{run.columns[i]}: {label}", [drawn[label][i] for drawn in steps]) for label in steps[0]]
        for i in range(2 % len(run.digits), len(run.digits), 2)))


def partial_moving(run):
    """half an augmentation, moving (GIF)"""
    there = [grid(f"Part of {run.augs[0]}, t = {t:.2f}", run.columns, [*part_of(run, t).items()],
                  cell=56) for t in np.linspace(0, 1, 13)]
    return there + there[::-1]


def part_of(run: Run, t: float) -> dict[str, np.ndarray]:
    """D(E(x) L^t) and D(E(x) ((1 - t) I + t L)) of the first map: {"L^t": pictures, ..}."""
    z, L = run.encode(run.digits), run.linear().maps[0].L
    matrices = {"L^t": matrix_power(L, t),
                "(1 - t) I + t L": (1 - t) * torch.eye(len(L)).to(L) + t * L}
    return {label: draw(run.model().decoder, z @ M) for label, M in matrices.items()}


def reconstructions(run):
    """reconstructions beside their inputs, of digits that no other figure shows"""
    x = run.data[2][100:140]
    drawn = draw(run.model().decoder, run.encode(x))
    return grid("Test images, and D(E(x)) beneath", [""] * 10, spaced(
        [("x", x[i:i + 10]), ("D(E(x))", drawn[i:i + 10])] for i in range(0, len(x), 10)))


def prior_samples(run):
    """new digits from the prior, z ~ N(0, I): all views at once, as stage 1 saw them"""
    z = np.random.default_rng(run.seed).standard_normal((60, run.model().latent_dim), np.float32)
    drawn = draw(run.model().decoder, torch.from_numpy(z).to(run.device))
    return grid("Samples of the prior, z ~ N(0, I)", [""] * 10,
                [("", drawn[i:i + 10]) for i in range(0, 60, 10)])


def traversals(run):
    """what each latent does: a row a dimension, from -3 to 3"""
    z = run.encode(run.digits[2 % len(run.digits)][None])  # (1, latent_dim)
    steps = torch.linspace(-3, 3, 9).to(z)
    chosen = torch.eye(z.shape[1], device=z.device).bool()  # a row for each latent
    rows = [(f"z{i}", draw(run.model().decoder, torch.where(one, steps[:, None], z)))
            for i, one in enumerate(chosen, 1)]
    return grid("One latent moved, the others kept", [f"{v:.2f}" for v in steps.tolist()], rows, 52)


def latent_plane(run, n=15):
    """the whole latent plane, decoded (--latent-dim 2 only)"""
    require(run.model().latent_dim == 2, f"a run with --latent-dim 2, not {run.model().latent_dim}")
    at = torch.linspace(-2.5, 2.5, n)
    z = torch.cartesian_prod(at.flip(0), at).flip(1).to(run.device)  # rows: z2 from the top down
    drawn = draw(run.model().decoder, z).reshape(n, n, 28, 28)
    heads = [f"{round(v, 1) + 0:.1f}" for v in at.tolist()]  # + 0: no minus before a zero
    return grid("D(z): z1 across, z2 upwards", heads, [*zip(heads[::-1], drawn)], cell=56)


def training_curves(run):
    """the losses of each stage as it learns"""
    try:
        history = json.loads((run.folder / "metrics.json").read_text())["history"]
        panels = [(stage, [(key, curve_of(rows, key), "line")
                           for key in ("bce", "kl", "loss") if key in rows[0]])
                  for stage, rows in history.items() if rows and "epoch" in rows[0]]
        require(bool(panels), "an epoch")
    except (AttributeError, OSError, ValueError, LookupError, TypeError) as error:
        raise NotAvailable("needs the metrics.json that train.py wrote") from error
    return chart("Training", [panels], axes=("epoch", "nats an image"))


def curve_of(rows: Sequence[dict], key: str, smooth: int = 5) -> np.ndarray:
    """(epoch, loss), (N, 2): means of the loss `key` over `smooth` hundredths of an epoch. The
    first tenth of an epoch is left out, because its losses are too high for the chart."""
    points = np.array([[value for row in rows for value in row["curve"][name]]
                       for name in ("epoch", key)])
    smooth = min(smooth, points.shape[1])
    points = np.stack([np.convolve(one, np.ones(smooth) / smooth, "valid") for one in points], 1)
    return points[points[:, 0] > 0.1]


def training_moving(run):
    """stage 1 as it learns (GIF; needs a run with --record)"""
    run.planar()
    try:
        frames = lavae.read(run.folder / "recording.pt")
        latents, drawn = (torch.stack(frames[key]) for key in ("latents", "drawn"))
        n = len(run.names)
        plane = pca(latents.flatten(0, 2).numpy()).reshape(len(latents), n, -1, 2)
    except (OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise NotAvailable("needs a run with --record") from error
    return [table([[
        grid(f"Stage 1, {t:.0%} of the steps", [""] * drawn.shape[2],
             [*zip(run.names, pictures.numpy())], max(8, 440 // n - 6)),
        chart("Latents, PCA", [[("", [*zip(run.names, points, ["dots"] * n)])]], 360)]])
        for t, pictures, points in zip(frames["t"], drawn, plane)]


def page(run, steps=20):
    """a page for the browser (HTML): draw a digit, and see what the maps make of it"""
    model = run.linear()
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("maps")}
    for name in ("encoder.linear.weight", "encoder.linear.bias"):
        state[name] = state[name][:model.latent_dim]  # the rows of mu; logvar is not needed

    def halves(t):  # as little-endian float16
        return base64.b64encode(t.cpu().numpy().astype("<f2").tobytes()).decode()

    content = {
        "latent_dim": model.latent_dim, "entry": model.arguments["entry"], "views": run.names,
        "tensors": {name: [list(t.shape), halves(t)] for name, t in state.items()},
        "maps": [{"name": aug, "L": f.L.flatten().tolist(),
                  "inverse": f.inverse(torch.eye(model.latent_dim).to(f.L)).flatten().tolist(),
                  "powers": halves(torch.stack([matrix_power(f.L, t / steps)
                                                for t in range(steps + 1)]))}
                 for aug, f in zip(model.augs, model.maps)],
        "heads": [[name, view_names(name.split("+"))] for name in model.heads],
        "digits": [base64.b64encode(digit.tobytes()).decode() for digit in run.digits]}
    template = Path(__file__).with_name("assets") / "page.html"
    return template.read_text(encoding="utf-8").replace(">MODEL<", f">{json.dumps(content)}<")


# Each figure takes a Run. It returns a picture, a list of pictures (a GIF), a text (HTML), or
# pictures by name. It raises NotAvailable where the run lacks what it needs. --list prints the
# docstrings.
FIGURES: dict[str, Callable] = {f.__name__: f for f in (
    fig3_views, fig4_inverses, fig5_recursion, fig6_transfer, fig8_cvae, fig9_paired_cvae,
    fig10_projections, sampling, interpolation, any_to_any, table1, group_elements, eigenvalues,
    partial_augmentation, partial_moving, reconstructions, prior_samples, traversals, latent_plane,
    training_curves, training_moving, page)}

# ---------------------------------------------------------------- from the command line to files


def draw_figures(run: Run, figures: dict[str, Callable]) -> list[str]:
    """Draw and save figures, and print a line for each. Returns why some cannot be drawn."""
    missing = []
    for name, f in figures.items():
        start = time.perf_counter()
        try:
            pages = f(run)
            for part, page in (pages if isinstance(pages, dict) else {name: pages}).items():
                path = run.folder / f"{part}.{({list: 'gif', str: 'html'}).get(type(page), 'png')}"
                save(page, path)
                print(f"  {path}  {time.perf_counter() - start:.1f} s", flush=True)
        except NotAvailable as error:
            missing.append(f"{name} {error}")
    return missing


def own_images(run: Run, paths: Sequence[Path]) -> dict[str, Image.Image]:
    """A figure of one's own pictures: a row each, with its views and what the maps make of it.
    Raises ValueError: a picture cannot be read."""
    x = np.stack([like_mnist(path) for path in paths])
    drawn = run.through_maps(run.encode(x), "D(E(x){})")
    columns = [row for row in view_rows(run.augs, x, drawn) if row]
    rows = [(path.stem if len(path.stem) < 20 else f"{path.stem[:18]}..",
             [pictures[i] for _, pictures in columns]) for i, path in enumerate(paths)]
    page = grid("x as MNIST would have it, its views, and what the maps draw from x alone",
                [label for label, _ in columns], rows, cell=140)
    return {f"image_{paths[0].stem}" if len(paths) == 1 else "images": page}


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: all under runs/)")
    add("--only", nargs="+", metavar="NAME", choices=FIGURES, help="draw these figures, no more")
    add("--list", action="store_true", help="name the figures, and end")
    add("--digits", nargs="+", type=int, metavar="D",
        help="the classes that the figures show, by number (default: the first ten)")
    add("--seed", type=int, default=0, metavar="N", help="of what is sampled (default 0)")
    add("--image", nargs="+", type=Path, metavar="FILE",
        help="show these pictures or photos of a digit each through the maps")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="(default data/)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default auto)")
    add("--heatmap", action="store_true",
        help="RUN is a folder that train.py --heatmap made (default runs/heatmap): evaluate all\n"
             "that is in it, and draw the heat-map; of several folders the means")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the runs that the command line names."""
    parser = parser_of()
    options = parser.parse_args(argv)
    if options.list:
        with one_line_errors(parser):
            print("\n".join(f"{name:22} {f.__doc__}" for name, f in FIGURES.items()))
        return
    if options.heatmap and (options.only or options.image):
        parser.error("--heatmap draws all figures: leave --only and --image out")
    if options.seed < 0:
        parser.error(f"argument --seed: expected a whole number, 0 or more, not {options.seed}")
    chosen = {name: FIGURES[name] for name in options.only or ()}
    if options.image:
        chosen["--image"] = partial(own_images, paths=options.image)
    with one_line_errors(parser, ", or evaluate on another --device"):
        runs, missing = runs_of(options), []
        for run in runs:
            if chosen:
                missing += [f"{run.folder}: {why}" for why in draw_figures(run, chosen)]
            else:
                evaluate(run)
        if options.heatmap:
            save_heatmap(runs)
        elif len(runs) > 1 and not chosen:
            report_seeds(runs)
        if missing:
            raise ValueError("; ".join(missing))


def runs_of(options: argparse.Namespace) -> list[Run]:
    """Load the runs that the command line names. Raises OSError, ValueError: one cannot be read."""
    folders = options.runs or sorted(path.parent for path in Path("runs").glob("*/model.pt"))
    if options.heatmap:
        folders = [path.parent for folder in options.runs or [Path("runs/heatmap")]
                   for pair in PAPER_TOTALS for path in folder.glob(f"{pair}/model.pt")]
    if not folders:
        raise FileNotFoundError("there is no " + (
            "heat-map: train one with `python train.py --heatmap`" if options.heatmap else
            "run under runs/: train one with `python train.py`"))
    device, runs = lavae.verified_device(options.device, AdaBelief), []
    data_of = cache(partial(load_images, data_dir=options.data_dir))
    for folder in folders:
        folder = folder.parent if folder.is_file() else folder
        models = models_in(folder, device)
        dataset = next(iter(models.values())).settings["dataset"]
        data = data_of(dataset)
        labels, names = data[3], class_names(dataset, data[3], options.data_dir)
        if labels is None:  # then the first ten images stand for all
            digits, labels, names = data[2][:10], np.zeros(10, int), [""] * 10
        else:
            known = np.unique(labels)
            if unknown := [digit for digit in options.digits or () if digit not in known]:
                raise ValueError(f"--digits {unknown[0]}: {dataset} has no test image of it")
            chosen = np.isin(labels, options.digits or known[:10])
            digits, labels = one_of_each(data[2][chosen], labels[chosen]), np.unique(labels[chosen])
            names = [names[label] for label in labels]
        runs.append(Run(folder, models, dataset, data, digits, labels, names, device, options.seed))
    return runs


def evaluate(run: Run) -> None:
    """Print the tables of a run, and write evaluation.json and all figures that it can have."""
    print(f"\n{run.folder}: {' and '.join(run.augs)}, {run.dataset}, "
          f"{len(run.data[2]):,} test images")
    report(run.dataset, run.augs, run.result)
    (run.folder / "evaluation.json").write_text(json.dumps(run.result, indent=1))
    print()
    draw_figures(run, FIGURES)


def models_in(folder: Path, device: torch.device) -> dict[str, LAVAE | CVAE]:
    """The model of a run folder, and the baselines in the folders inside, by the name of --model.

    A baseline with another of these settings is left out, and a line says so: augmentations, data,
    seed, sizes, epochs. Raises OSError, ValueError: a model.pt cannot be read.
    """
    first, found = None, {}
    if not (folder / "model.pt").is_file() and any(folder.glob("*/model.pt")):
        raise FileNotFoundError(f"{folder} only holds runs: name those, or add --heatmap")
    for path in (folder, *sorted(path.parent for path in folder.glob("*/model.pt"))):
        model = lavae.load(path, device)
        name, augs = model.settings["model"], sum([model.augs, *model.transfers], [])
        if unknown := [aug for aug in augs if aug not in AUGMENTATIONS]:
            raise ValueError(f"{path} was trained with {unknown[0]}, which augment.py lacks")
        first = first or model
        differ = [key for key in ("augs", "dataset", "seed", "filters", "latent_dim", "epochs")
                  if model.settings[key] != first.settings[key]]
        if differ or name in found or (found and name == "lavae"):
            print(f"{path} is no baseline of {folder}, and left out: " + (
                f"it differs in {', '.join(differ)}" if differ else f"it is another {name}"))
        else:
            found[name] = model
    return {name: found[name] for name in LABELS if name in found}


if __name__ == "__main__":
    main()
