"""Measure and draw what a LAVAE has learnt, on the 10,000 test images.

    augment          D(E(x) L_i)              Table I, Fig. 3       reconstruct    D(E(x))
    compose          D(E(x) L_1 L_2)          Table I, Fig. 3       reverse        D(E(x) L_2 L_1)
    invert           D(E(A_i x) L_i^-1)       Fig. 4                transfer           Fig. 6

    python evaluate.py                          # every run under runs/
    python evaluate.py runs/flip_lr+flip_ud     # this one

Prints the table and writes evaluation.json and the figures, PNG, to the run folder. Every number is
a binary cross-entropy in nats an image, from posterior means, without sampling.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

import lavae
from augment import (DATA_DIR, all_views, grid, load_images, one_of_each, view_names,
                     views)
from lavae import LAVAE, bce, involution_error, pixels

PAPER_TABLE = {"flip_lr+flip_ud": [68.34, 75.89, 71.30, 81.57]}  # Table I, LAVAE
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


def matrices(model: LAVAE) -> list[Tensor]:
    """I, L_1, L_2, L_1 L_2: what takes an original's latent to that of each view."""
    return views(torch.eye(model.latent_dim, device=model.maps[0].L.device), model.maps)


@torch.no_grad()
def measure(model: LAVAE, x: np.ndarray, device: torch.device) -> dict:
    """Every number of evaluation.json, for test images x, uint8 (N, 28, 28)."""
    names, images = view_names(model.augs), tensors(x, model.augs, device)
    encoded = [model.encode(v) for v in images]
    latents = [encoded[0] @ M for M in matrices(model)]
    undone = [z @ torch.linalg.inv(M) for z, M in zip(encoded, matrices(model))]
    originals = [images[0]] * len(images)
    return {
        "lavae": with_total(each(names, model.decoder, latents, images)) | {
            "reverse": nats(model.decoder, reverse(model, encoded[0]), images[-1]),
            "direct": each(names, model.decoder, encoded, images),
            "inverse": each(names[1:], model.decoder, undone[1:], originals),
            "involution": [involution_error(latent_map.L).item() for latent_map in model.maps]},
        "transfer": {
            key: with_total(each(view_names(augs), head, latents, tensors(x, augs, device)))
            for augs, (key, head) in zip(model.transfers, model.heads.items())}}


# ---------------------------------------------------------------- table


def print_table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence]]) -> None:
    """Rows of (label, numbers) under column heads; None leaves a cell empty."""
    first = 2 + max(len(text) for text in (title, *(label for label, _ in rows)))
    widths = [max(8, len(column) + 2) for column in columns]
    print(title.ljust(first) + "".join(c.rjust(w) for c, w in zip(columns, widths)))
    for label, values in rows:
        cells = ("" if v is None else f"{v:.2f}" for v in values)
        print(label.ljust(first) + "".join(c.rjust(w) for c, w in zip(cells, widths)).rstrip())


def report(model: LAVAE, result: dict) -> None:
    """Print the tables of a run, the paper's numbers beneath where it has them."""
    source, row = "+".join(model.augs), result["lavae"]
    rows = [("LAVAE, D(E(x) L)", [v for k, v in row.items() if k in row["direct"] or k == "total"]),
            ("direct, D(E(view))", with_total(row["direct"]).values()),
            ("inverse, D(E(view) L^-1)", [None, *row["inverse"].values()]),
            ("reverse composition", [None] * (len(row["direct"]) - 1) + [row["reverse"]])]
    if source in PAPER_TABLE:
        rows.append(("paper, LAVAE", with_total(dict(enumerate(PAPER_TABLE[source]))).values()))
    elif source in PAPER_TOTALS:
        rows.append(("paper, LAVAE", [None] * len(row["direct"]) + [PAPER_TOTALS[source][source]]))
    print_table("nats an image", [*row["direct"], "total"], rows)
    print("|I - L L|^2:",
          ", ".join(f"{a} {v:.1e}" for a, v in zip(model.augs, row["involution"])))
    for target, row in result["transfer"].items():
        rows = [("LAVAE, D_B(E(x) L)", row.values())]
        if target in PAPER_TOTALS.get(source, {}):
            rows.append(("paper", [None] * (len(row) - 1) + [PAPER_TOTALS[source][target]]))
        print()
        print_table("transfer", row, rows)


# ---------------------------------------------------------------- figures


@torch.no_grad()
def draw(decoder: nn.Module, z: Tensor) -> np.ndarray:
    """Latents (N, latent_dim) to pictures, uint8 (N, 28, 28)."""
    return (decoder(z).sigmoid() * 255).round().byte().cpu().numpy()


def figures(model: LAVAE, digits: np.ndarray, columns: Sequence[str],
            device: torch.device) -> dict[str, Image.Image]:
    """Figs. 3, 4 and 6 by file name, for images uint8 (N, 28, 28), one a column."""
    encoded = [model.encode(v) for v in tensors(digits, model.augs, device)]
    latents = [encoded[0] @ M for M in matrices(model)]
    products = views("", [lambda s, i=i: f"{s} L{i}" for i in range(1, len(model.maps) + 1)])
    back = f"D(E(x){''.join(f' L{i}' for i in range(len(model.maps), 0, -1))})"

    def view_pairs(decoder, D, augs):  # under each view what the latents give in its place
        rows = []
        for name, view, z, L in zip(view_names(augs), all_views(digits, augs), latents, products):
            rows += [None, (name, view), (f"{D}(E(x){L})", draw(decoder, z))]
        return [*rows[1:], None]

    undone = []
    for name, view, z, M, L in list(zip(view_names(model.augs), all_views(digits, model.augs),
                                        encoded, matrices(model), products))[1:]:
        inverse = f"({L.strip()})^-1" if L.count("L") > 1 else f"{L.strip()}^-1"
        undone += [None, (f"v = {name}", view),
                   (f"D(E(v) {inverse})", draw(model.decoder, z @ torch.linalg.inv(M)))]

    title = " and ".join(model.augs)
    pages = {
        "fig3_views": grid(f"Augment in latent space: {title}", columns, [
            *view_pairs(model.decoder, "D", model.augs),
            (f"reverse {back}", draw(model.decoder, reverse(model, encoded[0])))]),
        "fig4_inverses": grid(f"Back to the original: {title}", columns, [
            ("orig", digits), ("D(E(x))", draw(model.decoder, encoded[0])), *undone])}
    for (key, head), augs in zip(model.heads.items(), model.transfers):
        pages[f"fig6_{key}"] = grid(f"Same latents, new decoder: {title} to {' and '.join(augs)}",
                                    columns, view_pairs(head, "D_B", augs)[:-1])
    return pages


# ---------------------------------------------------------------- from the command line to files


def evaluate(run: Path, model: LAVAE, data: Sequence[np.ndarray], device: torch.device) -> dict:
    """Print the table of a run, write evaluation.json and the figures to its folder."""
    _, _, x_test, y_test = data
    result = measure(model, x_test, device)
    print(f"\n{run}: {model.settings['dataset']}, {len(x_test):,} test images")
    report(model, result)
    (run / "evaluation.json").write_text(json.dumps(result, indent=1))
    digits, columns = one_of_each(x_test, y_test), [str(label) for label in np.unique(y_test)]
    pages = figures(model, digits, columns, device)
    for name, page in pages.items():
        page.save(run / f"{name}.png")
    print(f"wrote to {run}: evaluation.json, " + ", ".join(f"{name}.png" for name in pages))
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
        models = [lavae.load(run, device) for run in runs]
        data = {model.settings["dataset"]: None for model in models}
        for dataset in data:
            data[dataset] = load_images(dataset, options.data_dir)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for run, model in zip(runs, models):
        evaluate(run, model, data[model.settings["dataset"]], device)


if __name__ == "__main__":
    main()
