"""Train a LAVAE in three stages.

    stage 1   encoder, decoder   min  BCE(v, D(z)) + KL(q(z|v) || N(0, I)) over all views v   Eq. 5
                                      (and a pinch of stage 2's error, so that there are maps)
    stage 2   L_1 .. L_K         min  mean (E(x) L_i - E(A_i x))^2 + |I - L_i^k|^2            Eq. 6
    stage 3   a new head D_B     min  BCE(view_B(x), D_B(view_L(E(x))))                        Eq. 7

    python train.py                                        # flips, then shear_x and canny: minutes
    python train.py --preset quick                         # a minute or two: for a lecture
    python train.py --augs rotate_cw flip_lr --transfer flip_lr flip_ud    # another pair
    python train.py --baselines                            # and three models to compare it with
    python train.py --heatmap                              # four pairs, each transferred to all

Writes model.pt (for `lavae.load` and `evaluate.py`) and metrics.json to the run folder.
"""

import argparse
import contextlib
import errno
import json
import math
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
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
from augment import AUGMENTATIONS, DATA_DIR, DATASETS, ORDERS, PAIRS, all_views, load_images, views
from lavae import CVAE, LATENT_MAPS, LAVAE, bce, map_error, moments, order_error, pixels, singles

MAP_STEPS = 2000  # of stage 2: the whole data set each, in half a millisecond
MAP_LR = 1e-2
MLP_EPOCHS = 5  # of stage 2 with --latent-map mlp
NOISE, SHUFFLE = 10 ** 6, 2 * 10 ** 6  # added to --seed: else noise and weights were the same

# ---------------------------------------------------------------- the three stages


def stage1(model: LAVAE | CVAE, images: Tensor, labels: Tensor | None = None,
           weights: dict[str, float] = lavae.WEIGHTS, prior: str = "kl", seed: int = 0,
           **schedule) -> list[dict]:
    """Populate the latent space (Eq. 5): encoder and decoder learn on all views alike.

    images: uint8 (2^K, N, 28, 28), the views of all training images, on the model's device; labels
    (N,), for a CVAE that is told the digits. `model.losses` says what is minimised, and takes
    weights and prior: bce(D(z), v) + kl(mu, logvar) + 150 misfit, see `weights_at`. `fit` takes the
    schedule. A model may be shown fewer views, and then more of each. Returns the history: a dict
    an epoch with the means of what `losses` returns.
    """
    noise = torch.Generator(images.device).manual_seed(seed + NOISE)
    shown = images[model.shown]

    def loss_of(index, t):
        x = pixels(shown[:, index])  # (V, B, 28, 28): the views of the images `index`
        return model.losses(x, noise, None if labels is None else labels[index],
                            weights_at(t, weights), prior)

    return fit("stage 1", loss_of, shown.shape[:2], model.stage1_parameters(), seed=seed,
               seen=images.shape[:2].numel(), least=model.least_images(weights),
               moving={"noise": noise}, **schedule)


def weights_at(t: float, weights: dict[str, float]) -> dict[str, float]:
    """The weights of stage 1's terms at the share t of all steps. The prior's grows for the first
    twentieth: at full weight from the start it can hold all latents at zero. The misfit's grows
    with the square of t, to three times its mean: first the latents must decide how many directions
    a map keeps and reverses."""
    growth = {"kl": min(1, 20 * t), "misfit": 3 * t * t}
    return {key: weight * growth.get(key, 1) for key, weight in weights.items()}


def stage2(model: LAVAE, latents: Sequence[Tensor], involution_weight: float = 1.0) -> list[dict]:
    """Learn the maps (Eq. 6); the compositions are never shown.

    latents: E(x), E(A_1 x), .. E(A_K x) of all training images, (N, latent_dim) each. The k of each
    map are `model.orders`, see `lavae.order_error`.

    The loss is quadratic in the latents, so their second moments say all: one pass over the data,
    then full-batch steps on matrices of latent_dim x latent_dim. They start at the least-squares
    solution G^-1 C_i, whose eigenvalues nearly all have the right signs: the involution term has a
    minimum for every choice of signs, and from a random start it holds the maps at a wrong one.
    Further starts: the best orthogonal map and, where an eigenvalue lies between two roots of 1, a
    map for each root, see `starts`; the two best go to `settle`, the better of them stays. Returns
    a dict for each map: mean squared error of the latents by least squares (the floor) and by L;
    `order_error`; whether it has settled.
    """
    history = []
    for aug, map_i, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders):
        G, C_i, squared = moments(latents[0], z_i)

        def loss_of(L):
            return map_error(L, G, C_i, squared) + involution_weight * order_error(L, order)

        # gelsd, because the default, gelsy, reads memory that nobody set in older torch
        least_squares = torch.linalg.lstsq(G, C_i, driver="gelsd").solution
        L = starts(least_squares, C_i, order if involution_weight else None).requires_grad_()
        optimizer = AdaBelief([L])
        for t in range(MAP_STEPS):
            optimizer.param_groups[0]["lr"] = MAP_LR * (1 - t / MAP_STEPS)
            optimizer.zero_grad()
            loss_of(L).sum().backward()
            optimizer.step()
        best = loss_of(L).nan_to_num(math.inf).argsort()[:2]
        ends = [settle(loss_of, one) for one in L[best]]
        L, settled = min(ends, key=lambda end: loss_of(end[0]).nan_to_num(math.inf).item())
        if not L.isfinite().all():
            raise FloatingPointError(f"stage 2: the map of {aug} is no number: try a lower "
                                     "--involution-weight")
        map_i.L.data.copy_(L.float())
        before, after = (map_error(M, G, C_i, squared).item() for M in (least_squares, L))
        history.append({"map": aug, "least_squares": before, "error": after,
                        "penalty": order_error(L, order).item(), "settled": settled})
    return history


def stage3(model: LAVAE, names: Sequence[str], z: Tensor, images: Tensor, **schedule) -> list[dict]:
    """Transfer (Eq. 7): a new head learns to draw the views of other augmentations.

    z: (2^K, N, latent_dim), the originals' latents and their images under the maps; images: uint8
    (2^K, N, 28, 28), the views to draw from them; `fit` takes the schedule. Returns the history: a
    dict an epoch, mean loss.
    """
    head = model.heads["+".join(names)]

    def loss_of(index, _):
        x = pixels(images[:, index]).flatten(0, 1)
        return {"loss": bce(head(z[:, index].flatten(0, 1)), x)}

    return fit("stage 3, " + "+".join(names), loss_of, images.shape[:2], [*head.parameters()],
               **schedule)


def orders_of(augs: Sequence[str], paper_involution: bool = False) -> list[int | None]:
    """The order k that each map should have: A_i^k x = x. The paper has 2 for all of them."""
    return [2 if paper_involution else ORDERS.get(aug) for aug in augs]


def starts(L: Tensor, C_i: Tensor, order: int | None) -> Tensor:
    """What stage 2 starts from, (n, d, d): L; the best orthogonal map, see `lavae.procrustes`; and
    L with its eigenvalues at the nearest roots of 1. Where another root is nearly as near, both
    are there: up to eight of these, for the three most doubtful."""
    if order is None:
        return L[None]
    values, vectors = torch.linalg.eig(L)
    back = torch.linalg.inv(vectors)
    roots = torch.exp(2j * math.pi * torch.arange(order, device=L.device) / order)
    far = (values[:, None] - roots).abs()  # (d, order)
    far[(values.imag == 0)[:, None] & (roots.imag.abs() > 1e-6)] = math.inf  # it has no partner
    far, places = far.sort(dim=1)
    doubt = torch.where(values.imag < 0, math.inf, far[:, 1] - far[:, 0])  # of a pair one counts
    doubtful = [i for i in doubt.argsort()[:3].tolist() if doubt[i] < 0.5]
    found = [L, lavae.procrustes(C_i, order)]
    for second in product((0, 1), repeat=len(doubtful)):
        chosen = roots[places[:, 0]]
        for i, place in zip(doubtful, second):
            chosen[i] = roots[places[i, place]]
            if values[i].imag > 0:
                chosen[(values - values[i].conj()).abs().argmin()] = chosen[i].conj()
        found.append((vectors * chosen @ back).real)
    return torch.stack(found)


def settle(loss_of: Callable[[Tensor], Tensor], L: Tensor, rounds: int = 50) -> tuple[Tensor, bool]:
    """L at the minimum of its loss, and whether it got there.

    16 latents are there already: their gradient is zero. With 64 some directions are thousands of
    times steeper than others; L-BFGS, which learns the curvature, goes on until a round of 100
    steps lowers the loss by less than 1%.
    """
    L = L.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    loss = loss_of(L)
    gradient, = torch.autograd.grad(loss, L)
    if gradient.norm() * L.norm() <= 1e-6 * loss + 1e-12:
        return L.detach(), True
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


def stage2_ablations(model: LAVAE, latents: Sequence[Tensor], involution_weight: float = 1.0,
                     **schedule) -> list[dict]:
    """Stage 2 of the ablations: arguments as there, and `fit`'s schedule; the result, too, but for
    least squares and settling.

    An MLP in the place of L needs the data itself; maps that stage 1 has learnt need nothing more.
    """
    loss = partial(lavae.maps_loss, model.maps, model.orders, involution_weight)
    if not model.joint:
        fit("stage 2", lambda index, _: {"loss": loss(*(z[index] for z in latents))},
            (1, len(latents[0])), [*model.maps.parameters()], epochs=MLP_EPOCHS, **schedule)
    with torch.no_grad():
        z = latents[0]
        return [{"map": aug, "error": (f(z) - z_i).square().mean().item(),
                 "penalty": f.order_error(order, z).item()}
                for aug, f, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders)]


# ---------------------------------------------------------------- the loop of stages 1 and 3


def one_cycle(t: float, warm_up: float = 0.25) -> float:
    """The learning rate at the share t of all steps, as a share of its peak: up, then a cosine."""
    if t < warm_up:
        return t / warm_up
    return (1 + math.cos(math.pi * (t - warm_up) / (1 - warm_up))) / 2


def images_a_step(n_views: int, batch_size: int, least: int = 1) -> int:
    """How many images a batch holds, each under n_views views."""
    return max(least, batch_size // n_views)


def fit(name: str, loss_of: Callable[[Tensor, float], dict[str, Tensor]], shape: tuple[int, int],
        parameters: list[Tensor], epochs: int = 1, batch_size: int = 128, lr: float = 9e-3,
        seed: int = 0, seen: int | None = None, least: int = 1, moving: dict | None = None,
        diary: "Diary | None" = None, film: "Film | None" = None) -> list[dict]:
    """Minimise loss_of(indices, t)["loss"] with AdaBelief; returns each epoch's means.

    t: the share of all steps that are done. shape: views and images. A batch holds all views of
    some images, `least` or more (but an epoch's last), so that no step favours a view: batch_size
    counts the views. An epoch shows `seen` views, or each once. With a diary it goes on after the
    last epoch that the diary has of `name`; `moving` is what loss_of changes, by name: generators,
    and what has a state_dict. A film looks on before each step. Raises FloatingPointError: a loss
    is infinite or not a number.
    """
    n_views, n = shape
    per_batch = images_a_step(n_views, batch_size, least)
    per_epoch = (seen or n_views * n) // n_views
    optimizer, device = AdaBelief(parameters), parameters[0].device
    shuffle = torch.Generator().manual_seed(seed + SHUFFLE)
    moving = {"optimizer": optimizer, "order": shuffle} | (moving or {})
    if film:
        moving["film"] = film
    history = diary.recall(name, parameters, moving) if diary else []
    progress = Progress(name, epochs, per_epoch, n_views, len(history))
    for epoch in range(len(history), epochs):
        rounds = [torch.randperm(n, generator=shuffle) for _ in range(math.ceil(per_epoch / n))]
        batches = torch.cat(rounds)[:per_epoch].to(device).split(per_batch)
        for step, index in enumerate(batches, start=epoch * len(batches)):
            if film:
                film.look()
            t = (step + 0.5) / (epochs * len(batches))
            optimizer.param_groups[0]["lr"] = lr * one_cycle(t)
            terms = loss_of(index, t)
            optimizer.zero_grad()
            terms["loss"].backward()
            optimizer.step()
            progress.add(terms, len(index))
        history.append(progress.end_epoch())
        if diary:
            diary.note(name, parameters, moving, history)
    return history


class Progress:
    """The means of an epoch's losses, and of each hundredth of it; and a line that shows them: on a
    terminal rewritten twice a second, elsewhere written once an epoch. The terms stay on the device
    until the epoch ends."""

    def __init__(self, name: str, epochs: int, per_epoch: int, n_views: int, epoch: int = 0):
        self.name, self.epochs, self.per_epoch, self.n_views = name, epochs, per_epoch, n_views
        self.epoch, self.done, self.sums, self.steps, self.shown = epoch, 0, {}, [], 0.0
        self.first, self.live, self.marks = epoch, sys.stdout.isatty(), []
        self.start = self.epoch_start = time.perf_counter()

    def add(self, terms: dict[str, Tensor], n: int) -> None:
        """Count a step on n images; a loss is read only where it is shown. Raises
        KeyboardInterrupt: Ctrl-C was pressed."""
        for key, value in (terms | {"finite": terms["loss"].isfinite()}).items():
            self.sums[key] = self.sums.get(key, 0) + value.detach() * n
        self.done += n
        self.steps.append(n)
        if len(self.steps) % max(1, self.per_epoch // (100 * self.steps[0])) == 0:
            self.marks.append((sum(self.steps), dict(self.sums)))
        if self.live and time.perf_counter() - self.shown > 0.5:
            self.shown = time.perf_counter()
            self._show(float(terms["loss"]), end="")
        if INTERRUPTED:
            raise KeyboardInterrupt

    def end_epoch(self) -> dict:
        """The epoch's row of the history, and a line. Raises FloatingPointError."""
        good = float(self.sums.pop("finite"))
        if good < self.per_epoch:
            step = self.epoch * len(self.steps) + int(good // self.steps[0])
            raise FloatingPointError(f"{self.name}: the loss is no number any more after step "
                                     f"{step}: try a lower --lr")
        means = {key: float(value) / self.per_epoch for key, value in self.sums.items()}
        self._show(means["loss"], end="\n")
        now = time.perf_counter()
        seconds, self.epoch_start = now - self.epoch_start, now
        places = np.array([place for place, _ in self.marks])
        curve = {"epoch": (self.epoch + places / self.per_epoch).tolist()}
        for key in means:
            sums = torch.stack([sums[key] for _, sums in self.marks]).tolist()
            curve[key] = (np.diff(sums, prepend=0) / np.diff(places, prepend=0)).tolist()
        self.epoch, self.sums, self.steps, self.marks = self.epoch + 1, {}, [], []
        return {"epoch": self.epoch, **means, "seconds": seconds, "curve": curve,
                "images_per_second": round(self.per_epoch * self.n_views / seconds)}

    def _show(self, loss, end):
        rate = self.done / (time.perf_counter() - self.start)
        left = round(((self.epochs - self.first) * self.per_epoch - self.done) / rate)
        print("\r" * self.live + f"  epoch {self.epoch + 1}/{self.epochs}  loss {loss:7.2f}  "
              f"{rate * self.n_views:7,.0f} images/s  {left // 60:3d}:{left % 60:02d} left",
              end=end, flush=True)


# ---------------------------------------------------------------- settings

PRESETS = {  # each setting is also an option of its own
    "quick": dict(filters=16, epochs=2, transfer_epochs=1, batch_size=128, lr=9e-3),
    "laptop": dict(filters=32, epochs=6, transfer_epochs=2, batch_size=128, lr=9e-3),
    "paper": dict(filters=64, epochs=100, transfer_epochs=100, batch_size=64, lr=1e-3)}
MODELS = {  # --model
    "lavae": "LAVAE",
    "cvae": "CVAE, naive: told the {told}, shown all views",
    "cvae-paired": "CVAE, trained like a LAVAE: from the original to each single augmentation",
    "vae": "VAE of originals only, maps between its codes of the views"}
MORE_TARGETS = [["rotate_cw", "rotate_ccw"], ["mini_image", "shear_x"], ["mini_image", "canny"]]


def bounded(kind: type, test: Callable, words: str) -> Callable[[str], float]:
    """An argparse type: what `kind` reads and `test` lets pass; `words` say what is wanted."""
    def parse_number(text):
        with contextlib.suppress(ValueError):
            if test(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {words}, not {text!r}")
    return parse_number


COUNT = bounded(int, lambda v: v >= 1, "a whole number, 1 or more")
RATE = bounded(float, lambda v: 0 < v < math.inf, "a number above 0")
WEIGHT = bounded(float, lambda v: 0 <= v < math.inf, "a number, 0 or more")
SEED = bounded(int, lambda v: 0 <= v < 2 ** 62, "a whole number from 0 to 2^62 - 1")


def option(default, accepts, words: str, forgets=False, models=(*MODELS,), **more) -> object:
    """A field of Settings that is an option of the command line.

    accepts: bool for a flag, the choices, or what reads the text. forgets: no result depends on it.
    models: the --model that it goes with. more: for argparse.
    """
    kind = "action" if accepts is bool else "type" if callable(accepts) else "choices"
    keywords = {"help": words, kind: "store_true" if accepts is bool else accepts, **more}
    return field(default=default, metadata=dict(accepts=accepts, forgets=forgets, models=models,
                                                keywords=keywords))


def flag_of(name: str) -> str:
    """How the command line calls a setting."""
    return "--" + name.replace("_", "-")


def read(name: str, accepts, value, depth: int = 0):
    """A setting as its option would read it: one value, or a list `depth` deep. Or ValueError."""
    if depth:
        if isinstance(value, (str, bytes)) or not isinstance(value, (Sequence, np.ndarray)):
            raise ValueError(f"{name}: expected a list, not {value!r}")
        return [read(name, accepts, one, depth - 1) for one in value]
    kind = accepts if callable(accepts) else str  # one of the choices
    types = {bool: (bool, np.bool_), Path: (str, Path), str: str}
    if kind in types:
        if isinstance(value, types[kind]) and (kind is not str or value in accepts):
            return kind(value)
        choices = f"one of {', '.join(accepts)}" if kind is str else kind.__name__
        raise ValueError(f"{name}: expected {choices}, not {value!r}")
    try:
        return accepts(str(value))
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{name}: {error}") from error


@dataclass
class Settings:
    """What a run can be told: each option of the command line, and `Settings(epochs=1)` in a
    notebook. None is what the preset or the other settings say. Raises ValueError: they clash."""
    model: str = option("lavae", MODELS, "(default lavae)\n" + "\n".join(
        f"{name}: {words.format(told='view')}" for name, words in MODELS.items()))
    baselines: bool = option(False, bool, "train the LAVAE, and the other models in folders inside "
                             "its run folder", models=["lavae"], forgets=True)
    heatmap: bool = option(
        False, bool, "train on each of the paper's four pairs, and transfer each to all four, in "
        "folders\ninside the run folder (default runs/heatmap); pairs that are finished are kept",
        models=["lavae"], forgets=True)
    all_targets: bool = option(False, bool, "with --heatmap: to the three further pairs of the "
                               "authors' code, too", forgets=True)
    augs: list = option(
        None, AUGMENTATIONS, "augmentations to learn, in the order in which they compose\n"
        f"(default flip_lr flip_ud) of {', '.join(AUGMENTATIONS)}", nargs="+", metavar="A")
    transfer: list = option(
        None, AUGMENTATIONS, "train a further decoder head that draws these, one for each of "
        "--augs;\nmay be repeated (default shear_x canny, where --augs are two)", nargs="+",
        action="append", metavar="B", models=["lavae", "vae"])
    no_transfer: bool = option(False, bool, "leave stage 3 out", forgets=True)
    preset: str = option("laptop", PRESETS, "(default laptop)\n" + "\n".join(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()), forgets=True)
    filters: int = option(None, COUNT, "of the first convolution (appendix C)", metavar="N")
    latent_dim: int = option(16, COUNT, "(default 16)", metavar="N")
    epochs: int = option(None, COUNT, "of stage 1, over all views of all images", metavar="N")
    transfer_epochs: int = option(None, COUNT, "of stage 3, the same for each head", metavar="N")
    batch_size: int = option(
        None, COUNT, "images a step, all views counted; stage 1 takes 2 * latent dim * views or "
        "more,\nbecause fewer would have no misfit", metavar="N")
    lr: float = option(None, RATE, "the learning rate's peak in stage 1; in stage 3 it is half of "
                       "this", metavar="X")
    kl_weight: float = option(1.0, WEIGHT, "in stage 1 (default 1)", metavar="X")
    recon_weight: float = option(1.0, WEIGHT, "in stage 1 (default 1)", metavar="X")
    map_weight: float = option(
        150.0, WEIGHT, "of the maps' misfit in stage 1 (default 150), on average: it grows from 0 "
        "to three\ntimes this; 0 leaves Eq. 5 as the paper has it", metavar="X")
    involution_weight: float = option(
        1.0, WEIGHT, "of |I - L^k|^2 in stage 2 (default 1)", metavar="X")
    paper_involution: bool = option(
        False, bool, "k = 2 for all, as in the paper, and stage 1's maps by least squares; "
        "without:\n2 for flips, 4 for quarter turns; and a hundredth of |I - L L^T|^2 for "
        "augmentations\nthat never come back")
    condition: str = option("view", ["view", "digit", "both"],
                            "what --model cvae is told (default view)", models=["cvae"])
    latent_map: str = option("linear", LATENT_MAPS, "an MLP in the place of each L: an ablation "
                             "(default linear)", models=["lavae", "vae"])
    joint: str = option(
        None, ["identity", "signs"], "an ablation: stages 1 and 2 in one, Eq. 5 + map weight * Eq. "
        "6; the maps start\nat I, or stay at diagonals of +-1", models=["lavae"])
    prior_loss: str = option("kl", ["kl", "mmd"], "in stage 1 (default kl)")
    dataset: str = option("mnist", DATASETS, "mnist lies in the repository, the others are "
                          "downloaded (default mnist)")
    data_dir: Path = option(DATA_DIR, Path, "(default data/)", metavar="DIR", forgets=True)
    seed: int = option(0, SEED, "(default 0)", metavar="N")
    device: str = option("auto", ["auto", "cpu", "cuda", "mps"], "(default auto)")
    record: bool = option(False, bool, "keep frames of stage 1 for evaluate.py's film",
                          models=["lavae"], forgets=True)
    resume: bool = option(False, bool, "go on where an interrupted run stopped", forgets=True)
    overwrite: bool = option(False, bool, "start over in a run folder that is in use", forgets=True)
    out: Path = option(None, Path, "the run folder (default runs/ and the names of --augs, joined "
                       "by +;\na baseline's name before them)", metavar="DIR", forgets=True)

    def __post_init__(self):
        for f in fields(self):
            value, name, keywords = getattr(self, f.name), flag_of(f.name), f.metadata["keywords"]
            if value is None and f.default is None:
                continue
            depth = ("nargs" in keywords) + (keywords.get("action") == "append")
            value = read(name, f.metadata["accepts"], value, depth)
            setattr(self, f.name, value)
            if value and value != f.default and self.model not in f.metadata["models"]:
                raise ValueError(f"{name} does not go with --model {self.model}, only with "
                                 f"{' and '.join(f.metadata['models'])}: leave one out")
        self._refuse_clashes()
        for key, value in PRESETS[self.preset].items():
            setattr(self, key, value if getattr(self, key) is None else getattr(self, key))
        self.augs = self.augs or [*PAIRS[0]]
        if self.transfer is None:
            default = self.model == "lavae" and len(self.augs) == 2 and not self.no_transfer
            self.transfer = [["shear_x", "canny"]] if default else []
        for names in self.transfer:
            if len(names) != len(self.augs):
                raise ValueError(f"--transfer {' '.join(names)}: name {len(self.augs)} "
                                 f"augmentations, one for each of --augs {' '.join(self.augs)}")
        for names in (self.augs, self.transfer, *self.transfer):
            if any(names.count(name) > 1 for name in names):
                raise ValueError("--augs and --transfer: the same is named twice, name it once")
        name = f"{self.model}-{'+'.join(self.augs)}".removeprefix("lavae-")
        self.out = self.out or Path("runs", "heatmap" if self.heatmap else name)

    def described(self) -> str:
        """A line that says what is trained."""
        told = "view and the digit" if self.condition == "both" else self.condition
        return (f"{MODELS[self.model].format(told=told)}: {' and '.join(self.augs)}, on "
                f"{self.dataset}; {self.preset} preset, {self.device}, seed {self.seed}")

    def _refuse_clashes(self):
        if self.all_targets and not self.heatmap:
            raise ValueError("--all-targets goes with --heatmap only: add it, or leave it out")
        if self.heatmap and (self.augs or self.transfer or self.no_transfer or self.baselines):
            raise ValueError(
                "--heatmap names the augmentations and transfers itself, and trains no "
                "baselines: leave --augs, --transfer, --no-transfer and --baselines out")
        for a, b in (("resume", "overwrite"), ("transfer", "no_transfer")):
            if getattr(self, a) and getattr(self, b):
                raise ValueError(f"--{a} and {flag_of(b)} exclude each other: leave one out")
        if self.joint == "signs" and self.latent_map != "linear":
            raise ValueError("--joint signs is a start for linear maps: leave --latent-map out")
        if self.joint and not self.map_weight:
            raise ValueError("--joint needs a --map-weight above 0")


def parser_of() -> argparse.ArgumentParser:
    """The command line; its help is the manual."""
    parser = argparse.ArgumentParser(  # without a usage line, an error is one line
        description=__doc__, usage=argparse.SUPPRESS, formatter_class=argparse.RawTextHelpFormatter)
    for f in fields(Settings):
        parser.add_argument(flag_of(f.name), default=argparse.SUPPRESS, **f.metadata["keywords"])
    return parser


def runs_of(settings: Settings) -> list[Settings]:
    """The settings of all runs that these ask for.

    --baselines: the LAVAE, and the others in folders inside its own; --heatmap: a folder a pair.
    """
    if settings.heatmap:
        targets = PAIRS + MORE_TARGETS * settings.all_targets
        return [replace(settings, heatmap=False, all_targets=False, augs=pair, transfer=targets,
                        out=settings.out / "+".join(pair)) for pair in PAIRS]
    plain = dict(baselines=False, latent_map="linear", joint=None, transfer=[], record=False)
    others = [name for name in MODELS if name != "lavae"] * settings.baselines
    return [replace(settings), *(replace(settings, model=name, out=settings.out / name, **plain)
                                 for name in others)]


def config_of(settings: Settings) -> dict:
    """What decides the result, as plain data."""
    return {f.name: getattr(settings, f.name) for f in fields(settings)
            if not f.metadata["forgets"]}


# ---------------------------------------------------------------- from settings to a model


def build(settings: Settings) -> LAVAE | CVAE:
    """The untrained model."""
    size = dict(latent_dim=settings.latent_dim, filters=settings.filters)
    if settings.model.startswith("cvae"):
        told = settings.condition if settings.model == "cvae" else "paired"
        return CVAE(settings.augs, told, **size)
    model = LAVAE(settings.augs, settings.transfer, latent_map=settings.latent_map,
                  originals_only=settings.model == "vae", **size)
    model.orders = orders_of(settings.augs, settings.paper_involution)
    if settings.paper_involution:
        model.misfit = lambda z: lavae.free_misfit(*singles(z))
    if settings.joint:
        lavae.learn_jointly(model, settings.joint, settings.involution_weight)
    return model


def weights_of(settings: Settings) -> dict[str, float]:
    """Of the terms of stage 1's loss."""
    return {"bce": settings.recon_weight, "kl": settings.kl_weight, "misfit": settings.map_weight}


def tensors(images: np.ndarray, augs: Sequence[str], device: torch.device) -> Tensor:
    """The views of uint8 images (N, 28, 28) on the device, (2^K, N, 28, 28)."""
    return torch.from_numpy(np.stack(all_views(images, augs))).to(device)


def train_one(settings: Settings, x_train: np.ndarray, y_train: np.ndarray) -> None:
    """The three stages, one after the other, on settings.device; writes model.pt and metrics.json.

    x_train: uint8 (N, 28, 28); y_train: the digits, uint8 (N,).
    """
    torch.manual_seed(settings.seed)
    device, history, seconds = torch.device(settings.device), {}, {}
    model = lavae.tune(build(settings).to(device))
    diary = Diary(settings.out / "state.pt")
    schedule = dict(batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed, diary=diary)

    def timed(name, f, *arguments, **more):
        start = time.perf_counter()
        history[name] = rows = f(*arguments, **more)
        if INTERRUPTED:
            raise KeyboardInterrupt
        noted = isinstance(rows[-1], dict) and "seconds" in rows[-1]  # before --resume, too
        seconds[name] = round(sum(row["seconds"] for row in rows) if noted
                              else time.perf_counter() - start, 2)
        return rows

    images = tensors(x_train, settings.augs, device)
    print(f"{settings.described()}\nstage 1: encoder and decoder learn to draw {len(model.shown)} "
          f"of {len(images)} views of {len(x_train):,} images")
    labels = torch.from_numpy(y_train).long().to(device) if isinstance(model, CVAE) else None
    timed("stage 1", stage1, model, images, labels, weights_of(settings), settings.prior_loss,
          film=Film(settings, model, images) if settings.record else None,
          epochs=settings.epochs, **schedule)
    if isinstance(model, LAVAE):
        print("stage 2: a map for each augmentation learns from pairs; compositions are not shown")
        latents = timed("encoding", lambda: [model.encode(v) for v in singles(images)])
        del history["encoding"]
        linear = settings.latent_map == "linear" and not settings.joint
        learn = stage2 if linear else partial(stage2_ablations, **schedule)
        for row in timed("stage 2", learn, model, latents, settings.involution_weight):
            print(f"  map {row['map']}, " + ", ".join(
                f"{key} {value:.2g}" for key, value in row.items() if type(value) is float)
                + ("" if row.get("settled", True) else ": not settled, it would still fall"))
        with torch.no_grad():
            z = torch.stack(views(latents[0], model.maps))
        for names in settings.transfer:
            print(f"stage 3: a new decoder learns {' and '.join(names)} from the same latents")
            timed("stage 3, " + "+".join(names), stage3, model, names, z,
                  tensors(x_train, names, device), epochs=settings.transfer_epochs,
                  **schedule | dict(lr=settings.lr / 2))
    finish(model, settings, {"seconds": seconds, "history": history})
    diary.close()


def finish(model: LAVAE | CVAE, settings: Settings, metrics: dict) -> None:
    """Write metrics.json and model.pt. Raises OSError."""
    config, history = config_of(settings), metrics["history"]
    metrics = {"config": config, "made": made_with(settings.device), **metrics,
               "images_per_second": history["stage 1"][-1]["images_per_second"]}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (settings.out / "evaluation.json").unlink(missing_ok=True)  # of the model that was here
    lavae.save(model, settings.out / "model.pt", config)
    print(f"done in {sum(metrics['seconds'].values()):.0f} s: {settings.out / 'model.pt'}")


def made_with(device: str) -> dict:
    """When, and by what: the day, the versions and the hardware, for metrics.json."""
    hardware = platform.processor() or platform.machine()
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    elif (cpus := Path("/proc/cpuinfo")).is_file():
        names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        hardware = names[0].split(": ")[-1] if names else hardware
    return {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "device": device,
            "hardware": hardware, "threads": torch.get_num_threads()}


def run(settings: Settings) -> LAVAE | CVAE:
    """Train all that the settings ask for, and return the model (of several runs the first's).

    Raises OSError, ValueError: something is missing, in the way, or does not fit;
    FloatingPointError: a loss is no number; KeyboardInterrupt: its text says how to go on.
    """
    runs = runs_of(settings)
    device = lavae.pick_device(settings.device)
    x_train, y_train, _, _ = load_images(settings.dataset, settings.data_dir)
    for one in runs:
        check_memory(one, len(x_train), device)
        one.device = lavae.trusted(settings.device, partial(first_step, one, x_train, y_train)).type
    with contextlib.ExitStack() as held:
        for one in runs:
            held.enter_context(locked(one.out))
        unfinished = [one for one in runs if has_work(one, settings.resume or len(runs) > 1)]
        for one in unfinished:
            begin(one)
        try:
            for one in unfinished:
                train_one(one, x_train, y_train)
        except KeyboardInterrupt as stop:
            instead = " in the place of --overwrite" * settings.overwrite
            raise KeyboardInterrupt(f"the same command with --resume{instead} goes on") from stop
    return lavae.load(runs[0].out, runs[0].device)


def main(argv: Sequence[str] | None = None) -> None:
    """Train as the command line says."""
    parser = parser_of()
    usual = signal.signal(signal.SIGINT, interrupt)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        run(settings)
    except (OSError, ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except (MemoryError, RuntimeError) as error:
        if not lavae.is_out_of_memory(error):
            raise
        what, size, options = memory_of(runs_of(settings)[0], 60_000)[0]
        parser.error(f"the memory is full, and the {what} take most of what this run needs, "
                     f"{size / 1e9:.2g} GB: close other programs and go on with --resume, or lower "
                     f"{options}")
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\nstopped{': ' if stop.args else ' before anything was begun'}{stop}\n")
    finally:
        signal.signal(signal.SIGINT, usual)
        INTERRUPTED.clear()
    print(f"now: python evaluate.py {'--heatmap ' * settings.heatmap}{settings.out}")


# ---------------------------------------------------------------- what keeps a run safe

INTERRUPTED = []  # filled by the first Ctrl-C


def interrupt(*_) -> None:
    """The first Ctrl-C ends training after the batch (or stage 2), the second at once."""
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
    except OSError as why:
        raise OSError(f"cannot write to {folder} ({why.strerror}): choose another --out") from why
    with file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise OSError("its holder has just removed it")
        except OSError as error:
            # a file system that has no locks, as some network homes, is used without
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise ValueError(f"another run is at work in {folder}: wait for it, or choose "
                                 "another --out") from error
        try:
            yield
        finally:
            if not fcntl:  # Windows removes no open file; elsewhere nobody shall have it meanwhile
                file.close()
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def has_work(settings: Settings, keep: bool) -> bool:
    """Whether there is work to do: not where it is finished and to be kept, as by --resume, and by
    --baselines and --heatmap, which make several runs. Changes nothing. Raises OSError, ValueError:
    something there must not be lost.
    """
    out = settings.out
    finished, begun = out / "model.pt", out / "state.pt"
    if settings.overwrite:
        return True
    if begun.is_file():
        pages = Diary(begun).pages
        if settings.resume:
            was = {"record": settings.record}  # an older file does not say whether it had a film
            check_same(begun, was | pages.get("config", {}), asked_of(settings))
        elif len(pages) > 1 or finished.is_file():
            raise FileExistsError(f"{out} holds an interrupted run: go on with --resume, start "
                                  "over with --overwrite, or choose another --out")
    elif finished.is_file():
        if not keep:
            raise FileExistsError(f"{out} holds a finished run: start over with --overwrite, or "
                                  "choose another --out")
        check_same(finished, lavae.load(finished).settings, config_of(settings))
        print(f"{out} is finished already, with the same settings: kept")
        return False
    return True


def asked_of(settings: Settings) -> dict:
    """What --resume must ask again: all that decides the result, and the film."""
    return config_of(settings) | {"record": settings.record}


def begin(settings: Settings) -> None:
    """Write into state.pt what was asked, first of all: from here on --resume knows its own run,
    whatever model.pt is still there. Raises OSError."""
    state = settings.out / "state.pt"
    if not (settings.resume and state.is_file()):
        lavae.write({"config": asked_of(settings)}, state)
        (settings.out / "recording.pt").unlink(missing_ok=True)


def check_same(path: Path, was: dict, now: dict) -> None:
    """Raises ValueError: the settings differ, or there were none."""
    for key, value in now.items():
        if key not in was or was[key] != value:
            raise ValueError(f"{path} was made with {key} {was.get(key)}, not {value}: give the "
                             "same options, or --overwrite to start over")


class Diary:
    """state.pt: what training needs to go on after its last epoch; rewritten after every one.

    Each call of `fit` has a page there, by its name. All else is quick and is done again.
    """

    def __init__(self, path: Path):
        self.path = path
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
            for p, value in zip(parameters, page["parameters"], strict=True):
                p.data.copy_(value)
            for key, thing in moving.items():
                (getattr(thing, "set_state", None) or thing.load_state_dict)(page[key])
            history = [dict(row) for row in page["history"]]
        except (LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: start over with --overwrite") from error
        print(f"  {len(history)} epochs are there already")
        return history

    def close(self) -> None:
        """The run is finished: nothing is needed any more, nor what a kill left half-written."""
        for path in (self.path, Path(f"{self.path}.part")):
            path.unlink(missing_ok=True)

    def note(self, name: str, parameters: list[Tensor], moving: dict, history: list[dict]) -> None:
        """Write everything down. Raises OSError."""
        page = {"parameters": [p.detach() for p in parameters], "history": history}
        for key, thing in moving.items():
            page[key] = (getattr(thing, "get_state", None) or thing.state_dict)()
        self.pages[name] = page
        lavae.write(self.pages, self.path)


class Film:
    """recording.pt: some frames of stage 1 as it learns, for `evaluate.py`'s film.

    A frame is the latents of 150 images under all views, and what ten of them decode to.
    """

    def __init__(self, settings: Settings, model: LAVAE, images: Tensor):
        steps = images.shape[1] * settings.epochs // step_of(model, settings)
        self.path, self.every = settings.out / "recording.pt", max(1, steps // 32)
        self.model, self.images = model, images[:, :150]
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
        self.taken = state


def memory_of(settings: Settings, n: int) -> list[tuple[str, float, str]]:
    """What a run on n images needs, the most first: (what, bytes, the options that lower it)."""
    views = n * 2 ** len(settings.augs)
    try:
        with torch.device("meta"):  # shapes only
            model = build(settings)
        weights = sum(p.numel() for p in model.parameters())
    except (RuntimeError, TypeError, OverflowError):  # too many even to be counted
        return [("weights", math.inf, "--filters or --latent-dim")]
    # a view as it is and in one tensor with all others, once more for a transfer; and its latents
    view = 2 * 28 * 28 * (1 + bool(settings.transfer)) + 2 * 4 * settings.latent_dim
    step = len(model.shown) * min(n, step_of(model, settings))  # views, too
    layers = 2 * (28 * 28 + settings.filters * (14 * 14 + 2 * 7 * 7) + settings.latent_dim)
    pairs = step ** 2 if settings.prior_loss == "mmd" else 0  # mmd compares each view with each
    return sorted([
        ("views of the images", views * view, "the number of --augs"),
        # each with a gradient, m, s and scratch; and three in state.pt before it is written
        ("weights", 4 * 8 * weights, "--filters or --latent-dim"),
        # what the layers give, and its gradient
        ("images of a step", 2 * 4 * step * layers + 8 * 4 * pairs * settings.latent_dim,
         "--batch-size or --filters")], key=lambda part: -part[1])


def step_of(model: LAVAE | CVAE, settings: Settings) -> int:
    """How many images a step of stage 1 shows."""
    return images_a_step(len(model.shown), settings.batch_size,
                         model.least_images(weights_of(settings)))


def check_memory(settings: Settings, n: int, device: torch.device) -> None:
    """Raises ValueError: a run on n images needs more than the device has left, or the machine."""
    parts = memory_of(settings, n)
    needed, (what, size, options) = sum(size for _, size, _ in parts), parts[0]
    for place in {device, torch.device("cpu")}:
        if needed > (free := lavae.free_memory(place)):
            raise ValueError(
                f"this would take {needed / 1e9:.3g} GB, and {place.type} has {free / 1e9:.3g} GB "
                f"left: the {what} take {size / 1e9:.3g} GB, lower {options}")


def first_step(settings: Settings, x_train: np.ndarray, y_train: np.ndarray,
               device: torch.device) -> list[Tensor]:
    """The terms of the loss and the gradients of a run's first step, and of each head's, as the
    device computes them.

    The same weights, images and noise for every device. Arrays as `run` takes them.
    """
    torch.manual_seed(settings.seed)
    model = build(settings).to(device)
    n = step_of(model, settings)
    x = pixels(tensors(x_train[:n], settings.augs, device)[model.shown])
    labels = torch.from_numpy(y_train[:n]).long().to(device) if isinstance(model, CVAE) else None
    noise = torch.Generator().manual_seed(settings.seed)
    terms = model.losses(x, noise, labels, weights_at(0.5, weights_of(settings)),
                         settings.prior_loss)
    z = torch.randn(n, settings.latent_dim, generator=noise).to(device)
    drawn = [bce(model.heads["+".join(names)](z), x[0]) for names in model.transfers]
    sum(drawn, terms["loss"]).backward()
    return [*terms.values(), *drawn, *(p.grad for p in model.parameters() if p.grad is not None)]


if __name__ == "__main__":
    main()
