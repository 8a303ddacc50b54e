"""Train a LAVAE in three stages.

    stage 1   encoder, decoder   min  BCE(v, D(z)) + KL(q(z|v) || N(0, I)) over all views v   Eq. 5
                                      + the equivariance loss                                 ours
    stage 2   L_1 .. L_K         min  mean (E(x) L_i - E(A_i x))^2 + |I - L_i^k|^2            Eq. 6
    stage 3   a new decoder D_B  min  BCE(B_v x, D_B(z L_v)) over all views v                 Eq. 7
              that draws other augmentations B from the same latents z = E(x)

    python train.py                                        # flips, then shear_x and canny: minutes
    python train.py --preset quick                         # a minute or two: for a lecture
    python train.py --augs rotate_cw flip_lr --transfer flip_lr flip_ud    # another pair
    python train.py --model cvae                           # a model to compare it with

One run trains one model, and writes model.pt (for `lavae.load` and `evaluate.py`) and metrics.json
to one folder. Read this file after lavae.py. In order: the three stages, their loop, from options
to a run, how a run is kept safe, the command line.
"""

import argparse
import json
import math
import platform
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lavae
from adabelief import AdaBelief
from augment import (
    AUGMENTATIONS,
    DATA_DIR,
    DERIVED,
    DOWNLOADS,
    ORDERS,
    PAIRS,
    Refused,
    all_views,
    as_typed,
    check_order,
    evenly,
    load_images,
    new_parser,
    one_line_errors,
    parsed,
    path_of,
    recorded,
    views,
)
from lavae import CVAE, LAVAE, bce, map_error, moments, order_error, original_and_singles, pixels

MAP_STEPS = 2000  # of stage 2; each is on all data, and takes half a millisecond
MAP_LR = 1e-2
MOMENTS = 60  # of stage 1 that --record keeps
MLP_EPOCHS = 5  # of stage 2 with --latent-map mlp
NOISE, SHUFFLE = 10**6, 2 * 10**6  # added to --seed: else noise would repeat the weights

# ---------------------------------------------------------------- the three stages


def stage1(
    model: LAVAE | CVAE,
    images: Tensor,
    labels: Tensor | None,
    run: Namespace,
    record: Callable | None = None,
) -> list[dict]:
    """Stage 1 (Eq. 5): encoder and decoder learn to draw the model's `stage1_views`, each from
    itself (cvae-paired: all from the original).

    Args:
        images: uint8 (2^K, N, 28, 28), the views of all training images, on the model's device.
        labels: the digits, (N,), for a CVAE that is told them, else None.
        run: the options, see `resolve`. With --recipe ours a batch has all views of some images;
            with --recipe published a LAVAE's has any views of any images.
        record: a `Recorder`, perhaps.

    Returns the history: a dict for each epoch, with the mean of each loss. "bce" and "kl" are in
    nats an image; with "mmd", "kl" is that loss. "equivariance" is a mean square of latents. An
    epoch always has 2^K N images, so a model with fewer `stage1_views` sees each more often.
    """
    n, n_views = images.shape[1], len(model.stage1_views)
    print(f"stage 1: encoder and decoder learn {n_views} of {len(images)} views of {n:,} images")
    shown = torch.tensor(model.stage1_views, device=images.device)  # their numbers
    noise = torch.Generator(images.device).manual_seed(run.seed + NOISE)
    equivariance = run.equivariance_weight and n_views > 1
    single_views = run.recipe == "published" and isinstance(model, LAVAE)

    def losses_of(index, weights):
        if single_views:  # index counts all images of the first view, then of the second, ..
            x = images[shown[index // n], index % n][None]
        else:
            x = images[shown[:, None], index]
        x = pixels(x, model.encoder.dtype)  # (V, B, 28, 28)
        # A CVAE repeats the labels of the B images for each view.
        logits, mu, logvar = model(x, noise, None if labels is None else labels[index])
        prior = lavae.kl(mu, logvar) if run.prior_loss == "kl" else lavae.mmd(mu, logvar, noise)
        losses = {"bce": bce(logits, x.flatten(0, 1)), "kl": prior}
        kl_weight, equivariance_weight = weights
        loss = losses["bce"] + kl_weight * prior
        if equivariance:
            error = losses["equivariance"] = latent_loss(model, mu.unflatten(0, x.shape[:2]), run)
            loss = loss + equivariance_weight * error
        return {"loss": loss, **losses}

    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    if run.joint == "identity":
        parameters += model.maps.parameters()
    shown_in_all = len(images) * n  # of an epoch
    if single_views:
        batches = Batches(n_views * n, run.batch_size, run.seed, per_epoch=shown_in_all)
    else:
        per_batch = run.batch_size // n_views
        if equivariance:  # a matrix fits as many images as there are latents: take twice as many
            per_batch = max(per_batch, 2 * model.latent_dim)
        batches = Batches(n, per_batch, run.seed, per_epoch=shown_in_all // n_views)
    return fit("stage 1", losses_of, parameters, batches, run.epochs, run.lr, run, noise, record)


def weights_at(t: float, run: Namespace) -> tuple[float, float]:
    """The weights of the prior loss and of the equivariance loss, if the fraction t of all steps of
    stage 1 is done.

    The weight of the prior loss grows in the first twentieth of the steps. (At full weight from the
    start, all latents may collapse to zero.) The weight of the equivariance loss is multiplied by
    3 t^2, whose mean is 1: first the latents must decide how many directions a map keeps, and how
    many it reverses. With --recipe published both are constant.
    """
    kl, equivariance = run.kl_weight, run.equivariance_weight or 0
    if run.recipe == "ours":
        kl, equivariance = kl * min(1, 20 * t), equivariance * (3 * t * t)
    return kl, equivariance


def latent_loss(model: LAVAE, z: Tensor, run: Namespace) -> Tensor:
    """The loss of a batch's latents in stage 1, z (2^K, B, latent_dim) of all views.

    It is `lavae.equivariance_loss`, but with joint stages Eq. 6 with the model's own maps.
    """
    if model.joint:
        pairs = original_and_singles(z)
        return lavae.maps_loss(model, run.involution_weight, *pairs)
    return lavae.equivariance_loss(z, model.orders)


def stage2(model: LAVAE, latents: Sequence[Tensor], involution_weight: float = 1.0) -> None:
    """Stage 2 (Eq. 6): the maps learn. Compositions are never shown.

    latents: E(x), E(A_1 x), .. E(A_K x) of all training images, (N, latent_dim) each. The k of each
    map is in `model.orders`, see `lavae.order_error`.

    The loss is quadratic in the latents. So their second moments are all that it needs: one pass
    over the data, and then each step only needs matrices of latent_dim x latent_dim. A map starts
    at the least-squares solution G^-1 C_i, whose eigenvalues have the right signs. (The involution
    term has a minimum for every choice of signs, and keeps a map at wrong ones.)

    Raises FloatingPointError: a map is not finite.
    """
    for aug, map_i, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders):
        G, C_i, squared = moments(latents[0], z_i)
        # In older torch the default driver, gelsy, reads uninitialised memory.
        L = torch.linalg.lstsq(G, C_i, driver="gelsd").solution.requires_grad_()
        optimizer = AdaBelief([L])
        for step in range(MAP_STEPS):
            optimizer.param_groups[0]["lr"] = MAP_LR * (1 - step / MAP_STEPS)
            optimizer.zero_grad()
            loss = map_error(L, G, C_i, squared) + involution_weight * order_error(L, order)
            loss.backward()
            optimizer.step()
        if not L.isfinite().all():
            raise FloatingPointError(f"the map of {aug} is not finite: lower --involution-weight")
        map_i.L.data.copy_(L.detach())


@torch.no_grad()
def map_errors(model: LAVAE, latents: Sequence[Tensor]) -> list[dict]:
    """A dict for each map: "error", the mean square of f(E(x)) - E(A_i x), and "order_error"."""
    history, z = [], latents[0]
    for aug, f, z_i, order in zip(model.augs, model.maps, latents[1:], model.orders):
        error, order_error = (f(z) - z_i).square().mean().item(), f.order_error(order, z).item()
        history.append({"map": aug, "error": error, "order_error": order_error})
        print(f"  map {aug}: error {error:.2g}, order error {order_error:.2g}")
    return history


def stage2_mlp(model: LAVAE, latents: Sequence[Tensor], run: Namespace) -> None:
    """Stage 2 of an ablation: MLPs in the place of the matrices. They need the data itself, in
    batches. Model and latents are those of `stage2`."""

    def losses_of(index, weights):
        pairs = [z[index] for z in latents]
        return {"loss": lavae.maps_loss(model, run.involution_weight, *pairs)}

    batches = Batches(len(latents[0]), run.batch_size, run.seed)
    fit("stage 2", losses_of, [*model.maps.parameters()], batches, MLP_EPOCHS, run.lr, run)


def stage3(model: LAVAE, key: str, z: Tensor, images: Tensor, run: Namespace) -> list[dict]:
    """Stage 3, transfer (Eq. 7): a head learns to draw the views of other augmentations.

    key: its name in `model.heads`, those augmentations joined by +. z: the latents of the originals
    under all maps, z, z L_1, z L_2, .., (2^K, N, latent_dim). images: the views to draw from them,
    uint8 (2^K, N, 28, 28). Returns the history: a dict for each epoch, with the mean loss.
    """
    print(f"stage 3: a new decoder learns {key} from the same latents")
    head = model.heads[key]

    def losses_of(index, weights):
        x = pixels(images[:, index], z.dtype).flatten(0, 1)
        return {"loss": bce(head(z[:, index].flatten(0, 1)), x)}

    n_views, n = images.shape[:2]
    batches = Batches(n, run.batch_size // n_views, run.seed)
    lr = run.lr / 2 if run.head == "gated" else run.lr
    stage, parameters = f"stage 3, {key}", [*head.parameters()]
    return fit(stage, losses_of, parameters, batches, run.transfer_epochs, lr, run)


# ---------------------------------------------------------------- the loop


def fit(
    stage: str,
    losses_of: Callable[[Tensor, Tensor], dict[str, Tensor]],
    parameters: list[Tensor],
    batches: "Batches",
    epochs: int,
    lr: float,
    run: Namespace,
    noise: torch.Generator | None = None,
    record: Callable | None = None,
) -> list[dict]:
    """The training loop: minimise losses_of(index, weights)["loss"] with AdaBelief.

    Args:
        losses_of: computes the losses of the images of these numbers; weights: see `weights_at`.
        lr: the peak of `one_cycle`; with --recipe published the constant learning rate.
        run: the options. If it has a checkpoint, the loop goes on after the last epoch that this
            holds of the stage, and saves each epoch to it.
        noise: the generator that losses_of draws from.
        record: is called in `MOMENTS` moments with the epochs done and the losses.

    Returns the history, a dict for each epoch. Raises FloatingPointError: a loss is not finite.
    """
    optimizer, history = AdaBelief(parameters), []
    device = parameters[0].device

    def gradients_of(index, weights):
        losses = losses_of(index, weights)
        optimizer.zero_grad()
        losses["loss"].backward()
        return {name: loss.detach() for name, loss in losses.items()}

    if device.type == "cuda":
        gradients_of = Recorded(gradients_of, parameters, noise)
    generators = [batches.shuffle, noise or batches.shuffle]  # without noise the same, twice
    state, steps = (parameters, optimizer, generators, history), epochs * len(batches)
    moments = {round(1 + (steps - 1) * (i / (MOMENTS - 1)) ** 2) for i in range(MOMENTS)}
    if run.checkpoint:
        run.checkpoint.restore(stage, *state)
    for done in range(len(history), epochs):
        start, all_losses, sizes = time.perf_counter(), [], []
        for step, index in enumerate(batches, start=done * len(batches)):
            t = (step + 0.5) / steps
            rate = 1 if run.recipe == "published" else one_cycle(t)
            optimizer.param_groups[0]["lr"] = lr * rate
            weights = torch.tensor(weights_at(t, run), device=device)  # a graph cannot read floats
            losses = gradients_of(index.to(device), weights)
            optimizer.step()
            # A copy, on the device until the epoch ends: to fetch them is to wait for it.
            all_losses.append(torch.stack([*losses.values()]))
            sizes.append(len(index))
            if record and step + 1 in moments:
                record((step + 1) / len(batches), losses)
            if getattr(sys.stdout, "isatty", bool)() and len(sizes) % 50 == 0:
                print(f"  {len(sizes) / len(batches):.0%}", end="\r", flush=True)
        found, seconds = summary([*losses], all_losses, sizes), time.perf_counter() - start
        history.append({"epoch": done + 1, "seconds": seconds, **found})
        means = "  ".join(f"{name} {found[name]:.4g}" for name in losses)
        print(f"  epoch {done + 1}/{epochs}  {means}  {seconds:.1f} s")
        if run.checkpoint:
            run.checkpoint.save(stage, *state)
    return history


class Recorder:
    """Keeps moments of stage 1 for the figure `learning`, closer together at the beginning: of 500
    images the latents, and of ten what is drawn of their views (eight views at most).

    images: uint8 (2^K, N, 28, 28). shown: the numbers of the ten. frames: a list, which grows.
    """

    def __init__(self, model: LAVAE, images: Tensor, shown: np.ndarray, frames: list):
        self.model, self.frames = model, frames
        self.few = images[0, evenly(np.arange(images.shape[1]), 500)]
        self.views = images[:8, shown]

    @torch.no_grad()
    def __call__(self, epoch: float, losses: dict[str, Tensor]) -> None:
        z = self.model.encode(self.views.flatten(0, 1))
        drawn = (
            (255 * self.model.decoder(z).sigmoid())
            .round()
            .byte()
            .unflatten(0, self.views.shape[:2])
        )
        frame = {"epoch": epoch, "losses": {name: loss.item() for name, loss in losses.items()}}
        frame |= {"z": self.model.encode(self.few).half().cpu(), "drawn": drawn.cpu()}
        self.frames.append(frame)


class Recorded:
    """A step as a CUDA graph: the host starts one operation, not a hundred.

    gradients_of(index, weights) returns losses, and leaves gradients in the parameters. It is
    recorded once for each size of a batch, and then replayed. A replay reads and writes the memory
    of the recording: inputs are copied to there, gradients are taken from there. The first three
    steps run as they are, because libraries prepare themselves in them. If a step cannot be
    recorded (it waits for the device, or makes a tensor on the host), all do.
    """

    def __init__(self, gradients_of: Callable, parameters: list, noise: torch.Generator | None):
        self.gradients_of, self.parameters, self.noise = gradients_of, parameters, noise
        self.graphs, self.eager_steps = {}, 3

    def __call__(self, *given: Tensor) -> dict[str, Tensor]:
        size = len(given[0])
        if not self.eager_steps and size not in self.graphs:
            try:
                self.graphs[size] = self.record([tensor.clone() for tensor in given])
            except RuntimeError as error:
                print(f"  slower, without a CUDA graph: {str(error).splitlines()[0]}")
                self.eager_steps = math.inf
        if self.eager_steps:
            self.eager_steps -= 1
            return self.gradients_of(*given)
        graph, read, losses, gradients = self.graphs[size]
        for tensor, new in zip(read, given):
            tensor.copy_(new)
        graph.replay()
        for p, gradient in zip(self.parameters, gradients):
            p.grad = gradient
        return losses

    def record(self, read: list[Tensor]) -> tuple:
        """The graph, what it reads, and what it leaves: losses and gradients."""
        graph = torch.cuda.CUDAGraph()
        if self.noise:
            graph.register_generator_state(self.noise)
        with torch.cuda.graph(graph):
            losses = self.gradients_of(*read)
        return graph, read, losses, [p.grad for p in self.parameters]


def one_cycle(t: float) -> float:
    """The learning rate as a fraction of its peak, when the fraction t of all steps is done. It
    rises linearly for a quarter of the steps, then falls like a cosine."""
    if t < 0.25:
        return 4 * t
    return (1 + math.cos(math.pi * (t - 0.25) / 0.75)) / 2


class Batches:
    """The numbers 0 to n - 1 in batches, shuffled in each epoch, like torch's DataLoader.

    A batch has at least per_batch numbers. An epoch has per_epoch, n if this is 0: with more than
    n, each number comes several times.
    """

    def __init__(self, n: int, per_batch: int, seed: int, per_epoch: int = 0):
        self.n, self.per_batch, self.per_epoch = n, max(1, per_batch), per_epoch or n
        self.shuffle = torch.Generator().manual_seed(seed + SHUFFLE)

    def __len__(self):
        return max(1, self.per_epoch // self.per_batch)

    def __iter__(self):
        rounds = range(math.ceil(self.per_epoch / self.n))
        index = torch.cat([torch.randperm(self.n, generator=self.shuffle) for _ in rounds])
        return iter(index[: self.per_epoch].tensor_split(len(self)))


def summary(names: Sequence[str], losses: Sequence[Tensor], sizes: Sequence[int]) -> dict:
    """The mean of each loss over an epoch, by its name, and "curve", its means over each twentieth.

    losses: those of each step, (len(names),), on a batch of the size that stands in sizes. Raises
    FloatingPointError: a loss is not finite.
    """
    table = torch.stack([*losses]).cpu().double()
    if not table.isfinite().all():
        raise FloatingPointError("the loss is not finite any more: try a lower --lr")
    means = torch.tensor(sizes).double() @ table / sum(sizes)
    parts = table.tensor_split(min(20, len(table)))
    curves = torch.stack([part.mean(0) for part in parts], 1)
    return dict(zip(names, means.tolist())) | {"curve": dict(zip(names, curves.tolist()))}


# ---------------------------------------------------------------- from options to a run

PRESETS = {  # each name in here, and in the next two, is also an option
    "quick": dict(filters=24, epochs=2, transfer_epochs=1),
    "laptop": dict(filters=32, epochs=6, transfer_epochs=2),
    "paper": dict(filters=64, epochs=100, transfer_epochs=100),  # and --as-published
}
RECIPES = {"ours": dict(lr=9e-3, batch_size=128), "published": dict(lr=1e-3, batch_size=64)}
OURS = dict(recipe="ours", equivariance_weight=150.0, paper_involution=False, head="gated")
AS_PUBLISHED = dict(
    recipe="published", equivariance_weight=0.0, paper_involution=True, head="plain"
)
MODELS = {  # --model
    "lavae": "LAVAE",
    "cvae": "CVAE, naive: told its --condition, shown all views",
    "cvae-paired": "CVAE, trained like a LAVAE: from the original to each single augmentation",
    "vae": "VAE of originals only, maps between its latents of the views",
}
NO_SETTINGS = ("preset", "as_published", "data_dir", "resume", "overwrite", "out", "checkpoint")


def resolve(run: Namespace) -> Namespace:
    """Fill in what the preset, the recipe and the model decide. What a model does not have becomes
    None; if it was given, a line says so. Raises Refused: two options clash."""
    if run.transfer == [["all"]]:
        run.transfer = PAIRS
    given, default = {**vars(run)}, vars(parser_of().parse_args([]))
    published = run.as_published or run.preset == "paper"
    defaults = AS_PUBLISHED if published else OURS
    defaults = PRESETS[run.preset] | RECIPES[run.recipe or defaults["recipe"]] | defaults
    for name, value in defaults.items():
        if getattr(run, name) is None:
            setattr(run, name, value)
    if run.transfer is None:
        run.transfer = [["shear_x", "canny"]] if len(run.augs) == 2 else []
    if run.model != "lavae":
        run.transfer = []
        run.joint = run.head = run.equivariance_weight = None
    if run.model.startswith("cvae"):
        run.latent_map = run.involution_weight = run.paper_involution = run.record = None
    else:
        run.condition = None
    if run.model == "cvae-paired":
        run.condition = "paired"
    if not run.transfer:
        run.head = run.transfer_epochs = None
    unused = {
        name: value
        for name, value in given.items()
        if value not in (default[name], getattr(run, name))
    }
    if unused:
        print(f"without effect here: {as_typed(unused)}")
    name = f"{run.model}-{'+'.join(run.augs)}".removeprefix("lavae-")
    run.out = run.out or Path("runs", name)
    run.entry = "linear" if run.recipe == "published" else "relu"
    run.orders = [2 if run.paper_involution else ORDERS.get(aug) for aug in run.augs]
    run.classes, run.checkpoint = 10, None

    if len(run.augs) > 5:
        raise Refused("--augs: there are 2^K views of every image, so name five at most")
    for names in (run.augs, *run.transfer):
        if len(names) != len(run.augs) or len({*names}) < len(names) or "all" in names:
            raise Refused(
                f"--augs, --transfer: name each once, {len(run.augs)} in --transfer, as in --augs; "
                "--transfer all stands alone, and is of pairs"
            )
    if run.joint == "signs" and run.latent_map != "linear":
        raise Refused("--joint signs is a start for linear maps: leave --latent-map out")
    if run.joint and not run.equivariance_weight:
        raise Refused("--joint needs an --equivariance-weight above 0")
    if run.recipe == "published" and run.equivariance_weight:
        raise Refused("--recipe published has single views: add --equivariance-weight 0")
    return run


def settings_of(run: Namespace) -> dict:
    """The options that decide the result, as plain data."""
    return {name: value for name, value in vars(run).items() if name not in NO_SETTINGS}


def view_tensor(images: np.ndarray, augs: Sequence[str], device: torch.device) -> Tensor:
    """The views of uint8 images (N, 28, 28), as a tensor on the device, (2^K, N, 28, 28)."""
    return torch.from_numpy(np.stack(all_views(images, augs))).to(device)


def train(
    run: Namespace, x_train: np.ndarray, y_train: np.ndarray | None, device: torch.device
) -> LAVAE | CVAE:
    """Run the three stages, and write model.pt and metrics.json. Returns the model.

    x_train: uint8 (N, 28, 28). y_train: the digits, (N,), or None.
    """
    settings, labels, history = settings_of(run), None, {}
    print(f"{MODELS[run.model]}: {settings}")
    torch.manual_seed(run.seed)
    if run.condition in ("digit", "both"):
        labels = torch.from_numpy(y_train).long().to(device)
    model = lavae.channels_last(lavae.build(settings).to(device))
    # glibc returns big blocks of memory to the system, and each step asks for many of them again: a
    # third of the time. Freeing 31 MiB once makes glibc keep blocks up to that size.
    torch.empty(31 * 2**20, dtype=torch.uint8)

    images, record = view_tensor(x_train, run.augs, device), None
    if run.record:
        frames = run.checkpoint.content.setdefault("frames", [])  # of an interrupted run
        record = Recorder(model, images, recorded(x_train, y_train), frames)
    history["stage 1"] = stage1(model, images, labels, run, record)
    if model.maps:
        latents = [model.encode(view) for view in original_and_singles(images)]
        del images  # a transfer has others
        print("stage 2: a map for each augmentation, from pairs; compositions are not shown")
        if run.latent_map != "linear" and not run.joint:
            stage2_mlp(model, latents, run)
        elif not run.joint:  # else stage 1 has learnt them
            stage2(model, latents, run.involution_weight)
        history["stage 2"] = map_errors(model, latents)
        with torch.no_grad():
            z = torch.stack(views(latents[0], model.maps))
        for names in run.transfer:
            key, wanted = "+".join(names), view_tensor(x_train, names, device)
            history[f"stage 3, {key}"] = stage3(model, key, z, wanted, run)
    metrics = dict(config=settings, made=made_with(device), history=history)
    (run.out / "metrics.json").write_text(json.dumps(metrics, indent=1))
    if record:
        lavae.write({"frames": record.frames}, run.out / "recording.pt")
    lavae.save(model, run.out / "model.pt")
    run.checkpoint.path.unlink()
    print(f"done: {run.out / 'model.pt'}")
    return model


def pick_device(name: str) -> torch.device:
    """The device of this name. "auto" is CUDA, else the CPU. Raises OSError: it is not there."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "cpu"
    if not {"cpu": True, "cuda": cuda, "mps": mps}[name]:
        raise OSError(f"there is no {name} here: choose --device cpu")
    return torch.device(name)


def made_with(device: torch.device) -> dict:
    """The date, the versions and the hardware, for metrics.json."""
    hardware = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        hardware = torch.cuda.get_device_name()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
        "device": device.type,
        "hardware": hardware,
        "threads": torch.get_num_threads(),
    }


# ---------------------------------------------------------------- keeping a run safe


class Checkpoint:
    """state.pt: {"settings": .., stage: the state of `fit` after its last epoch}, for --resume.

    While it is there, its folder is in use. What lies between the stages is quick, and --resume
    does it again.
    """

    def __init__(self, path: Path, content: dict):
        self.path, self.content = path, content

    def save(self, stage, parameters, optimizer, generators, history) -> None:
        """Write the state of a stage beside those of the stages before. Raises OSError."""
        self.content[stage] = {
            "parameters": [p.detach() for p in parameters],
            "optimizer": optimizer.state_dict(),
            "generators": [generator.get_state() for generator in generators],
            "history": history,
        }
        lavae.write(self.content, self.path)

    def restore(self, stage, parameters, optimizer, generators, history) -> None:
        """Set all of them to what was saved of a stage, if anything was."""
        if stage not in self.content:
            return
        saved = self.content[stage]
        for p, value in zip(parameters, saved["parameters"]):
            p.data.copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        for generator, state in zip(generators, saved["generators"]):
            if len(state) == len(generator.get_state()):  # else another device: new noise
                generator.set_state(state)
        history[:] = saved["history"]


def pictures() -> list[str]:
    """The names of the files that evaluate.py may have drawn of a run."""
    from evaluate import FIGURES  # here, because nothing else in this file needs evaluate.py

    return [f"{name}{end}" for name in [*FIGURES, "images"] for end in (".png", ".gif", ".html")]


def begin(run: Namespace) -> Checkpoint:
    """The checkpoint of a new run, or with --resume of the interrupted one.

    Of two runs that begin in one folder at the same moment, one creates the file. Raises OSError,
    Refused: there are files that must not be lost, or no run to go on with.
    """
    state, settings = run.out / "state.pt", settings_of(run)
    if run.resume:
        if not state.is_file():
            raise FileNotFoundError(
                f"{run.out} holds no interrupted run (perhaps a finished one): leave --resume out"
            )
        content, begun = lavae.read(state), {}
        for name, value in content["settings"].items():
            if value != settings.get(name) and name != "device":
                begun[name] = value
        if begun:
            typed = {name: value for name, value in begun.items() if name not in DERIVED}
            what = as_typed(typed) or "other data or ORDERS"
            raise Refused(f"{run.out} was begun with {what}: give the same options")
        return Checkpoint(state, content)
    ours = state.exists() or (run.out / "model.pt").exists()  # else it is of something else
    names = ["state.pt", "model.pt", "metrics.json", "evaluation.json", "recording.pt"]
    if run.overwrite:
        names += pictures()
    for name in names:
        path = run.out / name
        if path.exists() and not (ours and run.overwrite):
            raise FileExistsError(
                f"{run.out} holds a run: go on with --resume if it was interrupted, start over "
                "with --overwrite, or choose another --out"
            )
        path.unlink(missing_ok=True)
    run.out.mkdir(parents=True, exist_ok=True)
    with open(state, "xb") as file:
        torch.save({"settings": settings}, file)
    return Checkpoint(state, {"settings": settings})


# ---------------------------------------------------------------- the command line


def bounded(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A type for argparse: a number, int or float, from low to high."""

    def read(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected a number from {low} to {high}, not {text}")
        return value

    read.__name__ = kind.__name__  # for argparse's message where it is no number
    return read


def parser_of() -> argparse.ArgumentParser:
    """The command line. None as a default: `resolve` fills it in."""
    parser = new_parser(__doc__)
    add = parser.add_argument_group("what is trained").add_argument
    models = [f"{name}: {what}" for name, what in MODELS.items()]
    names = [*AUGMENTATIONS]
    add("--model", choices=MODELS, default="lavae", help="\n".join(["(default lavae)", *models]))
    add(
        "--augs",
        nargs="+",
        choices=names,
        default=PAIRS[0],
        metavar="A",
        help="augmentations to learn, five at most, in the order in which they compose\n"
        f"(default flip_lr flip_ud) of {', '.join(names)}",
    )
    add(
        "--transfer",
        nargs="+",
        action="append",
        choices=[*names, "all"],
        metavar="B",
        help="train another decoder, a head, that draws these, one for each of --augs;\n"
        "may be repeated (default shear_x canny, if --augs are two);\n"
        "all, alone: a head for each of the paper's four pairs",
    )
    add("--no-transfer", dest="transfer", action="store_const", const=[], help="leave stage 3 out")
    add(
        "--condition",
        choices=["view", "digit", "both"],
        default="view",
        help="what --model cvae is told (default view)",
    )
    add(
        "--latent-map",
        choices=lavae.LATENT_MAPS,
        default="linear",
        help="an ablation: a small network, an MLP, in the place of each matrix (default linear)",
    )
    add(
        "--joint",
        choices=["identity", "signs"],
        help="an ablation: stages 1 and 2 together, Eq. 5 + equivariance weight * Eq. 6; the maps\n"
        "start at the identity, or stay diagonals of +1 and -1",
    )

    add = parser.add_argument_group("sizes, epochs and losses").add_argument
    count, weight = bounded(int, 1, 10**6), bounded(float, 0, 10**6)
    presets = [f"{name}: {as_typed(preset)}" for name, preset in PRESETS.items()]
    add(
        "--preset",
        choices=PRESETS,
        default="laptop",
        help="\n".join(["(default laptop)", *presets]) + "; implies --as-published",
    )
    add(
        "--as-published",
        action="store_true",
        help="the paper's losses and decoders, and the optimiser's settings in the authors' code:\n"
        "--recipe published --equivariance-weight 0 --paper-involution --head plain\n"
        "Three things stay ours: stage 2 starts from the least-squares matrices, it computes\n"
        "Eq. 6 from averages over all images, and augmentations are fixed functions of the image",
    )
    add(
        "--recipe",
        choices=RECIPES,
        help="ours (default): the learning rate rises for a quarter of the steps, then falls to\n"
        "0; the weight of the KL term grows in the first twentieth; a batch has all views of its\n"
        f"images; a ReLU follows a decoder's linear layer; {as_typed(RECIPES['ours'])}\n"
        "published: a constant rate, constant weights, a LAVAE's batches are of any views, no\n"
        f"such ReLU; {as_typed(RECIPES['published'])}; needs --equivariance-weight 0",
    )
    add("--filters", type=bounded(int, 1, 512), help="of the first convolution")
    add(
        "--latent-dim",
        type=bounded(int, 2, 512),
        default=16,
        help="numbers in a latent (default 16)",
    )
    add("--epochs", type=count, help="epochs of stage 1, over all views of all images")
    add("--transfer-epochs", type=count, help="epochs of stage 3, for each head")
    add(
        "--lr",
        type=bounded(float, 1e-9, 1e3),
        help="the learning rate's peak in stage 1; half of it for gated heads",
    )
    add(
        "--batch-size",
        type=bounded(int, 1, 8192),
        help="views in a batch. With the equivariance loss stage 1 takes at least\n"
        "2 * latent dim * views, because a matrix can fit fewer images perfectly",
    )
    add(
        "--head",
        choices=["gated", "plain"],
        help="the decoder of a transfer: with two more layers, the first of them gated (default),\n"
        "or like the first decoder",
    )
    add(
        "--kl-weight", type=weight, default=1.0, help="weight of the KL term in stage 1 (default 1)"
    )
    add(
        "--equivariance-weight",
        type=weight,
        help="weight of the equivariance loss in stage 1 (default 150), on average: it grows from\n"
        "0 to three times this. 0 leaves Eq. 5 as in the paper",
    )
    add(
        "--involution-weight",
        type=weight,
        default=1.0,
        help="weight of the involution term |I - L^k|^2 in stage 2 (default 1)",
    )
    add(
        "--paper-involution",
        action="store_true",
        default=None,
        help="the order k = 2 for all augmentations, as in the paper. Default: the true order,\n"
        "2 for flips, 4 for turns; where there is none, as for canny, |I - L L^T|^2 / 100",
    )
    add(
        "--prior-loss",
        choices=["kl", "mmd"],
        default="kl",
        help="what keeps latents near N(0, I) in stage 1: kl (default), or InfoVAE's mmd",
    )

    add = parser.add_argument_group("data, device and files").add_argument
    add(
        "--dataset",
        default="mnist",
        help=f"mnist (default), {', '.join(DOWNLOADS)} (downloaded), or a FILE.npz of your own:\n"
        "uint8 images of 28 x 28 as x_train, x_test, labels as y_train, y_test",
    )
    add("--data-dir", type=path_of, default=DATA_DIR, help="(default data/)")
    add("--seed", type=bounded(int, 0, 2**62 - 1), default=0, help="(default 0)")
    add(
        "--device",
        choices=["auto", "cpu", "cuda", "mps"],
        default="auto",
        help="auto (default): cuda if it is there, else cpu. Nobody has tried mps yet",
    )
    add(
        "--record",
        action="store_true",
        help=f"keep {MOMENTS} moments of stage 1 for the moving picture learning.gif",
    )
    add("--resume", action="store_true", help="go on where an interrupted run stopped")
    add("--overwrite", action="store_true", help="start over in a folder that holds a run")
    add(
        "--out",
        type=path_of,
        help="the run folder (default runs/ and the names of --augs, joined by +;\n"
        "the model's name before them, if it is no LAVAE)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> LAVAE | CVAE:
    """Train what the command line asks for. In a notebook it returns the model:

    model = train.main("--preset quick --seed 1 --out runs/mine".split())

    Two runs at the same time need two processes: threads would share one stream of random numbers.
    """
    parser = parser_of()
    go_on = ": go on with --resume (and without --overwrite)"
    with one_line_errors(parser, go_on), torch.enable_grad():
        run = resolve(parsed(parser, argv))
        device = pick_device(run.device)
        run.device = device.type
        x_train, y_train, _, y_test = load_images(run.dataset, run.data_dir)
        run.data = f"{len(x_train)} images, checksum {zlib.crc32(x_train.tobytes())}"
        if len(x_train) < 2 * run.latent_dim:
            raise Refused(f"{run.dataset} has {len(x_train)} images: lower --latent-dim")
        if run.condition in ("digit", "both"):
            if y_train is None:
                raise Refused(f"--condition {run.condition}: {run.dataset} has no labels")
            run.classes = int(max(y_train.max(), y_test.max())) + 1
        for aug in run.augs:
            check_order(x_train[:100], aug)
        run.checkpoint = begin(run)
        model = train(run, x_train, y_train, device)
        print(f'now: python "{Path(__file__).with_name("evaluate.py")}" "{run.out}"')
    return model.requires_grad_(False).eval()


if __name__ == "__main__":
    main()
