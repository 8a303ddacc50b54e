"""Train a LAVAE in three stages.

    stage 1   encoder, decoder   min  BCE(v, D(z)) + KL(q(z|v) || N(0, I)) over all views v   Eq. 5
    stage 2   L_1 .. L_K         min  |E(x) L_i - E(A_i x)|^2 + |I - L_i L_i|^2                Eq. 6
    stage 3   a new head D_B     min  BCE(view_B(x), D_B(view_L(E(x))))                        Eq. 7

    python train.py                                        # flips, then shear_x and canny: minutes
    python train.py --preset quick                         # a minute: for a lecture
    python train.py --augs rotate_cw flip_lr --transfer flip_lr flip_ud    # another pair

Writes model.pt (for `lavae.load` and `evaluate.py`) and metrics.json to the run folder.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

import lavae
from adabelief import AdaBelief
from augment import AUGMENTATIONS, DATA_DIR, DATASETS, all_views, load_images, views
from lavae import LAVAE, bce, involution_error, kl, map_error, moments, pixels, sample

PRESETS = {  # each setting is also an option of its own
    "quick": dict(filters=32, epochs=1, transfer_epochs=1, batch_size=128, lr=6e-3),
    "laptop": dict(filters=32, epochs=5, transfer_epochs=3, batch_size=128, lr=6e-3),
    "paper": dict(filters=64, epochs=100, transfer_epochs=100, batch_size=64, lr=1e-3),
}
MAP_STEPS = 2000  # of stage 2: the whole data set each, in half a millisecond
MAP_LR = 1e-2

# ---------------------------------------------------------------- the three stages


def stage1(model: LAVAE, images: Tensor, settings: argparse.Namespace) -> list[dict]:
    """Populate the latent space (Eq. 5): encoder and decoder learn on all views alike.

    images: uint8 (2^K, N, 28, 28), the views of all training images, on the model's device.
    Returns the history: a dict an epoch with the mean loss, bce and kl, nats an image.
    """
    noise = torch.Generator(images.device).manual_seed(settings.seed)

    def loss_of(index):
        x = pixels(images[:, index]).flatten(0, 1)  # (B, 28, 28): all views of the images `index`
        mu, logvar = model.encoder(x)
        reconstruction, prior = bce(model.decoder(sample(mu, logvar, noise)), x), kl(mu, logvar)
        loss = settings.recon_weight * reconstruction + settings.kl_weight * prior
        return {"loss": loss, "bce": reconstruction, "kl": prior}

    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    return fit(loss_of, images.shape[:2], parameters, settings.epochs, settings)


def stage2(model: LAVAE, latents: Sequence[Tensor], settings: argparse.Namespace) -> list[dict]:
    """Learn the maps (Eq. 6); the compositions are never shown.

    latents: E(x), E(A_1 x), .. E(A_K x) of all training images, (N, latent_dim) each.

    The loss is quadratic in the latents, so their second moments say all: one pass over the data,
    then full-batch steps on matrices of latent_dim x latent_dim. They start at the least-squares
    solution G^-1 C_i, which has the right signs among its eigenvalues: the involution term has a
    minimum for every choice of signs, and from a random start it holds the maps at a wrong one.
    Returns a dict for each map: mean squared error of the latents, before and after, involution.
    """
    history = []
    for aug, map_i, z_i in zip(model.augs, model.maps, latents[1:]):
        statistics = moments(latents[0], z_i)
        L = torch.linalg.lstsq(*statistics[:2]).solution.requires_grad_()
        start = map_error(L, *statistics)
        optimizer = AdaBelief([L], lr=MAP_LR)
        schedule = LambdaLR(optimizer, lambda t: 1 - t / MAP_STEPS)
        for _ in range(MAP_STEPS):
            loss = map_error(L, *statistics) + settings.involution_weight * involution_error(L)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        map_i.L.data.copy_(L)
        history.append({"map": aug, "least_squares": start.item(),
                        "error": map_error(L, *statistics).item(),
                        "involution": involution_error(L).item()})
    return history


def stage3(model: LAVAE, names: Sequence[str], z: Tensor, images: Tensor,
           settings: argparse.Namespace) -> list[dict]:
    """Transfer (Eq. 7): a new head learns to draw the views of other augmentations.

    z: (2^K, N, latent_dim), the originals' latents and their images under the maps; images: uint8
    (2^K, N, 28, 28), the views to draw from them. Returns the history: a dict an epoch, mean loss.
    """
    head = model.heads["+".join(names)]

    def loss_of(index):
        x = pixels(images[:, index]).flatten(0, 1)
        return {"loss": bce(head(z[:, index].flatten(0, 1)), x)}

    parameters = [*head.parameters()]
    return fit(loss_of, images.shape[:2], parameters, settings.transfer_epochs, settings)


# ---------------------------------------------------------------- the loop of stages 1 and 3


def one_cycle(t: float, warm_up: float = 0.1) -> float:
    """The learning rate at the share t of all steps, as a share of its peak: up, then a cosine."""
    if t < warm_up:
        return t / warm_up
    return (1 + math.cos(math.pi * (t - warm_up) / (1 - warm_up))) / 2


def fit(loss_of: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, int],
        parameters: list[Tensor], epochs: int, settings: argparse.Namespace) -> list[dict]:
    """Minimise loss_of(indices)["loss"] for `shape`, views and images; returns each epoch's means.

    A batch holds all views of some images, so that no step favours a view. The terms of
    the loss stay on the device until the epoch ends.
    """
    n_views, n = shape
    per_batch = max(1, settings.batch_size // n_views)
    steps = epochs * math.ceil(n / per_batch)
    optimizer = AdaBelief(parameters, lr=settings.lr)
    schedule = LambdaLR(optimizer, lambda step: one_cycle((step + 0.5) / steps))
    order, device = torch.Generator().manual_seed(settings.seed), parameters[0].device
    history, progress = [], Progress(epochs * n * n_views)
    for epoch in range(1, epochs + 1):
        sums = {}
        for index in torch.randperm(n, generator=order).to(device).split(per_batch):
            terms = loss_of(index)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            schedule.step()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.detach() * len(index)
            progress.add(len(index) * n_views, f"epoch {epoch}/{epochs}", terms["loss"])
        history.append({"epoch": epoch, **{key: float(value) / n for key, value in sums.items()}})
        history[-1]["images_per_second"] = round(progress.end_epoch(history[-1]["loss"]))
    return history


class Progress:
    """One line on a terminal, rewritten twice a second; elsewhere a line an epoch."""

    def __init__(self, total: int):
        self.total, self.done, self.start, self.shown = total, 0, time.perf_counter(), 0.0
        self.live, self.label = sys.stdout.isatty(), ""

    def add(self, images: int, label: str, loss: Tensor) -> None:
        """Count `images` more; loss is read only where it is shown."""
        self.done, self.label = self.done + images, label
        if self.live and time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            self._show(float(loss), end="")

    def end_epoch(self, loss: float) -> float:
        """Leave a line for the epoch; returns the images a second so far."""
        return self._show(loss, end="\n")

    def _show(self, loss, end):
        rate = self.done / (time.perf_counter() - self.start)
        left = round((self.total - self.done) / rate)
        print("\r" * self.live + f"  {self.label}  loss {loss:7.2f}  {rate:7,.0f} images/s  "
              f"{left // 60:3d}:{left % 60:02d} left", end=end, flush=True)
        return rate


# ---------------------------------------------------------------- from the command line to a run


def bounded(kind: type, test: Callable, words: str) -> Callable[[str], float]:
    """An argparse type: what `kind` reads and `test` lets pass; `words` say what is wanted."""
    def parse_number(text):
        try:
            if test(value := kind(text)):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"expected {words}, not {text!r}")
    return parse_number


COUNT = bounded(int, lambda v: v >= 1, "a whole number, 1 or more")
RATE = bounded(float, lambda v: 0 < v < math.inf, "a number above 0")
WEIGHT = bounded(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
SEED = bounded(int, lambda v: 0 <= v < 2 ** 63, "a whole number, 0 or more")


def parser_of() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(  # without a usage line, an error is one line
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--augs", nargs="+", choices=AUGMENTATIONS, default=["flip_lr", "flip_ud"], metavar="A",
        help=f"augmentations to learn, in the order in which they compose\n"
             f"(default flip_lr flip_ud) of {', '.join(AUGMENTATIONS)}")
    add("--transfer", nargs="+", choices=AUGMENTATIONS, action="append", metavar="B",
        help="train a further decoder head that draws these, one for each of --augs;\n"
             "may be repeated (default shear_x canny, where --augs are two)")
    add("--no-transfer", action="store_true", help="leave stage 3 out")
    add("--preset", choices=PRESETS, default="laptop", help="(default laptop)\n" + "\n".join(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()))
    add("--filters", type=COUNT, metavar="N", help="of the first convolution (appendix C)")
    add("--latent-dim", type=COUNT, metavar="N", default=16, help="(default 16)")
    add("--epochs", type=COUNT, metavar="N", help="of stage 1, over all views of all images")
    add("--transfer-epochs", type=COUNT, metavar="N", help="of stage 3, the same for each head")
    add("--batch-size", type=COUNT, metavar="N", help="images a step")
    add("--lr", type=RATE, metavar="X", help="the learning rate's peak in stages 1 and 3")
    add("--kl-weight", type=WEIGHT, metavar="X", default=1.0, help="in stage 1 (default 1)")
    add("--recon-weight", type=WEIGHT, metavar="X", default=1.0, help="in stage 1 (default 1)")
    add("--involution-weight", type=WEIGHT, metavar="X", default=1.0, help="in stage 2 (default 1)")
    add("--dataset", choices=DATASETS, default="mnist",
        help="mnist lies in the repository, the others are downloaded (default mnist)")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="(default data/)")
    add("--seed", type=SEED, default=0, metavar="N", help="(default 0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default auto)")
    add("--out", type=Path, metavar="DIR",
        help="the run folder (default runs/ and the names of --augs, joined by +)")
    return parser


def settings_of(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings, from the preset and the options. Ends the program where they clash."""
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    settings = parser.parse_args(argv)
    if settings.no_transfer and settings.transfer:
        parser.error("--transfer and --no-transfer exclude each other: leave one out")
    if settings.transfer is None:
        default = len(settings.augs) == 2 and not settings.no_transfer
        settings.transfer = [["shear_x", "canny"]] if default else []
    for names in settings.transfer:
        if len(names) != len(settings.augs):
            parser.error(f"--transfer {' '.join(names)}: name {len(settings.augs)} augmentations, "
                         f"one for each of --augs {' '.join(settings.augs)}")
    for names in (settings.augs, settings.transfer, *settings.transfer):
        if any(names.count(name) > 1 for name in names):
            parser.error("--augs and --transfer: the same is named twice, name it once")
    settings.out = settings.out or Path("runs") / "+".join(settings.augs)
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = parser_of()
    settings = settings_of(parser, argv)
    try:
        device = lavae.pick_device(settings.device)
        x_train = load_images(settings.dataset, settings.data_dir)[0]
        prepare(settings.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    run(x_train, device, settings)


def prepare(out: Path) -> None:
    """Make the run folder, and see before the work that it can be written to. Raises OSError."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise OSError(f"cannot write to {out} ({error.strerror}): choose another --out") from error


def tune_for_cpu(model: LAVAE) -> None:
    """Train faster on a CPU, with the same numbers."""
    model.to(memory_format=torch.channels_last)  # the order that CPU convolutions are written for
    # glibc hands big blocks of freed memory back to the system, and a step frees and asks for many:
    # that takes a third of the time. Freeing one block of 31 MiB raises its threshold for "big".
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)


def run(x_train: np.ndarray, device: torch.device, settings: argparse.Namespace) -> None:
    """The three stages, one after the other; writes model.pt and metrics.json."""
    torch.manual_seed(settings.seed)
    model = LAVAE(settings.augs, settings.transfer, settings.latent_dim, settings.filters)
    model.to(device)
    if device.type == "cpu":
        tune_for_cpu(model)
    config = {key: str(value) if isinstance(value, Path) else value
              for key, value in vars(settings).items()} | {"device": device.type}
    history, seconds = {}, {}

    def timed(name, f, *arguments):
        start = time.perf_counter()
        result = f(*arguments)
        seconds[name] = round(time.perf_counter() - start, 2)
        return result

    def tensors(augs):  # the views of the training images, uint8 (2^K, N, 28, 28)
        return torch.from_numpy(np.stack(all_views(x_train, augs))).to(device)

    images = tensors(settings.augs)
    print(f"LAVAE, {' and '.join(settings.augs)}, on {settings.dataset}: {settings.preset} preset, "
          f"{device}, seed {settings.seed}\n"
          f"stage 1: encoder and decoder learn to reconstruct {len(images)} views of "
          f"{len(x_train):,} images")
    history["stage 1"] = timed("stage 1", stage1, model, images, settings)

    print("stage 2: a matrix for each augmentation learns from pairs; compositions are not shown")
    singles = [0, *(2 ** i for i in range(len(settings.augs)))]  # x, A_1 x .. A_K x among the views
    latents = timed("encoding", lambda: [model.encode(images[i]) for i in singles])
    history["stage 2"] = timed("stage 2", stage2, model, latents, settings)
    for row in history["stage 2"]:
        print("  {map}: error of a latent {error:.4f} (least squares {least_squares:.4f}), "
              "|I - L L|^2 {involution:.1e}".format(**row))

    with torch.no_grad():
        z = torch.stack(views(latents[0], model.maps))
    for names in settings.transfer:
        print(f"stage 3: a new decoder learns {' and '.join(names)} from the same latents")
        name, images = "stage 3, " + "+".join(names), tensors(names)
        history[name] = timed(name, stage3, model, names, z, images, settings)

    lavae.save(model, settings.out / "model.pt", config)
    metrics = {"config": config, "seconds": seconds, "history": history,
               "images_per_second": history["stage 1"][-1]["images_per_second"]}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    print(f"done in {sum(seconds.values()):.0f} s; now: python evaluate.py {settings.out}")


if __name__ == "__main__":
    main()
