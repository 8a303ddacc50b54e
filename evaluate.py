"""Measure and draw what a LAVAE has learnt, on the 10,000 test images.

    augment        D(E(x) L_i)          Table I, Fig. 3     reconstruct    D(E(x))
    compose        D(E(x) L_1 L_2)      Table I, Fig. 3     reverse        D(E(x) L_2 L_1)
    invert         D(E(A_i x) L_i^-1)   Fig. 4              transfer       Fig. 6
    any to any     D(E(view_s) L_s^-1 L_t)                  the CVAEs      Table I, Figs. 8 and 9

    python evaluate.py                          # every run under runs/, baselines inside them too
    python evaluate.py runs/flip_lr+flip_ud     # this one
    python evaluate.py runs/seed0 runs/seed1    # these, and their mean and standard deviation

Prints the tables and writes evaluation.json and the figures, PNG, to the run folder. BCE is in nats
an image, from posterior means, without sampling.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

import lavae
from adabelief import AdaBelief
from augment import (DATA_DIR, all_views, grid, load_images, one_of_each, view_names,
                     views)
from lavae import CVAE, LAVAE, LatentMap, bce, pixels

LABELS = {"lavae": "LAVAE", "cvae": "CVAE, naive", "cvae-paired": "CVAE, LAVAE training",
          "vae": "VAE of originals"}
PAPER_TABLE = {"flip_lr+flip_ud": {  # Table I; it gives the last row's total as 695.68
    "lavae": [68.34, 75.89, 71.30, 81.57], "cvae": [98.11, 260.18, 351.79, 279.82],
    "cvae-paired": [99.15, 99.16, 99.26, 299.12]}}
PAPER_TOTALS = {  # slides 13 and 21: trained on, transferred to (or trained on, the same)
    "flip_lr+flip_ud": {"flip_lr+flip_ud": 297.10, "mini_image+edge_detect": 696.23,
                        "rotate_cw+flip_lr": 447.01, "shear_x+canny": 564.09},
    "mini_image+edge_detect": {"flip_lr+flip_ud": 499.22, "mini_image+edge_detect": 500.86,
                               "rotate_cw+flip_lr": 607.79, "shear_x+canny": 336.65},
    "rotate_cw+flip_lr": {"flip_lr+flip_ud": 440.25, "mini_image+edge_detect": 730.68,
                          "rotate_cw+flip_lr": 329.20, "shear_x+canny": 491.55},
    "shear_x+canny": {"flip_lr+flip_ud": 304.04, "mini_image+edge_detect": 781.76,
                      "rotate_cw+flip_lr": 915.97, "shear_x+canny": 516.54},
}

# ---------------------------------------------------------------- numbers


def tensors(images: np.ndarray, augs: Sequence[str], device: torch.device) -> list[Tensor]:
    """The 2^K views of uint8 images (N, H, W), on the device."""
    return [torch.from_numpy(v).to(device) for v in all_views(images, augs)]


@torch.no_grad()
def nats(decoder: nn.Module, z: Tensor, images: Tensor) -> float:
    """Mean BCE of uint8 images (N, 28, 28) given latents (N, latent_dim), nats an image."""
    total = sum(bce(decoder(z_b), pixels(x_b)).item() * len(x_b)
                for z_b, x_b in zip(z.split(1000), images.split(1000)))
    return total / len(images)


def each(names: Sequence[str], decoder: nn.Module, latents: Sequence[Tensor],
         images: Sequence[Tensor]) -> dict[str, float]:
    """A row of the table: the nats of every view."""
    return {name: nats(decoder, z, x) for name, z, x in zip(names, latents, images)}


def with_total(row: dict[str, float]) -> dict[str, float]:
    """The row and its sum, the paper's figure of merit."""
    return row | {"total": sum(row.values())}


def reverse(model: LAVAE, z: Tensor) -> Tensor:
    """z L_K .. L_2 L_1: composed in the other order than that of the last view."""
    for latent_map in reversed(model.maps):
        z = latent_map(z)
    return z


@torch.no_grad()
def identity(decoder: nn.Module, z: Tensor, images: Tensor) -> float:
    """Does the picture belong to THIS digit? The share of the N pictures D(z) that lie nearest (L2)
    to their own image among all N. z (N, latent_dim), images uint8 (N, 28, 28)."""
    targets, hits = pixels(images).flatten(1), 0
    squares = targets.square().sum(1)
    for own, z_b in zip(torch.arange(len(z), device=z.device).split(1000), z.split(1000)):
        distances = squares - 2 * decoder(z_b).sigmoid().flatten(1) @ targets.T  # + |D(z)|^2
        hits += (distances.argmin(1) == own).sum().item()
    return hits / len(z)


def pattern_counts(maps: Sequence[Tensor]) -> dict[str, int]:
    """How many latent directions each pattern of signs has: {"++": 5, "-+": 4, ..}.

    For commuting involutions (d, d) the product of the projections (I +- L_i) / 2 is the projection
    to their joint eigenspace, and its trace is the dimension.
    """
    identity_matrix = torch.eye(len(maps[0]), dtype=maps[0].dtype)
    projections = {"": identity_matrix}
    for L in maps:
        projections = {signs + sign: P @ (identity_matrix + (1 if sign == "+" else -1) * L) / 2
                       for signs, P in projections.items() for sign in "+-"}
    return {signs: round(P.trace().item()) for signs, P in projections.items()}


def group(model: LAVAE) -> dict:
    """The structure of the maps: are they involutions, do they commute, what do they keep?

    Frobenius norms; eigenvalues as [real, imaginary]. "directions" counts joint eigenspaces, for
    maps that are involutions.
    """
    maps = {aug: f.L.double().cpu() for aug, f in zip(model.augs, model.maps)}
    unit = torch.eye(model.latent_dim, dtype=torch.double)
    squares = {aug: torch.linalg.norm(unit - L @ L).item() for aug, L in maps.items()}
    return {
        "involution": squares,
        "commutator": {f"{a}, {b}": torch.linalg.norm(maps[a] @ maps[b] - maps[b] @ maps[a]).item()
                       for a, b in combinations(maps, 2)},
        "eigenvalues": {aug: sorted([v.real, v.imag] for v in torch.linalg.eigvals(L).tolist())
                        for aug, L in maps.items()},
        "directions": pattern_counts([*maps.values()]) if max(squares.values()) < 0.5 else None}


def separability(train: Sequence[Tensor], test: Sequence[Tensor], seed: int = 0) -> float:
    """The accuracy of a small classifier that tells the views of test latents apart.

    train, test: the latents of each view, (N, latent_dim). A hidden layer of 64, 5 epochs, seeded.
    """
    z = torch.cat([*train])
    y = torch.arange(len(train), device=z.device).repeat_interleave(len(train[0]))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        classifier = nn.Sequential(nn.Linear(z.shape[1], 64), nn.ReLU(), nn.Linear(64, len(train)))
        optimizer = AdaBelief(classifier.to(z.device).parameters(), lr=1e-2)
        for _ in range(5):
            for index in torch.randperm(len(z)).to(z.device).split(500):
                loss = nn.functional.cross_entropy(classifier(z[index]), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    hits = sum((classifier(z_v).argmax(1) == v).sum().item() for v, z_v in enumerate(test))
    return hits / sum(map(len, test))


@torch.no_grad()
def measure_baseline(model: CVAE | LAVAE, x: np.ndarray, y: np.ndarray,
                     device: torch.device) -> dict:
    """A row of Table I and the identity preservation, from the codes of the originals."""
    images, latents = tensors(x, model.augs, device), latents_of_views(model, x, y, device)
    names = view_names(model.augs)
    return with_total(each(names, model.decoder, latents, images)) | {
        "identity": {name: identity(model.decoder, z, v)
                     for name, z, v in zip(names, latents, images)}}


@torch.no_grad()
def latents_of_views(model: CVAE | LAVAE, x: np.ndarray, y: np.ndarray,
                     device: torch.device) -> list[Tensor]:
    """What makes the decoder draw each view, from the codes of originals x, uint8 (N, 28, 28).

    y: their digits (N,), for a CVAE that is told them.
    """
    known = [torch.from_numpy(y).long().to(device)] if isinstance(model, CVAE) else []
    x = torch.from_numpy(x).to(device)
    z = model.encode(x, 0, *known) if known else model.encode(x)
    return [model.to_view(z, v, *known) for v in range(2 ** len(model.augs))]


@torch.no_grad()
def measure(model: LAVAE, data: Sequence[np.ndarray], device: torch.device) -> dict:
    """Every number of a LAVAE in evaluation.json; data as `load_images` gives it."""
    x_train, _, x, y = data
    names, images = view_names(model.augs), tensors(x, model.augs, device)
    encoded = [model.encode(v) for v in images]
    known = [model.encode(v) for v in tensors(x_train[:20_000], model.augs, device)]

    def every_view(z):
        return [model.to_view(z, v) for v, _ in enumerate(names)]

    any_to_any = {
        name: each(names, model.decoder, every_view(model.from_view(z, v)), images)
        for v, (name, z) in enumerate(zip(names, encoded))}
    z = encoded[0]
    row = measure_baseline(model, x, y, device) | {
        "reverse": nats(model.decoder, reverse(model, z), images[-1]),
        "direct": each(names, model.decoder, encoded, images),
        "inverse": {name: any_to_any[name]["orig"] for name in names[1:]},
        "involution": [latent_map.involution_error(z).item() for latent_map in model.maps],
        "any_to_any": any_to_any, "separability": separability(known, encoded),
        "group": group(model) if isinstance(model.maps[0], LatentMap) else None}
    return {"lavae": row, "transfer": {
        key: with_total(each(view_names(augs), head, every_view(z), tensors(x, augs, device)))
        for augs, (key, head) in zip(model.transfers, model.heads.items())}}


# ---------------------------------------------------------------- tables


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence]]) -> None:
    """Rows of (label, cells) under column heads; a cell is a number, a text, or None for nothing."""
    first = 2 + max(len(text) for text in (title, *(label for label, _ in rows)))
    cells = [["" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in values]
             for _, values in rows]
    widths = [2 + max(7, *map(len, column)) for column in zip(columns, *cells)]
    print("\n" + title.ljust(first) + "".join(c.rjust(w) for c, w in zip(columns, widths)))
    for (label, _), row in zip(rows, cells):
        print(label.ljust(first) + "".join(c.rjust(w) for c, w in zip(row, widths)).rstrip())


def models_of(result: dict) -> dict[str, dict]:
    """The rows of Table I in an evaluation: of the LAVAE and of the baselines, as far as there."""
    rows = result | result.get("baselines", {})
    return {name: rows[name] for name in LABELS if name in rows}


def report(augs: Sequence[str], result: dict) -> None:
    """Print the tables of a run, the paper's numbers beneath where it has them."""
    source, names = "+".join(augs), view_names(augs)
    columns, paper = [*names, "total"], PAPER_TABLE.get("+".join(augs), {})
    rows = []
    for name, row in models_of(result).items():
        rows.append((LABELS[name], [row[c] for c in columns]))
        if name in paper:
            rows.append(("  paper", with_total(dict(enumerate(paper[name]))).values()))
        elif name == "lavae" and source in PAPER_TOTALS:
            rows.append(("  paper", [None] * len(names) + [PAPER_TOTALS[source][source]]))
    print_table("Table I, nats an image", columns, rows)
    if "cvae-paired" in paper and "cvae-paired" in models_of(result):
        print("(the paper gives 695.68 as the total of its last row, which adds up to 596.69)")
    print_table("identity preserved, %", names, [
        (LABELS[name], [100 * v for v in row["identity"].values()])
        for name, row in models_of(result).items()])
    if "lavae" not in result:
        return

    row = result["lavae"]
    print_table("LAVAE, any view to any", columns, [
        *((f"from {name}", with_total(v).values()) for name, v in row["any_to_any"].items()),
        ("direct, D(E(view))", with_total(row["direct"]).values()),
        ("reverse composition", [None] * (len(names) - 1) + [row["reverse"], None])])
    print(f"the views' latents are told apart with {row['separability']:.1%} accuracy")
    if row["group"]:
        for name, norm in row["group"]["involution"].items():
            print(f"|I - L L| of {name}: {norm:.1e}")
        for name, norm in row["group"]["commutator"].items():
            print(f"|L1 L2 - L2 L1| of {name}: {norm:.1e}")
    if row["group"] and row["group"]["directions"]:
        print(f"latent directions that {' and '.join(augs)} keep (+) or reverse (-): "
              + ", ".join(f"{k} {v}" for k, v in row["group"]["directions"].items()))
    for target, row in result["transfer"].items():
        rows = [("LAVAE, D_B(E(x) L)", row.values())]
        if target in PAPER_TOTALS.get(source, {}):
            rows.append(("  paper", [None] * (len(row) - 1) + [PAPER_TOTALS[source][target]]))
        print_table(f"transfer to {target}", row, rows)


def report_seeds(augs: Sequence[str], results: Sequence[dict]) -> None:
    """Print mean and standard deviation of several runs with the same augmentations."""
    columns, rows = [*view_names(augs), "total", "identity, %"], []
    for name in LABELS:
        found = [models_of(result)[name] for result in results if name in models_of(result)]
        if len(found) > 1:
            values = [[row[c] for row in found] for c in columns[:-1]]
            values.append([100 * statistics.mean(row["identity"].values()) for row in found])
            rows.append((f"{LABELS[name]}, {len(found)} runs", [
                f"{statistics.mean(v):.2f} +- {statistics.stdev(v):.2f}" for v in values]))
    if rows:
        print_table(f"{' and '.join(augs)}, mean +- sd", columns, rows)


# ---------------------------------------------------------------- figures


@torch.no_grad()
def draw(decoder: nn.Module, z: Tensor) -> np.ndarray:
    """Latents (N, latent_dim) to pictures, uint8 (N, 28, 28)."""
    return (decoder(z).sigmoid() * 255).round().byte().cpu().numpy()


def view_rows(augs: Sequence[str], digits: np.ndarray, *drawn: tuple[Sequence, Sequence]) -> list:
    """For each view: the image, and beneath it what was drawn in its place: (labels, pictures)."""
    rows = []
    for v, (name, view) in enumerate(zip(view_names(augs), all_views(digits, augs))):
        rows += [None, (name, view), *((labels[v], pictures[v]) for labels, pictures in drawn)]
    return rows[1:]


def figures(model: LAVAE, digits: np.ndarray, columns: Sequence[str],
            device: torch.device) -> dict[str, Image.Image]:
    """Figs. 3, 4 and 6 by file name, and any view to any, for images uint8 (N, 28, 28)."""
    names, titles = view_names(model.augs), " and ".join(model.augs)
    images = tensors(digits, model.augs, device)
    encoded = [model.encode(v) for v in images]
    latents = [model.to_view(encoded[0], v) for v, _ in enumerate(names)]
    origins = [model.from_view(z, v) for v, z in enumerate(encoded)]
    products = views("", [lambda s, i=i: f"{s} L{i}" for i in range(1, len(model.maps) + 1)])
    inverses = [f"({L.strip()})^-1" if L.count("L") > 1 else f"{L.strip()}^-1" for L in products]
    back = f"D(E(x){''.join(f' L{i}' for i in range(len(model.maps), 0, -1))})"

    def redrawn(decoder, D, augs):
        return view_rows(augs, digits, ([f"{D}(E(x){L})" for L in products],
                                        [draw(decoder, z) for z in latents]))

    undone = [((f"v = {name}", v.cpu().numpy()), (f"D(E(v) {inv})", draw(model.decoder, z)), None)
              for name, v, inv, z in zip(names, images, inverses, origins)][1:]
    pages = {
        "fig3_views": grid(f"Augment in latent space: {titles}", columns, [
            *redrawn(model.decoder, "D", model.augs), None,
            (f"reverse {back}", draw(model.decoder, reverse(model, encoded[0])))]),
        "fig4_inverses": grid(f"Back to the original: {titles}", columns, [
            ("orig", digits), ("D(E(x))", draw(model.decoder, encoded[0])), None,
            *(row for rows in undone for row in rows)][:-1])}
    for (key, head), augs in zip(model.heads.items(), model.transfers):
        pages[f"fig6_{key}"] = grid(f"Same latents, new decoder: {titles} to {' and '.join(augs)}",
                                    columns, redrawn(head, "D_B", augs))
    one = len(digits) * 7 // 10  # of ten digits the 7: no flip of it looks like another digit
    pages["any_to_any"] = grid(
        "Any view to any view: D(E(v) L_from^-1 L_to)", ["v", *(f"to {name}" for name in names)], [
            (f"from {name}", [v[one].cpu().numpy(), *(
                draw(model.decoder, model.to_view(z[one:one + 1], t))[0]
                for t, _ in enumerate(names))])
            for name, v, z in zip(names, images, origins)], cell=168)
    return pages


def comparison(models: dict[str, LAVAE | CVAE], digits: np.ndarray, labels: np.ndarray,
               columns: Sequence[str], device: torch.device) -> dict[str, Image.Image]:
    """Figs. 8 and 9 by file name, as far as their models are there."""
    augs = next(iter(models.values())).augs
    drawn = {name: [draw(model.decoder, z) for z in latents_of_views(model, digits, labels, device)]
             for name, model in models.items()}
    pages = {}
    if "cvae" in drawn:
        pages["fig8_cvae"] = grid("Naive CVAE: the condition changed", columns, view_rows(
            augs, digits, ([f"D(z, {name})" for name in view_names(augs)], drawn["cvae"])))
    if "cvae-paired" in drawn and "lavae" in drawn:
        pages["fig9_paired_cvae"] = grid(
            "CVAE trained like a LAVAE, and the LAVAE", columns, view_rows(augs, digits, *(
                (len(drawn[name]) * [LABELS[name].split(",")[0]], drawn[name])
                for name in ("cvae-paired", "lavae"))))
    return pages


def bar_chart(title: str, bars: Sequence[tuple[str, float, float | None]]) -> Image.Image:
    """Horizontal bars of (label, value, the paper's value or None), in nats an image."""
    small, label_font, title_font = (ImageFont.load_default(size) for size in (22, 28, 36))
    left, right, height, margin = 380, 1300, 96, 32
    scale = (right - left) / max(v for _, *values in bars for v in values if v is not None)
    page = Image.new("RGB", (1480, 130 + height * len(bars) + 20), "white")
    pen = ImageDraw.Draw(page)
    pen.text((margin, margin), title, "black", title_font)
    for i, (label, value, paper) in enumerate(bars):
        y = 130 + i * height
        pen.text((left - 20, y + 28), label, "black", label_font, "rm")
        pen.rectangle((left, y, left + value * scale, y + 56), fill=(70, 110, 180))
        pen.text((left + value * scale + 12, y + 28), f"{value:.0f}", "black", label_font, "lm")
        if paper is not None:
            x = left + paper * scale
            pen.line((x, y - 10, x, y + 66), (200, 60, 40), 5)
            pen.text((x + 10, y + 68), f"paper {paper:.0f}", (200, 60, 40), small, "lm")
    return page


def eigenvalue_plot(eigenvalues: dict[str, Sequence[tuple[float, float]]]) -> Image.Image:
    """The eigenvalues of each map, [real, imaginary], around the unit circle, one panel a map."""
    label_font, title_font, side = ImageFont.load_default(28), ImageFont.load_default(36), 560
    page = Image.new("RGB", (40 + (side + 40) * len(eigenvalues), side + 200), "white")
    pen = ImageDraw.Draw(page)
    pen.text((40, 32), "Eigenvalues of the maps", "black", title_font)
    reach = 1.25 * max(1, *(abs(complex(*v)) for values in eigenvalues.values() for v in values))
    for i, (name, values) in enumerate(eigenvalues.items()):
        x0, y0, unit = 40 + i * (side + 40) + side // 2, 150 + side // 2, side / 2 / reach
        pen.text((x0, 120), name, "black", label_font, "ms")
        pen.line((x0 - side // 2, y0, x0 + side // 2, y0), "silver", 2)
        pen.line((x0, y0 - side // 2, x0, y0 + side // 2), "silver", 2)
        pen.ellipse((x0 - unit, y0 - unit, x0 + unit, y0 + unit), outline="gray", width=2)
        for real, imaginary in values:
            x, y = x0 + real * unit, y0 - imaginary * unit
            pen.ellipse((x - 9, y - 9, x + 9, y + 9), outline=(70, 110, 180), width=4)
        for at in (-1, 1):
            near = sum(abs(complex(*v) - at) < 0.1 for v in values)
            if near > 1:
                pen.text((x0 + at * (unit - 24), y0 - 12), f"{near} at {at:+d}", (70, 110, 180),
                         label_font, "rb" if at > 0 else "lb")
    return page


# ---------------------------------------------------------------- from the command line to files


def evaluate(run: Path, models: dict[str, LAVAE | CVAE], data: Sequence[np.ndarray],
             device: torch.device) -> dict:
    """Print the tables of a run, write evaluation.json and the figures to its folder."""
    _, _, x_test, y_test = data
    first = next(iter(models.values()))
    print(f"\n{run}: {' and '.join(first.augs)}, {first.settings['dataset']}, "
          f"{len(x_test):,} test images")
    rows = {name: measure_baseline(model, x_test, y_test, device)
            for name, model in models.items() if name != "lavae"}
    result = rows
    if "lavae" in models:
        result = measure(models["lavae"], data, device) | ({"baselines": rows} if rows else {})
    report(first.augs, result)
    (run / "evaluation.json").write_text(json.dumps(result, indent=1))

    digits, columns = one_of_each(x_test, y_test), [str(label) for label in np.unique(y_test)]
    pages = comparison(models, digits, np.unique(y_test), columns, device)
    if "lavae" in models:
        pages |= figures(models["lavae"], digits, columns, device)
        if result["lavae"]["group"]:
            pages["eigenvalues"] = eigenvalue_plot(result["lavae"]["group"]["eigenvalues"])
    if rows:
        paper = PAPER_TABLE.get("+".join(first.augs), {})
        pages["table1"] = bar_chart("Table I: total of all views, nats an image", [
            (LABELS[name], row["total"], sum(paper[name]) if name in paper else None)
            for name, row in models_of(result).items()])
    for name, page in pages.items():
        page.save(run / f"{name}.png")
    print(f"\nwrote to {run}: evaluation.json, " + ", ".join(f"{name}.png" for name in pages))
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate the runs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run folders (default: all under runs/)")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="(default data/)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default auto)")
    options = parser.parse_args(argv)
    try:
        runs = options.runs or sorted(path.parent for path in Path("runs").glob("*/model.pt"))
        if not runs:
            raise FileNotFoundError("there is no run under runs/: train one with `python train.py`")
        device = lavae.pick_device(options.device)
        families = {run: load_family(run, device) for run in runs}
        datasets = {run: next(iter(models.values())).settings["dataset"]
                    for run, models in families.items()}
        data = {name: load_images(name, options.data_dir) for name in set(datasets.values())}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    results = {}
    for run, models in families.items():
        result = evaluate(run, models, data[datasets[run]], device)
        kind = datasets[run], *next(iter(models.values())).augs
        results.setdefault(kind, []).append(result)
    for (_, *augs), same in results.items():
        report_seeds(augs, same)


def load_family(run: Path, device: torch.device) -> dict[str, LAVAE | CVAE]:
    """The model of a run folder and the baselines in folders inside, by the name of --model."""
    model = lavae.load(run, device)
    inside = [lavae.load(path, device) for path in sorted(run.glob("*/model.pt"))]
    found = {m.settings["model"]: m for m in (model, *inside)}
    return {name: found[name] for name in LABELS if name in found}


if __name__ == "__main__":
    main()
