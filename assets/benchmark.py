"""How fast things are beside what they stand in for, what an ideal head could get, what a model
costs that is never certain, how many nats look like what, how the planes of latents turn, and what
the maps are good for.

    python assets/benchmark.py                     # prints the benchmark: some minutes
    python assets/benchmark.py limit runs/heat0/rotate_cw+flip_lr shear_x canny
    python assets/benchmark.py certain runs/cvae0
    python assets/benchmark.py scale runs/flips runs/plain runs/cvae0
    python assets/benchmark.py planes runs/sixty 60
    python assets/benchmark.py classify runs/flips0

The second command takes a run of a LAVAE and the augmentations of a head. It writes
assets/results/limit-SOURCE-TARGET-SEED.json. The third takes a run of any model, and writes
assets/results/certain-MODEL-FILTERS-SEED.json. The fourth takes runs whose first augmentation is
flip_lr, and writes assets/nats.png. The fifth takes a run whose first augmentation is a turn, and
its degrees, and writes assets/results/planes-DEGREES.json. The sixth takes a run of a LAVAE, and
writes assets/results/classify-SOURCE-SEED.json. All need requirements-test.txt.
"""

import contextlib
import io
import itertools
import json
import sys
import time
import tracemalloc
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import adabelief_pytorch  # noqa: E402
import cv2  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from skimage import feature  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import augment  # noqa: E402
import evaluate  # noqa: E402
import lavae  # noqa: E402
import train  # noqa: E402
from adabelief import AdaBelief  # noqa: E402
from lavae import CVAE, LAVAE  # noqa: E402

CPU = torch.device("cpu")
TEMPERATURES = (0.8, 1.0, 1.2, 1.5, 2.0)


def run_of(words: str = "") -> Namespace:
    """The options of a run, from what one would type after `python train.py`."""
    return train.resolve(train.parser_of().parse_args(words.split()))


# ---------------------------------------------------------------- what certainty costs


def certain(folder: str) -> None:
    """Write the nats of each view of the test images, drawn from the originals as in Table I, and
    the same with 0.01 + 0.98 p in the place of each p, so that no pixel is more than 99% certain.
    """
    model, (_, _, images, digits) = lavae.load(folder), augment.load_images()
    latents = evaluate.latents_of_views(model, images, digits)
    drawn = [*zip(latents, augment.all_views(images, model.augs))]

    def bounded(z):
        return (0.01 + 0.98 * model.decoder(z).sigmoid()).logit()

    nats = {}
    for name, decoder in (("drawn", model.decoder), ("at most 99%", bounded)):
        nats[name] = [evaluate.nats(decoder, z, view) for z, view in drawn]
    found = {"nats": nats, "made": train.made_with(CPU)}
    settings = model.settings
    name = f"certain-{settings['model']}-{settings['filters']}-{settings['seed']}.json"
    (ROOT / "assets" / "results" / name).write_text(json.dumps(found) + "\n")
    print(found)


# ---------------------------------------------------------------- how many nats look like what


def scale(*folders: str) -> None:
    """Draw ten mirrored test digits as each run draws them from the originals. A row is named by
    the mean cost of all test images, and the best row comes first."""
    _, _, images, digits = augment.load_images()
    chosen, rows = augment.one_of_each(images, digits), []
    for folder in folders:
        model = lavae.load(folder)
        drawn = evaluate.latents_of_views(model, chosen, range(10))[1]
        cost = evaluate.nats(
            model.decoder,
            evaluate.latents_of_views(model, images, digits)[1],
            augment.flip_lr(images),
        )
        pictures = (255 * model.decoder(drawn).sigmoid()).round().byte().numpy()
        rows.append((cost, pictures))
    rows = [(f"{cost:.0f} nats", pictures) for cost, pictures in sorted(rows, key=lambda r: r[0])]
    title = "Mirrored digits, and what models draw from the originals"
    page = augment.grid(title, [*"0123456789"], [("true", augment.flip_lr(chosen)), None, *rows])
    augment.save(page, ROOT / "assets" / "nats.png")


# ---------------------------------------------------------------- how planes of latents turn


def planes(folder: str, degrees: str) -> None:
    """Write by how much each plane of latents turns in half a step: [angle of the eigenvalue of L,
    angle in half a step], with the first one from 0 to 180 degrees. Write also what half a step
    costs: L^(1/2), and the same where planes that L turns by 180 degrees turn the other way.

    L turns images by `degrees`, and its eigenvectors span the planes. For half a step there is no
    map: it is fitted, by least squares, to the latents of 20,000 training images and of the same
    images, turned by half as much.
    """
    model, data = lavae.load(folder), augment.load_images()
    x, L = data[0][:20_000], model.maps[0].L
    z, turned = (model.encode(v).double() for v in (x, augment.rotate_30(x, float(degrees) / 2)))
    half = torch.linalg.lstsq(z, turned, driver="gelsd").solution
    values, vectors = torch.linalg.eig(L.double())
    half = torch.linalg.inv(vectors) @ half.to(vectors) @ vectors  # as the eigenvectors see it
    angles, found = values.angle().rad2deg().round().long(), []
    angles[angles == -180] = 180
    for angle in angles.abs().unique().tolist():
        same = (angles == angle).nonzero()[:, 0]
        for value in torch.linalg.eigvals(half[same][:, same]):
            found.append([angle, round(value.angle().rad2deg().item())])
    reverses = vectors * (angles == 180) @ torch.linalg.inv(vectors)  # a projection
    test = augment.evenly(data[2], 3000)
    root, true = lavae.matrix_power(L, 0.5), augment.rotate_30(test, float(degrees) / 2)
    roots = root, root - 2 * root @ reverses.real.float()
    nats = [evaluate.nats(model.decoder, model.encode(test) @ half, true) for half in roots]
    found = {"planes": sorted(found), "nats": nats, "made": train.made_with(CPU)}
    (ROOT / "assets" / "results" / f"planes-{degrees}.json").write_text(json.dumps(found) + "\n")
    print(found)


# ---------------------------------------------------------------- what the maps are good for

SHOWN = torch.linspace(-1.5, 1.5, 13).tolist()  # parts of the augmentation in training
ASKED = [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0]  # and in the test


def classify(folder: str) -> None:
    """Write the percentage of test images whose digit a classifier names, which learns from the
    first N training images alone, all upright; each the mean of three classifiers.

    "views": by N and by what it learns from: latents z, "maps", these under all products of the
    maps, or "images", the encoded views; for each view of the test images. "parts", if the first
    augmentation has any: of 2,000 training images, for parts t of 2,500 test images: latents z,
    "first map", "powers" z L^t, "images", the encoded A^t x; and by "pixels" and "pixels, parts" a
    convolutional network on the images. "seconds": what the maps and the images take for N = 200.
    "confused": of N = 1,000, see `confused`.
    """
    model, (x, y, x_test, y_test) = lavae.load(folder), augment.load_images()
    y, y_test = torch.from_numpy(y).long(), torch.from_numpy(y_test).long()
    names = augment.view_names(model.augs)
    test = dict(zip(names, map(model.encode, augment.all_views(x_test, model.augs))))

    def with_maps(n):
        return torch.cat(augment.views(model.encode(x[:n]), model.maps))

    def with_images(n):
        return torch.cat([*map(model.encode, augment.all_views(x[:n], model.augs))])

    found, settings = {"views": {}}, model.settings
    for n in (200, 1000, 10_000):
        learnt = {"z": model.encode(x[:n]), "maps": with_maps(n), "images": with_images(n)}
        found["views"][n] = {k: named(z, y[:n], test, y_test) for k, z in learnt.items()}
        if n == 1000:
            upright = {k: confused(learnt[k], y[:n], test["orig"], y_test) for k in ("z", "maps")}
    z, found["confused"] = model.encode(x[:200]), upright
    jobs = {"maps": lambda: augment.views(z, model.maps), "images": lambda: with_images(200)}
    found["seconds"] = in_turn(jobs, rounds=25)
    if model.augs[0] in augment.PARTS:
        found["parts"] = parts_named(model, x[:2000], y[:2000], x_test[::4], y_test[::4])
    found |= {"seed": settings["seed"], "made": train.made_with(CPU)}
    name = f"classify-{'+'.join(model.augs)}-{settings['seed']}.json"
    (ROOT / "assets" / "results" / name).write_text(json.dumps(found) + "\n")
    print(json.dumps(found, indent=1))


def parts_named(model: LAVAE, x: np.ndarray, y: Tensor, x_test: np.ndarray, y_test: Tensor) -> dict:
    """The "parts" of `classify`."""
    part, L = augment.PARTS[model.augs[0]], model.maps[0].L
    true, asked = ({t: part(images, t) for t in ts} for images, ts in ((x, SHOWN), (x_test, ASKED)))
    z, test = model.encode(x), {t: model.encode(images) for t, images in asked.items()}
    learnt = {
        "z": z,
        "first map": torch.cat([z, z @ L]),
        "powers": torch.cat([z @ lavae.matrix_power(L, t) for t in SHOWN]),
        "images": torch.cat([*map(model.encode, true.values())]),
    }
    found = {name: named(latents, y, test, y_test) for name, latents in learnt.items()}
    pixels = {t: torch.from_numpy(images)[:, None] for t, images in asked.items()}
    for name, images in (("pixels", x), ("pixels, parts", np.concatenate([*true.values()]))):
        images = torch.from_numpy(images)[:, None]
        found[name] = named(images, y, pixels, y_test, network=convolutions, steps=600)
    return found


def perceptron(latent_dim: int) -> nn.Module:
    """A classifier of latents, with one hidden layer."""
    return nn.Sequential(nn.Linear(latent_dim, 256), nn.ReLU(), nn.Linear(256, 10))


def convolutions(_: int) -> nn.Module:
    """A classifier of images (B, 1, 28, 28)."""
    first = nn.Conv2d(1, 16, 3), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(0.5)
    return nn.Sequential(*first, *second, nn.Linear(32 * 5 * 5, 10))


def named(
    x: Tensor,
    y: Tensor,
    test: dict[object, Tensor],
    y_test: Tensor,
    network: Callable = perceptron,
    steps: int = 1000,
) -> dict[object, float]:
    """The percentage of the items in each part of `test` whose digit is named rightly by networks
    that learn from x, with the labels y as often as they fit. The mean of three."""
    rates = dict.fromkeys(test, 0.0)
    for seed in range(3):
        name_of = learn_digits(network(x.shape[1]), x, y, steps, seed)
        for key, items in test.items():
            rates[key] += 100 * (name_of(items) == y_test).double().mean().item() / 3
    return rates


def learn_digits(net: nn.Module, x: Tensor, y: Tensor, steps: int, seed: int) -> Callable:
    """Train a classifier, see `named`. Returns a function from items to the digits it names."""
    y = y.repeat(len(x) // len(y))
    torch.manual_seed(seed)
    for layer in net:
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    optimizer = AdaBelief(net.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * train.one_cycle((step + 0.5) / steps)
        index = torch.randint(len(x), (200,))
        loss = F.cross_entropy(net(scaled(x[index])), y[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()

    @torch.no_grad()
    def name_of(items):
        return torch.cat([net(scaled(part)).argmax(1) for part in items.split(1000)])

    return name_of


def confused(x: Tensor, y: Tensor, test: Tensor, y_test: Tensor) -> dict[str, int]:
    """The five pairs of digits that a classifier confuses most, and how often: {"2 and 5": 90}."""
    found = learn_digits(perceptron(x.shape[1]), x, y, 1000, 0)(test)
    wrong = found != y_test
    pairs = zip(torch.minimum(found, y_test)[wrong], torch.maximum(found, y_test)[wrong])
    counts = Counter(f"{a} and {b}" for a, b in pairs)
    return dict(counts.most_common(5))


def scaled(x: Tensor) -> Tensor:
    """Latents as they are, images in [0, 1]."""
    return x / 255 if x.dtype == torch.uint8 else x


# ---------------------------------------------------------------- what an ideal head could get


def limit(folder: str, *target: str) -> None:
    """Write what an ideal decoder would get that is given the latents z L of a run and draws the
    target's views.

    Who cannot be sure which view is asked paints the mean of those that may be. Here p(view | z) is
    a classifier's, whose temperature is the best one for the test images. The views are drawn by a
    decoder that is told which.
    """
    model, data = lavae.load(folder), augment.load_images()
    told_view, filters = CVAE(target).to_view, model.settings["filters"]
    z, z_test = (torch.stack(augment.views(model.encode(x), model.maps)) for x in data[::2])
    images, wanted = (train.view_tensor(x, target, CPU) for x in data[::2])
    torch.manual_seed(0)
    classifier, told = classifier_of(z, filters), decoder_of(z, filters)
    learn_views(classifier, z)
    learn_images(told, told_view, z, images)
    totals = Counter()
    for v in range(len(z)):
        for latents, x in zip(z_test[v].split(lavae.BLOCK), wanted[v].split(lavae.BLOCK)):
            back = [model.from_view(latents, u) for u in range(len(z))]
            originals = [told_view(original, u) for u, original in enumerate(back)]
            totals.update(nats_of(classifier, told, latents, originals, lavae.pixels(x), v))
    nats = {key: total / z_test.shape[1] for key, total in totals.items()}
    found = {
        "source": "+".join(model.augs),
        "target": "+".join(target),
        "told": nats["told"],
        "ideal": min(nats[t] for t in TEMPERATURES),
        "made": train.made_with(CPU),
    }
    name = f"limit-{found['source']}-{found['target']}-{model.settings['seed']}.json"
    (ROOT / "assets" / "results" / name).write_text(json.dumps(found) + "\n")
    print(found)


def classifier_of(z: Tensor, filters: int) -> nn.Module:
    """A classifier of views, as wide as a gated head. z: (2^K, N, latent_dim)."""
    hidden = lavae.HEAD_WIDTH * filters
    first = lavae.Decoder(z.shape[2], filters, hidden).hidden
    return nn.Sequential(first, nn.Linear(hidden, len(z)))


def decoder_of(z: Tensor, filters: int) -> nn.Module:
    """A decoder like a gated head, of an original's latents and the view, one-hot."""
    inputs, hidden = z.shape[2] + len(z), lavae.HEAD_WIDTH * filters
    return lavae.channels_last(lavae.Decoder(inputs, filters, hidden))


def learn_views(classifier: nn.Module, z: Tensor) -> None:
    """The classifier learns which view latents are of, z (2^K, N, latent_dim)."""

    def losses_of(index, t):
        asked = torch.arange(len(z)).repeat_interleave(len(index))
        return {"loss": F.cross_entropy(classifier(z[:, index].flatten(0, 1)), asked)}

    run = run_of("--batch-size 512")
    batches = train.Batches(z.shape[1], run.batch_size // len(z), run.seed)
    train.fit("p(view | z)", losses_of, [*classifier.parameters()], batches, 8, 2e-3, run)


def learn_images(told: nn.Module, told_view: Callable, z: Tensor, images: Tensor) -> None:
    """The decoder learns to draw all views, images (2^K, N, 28, 28), from latents of originals."""

    def losses_of(index, t):
        originals = torch.cat([told_view(z[0, index], v) for v in range(len(z))])
        x = lavae.pixels(images[:, index]).flatten(0, 1)
        return {"loss": lavae.bce(told(originals), x)}

    run = run_of()
    batches = train.Batches(z.shape[1], run.batch_size // len(z), run.seed)
    train.fit("told the view", losses_of, [*told.parameters()], batches, 3, 4.5e-3, run)


@torch.no_grad()
def nats_of(
    classifier: nn.Module, told: nn.Module, z: Tensor, originals: list[Tensor], x: Tensor, v: int
) -> dict:
    """The nats of images x (B, 28, 28) of view v, summed: "told" the view, and by temperature.

    z: their latents. originals: for each view what the decoder gets if z is of that view.
    """
    odds, drawn = classifier(z), torch.stack([told(o).sigmoid() for o in originals])
    nats = {"told": F.binary_cross_entropy(drawn[v], x, reduction="sum").item()}
    for t in TEMPERATURES:
        mean = torch.einsum("bu,ubhw->bhw", (odds / t).softmax(1), drawn).clamp(max=1)
        nats[t] = F.binary_cross_entropy(mean, x, reduction="sum").item()
    return nats


# ---------------------------------------------------------------- how fast things are


def in_turn(jobs: dict[str, Callable], rounds: int = 7) -> dict[str, float]:
    """Run the jobs in turn; print and return the median seconds of each, and print their ratio to
    the first one's."""
    seconds = {name: [] for name in jobs}
    for _, (name, job) in itertools.product(range(rounds + 1), jobs.items()):
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            job()
        seconds[name].append(time.perf_counter() - start)
    seconds = {name: np.array(times[1:]) for name, times in seconds.items()}  # the first warms up
    first = next(iter(seconds.values()))
    for name, times in seconds.items():
        print(f"  {name:24} {np.median(times):8.3f} s   {np.median(first / times):6.2f}")
    return {name: np.median(times) for name, times in seconds.items()}


def flips(n: int) -> Tensor:
    """The four views of the first n training images under two flips, (4, n, 28, 28)."""
    return train.view_tensor(augment.load_images()[0][:n], ["flip_lr", "flip_ud"], CPU)


def bare_loop(model: LAVAE, images: Tensor, make: Callable, batch_size: int = 128) -> Callable:
    """An epoch of a VAE on uint8 images (N, 28, 28), with nothing that the loop could do without.

    make: of the parameters, the optimizer.
    """
    shuffled = lavae.pixels(images[torch.randperm(len(images))])
    optimizer = make([*model.encoder.parameters(), *model.decoder.parameters()])

    def epoch():
        for x in shuffled.split(batch_size):
            mu, logvar = model.encoder(x)
            z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
            loss = lavae.bce(model.decoder(z), x) + lavae.kl(mu, logvar)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


fused_adam = partial(torch.optim.Adam, fused=True)


def benchmark_stage1(n: int = 8192) -> None:
    """An epoch of stage 1 beside a bare loop with the fastest Adam and no equivariance loss."""
    images, run = flips(n), run_of("--epochs 1")
    model, same = (lavae.channels_last(lavae.build(vars(run))) for _ in range(2))

    def stage1():
        train.stage1(model, images, None, run)

    print(f"stage 1 on {4 * n:,} images in batches of {run.batch_size}")
    bare = bare_loop(same, images.flatten(0, 1), fused_adam)
    in_turn({"bare loop, Adam(fused)": bare, "train.stage1": stage1})


class Operations(TorchDispatchMode):
    """Counts the operations that compute something, so not the views of a tensor's memory."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aliases = [value.alias_info for value in func._schema.returns if value.alias_info]
        is_view = any(not alias.is_write for alias in aliases)
        if func.namespace == "aten" and func.overloadpacket.__name__ != "_unsafe_view":
            self.count += not is_view
        return func(*args, **kwargs or {})


def operations_of(epoch: Callable) -> int:
    """How many operations an epoch takes."""
    with contextlib.redirect_stdout(io.StringIO()), Operations() as operations:
        epoch()
    return operations.count


def benchmark_operations() -> None:
    """The operations of a step of training. Without a CUDA graph a GPU waits for the host once for
    each. There they are the same: the models here are not in channels_last order."""

    def bare(images, make):
        return bare_loop(LAVAE(filters=2), images.flatten(0, 1), make)

    def stage1(images, words):
        run = run_of(f"--epochs 1 --filters 2 --batch-size 128 {words}")
        model = lavae.build(vars(run))
        return lambda: train.stage1(model, images, None, run)

    print("operations a step")
    for name, epoch_of, given in (
        ("bare loop, Adam(fused)", bare, fused_adam),
        ("bare loop, AdaBelief", bare, AdaBelief),
        ("flips", stage1, ""),
        ("a turn and a flip", stage1, "--augs rotate_cw flip_lr"),
        ("as published", stage1, "--as-published"),
    ):
        # 32 images are a batch, with 128 views. The first step also makes the optimizer's tensors.
        two, three = (operations_of(epoch_of(flips(n), given)) for n in (64, 96))
        print(f"  {name:24} {three - two:8}")


def benchmark_recipe(n: int = 2048) -> None:
    """How long the paper's training takes here: 100 epochs of stage 1 and 60 of stage 2, batch 64,
    64 filters. (A pass of stage 2 encodes the same views without gradients to encoder or decoder:
    reckoned as a sixth.)"""
    images = flips(n)
    run = run_of("--recipe published --equivariance-weight 0 --filters 64 --epochs 1")
    model = lavae.channels_last(lavae.build(vars(run)))
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train.stage1(model, images, None, run)
    epoch = (time.perf_counter() - start) * 60_000 / n
    hours = (100 * epoch + 60 * epoch / 6) / 3600
    print(f"the paper's 100 + 60 epochs: 100 * {epoch:.0f} s + 60 * {epoch / 6:.0f} s", end=" ")
    print(f"= {hours:.1f} hours")


def benchmark_adabelief(filters: int, n: int = 100) -> None:
    """n steps of AdaBelief beside the authors' package and a fast Adam."""

    def stepping(make, **options):
        model = LAVAE(filters=filters)
        tensors = [*model.encoder.parameters(), *model.decoder.parameters()]
        for p in tensors:
            p.grad = torch.randn_like(p)
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = make(tensors, **options)
        return lambda: [optimizer.step() for _ in range(n)]

    print(f"{n} steps on the tensors of encoder and decoder, {filters} filters")
    theirs = stepping(adabelief_pytorch.AdaBelief, rectify=False, print_change_log=False)
    jobs = {
        "AdaBelief": stepping(AdaBelief),
        "adabelief_pytorch": theirs,
        "Adam(foreach)": stepping(torch.optim.Adam, foreach=True),
    }
    in_turn(jobs)


def benchmark_canny() -> None:
    """The memory of Canny's edges, and their time beside loops over OpenCV's and scikit-image's."""
    x = augment.load_images()[0]
    tracemalloc.start()
    augment.canny(x)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    print(f"canny on {len(x):,} images: {peak / 2**20:.0f} MiB at most,", end=" ")
    print(f"{x.nbytes / 2**20:.0f} of them the result")
    jobs = {
        "augment.canny": lambda: augment.canny(x),
        "loop over cv2.Canny": lambda: [255 - cv2.Canny(i, 100, 200, L2gradient=True) for i in x],
        "loop over skimage's": lambda: [feature.canny(i) for i in x],
    }
    in_turn(jobs, rounds=3)


def benchmark() -> None:
    """Print how fast things are."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads.", end=" ")
    print("Median seconds, in turn; then how many times as fast as the first")
    benchmark_adabelief(32)  # before `channels_last` has had a hand in the memory
    benchmark_adabelief(64)
    benchmark_operations()
    benchmark_stage1()
    benchmark_recipe()
    benchmark_canny()


if __name__ == "__main__":
    commands = {f.__name__: f for f in (benchmark, limit, certain, scale, planes, classify)}
    name, *words = sys.argv[1:] or ["benchmark"]
    commands[name](*words)
