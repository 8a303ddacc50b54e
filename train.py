"""Train a LAVAE in three stages.

    stage 1   encoder, decoder   min  BCE(v, D(z)) + KL(q(z|v) || N(0, I)) over all views v   Eq. 5
                                      + the equivariance loss                                 ours
    stage 2   L_1 .. L_K         min  mean (E(x) L_i - E(A_i x))^2 + |I - L_i^k|^2            Eq. 6
    stage 3   a new decoder D_B  min  BCE(B_v x, D_B(z L_v)) over all views v                 Eq. 7
              that draws other augmentations B from the same latents z = E(x)

    python train.py                                        # flips, then shear_x and canny: minutes
    python train.py --preset quick                         # a minute or two: for a lecture
    python train.py --augs rotate_cw flip_lr --transfer flip_lr flip_ud    # another pair
    python train.py --baselines                            # and three models to compare it with
    python train.py --heatmap                              # four pairs, each transferred to all

Writes model.pt (for `lavae.load` and `evaluate.py`) and metrics.json to the run folder. Read this
file after lavae.py. In order: the three stages, their loop, settings and runs, the command line,
and how a run is kept safe.
"""

import argparse
import json
import math
import platform
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lavae
from adabelief import AdaBelief
from augment import (AUGMENTATIONS, DATA_DIR, DATASETS, ORDERS, PAIRS, all_views, load_images,
                     one_line_errors, pinned, tolerant_output, views)
from lavae import (CVAE, LATENT_MAPS, LAVAE, bce, map_error, moments, order_error,
                   original_and_singles, pixels)

MAP_STEPS = 2000  # of stage 2; each is on all data, and takes half a millisecond
MAP_LR = 1e-2
MLP_EPOCHS = 5  # of stage 2 with --latent-map mlp
NOISE, SHUFFLE = 10 ** 6, 2 * 10 ** 6  # added to --seed: else noise would repeat the weights

# ---------------------------------------------------------------- the three stages


def stage1(model: LAVAE | CVAE, images: Tensor, labels: Tensor | None = None,
           weights: dict[str, float] = lavae.WEIGHTS, prior_loss: str = "kl",
           batches_of: str = "images", batch_size: int = 128, seed: int = 0,
           recorder: "Recorder | None" = None, **schedule) -> list[dict]:
    """Stage 1 (Eq. 5): encoder and decoder learn to draw all views, each from itself.

    Args:
        images: uint8 (2^K, N, 28, 28), the views of all training images, on the model's device.
        labels: the digits, (N,), for a CVAE that is told them.
        weights: of the losses, see `weights_at`.
        prior_loss: "kl" or "mmd".
        batches_of: a batch has about batch_size views. "images": all views of some images, with the
            equivariance loss of 2 * latent_dim images or more; "views": any views of any images.
        recorder: takes pictures during training.
        schedule: the further arguments of `fit`.

    Returns the history: a dict for each epoch, with the mean of each loss. "bce" and "kl" are in
    nats an image; with "mmd", "kl" is that loss. "equivariance" is a mean square of latents. An
    epoch always has 2^K N images, so a model with fewer `stage1_views` sees each more often.
    """
    print(f"stage 1: encoder and decoder learn to draw {len(model.stage1_views)} of {len(images)} "
          f"views of {images.shape[1]:,} images")
    shown = torch.tensor(model.stage1_views, device=images.device)
    noise = torch.Generator(images.device).manual_seed(seed + NOISE)
    equivariance = isinstance(model, LAVAE) and weights["equivariance"] > 0 and len(shown) > 1

    def losses_of(index, t):
        if recorder:
            recorder.record(t, model, images)
        if batches_of == "views":  # index counts all images of the first view, then the second, ..
            x = images[shown[index // images.shape[1]], index % images.shape[1]][None]
        else:
            x = images[shown[:, None], index]
        x = pixels(x, model.encoder.dtype)  # (V, B, 28, 28)
        logits, mu, logvar = model(x, noise, None if labels is None else labels[index])
        prior = lavae.kl(mu, logvar) if prior_loss == "kl" else lavae.mmd(mu, logvar, noise)
        losses = {"bce": bce(logits, x.flatten(0, 1)), "kl": prior}
        if equivariance:
            losses["equivariance"] = model.equivariance_loss(mu.unflatten(0, x.shape[:2]))
        weight = weights if schedule.get("lr_schedule") == "constant" else weights_at(t, weights)
        return {"loss": sum(weight.get(name, 1) * loss for name, loss in losses.items()), **losses}

    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    if isinstance(model, LAVAE) and model.joint == "identity":
        parameters += model.maps.parameters()
    together = 1 if batches_of == "views" else len(shown)  # views of an image in a batch
    # A matrix fits as many images as there are latents, whatever they are: take twice as many.
    batches = Batches(together, len(shown) * images.shape[1] // together, batch_size, seed,
                      min_images=2 * model.latent_dim if equivariance else 1,
                      views_per_epoch=images.shape[:2].numel())
    return fit("stage 1", losses_of, parameters, batches, **schedule,
               state={"noise": noise} | ({"recorder": recorder} if recorder else {}))


def weights_at(t: float, weights: dict[str, float]) -> dict[str, float]:
    """The weights of the losses of stage 1 when the fraction t of all steps is done.

    The weight of the prior loss grows in the first twentieth of the steps. (At full weight from the
    start, all latents may collapse to zero.) The weight of the equivariance loss grows with t^2, to
    three times its mean: first the latents must decide how many directions a map keeps.
    """
    growth = {"kl": min(1, 20 * t), "equivariance": 3 * t * t}
    return {name: weight * growth.get(name, 1) for name, weight in weights.items()}


def stage2(model: LAVAE, latents: Sequence[Tensor], involution_weight: float = 1.0) -> list[dict]:
    """Stage 2 (Eq. 6): the maps learn. Compositions are never shown.

    latents: E(x), E(A_1 x), .. E(A_K x) of all training images, (N, latent_dim) each. The k of each
    map is in `model.orders`, see `lavae.order_error`.

    The loss is quadratic in the latents. So their second moments are all that it needs: one pass
    over the data, and then each step only needs matrices of latent_dim x latent_dim. A map starts
    at the least-squares solution G^-1 C_i, whose eigenvalues have the right signs. (The involution
    term has a minimum for every choice of signs, and keeps a map at wrong ones.)

    Returns a dict for each map: the mean squared error of the latents, "least_squares" with the
    start and "error" with L; "order_error"; and "remaining", a bound for how much the loss could
    still fall, as a fraction: gradient . H^-1 gradient / 2, with the Hessian H = 2 G / d of the
    first term. Raises FloatingPointError: a map is not finite.
    """
    print("stage 2: a map for each augmentation learns from pairs; compositions are not shown")
    history = []
    for aug, map_i, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders):
        G, C_i, squared = moments(latents[0], z_i)

        def loss_of(L):
            return map_error(L, G, C_i, squared) + involution_weight * order_error(L, order)

        # In older torch the default driver, gelsy, reads uninitialised memory.
        least_squares = torch.linalg.lstsq(G, C_i, driver="gelsd").solution
        L = least_squares.clone().requires_grad_()
        optimizer = AdaBelief([L])
        for step in range(MAP_STEPS):
            optimizer.param_groups[0]["lr"] = MAP_LR * (1 - step / MAP_STEPS)
            optimizer.zero_grad()
            loss_of(L).backward()
            optimizer.step()
        if not L.isfinite().all():
            raise FloatingPointError(f"stage 2: the map of {aug} is not finite: try a lower "
                                     "--involution-weight")
        map_i.L.data.copy_(L.detach())
        gradient, = torch.autograd.grad(loss := loss_of(L), L)
        newton_step = torch.linalg.lstsq(2 / len(G) * G, gradient, driver="gelsd").solution
        history.append({"map": aug,
                        "least_squares": map_error(least_squares, G, C_i, squared).item(),
                        "error": map_error(L, G, C_i, squared).item(),
                        "order_error": order_error(L, order).item(),
                        "remaining": ((newton_step * gradient).sum() / loss / 2).item()})
        print("  map {map}: least squares {least_squares:.2g}, error {error:.2g}, order error "
              "{order_error:.2g}, could fall by {remaining:.1%}".format_map(history[-1]))
    return history


def stage3(model: LAVAE, names: Sequence[str], z: Tensor, images: Tensor, batch_size: int = 128,
           seed: int = 0, **schedule) -> list[dict]:
    """Stage 3, transfer (Eq. 7): a head learns to draw the views of other augmentations.

    names: those augmentations. z: the latents of the originals under all maps, z, z L_1, z L_2, ..,
    (2^K, N, latent_dim). images: the views to draw from them, uint8 (2^K, N, 28, 28). schedule: the
    further arguments of `fit`. Returns the history: a dict for each epoch, with the mean loss.
    """
    print(f"stage 3: a new decoder learns {' and '.join(names)} from the same latents")
    head = model.heads["+".join(names)]

    def losses_of(index, t):
        x = pixels(images[:, index], z.dtype).flatten(0, 1)
        return {"loss": bce(head(z[:, index].flatten(0, 1)), x)}

    batches = Batches(len(images), images.shape[1], batch_size, seed)
    return fit("stage 3, " + "+".join(names), losses_of, [*head.parameters()], batches, **schedule)


def stage2_ablations(model: LAVAE, latents: Sequence[Tensor], involution_weight: float = 1.0,
                     batch_size: int = 128, seed: int = 0, **schedule) -> list[dict]:
    """Stage 2 of the ablations, with the arguments of `stage2` and further ones for `fit`.

    An MLP in the place of L needs the data itself, in batches. Maps that stage 1 has learnt are
    only measured. Returns a dict for each map with "error" and "order_error", as `stage2` does.
    """
    print(f"stage 2: maps of the kind {type(model.maps[0]).__name__}")
    loss = partial(lavae.maps_loss, model.maps, model.orders, involution_weight)
    if not model.joint:
        fit("stage 2", lambda index, t: {"loss": loss(*(z[index] for z in latents))},
            [*model.maps.parameters()], Batches(1, len(latents[0]), batch_size, seed),
            epochs=MLP_EPOCHS, **schedule)
    with torch.no_grad():
        z = latents[0]
        return [{"map": aug, "error": (f(z) - z_i).square().mean().item(),
                 "order_error": f.order_error(order, z).item()}
                for aug, f, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders)]


# ---------------------------------------------------------------- the loop


def fit(stage: str, losses_of: Callable[[Tensor, float], dict[str, Tensor]],
        parameters: list[Tensor], batches: "Batches", epochs: int = 1, lr: float = 9e-3,
        lr_schedule: str = "one-cycle", checkpoint: "Checkpoint | None" = None,
        state: dict | None = None) -> list[dict]:
    """The training loop: minimise losses_of(index, t)["loss"] with AdaBelief.

    index: the image numbers of a batch. t: the fraction of all steps that is done. checkpoint: go
    on after the last epoch that it holds for this stage, and save each epoch to it. state: what
    losses_of changes, by name: generators, and objects with a state_dict.

    Returns the history, a dict for each epoch. Raises FloatingPointError: a loss is not finite;
    KeyboardInterrupt.
    """
    optimizer, device = AdaBelief(parameters), parameters[0].device
    state = {"optimizer": optimizer, "shuffle": batches.shuffle, **(state or {})}
    history = checkpoint.restore(stage, parameters, state) if checkpoint else []
    progress = Progress(stage, epochs, batches, done=len(history))
    for epoch in range(len(history), epochs):
        for step, index in enumerate(batches, start=epoch * len(batches)):
            t = (step + 0.5) / (epochs * len(batches))
            optimizer.param_groups[0]["lr"] = lr if lr_schedule == "constant" else lr * one_cycle(t)
            losses = losses_of(index.to(device), t)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            progress.add(losses, len(index))
        history.append(progress.end_epoch([*losses]))
        if checkpoint:
            checkpoint.save(stage, parameters, state, history)
    return history


def one_cycle(t: float, warm_up: float = 0.25) -> float:
    """The learning rate as a fraction of its peak, when the fraction t of all steps is done. It
    rises linearly, then falls like a cosine."""
    if t < warm_up:
        return t / warm_up
    return (1 + math.cos(math.pi * (t - warm_up) / (1 - warm_up))) / 2


class Batches:
    """Image numbers in batches, shuffled in each epoch, like torch's DataLoader.

    A batch has all n_views views of its images. So it has batch_size // n_views images, but at
    least `min_images`. An epoch has `views_per_epoch` views, by default all views of all images.
    """

    def __init__(self, n_views: int, n_images: int, batch_size: int = 128, seed: int = 0,
                 min_images: int = 1, views_per_epoch: int | None = None):
        self.n_views, self.n_images = n_views, n_images
        self.images_per_batch = max(min_images, batch_size // n_views)
        self.images_per_epoch = (views_per_epoch or n_views * n_images) // n_views
        self.shuffle = torch.Generator().manual_seed(seed + SHUFFLE)

    def __len__(self):
        return math.ceil(self.images_per_epoch / self.images_per_batch)

    def __iter__(self):
        rounds = [torch.randperm(self.n_images, generator=self.shuffle)
                  for _ in range(math.ceil(self.images_per_epoch / self.n_images))]
        return iter(torch.cat(rounds)[:self.images_per_epoch].split(self.images_per_batch))


class Progress:
    """Collects the losses of an epoch, and prints a line about it.

    On a terminal the line is renewed twice a second, elsewhere it is printed once an epoch. The
    losses stay on the device until the epoch ends: a step that fetched them would wait for it.
    """

    def __init__(self, stage: str, epochs: int, batches: Batches, done: int = 0):
        self.stage, self.epochs, self.n_views = stage, epochs, batches.n_views
        self.images = batches.images_per_epoch
        self.every = max(1, self.images // (100 * batches.images_per_batch))  # steps
        self.epoch, self.resumed, self.terminal = done, done, getattr(sys.stdout, "isatty", bool)()
        self.start = self.epoch_start = self.printed = time.perf_counter()
        self.losses, self.sizes = [], []  # of the epoch's steps

    def add(self, losses: dict[str, Tensor], n: int) -> None:
        """Add the losses of a step on n images. Raises KeyboardInterrupt: Ctrl-C was pressed."""
        self.losses.append(torch.stack([*losses.values()]).detach())
        self.sizes.append(n)
        if self.terminal and time.perf_counter() - self.printed > 0.5:
            self.printed = time.perf_counter()
            self._print(float(losses["loss"]), end="")
        if INTERRUPTED:
            raise KeyboardInterrupt

    def end_epoch(self, names: Sequence[str]) -> dict:
        """Print the line of the epoch, and return its dict for the history.

        names: of the losses, "loss" first. "curve" has the means over each hundredth of the epoch.
        Raises FloatingPointError: a loss is not finite.
        """
        losses, sizes = torch.stack(self.losses).cpu().double().numpy(), np.array(self.sizes)
        finite = np.isfinite(losses[:, 0])
        if not finite.all():
            step = self.epoch * len(sizes) + finite.argmin()
            raise FloatingPointError(f"{self.stage}: the loss is not finite any more after step "
                                     f"{step}: try a lower --lr")
        means = np.average(losses, axis=0, weights=sizes).tolist()
        self._print(means[0], end="\n")
        now = time.perf_counter()
        seconds, self.epoch_start = now - self.epoch_start, now
        ends = np.cumsum(sizes)[self.every - 1::self.every]  # of the hundredths
        parts = losses[:len(ends) * self.every].reshape(len(ends), self.every, -1).mean(1)
        curve = {"epoch": (self.epoch + ends / self.images).tolist(),
                 **dict(zip(names, parts.T.tolist()))}
        self.epoch, self.losses, self.sizes = self.epoch + 1, [], []
        return {"epoch": self.epoch, **dict(zip(names, means)), "seconds": seconds, "curve": curve,
                "images_per_second": round(self.images * self.n_views / seconds)}

    def _print(self, loss, end):
        done = (self.epoch - self.resumed) * self.images + sum(self.sizes)
        rate = done / (time.perf_counter() - self.start)
        left = round(((self.epochs - self.resumed) * self.images - done) / rate)
        print("\r" * self.terminal + f"  epoch {self.epoch + 1}/{self.epochs}  loss {loss:7.2f}  "
              f"{rate * self.n_views:7,.0f} images/s  {left // 60:3d}:{left % 60:02d} left",
              end=end)


# ---------------------------------------------------------------- from settings to a run

PRESETS = {  # each name in here, and in the next two, is also an option
    "quick": dict(filters=20, epochs=2, transfer_epochs=1),
    "laptop": dict(filters=32, epochs=6, transfer_epochs=2),
    "paper": dict(filters=64, epochs=100, transfer_epochs=100)}  # and --as-published
OURS = dict(lr=9e-3, lr_schedule="one-cycle", batches_of="images", batch_size=128,
            decoder_entry="relu", equivariance_weight=150.0, paper_involution=False, head="gated")
AS_PUBLISHED = dict(lr=1e-3, lr_schedule="constant", batches_of="views", batch_size=64,
                    decoder_entry="linear", equivariance_weight=0.0, paper_involution=True,
                    head="plain")
MODELS = {  # --model
    "lavae": "LAVAE",
    "cvae": "CVAE, naive: told the {told}, shown all views",
    "cvae-paired": "CVAE, trained like a LAVAE: from the original to each single augmentation",
    "vae": "VAE of originals only, maps between its latents of the views"}
MORE_TARGETS = [["rotate_cw", "rotate_ccw"], ["mini_image", "shear_x"], ["mini_image", "canny"]]
MODELS_WITH = {  # the options that only some models have
    "baselines": ["lavae"], "heatmap": ["lavae"], "transfer": ["lavae", "vae"],
    "no_transfer": ["lavae"], "condition": ["cvae"], "latent_map": ["lavae", "vae"],
    "joint": ["lavae"], "record": ["lavae"], "batches_of": ["lavae", "vae"],
    "head": ["lavae", "vae"]}
NO_RESULT = {  # settings that change no result, or only set others, as preset sets epochs
    "baselines", "heatmap", "all_targets", "no_transfer", "preset", "as_published", "data_dir",
    "resume", "overwrite", "out"}


@dataclass
class Settings:
    """The options of the command line, also for notebooks: `Settings(epochs=1)`.

    None means: as the preset, or another setting, says. Raises ValueError: two settings clash.
    """
    model: str = "lavae"
    baselines: bool = False
    heatmap: bool = False
    all_targets: bool = False
    augs: list[str] | None = None
    transfer: list[list[str]] | None = None
    no_transfer: bool = False
    preset: str = "laptop"
    as_published: bool = False
    filters: int | None = None
    latent_dim: int = 16
    epochs: int | None = None
    transfer_epochs: int | None = None
    lr: float | None = None
    lr_schedule: str | None = None
    batches_of: str | None = None
    batch_size: int | None = None
    decoder_entry: str | None = None
    head: str | None = None
    kl_weight: float = 1.0
    equivariance_weight: float | None = None
    involution_weight: float = 1.0
    paper_involution: bool | None = None
    condition: str = "view"
    latent_map: str = "linear"
    joint: str | None = None
    prior_loss: str = "kl"
    dataset: str = "mnist"
    data_dir: Path = DATA_DIR
    seed: int = 0
    device: str = "auto"
    record: bool = False
    resume: bool = False
    overwrite: bool = False
    out: Path | None = None

    def __post_init__(self):
        others = [name for name, models in MODELS_WITH.items() if self.model not in models]
        for name in others:
            if getattr(self, name) not in (Settings.__dict__[name], []):
                raise ValueError(f"{flag(name)} does not go with --model {self.model}, only with "
                                 f"{' and '.join(MODELS_WITH[name])}: leave one out")
        recipe = AS_PUBLISHED if self.as_published or self.preset == "paper" else OURS
        for name, value in (PRESETS[self.preset] | recipe).items():
            if getattr(self, name) is None and name not in others:
                setattr(self, name, value)
        self._refuse_clashes()
        self.augs, self.dataset = list(self.augs or PAIRS[0]), pinned(self.dataset)
        if self.transfer is None:
            default = self.model == "lavae" and len(self.augs) == 2 and not self.no_transfer
            self.transfer = [["shear_x", "canny"]] if default else []
        name = f"{self.model}-{'+'.join(self.augs)}".removeprefix("lavae-")
        self.out = Path(self.out or Path("runs", "heatmap" if self.heatmap else name))

    def _refuse_clashes(self):
        augs, transfers = self.augs or PAIRS[0], self.transfer or []
        for clash, why in (
                (self.all_targets and not self.heatmap,
                 "--all-targets goes with --heatmap only: add it, or leave it out"),
                (self.heatmap and (self.augs or transfers or self.no_transfer or self.baselines),
                 "--heatmap names the augmentations and transfers itself, and trains no baselines: "
                 "leave --augs, --transfer, --no-transfer and --baselines out"),
                (self.no_transfer and len(augs) != 2,
                 "--no-transfer: only two --augs have a transfer by default: leave it out"),
                (self.joint == "signs" and self.latent_map != "linear",
                 "--joint signs is a start for linear maps: leave --latent-map out"),
                (self.joint and not self.equivariance_weight,
                 "--joint needs an --equivariance-weight above 0"),
                (self.batches_of == "views" and self.equivariance_weight,
                 "--batches-of views: the equivariance loss compares all views of an image, so add "
                 "--equivariance-weight 0"),
                (len(augs) > 5, "--augs: there are 2^K views of every image, so name five at most"),
                (any(len(names) != len(augs) for names in transfers),
                 f"--transfer: name {len(augs)} augmentations, one for each of --augs "
                 f"{' '.join(augs)}"),
                (any(len({*map(str, one)}) < len(one) for one in (augs, transfers, *transfers)),
                 "--augs and --transfer: the same is named twice, name it once")):
            if clash:
                raise ValueError(why)

    def described(self) -> str:
        """A line that says what is trained."""
        told = "view and the digit" if self.condition == "both" else self.condition
        return (f"{MODELS[self.model].format(told=told)}: {' and '.join(self.augs)}, on "
                f"{self.dataset}; {self.preset} preset, {self.device}, seed {self.seed}")

    def config(self) -> dict:
        """The settings that decide the result, as plain data."""
        return {name: value for name, value in asdict(self).items() if name not in NO_RESULT}


def flag(name: str) -> str:
    """The option of a setting: batch_size is --batch-size."""
    return "--" + name.replace("_", "-")


def runs_of(settings: Settings) -> list[Settings]:
    """The settings of each run that is asked for.

    --baselines adds the other models, in folders inside the LAVAE's. --heatmap is a run for each
    pair of augmentations.
    """
    if settings.heatmap:
        targets = PAIRS + MORE_TARGETS * settings.all_targets
        return [replace(settings, heatmap=False, all_targets=False, augs=pair, transfer=targets,
                        out=settings.out / "+".join(pair)) for pair in PAIRS]
    plain = dict(baselines=False, latent_map="linear", joint=None, transfer=[], no_transfer=False,
                 record=False, batches_of=None, head=None)
    others = [name for name in MODELS if name != "lavae"] * settings.baselines
    return [replace(settings), *(replace(settings, model=name, out=settings.out / name, **plain)
                                 for name in others)]


def build(settings: Settings, classes: int = 10) -> LAVAE | CVAE:
    """The untrained model. classes: how many digits there are, for a CVAE that is told them."""
    size = dict(latent_dim=settings.latent_dim, filters=settings.filters,
                entry=settings.decoder_entry)
    if settings.model.startswith("cvae"):
        told = settings.condition if settings.model == "cvae" else "paired"
        return CVAE(settings.augs, told, classes=classes, **size)
    model = LAVAE(settings.augs, settings.transfer, latent_map=settings.latent_map,
                  originals_only=settings.model == "vae", head=settings.head, **size)
    model.orders = orders_of(settings.augs, settings.paper_involution)
    model.least_squares = settings.paper_involution
    if settings.joint:
        lavae.set_joint(model, settings.joint, settings.involution_weight)
    return model


def orders_of(augs: Sequence[str], paper_involution: bool = False) -> list[int | None]:
    """The order k of each augmentation, A_i^k x = x, or None. The paper has 2 for all of them."""
    return [2 if paper_involution else ORDERS.get(aug) for aug in augs]


def view_tensor(images: np.ndarray, augs: Sequence[str], device: torch.device) -> Tensor:
    """The views of uint8 images (N, 28, 28), as a tensor on the device, (2^K, N, 28, 28)."""
    return torch.from_numpy(np.stack(all_views(images, augs))).to(device)


def train_one(settings: Settings, x_train: np.ndarray, y_train: np.ndarray) -> None:
    """Run the three stages on settings.device, and write model.pt and metrics.json.

    x_train: uint8 (N, 28, 28). y_train: the digits, (N,), or None.
    """
    torch.manual_seed(settings.seed)
    device, history, start = torch.device(settings.device), {}, time.perf_counter()
    by_digit = settings.condition in ("digit", "both")
    classes = int(y_train.max()) + 1 if by_digit else 10
    model = lavae.channels_last(build(settings, classes).to(device))
    checkpoint = Checkpoint(settings.out / "state.pt")
    schedule = dict(batch_size=settings.batch_size, lr=settings.lr, seed=settings.seed,
                    lr_schedule=settings.lr_schedule, checkpoint=checkpoint)

    images = view_tensor(x_train, settings.augs, device)
    print(settings.described())
    labels = torch.from_numpy(y_train).long().to(device) if by_digit else None
    history["stage 1"] = stage1(
        model, images, labels, {"kl": settings.kl_weight,
                                "equivariance": settings.equivariance_weight},
        settings.prior_loss, settings.batches_of, epochs=settings.epochs, **schedule,
        recorder=Recorder(settings.out / "recording.pt") if settings.record else None)
    if isinstance(model, LAVAE):
        latents = [model.encode(v) for v in original_and_singles(images)]
        del images  # a transfer has others
        linear = settings.latent_map == "linear" and not settings.joint
        learn = stage2 if linear else partial(stage2_ablations, **schedule)
        history["stage 2"] = learn(model, latents, settings.involution_weight)
        if INTERRUPTED:
            raise KeyboardInterrupt
        with torch.no_grad():
            z = torch.stack(views(latents[0], model.maps))
        for names in settings.transfer:
            history["stage 3, " + "+".join(names)] = stage3(
                model, names, z, view_tensor(x_train, names, device),
                epochs=settings.transfer_epochs,
                **schedule | dict(lr=settings.lr / 2 if settings.head == "gated" else settings.lr))
    metrics = {"config": settings.config(), "made": made_with(settings.device),
               "seconds": round(time.perf_counter() - start, 2), "history": history}
    (settings.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    (settings.out / "evaluation.json").unlink(missing_ok=True)  # of the model that was here
    lavae.save(model, settings.out / "model.pt", settings.config())
    checkpoint.remove()
    print(f"done in {metrics['seconds']:.0f} s: {settings.out / 'model.pt'}")


def made_with(device: str) -> dict:
    """The date, the versions and the hardware, for metrics.json."""
    hardware = platform.processor() or platform.machine()
    if device == "cuda":
        hardware = torch.cuda.get_device_name()
    elif (cpus := Path("/proc/cpuinfo")).is_file():
        names = [line for line in cpus.read_text().splitlines() if line.startswith("model name")]
        hardware = names[0].split(": ")[-1] if names else hardware
    return {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(),
            "torch": torch.__version__, "numpy": np.__version__, "device": device,
            "hardware": hardware, "threads": torch.get_num_threads()}


@tolerant_output()
def run(settings: Settings) -> LAVAE | CVAE:
    """Train what the settings ask for, and return the model. Of several runs, it is the first's.

    Raises OSError, ValueError: something is missing, in the way, or does not fit;
    FloatingPointError: a loss is not finite; KeyboardInterrupt: its text says how to go on.
    """
    device = lavae.verified_device(settings.device, AdaBelief)
    runs = [replace(one, device=device.type) for one in runs_of(settings)]
    x_train, y_train, _, _ = load_images(settings.dataset, settings.data_dir)
    if y_train is None and settings.condition != "view":
        raise ValueError(f"--condition {settings.condition}: {settings.dataset} has no labels")
    unfinished = [one for one in runs if not is_finished(one, several=len(runs) > 1)]
    for one in unfinished:
        begin(one)
    try:
        for one in unfinished:
            train_one(one, x_train, y_train)
    except KeyboardInterrupt as stop:
        instead = " in the place of --overwrite" * settings.overwrite
        raise KeyboardInterrupt(f"the same command with --resume{instead} goes on") from stop
    return lavae.load(runs[0].out, device)


# ---------------------------------------------------------------- the command line


def dataset(text: str) -> str:
    """A type for argparse: the name of a data set, or of a .npz file."""
    if text not in DATASETS and not text.endswith(".npz"):
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(DATASETS)}, or a file that ends in .npz, not {text!r}")
    return text


AS_PUBLISHED_HELP = (
    "the paper's losses and decoders, and the optimiser's settings in the authors' code:\n  "
    + " ".join(f"{flag(name)} {value}" for name, value in AS_PUBLISHED.items()
               if value is not True).replace(" --decoder", "\n  --decoder")
    + " --paper-involution\n"
    "Three things stay ours: stage 2 starts from the least-squares matrices, it computes Eq. 6\n"
    "from averages over all images, and augmentations are fixed functions of the image")


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number, int or float, from low to high."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high:
            return value
        words = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"expected {words} from {low} to {high}, not {text!r}")

    return read


def parser_of() -> argparse.ArgumentParser:
    """The command line. Options that are not given are left to `Settings`."""
    parser = argparse.ArgumentParser(  # no usage line, so that an error is one line
        description=__doc__, usage=argparse.SUPPRESS, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawTextHelpFormatter)
    what_to_train(parser.add_argument_group("what is trained"))
    how_to_train(parser.add_argument_group("sizes, epochs and losses"))
    where_to_train(parser.add_argument_group("data, device and files"))
    return parser


def what_to_train(group: argparse._ArgumentGroup) -> None:
    """The options of the model and of its augmentations."""
    add = group.add_argument
    add("--model", choices=MODELS, help="(default lavae)\n" + "\n".join(
        f"{name}: {words.format(told='view')}" for name, words in MODELS.items()))
    add("--baselines", action="store_true",
        help="train the LAVAE, and the other models in folders inside its run folder")
    add("--heatmap", action="store_true",
        help="train on each of the paper's four pairs, and transfer each to all four, in folders\n"
             "inside the run folder (default runs/heatmap); pairs that are finished are kept")
    add("--all-targets", action="store_true",
        help="with --heatmap: transfer to the three further pairs of the authors' code, too")
    add("--augs", nargs="+", choices=AUGMENTATIONS, metavar="A",
        help="augmentations to learn, five at most, in the order in which they compose\n"
             f"(default flip_lr flip_ud) of {', '.join(AUGMENTATIONS)}")
    transfer = group.add_mutually_exclusive_group().add_argument
    transfer("--transfer", nargs="+", action="append", choices=AUGMENTATIONS, metavar="B",
             help="train another decoder, a head, that draws these, one for each of --augs;\n"
                  "may be repeated (default shear_x canny, if --augs are two)")
    transfer("--no-transfer", action="store_true", help="leave stage 3 out")
    add("--condition", choices=["view", "digit", "both"],
        help="what --model cvae is told (default view)")
    add("--latent-map", choices=LATENT_MAPS,
        help="an ablation: a small network, an MLP, in the place of each matrix (default linear)")
    add("--joint", choices=["identity", "signs"],
        help="an ablation: stages 1 and 2 together, Eq. 5 + equivariance weight * Eq. 6; the maps\n"
             "start at the identity, or stay diagonals of +1 and -1")


def how_to_train(group: argparse._ArgumentGroup) -> None:
    """The options of sizes, of the schedule and of the losses."""
    add, count, weight = group.add_argument, number(int, 1, 10 ** 6), number(float, 0, 10 ** 6)
    add("--preset", choices=PRESETS, help="(default laptop)\n" + "\n".join(
        f"{name}: " + ", ".join(f"{key} {value}" for key, value in preset.items())
        for name, preset in PRESETS.items()) + "; implies --as-published")
    add("--as-published", action="store_true", help=AS_PUBLISHED_HELP)
    add("--filters", type=number(int, 1, 512), metavar="N",
        help="filters of the first convolution (appendix C)")
    add("--latent-dim", type=number(int, 1, 512), metavar="N",
        help="numbers in a latent (default 16)")
    add("--epochs", type=count, metavar="N", help="epochs of stage 1, over all views of all images")
    add("--transfer-epochs", type=count, metavar="N", help="epochs of stage 3, for each head")
    add("--lr", type=number(float, 1e-9, 1e3), metavar="X",
        help="the learning rate's peak in stage 1 (default 9e-3); half of it for gated heads")
    add("--lr-schedule", choices=["one-cycle", "constant"],
        help="one-cycle (default): the learning rate rises for a quarter of the steps, then falls\n"
             "to 0, and the weight of the KL term grows in the first twentieth; constant: neither")
    add("--batches-of", choices=["images", "views"],
        help="in stage 1: all views of the same images (default), or any views of any images")
    add("--batch-size", type=number(int, 1, 8192), metavar="N",
        help="views in a batch (default 128). With the equivariance loss stage 1 takes at least\n"
             "2 * latent dim * views, because a matrix can fit fewer images perfectly")
    add("--decoder-entry", choices=["relu", "linear"],
        help="what follows a decoder's linear layer (default relu; linear: nothing)")
    add("--head", choices=["gated", "plain"],
        help="the decoder of a transfer: with two more layers, the first of them gated (default),\n"
             "or like the first decoder")
    add("--kl-weight", type=weight, metavar="X",
        help="weight of the KL term in stage 1 (default 1)")
    add("--equivariance-weight", type=weight, metavar="X",
        help="weight of the equivariance loss in stage 1 (default 150). It is a mean: the weight\n"
             "grows from 0 to three times this. 0 leaves Eq. 5 as in the paper")
    add("--involution-weight", type=weight, metavar="X",
        help="weight of the involution term |I - L^k|^2 in stage 2 (default 1)")
    add("--paper-involution", action="store_true",
        help="the order k = 2 for all augmentations, as in the paper; an equivariance loss then\n"
             "uses least-squares matrices. Default: the true order, 2 for flips, 4 for turns;\n"
             "where there is none, as for canny, the term is |I - L L^T|^2 / 100")
    add("--prior-loss", choices=["kl", "mmd"],
        help="what keeps latents near N(0, I) in stage 1: kl (default), or InfoVAE's mmd")


def where_to_train(group: argparse._ArgumentGroup) -> None:
    """The options of the data, the device and the files."""
    add = group.add_argument
    add("--dataset", type=dataset, metavar="NAME",
        help=f"{', '.join(DATASETS)} (default mnist; others are downloaded), or a FILE.npz of\n"
             "your own: uint8 images of 28 x 28 as x_train, x_test, labels as y_train, y_test")
    add("--data-dir", type=Path, metavar="DIR", help="(default data/)")
    add("--seed", type=number(int, 0, 2 ** 62 - 1), metavar="N", help="(default 0)")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], help="(default auto)")
    add("--record", action="store_true", help="keep frames of stage 1 for evaluate.py's animation")
    in_use = group.add_mutually_exclusive_group().add_argument
    in_use("--resume", action="store_true", help="go on where an interrupted run stopped")
    in_use("--overwrite", action="store_true",
           help="start over in a run folder that is in use: its pictures are removed at once,\n"
                "its model when the new one is there")
    add("--out", type=Path, metavar="DIR",
        help="the run folder (default runs/ and the names of --augs, joined by +;\n"
             "a baseline's name before them)")


def main(argv: Sequence[str] | None = None) -> None:
    """Train what the command line asks for."""
    parser, alone = parser_of(), threading.current_thread() is threading.main_thread()
    usual = signal.signal(signal.SIGINT, interrupt) if alone else None  # only the main thread may
    try:
        with one_line_errors(parser, ", then go on with --resume, or lower --filters, "
                             "--latent-dim, --batch-size or the number of --augs"):
            settings = Settings(**vars(parser.parse_args(argv)))
            run(settings)
            folder = shlex.quote(settings.out.as_posix())  # it may have blanks
            print(f"now: python evaluate.py {'--heatmap ' * settings.heatmap}{folder}")
    finally:
        if alone:
            signal.signal(signal.SIGINT, usual)
        INTERRUPTED.clear()


# ---------------------------------------------------------------- keeping a run safe

INTERRUPTED = []  # the first Ctrl-C adds an item
IN_USE = ("holds a run that is at work or was interrupted: go on with --resume, start over with "
          "--overwrite, or choose another --out")  # a folder with a state.pt


def interrupt(*_) -> None:
    """The first Ctrl-C ends training after this batch (or stage 2), the second at once."""
    INTERRUPTED.append(True)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_finished(settings: Settings, several: bool = False) -> bool:
    """Whether a run is finished already. With --resume, or as one of several runs, it is kept.

    Raises OSError, ValueError: the folder holds something that must not be lost.
    """
    model, state = settings.out / "model.pt", settings.out / "state.pt"
    if settings.overwrite:
        return False
    if state.is_file():
        if not settings.resume:
            raise FileExistsError(f"{settings.out} {IN_USE}")
        check_same(state, Checkpoint(state).stages.get("config", {}), settings.config())
    elif model.is_file():
        if not (settings.resume or several):
            raise FileExistsError(f"{settings.out} holds a finished run: start over with "
                                  "--overwrite, or choose another --out")
        check_same(model, lavae.load(model).settings, settings.config())
        print(f"{settings.out} is finished already, with the same settings: kept")
        return True
    return False


def check_same(path: Path, was: dict, now: dict) -> None:
    """Raises ValueError: the run at this path had other settings."""
    for key, value in now.items():
        if was.get(key) != value:
            raise ValueError(f"{path} was made with {key} {was.get(key)}, not {value}: give the "
                             "same options, or --overwrite to start over")


def begin(settings: Settings) -> None:
    """Create state.pt, which says that the folder is in use.

    If two runs begin in one folder at the same moment, only one of them can create the file. (Two
    runs with --resume are not kept apart.) Raises OSError: the file is there, or cannot be written.
    """
    state = settings.out / "state.pt"
    if settings.resume and state.is_file():
        return
    try:
        settings.out.mkdir(parents=True, exist_ok=True)
        if settings.overwrite:
            for pattern in ("state.pt", "recording.pt", "evaluation.json", "page.html", "*.png",
                            "*.gif"):
                for path in settings.out.glob(pattern):
                    path.unlink(missing_ok=True)
        open(state, "xb").close()
        try:
            lavae.write({"config": settings.config()}, state)
        except OSError:
            state.unlink()
            raise
    except FileExistsError as error:
        why = IN_USE if settings.out.is_dir() else "is a file: choose another --out"
        raise FileExistsError(f"{settings.out} {why}") from error


class Checkpoint:
    """state.pt: the state of `fit` after the last epoch of each stage, for --resume.

    The rest of a run is quick, and --resume does it again. Raises ValueError: the file is damaged.
    """

    def __init__(self, path: Path):
        self.path, self.stages = path, lavae.read(path)

    def save(self, stage: str, parameters: list[Tensor], state: dict, history: list[dict]) -> None:
        """Write the parameters, the history and all of `state`. Raises OSError."""
        saved = {"parameters": [p.detach() for p in parameters], "history": history}
        for name, thing in state.items():
            saved[name] = (getattr(thing, "get_state", None) or thing.state_dict)()
        self.stages[stage] = saved
        lavae.write(self.stages, self.path)

    def restore(self, stage: str, parameters: list[Tensor], state: dict) -> list[dict]:
        """Restore the parameters and `state`. Returns the history, [] if nothing was saved."""
        if stage not in self.stages:
            return []
        saved = self.stages[stage]
        for p, value in zip(parameters, saved["parameters"], strict=True):
            p.data.copy_(value)
        for name, thing in state.items():
            (getattr(thing, "set_state", None) or thing.load_state_dict)(saved[name])
        history = [*saved["history"]]
        print(f"  {len(history)} epochs are there already")
        return history

    def remove(self) -> None:
        """Remove the file of a finished run, and a half-written one beside it."""
        for path in (self.path, Path(f"{self.path}.part")):
            path.unlink(missing_ok=True)


class Recorder:
    """recording.pt: 32 frames of stage 1 as it learns, for the animation of evaluate.py.

    A frame has the latents of all views of 150 images, and the pictures that are drawn for ten.
    """

    def __init__(self, path: Path):
        self.path, self.frames = path, {"t": [], "latents": [], "drawn": []}

    def record(self, t: float, model: LAVAE, images: Tensor) -> None:
        """Take a frame and write it, if one is due when the fraction t of all steps is done."""
        if 32 * t < len(self.frames["t"]):
            return
        z = torch.stack([model.encode(view) for view in images[:, :150]])
        with torch.no_grad():
            drawn = (model.decoder(z[:, :10].flatten(0, 1)).sigmoid() * 255).round().byte()
        frame = {"t": t, "latents": z.cpu(), "drawn": drawn.unflatten(0, (len(z), 10)).cpu()}
        for name, value in frame.items():
            self.frames[name].append(value)
        lavae.write(self.frames, self.path)

    def state_dict(self) -> dict:
        """All frames so far, for the checkpoint."""
        return self.frames

    def load_state_dict(self, state: dict) -> None:
        """Restore the frames of a checkpoint; later ones are dropped."""
        self.frames = state


if __name__ == "__main__":
    main()
