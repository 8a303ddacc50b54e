"""Measure and draw what trained models have learnt, on the test images.

    reconstruct    D(E(x))                                  Table I, Fig. 3
    augment        D(E(x) L_i)                              Table I, Fig. 3
    compose        D(E(x) L_1 L_2)                          Table I, Fig. 3
    reverse        D(E(x) L_2 L_1)                          Fig. 3
    invert         D(E(A_i x) L_i^-1)                       Fig. 4
    any to any     D(E(v) L_from^-1 L_to)
    transfer       D_B(E(x) L_i)                            Fig. 6
    the CVAEs                                               Table I, Figs. 8 and 9

    python evaluate.py                          # every run under runs/
    python evaluate.py runs/flip_lr+flip_ud     # this one
    python evaluate.py runs/seed0 runs/seed1    # these, and their mean and standard deviation

Prints the tables, and writes them, with the eigenvalues of the maps, to evaluation.json; writes the
figures to the run folders. It puts together what it is given: runs of the same data and the same
views share their tables; runs that differ in the seed alone get a mean; two sources or more with
transfers get the heat-map, which is written beside their folders. BCE is in nats an image. Latents
of images are posterior means, without noise. It computes on the CPU. In order: numbers, tables, the
heat-map, projections to the plane, what figures share, the figures, the command line. It is the
last script to read.
"""

import argparse
import base64
import inspect
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import cache, cached_property, partial
from itertools import count, cycle, groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor, nn

import lavae
from adabelief import AdaBelief
from augment import (
    AUGMENTATIONS,
    CLASSES,
    DATA_DIR,
    DERIVED,
    ORDERS,
    PAIRS,
    PARTS,
    TURNS,
    Refused,
    all_views,
    as_typed,
    evenly,
    grid,
    like_mnist,
    load_images,
    new_parser,
    one_line_errors,
    one_of_each,
    parsed,
    path_of,
    recorded,
    save,
    table,
    text,
    titled,
    true_picture,
    view_names,
    views,
)
from lavae import BLOCK, CVAE, LAVAE, apply_in_order, matrix_power, pixels

MODELS = {  # by --model, in the order of Table I
    "lavae": "LAVAE",
    "cvae": "CVAE, naive",
    "cvae-paired": "CVAE, paired",
    "vae": "VAE of originals",
}
TABLE_1, IDENTITY = "Table I, nats an image", "identity preserved, %"
ANY, GROUP = "any view to any, nats", "the group, nats"
PROBE, TRANSFER = "a probe names the view of z L, %", "transfer to B, nats"
PAPER_TABLE = {  # Table I, of flip_lr+flip_ud; it misprints the last row's total as 695.68
    "LAVAE": [68.34, 75.89, 71.30, 81.57],
    "CVAE, naive, told the view": [98.11, 260.18, 351.79, 279.82],
    "CVAE, paired": [99.15, 99.16, 99.26, 299.12],
}
PAIR_NAMES = ["+".join(pair) for pair in PAIRS]
PAPER_TOTALS = {  # the authors' slides 13 and 21, {trained on: totals transferred to each of these}
    PAIR_NAMES[0]: (297.10, 696.23, 447.01, 564.09),
    PAIR_NAMES[1]: (499.22, 500.86, 607.79, 336.65),
    PAIR_NAMES[2]: (440.25, 730.68, 329.20, 491.55),
    PAIR_NAMES[3]: (304.04, 781.76, 915.97, 516.54),
}
Tables = dict[str, dict[str, dict[str, float]]]  # {title: {row: {column: number}}}


class Run:
    """A trained model, the data that it is measured with, and the digits that its figures show.

    Args:
        folder: where its figures go.
        model: one with settings, as `lavae.load` gives it.
        data: as `load_images` gives it.
        classes: those of the digits, by number; None for the first ten.

    names: of the views. words: the numbers of the augmentations in each view, and last in the
    reverse composition, if there are two maps or more: (), (0,), (1,), (0, 1), (1, 0). digits:
    uint8 (n, 28, 28), one of each class; labels: their classes; columns: what these are called.
    Raises Refused: there is no such class, or augment.py lacks an augmentation.
    """

    def __init__(
        self,
        folder: Path,
        model: LAVAE | CVAE,
        data: Sequence[np.ndarray],
        classes: Sequence[int] | None = None,
    ):
        self.folder, self.model, self.data, self.augs = folder, model, data, model.augs
        self.settings, self.tables, self.peers = model.settings, {}, []
        self.kind, self.dataset = self.settings["model"], self.settings["dataset"]
        if lacking := {*sum(model.transfers, self.augs)} - {*AUGMENTATIONS}:
            raise Refused(f"{folder}: augment.py has no {', '.join(lacking)} any more")
        self.label = MODELS[self.kind]
        if self.kind == "cvae":
            self.label += f", told the {self.settings['condition']}"
        self.names = view_names(self.augs)
        self.letters = [f"L{i + 1}" for i in range(len(self.augs))]
        self.words = words_of_views(self.augs)
        if len(self.augs) > 1:
            self.words.append(self.words[-1][::-1])
        self.class_names = CLASSES.get(self.dataset, "").split() or range(1000)
        x, y = data[2:]
        if y is None:  # then ten images stand for all
            self.digits = evenly(x, 10)
            self.labels, self.columns = np.zeros(len(self.digits), int), [""] * len(self.digits)
            return
        known = np.unique(y)
        self.labels = known[:10] if classes is None else np.unique(classes)
        if unknown := {*self.labels} - {*known}:
            raise Refused(f"--digits {min(unknown)}: there is no test image of it")
        shown = np.isin(y, self.labels)
        self.digits = one_of_each(x[shown], y[shown])
        self.columns = [str(self.class_names[label]) for label in self.labels]

    @cached_property
    def z(self) -> Tensor:
        """The latents of the digits, (n, latent_dim)."""
        return self.model.encode(self.digits, self.labels)

    @cached_property
    def products(self) -> dict[str, tuple[int, ...]]:
        """The `elements` of the group of its augmentations."""
        return elements(self.augs)

    def mapped(self, z: Tensor, word: Sequence[int]) -> Tensor:
        """The latents z under the maps of a word, the first one first: z L1 L2 for (0, 1)."""
        return apply_in_order(z, [self.model.maps[i] for i in word])

    def settings_but(self, *names: str) -> dict:
        """The settings without these, and without those that change no number."""
        return {k: v for k, v in self.settings.items() if k not in ("device", "record", *names)}

    @torch.no_grad()
    def draw(self, z: Tensor, decoder: nn.Module | None = None) -> np.ndarray:
        """Latents (N, latent_dim) to pictures, uint8 (N, 28, 28). decoder: a head, perhaps."""
        p = (decoder or self.model.decoder)(z).sigmoid()
        return (p * 255).round().byte().numpy()


# ---------------------------------------------------------------- numbers


@torch.no_grad()
def decoded(decoder: nn.Module, z: Tensor, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Decode latents (N, latent_dim), and compare with uint8 images (N, 28, 28).

    Returns the logits and the images in [0, 1], both (N, 28, 28), and the BCE of each image in
    nats, float64 (N,).
    """
    x, logits, bces = pixels(torch.as_tensor(images), z.dtype), [], []
    for z_block, x_block in zip(z.split(BLOCK), x.split(BLOCK)):
        logits.append(decoder(z_block))
        bce = F.binary_cross_entropy_with_logits(logits[-1], x_block, reduction="none")
        bces.append(bce.flatten(1).sum(1))
    return torch.cat(logits), x, torch.cat(bces).double()


def nats(decoder: nn.Module, z: Tensor, images: np.ndarray) -> float:
    """The mean BCE of `decoded`, nats an image."""
    return decoded(decoder, z, images)[2].mean().item()


def score(decoder: nn.Module, z: Tensor, images: np.ndarray) -> tuple[float, float]:
    """(`nats`, identity). The identity is the percentage of drawn pictures to which no other image
    is nearer (L2) than their own one."""
    logits, x, bces = decoded(decoder, z, images)
    x, hits = x.flatten(1), 0
    squares = x.square().sum(1)
    for own in torch.arange(len(x)).split(BLOCK):
        drawn = logits[own].sigmoid().flatten(1)
        distances = squares - 2 * drawn @ x.T  # and |D(z)|^2, which is the same for all
        nearest = distances.min(1).values + 1e-4  # equal images are hits
        hits += (distances[:, own].diagonal() <= nearest).sum().item()
    return bces.mean().item(), 100 * hits / len(x)


def entropy(images: np.ndarray) -> float:
    """What a perfect copy of uint8 images costs, because their pixels are grey: nats an image."""
    x = torch.from_numpy(images).double() / 255
    return (torch.special.entr(x) + torch.special.entr(1 - x)).sum((1, 2)).mean().item()


def with_total(row: dict[str, float]) -> dict[str, float]:
    """The row and its sum, which the paper calls the total."""
    return row | {"total": sum(row.values())}


def words_of_views(augs: Sequence[str]) -> list[tuple[int, ...]]:
    """The numbers of the augmentations in each view: (), (0,), (1,), (0, 1)."""
    return views((), [lambda word, i=i: (*word, i) for i in range(len(augs))])


def elements(augs: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The group that augmentations generate: {"rotate_cw^2+flip_lr": (0, 0, 1), ..}, with the
    numbers of the augmentations in each product, the first one first. It begins with the views.

    Two products are one element if they do the same to a picture without symmetry, but for what
    interpolation makes. The picture is smooth, so that this is little: a mean of 1.5 of 255 grey
    levels is more. Empty if one of the augmentations has no order, or if there are more than 100
    products.
    """
    if not {*augs} <= {*ORDERS}:
        return {}
    (y, x), words, seen = np.indices((28, 28)), [], []
    picture = 0
    for height, row, column in ((170, 8, 13), (110, 15, 19), (70, 13, 9)):
        picture = picture + height * np.exp(-((y - row) ** 2 + (x - column) ** 2) / 18)
    picture = picture.clip(0, 255).astype(np.uint8)[None]

    def add_if_new(word):
        image = true_picture(picture, augs, word).astype(int)
        if all(np.abs(image - other).mean() > 1.5 for other in seen):
            words.append(word)
            seen.append(image)

    for word in words_of_views(augs):
        add_if_new(word)
    size = 0
    while size < len(words):  # until no product of an augmentation and an element is new
        size = len(words)
        for i in range(len(augs)):
            for word in words:  # it grows
                add_if_new((i, *word))
                if len(words) > 100:
                    print(
                        f"{' and '.join(augs)} have more than 100 products: the group is left out"
                    )
                    return {}
    return {"+".join(written(augs, word)) or "orig": word for word in words}


def written(names: Sequence[str], word: Sequence[int]) -> list[str]:
    """The factors of a product: ["rotate_cw^2", "flip_lr"] for (0, 0, 1)."""
    factors = [(names[i], len([*same])) for i, same in groupby(word)]
    return [f"{name}^{n}" if n > 1 else name for name, n in factors]


def costs_of_powers(model: LAVAE, aug: str, L: Tensor, x: np.ndarray) -> dict[str, dict]:
    """What a part of an augmentation costs, by t: nats between pictures and the truth A^t x.

    "L^t" draws z L^t and "blend" (1 - t) z + t z L, with z = E(x). "direct" draws the latent of the
    true picture itself, and "not moved" draws z. x: uint8 (N, 28, 28).
    """
    z, rows = model.encode(x), {}
    for t in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        true = PARTS[aug](x, t)
        latents = {
            "L^t": z @ matrix_power(L, t),
            "blend": (1 - t) * z + t * z @ L,
            "direct": model.encode(true),
            "not moved": z,
        }
        rows[f"t = {t}"] = {name: nats(model.decoder, z_t, true) for name, z_t in latents.items()}
    return rows


def eigenvalues_of(model: LAVAE) -> dict[str, list]:
    """The eigenvalues of each map that is a matrix, by its augmentation, as [real, imaginary]."""
    found = {}
    for aug, f in zip(model.augs, model.maps):
        if hasattr(f, "L"):
            values = torch.linalg.eigvals(f.L.double())
            found[aug] = sorted(torch.view_as_real(values).tolist())
    return found


def train_probe(latents: Sequence[Tensor]) -> nn.Module:
    """Train a probe, a small classifier, to name the view of a latent.

    latents: those of each view, (N, latent_dim). The probe has a hidden layer of 64 units and
    learns for 5 epochs, with a fixed seed.
    """
    z = torch.cat([*latents])
    y = torch.arange(len(latents)).repeat_interleave(len(latents[0]))
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        probe = nn.Sequential(nn.Linear(z.shape[1], 64), nn.ReLU(), nn.Linear(64, len(latents)))
        optimizer = AdaBelief(probe.parameters(), lr=1e-2)
        for _ in range(5):
            for index in torch.randperm(len(z)).split(500):
                loss = F.cross_entropy(probe(z[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return probe


def latents_of_views(model: CVAE | LAVAE, x: np.ndarray, y: np.ndarray | None) -> list[Tensor]:
    """What the decoder must be given to draw each view of originals x, uint8 (N, 28, 28).

    y: their digits (N,), for a CVAE that is told them.
    """
    z = model.encode(x, y)
    return [model.to_view(z, v, y) for v in range(2 ** len(model.augs))]


@torch.no_grad()
def measure(run: Run) -> Tables:
    """All numbers of a run. Of every model Table I and identity, see `score`; of a LAVAE also what
    its maps and heads cost. What is returned is printed, and kept in evaluation.json."""
    model, (x_train, _, x, y) = run.model, run.data
    images, latents = all_views(x, run.augs), latents_of_views(model, x, y)
    costs, identity = {}, {}
    for name, z, view in zip(run.names, latents, images):
        costs[name], identity[name] = score(model.decoder, z, view)
    tables = {TABLE_1: {run.label: with_total(costs)}, IDENTITY: {run.label: identity}}
    if run.dataset == "mnist" and run.augs == PAIRS[0] and run.label in PAPER_TABLE:
        paper = dict(zip(run.names, PAPER_TABLE[run.label]))
        tables[TABLE_1][f"  paper, {run.label}"] = with_total(paper)
    if not model.maps:
        return tables
    if len(run.augs) > 1:
        tables[TABLE_1][run.label]["reverse"] = cost_of(run, latents[0], run.words[-1])
    tables |= costs_of_maps(run, images, latents[0], costs)

    probe = train_probe(views(model.encode(evenly(x_train, 20_000)), model.maps))
    correct = torch.stack([probe(z).argmax(1) == v for v, z in enumerate(latents)])
    right = {"all": correct}
    for c in () if y is None else np.unique(y):
        right[str(run.class_names[c])] = correct[:, y == c]
    tables[PROBE] = {c: {"accuracy": 100 * r.double().mean().item()} for c, r in right.items()}
    if model.transfers:
        tables[TRANSFER] = costs_of_heads(run, latents, correct)
    return tables


def cost_of(run: Run, z: Tensor, word: Sequence[int]) -> float:
    """What the test images under a product of augmentations cost, drawn from the latents z of the
    originals under the product of the maps, nats an image."""
    true = true_picture(run.data[2], run.augs, word)
    return nats(run.model.decoder, run.mapped(z, word), true)


def costs_of_maps(
    run: Run, images: Sequence[np.ndarray], z: Tensor, costs: dict[str, float]
) -> Tables:
    """What it costs to go from any view to any, to all products of the augmentations, and to parts
    of one. images: the views of the test images. z: the latents of the originals. costs: what the
    views cost that are drawn from these."""
    model, group = run.model, {}

    def each(latents, known):  # every view, drawn from its latents, if its cost is not known
        row = {}
        for name, z_v, view in zip(run.names, latents, images):
            row[name] = known.get(name) or nats(model.decoder, z_v, view)
        return with_total(row)

    encoded, rows = [z, *map(model.encode, images[1:])], {"from orig": with_total(costs)}
    for v, name in enumerate(run.names[1:], 1):
        rows[f"from {name}"] = each(views(model.from_view(encoded[v], v), model.maps), {})
    direct = each(encoded, {"orig": costs["orig"]})
    own = {name: cost - direct[name] for name, cost in rows["from orig"].items()}
    perfect = with_total(dict(zip(run.names, map(entropy, images))))
    tables = {ANY: rows | {"direct": direct, "cost of the maps": own, "a perfect copy": perfect}}
    for name, word in run.products.items():
        group[name] = {"nats": costs.get(name) or cost_of(run, z, word)}
    if {*group} - {*costs}:
        tables[GROUP] = group
    for aug, f in zip(run.augs, model.maps):
        if hasattr(f, "L") and aug in PARTS:
            few = evenly(images[0], 3000)
            tables[f"{aug} to the power t, nats"] = costs_of_powers(model, aug, f.L, few)
    return tables


def costs_of_heads(run: Run, latents: Sequence[Tensor], correct: Tensor) -> dict[str, dict]:
    """A row for each head: what the views cost that it draws from the latents of the originals
    under the maps, and the mean of those views that a probe names rightly, and wrongly. correct:
    whether it names them rightly, (V, N) bool."""
    rows, totals = {}, of_paper(run.dataset, "+".join(run.augs))
    names = view_names([f"B{i + 1}" for i in range(len(run.augs))])
    for augs, (key, head) in zip(run.model.transfers, run.model.heads.items()):
        pairs = zip(latents, all_views(run.data[2], augs))
        bces = torch.stack([decoded(head, z, view)[2] for z, view in pairs])
        rows[key] = with_total(dict(zip(names, bces.mean(1).tolist())))
        if key in totals:
            rows[key]["paper"] = totals[key]
        for name, which in (("named rightly", correct), ("named wrongly", ~correct)):
            if which.any():
                rows[key][name] = bces[which].mean().item()
    return rows


# ---------------------------------------------------------------- tables


def print_table(title: str, rows: dict[str, dict[str, float | str]]) -> None:
    """Print {row: {column: number or text}}. A row need not have every column."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    lines = [[title, *columns]]
    for label, row in rows.items():
        cells = [row.get(column, "") for column in columns]
        cells = [cell if isinstance(cell, str) else f"{cell:.2f}" for cell in cells]
        lines.append([label, *cells])
    first, *widths = (2 + max(7, *map(len, column)) for column in zip(*lines))
    print()
    for label, *cells in lines:
        print(label.ljust(first), *(c.rjust(w) for c, w in zip(cells, widths)), sep="")


def print_tables(runs: Sequence[Run]) -> None:
    """Print the tables of runs of the same data and the same views, those of one title in one."""
    folders = ", ".join(str(run.folder) for run in runs)
    print(f"\n{runs[0].dataset}, {' and '.join(runs[0].augs)}: {folders}")
    for title in dict.fromkeys(title for run in runs for title in run.tables):
        rows = {}
        for run in runs:
            for label, row in run.tables.get(title, {}).items():
                own = len(runs) > 1 and not label.startswith("  paper")
                rows[f"{label}  {run.folder}" if own else label] = row
        print_table(title, rows)


def grouped(runs: Iterable[Run], key: Callable[[Run], object]) -> list[list[Run]]:
    """Runs of which `key` says the same, in lists."""
    groups = {}
    for run in runs:
        groups.setdefault(json.dumps(key(run)), []).append(run)
    return [*groups.values()]


def print_means(runs: Sequence[Run]) -> None:
    """Print the means and standard deviations over seeds, of runs of the same data and views: a
    column for each method, A, B, .., after a line with the options that differ; then its difference
    from A, of runs with the same seed."""
    methods = grouped(runs, lambda run: run.settings_but("seed"))
    options = [method[0].settings_but("seed", *DERIVED) for method in methods]
    differ = [k for k in options[0] if any(one[k] != options[0][k] for one in options)]
    columns, first = {}, None
    legend = [
        "\nmean +- sample standard deviation over seeds; few nats are good, and many per cent"
    ]
    for letter, method, settings in zip(map(chr, count(65)), methods, options):
        by_seed = {run.settings["seed"]: numbers_of(run) for run in method}  # a seed counts once
        name = as_typed({k: settings[k] for k in differ})
        folders = ", ".join(str(run.folder) for run in method)
        legend.append(
            f"  {letter}: {name} seeds {', '.join(map(str, sorted(by_seed)))} ({folders})"
        )
        columns[letter] = [*by_seed.values()]
        first = first or by_seed
        pairs = [(by_seed[seed], first[seed]) for seed in by_seed if seed in first]
        if by_seed is not first and pairs:
            legend.append(f"  {letter} - A: of the {len(pairs)} seeds that both have")
            columns[f"{letter} - A"] = [
                {label: own[label] - other[label] for label in own if label in other}
                for own, other in pairs
            ]
    if max(map(len, columns.values())) < 2:
        return
    rows = {}
    for name, found in columns.items():
        for label in found[0]:
            values = [one[label] for one in found if label in one]
            deviation = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
            rows.setdefault(label, {})[name] = f"{statistics.mean(values):.2f}{deviation}"
    print(*legend, sep="\n")
    print_table(f"{runs[0].dataset}, {' and '.join(runs[0].augs)}: means over seeds", rows)


def numbers_of(run: Run) -> dict[str, float]:
    """What methods are compared by: all numbers of the tables with one row for the model itself,
    and of the others the totals, or what has no total."""
    found = {}
    for title, rows in run.tables.items():
        for label, row in rows.items():
            for column, number in row.items():
                if label == run.label:
                    found[f"{title}: {column}"] = number
                elif column in ("total", "nats", "L^t") and label[0] != " " or label == "all":
                    found[f"{title}: {label}"] = number
    return found


# ---------------------------------------------------------------- the heat-map


def of_paper(dataset: str, source: str) -> dict[str, float]:
    """The paper's totals for a model of these augmentations, by target. It has MNIST's only."""
    return dict(zip(PAIR_NAMES, PAPER_TOTALS.get(source, ()))) if dataset == "mnist" else {}


def heatmap_rows(
    dataset: str, results: Iterable[tuple[str, int, Tables]]
) -> dict[str, dict[str, tuple]]:
    """{source: {target: (ours, the paper's or None)}}, totals: means over the seeds of a source.
    results: source, seed and tables of each run. On the diagonal the first decoder counts."""
    numbers, rows = {}, {}
    for source, seed, tables in results:
        found, own = numbers.setdefault(source, {}), next(iter(tables[TABLE_1].values()))
        one = {target: row["total"] for target, row in tables[TRANSFER].items()}
        one |= {source: own["total"], "probe accuracy, %": tables[PROBE]["all"]["accuracy"]}
        for target, number in one.items():
            found.setdefault(target, {})[seed] = number  # a seed counts once
    for source, found in numbers.items():
        paper = of_paper(dataset, source)
        means = {target: statistics.mean(seeds.values()) for target, seeds in found.items()}
        rows[source] = {target: (mean, paper.get(target)) for target, mean in means.items()}
    return rows


def heatmap(rows: dict[str, dict[str, tuple]]) -> Image.Image:
    """The heat-map as a picture: rows are sources, columns are targets. A cell is blue where ours
    is lower than the paper's, and red where it is higher."""
    found = [target for row in rows.values() for target in row]
    targets = sorted({*found}, key=[*PAPER_TOTALS, *found].index)
    heads = [text(target.replace("+", "\n"), 26) for target in targets]
    lines = [[None, *heads]]
    for source, row in rows.items():
        lines.append([text(source.replace("+", "\n"), 26)])
        for target in targets:
            if target not in row:
                lines[-1].append(None)
                continue
            (ours, paper), colour = row[target], "white"
            numbers = [(f"{ours:.0f}", 44)]
            if paper:
                numbers.append((f"paper {paper:.0f}", 26))
                fade = round(255 - 130 * min(1, abs(2 * math.log(ours / paper))))
                colour = (255, fade, fade) if ours > paper else (fade, fade, 255)
            room = (250, 150 // len(numbers))
            cell = [[text(*one, paper=colour, least=room)] for one in numbers]
            lines[-1].append(table(cell, gap=0))
    title = "Trained on a pair (rows), drawn as another (columns): nats, all four views"
    note = "blue: below the paper's, red: above; on the diagonal the decoder of stage 1"
    return titled(title, table(lines), text(note, 26))


# ---------------------------------------------------------------- projections to the plane


def pca(x: np.ndarray, k: int = 2) -> np.ndarray:
    """Principal components, by SVD: (N, d) to the k directions of largest variance, (N, k)."""
    x = x - x.mean(0)
    return x @ np.linalg.svd(x, full_matrices=False)[2][:k].T


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
        u, _, v = np.linalg.svd(g.T @ white / len(white) - (1 - g**2).mean(0)[:, None] * W)
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
    x = torch.from_numpy(x.astype(np.float32))
    distances = torch.cdist(x, x).square().fill_diagonal_(math.inf)
    low, high = torch.full((len(x), 1), -40.0), torch.full((len(x), 1), 40.0)
    for _ in range(50):  # bisect for the logarithm of 1 / width^2: entropy = log(perplexity)
        middle = (low + high) / 2
        p = torch.softmax(-middle.exp() * distances, 1)
        narrow = torch.special.entr(p).sum(1, keepdim=True) > math.log(perplexity)
        low, high = torch.where(narrow, middle, low), torch.where(narrow, high, middle)
    P = (p + p.T) / (2 * len(x))

    y = torch.from_numpy(pca(x.numpy(), 2))  # (N, 2), moved by the gradient
    y *= 1e-4 / y[:, 0].std().clamp(min=1e-12)
    velocity, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(len(x) / 48, 25)
    for step in range(steps):
        early = step < 250
        squares = y.square().sum(1)
        away = torch.addmm(1 + squares + squares[:, None], y, y.T, alpha=-2)  # 1 + |y_i - y_j|^2
        t = away.reciprocal_().fill_diagonal_(0)
        pull = ((12 * P if early else P) - t / t.sum()) * t
        gradient = 4 * (pull.sum(1, keepdim=True) * y - pull @ y)
        gains = torch.where(gradient * velocity > 0, gains * 0.8, gains + 0.2).clamp_(min=0.01)
        velocity = (0.5 if early else 0.8) * velocity - lr * gains * gradient
        y += velocity
    return (y - y.mean(0)).numpy()


# ---------------------------------------------------------------- figures: what they share

FIGURES: dict[str, Callable] = {}  # by name, in the order of this file


def figure(f: Callable) -> Callable:
    """Enter a figure of LAVAEs in FIGURES. It takes a Run, and returns a picture, a list of
    pictures (a GIF) or a text (HTML). It raises Refused where the run lacks what it needs. The
    first line of its docstring is printed by --list. The rest stands below the picture, and says
    what to see."""
    FIGURES[f.__name__] = f
    return f


OF_CVAES = set()


def figure_of_cvaes(f: Callable) -> Callable:
    """Enter a figure that is also drawn of CVAEs, see `figure`."""
    OF_CVAES.add(f)
    return figure(f)


def require(there: object, what: str) -> None:
    """Raises Refused: what a figure needs is not there."""
    if not there:
        raise Refused(f"needs {what}")


def linear(run: Run) -> LAVAE:
    """The LAVAE of a run. Raises Refused: its maps are not matrices."""
    require(eigenvalues_of(run.model), "linear maps: train without --latent-map")
    return run.model


def through_maps(
    run: Run, z: Tensor, formula: str = "D(z{})", decoder: nn.Module | None = None
) -> list[tuple[str, np.ndarray]]:
    """Draw latents (N, latent_dim) as each view, and last in the reverse composition, if any.

    Returns rows of a grid, (formula, pictures). decoder: a head, instead of the first decoder.
    """
    rows = []
    for word in run.words:
        product = " ".join(["", *written(run.letters, word)])
        rows.append((formula.format(product), run.draw(run.mapped(z, word), decoder)))
    return rows


def spaced(groups: Iterable[Sequence]) -> list:
    """The rows of all groups for a grid, with a gap between one group and the next."""
    return [row for group in groups for row in (*group, None)][:-1]


def view_rows(augs: Sequence[str], digits: np.ndarray, *drawn: Sequence[tuple]) -> list:
    """Rows of a grid: for each view the images, and below them what was drawn of it.

    drawn: lists with (label, pictures) for each view.
    """
    images = zip(view_names(augs), all_views(digits, augs))
    return spaced(zip(images, *drawn))


COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#e377c2", "#7f7f7f"]
COLOURS += ["#8c564b", "#bcbd22"]


def chart(
    title: str, panels: Sequence[Sequence[tuple]], size: tuple[int, int], axes: bool = False
) -> Image.Image:
    """Rows of panels, (heading, series), under a title and a legend of their labels. A series is
    (label, points (N, 2), style), and the style dots, marks, line, path, or word: then the label
    stands at the first point. size: width and height
    of a panel, in pixels.

    axes: both axes hold 0 and have round ticks. Without them the points fill the panel.
    """
    every = [one for row in panels for _, series in row for one in series]
    labels = dict.fromkeys(label for label, _, style in every if style != "word")
    colours = dict(zip(labels, cycle(COLOURS)))
    entries = [text(label, colour=colour) for label, colour in colours.items()]
    room = max(1, size[0] * len(panels[0]) // (16 + max(entry.width for entry in entries)))
    legend = [entries[i : i + room] for i in range(0, len(entries), room)]
    rows = []
    for row in panels:
        rows.append([text(heading) for heading, _ in row])
        rows.append([panel(size, series, colours, axes) for _, series in row])
    return titled(title, table(legend, "l", gap=16), table(rows, "c", gap=12))


def panel(size: tuple[int, int], series: Sequence[tuple], colours: dict, axes: bool) -> Image.Image:
    """A frame with points and lines in it, see `chart`."""
    width, height = size
    every = np.concatenate([points for _, points, _ in series])
    low, high = every.min(0), every.max(0)
    ticks, left, bottom = [], 0, 0
    if axes:
        ticks, left, bottom = [*map(round_ticks, low, high)], 90, 40
        low, high = np.array([(values[0], values[-1]) for values in ticks]).T
    picture = Image.new("RGB", (left + width, height + bottom), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(20)

    def place(points):  # in pixels, y downwards
        share = (np.asarray(points) - low) / np.where(high > low, high - low, 1)
        return (share * [1, -1] + [0, 1]) * [width - 24, height - 24] + [left + 12, 12]

    pen.rectangle((left, 0, left + width - 1, height - 1), outline="silver")
    for axis, values in enumerate(ticks):
        for value in values:
            x, y = place([value, value])
            at, anchor = ((left - 6, y), "rm") if axis else ((x, height + 6), "mt")
            pen.text(at, f"{value:g}", "black", font, anchor)
    dots, rng = [], np.random.default_rng(0)
    for label, points, style in series:
        colour, at = colours.get(label), place(points)
        if style in ("line", "path"):
            pen.line([*map(tuple, at)], colour, 4, "curve")
        if style == "word":
            pen.text(at[0], label, "black", font, "mm")
        radii = {"dots": max(2, height // 140), "marks": 9, "path": 5}
        radius = radii.get(style, 0)
        dots += [(radius, rng.random(), x, y, colour) for x, y in at if radius]
    for r, _, x, y, colour in sorted(dots):  # in random order: no series hides another
        pen.ellipse((x - r, y - r, x + r, y + r), colour)
    return picture


def round_ticks(low: float, high: float) -> np.ndarray:
    """Ticks from `low` or 0 to `high` or a little more, some ten at most, in steps of one digit."""
    low = min(low, 0)
    step = float(f"{(high - low) / 5:.0e}")
    return step * np.arange(math.floor(low / step), high / step + 1)


# ---------------------------------------------------------------- the paper's figures


@figure
def fig3_views(run):
    """Fig. 3: every view drawn from the original's latent

    Each row with a D should look like the row above it. All of them are drawn from the latents
    of the first row.
    """
    drawn = through_maps(run, run.z, "D(E(x){})")
    rows = view_rows(run.augs, run.digits, drawn)
    if len(run.augs) > 1:
        true = true_picture(run.digits, run.augs, run.words[-1])
        rows += [None, ("+".join(run.augs[::-1]), true), drawn[-1]]
    return grid(f"Augment in latent space: {' and '.join(run.augs)}", run.columns, rows)


@figure
def fig4_inverses(run):
    """Fig. 4: every view back to the original

    Each row with a D should look like the first row. (A flip is its own inverse.)
    """
    model = run.model
    rows = [("orig", run.digits), ("D(E(x))", run.draw(run.z))]
    images = all_views(run.digits, run.augs)
    for v in range(1, len(images)):
        L = " ".join(written(run.letters, run.words[v]))
        inverse = f"({L})^-1" if " " in L else f"{L}^-1"
        back = run.draw(model.from_view(run.model.encode(images[v]), v))
        rows += [None, (f"v = {run.names[v]}", images[v]), (f"D(E(v) {inverse})", back)]
    return grid(f"Back to the original: {' and '.join(run.augs)}", run.columns, rows)


@figure
def fig5_recursion(run):
    """Fig. 5: encode, map, decode, and again, seven rounds or more; two of the paths, by ICA

    After two flips, or four quarter turns, a row should look like x again, and a path should be
    where it began. The legend says how far from there it is in the end.
    """
    model, path, rows, last = run.model, [run.z], [("x", run.digits)], "x"
    order = ORDERS.get(run.augs[0], 0)
    rounds = max(7, order) if order <= 12 else 7  # as many rows as a slide holds
    for k in range(1, rounds + 1):
        drawn = run.draw(model.maps[0](path[-1]))
        rows.append((f"x{k} = D(E({last}) L1)", drawn))
        path.append(model.encode(drawn))
        last = f"x{k}"
    path, clouds = torch.stack(path), {}  # (rounds + 1, digits, latent_dim)
    for name, view in zip(run.names, all_views(evenly(run.data[2], 400), run.augs)):
        clouds[name] = run.model.encode(view)
    if 0 < order <= rounds:  # then a path should be at its start again, some time
        path = path[: rounds - rounds % order + 1]
        moved = (path[-1] - path[0]).norm(dim=1)
        for word, i in (("steadiest", moved.argmin()), ("least steady", moved.argmax())):
            clouds[f"{word}, {run.columns[i]}: {moved[i]:.2f} away"] = path[:, i]
    series = projected(clouds, fast_ica)
    left = grid(f"Again and again: {run.augs[0]}", run.columns, rows, cell=72)
    right = chart("Latents, by ICA", [[("", series)]], (500, 500))
    return table([[left, right]])


def projected(clouds: dict[str, Tensor], project: Callable) -> list[tuple]:
    """Clouds of points (N, d) in one common plane, as the series of a panel."""
    plane, series = project(torch.cat([*clouds.values()]).numpy()), []
    ends = np.cumsum([len(points) for points in clouds.values()])
    for label, points in zip(clouds, np.split(plane, ends)):
        series.append((label, points, "path" if " away" in label else "dots"))
    return series


@figure
def fig6_transfer(run):
    """Fig. 6: the same latents drawn by the decoder of each transfer

    Where a picture is a mixture, the latent does not say which view it is of: some digits are
    their own mirror images. Or the head has learnt too little.
    """
    model, grids = run.model, []
    require(model.transfers, "a transfer: train with --transfer")
    for augs, head in zip(model.transfers, model.heads.values()):
        rows = view_rows(augs, run.digits, through_maps(run, run.z, "D_B(E(x){})", head))
        title = f"Same latents, new decoder: {' and '.join(run.augs)} to {' and '.join(augs)}"
        grids.append(grid(title, run.columns, rows))
    return table([grids[i : i + 2] for i in range(0, len(grids), 2)])


@figure_of_cvaes
def fig8_cvae(run):
    """Fig. 8: the naive CVAE, its condition changed

    Each row with a D should look like the row above it. It looks like the first: the condition is
    hardly used.
    """
    require(run.kind == "cvae", "a run of --model cvae")
    model, names, told_digit = run.model, run.names, run.settings["condition"] == "digit"
    latents = latents_of_views(model, run.digits, run.labels)
    if told_digit:  # then it knows of no views
        names = run.columns
        latents = [model.to_view(run.z, 0, [label] * len(run.z)) for label in run.labels]
    drawn = [(f"D(z, {name})", run.draw(told)) for name, told in zip(names, latents)]
    rows = [("x", run.digits), *drawn] if told_digit else view_rows(run.augs, run.digits, drawn)
    return grid("Naive CVAE: the condition changed", run.columns, rows)


@figure_of_cvaes
def fig9_paired_cvae(run):
    """Fig. 9: the CVAE that is trained like a LAVAE, beside the LAVAE

    One augmentation succeeds in both. Two at once, the last rows, the CVAE was never told.
    """
    require(run.kind == "cvae-paired", "a run of --model cvae-paired")
    same = [r for r in run.peers if (r.dataset, r.names) == (run.dataset, run.names)]
    others = [r.model for r in same if r.kind == "lavae"]
    require(others, "a LAVAE of the same views: name its folder, too")
    drawn = []
    for label, model in (("CVAE", run.model), ("LAVAE", others[0])):
        latents = latents_of_views(model, run.digits, run.labels)
        drawn.append([(label, run.draw(z, model.decoder)) for z in latents])
    rows = view_rows(run.augs, run.digits, *drawn)
    return grid("CVAE trained like a LAVAE, and the LAVAE", run.columns, rows)


@figure
def fig10_projections(run):
    """Fig. 10: images, latents and mapped latents in the plane, by PCA, ICA and t-SNE

    Each panel has axes of its own. With good maps, look for the same groups in the second and the
    third column. Colours that lie apart are views that can be told from the latent. (Flips do not
    change the principal components of all images: there four points coincide.)
    """
    x = evenly(run.data[2], 800 // len(run.names))  # t-SNE compares each point with each
    images = all_views(x, run.augs)
    latents = [run.model.encode(view) for view in images]
    mapped = views(latents[0], run.model.maps)
    clouds = {
        "images": [pixels(torch.from_numpy(view)).flatten(1) for view in images],
        "latents E(view)": latents,
        "mapped E(x) L": mapped,
    }
    rows = []
    for name, project in (("PCA", pca), ("ICA", fast_ica), ("t-SNE", tsne)):
        rows.append([])
        for cloud, latents in clouds.items():
            series = projected(dict(zip(run.names, latents)), project)
            rows[-1].append((f"{cloud}, {name}", series))
    return chart(f"{len(x)} test images, a colour for each view", rows, (420, 240))


@figure
def sampling(run):
    """new digits and their views: z uniform in the bounding box of the training images' latents

    Some pictures of the first row are no digits: the corners of the box are far from all latents.
    The maps do the same to these, too.
    """
    z = run.model.encode(evenly(run.data[0], 10_000))
    share = torch.from_numpy(np.random.default_rng(0).random((10, z.shape[1]), np.float32))
    low, high = z.min(0).values, z.max(0).values
    rows = through_maps(run, low + share.to(z) * (high - low))
    return grid("Sampled from the bounding box of the originals' latents", [""] * 10, rows)


@figure
def interpolation(run):
    """from one test digit to another in a straight line, and its views

    Each lower row should be the first row under an augmentation, also between the two digits.
    """
    first, second = run.z[2 % len(run.z)], run.z[7 % len(run.z)]
    t = torch.linspace(0, 1, 10)
    points = torch.stack([(1 - s) * first + s * second for s in t])
    title = "Interpolation in latent space, z = (1 - t) E(x) + t E(y)"
    return grid(title, t.tolist(), through_maps(run, points))


# ---------------------------------------------------------------- more figures


@figure
def group_elements(run):
    """every element of the group that turns and flips generate; some are never shown in training

    Training has shown the products without a star, or in thick frames. The decoder has never drawn
    the others.
    """
    unseen = {*run.products} - {*run.names}
    require(unseen, "augmentations with more products than views, like rotate_cw")
    if ORDERS[run.augs[0]] >= 8 and len(run.augs) <= 2:
        clocks = [clock(run, i) for i in two_of(run)]
        inside = "".join(f", then {aug} (inner ring)" for aug in run.augs[1:])
        title = f"All powers of {run.augs[0]}{inside}. Numbers are nats"
        return titled(title, table([clocks], gap=40))
    heads, rows = [], {"true": [], "drawn": []}
    for name, word in run.products.items():
        mark = " *" if name in unseen else ""
        heads.append("\n".join(written(run.letters, word) or ["I"]) + mark)
        rows["true"].append(true_picture(run.digits, run.augs, word))
        rows["drawn"].append(run.draw(run.mapped(run.z, word)))
    title = f"{' and '.join(run.augs)}: all products; * not shown in training"
    return by_digit(run, title, heads, rows)


def clock(run, digit):
    """All products as a clock: the powers of the first map outside, inside those that another map
    follows. In the middle is x, one of the digits of a figure, by its number."""
    hours = ORDERS[run.augs[0]]
    near = 24 * hours  # the radius of the inner ring, in pixels
    side = 2 * near + 440
    page, x = Image.new("RGB", (side, side), "white"), run.digits[digit : digit + 1]

    def put(picture, words, radius, hour, frame, colour):
        tile = Image.fromarray(picture).resize((84, 84), Image.Resampling.NEAREST)
        tile = ImageOps.expand(tile.convert("RGB"), frame, colour)
        tile = table([[tile], [text(words, 30)]], "c", 0)
        angle = 2 * math.pi * hour / hours
        centre = side / 2 + radius * math.sin(angle), side / 2 - radius * math.cos(angle)
        page.paste(tile, tuple(round(c - s / 2) for c, s in zip(centre, tile.size)))

    put(x[0], "x", 0, 0, 1, "silver")
    for name, word in run.products.items():
        z = run.mapped(run.z[digit : digit + 1], word)
        cost = f"{nats(run.model.decoder, z, true_picture(x, run.augs, word)):.0f}"
        radius = near if 1 in word else near + 144
        frame = (8, COLOURS[0]) if name in run.names else (2, "silver")
        put(run.draw(z)[0], cost, radius, word.count(0), *frame)
    return page


def two_of(run):
    """The numbers of two of its digits, a 2 and a 7 of MNIST's; or of one, if it has one."""
    return sorted({i % len(run.digits) for i in (2, 7)})


def by_digit(run, title, heads, rows):
    """A grid with a group of rows for each of two digits, so that it fits on a slide. rows:
    {label: [pictures of all digits, for each column]}."""
    groups = []
    for i in two_of(run):
        groups.append(
            [(f"{run.columns[i]}: {label}", [x[i] for x in row]) for label, row in rows.items()]
        )
    return grid(title, heads, spaced(groups))


@figure
def eigenvalues(run):
    """the eigenvalues of each map around the unit circle

    At 0° a direction of the latents is kept, at 180° it is reversed. A turn has eigenvalues at
    multiples of its angle. Those inside the circle lose something, and are not counted.
    """
    panels = []
    turn = np.linspace(0, 2 * math.pi, 361)  # a point for each degree
    circle = np.stack([np.cos(turn), np.sin(turn)], 1)
    for name, values in eigenvalues_of(linear(run)).items():
        points = np.array(values)
        z = points @ [1, 1j]
        angles = np.angle(z[abs(abs(z) - 1) < 0.1], deg=True)  # of those near the circle
        near = 3 * (angles / 3).round() + 0.0  # in steps of three degrees, without -0
        near[near == -180] = 180
        words = {"1": (1.2, 0), "-1": (-1.2, 0), "i": (0, 1.2), "-i": (0, -1.2)}
        for a, n in zip(*np.unique(near, return_counts=True)):
            words[f"{n} at {a:.0f}°"] = circle[round(a) % 360] * [0.68, 0.84]
        corners = np.array([(-1.4, -1.4), (1.4, 1.4)])
        series = [("unit circle", circle, "line"), ("eigenvalue", points, "marks")]
        series += [(word, np.array([at]), "word") for word, at in words.items()]
        panels.append((name, [*series, ("", corners, "word")]))
    return chart("Eigenvalues of the maps, in the complex plane", [panels], (560, 560))


@figure
def partial_augmentation(run):
    """a part of an augmentation: the truth if there is one, L^t, and the blend (1 - t) z + t z L

    L^t should look like the true row, if there is one. (There is no true half of a flip.) The blend
    goes in a straight line from the latent of x to that of the augmented x, and on from there.
    """
    z, L, aug = run.z, linear(run).maps[0].L, run.augs[0]
    ts, rows = np.linspace(0, 2 if aug in PARTS else 1, 9).tolist(), {}
    if aug in PARTS:
        rows["true"] = [PARTS[aug](run.digits, t) for t in ts]
    rows["L^t"] = [run.draw(z @ matrix_power(L, t)) for t in ts]
    rows["blend"] = [run.draw((1 - t) * z + t * z @ L) for t in ts]
    return by_digit(run, f"Parts of {aug}", [part_of(aug, t) for t in ts], rows)


def part_of(aug: str, t: float) -> str:
    """What t of an augmentation is called: the angle of a turn, or t."""
    return f"{TURNS[aug] * t:g}°" if aug in TURNS else f"t = {t:g}"


@figure
def turning(run):
    """the powers L^t of the first map as a moving picture, and above them the truth, if any

    Training has shown t = 0 and t = 1 alone.
    """
    z, L, aug = run.z[1::2], linear(run).maps[0].L, run.augs[0]
    there = np.linspace(0, 2 if aug in PARTS else 1, 31).tolist()
    frames = []
    for t in (*there, *there[-2::-1]):
        rows = [("L^t", run.draw(z @ matrix_power(L, t)))]
        if aug in PARTS:
            rows = [("true", PARTS[aug](run.digits[1::2], t)), *rows]
        angle = f"{TURNS.get(aug, 0) * t:.0f} degrees" * (aug in TURNS)
        frames.append(grid(f"{aug}: L^{t:.2f}   {angle}", run.columns[1::2], rows, cell=140))
    return frames


@figure
def learning(run):
    """stage 1 as a moving picture: what is drawn, and the latents as they part (--record only)

    Left: each view, encoded and drawn. Right: latents of originals in a plane, the principal
    components of the last moment; a colour for each class. The equivariance loss begins near zero
    because all latents are still alike.
    """
    path = run.folder / "recording.pt"
    require(path.is_file(), "a run of train.py --record")
    frames, pictures = lavae.read(path)["frames"], []
    (x, y), z = run.data[:2], torch.stack([frame["z"].float() for frame in frames])
    shown = recorded(x, y)
    y = np.zeros(500, int) if y is None else evenly(y, 500)
    z -= z[-1].mean(0)
    plane = torch.linalg.svd(z[-1], full_matrices=False).Vh[:2].T
    points = (z @ plane).numpy()
    corners = np.stack([points.min((0, 1)), points.max((0, 1))])
    names = view_names(run.augs)
    for i, frame in enumerate(frames):
        rows = [("x", x[shown])]
        rows += [(name, drawn.numpy()) for name, drawn in zip(names, frame["drawn"])]
        left = grid("", [""] * len(shown), rows, cell=64)
        of_class = [(str(run.class_names[c]), points[i][y == c], "dots") for c in np.unique(y)]
        right = chart("", [[("", [*of_class, ("", corners, "word")])]], (520, 420))
        line = []
        for name, value in {"epoch": frame["epoch"], **frame["losses"]}.items():
            line += [text(name), text(f"{value:.3g}", least=(110, 0))]  # words stay in their places
        pictures.append(titled("Stage 1", table([line]), table([[left, right]])))
    return pictures


@figure
def prior_samples(run):
    """new digits from the prior, z ~ N(0, I): all views at once, as stage 1 saw them

    Good digits, in any view, mean that the latents fill the prior. Others lie in its holes.
    """
    shape = 60, run.model.latent_dim
    z = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32))
    drawn = run.draw(z)
    rows = [("", drawn[i : i + 10]) for i in range(0, 60, 10)]
    return grid("Samples of the prior, z ~ N(0, I)", [""] * 10, rows)


@figure
def traversals(run):
    """what each latent does: a row a dimension, from -3 to 3

    A row that does not change belongs to a number that the model does not use.
    """
    one, rows, steps = run.z[2 % len(run.z)], [], torch.linspace(-3, 3, 9)
    for i in range(run.model.latent_dim):
        z = one.repeat(9, 1)
        z[:, i] = steps
        rows.append((f"z{i + 1}", run.draw(z)))
    rows.insert(len(rows) // 2, None)
    return grid("One number of the latent moved, the others kept", steps.tolist(), rows, 52)


@figure
def latent_plane(run):
    """the whole latent plane, decoded (--latent-dim 2 only)

    Neighbours look alike. A map takes each point to that of the augmented picture.
    """
    model = run.model
    require(model.latent_dim == 2, f"a run with --latent-dim 2, not {model.latent_dim}")
    at, rows = torch.arange(-7, 8) / 3, []
    for z2 in at.flip(0):  # from the top down
        z = torch.stack([at, z2.expand(len(at))], 1)
        rows.append((f"{z2:.2f}", run.draw(z)))
    return grid("D(z): z1 across, z2 upwards", at.tolist(), rows, cell=56)


SHOULD = {  # what the curve of a loss should do
    "bce": "falls",
    "kl": "comes to rest",
    "equivariance": "ends near 0",
    "loss": "falls",
}


@figure_of_cvaes
def training_curves(run):
    """the losses of stages 1 and 3 as they learn, without the first tenth of an epoch

    bce should fall to the end. kl tells how much latents carry. equivariance should end near zero:
    then good maps exist.
    """
    path, panels = run.folder / "metrics.json", []
    require(path.is_file(), "the metrics.json that train.py wrote")
    for stage, rows in json.loads(path.read_text())["history"].items():
        keys = rows[0].get("curve", ())
        for key in [*keys][1:] or keys:  # without the loss, the first, where it is a sum
            losses = np.array([row["curve"][key] for row in rows])  # (epochs, parts)
            epochs = np.arange(1, losses.size + 1) / losses.shape[1]
            points = np.stack([epochs, losses.ravel()], 1)
            line = key, points[min(2, len(points) - 1) :], "line"  # the first are too high
            panels.append((f"{stage}: {key} {SHOULD.get(key, '')}", [line]))
    rows = [panels[i : i + 4] for i in range(0, len(panels), 4)]
    return chart("Training, by epoch. In stage 1 bce is that of samples", rows, (300, 300), True)


@figure
def page(run):
    """a page for the browser (HTML): draw a digit, and see what the maps make of it"""
    model, tensors, costs = linear(run), {}, []
    known = r"maps\.\d+\.L|(encoder\.(conv[12]|linear)|(decoder|heads\.[^.]+)\."
    known += r"(hidden\.(0\.linear|1)|linear|deconv[12]))\.(weight|bias)"
    for name in model.state_dict():
        require(re.fullmatch(known, name), "the networks of lavae.py")

    def halves(t):  # as little-endian float16
        return base64.b64encode(t.cpu().numpy().astype("<f2").tobytes()).decode()

    for name, t in model.state_dict().items():
        if name.startswith("encoder.linear"):
            t = t[: model.latent_dim]  # the rows of mu; logvar is not needed
        if not name.startswith("maps"):
            tensors[name] = [list(t.shape), halves(t)]
    maps, values = [], eigenvalues_of(model)
    for aug, f in zip(model.augs, model.maps):
        inverse = f.inverse(torch.eye(model.latent_dim).to(f.L))
        powers = torch.stack([matrix_power(f.L, t / 20) for t in range(21)])
        L, back = (M.flatten().double().round(decimals=6).tolist() for M in (f.L, inverse))
        one = {"name": aug, "L": L, "inverse": back, "powers": halves(powers)}
        maps.append(one | {"eigenvalues": values[aug], "order": ORDERS.get(aug)})
    x = run.data[2]
    for z, view in zip(views(model.encode(x), model.maps), all_views(x, run.augs)):
        _, true, drawn = decoded(model.decoder, z, view)
        perfect = F.binary_cross_entropy(true, true, reduction="sum").item() / len(x)
        costs.append([perfect, drawn.mean().item()])
    ink = evenly(run.data[0], 1000) > 127
    sides = np.maximum(ink.any(1).sum(1), ink.any(2).sum(1))
    content = {
        "latent_dim": model.latent_dim,
        "settings": {name: run.settings[name] for name in ("entry", "filters", "epochs")}
        | {"dataset": Path(run.dataset).name},
        "views": run.names,
        "costs": costs,  # of the test images in each view: of a perfect copy, and as drawn
        "side": int(np.median(sides)),  # of the ink, in pixels
        "group": [*run.products.values()],
        "turns": TURNS,
        "tensors": tensors,
        "maps": maps,
        "heads": [*zip(model.heads, map(view_names, model.transfers))],
        "digits": [base64.b64encode(digit.tobytes()).decode() for digit in run.digits],
    }
    template = Path(__file__).resolve().with_name("assets") / "page.html"
    return template.read_text(encoding="utf-8").replace(">MODEL<", f">{json.dumps(content)}<")


# ---------------------------------------------------------------- from the command line to files


def draw_figures(run: Run, figures: dict[str, Callable]) -> list[str]:
    """Draw and save figures, and print a line for each. Returns why some cannot be drawn."""
    missing = []
    for name, f in figures.items():
        try:
            require(run.model.maps or f in OF_CVAES, "a LAVAE")
            content = f(run)
        except Refused as error:
            missing.append(f"{run.folder}: {name} {error}")
            continue
        kind = {str: "html", list: "gif"}.get(type(content), "png")
        path = run.folder / f"{name}.{kind}"
        save(captioned(content, f), path)
        print(f"  {path}")
    return missing


def captioned(content: Image.Image | list | str, f: Callable) -> Image.Image | list | str:
    """What a figure has returned, and below a picture the second part of the figure's docstring."""
    if isinstance(content, list):
        return [captioned(picture, f) for picture in content]
    caption = (inspect.getdoc(f) or "").partition("\n\n")[2]
    if not caption:
        return content
    lines = text(textwrap.fill(caption, content.width // 13))
    return table([[content], [lines], []], "c")


def own_images(run: Run, paths: Sequence[Path]) -> Image.Image:
    """A figure of one's own pictures: a row each, with its views and what the maps make of it.
    Raises Refused: a picture cannot be read."""
    x, rows = np.stack([like_mnist(path) for path in paths]), []
    drawn = through_maps(run, run.model.encode(x), "D(E(x){})")
    columns = [row for row in view_rows(run.augs, x, drawn) if row]
    for i, path in enumerate(paths):
        rows.append((path.stem[:20], [pictures[i] for _, pictures in columns]))
    title = "x as MNIST would have it, its views, and what the maps draw from x alone"
    return grid(title, [label for label, _ in columns], rows, cell=140)


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="*",
        type=path_of,
        metavar="RUN",
        help="run folders (default: all under runs/); of several seeds their means, too, and of "
        "several methods the differences",
    )
    add(
        "--only",
        nargs="+",
        choices=[*FIGURES, "tables"],
        metavar="NAME",
        help="draw these figures, no more; tables: print and write these, and draw nothing",
    )
    add("--list", action="store_true", help="name the figures, and end")
    add(
        "--digits",
        nargs="+",
        type=int,
        help="the classes that the figures show, by number (default: the first ten)",
    )
    add(
        "--image",
        action="append",
        type=path_of,
        metavar="FILE",
        help="show this picture or photo of a digit through the maps; may be repeated",
    )
    add("--data-dir", type=path_of, default=DATA_DIR, help="(default data/)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the runs that the command line names."""
    parser = parser_of()
    options = parsed(parser, argv)
    with one_line_errors(parser):
        if options.list:
            for name, f in FIGURES.items():
                print(f"{name:22} {(f.__doc__ or name).splitlines()[0]}")
            return
        runs, wrong = load_runs(options)
        chosen = {name: FIGURES[name] for name in options.only or () if name in FIGURES}
        if options.image:
            chosen["images"] = partial(own_images, paths=options.image)
        for run in runs:
            run.peers = runs
            wrong += draw_figures(run, chosen)
        if "tables" in (options.only or ()):
            evaluate(runs, {})
        elif not chosen:
            evaluate(runs, FIGURES)
        if wrong:
            raise Refused("; ".join(wrong))


def load_runs(options: argparse.Namespace) -> tuple[list[Run], list[str]]:
    """The runs that the command line names, and a line for each that cannot be read. Raises
    OSError: there is none."""
    folders, wrong = [], []
    for path in options.runs or [Path("runs")]:
        if path.name == "model.pt":
            folders.append(path.parent)
        elif path.is_dir() and not (path / "model.pt").exists():
            folders += sorted(model.parent for model in path.glob("*/model.pt")) or [path]
        elif not path.is_file():
            folders.append(path)
        elif not path.name.startswith("heatmap"):  # which runs/* names, too
            wrong.append(f"{path} is no run folder: write --image before each picture")
    if not (options.runs or [*Path("runs").glob("*/model.pt")]):
        raise FileNotFoundError("there is no run under runs/: train one with `python train.py`")
    runs, data_of = [], cache(partial(load_images, data_dir=options.data_dir))
    for folder in folders:
        try:
            model = lavae.load(folder / "model.pt")
            data = data_of(model.settings["dataset"])
            runs.append(Run(folder, model, data, options.digits))
        except (OSError, Refused) as error:
            wrong.append(str(error))
    return runs, wrong


def evaluate(runs: Sequence[Run], figures: dict[str, Callable]) -> None:
    """Print all tables, and write evaluation.json and those figures that a run can have."""
    for run in runs:
        print(f"measuring {run.folder}")
        run.tables = measure(run)
        content = {"tables": run.tables, "eigenvalues": eigenvalues_of(run.model)}
        (run.folder / "evaluation.json").write_text(json.dumps(content, indent=1))
    for rows in grouped(runs, lambda run: (run.dataset, run.augs)):
        print_tables(rows)
        print_means(rows)
        for run in rows:
            draw_figures(run, figures)
    transferred = [run for run in runs if run.kind == "lavae" and run.model.transfers]
    but = ("seed", "augs", "orders", "transfer")
    for number, sources in enumerate(grouped(transferred, lambda run: run.settings_but(*but))):
        results = [("+".join(run.augs), run.settings["seed"], run.tables) for run in sources]
        rows = heatmap_rows(sources[0].dataset, results)
        if len(rows) > 1:
            path = sources[0].folder.parent / f"heatmap{number or ''}.png"
            path.with_suffix(".json").write_text(json.dumps(rows, indent=1))
            save(heatmap(rows), path)
            print(f"  {path}")


if __name__ == "__main__":
    main()
