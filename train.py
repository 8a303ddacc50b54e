"""Train a LAVAE in three stages.

    stage 1   encoder, decoder   min  BCE(v, D(z)) + KL(q(z|v) || N(0, I)) over all views v   Eq. 5
                                      (and a pinch of stage 2's error, so that there are maps)
    stage 2   L_1 .. L_K         min  |E(x) L_i - E(A_i x)|^2 + |I - L_i^k|^2, A_i^k x = x     Eq. 6
    stage 3   a new head D_B     min  BCE(view_B(x), D_B(view_L(E(x))))                        Eq. 7

    python train.py                                        # flips, then shear_x and canny: minutes
    python train.py --preset quick                         # a minute: for a lecture
    python train.py --augs rotate_cw flip_lr --transfer flip_lr flip_ud    # another pair
    python train.py --baselines                            # and three models to compare it with
    python train.py --heatmap                              # four pairs, each transferred to all

Writes model.pt (for `lavae.load` and `evaluate.py`) and metrics.json to the run folder.
"""

import argparse
import contextlib
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

import lavae
from adabelief import AdaBelief
from augment import AUGMENTATIONS, DATA_DIR, DATASETS, ORDERS, all_views, load_images, views
from lavae import (CVAE, LATENT_MAPS, LAVAE, bce, kl, map_error, misfit, mmd, moments, order_error,
                   pixels)

PRESETS = {  # each setting is also an option of its own
    "quick": dict(filters=16, epochs=1, transfer_epochs=1, batch_size=128, lr=6e-3),
    "laptop": dict(filters=32, epochs=5, transfer_epochs=3, batch_size=128, lr=6e-3),
    "paper": dict(filters=64, epochs=100, transfer_epochs=100, batch_size=64, lr=1e-3),
}
MODELS = {  # --model
    "lavae": "LAVAE",
    "cvae": "CVAE, naive: told the {told}, shown all views",
    "cvae-paired": "CVAE, trained like a LAVAE: from the original to each single augmentation",
    "vae": "VAE of originals only, maps between its codes of the views",
}
PAIRS = [["flip_lr", "flip_ud"], ["mini_image", "edge_detect"], ["rotate_cw", "flip_lr"],
         ["shear_x", "canny"]]  # of the paper's heat-map
MORE_TARGETS = [["rotate_cw", "rotate_ccw"], ["mini_image", "shear_x"], ["mini_image", "canny"]]
MAP_STEPS = 2000  # of stage 2: the whole data set each, in half a millisecond
MAP_LR = 1e-2
MLP_EPOCHS = 5  # of stage 2 with --latent-map mlp
NOISE, ORDER = 10 ** 6, 2 * 10 ** 6  # added to --seed, or weights and noise were the same numbers

# ---------------------------------------------------------------- the three stages


def stage1(model: LAVAE | CVAE, images: Tensor, settings: argparse.Namespace,
           labels: Tensor | None = None, diary: "Diary | None" = None) -> list[dict]:
    """Populate the latent space (Eq. 5): encoder and decoder learn on all views alike.

    images: uint8 (2^K, N, 28, 28), the views of all training images, on the model's device.
    Returns the history: a dict an epoch with the mean loss, bce and kl, nats an image, and misfit.

    Eq. 5 does not ask for latents that have maps. `map_weight` does: see `lavae.misfit`. (The paper
    has no such term; 0 leaves it out.) A baseline is shown fewer views, and then more of each.
    labels (N,) are for a CVAE that is told the digits.
    """
    noise = torch.Generator(images.device).manual_seed(settings.seed + NOISE)
    seen = len(images) * images.shape[1]  # an epoch, by every model
    images = images[model.shown]
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    if settings.joint == "identity":
        parameters += model.maps.parameters()

    moving = {"noise": noise}
    if settings.record:
        every = max(1, seen * settings.epochs // settings.batch_size // 32)
        moving["film"] = Film(model, images, settings.out / "recording.pt", every)

    def loss_of(index):
        if settings.record:
            moving["film"].look()
        return stage1_losses(model, pixels(images[:, index]), settings, noise,
                             None if labels is None else labels[index])

    return fit("stage 1", loss_of, images.shape[:2], parameters, settings.epochs, settings, diary,
               seen, moving, least=least_images(model, settings))


def stage1_losses(model: LAVAE | CVAE, x: Tensor, settings: argparse.Namespace,
                  noise: torch.Generator, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Eq. 5 on a batch, and the pinch of Eq. 6: the loss and its terms, bce, kl and misfit.

    x: (V, B, 28, 28) in [0, 1], the views `model.shown` of B images; labels (B,), their digits.
    """
    logits, mu, logvar = model(x, noise, *([] if labels is None else [labels]))
    reconstruction = bce(logits, x.flatten(0, 1))
    prior = kl(mu, logvar) if settings.prior_loss == "kl" else mmd(mu, logvar, noise)
    loss = settings.recon_weight * reconstruction + settings.kl_weight * prior
    terms = {"bce": reconstruction, "kl": prior}
    if has_misfit(model, settings):
        z, *others = singles(mu.unflatten(0, x.shape[:2]))
        terms["misfit"] = (maps_loss(model, [z, *others], settings) if settings.joint
                           else misfit(z, *others))
        loss = loss + settings.map_weight * terms["misfit"]
    return {"loss": loss, **terms}


def has_misfit(model: LAVAE | CVAE, settings: argparse.Namespace) -> bool:
    """Whether stage 1 asks this model for maps."""
    return settings.map_weight > 0 and isinstance(model, LAVAE) and len(model.shown) > 1


def least_images(model: LAVAE | CVAE, settings: argparse.Namespace) -> int:
    """The fewest images that a step of stage 1 may show.

    A matrix fits as many as there are latents without any misfit: show it twice as many.
    """
    return 2 * model.latent_dim if has_misfit(model, settings) else 1


def stage2(model: LAVAE, latents: Sequence[Tensor], settings: argparse.Namespace) -> list[dict]:
    """Learn the maps (Eq. 6); the compositions are never shown.

    latents: E(x), E(A_1 x), .. E(A_K x) of all training images, (N, latent_dim) each.

    The loss is quadratic in the latents, so their second moments say all: one pass over the data,
    then full-batch steps on matrices of latent_dim x latent_dim. They start at the least-squares
    solution G^-1 C_i, which has the right signs among its eigenvalues: the involution term has a
    minimum for every choice of signs, and from a random start it holds the maps at a wrong one.
    Returns a dict for each map: mean squared error of the latents, before and after; `order_error`;
    whether it has settled.
    """
    history = []
    for aug, map_i, z_i, order in zip(model.augs, model.maps, latents[1:], orders_of(settings)):
        statistics = moments(latents[0], z_i)

        def loss_of(L):
            return map_error(L, *statistics) + settings.involution_weight * order_error(L, order)

        L = torch.linalg.lstsq(*statistics[:2]).solution.requires_grad_()
        start = map_error(L, *statistics)
        optimizer = AdaBelief([L])
        for t in range(MAP_STEPS):
            optimizer.param_groups[0]["lr"] = MAP_LR * (1 - t / MAP_STEPS)
            optimizer.zero_grad()
            loss_of(L).backward()
            optimizer.step()
        L, settled = settle(loss_of, L)
        map_i.L.data.copy_(L.float())
        history.append({"map": aug, "least_squares": start.item(),
                        "error": map_error(L, *statistics).item(),
                        "penalty": order_error(L, order).item(), "settled": settled})
    return history


def settle(loss_of: Callable[[Tensor], Tensor], L: Tensor, rounds: int = 50) -> tuple[Tensor, bool]:
    """L at the minimum of its loss, and whether it got there.

    16 latents are there already: their gradient is zero. With 64 some directions are thousands of
    times steeper than others; L-BFGS, which learns the curvature, goes on until a round of 100
    steps lowers the loss by less than 1%.
    """
    loss = loss_of(L)
    gradient, = torch.autograd.grad(loss, L)
    if gradient.norm() * L.norm() <= 1e-6 * loss + 1e-12:
        return L.detach(), True
    L = L.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    optimizer = torch.optim.LBFGS([L], max_iter=100, max_eval=200, tolerance_change=0,
                                  history_size=50, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss_of(L)
        value.backward()
        return value

    for _ in range(rounds):
        before = optimizer.step(closure)
        if loss_of(L) > 0.99 * before:
            return L.detach(), True
    return L.detach(), False


def stage2_ablations(model: LAVAE, latents: Sequence[Tensor], settings: argparse.Namespace,
                     diary: "Diary | None" = None) -> list[dict]:
    """Stage 2 of the ablations; arguments and result as there.

    An MLP in the place of L needs the data itself; maps that stage 1 has learnt need nothing more.
    """
    if not settings.joint:
        def loss_of(index):
            return {"loss": maps_loss(model, [z[index] for z in latents], settings)}

        fit("stage 2", loss_of, (1, len(latents[0])), [*model.maps.parameters()], MLP_EPOCHS,
            settings, diary)
    with torch.no_grad():
        z = latents[0]
        return [{"map": aug, "error": (f(z) - z_i).square().mean().item(),
                 "penalty": f.order_error(order, z).item()}
                for aug, f, z_i, order in zip(model.augs, model.maps, latents[1:],
                                              orders_of(settings))]


def maps_loss(model: LAVAE, latents: Sequence[Tensor], settings: argparse.Namespace) -> Tensor:
    """Eq. 6 on a batch: E(x), E(A_1 x), .. E(A_K x), (B, latent_dim) each."""
    z = latents[0]
    return sum(
        (f(z) - z_i).square().mean() + settings.involution_weight * f.order_error(order, z)
        for f, z_i, order in zip(model.maps, latents[1:], orders_of(settings)))


def orders_of(settings: argparse.Namespace) -> list[int | None]:
    """The order k that each map should have: A_i^k x = x. The paper has 2 for all of them."""
    return [2 if settings.paper_involution else ORDERS.get(aug) for aug in settings.augs]


def singles(views: Sequence) -> list:
    """Of 2^K views the original and the K that stage 2 sees: x, A_1 x, .. A_K x."""
    return [view for i, view in enumerate(views) if i.bit_count() <= 1]


def stage3(model: LAVAE, names: Sequence[str], z: Tensor, images: Tensor,
           settings: argparse.Namespace, diary: "Diary | None" = None) -> list[dict]:
    """Transfer (Eq. 7): a new head learns to draw the views of other augmentations.

    z: (2^K, N, latent_dim), the originals' latents and their images under the maps; images: uint8
    (2^K, N, 28, 28), the views to draw from them. Returns the history: a dict an epoch, mean loss.
    """
    head = model.heads["+".join(names)]

    def loss_of(index):
        x = pixels(images[:, index]).flatten(0, 1)
        return {"loss": bce(head(z[:, index].flatten(0, 1)), x)}

    return fit("stage 3, " + "+".join(names), loss_of, images.shape[:2], [*head.parameters()],
               settings.transfer_epochs, settings, diary)


# ---------------------------------------------------------------- the loop of stages 1 and 3


def one_cycle(t: float, warm_up: float = 0.1) -> float:
    """The learning rate at the share t of all steps, as a share of its peak: up, then a cosine."""
    if t < warm_up:
        return t / warm_up
    return (1 + math.cos(math.pi * (t - warm_up) / (1 - warm_up))) / 2


def images_a_step(n_views: int, settings: argparse.Namespace, least: int = 1) -> int:
    """How many images a batch holds, each under n_views views."""
    return max(least, settings.batch_size // n_views)


def fit(name: str, loss_of: Callable[[Tensor], dict[str, Tensor]], shape: tuple[int, int],
        parameters: list[Tensor], epochs: int, settings: argparse.Namespace,
        diary: "Diary | None" = None, seen: int | None = None, moving: dict | None = None,
        least: int = 1) -> list[dict]:
    """Minimise loss_of(indices)["loss"] for `shape`, views and images; returns each epoch's means.

    A batch holds all views of some images, `least` or more, so that no step favours a view; an
    epoch shows `seen` views, or each of them once. The terms of the loss stay on the device until
    the epoch ends.
    With a diary it goes on after the last epoch that the diary has of `name`; `moving` is what
    loss_of changes, by name: generators, and what has a state_dict. Raises FloatingPointError: a loss is infinite or not a number.
    """
    n_views, n = shape
    per_batch = images_a_step(n_views, settings, least)
    per_epoch = (seen or n_views * n) // n_views
    batches = math.ceil(per_epoch / per_batch)
    optimizer, device = AdaBelief(parameters), parameters[0].device
    order = torch.Generator().manual_seed(settings.seed + ORDER)
    moving = {"optimizer": optimizer, "order": order} | (moving or {})
    history = diary.recall(name, parameters, moving) if diary else []
    progress = Progress((epochs - len(history)) * per_epoch * n_views)
    for epoch in range(len(history), epochs):
        sums, rounds = {}, range(math.ceil(per_epoch / n))
        indices = torch.cat([torch.randperm(n, generator=order) for _ in rounds])[:per_epoch]
        for i, index in enumerate(indices.to(device).split(per_batch)):
            share = (epoch * batches + i + 0.5) / (epochs * batches)
            optimizer.param_groups[0]["lr"] = settings.lr * one_cycle(share)
            terms = loss_of(index)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            terms["finite"] = terms["loss"].isfinite()
            for key, value in terms.items():
                sums[key] = sums.get(key, 0) + value.detach() * len(index)
            progress.add(len(index) * n_views, f"epoch {epoch + 1}/{epochs}", terms["loss"])
            if INTERRUPTED:
                raise KeyboardInterrupt
        good = float(sums.pop("finite"))
        if good < per_epoch:
            raise FloatingPointError(
                f"{name}: the loss is no number any more after step "
                f"{epoch * batches + int(good // per_batch)}: try a lower --lr")
        means = {key: float(value) / per_epoch for key, value in sums.items()}
        seconds = progress.end_epoch(means["loss"])
        history.append({"epoch": epoch + 1, **means, "seconds": seconds,
                        "images_per_second": round(per_epoch * n_views / seconds)})
        if diary:
            diary.note(name, parameters, moving, history)
    return history


class Film:
    """recording.pt: some frames of stage 1 as it learns, for `evaluate.py`'s film.

    A frame is the latents of 150 images under all views, and what ten of them decode to.
    """

    def __init__(self, model: LAVAE, images: Tensor, path: Path, every: int):
        self.model, self.images, self.path, self.every = model, images[:, :150], path, every
        self.taken = {"step": 0, "steps": [], "latents": [], "drawn": []}

    def look(self) -> None:
        """To be called before each step; takes a frame and writes it where one is due."""
        step, taken = self.taken["step"], self.taken
        taken["step"] += 1
        if step % self.every:
            return
        z = torch.stack([self.model.encode(view) for view in self.images])
        with torch.no_grad():
            drawn = (self.model.decoder(z[:, :10].flatten(0, 1)).sigmoid() * 255).round().byte()
        taken["steps"].append(step)
        taken["latents"].append(z.cpu())
        taken["drawn"].append(drawn.unflatten(0, (len(z), 10)).cpu())
        lavae.write({"steps": taken["steps"], "latents": torch.stack(taken["latents"]),
                     "drawn": torch.stack(taken["drawn"])}, self.path)

    def state_dict(self) -> dict:
        """All that it has, for the diary."""
        return self.taken

    def load_state_dict(self, state: dict) -> None:
        """Go on from there: what came later is forgotten."""
        self.taken = {key: value if key == "step" else [*value] for key, value in state.items()}


INTERRUPTED = []  # filled by the first Ctrl-C


class Diary:
    """state.pt: what training needs to go on after its last epoch; rewritten after every one.

    Each call of `fit` has a page there, by its name. All else is quick and is done again.
    """

    def __init__(self, path: Path, config: dict):
        self.path, self.pages = path, {"config": config}
        if path.is_file():
            try:
                self.pages = lavae.read(path)
            except ValueError as error:
                raise ValueError(f"{path} is damaged: start over with --overwrite") from error

    def recall(self, name: str, parameters: list[Tensor], moving: dict) -> list[dict]:
        """Set all to where it was; returns the history, empty where nothing was noted."""
        page = self.pages.get(name)
        if page is None:
            return []
        try:
            with torch.no_grad():
                for p, value in zip(parameters, page["parameters"], strict=True):
                    p.copy_(value)
            for key, thing in moving.items():
                generator = isinstance(thing, torch.Generator)
                (thing.set_state if generator else thing.load_state_dict)(page[key])
            history = [dict(row) for row in page["history"]]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: start over with --overwrite") from error
        print(f"  {len(history)} epochs are there already")
        return history

    def note(self, name: str, parameters: list[Tensor], moving: dict, history: list[dict]) -> None:
        """Write everything down. Raises OSError."""
        page = {"parameters": [p.detach() for p in parameters], "history": history}
        for key, thing in moving.items():
            generator = isinstance(thing, torch.Generator)
            page[key] = thing.get_state() if generator else thing.state_dict()
        self.pages[name] = page
        lavae.write(self.pages, self.path)


class Progress:
    """One line on a terminal, rewritten twice a second; elsewhere a line an epoch."""

    def __init__(self, total: int):
        self.total, self.done, self.shown = total, 0, 0.0
        self.start = self.epoch_start = time.perf_counter()
        self.live, self.label = sys.stdout.isatty(), ""

    def add(self, images: int, label: str, loss: Tensor) -> None:
        """Count `images` more; loss is read only where it is shown."""
        self.done, self.label = self.done + images, label
        if self.live and time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            self._show(float(loss), end="")

    def end_epoch(self, loss: float) -> float:
        """Leave a line for the epoch; returns the seconds that it took."""
        self._show(loss, end="\n")
        now = time.perf_counter()
        seconds, self.epoch_start = now - self.epoch_start, now
        return seconds

    def _show(self, loss, end):
        rate = self.done / (time.perf_counter() - self.start)
        left = round((self.total - self.done) / rate)
        print("\r" * self.live + f"  {self.label}  loss {loss:7.2f}  {rate:7,.0f} images/s  "
              f"{left // 60:3d}:{left % 60:02d} left", end=end, flush=True)


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
SEED = bounded(int, lambda v: 0 <= v < 2 ** 62, "a whole number from 0 to 2^62")


def parser_of() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(  # without a usage line, an error is one line
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--model", choices=MODELS, default="lavae", help="(default lavae)\n" + "\n".join(
        f"{name}: {words.format(told='view')}" for name, words in MODELS.items()))
    add("--baselines", action="store_true",
        help="train the LAVAE, and the other models in folders inside its run folder")
    add("--heatmap", action="store_true",
        help="train on each of the paper's four pairs, and transfer each to all four, in folders\n"
             "inside the run folder (default runs/heatmap); pairs that are finished are kept")
    add("--all-targets", action="store_true",
        help="with --heatmap: to the three further pairs of the authors' code, too")
    add("--augs", nargs="+", choices=AUGMENTATIONS, metavar="A",
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
    add("--batch-size", type=COUNT, metavar="N",
        help="images a step, all views counted; stage 1 takes 2 * latent dim * views or more,\n"
             "because fewer would have no misfit")
    add("--lr", type=RATE, metavar="X", help="the learning rate's peak in stages 1 and 3")
    add("--kl-weight", type=WEIGHT, metavar="X", default=1.0, help="in stage 1 (default 1)")
    add("--recon-weight", type=WEIGHT, metavar="X", default=1.0, help="in stage 1 (default 1)")
    add("--map-weight", type=WEIGHT, metavar="X", default=100.0,
        help="of the maps' misfit in stage 1 (default 100); 0 leaves Eq. 5 as the paper has it")
    add("--involution-weight", type=WEIGHT, metavar="X", default=1.0,
        help="of |I - L^k|^2 in stage 2 (default 1)")
    add("--paper-involution", action="store_true",
        help="k = 2 for all, as in the paper; without: 2 for flips, 4 for quarter turns; and a\n"
             "hundredth of |I - L L^T|^2 for augmentations that never come back")
    add("--condition", choices=["view", "digit", "both"],
        help="what --model cvae is told (default view)")
    add("--latent-map", choices=LATENT_MAPS, default="linear",
        help="an MLP in the place of each L: an ablation (default linear)")
    add("--joint", choices=["identity", "signs"],
        help="an ablation: stages 1 and 2 in one, Eq. 5 + map weight * Eq. 6; the maps start\n"
             "at I, or stay at diagonals of +-1")
    add("--prior-loss", choices=["kl", "mmd"], default="kl", help="in stage 1 (default kl)")
    add("--dataset", choices=DATASETS, default="mnist",
        help="mnist lies in the repository, the others are downloaded (default mnist)")
    add("--data-dir", type=Path, default=DATA_DIR, metavar="DIR", help="(default data/)")
    add("--seed", type=SEED, default=0, metavar="N", help="(default 0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="(default auto)")
    add("--record", action="store_true", help="keep frames of stage 1 for evaluate.py's film")
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="start over in a run folder that is in use")
    add("--out", type=Path, metavar="DIR",
        help="the run folder (default runs/ and the names of --augs, joined by +;\n"
             "a baseline's name before them)")
    return parser


def settings_of(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The settings, from the preset and the options. Ends the program where they clash."""
    parser.set_defaults(**PRESETS[parser.parse_args(argv).preset])
    settings = parser.parse_args(argv)
    if settings.all_targets and not settings.heatmap:
        parser.error("--all-targets goes with --heatmap only: add it, or leave it out")
    if settings.heatmap and (settings.augs or settings.transfer or settings.no_transfer
                             or settings.baselines):
        parser.error("--heatmap names the augmentations and transfers itself, and trains no "
                     "baselines: leave --augs, --transfer, --no-transfer and --baselines out")
    settings.augs = settings.augs or PAIRS[0]
    if settings.resume and settings.overwrite:
        parser.error("--resume and --overwrite exclude each other: leave one out")
    if settings.no_transfer and settings.transfer:
        parser.error("--transfer and --no-transfer exclude each other: leave one out")
    for option, given, models in (
            ("--baselines", settings.baselines, ["lavae"]), ("--joint", settings.joint, ["lavae"]),
            ("--heatmap", settings.heatmap, ["lavae"]),
            ("--transfer", settings.transfer, ["lavae", "vae"]),
            ("--record", settings.record, ["lavae"]),
            ("--latent-map", settings.latent_map != "linear", ["lavae", "vae"]),
            ("--condition", settings.condition, ["cvae"])):
        if given and settings.model not in models:
            parser.error(f"{option} does not go with --model {settings.model}, only with "
                         f"{' and '.join(models)}: leave one out")
    if settings.joint == "signs" and settings.latent_map != "linear":
        parser.error("--joint signs is a start for linear maps: leave --latent-map out")
    if settings.joint and not settings.map_weight:
        parser.error("--joint needs a --map-weight above 0")
    settings.condition = settings.condition or "view"
    if settings.transfer is None:
        default = (settings.model == "lavae" and len(settings.augs) == 2
                   and not settings.no_transfer)
        settings.transfer = [["shear_x", "canny"]] if default else []
    for names in settings.transfer:
        if len(names) != len(settings.augs):
            parser.error(f"--transfer {' '.join(names)}: name {len(settings.augs)} augmentations, "
                         f"one for each of --augs {' '.join(settings.augs)}")
    for names in (settings.augs, settings.transfer, *settings.transfer):
        if any(names.count(name) > 1 for name in names):
            parser.error("--augs and --transfer: the same is named twice, name it once")
    prefix = "" if settings.model == "lavae" else settings.model + "-"
    name = "heatmap" if settings.heatmap else prefix + "+".join(settings.augs)
    settings.out = settings.out or Path("runs") / name
    return settings


def runs_of(settings: argparse.Namespace) -> list[argparse.Namespace]:
    """The settings of all runs that the command line asks for.

    --baselines: the LAVAE, and the others in folders inside its own; --heatmap: a folder a pair.
    """
    def changed(name, **changes):
        return argparse.Namespace(**vars(settings) | changes | {"out": settings.out / name})

    if settings.heatmap:
        targets = PAIRS + MORE_TARGETS * settings.all_targets
        return [changed("+".join(pair), augs=pair, transfer=targets) for pair in PAIRS]
    plain = dict(latent_map="linear", joint=None, transfer=[], record=False)
    others = [name for name in MODELS if name != "lavae"] * settings.baselines
    return [settings, *(changed(name, model=name, **plain) for name in others)]


def config_of(settings: argparse.Namespace) -> dict:
    """What decides the result, as plain data."""
    return {key: value for key, value in vars(settings).items() if key not in (
        "out", "data_dir", "preset", "baselines", "heatmap", "all_targets", "no_transfer", "record",
        "resume", "overwrite")}


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = parser_of()
    settings = settings_of(parser, argv)
    runs, begun = runs_of(settings), False
    usual, held = signal.signal(signal.SIGINT, interrupt), contextlib.ExitStack()
    try:
        device = lavae.pick_device(settings.device)
        x_train, y_train, _, _ = load_images(settings.dataset, settings.data_dir)
        for one in runs:
            check_memory(one, len(x_train), device)
            one.device = lavae.trusted(settings.device,
                                       partial(first_step, one, x_train, y_train)).type
        for one in runs:
            held.enter_context(locked(one.out))
        runs_to_do = [one for one in runs if has_work(one)]
        for one in runs_to_do:
            begin(one)
        begun = True
        for one in runs_to_do:
            run(x_train, y_train, torch.device(one.device), one)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if not lavae.is_out_of_memory(error):
            raise
        what, size, options = memory_of(runs[0], 60_000)[0]
        parser.error(f"the memory is full, and the {what} take most of what this run needs, "
                     f"{size / 1e9:.2g} GB: close other programs and go on with --resume, or lower "
                     f"{options}")
    except KeyboardInterrupt:
        instead = " in the place of --overwrite" * settings.overwrite
        parser.exit(130, f"\nstopped: the same command with --resume{instead} goes on\n" if begun
                    else "\nstopped before anything was begun\n")
    finally:
        held.close()
        signal.signal(signal.SIGINT, usual)
        INTERRUPTED.clear()
    print(f"now: python evaluate.py {'--heatmap ' * settings.heatmap}{settings.out}")


def interrupt(*_) -> None:
    """The first Ctrl-C ends training after the batch, the second at once."""
    INTERRUPTED.append(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make a run folder and hold it against other runs; the system frees it when a process dies.

    Raises OSError: it cannot be written. ValueError: another run holds it.
    """
    path = folder / "lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise OSError(f"cannot write to {folder} ({error.strerror}): choose another --out"
                      ) from error
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise OSError("its holder has just removed it")
    except OSError as error:
        file.close()
        raise ValueError(f"another run is at work in {folder}: wait for it, or choose another --out"
                         ) from error
    try:
        yield
    finally:
        if fcntl:  # while it is held, so that nobody has it in the meantime; Windows forbids that
            path.unlink(missing_ok=True)
        file.close()
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def has_work(settings: argparse.Namespace) -> bool:
    """Whether there is work to do: not where --resume, --baselines or --heatmap finds the finished
    run. Changes nothing. Raises OSError, ValueError: something there must not be lost.
    """
    out, config = settings.out, config_of(settings)
    finished, begun = out / "model.pt", out / "state.pt"
    if settings.overwrite:
        return True
    if begun.is_file():
        pages = Diary(begun, config).pages
        if settings.resume:
            check_same(begun, pages.get("config"), config)
        elif len(pages) > 1 or finished.is_file():
            raise FileExistsError(f"{out} holds an interrupted run: go on with --resume, start "
                                  "over with --overwrite, or choose another --out")
    elif finished.is_file():
        if not (settings.resume or settings.baselines or settings.heatmap):
            raise FileExistsError(f"{out} holds a finished run: start over with --overwrite, or "
                                  "choose another --out")
        check_same(finished, lavae.load(finished).settings, config)
        print(f"{out} is finished already, with the same settings: kept")
        return False
    return True


def begin(settings: argparse.Namespace) -> None:
    """Write into state.pt what was asked, first of all: from here on --resume knows its own run,
    whatever model.pt is still there. Raises OSError."""
    state = settings.out / "state.pt"
    if not (settings.resume and state.is_file()):
        lavae.write({"config": config_of(settings)}, state)
        (settings.out / "recording.pt").unlink(missing_ok=True)


def memory_of(settings: argparse.Namespace, n: int) -> list[tuple[str, float, str]]:
    """What a run on n images needs, the most first: (what, bytes, the options that lower it)."""
    views = 2 ** len(settings.augs)
    try:
        with torch.device("meta"):  # shapes only
            model = build(settings)
        weights = sum(p.numel() for p in model.parameters())
    except (RuntimeError, TypeError, OverflowError):  # too many even to be counted
        return [("weights", math.inf, "--filters or --latent-dim")]
    images = min(n, images_a_step(len(model.shown), settings, least_images(model, settings)))
    layers = 2 * (28 * 28 + settings.filters * (14 * 14 + 2 * 7 * 7) + settings.latent_dim)
    return sorted([
        # of all images as they are and in one tensor, once more for a transfer; and their latents
        ("views of the images", n * views * (28 * 28 * (2 + 2 * bool(settings.transfer))
                                             + 2 * 4 * settings.latent_dim), "the number of --augs"),
        # each with a gradient, m, s and scratch; and three in state.pt before it is written
        ("weights", 4 * 8 * weights, "--filters or --latent-dim"),
        # what the layers give, and its gradient
        ("images of a step", 2 * 4 * images * len(model.shown) * layers, "--batch-size or --filters"),
    ], key=lambda part: -part[1])


def check_memory(settings: argparse.Namespace, n: int, device: torch.device) -> None:
    """Raises ValueError: a run on n images needs more than the device has left, or the machine."""
    parts = memory_of(settings, n)
    needed, (what, size, options) = sum(size for _, size, _ in parts), parts[0]
    for place in {device, torch.device("cpu")}:
        if needed > (free := lavae.free_memory(place)):
            raise ValueError(
                f"this would take {needed / 1e9:.3g} GB, and {place.type} has {free / 1e9:.3g} GB "
                f"left: the {what} take {size / 1e9:.3g} GB, lower {options}")


def first_step(settings: argparse.Namespace, x_train: np.ndarray, y_train: np.ndarray,
               device: torch.device) -> list[Tensor]:
    """The terms of the loss and the gradients of a run's first step, as the device computes them.

    The same weights, images and noise for every device. Arrays as `run` takes them.
    """
    torch.manual_seed(settings.seed)
    model = build(settings).to(device)
    n = images_a_step(len(model.shown), settings, least_images(model, settings))
    views = np.stack(all_views(x_train[:n], settings.augs))[model.shown]
    labels = torch.from_numpy(y_train[:n]).long().to(device) if isinstance(model, CVAE) else None
    terms = stage1_losses(model, pixels(torch.from_numpy(views).to(device)), settings,
                          torch.Generator().manual_seed(settings.seed), labels)
    terms["loss"].backward()
    return [*terms.values(), *(p.grad for p in model.parameters() if p.grad is not None)]


def check_same(path: Path, was: dict, now: dict) -> None:
    """Raises ValueError: the settings differ, or are none."""
    was = was if isinstance(was, dict) else {}
    for key, value in now.items():
        if key not in was or was[key] != value:
            raise ValueError(f"{path} was made with {key} {was.get(key)}, not {value}: give the "
                             "same options, or --overwrite to start over")


def build(settings: argparse.Namespace) -> LAVAE | CVAE:
    """The untrained model."""
    size = dict(latent_dim=settings.latent_dim, filters=settings.filters)
    if settings.model.startswith("cvae"):
        told = settings.condition if settings.model == "cvae" else "paired"
        return CVAE(settings.augs, told, **size)
    model = LAVAE(settings.augs, settings.transfer, latent_map=settings.latent_map,
                  originals_only=settings.model == "vae", **size)
    if settings.joint == "signs":  # every pattern of signs in as many directions
        for i, latent_map in enumerate(model.maps):
            signs = [-1.0 if j >> i & 1 else 1.0 for j in range(settings.latent_dim)]
            latent_map.L.data.copy_(torch.diag(torch.tensor(signs)))
    return model


def run(x_train: np.ndarray, y_train: np.ndarray, device: torch.device,
        settings: argparse.Namespace) -> None:
    """The three stages, one after the other; writes model.pt and metrics.json.

    x_train: uint8 (N, 28, 28); y_train: the digits, uint8 (N,).
    """
    torch.manual_seed(settings.seed)
    model = lavae.tune(build(settings).to(device))
    config, diary = config_of(settings), Diary(settings.out / "state.pt", config_of(settings))
    history, seconds = {}, {}

    def timed(name, f, *arguments):
        start = time.perf_counter()
        history[name] = rows = f(*arguments)
        noted = isinstance(rows[-1], dict) and "seconds" in rows[-1]  # before --resume, too
        seconds[name] = round(sum(row["seconds"] for row in rows) if noted
                              else time.perf_counter() - start, 2)
        return rows

    def tensors(augs):  # the views of the training images, uint8 (2^K, N, 28, 28)
        return torch.from_numpy(np.stack(all_views(x_train, augs))).to(device)

    images = tensors(settings.augs)
    told = "view and the digit" if settings.condition == "both" else settings.condition
    print(f"{MODELS[settings.model].format(told=told)}: {' and '.join(settings.augs)}, on {settings.dataset}; "
          f"{settings.preset} preset, {device}, seed {settings.seed}\n"
          f"stage 1: encoder and decoder learn to draw {len(model.shown)} of {len(images)} views "
          f"of {len(x_train):,} images")
    if isinstance(model, CVAE):
        labels = torch.from_numpy(y_train).long().to(device)
        timed("stage 1", stage1, model, images, settings, labels, diary)
    else:
        timed("stage 1", stage1, model, images, settings, None, diary)

        print("stage 2: a map for each augmentation learns from pairs; compositions are not shown")
        latents = timed("encoding", lambda: [model.encode(v) for v in singles(images)])
        linear = settings.latent_map == "linear" and not settings.joint
        learn = stage2 if linear else partial(stage2_ablations, diary=diary)
        for row in timed("stage 2", learn, model, latents, settings):
            print("  " + ", ".join(f"{key} {format(value, '.2g') if type(value) is float else value}"
                                   for key, value in row.items() if key != "settled"))
            if not row.get("settled", True):
                print(f"  the map of {row['map']} has not settled: its error would still fall")

        with torch.no_grad():
            z = torch.stack(views(latents[0], model.maps))
        del history["encoding"]
        for names in settings.transfer:
            print(f"stage 3: a new decoder learns {' and '.join(names)} from the same latents")
            timed("stage 3, " + "+".join(names), stage3, model, names, z, tensors(names), settings,
                  diary)

    metrics = {"config": config, "seconds": seconds, "history": history,
               "images_per_second": history["stage 1"][-1]["images_per_second"]}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    lavae.save(model, settings.out / "model.pt", config)
    diary.path.unlink(missing_ok=True)
    print(f"done in {sum(seconds.values()):.0f} s: {settings.out / 'model.pt'}")


if __name__ == "__main__":
    main()
