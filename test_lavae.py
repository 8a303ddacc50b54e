"""Tests: everything made from scratch against somebody else's code, on real digits.

    python -m pytest -n 2           # against OpenCV, SciPy, adabelief-pytorch, torchvision, Pillow
    python -m pytest -m slow        # the same at length: all of MNIST, thousands of odd images
    python test_lavae.py            # no test: how fast things are, beside what they stand in for
    python test_lavae.py keep runs/seed0 flips-0    # a run's numbers, to assets/results
    python test_lavae.py limit runs/heat0/rotate_cw+flip_lr shear_x canny    # what a head could get
    python test_lavae.py tables     # README's numbers, made from there
"""

import base64
import builtins
import contextlib
import copy
import errno
import functools
import html
import http.client
import io
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import warnings
import weakref
import zlib
from collections import Counter
from pathlib import Path

import adabelief_pytorch
import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import linalg, ndimage, special
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torchvision.transforms import functional as F

import adabelief
import augment
import evaluate
import lavae
import train
from lavae import CVAE, LAVAE

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that no file registers the mark
    slow = pytest.mark.slow

# tests side by side: a thread for each, and for what it starts
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_when_asked(request):
    """Slow tests run with -m slow and not otherwise."""
    if request.node.get_closest_marker("slow") and "slow" not in request.config.getoption("-m"):
        pytest.skip("slow: run with -m slow")


@pytest.fixture(scope="module")
def data():
    """(x_train, y_train, x_test, y_test), all of MNIST."""
    return augment.load_images()


@pytest.fixture(scope="module")
def digits(data):
    """500 test images."""
    return data[2][:500]


def settings_of(*words):
    return train.Settings(**vars(train.parser_of().parse_args(words)))


def tiny_run(data, out, words, n=2000):
    """All three stages on n images with 8 filters, and the trained model: some seconds."""
    tiny = ("--preset quick --epochs 1 --filters 8 --batch-size 32 --lr 5e-3 --device cpu "
            "--overwrite")
    settings = settings_of(*f"{tiny} {words}".split(), "--out", str(out))
    out.mkdir(parents=True, exist_ok=True)
    train.begin(settings)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "MAP_STEPS", 250)  # near enough
        train.train_one(settings, data[0][:n], data[1][:n])
    return lavae.load(out)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run folder and its model, left as they are by the tests."""
    out = tmp_path_factory.mktemp("runs") / "flip_lr+flip_ud"
    return out, tiny_run(data, out,
                         "--epochs 5 --transfer-epochs 2 --equivariance-weight 100 --lr 9e-3")


# ---------------------------------------------------------------- what many tests share

SMALL = "--device cpu --filters 2 --epochs 3 --transfer-epochs 2".split()  # 13 batches an epoch
HEATMAP = "--heatmap --filters 2 --epochs 1 --transfer-epochs 1"
QUARTER = torch.tensor([[0.0, 1], [-1, 0]])  # a quarter turn of the plane, and a reflection
MIRROR = torch.diag(torch.tensor([1.0, -1]))


def load_few(data, monkeypatch):
    """Both programs load 400 training and 250 test images, and stage 2 is short."""
    images = data[0][:400], data[1][:400], data[2][:250], data[3][:250]
    for program in (train, evaluate):
        monkeypatch.setattr(program, "load_images", lambda *_, **__: images)
    monkeypatch.setattr(train, "MAP_STEPS", 20)
    return images


@pytest.fixture
def small_data(data, monkeypatch):
    return load_few(data, monkeypatch)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """The folders of finished small runs by their words, each trained once; left as they are."""
    @functools.cache
    def folder(words):
        with pytest.MonkeyPatch.context() as m:
            load_few(data, m)
            small(out := tmp_path_factory.mktemp("small") / "run", words)
        return out

    return folder


@pytest.fixture
def finished(trained, small_data, tmp_path):
    """A copy of one, for one test."""
    return shutil.copytree(trained("--no-transfer"), tmp_path / "run")


def asked(out, words=""):
    """The words of train.py for a small run in the folder `out`."""
    return [*SMALL, *words.split(), "--out", str(out)]


def small(out, words=""):
    """The model of a small run."""
    train.main(asked(out, words))
    return lavae.load(out)


@pytest.fixture
def no_figures(monkeypatch):
    """evaluate.py only measures."""
    monkeypatch.setattr(evaluate, "FIGURES", {})


@pytest.fixture
def quick_tsne(monkeypatch):
    """The real one is slow, and tested elsewhere."""
    monkeypatch.setattr(evaluate, "tsne", lambda x: x[:, :2])


def evaluated(*runs):
    """What evaluate.py writes of the first of these runs."""
    evaluate.main([*map(str, runs), "--device", "cpu"])
    return json_of(runs[0] / "evaluation.json")


def json_of(path):
    return json.loads(path.read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def models_in(folder):
    """The bytes of each model.pt."""
    return {path: path.read_bytes() for path in folder.rglob("model.pt")}


def same_bits(*models):
    a, b = (model.state_dict() for model in models)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lavae_with(augs, *maps, latent_dim=16, filters=1):
    """An untrained LAVAE with these maps, or with random ones."""
    torch.manual_seed(0)
    size = len(maps[0]) if maps else latent_dim
    model = LAVAE(augs, latent_dim=size, filters=filters).requires_grad_(False)
    for latent_map, L in zip(model.maps, maps or torch.randn(len(augs), size, size)):
        latent_map.L.copy_(L)
    return model


def few(data):
    """The first images of all: 2,000 and 500."""
    return data[0][:2000], data[1][:2000], data[2][:500], data[3][:500]


def row_of(model, data):
    """A model's row of Table I, on 500 test images."""
    x, y = data[2][:500], data[3][:500]
    return evaluate.row_of(model, evaluate.latents_of_views(model, x, y, CPU),
                           evaluate.tensors(x, model.augs, CPU))


def evaluated_run(out, model, images):
    """What figures are made from, with ten digits."""
    digits = augment.one_of_each(*images[2:])
    return evaluate.Run(out, {"lavae": model}, "mnist", images, digits, np.arange(10),
                        [*"0123456789"], CPU, 0)


def refused(main, argv, *words):
    """main ends with status 2 and one line on stderr that holds the words."""
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        with contextlib.redirect_stdout(io.StringIO()):
            main([str(word) for word in argv])
    err = said.getvalue()
    assert end.value.code == 2 and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def failing(error):
    """A function that does nothing else than to raise this."""
    def fail(*_, **__):
        raise error

    return fail


class Killed(Exception):
    """The process is gone, as far as training can see."""


def stop_at(monkeypatch, n, by=SystemExit):
    """Ctrl-C is pressed at the n-th batch from now on, or (Killed) all ends; the batches so far."""
    batches, add = [], train.Progress.add

    def count(self, *arguments):
        batches.append(1)
        if len(batches) == n:
            if by is Killed:
                raise Killed
            signal.raise_signal(signal.SIGINT)
        add(self, *arguments)

    monkeypatch.setattr(train.Progress, "add", count)
    return batches


@contextlib.contextmanager
def stopped(n, by=SystemExit):
    """What is trained in here is stopped at its n-th batch."""
    with pytest.MonkeyPatch.context() as m, pytest.raises(by) as end:
        stop_at(m, n, by)
        yield
    assert by is Killed or end.value.code == 130


# ---------------------------------------------------------------- adabelief.py


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(),
                               torch.nn.Linear(3 * 6 * 6, 5)).double()


def steps(net, optimizer, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.double)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("rectify", [False, True])
@pytest.mark.parametrize("decay, decoupled", [(0.0, True), (0.1, True), (0.1, False)])
def test_adabelief_equals_the_authors_package(decay, decoupled, rectify):
    ours, theirs = small_net(), small_net()
    a = steps(ours, adabelief.AdaBelief(ours.parameters(), lr=1e-2, weight_decay=decay,
                                        decoupled=decoupled, rectify=rectify), 200)
    b = steps(theirs, adabelief_pytorch.AdaBelief(
        theirs.parameters(), lr=1e-2, eps=1e-16, weight_decay=decay, weight_decouple=decoupled,
        rectify=rectify, print_change_log=False), 200)
    assert (a - b).abs().max() < 1e-12


def test_adabelief_by_hand():
    p = torch.tensor([1.0], dtype=torch.double, requires_grad=True)
    optimizer = adabelief.AdaBelief([p], lr=0.1, betas=(0.5, 0.75), eps=0.01)
    x, m, s = 1.0, 0.0, 0.0
    for t, g in enumerate((2.0, -1.0, 0.5), start=1):
        p.grad = torch.tensor([g], dtype=torch.double)
        optimizer.step()
        m = 0.5 * m + 0.5 * g
        s = 0.75 * s + 0.25 * (g - m) ** 2 + 0.01
        x -= 0.1 * m / (1 - 0.5 ** t) / (math.sqrt(s / (1 - 0.75 ** t)) + 0.01)
        assert p.item() == pytest.approx(x, abs=1e-14)


def test_adabelief_manners():
    net = small_net()
    first, second = [*net[0].parameters()], [*net[3].parameters()]
    optimizer = adabelief.AdaBelief([{"params": first, "lr": 0.0}, {"params": second}], lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    x = torch.randn(4, 1, 8, 8, dtype=torch.double)

    def closure():
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure).requires_grad
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 5e-3]
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
    assert changed == [False, False, True, True]
    for bad in (dict(lr=-1.0), dict(lr=math.inf), dict(lr=math.nan), dict(betas=(1.0, 0.9)),
                dict(betas=(0.9,)), dict(betas=(0.9, 0.99, 0.999)), dict(eps=math.nan),
                dict(eps=0.0),
                dict(eps=1e-46), dict(weight_decay=-1.0), dict(weight_decay=math.inf)):
        for groups, defaults in ((first, bad), ([{"params": first, **bad}], {})):
            with pytest.raises(ValueError):
                adabelief.AdaBelief(groups, **defaults)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.complex64, "sparse"])
def test_adabelief_refuses_what_it_cannot_do_before_it_changes_anything(kind):
    good = torch.ones(3, requires_grad=True)
    bad = torch.ones(3, requires_grad=True, dtype=torch.float32 if kind == "sparse" else kind)
    optimizer = adabelief.AdaBelief([{"params": [good]}, {"params": [bad], "weight_decay": 0.1}])
    good.grad = torch.ones(3)
    optimizer.step()  # without a gradient the other is as if it was not there
    before, state = good.detach().clone(), copy.deepcopy(optimizer.state_dict())
    bad.grad = torch.ones(3, dtype=bad.dtype)
    if kind == "sparse":
        bad.grad = bad.grad.to_sparse()
    with pytest.raises(TypeError, match="float32 and float64"):
        optimizer.step()
    assert torch.equal(good, before) and torch.equal(bad, torch.ones_like(bad))
    after = optimizer.state_dict()
    assert after["state"].keys() == state["state"].keys() and after["state"][0]["step"] == 1


def test_adabelief_lets_go_of_parameters_that_are_taken_out():
    net = small_net()
    optimizer = adabelief.AdaBelief(net.parameters())
    steps(net, optimizer, 1)
    gone = optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[gone]
    trace = weakref.ref(gone)
    net[0] = torch.nn.Identity()
    net[3] = torch.nn.Linear(64, 5).double()
    del gone
    optimizer.step()
    assert trace() is None


def test_adabelief_state_goes_on_with_the_same_bits():
    net, twin = small_net(), small_net()
    optimizer = adabelief.AdaBelief(net.parameters())
    steps(net, optimizer, 100)
    twin.load_state_dict(net.state_dict())
    other = adabelief.AdaBelief(twin.parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(steps(net, optimizer, 5), steps(twin, other, 5))


def test_adabelief_counts_the_steps_of_each_tensor():
    a, b = (torch.ones(2, requires_grad=True) for _ in range(2))
    together = adabelief.AdaBelief([a, b])
    for t in range(3):  # b joins at the third step: it must be treated as new
        a.grad, b.grad = torch.ones(2), torch.ones(2) if t == 2 else None
        together.step()
    alone = torch.ones(2, requires_grad=True)
    alone.grad = torch.ones(2)
    adabelief.AdaBelief([alone]).step()
    assert torch.equal(b, alone) and not torch.equal(a, b)


def test_adabelief_asks_for_no_memory_twice():
    """After the first step each operation writes to memory that is there already."""
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.extend([op] * (op.namespace == "aten"))
            return op(*args, **kwargs or {})

    net, called = small_net(), []
    optimizer = adabelief.AdaBelief(net.parameters())
    steps(net, optimizer, 1)
    with Operations():
        optimizer.step()
    assert len(called) > 5
    assert all(op._schema.name.endswith("_") or "out" in op._overloadname for op in called), called
    twin = copy.deepcopy(optimizer)  # and does not share it with a copy
    assert optimizer.scratch and not twin.scratch


# ---------------------------------------------------------------- augment.py


def test_flips_and_rotations(digits):
    f = augment.AUGMENTATIONS
    for name, reference in (("flip_lr", np.fliplr), ("flip_ud", np.flipud),
                            ("rotate_cw", lambda x: np.rot90(x, -1)), ("rotate_ccw", np.rot90)):
        assert np.array_equal(f[name](digits), np.stack([reference(x) for x in digits])), name
        order, x = 2 if "flip" in name else 4, digits
        for k in range(1, order + 1):
            x = f[name](x)
            assert np.array_equal(x, digits) == (k == order), (name, k)
    half_turn = f["rotate_cw"](f["rotate_cw"](digits))
    assert np.array_equal(f["flip_lr"](f["flip_ud"](digits)), half_turn)
    assert np.array_equal(f["rotate_ccw"](f["rotate_cw"](digits)), digits)
    assert f["rotate_cw"](digits[:, :9]).shape == (len(digits), 28, 9)


def odd_images(n, seed=0):
    """n arrays of uint8 images of all kinds, 3x3 to 64x64: what canny must not stumble over."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        height, width = rng.integers(3, 65, 2)
        noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
        ramp = np.add.outer(np.arange(height) * rng.integers(0, 9),
                            np.arange(width) * rng.integers(0, 9))
        point = np.zeros_like(noise)
        point[rng.integers(height), rng.integers(width)] = 255
        yield (noise, cv2.GaussianBlur(noise, (5, 5), 1.5), (ramp % 256).astype(np.uint8),
               np.full_like(noise, rng.integers(256)), point)[k % 5][None]


@pytest.mark.parametrize("n", [100, pytest.param(2000, marks=slow)])
def test_canny_is_opencvs(n, data, digits):
    """On n odd images and on digits, in the slow test on all."""
    for images in (digits if n == 100 else np.concatenate([data[0], data[2]]), *odd_images(n)):
        for low, high in ((100, 200), (0, 0), (50, 150), (200, 100)):
            expected = np.stack([cv2.Canny(x, low, high, apertureSize=3, L2gradient=True)
                                 for x in images])
            ours = augment.canny(images, low, high)
            assert np.array_equal(ours, 255 - expected), (images.shape, low)


def test_shear_is_an_exact_bilinear_resampling(digits):
    other = np.random.default_rng(0).integers(0, 256, (20, 11, 30), dtype=np.uint8)
    for images, degrees in ((digits[:50], -47.5), (digits[:50], 20.0), (other, -47.5)):
        t, c = math.tan(math.radians(degrees)), (images.shape[1] - 1) / 2
        for image, sheared in zip(images, augment.shear_x(images, degrees)):
            expected = ndimage.affine_transform(image.astype(np.float64), [[1, 0], [t, 1]],
                                                [0, -t * c],
                                                order=1, mode="grid-constant")
            assert np.abs(expected - sheared).max() <= 0.501
    expected = F.affine(torch.from_numpy(digits).double(), 0, [0, 0], 1, [-47.5, 0],
                        F.InterpolationMode.BILINEAR)
    assert np.abs(expected.numpy() - augment.shear_x(digits)).max() <= 0.501


def test_blur_edges_and_miniature_against_libraries(digits):
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], float)
    same = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], float)
    other = np.random.default_rng(0).integers(0, 256, (20, 17, 40), dtype=np.uint8)

    def error(ours, f, images):
        return np.abs(ours.astype(float) - np.stack([f(x) for x in images])).max()

    for x in (digits, other):
        assert error(augment.gaussian_blur(x), lambda i: ndimage.gaussian_filter(
            i.astype(float), 1, mode="mirror", radius=3), x) <= 0.501
        for alpha in (1.0, 0.4):
            assert error(augment.edge_detect(x, alpha), lambda i: cv2.filter2D(
                i, -1, alpha * kernel + (1 - alpha) * same), x) <= 1
        mini = augment.mini_image(x)
        assert error(mini[:, :8, :8], lambda i: np.asarray(Image.fromarray(i).resize(
            (8, 8), Image.Resampling.BILINEAR), float), x) <= 1
        assert np.array_equal(mini[:, 8:], x[:, 8:]) and np.array_equal(mini[:, :, 8:], x[:, :, 8:])


def test_noises_have_their_place_and_their_moments(data):
    images = np.zeros((2000, 28, 28), np.uint8)
    images[:, 27, 27] = np.arange(2000) % 200  # 200 images, ten times each
    images[:, 27, 26] = 1
    corner, spread = augment.tl_sap_noise(images), augment.sap_noise(images)
    assert (np.array_equal(corner[:, 7:], images[:, 7:])
            and np.array_equal(corner[:, :, 7:], images[:, :, 7:]))
    noise = corner[:200, :7, :7]
    assert noise.mean() == pytest.approx(127.5, abs=1.5) and noise.std() == pytest.approx(32, abs=1)
    noise = spread[:200, :27]
    assert (noise > 0).mean() == pytest.approx(0.2, abs=0.004)
    assert noise[noise > 0].mean() == pytest.approx(127.5, abs=0.5)
    assert noise[noise > 0].std() == pytest.approx(16, abs=0.3)
    for f in (augment.tl_sap_noise, augment.sap_noise):
        assert np.array_equal(f(images), f(images))
        assert not np.array_equal(f(images), f(images, seed=1))
        out = f(images)
        assert np.array_equal(out[:200], out[200:400])  # a function of the image, not of its place
        assert np.array_equal(f(images[7:9]), out[7:9])
        assert len(np.unique(out[:200, :27, :27], axis=0)) == 200  # another for each
    train_noise, test_noise = (augment.tl_sap_noise(x[:50])[:, :7, :7] for x in (data[0], data[2]))
    assert not (train_noise == test_noise).all((1, 2)).any()
    x = data[2][:9]  # what is not noise is as it was
    assert (((augment.sap_noise(x) != x).mean((1, 2)) < 0.3).all()
            and (augment.sap_noise(x) == x).mean() > 0.75)


def test_augmentations_have_manners(digits):
    for name, f in augment.AUGMENTATIONS.items():
        before = digits.copy()
        out = f(digits)
        assert (np.array_equal(before, digits) and out.dtype == np.uint8
                and out.shape == digits.shape), name
        assert not np.array_equal(out, digits), name
        assert not np.shares_memory(out, digits), name
        assert f(digits[:0]).shape == (0, 28, 28), name
        with pytest.raises(TypeError, match="uint8"):
            f(digits.astype(np.float32))
        with pytest.raises(ValueError, match=r"\(N, H, W\)"):
            f(digits[0])
        for empty in (digits[:, :0], digits[:, :, :0], digits[:0, :, :0]):
            with pytest.raises(ValueError, match="not 0"):
                f(empty)
        assert f(digits[:2, :5, :3]).shape in ((2, 5, 3), (2, 3, 5)), name
    with pytest.raises(ValueError, match="3x3"):
        augment.canny(digits[:, :2])


@pytest.mark.parametrize("f, bad", [
    (augment.gaussian_blur, (0, -1, math.nan, math.inf)), (augment.mini_image, (0, -3)),
    (augment.edge_detect, (-0.1, 1.1, math.nan)), (augment.shear_x, (90, -90, math.nan, math.inf)),
    (augment.canny, (math.nan,))])
def test_values_at_the_edge_of_an_augmentation_are_right_or_refused(f, bad, digits):
    for value in bad:
        with pytest.raises(ValueError, match="expected"):
            f(digits[:3], value)
    x = digits[:20]
    assert np.array_equal(augment.gaussian_blur(x, 1e-3), x)
    assert np.array_equal(augment.edge_detect(x, 0), x) and np.array_equal(augment.shear_x(x, 0), x)
    assert np.array_equal(augment.mini_image(x, 28), x)
    assert augment.mini_image(x, 1)[0, 0, 0] == pytest.approx(x[0].mean(), abs=x[0].mean())


def test_augment_writes_its_picture(tmp_path):
    augment.main(["--augs", "shear_x", "canny", "--out", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as page:
        assert page.size[0] > 10 * 64 and page.size[1] > 13 * 64
    refused(augment.main, ["--augs", "nope"], "nope", "canny")
    refused(augment.main, ["--out", tmp_path / "none" / "a.png"], "a.png", "another folder")
    refused(augment.main, ["--out", tmp_path / "a.what"], "a.what", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_views_double_and_are_named_in_the_order_of_application(digits):
    cw, lr = augment.rotate_cw, augment.flip_lr
    views = augment.all_views(digits, ["rotate_cw", "flip_lr"])
    assert augment.view_names(["rotate_cw", "flip_lr"]) == ["orig", "rotate_cw", "flip_lr",
                                                            "rotate_cw+flip_lr"]
    for view, expected in zip(views, (digits, cw(digits), lr(digits), lr(cw(digits)))):
        assert np.array_equal(view, expected)
    assert not np.array_equal(views[-1], cw(lr(digits)))  # here the order matters
    assert augment.view_names("abc")[5:] == ["a+c", "b+c", "a+b+c"]


def test_grid_puts_every_image_in_its_place(digits):
    page = augment.grid("Title", ["a", "b", "c"],
                        [("row", digits[:3]), None, ("long label", digits[3:6])],
                        cell=28)
    pixels = np.asarray(page.convert("L"))
    left = pixels.shape[1] - 24 - 3 * 28 - 2 * 6
    for k, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        y, x = 108 + row * (28 + 6 + 18), left + column * (28 + 6)
        assert np.array_equal(pixels[y:y + 28, x:x + 28], digits[k]), k
    border = np.concatenate([pixels[:20].ravel(), pixels[-20:].ravel(), pixels[:, :20].ravel()])
    assert border.min() == 255  # no text runs out of the page


# ---------------------------------------------------------------- lavae.py


def test_losses_against_closed_forms():
    generator = torch.Generator().manual_seed(0)
    mu, logvar = torch.randn(2, 7, 16, generator=generator).double()
    q = torch.distributions.Normal(mu, (logvar / 2).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    expected = torch.distributions.kl_divergence(q, prior).sum(1).mean()
    assert lavae.kl(mu, logvar).item() == pytest.approx(expected.item(), rel=1e-12)
    p = torch.rand(5, 28, 28, generator=generator).double()
    x = torch.rand(5, 28, 28, generator=generator).double()
    expected = -(x * p.log() + (1 - x) * (1 - p).log()).sum((1, 2)).mean()
    assert lavae.bce(p.logit(), x).item() == pytest.approx(expected.item(), rel=1e-10)


def test_sample_has_the_posteriors_mean_and_variance():
    mu, logvar = torch.full((200_000, 1), 3.0), torch.full((200_000, 1), math.log(0.25))
    z = lavae.sample(mu, logvar, torch.Generator().manual_seed(0))
    assert (z.mean().item() == pytest.approx(3, abs=0.01)
            and z.std().item() == pytest.approx(0.5, abs=0.01))


def test_the_papers_architecture():
    model = LAVAE(transfers=[["shear_x", "canny"]])
    count = {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children()}
    conv = 64 * 16 + 64 + 128 * 64 * 16 + 128
    assert count["encoder"] == conv + 128 * 49 * 32 + 32
    assert count["decoder"] == 16 * 128 * 49 + 128 * 49 + 128 * 64 * 16 + 64 + 64 * 16 + 1
    assert count["maps"] == 2 * 16 * 16
    mu, logvar = model.encoder(torch.rand(3, 28, 28))
    assert mu.shape == logvar.shape == (3, 16)
    for decoder in (model.decoder, model.heads["shear_x+canny"]):
        assert decoder(mu).shape == (3, 28, 28)


def test_a_gated_layer_multiplies():
    """(z A + a) * gelu(z B + b), where gelu(x) is x times the normal distribution's Phi(x)."""
    torch.manual_seed(0)
    layer, z = lavae.GEGLU(16, 24).double(), torch.randn(50, 16).double()
    value, gate = (z @ p.T + q for p, q in zip(layer.linear.weight.chunk(2),
                                               layer.linear.bias.chunk(2)))
    erf = torch.from_numpy(special.erf(gate.detach().numpy() / math.sqrt(2)))
    expected = value * gate * (1 + erf) / 2
    assert layer(z).shape == (50, 24) and torch.allclose(layer(z), expected, rtol=1e-12, atol=1e-14)


def test_map_error_is_the_error_over_the_data():
    generator = torch.Generator().manual_seed(0)
    z, z_i = torch.randn(2, 1000, 16, generator=generator)
    L = torch.randn(16, 16, generator=generator)
    expected = (z @ L - z_i).square().mean()
    got = lavae.map_error(L.double(), *lavae.moments(z, z_i))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_least_squares_equivariance_loss_and_its_gradient():
    generator = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, 64, 8, generator=generator, dtype=torch.double)
    M = torch.randn(8, 8, generator=generator, dtype=torch.double)
    assert lavae.least_squares_equivariance_loss(z, z @ M, z) < 1e-4
    loss = lavae.least_squares_equivariance_loss
    assert loss(z, noise, noise).item() == pytest.approx(2 * loss(z, noise).item())
    z_i = (z @ M + noise).requires_grad_()
    z.requires_grad_()
    expected = (z @ torch.linalg.lstsq(z, z_i).solution - z_i).square().mean()
    assert loss(z, z_i).item() == pytest.approx(expected.item(), rel=1e-3)
    for ours, theirs in zip(torch.autograd.grad(loss(z, z_i), (z, z_i)),
                            torch.autograd.grad(expected, (z, z_i))):
        assert torch.allclose(ours, theirs, atol=2e-2 * theirs.abs().max())


@pytest.fixture(scope="module")
def known_maps():
    """A flip, a cyclic shift of order 4, a quarter turn and a rotation by any angle, (8, 8), with
    their orders."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.double)).Q
    shift, angle = torch.roll(torch.eye(4), 1, 0), torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    parts = [(torch.diag(torch.tensor([1.0, 1, 1, 1, 1, -1, -1, -1])), 2),
             (torch.block_diag(shift, shift), 4),
             (torch.block_diag(QUARTER, QUARTER, QUARTER, MIRROR), 4),
             (torch.block_diag(angle, QUARTER, angle, torch.eye(2)), None)]
    return [(basis @ part.double() @ basis.T, order) for part, order in parts]


@pytest.mark.parametrize("images", [200, 20, 5])
def test_the_maps_of_a_batch_keep_lengths_and_come_back(images, known_maps):
    generator, unit = torch.Generator().manual_seed(images), torch.eye(8, dtype=torch.double)
    for part, order in known_maps:
        z, z_i = torch.randn(2, images, 8, generator=generator, dtype=torch.double)
        C, again = z.T @ z_i, lavae.procrustes(z.T @ z_i, None)
        Q = lavae.procrustes(C, order)
        # then some are shorter
        assert torch.allclose(Q @ Q.T, unit, atol=1e-6) or images == 5 and order is None
        assert order is None or torch.allclose(torch.linalg.matrix_power(Q, order), unit, atol=1e-6)
        assert order != 2 or torch.allclose(Q, Q.T, atol=1e-12)
        if images > 8:
            expected, _ = linalg.polar(C.numpy())
            assert np.allclose(lavae.polar(C), expected, atol=1e-9)
            assert np.allclose(again, expected, atol=2e-3)
            noisy = z @ part + 0.1 * torch.randn(images, 8, generator=generator, dtype=torch.double)
            assert torch.allclose(lavae.procrustes(z.T @ noisy, order), part, atol=0.2)
    assert not lavae.procrustes(torch.zeros(8, 8), 4).isnan().any()


def test_the_equivariance_losss_gradient_is_that_of_the_constrained_minimum(known_maps):
    """Q is a constant of the step: at its best the error's slope in Q is 0. Held against finite
    differences."""
    generator = torch.Generator().manual_seed(0)
    for part, order in (known_maps[0], known_maps[3]):  # for other orders Q is only nearly the best
        z, noise = torch.randn(2, 40, 8, generator=generator, dtype=torch.double)
        z_i = (z @ part + 0.3 * noise).requires_grad_()
        z.requires_grad_()
        value = lavae.equivariance_loss(torch.stack([z, z_i]), [order])
        gradients = torch.autograd.grad(value, (z, z_i))
        for k, step in enumerate(torch.randn(6, 40, 8, generator=generator,
                                             dtype=torch.double) * 1e-4):
            with torch.no_grad():
                a, b = (lavae.equivariance_loss(torch.stack([z + s * step * (k < 3),
                                                             z_i + s * step * (k > 2)]), [order])
                        for s in (1, -1))
            assert ((a - b) / 2).item() == pytest.approx((gradients[k > 2] * step).sum().item(),
                                                         rel=0.02)


def test_a_map_is_asked_to_do_the_same_to_every_view_that_it_comes_after(known_maps):
    generator = torch.Generator().manual_seed(0)
    (half, _), (quarter, _) = known_maps[0], known_maps[2]
    z = torch.stack(augment.views(torch.randn(40, 8, generator=generator, dtype=torch.double),
                                  [lambda z: z @ half, lambda z: z @ quarter]))
    orders = [2, 4]
    assert lavae.equivariance_loss(z, orders) < 1e-6
    z[3] = z[1] @ quarter.T  # what is mirrored turns the other way: no pair of originals says so
    assert (lavae.equivariance_loss(z, orders) > 0.1
            and lavae.equivariance_loss(z[:3], orders[:1]) < 1e-6)
    model = LAVAE(["flip_lr", "rotate_cw"], filters=1)
    latents = torch.randn(4, 40, 16, generator=generator, requires_grad=True)
    model.equivariance_loss(latents).backward()
    assert (latents.grad.abs().sum((1, 2)) > 0).all()
    model.orders = orders
    lavae.set_joint(model, "signs")  # Eq. 6 with the model's maps: of originals alone
    model.equivariance_loss(latents := latents.detach().requires_grad_()).backward()
    assert (latents.grad[:3].abs().sum((1, 2)) > 0).all() and not latents.grad[3].any()


def test_the_first_map_comes_first():
    model = lavae_with(["rotate_cw", "flip_lr"], QUARTER, MIRROR)
    z = torch.tensor([[1.0, 2.0]])
    quarter, mirrored = torch.tensor([[-2.0, 1.0]]), torch.tensor([[-2.0, -1.0]])
    views = augment.views(z, model.maps)
    assert torch.equal(views[1], quarter) and torch.equal(views[3], mirrored)
    assert torch.equal(model.to_view(z, 3), mirrored) and torch.equal(model.to_view(z, 0), z)
    assert torch.allclose(model.from_view(mirrored, 3), z)
    assert torch.allclose(model.from_view(quarter, 1), z)
    assert torch.equal(evaluate.reverse(model, z), torch.tensor([[2.0, 1.0]]))


def test_the_papers_cvae():
    for condition, width in (("view", 4), ("digit", 10), ("both", 14), ("paired", 2)):
        model = CVAE(condition=condition)
        conv = 64 * 16 + 64 + 128 * 64 * 16 + 128
        count = sum(p.numel() for p in model.encoder.parameters())
        assert count == conv + (128 * 49 + width) * 32 + 32
        assert model.decoder.linear.in_features == 16 + width
        labels, z = torch.tensor([3, 9]), torch.zeros(2, 16)
        told = [model.to_view(z, v, labels)[:, 16:] for v in range(4)]
        if condition == "paired":
            assert [t[0].tolist() for t in told] == [[0, 0], [1, 0], [0, 1], [1, 1]]
        if condition in ("view", "both"):
            assert [t[1, :4].argmax().item() for t in told] == [0, 1, 2, 3]
        if model.by_digit:
            assert [t[:, -10:].argmax(1).tolist() for t in told] == [[3, 9]] * 4


@pytest.mark.parametrize("condition", ["view", "digit", "both", "paired"])
def test_a_cvae_is_told_of_each_image_what_is_true_of_it(condition, monkeypatch):
    """Row by row: what the encoder is told, whose latents the decoder gets, what it is told."""
    monkeypatch.setattr(lavae, "sample", lambda mu, logvar, noise: mu)
    model, labels, n = CVAE(condition=condition, filters=2), torch.tensor([7, 1, 4]), 3
    x = torch.rand(len(model.stage1_views), n, 28, 28)
    seen, drawn = [], []
    model.encoder.register_forward_hook(lambda _, args, out: seen.extend(zip(*args, out[0])))
    model.decoder.register_forward_hook(lambda _, args, out: drawn.extend(args[0]))
    model(x, None, labels)

    def told(view, image):
        code = [float(w == view) for w in range(4)] if condition in ("view", "both") else []
        code += [float(view >> i & 1) for i in range(2)] if condition == "paired" else []
        digit = [float(d == labels[image]) for d in range(10)]
        return code + digit * (condition in ("digit", "both"))

    for row, (picture, code, mu) in enumerate(seen):
        view, image = divmod(row, n)
        assert (torch.equal(picture, x[view, image])
                and code.tolist() == told(model.stage1_views[view], image))
    assert (len(seen) == (n if condition == "paired" else 4 * n)
            and len(drawn) == len(model.stage1_views) * n)
    for row, z in enumerate(drawn):
        view, image = divmod(row, n)
        mu = seen[image if condition == "paired" else row][2]
        assert torch.equal(z[:16], mu) and z[16:].tolist() == told(model.stage1_views[view], image)


def test_mmd_is_the_distance_of_two_clouds():
    generator = torch.Generator().manual_seed(0)

    def distance(mean, sd, n=400, d=4):
        mu = torch.full((n, d), mean)
        return lavae.mmd(mu, torch.full((n, d), 2 * math.log(sd)), generator).item() / 1000

    def mean_kernel(mean, variance, d=4):  # E exp(-|a - b|^2 / d) where a - b ~ N(mean, variance I)
        return ((1 + 2 * variance / d) ** -0.5 * math.exp(-mean ** 2 / (d + 2 * variance))) ** d

    for mean, sd in ((0.0, 1.0), (1.0, 1.0), (2.0, 0.1)):
        expected = mean_kernel(0, 2 * sd ** 2) + mean_kernel(0,
                                                             2) - 2 * mean_kernel(mean, 1 + sd ** 2)
        assert distance(mean, sd) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_everything_has_the_dtype_of_the_weights(dtype, run, digits):
    model, x = lavae.load(run[0]).to(dtype), torch.from_numpy(digits[:9])
    exact = {torch.float64: 1e-5, torch.bfloat16: 0.2}[dtype]
    scaled = lavae.pixels(x)
    for words in (("augment", "flip_lr"), ("convert", "flip_lr", "flip_ud"),
                  ("power", "flip_ud", 0.5)):
        if dtype == torch.bfloat16 and words[0] == "power":
            continue  # no device has eigenvalues of such
        ours, float32s = (getattr(m, words[0])(lavae.pixels(x, m.encoder.dtype), *words[1:])
                          for m in (model, run[1]))
        assert ours.dtype == dtype and torch.allclose(ours.float(), float32s, atol=exact), words
    z = model.encode(x)
    assert z.dtype == model.from_view(z, 3).dtype == lavae.sample(z, z).dtype == dtype
    assert (torch.allclose(z.float(), run[1].encode(x), atol=10 * exact)
            and scaled.dtype == torch.float32)
    assert evaluate.nats(model.decoder, z, x) == pytest.approx(
        evaluate.nats(run[1].decoder, z.float(), x), rel=0.02)
    cvae = CVAE(condition="both", filters=1).to(dtype)
    labels = torch.arange(9)
    assert cvae.to_view(cvae.encode(x, 1, labels), 2, labels).dtype == dtype
    noise = torch.Generator().manual_seed(0)
    images = torch.from_numpy(np.stack(augment.all_views(digits[:64], ["flip_lr"])))
    if dtype == torch.float64:  # it is trained like others
        double = LAVAE(["flip_lr"], filters=1, latent_dim=4).double()
        row, = train.stage1(double, images)
        assert (math.isfinite(row["loss"])
                and double.maps[0](double.encode(images[0])).dtype == dtype)
    assert lavae.sample(z.half(), z.half(), noise).dtype == torch.float16


@pytest.mark.parametrize("words", ["--joint identity", "--paper-involution", "--joint signs", ""])
def test_a_copy_of_a_model_learns_by_itself(words):
    """deepcopy, pickle and an average of weights: each asks for its own maps, not the first
    one's."""
    model = train.build(settings_of(*words.split(), "--filters", "1", "--no-transfer"))
    z = torch.randn(4, 40, 16)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
                  torch.optim.swa_utils.AveragedModel(model).module):
        assert other.equivariance_loss(z).item() == model.equivariance_loss(z).item()
        with torch.no_grad():
            other.maps[0].L += 1.0
        changed = other.equivariance_loss(z).item() != model.equivariance_loss(z).item()
        assert changed == ("joint" in words)
        if changed:
            other.equivariance_loss(z).backward()
            assert other.maps[0].L.grad is not None and model.maps[0].L.grad is None


def test_checkpoint_round_trip(run, tmp_path):
    out, model = run
    lavae.save(model, tmp_path / "model.pt", model.settings)
    again = lavae.load(tmp_path / "model.pt")
    assert again.settings == model.settings and again.augs == ["flip_lr", "flip_ud"]
    assert same_bits(again, model) and names_in(tmp_path) == ["model.pt"]
    torch.load(out / "model.pt", weights_only=True)


# ---------------------------------------------------------------- train.py


def maps_of(z, *targets, augs=("flip_lr", "flip_ud"), involution_weight=1.0,
            paper_involution=False):
    """What stage 2 learns from z and its targets."""
    augs = augs[:len(targets)]
    model = LAVAE(augs, latent_dim=z.shape[1], filters=1)
    model.orders = train.orders_of(augs, paper_involution)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(train, "MAP_STEPS", 500)  # near enough
        train.stage2(model, [z, *targets], involution_weight)
    return [latent_map.L.detach() for latent_map in model.maps]


def test_stage2_without_involution_is_least_squares(run, digits):
    _, model = run
    images = augment.all_views(digits, model.augs)[:3]
    z, *targets = (model.encode(torch.from_numpy(v)) for v in images)
    for L, z_i in zip(maps_of(z, *targets, involution_weight=0.0), targets):
        expected = torch.linalg.lstsq(z.double(), z_i.double(), driver="gelsd").solution.float()
        assert torch.allclose(L, expected, atol=1e-3)


def test_stage2_finds_a_known_rotation_and_a_known_involution():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    signs = torch.tensor([1.0, -1, 1, -1, -1, 1])
    turn = torch.block_diag(*(torch.tensor([[math.cos(a), math.sin(a)],
                                            [-math.sin(a), math.cos(a)]])
                              for a in (0.3, 1.2, 2.5)))
    rotation, involution = basis @ turn @ basis.T, basis @ torch.diag(signs) @ basis.T
    z = torch.randn(5000, 6, generator=generator)
    noise = 0.2 * torch.randn(5000, 6, generator=generator)
    L_rotation, = maps_of(z, z @ rotation, involution_weight=0.0)
    assert torch.allclose(L_rotation, rotation, atol=1e-3)
    plain, = maps_of(z, 0.9 * z @ involution + noise, involution_weight=0.0)
    L, = maps_of(z, 0.9 * z @ involution + noise, involution_weight=1.0)
    assert lavae.order_error(L, 2) < 1e-3 < lavae.order_error(plain, 2)
    assert torch.allclose(L, involution, atol=0.05)


def test_stage2_finds_a_known_quarter_turn():
    """Of order 4: the paper's k = 2 cannot have it, k = 4 finds it in shrunk and noisy latents."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    turn = basis @ torch.block_diag(QUARTER, QUARTER, MIRROR) @ basis.T
    z = torch.randn(5000, 6, generator=generator)
    pairs = z, 0.9 * z @ turn + 0.2 * torch.randn(5000, 6, generator=generator)
    free, = maps_of(*pairs, augs=["rotate_cw"], involution_weight=0.0)
    L, = maps_of(*pairs, augs=["rotate_cw"])
    flat, = maps_of(*pairs, augs=["rotate_cw"], paper_involution=True)
    assert lavae.order_error(L, 4) < 1e-3 < lavae.order_error(free, 4)
    assert torch.allclose(L, turn, atol=0.05) and not torch.allclose(flat, turn, atol=0.5)
    assert lavae.order_error(flat, 2) < 0.5 < lavae.order_error(turn, 2)


def test_the_order_of_each_map():
    for L, order, expected in ((QUARTER, 4, 0), (QUARTER, 2, 8), (2 * torch.eye(2), 2, 18),
                               (QUARTER, None, 0), (2 * torch.eye(2), None, 18 / 100)):
        assert lavae.order_error(L, order).item() == pytest.approx(expected)
    halves = lavae.NonlinearMap(2, (3,))
    z = torch.randn(50, 2)
    assert halves.order_error(4, z).item() == pytest.approx(
        (z - halves(halves(halves(halves(z))))).square().sum(1).mean().item())
    assert halves.order_error(None, z) == 0
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for name, function in augment.AUGMENTATIONS.items():
        again = [x]
        for _ in range(8):
            again.append(function(again[-1]))
        back = [k for k in range(1, 9) if np.array_equal(again[k], x)]
        assert back[:1] == [augment.ORDERS[name]] if name in augment.ORDERS else not back, name
    assert train.orders_of(["rotate_cw", "flip_lr", "canny"]) == [4, 2, None]
    assert train.orders_of(["rotate_cw", "canny"], paper_involution=True) == [2, 2]


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_names_views_and_products_agree(k, digits):
    """View v by its name, by its bits, and as images: the same for K = 1 to 4."""
    augs = ["shear_x", "flip_ud", "rotate_cw", "mini_image"][:k]
    model = lavae_with(augs, latent_dim=5)
    names, z = augment.view_names(augs), torch.randn(4, 5)
    images, latents = augment.all_views(digits[:4], augs), augment.views(z, model.maps)
    assert len(names) == len(set(names)) == len(images) == len(latents) == 2 ** k
    for v, name in enumerate(names):
        x, product = digits[:4], torch.eye(5)
        for word in name.split("+") if v else []:
            x, product = augment.AUGMENTATIONS[word](x), product @ model.maps[augs.index(word)].L
        assert np.array_equal(images[v], x), name
        for z_v in (latents[v], model.to_view(z, v)):
            assert torch.allclose(z_v, z @ product, rtol=1e-3, atol=1e-4), name
        assert torch.allclose(model.from_view(latents[v], v), z, atol=1e-2), name
    assert (len(train.original_and_singles(names)) == 1 + k
            and train.original_and_singles(names)[1:] == augs)


def test_one_cycle_rises_and_falls():
    shares = np.linspace(0, 1, 1001)
    rates = np.array([train.one_cycle(t) for t in shares])
    assert rates.argmax() == 250 and rates.max() == 1 and rates[0] == 0 and rates[-1] < 1e-6
    assert (np.diff(rates[:251]) > 0).all() and (np.diff(rates[250:]) < 0).all()


def test_a_short_run_learns_all_three_stages(run, data, digits):
    out, model = run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["filters"] == 8 and metrics["seconds"] > 0
    made = metrics["made"]
    assert (made["torch"], made["device"], made["threads"]) == (torch.__version__, "cpu",
                                                                torch.get_num_threads())
    assert [*metrics["history"]] == ["stage 1", "stage 2", "stage 3, shear_x+canny"]
    losses = [row["loss"] for row in metrics["history"]["stage 1"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    first, *_, last = metrics["history"]["stage 1"]
    weight = (last["loss"] - last["bce"] - last["kl"]) / last["equivariance"]
    assert 200 < weight < 300  # it grows
    given = {"bce": 3.0, "kl": 2.0, "equivariance": 100.0}
    assert train.weights_at(0.03125, given) == {"bce": 3.0, "kl": 1.25, "equivariance": 0.29296875}
    assert train.weights_at(1.0, {"bce": 3.0, "kl": 2.0}) == {"bce": 3.0, "kl": 2.0}  # a CVAE's
    assert train.weights_at(0.25, given) == {"bce": 3.0, "kl": 2.0, "equivariance": 18.75}
    assert last["bce"] < first["bce"] and last["equivariance"] < 0.1
    torch.manual_seed(0)
    untrained = evaluate.measure(LAVAE(transfers=[["shear_x", "canny"]], filters=8), few(data), CPU)
    trained = evaluate.measure(model, few(data), CPU)
    assert trained["lavae"]["total"] < 0.4 * untrained["lavae"]["total"]
    after, before = (one["transfer"]["shear_x+canny"]["total"] for one in (trained, untrained))
    assert after < 0.7 * before
    assert max(trained["lavae"]["order_error"].values()) < 1e-3
    # An augmented view comes from the original: without its map it would come out much worse.
    names, images = augment.view_names(model.augs), augment.all_views(digits, model.augs)
    z = model.encode(torch.from_numpy(digits))
    for name, view in list(zip(names, images))[1:]:
        assert trained["lavae"][name] < 0.8 * evaluate.nats(model.decoder, z,
                                                            torch.from_numpy(view))


def test_the_equivariance_loss_sees_more_images_than_a_map_can_fit(small_data, tmp_path,
                                                                   monkeypatch):
    """d images and d latents: some matrix fits them all, whatever they are."""
    generator = torch.Generator().manual_seed(0)
    few, more = (lavae.least_squares_equivariance_loss(*torch.randn(2, n, 16, generator=generator))
                 for n in (16, 32))
    assert few < 0.3 < more
    seen, loss, sizes, bce = [], lavae.equivariance_loss, [], lavae.bce
    monkeypatch.setattr(lavae, "equivariance_loss", lambda z, orders: (
        seen.append(z.shape[1]) or loss(z, orders)))
    monkeypatch.setattr(train, "bce", lambda logits, x: sizes.append(len(x)) or bce(logits, x))
    words = "--augs flip_lr flip_ud rotate_cw --batch-size 40 --epochs 1 --overwrite"
    small(tmp_path, words)
    assert set(seen) == {32, 400 % 32} and set(sizes) == {8 * 32, 8 * (400 % 32)}
    sizes.clear()
    small(tmp_path, f"{words} --equivariance-weight 0")
    assert set(sizes) == {40} and len(seen) == 13


def test_same_seed_same_bits(small_data, tmp_path):
    def model(name, words):
        model = small(tmp_path / name, words)
        torch.rand(17)  # whatever else is drawn
        return model

    a = model("a", "--seed 3")
    b = model("b", "--seed 3 --transfer shear_x canny")
    c = model("c", "--seed 4 --no-transfer")
    assert same_bits(a, b)
    assert not torch.equal(a.encoder.conv1.weight, c.encoder.conv1.weight)


def test_the_papers_involution_asks_for_least_squares_maps(small_data, tmp_path, monkeypatch):
    words, seen = "--augs rotate_cw flip_lr --no-transfer", []
    loss = lavae.least_squares_equivariance_loss
    monkeypatch.setattr(lavae, "least_squares_equivariance_loss",
                        lambda *z: seen.append(len(z)) or loss(*z))
    ours = small(tmp_path / "a", words)
    assert not seen
    paper = small(tmp_path / "b", f"{words} --paper-involution")
    assert {*seen} == {3}
    assert not torch.equal(ours.encoder.linear.weight, paper.encoder.linear.weight)


@pytest.mark.parametrize("augs", ["rotate_cw", "flip_lr rotate_cw shear_x"])
def test_one_augmentation_and_three(augs, small_data, tmp_path):
    targets = " ".join(augs.split()[::-1])
    model = small(tmp_path, f"--epochs 1 --transfer-epochs 1 --augs {augs} --transfer {targets}")
    one, names = evaluated_run(tmp_path, model, small_data), augment.view_names(augs.split())
    assert [*one.result["lavae"]["direct"]] == names
    assert [*one.result["transfer"][targets.replace(" ", "+")]] == [
        *augment.view_names(targets.split()), "total", "correctly_classified", "wrongly_classified"]
    slow_ones = {"fig10_projections", "partial_moving", "traversals", "sampling"}  # drawn elsewhere
    quick_ones = {name: f for name, f in evaluate.FIGURES.items() if name not in slow_ones}
    lacking = evaluate.draw_figures(one, quick_ones)
    assert {why.split()[0] for why in lacking} - {"group_elements"} == {
        "fig8_cvae", "fig9_paired_cvae", "table1", "latent_plane", "training_moving"}
    assert ("group_elements needs" in " ".join(lacking)) == ("shear_x" in augs)


@pytest.mark.parametrize("n, words", [
    (1000, "--model cvae"), (1000, "--model cvae --condition digit"),
    (1000, "--model cvae --condition both"), (1000, "--model cvae-paired"), (1000, "--model vae"),
    (1000, "--latent-map mlp --no-transfer"), (1000, "--latent-map mlp-wide --no-transfer"),
    (1000, "--joint identity --no-transfer"), (2000, "--joint signs --no-transfer"),
    (2000, "--prior-loss mmd --no-transfer")])
def test_baselines_and_ablations_learn(n, words, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MLP_EPOCHS", 2)
    settings = settings_of(*words.split(), "--filters", "8", "--device", "cpu")
    torch.manual_seed(0)
    before = train.build(settings)
    after = tiny_run(data, tmp_path, words, n)
    rows = [row_of(m, data) for m in (before, after)]
    key = "total" if settings.model != "cvae" and not settings.joint else "orig"
    assert rows[1][key] < 0.6 * rows[0][key]
    if "mlp" in words:  # stage 2 has learnt, too
        z, *others = (after.encode(torch.from_numpy(v))
                      for v in augment.all_views(data[0][:n], after.augs)[:3])
        for f, z_i in zip(after.maps, others):
            assert (f(z) - z_i).square().mean() < 0.5 * z_i.var()


def test_the_joint_lesson(data, tmp_path):
    """From the identity the signs of the eigenvalues never change, and a blur has to fit all
    views."""
    words = "--no-transfer --epochs 4 --equivariance-weight 30 --lr 9e-3 --joint"
    stuck, free = (tiny_run(data, tmp_path / start, f"{words} {start}")
                   for start in ("identity", "signs"))
    assert evaluate.group(stuck)["directions"] == {"++": 16, "+-": 0, "-+": 0, "--": 0}
    assert evaluate.group(free)["directions"] == {"++": 4, "+-": 4, "-+": 4, "--": 4}
    totals = [row_of(m, data)["total"] for m in (stuck, free)]
    assert totals[1] < 0.9 * totals[0], totals


def test_the_paired_cvae_never_sees_the_composition(small_data, tmp_path, monkeypatch):
    seen, told, forward = [], [], CVAE.forward
    monkeypatch.setattr(CVAE, "forward", lambda self, x, *more: (
        seen.append(x) or forward(self, x, *more)))
    inner = lavae.Decoder.forward
    monkeypatch.setattr(lavae.Decoder, "forward", lambda self, z: (
        told.append(z[:, 16:]) or inner(self, z)))
    small(tmp_path, "--model cvae-paired --epochs 1")
    shown = sum(x.shape[0] * x.shape[1] for x in seen)
    assert shown == pytest.approx(4 * 400, abs=3)  # as many as others
    for x in seen:
        x, flipped, turned = (255 * x).round().byte().numpy()
        assert np.array_equal(augment.flip_lr(x), flipped)
        assert np.array_equal(augment.flip_ud(x), turned)
    assert len(torch.cat(told).unique(dim=0)) == 3 and torch.cat(told).sum(1).max() == 1


def test_digits_are_told_as_they_are(small_data, tmp_path, monkeypatch):
    label_of = {x.tobytes(): y for x, y in zip(*small_data[:2])}
    forward, n = CVAE.forward, []

    def checked(self, x, noise, labels):
        for image, label in zip((x[0] * 255).round().byte().numpy(), labels):
            assert label_of[image.tobytes()] == label
            n.append(1)
        return forward(self, x, noise, labels)

    monkeypatch.setattr(CVAE, "forward", checked)
    small(tmp_path, "--model cvae --condition digit")
    assert sum(n) >= 3 * 400


def test_a_head_learns_to_draw_the_same_image(run, data):
    """Its pictures fit the views of the image whose latents it gets, and not those of another."""
    model, augs = run[1], ["shear_x", "canny"]
    latents = augment.views(model.encode(torch.from_numpy(data[2][:500])), model.maps)
    for z, view in zip(latents, augment.all_views(data[2][:500], augs)):
        own, another = (evaluate.nats(model.heads["shear_x+canny"], z,
                                      torch.from_numpy(x)) for x in (view, np.roll(view, 1, 0)))
        assert own < 0.95 * another


def test_a_gated_head_learns_at_half_the_learning_rate(small_data, tmp_path, monkeypatch):
    peaks, fit = {}, train.fit
    monkeypatch.setattr(train, "fit", lambda stage, *these, lr, **more: (
        peaks.update({stage: lr}), fit(stage, *these, lr=lr, **more))[1])
    for head, peak in (("gated", 0.001), ("plain", 0.002)):
        small(tmp_path / head, f"--epochs 1 --transfer-epochs 1 --lr 0.002 --head {head}")
        assert peaks == {"stage 1": 0.002, "stage 3, shear_x+canny": peak}


def test_finished_baselines_are_kept(small_data, tmp_path, capsys):
    out, words = tmp_path / "run", "--epochs 1 --transfer-epochs 1 --baselines"
    small(out, words)
    before = models_in(tmp_path)
    assert {path.parent.name for path in before} == {"run", "cvae", "cvae-paired", "vae"}
    assert "kept" not in capsys.readouterr().out
    (out / "vae" / "model.pt").unlink()
    small(out, words)
    assert capsys.readouterr().out.count("kept") == 3
    assert models_in(tmp_path) == before
    other = f"{words} --seed 1"
    refused(train.main, asked(out, other), "seed 0, not 1", "--overwrite")
    assert models_in(tmp_path) == before
    small(out, f"{other} --overwrite")
    assert "kept" not in capsys.readouterr().out


def test_the_commands_in_readme_exist(tmp_path, monkeypatch):
    """Each command line that README names is accepted, and each option belongs to some program."""
    monkeypatch.chdir(tmp_path)
    Path("letters.npz").touch()  # it stands for a file of one's own
    text = (HERE / "README.md").read_text(encoding="utf-8")
    # a line's end may lie in a short one
    spans = [span if "```" in span else " ".join(span.split())
             for span in re.findall(r"```.*?```|`[^`]+`", text, re.DOTALL)]
    commands = [shlex.split(command.replace("runs/seedN",
                                            "runs/seed0").replace("--seed N", "--seed 0"))
                for span in spans
                for command in re.findall(r"python ((?:train|evaluate|augment)\.py[^&#`\n]*)", span)]
    assert len(commands) > 15
    parsers = {"train.py": train.parser_of(), "evaluate.py": evaluate.parser_of(),
               "augment.py": augment.parser_of()}
    for program, *words in [command for command in commands if "--help" not in command]:
        if program == "train.py":
            settings_of(*words)
        else:
            parsers[program].parse_args(words)
    known = {option for parser in parsers.values() for action in parser._actions
             for option in action.option_strings}
    for span in spans:
        if not span.startswith(("`python -m", "```")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) <= known, span


def test_the_workflow_runs_readmes_commands():
    commands = re.findall(r"^python -m pip .*", (HERE / "README.md").read_text(encoding="utf-8"),
                          re.MULTILINE)
    workflow = (HERE / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (python -m .*)", workflow) == [
        command.replace("python train.py",
                        "python train.py --preset quick") for command in commands]
    for word in ("ubuntu", "macos", "windows", '"3.10"', '"3.13"'):
        assert word in workflow


RUNGS = [("--as-published", ""),  # from the paper's method to ours, and what each rung adds
         ("--equivariance-weight 0 --paper-involution --head plain",
          "lr lr_schedule batches_of batch_size decoder_entry"),
         ("--equivariance-weight 0 --head plain", "paper_involution"),
         ("--head plain", "equivariance_weight"), ("", "head")]


def test_each_rung_of_the_ladder_differs_in_what_it_names():
    configs = [settings_of(*words.split()).config() for words, _ in RUNGS]
    for before, after, (_, names) in zip(configs, configs[1:], RUNGS[1:]):
        assert {key for key in after if after[key] != before[key]} == set(names.split())
    ours, published = configs[-1], configs[0]
    assert {key: published[key] for key in train.AS_PUBLISHED} == train.AS_PUBLISHED
    assert {key: ours[key] for key in train.OURS} == train.OURS
    named = [word for key, value in train.AS_PUBLISHED.items()
             for word in ([train.flag(key)] if value is True else [train.flag(key), f"{value}"])]
    assert settings_of(*named).config() == published  # one word for these options
    assert settings_of("--as-published", "--lr", "0.1").lr == 0.1
    wide = settings_of("--preset", "paper").config()
    assert {key for key in wide if wide[key] != published[key]} == {
        "filters", "epochs", "transfer_epochs"}
    assert train.runs_of(settings_of("--as-published", "--baselines"))[1].lr_schedule == "constant"


def test_the_published_model_has_the_papers_parameters_and_no_others():
    """Appendix C with C = 64 and d = 16, written out."""
    settings = settings_of("--preset", "paper", "--transfer", "shear_x", "canny", "--transfer",
                           "canny", "shear_x")
    model = train.build(settings)
    encoder = (16 + 1) * 64 + (64 * 16 + 1) * 128 + (128 * 7 * 7 + 1) * 32
    decoder = (16 + 1) * 128 * 7 * 7 + (128 * 16) * 64 + 64 + 64 * 16 + 1
    assert sum(p.numel() for p in model.parameters()) == encoder + 3 * decoder + 2 * 16 * 16
    assert (encoder, decoder) == (333_024, 238_785)
    assert [tuple(L.shape) for L in model.maps.parameters()] == [(16, 16)] * 2
    z = torch.randn(5, 16)
    # linear layer, two transposed convolutions, a ReLU between
    for one in (model.decoder, *model.heads.values()):
        h = torch.nn.functional.linear(z, one.linear.weight, one.linear.bias).reshape(5, 128, 7, 7)
        h = torch.nn.functional.conv_transpose2d(h, one.deconv1.weight, one.deconv1.bias, 2,
                                                 1).relu()
        h = torch.nn.functional.conv_transpose2d(h, one.deconv2.weight, one.deconv2.bias, 2, 1)
        assert torch.allclose(one(z), h[:, 0], atol=1e-5)


def test_stage_1_as_published_is_bce_and_kl_at_a_constant_rate(small_data, tmp_path, monkeypatch):
    """Every step's gradient beside one written here with plain torch, from the first step on."""
    steps, step = [], adabelief.AdaBelief.step
    encoder, sample = lavae.Encoder.forward, lavae.sample
    seen = []

    def checked(self, closure=None):
        group = self.param_groups[0]
        steps.append((group["lr"], [p.detach().clone() for p in group["params"]],
                      [p.grad.clone() for p in group["params"]]))
        return step(self, closure)

    monkeypatch.setattr(lavae.Encoder, "forward", lambda self,
                        x: seen.append([x]) or encoder(self, x))
    monkeypatch.setattr(train.lavae, "sample", lambda mu, logvar, noise: (
        seen[-1].append(z := sample(mu, logvar, noise)), z)[1])
    monkeypatch.setattr(adabelief.AdaBelief, "step", checked)
    with stopped(5, Killed):
        small(tmp_path, "--as-published --no-transfer")
    assert len(steps) == 5 and {lr for lr, *_ in steps} == {1e-3}
    views = {v.tobytes() for v in np.concatenate(augment.all_views(small_data[0],
                                                                   ["flip_lr", "flip_ud"]))}
    originals = {v.tobytes(): i for i, v in enumerate(small_data[0])}
    f = torch.nn.functional
    for (_, weights, gradients), (x, z) in zip(steps, seen):
        images = (255 * x).round().byte().numpy()
        assert len(x) == 64 and all(image.tobytes() in views for image in images)
        # any views of any images
        assert len({originals.get(image.tobytes()) for image in images}) < 40
        c1, b1, c2, b2, w, b, dw, db, d1, e1, d2, e2 = ws = [p.requires_grad_() for p in weights]
        h = f.conv2d(f.conv2d(x[:, None], c1, b1, 2, 1).relu(), c2, b2, 2, 1).relu().flatten(1)
        mu, logvar = f.linear(h, w, b).chunk(2, 1)
        with torch.no_grad():
            eps = (z - mu) / (logvar / 2).exp()
        h = f.linear(mu + (logvar / 2).exp() * eps, dw, db).unflatten(1, (-1, 7, 7))
        logits = f.conv_transpose2d(f.conv_transpose2d(h, d1, e1, 2, 1).relu(), d2, e2, 2, 1)[:, 0]
        loss = f.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        loss = (loss + 0.5 * (mu ** 2 + logvar.exp() - 1 - logvar).sum()) / len(x)
        for ours, expected in zip(gradients, torch.autograd.grad(loss, ws)):
            assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_readmes_links_lead_somewhere():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}
    for link in links:
        assert link.startswith("https://") or (
            link[1:] in anchors if link.startswith("#") else (HERE / link).is_file()), link
    assert len(links) > 10
    page, demo = ((HERE / "assets" / f"{name}.html").read_text(encoding="utf-8")
                  for name in ("page", "demo"))
    assert re.sub(r">\{.*\}<", ">MODEL<", demo) == page and len(demo.encode()) < 350_000


def test_presets_fill_in_and_options_win():
    assert settings_of().filters == 32 and settings_of("--preset", "paper").filters == 64
    paper = settings_of("--preset", "paper", "--epochs", "7")
    assert (paper.epochs, paper.transfer_epochs, paper.batch_size) == (7, 100, 64)
    assert settings_of().transfer == [["shear_x", "canny"]] and settings_of().out == Path(
        "runs/flip_lr+flip_ud")
    assert settings_of("--no-transfer").transfer == []
    assert settings_of("--augs", "canny").transfer == []


def test_settings_in_a_notebook(small_data, tmp_path):
    words = dict(epochs=1, filters=2, transfer=[], device="cpu", out=tmp_path / "run")
    model = train.run(train.Settings(**words))
    assert isinstance(model, LAVAE) and same_bits(model, lavae.load(tmp_path / "run"))
    assert model.settings["epochs"] == 1 and model.settings["batch_size"] == 128
    for said, wrong in (("--joint does not go with --model cvae",
                         dict(joint="signs", model="cvae")),
                        ("name 2 augmentations", dict(transfer=[["canny"]])),
                        ("twice", dict(augs=["canny", "canny"]))):
        with pytest.raises(ValueError, match=said):
            train.Settings(**wrong)
    assert train.Settings().augs is not train.PAIRS[0]
    with pytest.raises(FileExistsError, match="finished"):
        train.run(train.Settings(**words))


# ---------------------------------------------------------------- evaluate.py


def augment_float(name, images):
    return torch.from_numpy(augment.AUGMENTATIONS[name](images)) / 255


def test_identity_counts_the_pictures_that_find_their_own_image(digits):
    images = torch.from_numpy(digits[:60])
    shown = torch.arange(60)
    shown[:20] = torch.arange(20).roll(1)  # twenty show another digit
    logits = (images.float() / 255)[shown].clamp(0.02, 0.98).logit()

    class Decoder(torch.nn.Module):
        def forward(self, z):
            return logits[z[:, 0].long()]

    nats, identity = evaluate.score(Decoder(), torch.arange(60.0)[:, None], images)
    assert identity == pytest.approx(40 / 60)
    assert nats == evaluate.nats(Decoder(), torch.arange(60.0)[:, None], images)


def test_joint_eigenspaces_are_counted():
    generator = torch.Generator().manual_seed(0)
    signs = torch.tensor([[1, 1, 1, 1, 1, 1, -1, -1, -1, -1], [1, 1, 1, -1, -1, -1, -1, 1, -1, -1]])
    basis = torch.randn(10, 10, generator=generator, dtype=torch.double)  # oblique: not orthogonal
    maps = [basis @ torch.diag(s.double()) @ torch.linalg.inv(basis) for s in signs]
    assert evaluate.pattern_counts(maps) == {"++": 3, "+-": 3, "-+": 1, "--": 3}
    model = lavae_with(["flip_lr", "flip_ud"], *maps)
    group = evaluate.group(model)
    assert group["directions"] == {"++": 3, "+-": 3, "-+": 1, "--": 3}
    assert max(f.order_error(2) for f in model.maps) < 1e-4
    assert max(group["commutator"].values()) < 1e-2
    assert np.allclose(group["eigenvalues"]["flip_lr"], [[-1, 0]] * 4 + [[1, 0]] * 6, atol=1e-3)
    model.maps[1].L.copy_(torch.block_diag(*[QUARTER] * 5))
    assert evaluate.group(model)["directions"] is None
    assert model.maps[1].order_error(2).item() == pytest.approx(40)


def test_the_group_that_augmentations_generate():
    assert [*evaluate.elements(["flip_lr", "flip_ud"])] == [
        "orig", "flip_ud", "flip_lr", "flip_lr+flip_ud"]
    dihedral = evaluate.elements(["rotate_cw", "flip_lr"])
    assert set(augment.view_names(["rotate_cw", "flip_lr"])) < set(dihedral) and len(dihedral) == 8
    assert dihedral["rotate_cw^3+flip_lr"] == (3, 1)
    three = ["flip_lr", "flip_ud", "rotate_cw"]
    assert set(evaluate.elements(three)) == set(augment.view_names(three))
    assert [*evaluate.elements(["rotate_cw", "rotate_ccw"])] == [
        "orig", "rotate_ccw", "rotate_cw", "rotate_ccw^2"]
    assert evaluate.elements(["flip_lr", "canny"]) == {}
    model = lavae_with(["rotate_cw", "flip_lr"], QUARTER, MIRROR)
    group = evaluate.group(model)
    assert max(model.maps[0].order_error(4), model.maps[1].order_error(2)) < 1e-6
    assert max(group["products"].values()) < 1e-6 and group["directions"] is None
    assert group["commutator"]["rotate_cw, flip_lr"] == pytest.approx(8 ** 0.5)


def test_reflections_that_do_not_commute_share_no_directions():
    model = lavae_with(["flip_lr", "flip_ud"], torch.tensor([[0.0, 1], [1, 0]]), MIRROR)
    group = evaluate.group(model)
    assert max(f.order_error(2) for f in model.maps) < 1e-6 and group["directions"] is None
    # a quarter turn, squared, is -I
    assert group["products"]["flip_lr, flip_ud"] == pytest.approx(8 ** 0.5)


def test_the_probes_accuracy_on_clouds():
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(3, 1000, 4, generator=generator)
    moved = clouds + 10 * torch.eye(3, 4)[:, None]
    assert torch.stack(evaluate.correctly_classified(moved[:, :800], moved[:, 800:])).all()
    luck = torch.stack(evaluate.correctly_classified(clouds[:, :800], clouds[:, 800:]))
    assert luck.shape == (3, 200) and abs(luck.double().mean() - 1 / 3) < 0.08
    # half of two views change places
    moved[0, 900:], moved[1, 900:] = moved[1, 900:].clone(), moved[0, 900:].clone()
    right = evaluate.correctly_classified(moved[:, :800], moved[:, 800:])
    assert [view[:100].all().item() for view in right] == [True] * 3
    assert [view[100:].any().item() for view in right] == [False, False, True]


def test_measure_agrees_with_the_formulas(run, data, digits):
    _, model = run
    result = evaluate.measure(model, few(data), CPU)["lavae"]
    x, _, ud, both = (torch.from_numpy(v) / 255 for v in augment.all_views(digits, model.augs))
    L1, L2 = (latent_map.L for latent_map in model.maps)

    def nats(z, view):
        p = model.decoder(z).sigmoid().double().clamp(1e-12, 1 - 1e-12)
        return -(view * p.log() + (1 - view) * (1 - p).log()).sum((1, 2)).mean().item()

    z = model.encoder(x)[0]
    for key, expected in (("orig", nats(z, x)), ("flip_ud", nats(z @ L2, ud)),
                          ("flip_lr+flip_ud", nats(z @ L1 @ L2, both)),
                          ("reverse", nats(z @ L2 @ L1, both))):
        assert result[key] == pytest.approx(expected, rel=1e-4), key
    assert result["direct"]["flip_ud"] == pytest.approx(nats(model.encoder(ud)[0], ud), rel=1e-4)
    undone = model.encoder(both)[0] @ torch.linalg.inv(L1 @ L2)
    assert result["inverse"]["flip_lr+flip_ud"] == pytest.approx(nats(undone, x), rel=1e-3)
    assert result["total"] == pytest.approx(sum(result[k] for k in augment.view_names(model.augs)))
    from_lr = model.encoder(augment_float("flip_lr", digits))[0] @ torch.linalg.inv(L1)
    assert result["any_to_any"]["flip_lr"]["flip_ud"] == pytest.approx(nats(from_lr @ L2, ud),
                                                                       rel=1e-4)
    assert result["any_to_any"]["flip_lr"]["flip_lr"] == pytest.approx(result["direct"]["flip_lr"],
                                                                       rel=1e-4)


def test_what_was_never_shown_is_drawn_through_the_maps(data):
    model = lavae_with(["rotate_cw", "flip_lr"], filters=2)
    x, (L1, L2) = torch.from_numpy(data[2][:500]), (latent_map.L for latent_map in model.maps)
    z, elements = model.encode(x), evaluate.measure(model, few(data), CPU)["lavae"]["elements"]
    for name, product, turns, flips in (("rotate_cw^2", L1 @ L1, 2, 0),
                                        ("rotate_cw^3+flip_lr", L1 @ L1 @ L1 @ L2, 3, 1)):
        view = x.rot90(-turns, (1, 2)).flip(2) if flips else x.rot90(-turns, (1, 2))
        through_maps, plain = (evaluate.nats(model.decoder, z_v, view) for z_v in (z @ product, z))
        assert elements[name] == pytest.approx(through_maps, rel=1e-5)
        assert elements[name] != pytest.approx(plain, rel=1e-4)


def test_stability_is_being_back_after_a_whole_turn():
    quarter = np.array([[1, 0], [0, 1], [-1, 0], [0, -1]])
    # turns; drifts away
    path = np.stack([quarter[np.arange(8) % 4], np.ones((8, 2)) * np.arange(8)[:, None] / 8], 1)
    assert np.allclose(evaluate.drift(path, 4), [0, 0.5 * 2 ** 0.5])
    # six quarter turns are a half turn
    assert np.allclose(evaluate.drift(path, 2), [2, 0.75 * 2 ** 0.5])
    assert np.allclose(evaluate.drift(path, None), [2 ** 0.5, 2 ** 0.5 / 8])


def test_only_what_belongs_is_tabled(small_data, no_figures, tmp_path, capsys):
    """A baseline of another seed, another data set or another size, and a LAVAE within, are left
    out."""
    out, tiny = tmp_path / "run", "--epochs 1"
    small(out, f"{tiny} --no-transfer")
    for name, words in (("cvae", "--model cvae"), ("vae", "--model vae --seed 1"),
                        ("paired", "--model cvae-paired --dataset kmnist"),
                        ("other", "--latent-dim 2 --no-transfer"), ("z-cvae", "--model cvae")):
        small(out / name, f"{tiny} {words}")
    capsys.readouterr()
    result, text = evaluated(out), capsys.readouterr().out
    for words in ("vae is no baseline of", "differs in seed", "differs in dataset",
                  "z-cvae is no baseline", "another cvae"):
        assert words in text, words
    assert [*result["baselines"]] == ["cvae"]
    small(out / "cvae",
          f"{tiny} --equivariance-weight 3 --condition digit --model cvae --overwrite")
    # what a CVAE has no use for may differ, and what it is told
    assert evaluated(out)["baselines"]["cvae"]["told"] == "digit"
    own = evaluated(out / "other")  # the LAVAE within has its own numbers
    assert result["lavae"]["total"] != own["lavae"]["total"]


def test_only_repeats_are_averaged(small_data, no_figures, tmp_path, capsys):
    runs = [tmp_path / name for name in "abcd"]
    for out, words in zip(runs, ("--seed 0", "--seed 1", "--latent-dim 2", "--joint identity")):
        small(out, f"--epochs 1 --no-transfer {words}")
    shutil.copytree(runs[0], tmp_path / "copy")
    for names, said in ((runs[:2], "LAVAE, 2 runs"), (runs[:3], "they differ in latent_dim"),
                        ((runs[0], runs[3]), "they differ in joint"),
                        ((runs[0], tmp_path / "copy"), "are copies")):
        capsys.readouterr()
        evaluated(*names)
        text = capsys.readouterr().out
        assert said in text and ("2 runs" in text) == (names == runs[:2]), said
    totals = [json_of(out / "evaluation.json")["lavae"]["total"] for out in runs[:2]]
    evaluated(*runs[:2])
    assert f"{np.mean(totals):.2f} +- {np.std(totals, ddof=1):.2f}" in capsys.readouterr().out
    for seed, dataset in enumerate(("mnist", "kmnist")):
        small(tmp_path / dataset / "flip_lr+flip_ud",
              f"--epochs 1 --dataset {dataset} --seed {seed}")
    refused(evaluate.main,
            ["--heatmap", tmp_path / "mnist", tmp_path / "kmnist", "--device", "cpu"],
            "differ in dataset")
    (tmp_path / "mnist" / "heatmap.json").mkdir()
    refused(evaluate.main, ["--heatmap", tmp_path / "mnist", "--device", "cpu"],
            str(tmp_path / "mnist" / "heatmap.json"), "another folder")


def test_where_no_view_is_confused_no_number_is_printed(run, data, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "correctly_classified", lambda train,
                        test: [torch.ones(len(z)).bool() for z in test])
    result = evaluate.measure(run[1], few(data), CPU)
    row = result["transfer"]["shear_x+canny"]
    assert (row["wrongly_classified"] is None
            and 4 * row["correctly_classified"] == pytest.approx(row["total"]))
    evaluate.report("mnist", run[1].augs, result)
    words = f"a view: {row['correctly_classified']:.1f} where the probe names it correctly\n"
    assert words in capsys.readouterr().out


def test_a_figure_that_fails_is_not_left_out_in_silence(run, data, tmp_path, monkeypatch):
    with pytest.raises(IndexError):
        evaluate.draw_figures(evaluated_run(tmp_path, run[1], few(data)), {"bad": lambda s: [][0]})


def test_one_latent_and_five_augmentations(small_data, data, quick_tsne, tmp_path, monkeypatch,
                                           capsys):
    one = tmp_path / "one"
    small(one, "--epochs 1 --transfer-epochs 1 --latent-dim 1")
    evaluated(one)
    assert "fig3_views" in capsys.readouterr().out
    refused(evaluate.main, [one, "--only", "fig10_projections", "fig5_recursion"],
            "fig10_projections needs latents of two", "fig5_recursion needs latents of two")
    five = " ".join([*augment.AUGMENTATIONS][:5])
    model = small(tmp_path / "five",
                  f"--epochs 1 --filters 1 --equivariance-weight 0 --augs {five}")
    assert len(model.maps) == 5
    # of few digits
    evaluate.main([str(tmp_path / "five"), "--device", "cpu", "--only", "fig10_projections"])


def test_a_cvae_that_is_told_the_digit_says_so(small_data, tmp_path, monkeypatch, capsys):
    for condition, words in (("digit", "told the digit, "), ("both", "told the view and the digit"),
                             ("view", "told the view, ")):
        small(tmp_path / condition, f"--epochs 1 --model cvae --condition {condition}")
        assert words in capsys.readouterr().out
        with monkeypatch.context() as m:
            m.setattr(evaluate, "FIGURES", {})
            evaluated(tmp_path / condition)
        text = capsys.readouterr().out  # the paper's is told the view
        assert ("  paper" in text) == (condition == "view") == ("CVAE, naive, told" not in text)
    rows = {}
    monkeypatch.setattr(evaluate, "grid", lambda title, columns, rows_: (
        rows.setdefault(len(rows_), rows_) and Image.new("L", (9, 9))))
    for condition in ("digit", "view"):
        evaluate.main([str(tmp_path / condition), "--device", "cpu", "--only", "fig8_cvae"])
    told = rows[11]  # x and a row for each digit
    assert [label for label, _ in told] == ["x", *(f"D(z, {digit})" for digit in range(10))]
    assert len({pictures.tobytes() for _, pictures in told[1:]}) == 10


def test_evaluate_writes_the_tables_and_the_figures(small_data, quick_tsne, tmp_path, monkeypatch,
                                                    capsys):
    run, other, draw_figures = tmp_path / "run", tmp_path / "other", evaluate.draw_figures
    monkeypatch.setattr(evaluate, "draw_figures", lambda one, figures: (
        one.folder == run and draw_figures(one, figures)))  # the other's would be alike
    small(run, "--epochs 1 --transfer-epochs 1 --baselines")
    small(other, "--epochs 1 --transfer-epochs 1 --seed 1")
    result, text = evaluated(run, other), capsys.readouterr().out
    for word in ("297.10", "564.09", "989.90", "596.69", "695.68", "reverse composition",
                 "LAVAE, 2 runs"):
        assert word in text, word
    views = augment.view_names(["flip_lr", "flip_ud"])
    assert f"{result['lavae']['total']:.2f}" in text
    assert [*result["lavae"]] == [
        *views, "total", "identity", "reverse", "direct", "inverse", "order_error", "any_to_any",
        "probe_accuracy", "group", "half", "elements"]
    assert [*result["baselines"]] == ["cvae", "cvae-paired", "vae"]
    assert all([*row] == [*views, "total", "identity"] for row in result["baselines"].values())
    lacking = {"latent_plane", "training_moving"}  # this run cannot have them
    assert not any(name in text for name in lacking)
    for name in set(evaluate.FIGURES) - lacking - {"fig6_transfer", "group_elements", "page"}:
        path, = run.glob(f"{name}.*")
        with Image.open(path) as page:
            pixels = page.convert("L")
            assert page.width > 600 and page.height > 200 and pixels.getextrema() != (255, 255)
            assert getattr(page, "n_frames", 1) > 1 or path.suffix == ".png"
            # nothing runs out
            assert path.suffix == ".gif" or np.asarray(pixels)[:8].min() == 255
    for name, rows, columns, cell in (
            ("fig3_views", 9, 10, 84), ("fig4_inverses", 8, 10, 84),
            ("fig6_shear_x+canny", 8, 10, 84), ("fig8_cvae", 8, 10, 84),
            ("fig9_paired_cvae", 12, 10, 84), ("any_to_any", 4, 5, 168),
            ("eigenvalues", 1, 2, 560), ("table1", 4, 1, 96)):
        with Image.open(run / f"{name}.png") as page:
            width, height = page.size
            assert rows * cell < height < rows * cell + 400 and columns * cell < width < 1600, name
            assert len(page.convert("L").getcolors()) > 50, name


def test_only_and_list_and_digits(small_data, tmp_path, capsys):
    small(tmp_path, "--epochs 1 --no-transfer --latent-dim 2 --record")
    capsys.readouterr()
    evaluate.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*evaluate.FIGURES]
    words, two = [str(tmp_path), "--device", "cpu", "--only"], ["--digits", "3", "8"]
    evaluate.main([*words, "latent_plane", "training_moving", "traversals", *two])
    made = {*names_in(tmp_path)} - {"model.pt", "metrics.json", "recording.pt"}
    assert made == {"latent_plane.png", "training_moving.gif", "traversals.png"}
    with Image.open(tmp_path / "training_moving.gif") as film:
        assert film.n_frames > 10
    refused(evaluate.main, [*words, "fig6_transfer", "fig3_views", "fig9_paired_cvae", *two],
            "fig6_transfer needs a transfer", "fig9_paired_cvae needs the model",
            "--baselines")
    with Image.open(tmp_path / "fig3_views.png") as page:  # drawn all the same, with two columns
        assert page.width < 900
    refused(evaluate.main, [*words, "fig99"], "fig99", "fig3_views")
    refused(evaluate.main, [*words, "fig3_views", "--digits", "11"], "11")


def test_runs_without_matrices_are_evaluated(small_data, quick_tsne, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MLP_EPOCHS", 1)
    mlp, cvae = tmp_path / "mlp", tmp_path / "cvae"
    small(mlp, "--epochs 1 --no-transfer --latent-map mlp")
    small(cvae, "--epochs 1 --model cvae --condition both")
    assert evaluated(mlp, cvae)["lavae"]["group"] is None
    assert "CVAE, naive" in capsys.readouterr().out
    assert {path.name for path in cvae.glob("*.png")} == {"fig8_cvae.png", "training_curves.png"}
    refused(evaluate.main, [mlp, "--only", "eigenvalues"], "linear maps", "--latent-map")
    digit_picture(3, 100, "black", "white").save(tmp_path / "x.png")
    refused(evaluate.main, [cvae, mlp, "--image", tmp_path / "x.png"],
            f"{cvae}: --image needs a LAVAE")
    assert (mlp / "image_x.png").is_file()  # drawn all the same


def test_a_digit_keeps_its_place(run, data):
    """In a figure, the picture under a column head is that digit's."""
    one, y = evaluated_run(*run, few(data)), data[3][:500]
    page = np.asarray(evaluate.fig3_views(one).convert("L"))
    cell, pitch, top = 84, 90, 108
    left = page.shape[1] - 24 - 10 * pitch + 6
    for column in range(10):
        x = left + column * pitch
        assert np.array_equal(page[top:top + cell, x:x + cell][1::3, 1::3], one.digits[column])
        assert y[np.flatnonzero(y == column)[1]] == column


# ---------------------------------------------------------------- projections, powers and pictures


def cloud_of(run, digits):
    """Latents of all views of the digits."""
    return np.concatenate([run[1].encode(torch.from_numpy(view)).numpy()
                           for view in augment.all_views(digits, ["flip_lr", "flip_ud"])])


def test_pca_is_scikit_learns(run, digits):
    from sklearn.decomposition import PCA
    cloud = cloud_of(run, digits[:75]).astype(float)
    theirs, ours = PCA(3).fit_transform(cloud), evaluate.pca(cloud, 3)
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-6)


def test_ica_is_scikit_learns(digits):
    from sklearn.decomposition import PCA, FastICA
    # from any start to one optimum
    cloud = PCA(16).fit_transform(digits[:300].reshape(300, -1) / 255)
    rng = np.random.default_rng(0)
    sources = np.stack([rng.uniform(-1, 1, 2000), np.sign(rng.standard_normal(2000)),
                        rng.laplace(size=2000)], 1)
    mixed = sources @ rng.standard_normal((3, 3))
    for x, k, truth in ((mixed, 3, sources), (cloud, 2, None)):
        ours = evaluate.fast_ica(x, k)
        theirs = FastICA(k, whiten="unit-variance", random_state=0, tol=1e-10,
                         max_iter=1000).fit_transform(x)
        for reference in (theirs, truth) if truth is not None else (theirs,):
            correlation = np.abs(np.corrcoef(ours.T, reference.T)[:k, k:])
            assert (correlation.max(1) > 0.99).all() and len(set(correlation.argmax(1))) == k


@pytest.mark.parametrize("n, clouds", [(40, 6), pytest.param(500, 1, marks=slow)])
def test_tsne_is_as_good_as_scikit_learns(n, clouds, run, digits):
    """On average: each ends in a minimum of its own, and either may be the better one."""
    from sklearn.manifold import TSNE, trustworthiness
    ours, theirs = [], []
    for i in range(0, n * clouds, n):
        x = cloud_of(run, digits[i:i + n])
        other = TSNE(perplexity=30, init="pca", method="exact" if len(x) < 500 else "barnes_hut",
                     random_state=0)
        for found, y in ((ours, evaluate.tsne(x)), (theirs, other.fit_transform(x))):
            found.append(trustworthiness(x, y, n_neighbors=12))
    print(f"trustworthiness {np.mean(ours):.4f}, scikit-learn's {np.mean(theirs):.4f}")
    assert np.mean(ours) > np.mean(theirs) - 0.01 and np.mean(ours) > 0.9


def test_a_map_has_real_powers():
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(8, 8, generator=generator, dtype=torch.double)
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.double)

    def of(*parts):
        return basis @ torch.block_diag(*parts).double() @ torch.linalg.inv(basis)

    even = of(-torch.eye(4), torch.eye(4))
    nearly = even + 1e-3 * torch.randn(8, 8, generator=generator)
    rotation = of(turn, turn, torch.eye(2), -torch.eye(2))
    odd = of(-torch.eye(3), torch.eye(5))
    quarters = of(QUARTER, QUARTER, torch.diag(torch.tensor([1.0, 1, -1, -1])))
    for L in (even, nearly, rotation, odd, quarters):
        assert torch.allclose(lavae.matrix_power(L, 0.0), torch.eye(8, dtype=torch.double),
                              atol=1e-8)
        assert torch.allclose(lavae.matrix_power(L, 1.0), L, atol=1e-8)
        steps = torch.stack([lavae.matrix_power(L, t) for t in np.linspace(0, 1, 201)])
        assert steps.diff(dim=0).abs().max() < 0.05 * steps.abs().max()  # continuous
        half = lavae.matrix_power(L, 0.5)
        error = torch.linalg.norm(half @ half - L) / torch.linalg.norm(L)
        assert (error < 1e-2) == (L is not odd), error  # three directions: one shrinks through zero
    assert torch.linalg.matrix_rank(lavae.matrix_power(odd, 0.5), rtol=1e-9) == 7
    assert torch.allclose(torch.linalg.matrix_power(lavae.matrix_power(quarters, 1 / 3), 3),
                          quarters, atol=1e-8)
    basis = torch.linalg.qr(basis).Q  # from here on the maps keep lengths: so do their powers
    for L in (of(-torch.eye(4), torch.eye(4)), of(turn, turn, torch.eye(2), -torch.eye(2))):
        half = lavae.matrix_power(L, 0.5)
        assert torch.allclose(half @ half.T, torch.eye(8, dtype=torch.double), atol=1e-8)


def test_half_way_says_how_long_codes_are_and_how_far_from_what_they_draw():
    class Mirror:  # draws codes, and reads them a little off
        decoder = staticmethod(lambda z: z)
        encoder = staticmethod(lambda p: (1.25 * p.logit(), None))

    z = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    told = evaluate.half_way(Mirror, torch.diag(torch.tensor([-1.0, -1, 1, 1])), z)
    assert (told["length"] == pytest.approx(1, abs=1e-5)
            and told["re-encoded"] == pytest.approx(0.25, abs=1e-3))
    # alone it shrinks through zero
    told = evaluate.half_way(Mirror, torch.diag(torch.tensor([1.0, 1, 1, -1])), z)
    assert told["length"] == pytest.approx((z[:, :3].norm(dim=1) / z.norm(dim=1)).mean().item(),
                                           abs=1e-5)


@slow
def test_a_cyclic_shift_of_order_4(tmp_path, monkeypatch):
    """Not one of the eleven: by 7 of 28 pixels to the side. Both views within 3% of direct."""
    monkeypatch.setitem(augment.AUGMENTATIONS, "roll", lambda x: np.roll(x, 7, axis=2))
    monkeypatch.setitem(augment.ORDERS, "roll", 4)
    train.main(["--preset", "quick", "--augs", "roll", "--no-transfer", "--device", "cpu", "--out",
                str(tmp_path)])
    row = evaluate.measure(lavae.load(tmp_path), augment.load_images(), CPU)["lavae"]
    assert all(row[name] < 1.03 * row["direct"][name] for name in ("orig", "roll")), row
    assert row["order_error"]["roll"] < 1e-3


@slow
@pytest.mark.parametrize("seed", [0, 1])
def test_three_augmentations_find_their_maps(seed, tmp_path):
    """All latents stay at zero where the prior has its full weight from the start: it did for seed
    1."""
    train.main(["--preset", "quick", "--augs", "flip_lr", "flip_ud", "rotate_cw", "--seed",
                str(seed), "--no-transfer",
                "--device", "cpu", "--out", str(tmp_path)])
    row = evaluate.measure(lavae.load(tmp_path), augment.load_images(), CPU)["lavae"]
    assert (row["total"] < 750
            and all(row[name] < 1.08 * nats for name, nats in row["direct"].items())), row


def test_the_model_in_a_notebook(run, digits):
    _, model = run
    x = torch.from_numpy(digits[:7]) / 255
    z, (L1, L2) = model.encoder(x)[0], (latent_map.L for latent_map in model.maps)

    def same(picture, z):
        return torch.allclose(picture, model.decoder(z).sigmoid(), atol=1e-5)

    assert same(model.augment(x), z) and same(model.augment(x, "flip_ud", "flip_lr"), z @ L2 @ L1)
    assert same(model.convert(x, target="flip_lr+flip_ud"), z @ L1 @ L2)
    assert same(model.convert(x, "flip_lr+flip_ud", "flip_lr"), z @ torch.linalg.inv(L1 @ L2) @ L1)
    assert same(model.power(x, "flip_lr", 1.0), z @ L1) and same(model.power(x, "flip_ud", 0.0), z)
    assert model.augment(x[:0], "flip_lr").shape == (0, 28, 28)
    with pytest.raises(ValueError, match="flip_lr, flip_ud"):
        model.augment(x, "canny")


def test_views_are_converted_as_they_are_named(digits):
    """The left name first; a name twice, or with a power, is the map as often."""
    model = lavae_with(["rotate_cw", "flip_lr"], latent_dim=4, filters=2)
    x, (L1, L2) = torch.from_numpy(digits[:5]) / 255, (latent_map.L for latent_map in model.maps)
    z = model.encoder(x)[0]

    def drawn(L):
        return model.decoder(z @ L).sigmoid()

    for view, L in (("orig", torch.eye(4)), ("rotate_cw+flip_lr", L1 @ L2),
                    ("flip_lr+rotate_cw", L2 @ L1), ("rotate_cw+rotate_cw", L1 @ L1),
                    ("rotate_cw^2", L1 @ L1), ("rotate_cw^3+flip_lr", L1 @ L1 @ L1 @ L2)):
        assert torch.allclose(model.convert(x, target=view), drawn(L), atol=1e-4), view
        back = drawn(torch.linalg.inv(L) @ L2)
        assert torch.allclose(model.convert(x, view, "flip_lr"), back, atol=1e-3), view
    for view in ("canny", "flip_lr+canny", "rotate_cw^x"):
        with pytest.raises(ValueError):
            model.convert(x, target=view)


def digit_picture(digit, size, ink, paper, mode="RGB", **_):
    font = ImageFont.load_default(size * 0.7)
    page = Image.new(mode, (size, size * 5 // 4), paper)
    ImageDraw.Draw(page).text((size * 0.55, size * 0.6), str(digit), ink, font, "mm")
    return page


def test_a_picture_becomes_like_mnist(tmp_path):
    path = tmp_path / "x.png"
    page = np.full((300, 500), 250, np.uint8)
    page[40:240, 400:440] = 10  # a bar, dark on light, far from the centre
    Image.fromarray(page).save(path)
    x = augment.like_mnist(path)
    rows, columns = np.flatnonzero(x.max(1)), np.flatnonzero(x.max(0))
    assert x.dtype == np.uint8 and x.max() == 255 and (len(rows), len(columns)) == (20, 4)
    for mass in (x.sum(1), x.sum(0)):
        assert abs(mass @ np.arange(28) / mass.sum() - 13.5) <= 0.5
    Image.fromarray(255 - page).save(path)
    assert np.array_equal(augment.like_mnist(path), x)  # light on dark
    page16 = Image.fromarray(page.astype(np.uint16) * 257)
    page16.save(path)
    assert np.abs(augment.like_mnist(path).astype(int) - x).max() <= 1
    clear = np.zeros((300, 500, 4), np.uint8)
    for colour in (0, 255):  # the ink opaque, the rest clear
        clear[..., :3], clear[..., 3] = colour, 255 * (page < 100)
        Image.fromarray(clear).save(path)
        assert np.array_equal(augment.like_mnist(path), x)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    Image.fromarray(page).rotate(90, expand=True).save(tmp_path / "x.jpg", exif=exif, quality=100)
    assert np.abs(augment.like_mnist(tmp_path / "x.jpg").astype(int) - x).mean() < 2
    palette = Image.fromarray(page).convert("P")
    palette.save(path)
    assert np.array_equal(augment.like_mnist(path), x)


def test_pictures_of_numbers(run, tmp_path):
    """Float and 16-bit pictures of any range; of numbers that are none, one line."""
    page = np.asarray(digit_picture(7, 200, 0, 255, "L"), np.float32)
    Image.fromarray(page.astype(np.uint8)).save(tmp_path / "x.png")
    plain, path = augment.like_mnist(tmp_path / "x.png").astype(int), tmp_path / "x.tiff"
    for scale, shift in ((1 / 255, 0), (1e-3 / 255, 0), (1e-30, 0), (1e30, 0), (3, -400)):
        Image.fromarray(page * np.float32(scale) + np.float32(shift)).save(path)
        assert np.abs(augment.like_mnist(path) - plain).max() <= 1, (scale, shift)
    for bad in (math.nan, math.inf, -math.inf):
        for place in ((0, 0), (100, 100), slice(None)):
            broken = page.copy()
            broken[place] = bad
            Image.fromarray(broken).save(path)
            refused(evaluate.main, [run[0], "--device", "cpu", "--image", path], "x.tiff", "finite")
    Image.fromarray(np.full((50, 50), 0.3, np.float32)).save(path)
    with pytest.raises(ValueError, match="empty"):
        augment.like_mnist(path)


@pytest.mark.parametrize("width, height, size", [
    (6000, 200, 200), (9000, 100, 90), (9000, 100, 60), (200, 6000, 150), (3000, 3000, 70)])
def test_a_digit_in_a_large_picture_is_cut_out_of_it(width, height, size, tmp_path):
    page, font = Image.new("L", (width, height), 255), ImageFont.load_default(size)
    x, y = width * 3 // 10, height // 2
    ImageDraw.Draw(page).text((x, y), "7", 0, font, "mm")
    page.save(tmp_path / "whole.png")
    page.crop((max(0, x - size), max(0, y - size), min(width, x + size),
               min(height, y + size))).save(tmp_path / "cut.png")
    whole, cut = (augment.like_mnist(tmp_path / f"{name}.png").astype(int)
                  for name in ("whole", "cut"))
    assert np.abs(whole - cut).mean() < 3 and np.corrcoef(whole.ravel(), cut.ravel())[0, 1] > 0.98


STROKES = {  # of a pen, through these points in a box of 7x10, y downwards
    2: ["1,3 2,1 4.5,0 7,0.8 8,2.8 6.5,5 3.5,7.5 0.8,10 4,9.7 9,10"],
    3: ["1,1 4,0 7.5,1 7.5,3.5 3.5,4.7 7.5,6 8.5,8 5.5,10 1,9.2"],
    4: ["5.5,0 1,6 9,6", "7,3 6.5,10"],
    5: ["2.5,0.3 1.8,4.5 5,4 8.2,6 7.5,8.8 4,10 1,9", "2.5,0.2 8.5,0"],
    7: ["1,0.5 8.5,0 6,4 4,10", "3,5 7.5,4.7"]}
PHOTOS = ("shade 35%", "shade 60%", "ruled paper", "thin pen", "grain", "off-centre")


def photo(digit, kind, rng):
    """A photo of a digit on paper, 480x640: its light, its lines, its pen, its noise, its place."""
    at, tall, pen = ((330, 430), 160, 13) if kind == "off-centre" else ((150, 190), 270, 4 if kind
                                                                        == "thin pen" else 20)
    ink = Image.new("L", (960, 1280))
    for stroke in STROKES[digit]:
        points = [tuple(2 * (a + tall / 10 * b * c) for a, b,
                        c in zip(at, map(float, point.split(",")), (0.7, 1)))
                  for point in stroke.split()]
        ImageDraw.Draw(ink).line(points, 255, 2 * pen, "curve")
        for x, y in points:
            ImageDraw.Draw(ink).ellipse((x - pen, y - pen, x + pen, y + pen), 255)
    ink = np.asarray(ink.resize((480, 640), Image.Resampling.BOX)) / 255
    if kind == "clean":
        return Image.fromarray((255 - 255 * ink).astype(np.uint8))
    y, x = np.mgrid[:640, :480]
    paper = np.where((y + 0.02 * x) % 42 < 2, 150.0, 228.0) if kind == "ruled paper" else 228.0
    page = paper * (1 - ink) + 55 * ink
    page *= 1 - {"shade 35%": 0.35,
                 "shade 60%": 0.6}.get(kind, 0) * (0.5 * x / 480 + 0.5 * y / 640) ** 1.3
    page = cv2.GaussianBlur(page, (0, 0), 1) + rng.normal(0, 16 if kind == "grain" else 3,
                                                          page.shape)
    return Image.fromarray(page.clip(0, 255).astype(np.uint8)).convert("RGB")


@pytest.mark.parametrize("chosen, least", [([5], 6), pytest.param([*STROKES], 27, marks=slow)])
def test_photos_are_read_like_drawings(chosen, least, tmp_path):
    """`least` of the photos look like the clean drawing when both are prepared."""
    rng, missed = np.random.default_rng(0), []
    for digit in chosen:
        photo(digit, "clean", rng).save(tmp_path / "clean.png")
        clean = cv2.GaussianBlur(augment.like_mnist(tmp_path / "clean.png"), (0, 0), 1)
        for kind in PHOTOS:
            photo(digit, kind, rng).save(tmp_path / "photo.jpg", quality=85)
            x = cv2.GaussianBlur(augment.like_mnist(tmp_path / "photo.jpg"), (0, 0), 1)
            if np.corrcoef(x.ravel(), clean.ravel())[0, 1] <= 0.8:
                missed.append((digit, kind))
    assert len(chosen) * len(PHOTOS) - len(missed) >= least, missed


def test_the_largest_figure_of_a_photo_is_taken(tmp_path, capsys):
    rng = np.random.default_rng(0)
    seven, four = (np.asarray(photo(digit, "shade 35%", rng).convert("L")) for digit in (7, 4))
    Image.fromarray(seven).save(tmp_path / "seven.png")
    small = np.asarray(Image.fromarray(four).resize((320, 426)))
    four = np.vstack([small, small[-1:].repeat(214, 0)])
    Image.fromarray(np.hstack([seven, four])).save(tmp_path / "both.png")
    alone = augment.like_mnist(tmp_path / "seven.png")
    assert capsys.readouterr().out == ""
    together = augment.like_mnist(tmp_path / "both.png")
    assert "both.png shows 2 figures" in capsys.readouterr().out
    assert np.corrcoef(alone.ravel(), together.ravel())[0, 1] > 0.9


def test_a_digit_that_nearly_fills_its_picture(digits, tmp_path):
    """It is read while there is some paper around it; without any, it is refused in true words."""
    for margin, least in ((3, 12), (0, 4)):
        read = 0
        for digit in digits[:12]:
            rows, columns = (np.flatnonzero(digit.max(axis)) for axis in (1, 0))
            page = 255 - np.pad(digit[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], margin)
            size = page.shape[1] * 4, page.shape[0] * 4
            Image.fromarray(page).resize(size).save(tmp_path / "x.png")
            try:
                read += augment.like_mnist(tmp_path / "x.png").max() == 255
            except ValueError as error:
                assert "leave more paper" in str(error)
        assert read >= least, (margin, read)
    noise = np.random.default_rng(0)
    for _ in range(30):  # nothing that is in a picture ends otherwise
        shape, kind = noise.integers(1, 40, 2), noise.integers(3)
        page = noise.integers(0, 256, shape,
                              np.uint8) if kind else np.full(shape, noise.integers(256), np.uint8)
        Image.fromarray(page if kind < 2
                        else 255 * (page > 250).astype(np.uint8)).save(tmp_path / "x.png")
        with contextlib.suppress(ValueError):
            assert augment.like_mnist(tmp_path / "x.png").shape == (28, 28)


def test_several_pictures_are_rows_of_one_page(run, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "run")
    names = [tmp_path / f"{name}.png" for name in ("one", "a_name_of_thirty_characters_or_so")]
    for digit, path in enumerate(names):
        digit_picture(digit, 100, "black", "white").save(path)
    evaluate.main([str(out), "--device", "cpu", "--image", *map(str, names)])
    page = np.asarray(Image.open(out / "images.png").convert("L"))
    for row, image in enumerate(map(augment.like_mnist, names)):
        tile = np.kron(image, np.ones((5, 5), np.uint8))  # as prepared, in the first column
        error, _, (x, y), _ = cv2.minMaxLoc(cv2.matchTemplate(page, tile, cv2.TM_SQDIFF))
        assert error < 100 and y == 108 + row * 146 and x < 450
    names.append(tmp_path / "none.png")
    (out / "images.png").unlink()
    refused(evaluate.main, [out, "--device", "cpu", "--image", *names], "none.png")
    assert not (out / "images.png").exists()


def test_pictures_that_are_none(run, tmp_path):
    out, picture = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "x.png"
    before, words = names_in(out), [str(out), "--device", "cpu", "--image", str(picture)]
    refused(evaluate.main, words, "x.png", "there is no")
    picture.write_bytes(b"GIF89a?")
    refused(evaluate.main, words, "x.png", "no picture")
    for page, said in ((Image.new("RGB", (40, 40), "navy"), "empty"),
                       (Image.new("1", (8000, 7000)), "50 megapixels")):
        page.save(picture)
        refused(evaluate.main, words, "x.png", said)
    assert names_in(out) == before
    digit_picture(7, 300, "black", "white").save(picture)
    evaluate.main(words)
    assert (out / "image_x.png").is_file()


@slow
def test_40_pictures_are_recognised(tmp_path):
    """The reconstruction of a picture is nearest to it, of the ten digits drawn alike, in 36 of
    40."""
    train.main(["--preset", "quick", "--no-transfer", "--device", "cpu", "--out",
                str(tmp_path / "run")])
    model, hits = lavae.load(tmp_path / "run"), 0
    kinds = [dict(size=16, ink="black", paper="white"), dict(size=2000, ink="white", paper="black"),
             dict(size=200, ink="navy", paper="ivory", turn=True),
             dict(size=90, ink=0, paper=65535, mode="I;16")]
    extra = [dict(size=300, ink=(255, 255, 255, 255), paper=(0, 0, 0, 0), mode="RGBA"),
             dict(size=64, ink="yellow", paper="purple", palette=True)]
    for k in range(40):
        kind, prepared = (kinds + extra)[k % 6], []
        for digit in range(10):
            page, path = digit_picture(digit, **kind), tmp_path / f"{digit}.png"
            if kind.get("turn"):
                exif = Image.Exif()
                exif[0x0112] = 6
                page.rotate(90, expand=True).save(path, exif=exif)
            else:
                (page.convert("P") if kind.get("palette") else page).save(path)
            prepared.append(augment.like_mnist(path))
        x = torch.from_numpy(np.stack(prepared))
        drawn = model.augment(x.float() / 255)
        hits += ((drawn[k % 10] - x / 255).square().sum((1, 2)).argmin() == k % 10).item()
    print(f"{hits} of 40")
    assert hits >= 36


# ---------------------------------------------------------------- the page, in a browser

CHROME = next(filter(None, map(shutil.which,
                               ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
browser = pytest.mark.skipif(not CHROME, reason="needs Chromium or Chrome")


def in_browser(page, script, folder):
    """What the body of an async function, appended to the page's text, returns, and what went
    wrong."""
    early = ("<script>var failures = []; onerror = message => failures.push(String(message));"
             "console.error = (...words) => failures.push(words.join(' '));</script>")
    late = ("<pre id='result'></pre><script>const frame = () => new Promise(done => setTimeout(done, 50));"
            "const sums = () => [...document.querySelectorAll('#pictures canvas')].map(canvas => canvas.getContext('2d')"
            ".getImageData(0, 0, 28, 28).data.reduce((sum, v, i) => sum + (i % 4 ? 0 : v), 0));"
            f"(async () => {{ {script} }})().then(value => byId('result').textContent = JSON.stringify({{value, failures,"
            "loaded: performance.getEntriesByType('resource').length}), error => byId('result').textContent ="
            "JSON.stringify({failures: [String(error)]}));</script>")
    copy = folder / "copy of it.html"
    copy.write_text(page.replace("<head>", f"<head>{early}").replace("</body>", f"{late}</body>"),
                    encoding="utf-8")
    words = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
             "--virtual-time-budget=30000", "--dump-dom"]
    dom = subprocess.run([CHROME, *words, copy.as_uri()], capture_output=True,
                         timeout=120).stdout.decode("utf-8")
    found = json.loads(html.unescape(re.search("<pre id=.result.>(.*?)</pre>", dom, re.DOTALL)[1]))
    assert found["failures"] == [] and found["loaded"] == 0, found
    return found["value"]


@browser
def test_the_page_computes_what_torch_does(run, data, tmp_path):
    one, model = evaluated_run(*run, few(data)), run[1]
    page = evaluate.page(one)
    assert not re.search(r"https?:|fetch|XMLHttp|@import|src=|href=",
                         page.split(">MODEL<")[0][:20_000])
    rows = in_browser(page, """
        return model.digits.map(text => {
            const z = encode(Float32Array.from(bytes(text), v => v / 255)), half = map => {
                const powers = halves(map.powers), k = (powers.length / d / d - 1) / 2;
                return [...decode(times(z, powers.subarray(k * d * d, (k + 1) * d * d)))];
            };
            return {z: [...z], views: model.views.map((_, v) => [...decode(ofView(z, v))]),
                    back: model.maps.map(map => [...decode(times(z, map.inverse))]), half: model.maps.map(half),
                    head: model.views.map((_, v) => [...decode(ofView(z, v), "heads.shear_x+canny")])};
        });""", tmp_path)
    z = one.encode(one.digits)
    assert len(rows) == len(z) == 10

    def drawn(decoder, *latents):  # (10, .., 784)
        return torch.stack([decoder(one).sigmoid().flatten(1) for one in latents], 1)

    for key, expected, bound in (
            ("z", z, 0.01), ("views", drawn(model.decoder, *augment.views(z, model.maps)), 0.01),
            ("back", drawn(model.decoder, *(f.inverse(z) for f in model.maps)), 0.01),
            ("half", drawn(model.decoder, *(z @ lavae.matrix_power(f.L, 0.5) for f in model.maps)),
             0.01),
            ("head", drawn(model.heads["shear_x+canny"], *augment.views(z, model.maps)), 0.01)):
        ours = torch.tensor([row[key] for row in rows])
        assert ours.shape == expected.shape and (ours - expected).abs().max() < bound, key


@browser
def test_the_page_can_be_drawn_on(run, data, tmp_path):
    """With a pen, with keys, with an eraser; sliders and buttons change what is shown, Clear
    empties it."""
    found = in_browser(evaluate.page(evaluated_run(*run, few(data))), """
        const point = (kind, x, y) => { const box = paper.getBoundingClientRect(); paper.dispatchEvent(new PointerEvent(kind,
            {clientX: box.left + x * box.width, clientY: box.top + y * box.height, buttons: 1, pointerId: 1})); };
        const line = (...points) => points.forEach((p, i) => point(i ? "pointermove" : "pointerdown", ...p));
        const input = (one, value) => { one.value = value; one.dispatchEvent(new Event("input")); };
        const press = words => [...document.querySelectorAll("button")].find(b => b.textContent === words).click();
        const steps = {}, step = async name => { await frame(); steps[name] = sums(); };
        await step("first"); press("Another test digit"); await step("another"); press("Clear"); await step("clear");
        line([.3, .2], [.7, .2], [.4, .8]); await step("drawn"); const seen = [...x], ink = paper.toDataURL();
        press("Eraser"); line([.3, .2], [.7, .2]); await step("erased"); press("Clear"); press("Pen");
        for (const key of ["ArrowRight", "ArrowDown", "ArrowDown"]) paper.dispatchEvent(new KeyboardEvent("keydown", {key}));
        await step("keys"); press("Another test digit"); await step("digit");
        const [z1, ...rest] = document.querySelectorAll("#latents input"), before = z[0];
        input(z1, 3); await step("moved"); const now = z[0];
        input(document.querySelector("section input"), 1); await step("whole");
        press("L1"); press("L2−1"); await frame(); const words = formula.textContent; press("Undo"); await step("chain");
        return {steps, seen, ink, before, now, words, sliders: rest.length + 1,
                labels: [...document.querySelectorAll("input")].every(one => one.labels.length === 1)};""", tmp_path)
    steps = found["steps"]
    assert steps["first"][0] != steps["another"][0] > 0 == steps["clear"][0]
    assert steps["drawn"][0] > steps["erased"][0] > 0 and steps["keys"][0] > 0
    assert steps["drawn"][1:] != steps["clear"][1:] and len(steps["drawn"]) == 2 + 4 + 2 + 1 + 4
    assert found["now"] == 3 != found["before"] and steps["moved"][0] == steps["digit"][0]
    assert steps["moved"][1] != steps["digit"][1]
    # L^1 is L
    assert steps["whole"][6] == pytest.approx(steps["whole"][3], abs=30) != steps["moved"][6]
    assert found["words"] == "D(E(x) L1 L2−1)"
    assert steps["chain"][8] == pytest.approx(steps["whole"][3], abs=30)
    assert found["sliders"] == 16 and found["labels"]
    (tmp_path / "ink.png").write_bytes(base64.b64decode(found["ink"].split(",")[1]))
    ours, expected = np.array(found["seen"]), augment.like_mnist(tmp_path / "ink.png").ravel() / 255
    assert np.corrcoef(ours, expected)[0, 1] > 0.9  # prepared like a photo of it
    rows, columns = (np.flatnonzero(ours.reshape(28, 28).max(axis) > 0.1) for axis in (1, 0))
    assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20, 21)
    for axis in (0, 1):
        mass = ours.reshape(28, 28).sum(axis)
        assert abs(mass @ np.arange(28) / mass.sum() - 13.5) < 0.6


def test_who_cannot_have_a_page_is_told(trained, small_data, tmp_path):
    for words, said in (("--model cvae", "a LAVAE"),
                        ("--latent-map mlp --no-transfer", "linear maps")):
        out = shutil.copytree(trained(f"--epochs 1 {words}"), tmp_path / words.split()[1])
        refused(evaluate.main, [out, "--device", "cpu", "--only", "page"], f"page needs {said}")
        assert not (out / "page.html").exists()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize("argv, words", [
    (["--augs", "flip_lr", "flop"], ["flop", "flip_ud", "canny"]),
    (["--transfer", "shear_x"], ["--transfer", "2 augmentations"]),
    (["--transfer", "shear_x", "nope"], ["nope", "canny"]),
    (["--augs", "flip_lr", "flip_lr"], ["once"]),
    (["--transfer", "canny", "canny"], ["once"]),
    (["--transfer", "canny", "shear_x", "--transfer", "canny", "shear_x"], ["once"]),
    (["--transfer", "canny", "shear_x", "--no-transfer"], ["--no-transfer", "not allowed with"]),
    (["--epochs", "-1"], ["--epochs", "whole number from 1"]),
    (["--epochs", "many"], ["--epochs", "whole number from 1"]),
    (["--lr", "nan"], ["--lr", "a number from"]),
    (["--kl-weight", "-2"], ["--kl-weight", "from 0"]),
    (["--filters", "513"], ["--filters", "from 1 to 512"]),
    (["--latent-dim", "0"], ["--latent-dim", "from 1 to 512"]),
    (["--batch-size", "8193"], ["--batch-size", "from 1 to 8192"]),
    (["--augs", *[*augment.AUGMENTATIONS][:6]], ["--augs", "five at most"]),
    (["--augs", "canny", "--no-transfer"], ["--no-transfer", "leave it out"]),
    (["--model", "cvae", "--no-transfer"], ["--no-transfer", "--model cvae", "leave"]),
    (["--preset", "huge"], ["quick", "laptop", "paper"]),
    (["--device", "tpu"], ["cpu", "cuda"]),
    (["--joint", "signs", "--model", "cvae"], ["--joint", "--model cvae", "leave"]),
    (["--latent-map", "mlp", "--model", "cvae-paired"], ["--latent-map", "--model cvae-paired"]),
    (["--joint", "signs", "--latent-map", "mlp"], ["--joint signs", "--latent-map"]),
    (["--baselines", "--model", "vae"], ["--baselines", "--model vae", "leave"]),
    (["--condition", "digit"], ["--condition", "cvae"]),
    (["--heatmap", "--augs", "flip_lr", "flip_ud"], ["--heatmap", "leave --augs"]),
    (["--heatmap", "--model", "vae"], ["--heatmap", "--model vae"]),
    (["--all-targets"], ["--all-targets", "--heatmap"]),
    (["--batches-of", "views"], ["--batches-of", "--equivariance-weight 0"]),
    (["--head", "plain", "--model", "cvae"], ["--head", "--model cvae"]),
    (["--transfer", "canny", "shear_x", "--model", "cvae"], ["--transfer", "--model cvae"]),
    (["--model", "gan"], ["gan", "cvae-paired"]),
    (["--data-dir", "nowhere"], ["mnist.npz is missing", "leave --data-dir out"]),
    (["--device", "cuda"], ["'cuda'", "cpu"]),
])
def test_train_refuses(argv, words, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(train.main, [*argv, "--out", tmp_path / "out"], *words)
    assert not (tmp_path / "out").exists()


def test_train_refuses_an_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    refused(train.main, ["--out", tmp_path / "file" / "run"], "Not a directory", "folder")
    refused(train.main, ["--out", tmp_path / "file"], "is a file", "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_data_is_named(tmp_path):
    content = bytearray((HERE / "data" / "mnist.npz").read_bytes())
    content[5000] ^= 1
    (tmp_path / "mnist.npz").write_bytes(content)
    words = ["--data-dir", tmp_path, "--out", tmp_path / "out"]
    refused(train.main, words, "damaged", "leave --data-dir out")


def own_data(path, data, kind="keras", classes=10, n=400, **changes):
    """A file of one's own: digits, with their labels or as many classes as are asked for."""
    x, y, x_test, y_test = (part[:n] for part in data)
    if classes != 10:
        y, y_test = np.arange(n) % classes, np.arange(n) % classes
    content = dict(x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    if kind == "medmnist":
        content = dict(train_images=x, train_labels=y[:, None], val_images=x[:3],
                       val_labels=y[:3, None],
                       test_images=x_test, test_labels=y_test[:, None])
    np.savez(path,
             **{key: value for key, value in (content | changes).items() if value is not None})
    return str(path)


@pytest.mark.parametrize("kind, classes, changes", [
    ("keras", 10, {}), ("medmnist", 10, {}),
    ("keras", 26, dict(class_names=[*"abcdefghijklmnopqrstuvwxyz"])),
    ("keras", 3, {}), ("medmnist", 1, {}), ("keras", 10, dict(y_train=None, y_test=None))])
def test_data_of_ones_own(kind, classes, changes, data, no_figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAP_STEPS", 20)
    path, tiny = own_data(tmp_path / "own.npz", data, kind, classes,
                          **changes), [*SMALL, "--epochs", "1"]
    out = tmp_path / "run"
    train.main([*tiny, "--no-transfer", "--dataset", path, "--out", str(out)])
    total = evaluated(out)["lavae"]["total"]
    text = capsys.readouterr().out
    assert "297.10" not in text and "  paper" not in text and "own.npz" in text
    digit = [*tiny, "--dataset", path, "--model", "cvae", "--condition", "both", "--out",
             str(tmp_path / "cvae")]
    if "y_train" in changes:
        refused(train.main, digit, "--condition both", "no labels")
    else:
        train.main(digit)
        assert (lavae.load(tmp_path / "cvae").classes == classes
                and evaluated(tmp_path / "cvae")["cvae"]["total"] > 0)
    one, = evaluate.runs_of(evaluate.parser_of().parse_args([str(out), "--device", "cpu"]))
    names = changes.get("class_names", [str(label) for label in range(classes)])
    assert (one.columns == ([""] * 10 if "y_train" in changes else names[:10])
            and len(one.digits) == len(one.columns))
    again = [*tiny, "--no-transfer", "--dataset", path, "--out", str(out), "--resume"]
    train.main(again)
    assert "kept" in capsys.readouterr().out
    os.rename(path, tmp_path / "gone.npz")  # another file of the same name
    own_data(tmp_path / "own.npz", data, n=300)
    refused(train.main, again, "own.npz", "same options")
    refused(evaluate.main, [out, "--device", "cpu"], "own.npz", "not the file")
    (tmp_path / "moved").mkdir()
    os.rename(tmp_path / "gone.npz", tmp_path / "moved" / "own.npz")
    os.remove(path)
    evaluate.main([str(out), "--device", "cpu", "--data-dir", str(tmp_path / "moved")])
    assert json_of(out / "evaluation.json")["lavae"]["total"] == total


def test_data_of_ones_own_that_is_none(data, tmp_path):
    class Code:
        def __reduce__(self):
            return ((tmp_path / "it ran").touch, ())

    x, y, path = data[0][:400], data[1][:400], tmp_path / "own.npz"
    words = ["--dataset", path, "--out", tmp_path / "run"]
    for said, changes in (
            ("x_train", dict(x_train=x / 255)), ("x_train", dict(x_train=x[:, :20])),
            ("x_test", dict(x_test=x[:199])),
            ("x_train", dict(x_train=x[..., None])), ("x_test", dict(x_test=None)),
            ("train_images", dict(x_train=None)),
            ("y_train", dict(y_train=y[:9])), ("y_train", dict(y_train=y.astype(float))),
            ("y_test", dict(y_test=None)),
            ("y_train", dict(y_train=y.astype(int) - 1)), ("y_train", dict(class_names=["a", "b"])),
            ("y_train", dict(y_train=np.eye(10)[y].astype(int))),
            ("plain arrays", dict(x_train=np.array([Code()] * 9)))):
        own_data(path, data, **changes)
        refused(train.main, words, "own.npz", said)
    for content in (b"", b"PK\x03\x04", b"<html>", Path(path).read_bytes()[:5000]):
        path.write_bytes(content)
        refused(train.main, words, "own.npz", "plain arrays")
    path.unlink()
    refused(train.main, words, "own.npz", "No such file")
    refused(train.main, ["--dataset", "letters"], "mnist", ".npz", "letters")
    assert names_in(tmp_path) == []


def test_half_a_data_set_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    raw, out = tmp_path / "FashionMNIST" / "raw", tmp_path / "run"
    raw.mkdir(parents=True)
    words = ["--dataset", "fashion_mnist", "--data-dir", tmp_path, "--out", out]
    for content in (b"", b"<html><body>404</body></html>", b"\0\0\x08\x03",
                    b"\0\0\x08\x03" + b"\0" * 99):
        for kind in ("images-idx3", "labels-idx1"):
            for part in ("train", "t10k"):
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
        refused(train.main, words, "fashion_mnist", "remove", str(tmp_path / "FashionMNIST"))
    for error in (EOFError(), zlib.error("Error -3"), http.client.IncompleteRead(b""),
                  AssertionError(),
                  RuntimeError("File not found or corrupted."), urllib.error.URLError("no network"),
                  ValueError("invalid literal"), OSError("full")):
        monkeypatch.setattr(datasets, "FashionMNIST", failing(error))
        refused(train.main, words, "cannot get fashion_mnist", "network", type(error).__name__)
    for error in (RuntimeError("operator torchvision::nms does not exist"),
                  ImportError("no symbol"),
                  AttributeError("partially initialized"), OSError("libcudart.so")):
        with monkeypatch.context() as m:
            m.setattr(builtins, "__import__", lambda name, *more, load=builtins.__import__: (
                failing(error)() if name == "torchvision" else load(name, *more)))
            refused(train.main, words, "do not belong together", "pip install", str(error))
    assert not out.exists()


def test_evaluate_refuses(tmp_path, monkeypatch, run):
    refused(evaluate.main, [tmp_path / "none"], "no", "train.py")
    empty, model = tmp_path / "empty", (run[0] / "model.pt")
    empty.mkdir()
    refused(evaluate.main, [empty], "model.pt", "train.py")
    for content in (b"", b"garbage", model.read_bytes()[:5000]):
        (empty / "model.pt").write_bytes(content)
        refused(evaluate.main, [empty], "damaged", "train again")
    for other in strange_checkpoints(model, tmp_path / "it ran"):
        lavae.write(other, empty / "model.pt")
        refused(evaluate.main, [empty], str(empty), "train")
        assert not (tmp_path / "it ran").exists()
    assert names_in(empty) == ["model.pt"]
    refused(evaluate.main, [tmp_path], "only holds runs", "--heatmap")
    monkeypatch.chdir(tmp_path)
    refused(evaluate.main, [], "no run", "train.py")


def test_an_error_from_the_shell_is_one_line(tmp_path):
    end = subprocess.run([sys.executable, HERE / "train.py", "--augs", "flop"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("\n") == 1 and "Traceback" not in end.stderr
    assert [*tmp_path.iterdir()] == []


def strange_checkpoints(path, trace):
    """Whole files that hold what they should not: other shapes, weights that are no numbers, code
    that would leave a trace."""
    class Code:
        def __reduce__(self):
            return (Path(trace).touch, ())

    good = lavae.read(path)
    yield from ({1: 2}, {"version": 2}, {"weight": torch.ones(3)}, {"net": torch.nn.Linear(2, 2)},
                {"x": Code()})
    for key in ("class", "arguments", "settings", "tensors"):
        yield {k: v for k, v in good.items() if k != key}
    for key, value in (("latent_dim", 17), ("filters", 10 ** 9), ("augs", ["flip_lr"] * 60),
                       ("augs", ["flip_lr", "code"]), ("transfers", [["x"]]), ("latent_map", "os"),
                       ("more", 1)):
        yield good | {"arguments": good["arguments"] | {key: value}}
    name = "encoder.conv1.bias"
    for value in (torch.full((8,), math.nan), torch.zeros(9), None, "x"):
        yield good | {"tensors": good["tensors"] | {name: value}}
    yield good | {"version": 2}


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("error", [
    MemoryError(),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried .."),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
    torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB, max allowed: 1.00 GB).")])
def test_a_failed_allocation_is_one_line(error, finished, monkeypatch):
    before, again = models_in(finished), asked(finished, "--overwrite")
    monkeypatch.setattr(train, "stage1", failing(error))
    refused(train.main, again, "memory is full", "lower")
    assert models_in(finished) == before
    monkeypatch.setattr(evaluate, "measure", failing(error))
    refused(evaluate.main, [finished, "--device", "cpu"], "memory is full", "--device")
    for main, argv in ((train.main, again), (evaluate.main, [str(finished)])):
        # what is no lack of memory is not said to be one
        monkeypatch.setattr(train, "stage1", lambda *_, **__: torch.zeros(2) @ torch.zeros(3))
        monkeypatch.setattr(evaluate, "measure", lambda *_: torch.zeros(2) @ torch.zeros(3))
        with pytest.raises(RuntimeError, match="size"):
            main(argv)


@slow
def test_memory_that_the_system_refuses(tmp_path):
    """A real limit: 32 views of all of MNIST in a process that may have 2 GB more than it has."""
    pytest.importorskip("resource")
    program = f"""import sys; sys.path.insert(0, {str(HERE)!r})
import resource, train
used = 1024 * int(next(line for line in open("/proc/self/status") if "VmSize" in line).split()[1])
resource.setrlimit(resource.RLIMIT_AS, (used + 2 * 10 ** 9, -1))
train.main(sys.argv[1:])"""
    words = ["--augs", *[*augment.AUGMENTATIONS][:5], "--device", "cpu", "--out", tmp_path / "run"]
    end = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
    assert end.returncode == 2 and end.stderr.count("\n") == 1, end.stderr
    assert "memory is full" in end.stderr


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("model", ["lavae", "cvae"])
def test_a_resumed_run_ends_with_the_same_bits(small_data, tmp_path, model):
    words, whole, out = f"--model {model}", tmp_path / "whole", tmp_path / "run"
    small(whole, words)
    with stopped(20, Killed):  # in the second epoch
        small(out, words)
    assert names_in(out) == ["state.pt"]
    refused(train.main, asked(out, words), "was interrupted", "--resume", "--overwrite")
    other = asked(out, f"{words} --resume --lr 1")
    refused(train.main, other, "lr 0.009, not 1")
    for n in (15, 17, 14)[:3 if model == "lavae" else 1]:  # through the stages
        with stopped(n, Killed):
            small(out, f"{words} --resume")
    assert same_bits(lavae.load(whole), small(out, f"{words} --resume"))
    assert names_in(out) == ["metrics.json", "model.pt"]
    metrics = [json_of(folder / "metrics.json") for folder in (out, whole)]
    losses = [[row["loss"] for row in m["history"]["stage 1"]] for m in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 3 and metrics[0]["seconds"] > 0


def test_the_heat_map_goes_on_after_a_kill_and_repeats_no_pair(small_data, tmp_path, monkeypatch,
                                                               capsys):
    out, pairs = tmp_path / "map", list(evaluate.PAPER_TOTALS)
    words = asked(out, HEATMAP)
    begun, stage1, run_one = [], train.stage1, train.train_one
    monkeypatch.setattr(train, "stage1", lambda model, *more, **words: (
        begun.append("+".join(model.augs)) or stage1(model, *more, **words)))

    def killed_after_two(*arguments):
        if len(begun) == 2:
            raise Killed
        return run_one(*arguments)

    with monkeypatch.context() as m, pytest.raises(Killed):
        m.setattr(train, "train_one", killed_after_two)
        train.main(words)
    assert begun == pairs[:2] == ["+".join(pair) for pair in train.PAIRS[:2]]
    before = models_in(tmp_path)
    assert len(before) == 2
    with stopped(20, Killed):  # of the third pair's 13 batches of stage 1 and 4 times 13 of stage 3
        train.main([*words, "--resume"])
    refused(train.main, words, "holds a run", "--resume")
    train.main([*words, "--resume"])
    assert begun == [*pairs[:3], pairs[2], pairs[3]]  # the third's stage 1 was done, and read again
    assert all(path.read_bytes() == content for path, content in before.items())
    begun.clear()
    capsys.readouterr()
    train.main(words)
    assert not begun and capsys.readouterr().out.count("kept") >= 4
    assert all(lavae.load(out / pair).transfers == train.PAIRS for pair in pairs)

    monkeypatch.setattr(evaluate, "draw_figures", lambda *_: [])  # tested elsewhere
    evaluate.main(["--heatmap", str(out), "--device", "cpu"])
    table = json_of(out / "heatmap.json")
    assert [*table] == pairs
    for source in pairs:
        result = json_of(out / source / "evaluation.json")
        assert table[source]["native"] == [result["lavae"]["total"]]
        assert {target: table[source][target] for target in pairs} == {
            target: [row["total"]] for target, row in result["transfer"].items()}
        apart = table[source]["probe_accuracy"][0]
        for row in result["transfer"].values():  # the two kinds of views make up the total
            kinds = (apart * (row["correctly_classified"] or 0)
                     + (1 - apart) * (row["wrongly_classified"] or 0))
            assert 4 * kinds == pytest.approx(row["total"])
    assert "of 16 cells are below the paper's" in capsys.readouterr().out
    with Image.open(out / "heatmap.png") as page:
        assert page.width > 1200 and np.asarray(page.convert("L"))[:8].min() == 255
    refused(evaluate.main, ["--heatmap", tmp_path], "train.py --heatmap")
    refused(evaluate.main, ["--heatmap", "--only", "fig3_views"], "leave --only")


def test_the_heat_map_counts_its_cells(capsys):
    row = dict(native=[300.0, 302.0], probe_accuracy=[0.9, 0.92])
    table = {"flip_lr+flip_ud": row
             | {"flip_lr+flip_ud": [1.0, 1.0], "shear_x+canny": [460.0, 466.0],
                                       "mini_image+canny": [9.0, 9.0]},
             "rotate_cw+flip_lr": row | {"shear_x+canny": [900.0, 900.0]}}
    evaluate.report_heatmap("mnist", table)
    text = capsys.readouterr().out
    assert "2 of 4 cells" in text and "463.00" in text and "91.00" in text  # not 301, not 900
    page = np.asarray(evaluate.heatmap("mnist", table)).astype(int)
    blue, red = (((page[..., a] == 255) & (page[..., b] < 250) & (page[...,
                                                                       1] == page[..., b])).sum()
                 for a, b in ((2, 0), (0, 2)))
    assert min(blue, red) > 20_000  # two cells of either colour
    assert len({*map(len, evaluate.PAPER_TOTALS.values())}) == 1
    evaluate.report_heatmap("kmnist", table)
    assert "paper" not in capsys.readouterr().out
    page = np.asarray(evaluate.heatmap("kmnist", table)).astype(int)
    assert np.ptp(page[..., 0] - page[..., 2]) == 0  # no cell is blue or red


def test_the_papers_numbers_are_mnists(small_data, tmp_path, monkeypatch, capsys):
    """On other data no table, bar or column head speaks of the paper or of digits."""
    words = "--epochs 1 --dataset fashion_mnist"
    small(tmp_path, f"{words} --no-transfer")
    small(tmp_path / "cvae-paired", f"{words} --model cvae-paired")
    drawn = {name: evaluate.FIGURES[name] for name in ("fig3_views", "table1")}
    monkeypatch.setattr(evaluate, "FIGURES", drawn)
    marks, bar_chart, heads, grid = [], evaluate.bar_chart, [], evaluate.grid
    monkeypatch.setattr(evaluate, "bar_chart", lambda title, bars: (
        marks.extend(bars) or bar_chart(title, bars)))
    monkeypatch.setattr(evaluate, "grid", lambda title, columns, *more: (
        heads.append(columns) or grid(title, columns, *more)))
    capsys.readouterr()
    evaluated(tmp_path)
    text = capsys.readouterr().out
    assert "  paper" not in text and "297.10" not in text and "CVAE, paired" in text
    assert [paper for _, _, paper in marks] == [None, None]
    assert heads == [augment.CLASSES["fashion_mnist"]] and heads[0][0] == "T-shirt"
    sizes = {name: len(set(names)) for name, names in augment.CLASSES.items()}
    assert sizes == dict.fromkeys(augment.DATASETS, 10)


def test_a_finished_run_is_not_overwritten_in_silence(finished, capsys):
    before, words = models_in(finished), "--no-transfer"
    refused(train.main, asked(finished, words), "finished", "--overwrite")
    capsys.readouterr()
    small(finished, f"{words} --resume")
    assert "kept" in capsys.readouterr().out and models_in(finished) == before
    refused(train.main, asked(finished, "--resume --overwrite"), "not allowed with")
    (finished / "state.pt").write_bytes(b"?")
    again = asked(finished, f"{words} --resume")
    refused(train.main, again, "state.pt is damaged", "--overwrite")
    small(finished, f"{words} --overwrite --seed 1")
    assert models_in(finished) != before


def test_ctrl_c_stops_after_the_batch(small_data, tmp_path, monkeypatch, capsys):
    usual, batches = signal.getsignal(signal.SIGINT), stop_at(monkeypatch, 20)
    with pytest.raises(SystemExit) as end:
        small(tmp_path, "--no-transfer")
    err = capsys.readouterr().err
    assert end.value.code == 130 and "--resume" in err and "Traceback" not in err
    assert len(batches) == 20
    # a job in the background has another
    assert signal.getsignal(signal.SIGINT) is usual and not train.INTERRUPTED
    small(tmp_path, "--no-transfer --resume")
    assert len(batches) == 20 + 2 * 13  # the second epoch again, and the third


@pytest.mark.parametrize("old, new, batches, kept", [  # 13 batches an epoch, 2 epochs
    ("--seed 0", "--seed 1", 20, 0),
    ("--seed 0", "--seed 0", 5, 0),  # before the first epoch was noted
    ("--baselines", "--baselines --seed 1", 2 * 26 + 15, 2),  # in the third model
    ("--baselines", "--baselines", 2 * 26 + 15, 2),
    ("--seed 0 --record", "--record --seed 2", 20, 0),
    ("--seed 0 --record", "--seed 2", 20, 0)])
def test_what_was_to_be_overwritten_is_resumed_as_it_was_asked(old, new, batches, kept, trained,
                                                               small_data, tmp_path, capsys):
    """--overwrite over a finished run, Ctrl-C, --resume: the bits of a run that was never
    stopped."""
    old, new = (f"--epochs 2 --no-transfer {words}" for words in (old, new))
    whole, out = trained(new), shutil.copytree(trained(old), tmp_path / "run")
    before = models_in(out)
    with stopped(batches):
        small(out, f"{new} --overwrite")
    assert "--resume in the place of --overwrite goes on" in capsys.readouterr().err
    if not kept:  # the old model is still there, and not mistaken for the new one
        assert before == models_in(out)
    refused(train.main, asked(out, new), "was interrupted", "--resume", "--overwrite")
    small(out, f"{new} --resume")
    assert capsys.readouterr().out.count("kept") == kept
    # torch 2.4 does not repeat its own bits
    far = 0 if tuple(map(int, torch.__version__.split(".")[:2])) > (2, 4) else 2
    for path in whole.rglob("*.pt"):  # model.pt, recording.pt
        a, b = (lavae.read(p) for p in (path, out / path.relative_to(whole)))
        a, b = (content.get("tensors", content) for content in (a, b))
        a, b = ({k: torch.stack([*map(torch.as_tensor, v)]).double() if len(v) else v
                 for k, v in content.items()} for content in (a, b))
        assert a.keys() == b.keys() and all((a[k] - b[k]).abs().max() <= far for k in a), path
    assert len([*out.rglob("*.pt")]) == len([*whole.rglob("*.pt")])


def test_a_heat_map_that_was_to_be_overwritten_is_resumed(small_data, tmp_path, monkeypatch):
    out, whole, new = tmp_path / "run", tmp_path / "whole", f"{HEATMAP} --seed 1"
    monkeypatch.setattr(train, "PAIRS", train.PAIRS[:2])
    train.main(asked(out, HEATMAP))
    train.main(asked(whole, new))
    with stopped(3 * 13 + 20):  # in the second pair's first transfer
        train.main(asked(out, f"{new} --overwrite"))
    train.main(asked(out, f"{new} --resume"))
    for path in whole.rglob("model.pt"):
        assert same_bits(lavae.load(path), lavae.load(out / path.relative_to(whole)))


def test_a_film_is_resumed_with_a_film(small_data, tmp_path):
    words = "--epochs 2 --no-transfer"
    for first, then in (("", "--record"), ("--record", "")):
        out = tmp_path / f"run{first}"
        with stopped(20):
            small(out, f"{words} {first}")
        other = asked(out, f"{words} --resume {then}")
        refused(train.main, other, "made with record", "same options")
        small(out, f"{words} --resume {first}")


def test_ctrl_c_in_stage_2_and_in_evaluation(small_data, tmp_path, monkeypatch, capsys):
    words, stage2 = "--epochs 1 --no-transfer", train.stage2
    with monkeypatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(train, "stage2", lambda *more: (
            signal.raise_signal(signal.SIGINT) or stage2(*more)))
        small(tmp_path, words)
    assert end.value.code == 130 and "--resume" in capsys.readouterr().err
    small(tmp_path, f"{words} --resume")
    monkeypatch.setattr(evaluate, "report", failing(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as end:
        evaluated(tmp_path)
    assert end.value.code == 130 and "Traceback" not in capsys.readouterr().err
    monkeypatch.setattr(train, "MAP_LR", 1e200)
    again = asked(tmp_path, f"{words} --overwrite")
    refused(train.main, again, "stage 2", "not finite", "--involution-weight")


def test_ctrl_c_before_anything_is_begun(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "load_images", failing(KeyboardInterrupt()))
    with pytest.raises(SystemExit) as end:
        train.main(["--out", str(tmp_path / "run")])
    assert end.value.code == 130 and capsys.readouterr().err == "\nstopped\n"
    assert not (tmp_path / "run").exists()


def test_of_many_runs_that_begin_in_one_folder_one_succeeds(small_data, tmp_path, monkeypatch):
    """Whatever the file system says of locks: none is asked for."""
    settings, barrier, ends = settings_of(*asked(tmp_path / "run")), threading.Barrier(8), []

    def begin():
        barrier.wait()
        try:
            ends.append(train.begin(settings))
        except FileExistsError as error:
            ends.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ends.count(None) == 1 and len(ends) == 8
    assert all("--resume" in end and "--overwrite" in end for end in ends if end)
    assert names_in(tmp_path / "run") == ["state.pt"]
    refused(train.main, asked(tmp_path / "run"), "at work or was interrupted", "--resume")
    with contextlib.suppress(ImportError):
        import fcntl

        for code in (errno.ENOSYS, 524, errno.EINVAL, errno.EBADF, errno.EIO, errno.ENOLCK):
            for name in ("flock", "lockf", "fcntl"):
                monkeypatch.setattr(fcntl, name, failing(OSError(code, "no locks")))
            small(tmp_path / f"{code}", "--epochs 1 --no-transfer")
            assert names_in(tmp_path / f"{code}") == ["metrics.json", "model.pt"]


@pytest.mark.parametrize("where, code, ends", [
    ("fsync", errno.EINVAL, ""), ("fsync", errno.ENOSYS, ""), ("fsync", errno.ENOTSUP, ""),
    ("fsync", 524, ""),
    ("fsync", errno.ENOSPC, "make room"), ("fsync", errno.EDQUOT, "make room"),
    ("replace", errno.EDQUOT, "make room"), ("replace", errno.EROFS, "Read-only"),
    ("replace", errno.EACCES, "Permission denied"), ("replace", errno.EIO, "Input/output")])
def test_what_a_file_system_cannot_do(where, code, ends, finished, monkeypatch):
    """Ends training only where a file cannot be written, in words that are true."""
    again, waited = asked(finished, "--overwrite --no-transfer"), []
    monkeypatch.setattr(lavae.time, "sleep", waited.append)
    monkeypatch.setattr(lavae.os, where, failing(OSError(code, os.strerror(code))))
    if not ends:
        train.main(again)
        assert names_in(finished) == ["metrics.json", "model.pt"]
        return
    refused(train.main, again, ends, "make room" if ends == "make room" else "another folder")
    assert names_in(finished) == ["metrics.json", "model.pt"]  # of the run before
    assert len(waited) == 4 * (code == errno.EACCES) - (code == errno.EACCES)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        train.main(again)
    assert ("make room" in said.getvalue()) == (ends == "make room")
    monkeypatch.setattr(Image.Image, "save", failing(OSError(code, os.strerror(code))))
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit):
        evaluate.main([str(finished), "--device", "cpu", "--only", "traversals"])
    assert (("make room" in said.getvalue()) == (ends == "make room")
            and os.strerror(code) in said.getvalue())


def test_a_file_that_is_held_for_a_moment_is_written(tmp_path, monkeypatch):
    """As a virus scanner holds it on Windows."""
    calls, replace, waited = [], os.replace, []
    monkeypatch.setattr(lavae.time, "sleep", waited.append)
    monkeypatch.setattr(lavae.os, "replace", lambda *paths: (
        calls.append(1) or (failing(PermissionError(13, "in use"))() if len(calls) < 3
                            else replace(*paths))))
    lavae.write({"a": 1}, tmp_path / "x.pt")
    assert (lavae.read(tmp_path / "x.pt") == {"a": 1} and len(waited) == 2
            and names_in(tmp_path) == ["x.pt"])


class Stream:
    """A standard output of few talents: it writes, or fails with an error."""

    def __init__(self, error=None):
        self.error, self.written = error, []

    def write(self, words):
        if self.error:
            raise self.error
        self.written.append(words)


@pytest.mark.parametrize("stream", [
    lambda: None, Stream, lambda: Stream(BrokenPipeError(errno.EPIPE, "gone")),
    lambda: Stream(OSError(errno.ENOSPC, "full")), lambda: Stream(ValueError("closed")),
    *(functools.partial(io.TextIOWrapper, io.BytesIO(), encoding=name)
      for name in ("cp1252", "ascii", "cp437", "shift_jis"))])
def test_printing_decides_nothing(stream, small_data, tmp_path, monkeypatch):
    """Old consoles, notebooks, loggers, no console at all, a reader who left, a full disk of
    logs."""
    out, stream = tmp_path / "数字 é 🙂", stream()
    with monkeypatch.context() as m:
        m.setattr(sys, "stdout", stream)
        train.main([*SMALL, "--epochs", "1", "--no-transfer", "--out", str(out)])
        evaluate.main([str(out), "--device", "cpu", "--only", "traversals"])
        augment.main(["--out", str(out / "字.png")])
        assert sys.stdout is stream
        train.run(settings_of(*SMALL, "--epochs", "1", "--no-transfer", "--out",
                              str(tmp_path / "b")))
    assert names_in(out) == ["metrics.json", "model.pt", "traversals.png", "字.png"]
    if isinstance(stream, io.TextIOWrapper):
        stream.seek(0)
        shown = stream.read()
        assert ("epoch 1/1" in shown and "now: python evaluate.py '" in shown
                and "traversals.png" in shown)
    elif isinstance(stream, Stream) and not stream.error:
        assert "epoch 1/1" in "".join(stream.written)


def test_a_reader_who_has_seen_enough(tmp_path):
    """`| head -1`: no word on stderr, status 0."""
    process = subprocess.Popen([sys.executable, HERE / "evaluate.py", "--list"], cwd=tmp_path,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 0


def test_training_in_a_thread(small_data, tmp_path):
    thread = threading.Thread(target=small, args=(tmp_path, "--epochs 1 --no-transfer"))
    thread.start()
    thread.join()
    assert names_in(tmp_path) == ["metrics.json", "model.pt"] and not train.INTERRUPTED


def test_a_pillow_that_cannot_write_is_named(run, tmp_path, monkeypatch):
    monkeypatch.setattr(augment.ImageFont, "load_default", failing(ImportError("_imagingft")))
    refused(augment.main, ["--out", tmp_path / "a.png"], "FreeType", "pip install")
    refused(evaluate.main, [run[0], "--device", "cpu", "--only", "traversals"], "FreeType",
            "pip install")


def test_what_is_left_behind(trained, small_data, tmp_path, capsys):
    """--overwrite takes the old run's pictures along; what is refused leaves no folder."""
    out = shutil.copytree(trained("--no-transfer"), tmp_path / "a run")
    evaluate.main([str(out), "--device", "cpu", "--only", "traversals", "reconstructions"])
    (out / "notes.txt").write_text("mine")
    capsys.readouterr()
    small(out, "--no-transfer --overwrite --seed 1")
    assert names_in(out) == ["metrics.json", "model.pt", "notes.txt"]
    assert "now: python evaluate.py '" in capsys.readouterr().out  # the path has a blank
    refused(train.main, asked(out, "--baselines --no-transfer"), "seed 1, not 0", "--overwrite")
    refused(train.main, asked(tmp_path / "new", "--baselines --model vae"), "--baselines")
    assert (names_in(out) == ["metrics.json", "model.pt", "notes.txt"]
            and names_in(tmp_path) == ["a run"])


def test_axes_begin_at_zero_with_round_ticks():
    assert evaluate.round_ticks(6) == [0, 1, 2, 3, 4, 5, 6] and evaluate.round_ticks(0.03) == pytest.approx(
        [0, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03])
    for top in (0.1, 1.7, 99, 101, 236.4, 12345):
        ticks = evaluate.round_ticks(top)
        assert ticks[0] == 0 and ticks[-1] >= top > ticks[-2] and len(ticks) <= 7
        assert float(f"{ticks[1]:.0e}") == pytest.approx(ticks[1]) and f"{ticks[1]:.0e}"[0] in "125"
    points, side = np.array([[5, 5], [10, 10], [5, 10], [10, 5]]), 300
    page = evaluate.panel(side, [("a", points, "dots")], {"a": (255, 0, 0)}, ("x", "y"), None)
    red = np.argwhere((np.asarray(page) == (255, 0, 0)).all(2))
    black = np.argwhere(np.asarray(page.convert("L")) < 60)
    assert 120 < np.ptp(red[:, 0]) == np.ptp(red[:, 1]) < 150  # from 5 to 10, of 0 to 10
    assert black[:, 1].min() < 100 and black[:, 0].max() > 10 + side  # names and numbers are there


def test_an_epochs_seconds_are_its_own(monkeypatch):
    # at the start; at the end of each epoch, twice
    clock = iter([0.0, 2.0, 2.0, 2.5, 2.5, 3.0, 3.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    progress, rows = train.Progress("stage 1", 3, train.Batches(4, 100)), []
    monkeypatch.setattr(progress, "terminal", False)
    for _ in range(3):
        progress.add({"loss": torch.tensor(1.0)}, 100)
        rows.append(progress.end_epoch(["loss"]))
    assert [(row["seconds"],
             row["images_per_second"]) for row in rows] == [(2.0, 200), (0.5, 800), (0.5, 800)]


def test_the_history_keeps_the_means_of_each_hundredth_of_an_epoch(capsys):
    losses = np.random.default_rng(0).random((2, 249))
    progress = train.Progress("stage 1", 2, train.Batches(4, 1990, batch_size=32))
    sizes = [8] * 248 + [6]  # the last batch is smaller
    for epoch in range(2):
        for loss, n in zip(losses[epoch], sizes):
            progress.add({"loss": torch.tensor(loss)}, n)
        row = progress.end_epoch(["loss"])
        curve = row["curve"]
        assert np.allclose(curve["epoch"], epoch + 16 * np.arange(1, 125) / 1990)
        assert np.allclose(curve["loss"], losses[epoch][:248].reshape(124, 2).mean(1))
        assert row["loss"] == pytest.approx(np.average(losses[epoch], weights=sizes))


def test_a_second_ctrl_c_stops_at_once(monkeypatch):
    monkeypatch.setattr(train, "INTERRUPTED", [])
    usual = signal.signal(signal.SIGINT, train.interrupt)
    try:
        signal.raise_signal(signal.SIGINT)
        assert train.INTERRUPTED
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, usual)


def test_a_diverging_run_says_so_and_keeps_the_last_good_state(small_data, tmp_path, monkeypatch):
    calls, kl = [], lavae.kl

    def bad_kl(mu, logvar):
        calls.append(1)
        return kl(mu, logvar) * (math.nan if len(calls) > 16 else 1)

    monkeypatch.setattr(lavae, "kl", bad_kl)
    refused(train.main, asked(tmp_path, "--no-transfer"), "stage 1", "step 16", "--lr")
    assert names_in(tmp_path) == ["state.pt"]
    page = lavae.read(tmp_path / "state.pt")["stage 1"]
    assert len(page["history"]) == 1 and all(p.isfinite().all() for p in page["parameters"])


def test_a_full_disk_leaves_the_last_checkpoint(finished, monkeypatch):
    before, no_room = models_in(finished), failing(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(lavae.os, "fsync", no_room)
    refused(train.main, asked(finished, "--overwrite"), "No space left", "--resume")
    assert models_in(finished) == before
    assert names_in(finished) == ["metrics.json", "model.pt"]
    monkeypatch.setattr(Image.Image, "save", no_room)
    refused(evaluate.main, [finished, "--device", "cpu"], "No space left", str(finished))


def damage(path, rng, other):
    """Write a damaged copy of a file's bytes to `path`: cut, flipped, emptied or another kind of
    file."""
    content, kind = bytearray(path.read_bytes()), rng.integers(4)
    if kind == 0:
        content = content[:rng.integers(len(content))]
    elif kind == 1:
        for i in rng.integers(len(content), size=rng.integers(1, 9)):
            content[i] ^= rng.integers(1, 256)
    else:
        content = b"" if kind == 2 else other
    path.write_bytes(content)


@pytest.mark.parametrize("n", [12, pytest.param(200, marks=slow)])
def test_damage_is_noticed(n, small_data, tmp_path, capsys):
    """n damaged files of the kinds that the programs read: refused, and nothing else is touched."""
    rng, whole, out = np.random.default_rng(0), tmp_path / "run", tmp_path / "copy"
    words = asked(whole, "--epochs 1 --no-transfer")
    train.main(words)
    lavae.write({"config": settings_of(*words).config()}, whole / "state.pt")
    digit_picture(7, 300, "black", "white").save(whole / "x.png")
    other = Image.new("L", (9, 9)).tobytes() + b"PK\x03\x04"
    capsys.readouterr()
    pictures_refused = 0
    for k in range(n):
        name = ("model.pt", "state.pt", "mnist.npz", "x.png")[k % 4]
        shutil.copytree(whole, out)
        if name == "mnist.npz":
            shutil.copy(HERE / "data" / name, out / name)
        damage(out / name, rng, other)
        before = {path: path.read_bytes() for path in out.iterdir()}
        start = time.perf_counter()
        if name == "mnist.npz":
            with pytest.raises(OSError, match="data-dir"):
                augment.load_images("mnist", out)
        elif name == "x.png":
            try:  # a picture may still be one
                evaluate.main([str(out), "--device", "cpu", "--image", str(out / name)])
                (out / "image_x.png").unlink()
            except SystemExit as end:
                err = capsys.readouterr().err
                assert end.code == 2 and err.count("\n") == 1 and "x.png" in err
                pictures_refused += 1
        elif name == "model.pt":
            refused(evaluate.main, [out, "--device", "cpu"], "model.pt")
        else:
            refused(train.main, [*words[:-1], out, "--resume"], "state.pt")
        assert time.perf_counter() - start < 10
        assert before == {path: path.read_bytes() for path in out.iterdir()}
        shutil.rmtree(out)
    assert pictures_refused > n / 4 * 0.6


OPTIONS = {  # valid values, then invalid ones; None: no value
    "--augs": ["flip_lr", "flip_lr canny", "rotate_cw flip_ud", "flop", "", "flip_lr flip_lr"],
    "--transfer": ["canny", "shear_x canny", "shear_x canny mini_image", "nope nope"],
    "--heatmap": [None], "--all-targets": [None], "--paper-involution": [None],
    "--no-transfer": [None], "--baselines": [None], "--resume": [None], "--overwrite": [None],
    "--model": ["lavae", "cvae", "cvae-paired", "vae", "gan"],
           "--condition": ["view", "digit", "both", "x"],
    "--latent-map": ["linear", "mlp", "cubic"], "--joint": ["identity", "signs", "x"],
    "--prior-loss": ["kl", "mmd", "l2"], "--preset": ["quick", "laptop", "huge"],
           "--filters": ["2", "0", "x"],
    "--latent-dim": ["1", "16", "-1", "1.5"], "--batch-size": ["1", "64", "100000", "0"],
    "--lr": ["1e-3", "1e9", "0", "nan", "inf"], "--kl-weight": ["0", "5", "-1"],
           "--equivariance-weight": ["0", "9", "x"],
    "--recon-weight": ["2", "-1"], "--involution-weight": ["0", "1e6", "-1"],
           "--seed": ["7", "-7", "1e3"],
    "--device": ["cpu", "auto", "tpu"], "--dataset": ["mnist", "cifar"],
           "--data-dir": ["nowhere", ""]}


@pytest.mark.parametrize("n", [20, pytest.param(100, marks=slow)])
def test_command_lines_end_well(n, tmp_path, monkeypatch, capsys):
    rng, images = np.random.default_rng(0), np.random.default_rng(1).integers(
        0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    load_few([images, labels, images, labels], monkeypatch)
    monkeypatch.chdir(tmp_path)
    ends = []
    for k in range(n):
        words = "--epochs 1 --transfer-epochs 1 --filters 2 --out".split() + [f"run{k % 40}"]
        for option in rng.choice([*OPTIONS], rng.integers(0, 5), replace=False):
            values = OPTIONS[option]
            value = values[int(len(values) * rng.random() ** 2)]  # more often a valid one
            words += [option, *([] if value is None else value.split())]
        try:
            train.main(words)
            ends.append(0)
        except SystemExit as end:
            ends.append(end.code)
            err = capsys.readouterr().err
            assert end.code == 2 and err.count("\n") == 1 and "Traceback" not in err, (words, err)
    assert n / 5 < ends.count(0) < n * 4 / 5, ends  # some are right, some are wrong


@slow
def test_50_kills_change_no_bit(tmp_path):
    """SIGKILL at random moments of all three stages, resumed each time, against an uninterrupted
    run."""
    program = f"""import sys; sys.path.insert(0, {str(HERE)!r})
import augment, train
images = [part[:6000] for part in augment.load_images()]
train.load_images = lambda *_: images
print("loaded", flush=True)
train.main(sys.argv[1:])"""
    words = [sys.executable, "-c", program, "--device", "cpu", "--filters", "8", "--preset",
             "quick",
             "--epochs", "6", "--transfer-epochs", "5", "--out"]

    def begin(name):
        process = subprocess.Popen([*words, tmp_path / name, "--resume"], stdout=subprocess.PIPE,
                                   text=True)
        assert process.stdout.readline() == "loaded\n"
        return process

    process = begin("whole")
    start = time.perf_counter()
    process.communicate()
    whole = time.perf_counter() - start
    rng, kills = np.random.default_rng(0), 0
    out, epochs = tmp_path / "run", 0
    while kills < 50:
        process = begin("run")
        try:
            process.communicate(timeout=rng.uniform(0.05, 0.5) * whole)
            shutil.rmtree(out)  # it came to its end: once more
            epochs = 0
            continue
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if (out / "state.pt").is_file():
            now = sum(len(page["history"]) for name, page in lavae.read(out / "state.pt").items()
                      if name != "config")
            assert now >= epochs  # what was noted is never lost
            epochs = now
        if (out / "model.pt").is_file():
            lavae.load(out)
    begin("run").communicate()
    assert same_bits(lavae.load(tmp_path / "whole"), lavae.load(out))


# ---------------------------------------------------------------- a pretended accelerator

# As strict as Apple's MPS: what would fail there fails here, where there is only a CPU. Needs
# torch >= 2.9. readbacks: the operations that made the host wait for the device. wrong: names of
# operations, like "mm", that give results 20% too large from then on.

DEVICE = torch.device("privateuseone:0")
COPIES = {"copy_", "_to_copy"}  # these may cross from device to device
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # x[i]: i may be on the CPU
WAITS = {"_local_scalar_dense", "_linalg_check_errors", "allclose", "equal", "masked_select",
         "nonzero", "_unique", "_unique2", "unique_consecutive", "unique_dim"}
readbacks = Counter()  # the aten operations that made the host wait, for a test to read and clear
wrong = set()  # names of aten operations that shall compute wrongly, for a test to fill and clear
libraries = []  # what stand_in() registers: it is gone when nobody holds it


class StandIn(Tensor):
    """A tensor on the device: to torch a shape without memory. Its numbers are in `inner`."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # so that .cpu() is a plain Tensor

    @staticmethod
    def __new__(cls, inner):
        self = Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device=DEVICE)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return on_the_cpu(op, *args, **kwargs or {})

    def _replace(self, new):  # x.data = new, as model.half() does
        Tensor.data.__set__(self, new)
        self.inner = new.inner

    data = property(lambda self: Tensor.data.__get__(self), _replace)

    def numpy(self, **kwargs):
        raise TypeError(f"can't convert {DEVICE} tensor to numpy. Use Tensor.cpu() first")

    def tolist(self):
        return self.cpu().tolist()

    def __format__(self, spec):
        return format(self.detach().cpu(), spec)

    def __repr__(self, **kwargs):
        return f"StandIn({self.inner})"

    def __reduce_ex__(self, protocol):  # for torch.save: in a file it is a CPU tensor
        return self.detach().cpu().__reduce_ex__(protocol)


def on_the_cpu(op, *args, **kwargs):
    """Any aten operation that has to do with the device: check it, and let the CPU compute it."""
    name, leaves = op._schema.name.removeprefix("aten::"), tree_leaves((args, kwargs))
    ours = [t for t in leaves if isinstance(t, StandIn)]
    others = [t for t in leaves if isinstance(t, Tensor) and not isinstance(t, StandIn)]
    indices = [t for t in tree_leaves(args[1]) if t is not None] if name in INDEXING else []
    free = {id(t) for t in indices}  # by id, because t in indices would compute ==
    if ours and name not in COPIES and any(t.dim() and id(t) not in free for t in others):
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found some "
                           f"on {DEVICE} and some on cpu")
    here = (kwargs.get("device") or (ours or others)[0].device).type == DEVICE.type
    if here and any(isinstance(g, torch._C.Generator) and g._cdata not in Generator.made
                    for g in leaves):
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator in {name}")

    inside = {id(t.inner): t for t in ours} | {id(t): t for t in others}
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, StandIn) else x, (args, kwargs))
    result = op(*args, **kwargs | ({"device": "cpu"} if here and "device" in kwargs else {}))

    def outside(x):
        if not isinstance(x, Tensor):
            return x
        if x.dtype in (torch.float64, torch.complex128):  # copied to the CPU, too: an MPS casts
            raise TypeError(f"Cannot convert a {DEVICE.type} Tensor to {str(x.dtype)[6:]}: the "
                            "device has no such numbers. Use float32, or .cpu() first")
        if name in wrong and x.is_floating_point():
            x.mul_(1.2)
        known = inside.get(id(x))  # what works in place returns what it was given
        if isinstance(known, StandIn) and (x.shape, x.stride()) != (known.shape, known.stride()):
            known.data = StandIn(x)  # resized, as by arange(.., out=)
        return known if known is not None else StandIn(x) if here else x

    result = tree_map(outside, result)
    back = ours and name in COPIES and not isinstance(result, StandIn)
    if back or name in WAITS or any(i.dtype == torch.bool for i in indices):
        readbacks[name] += 1
    return result


class Generator(torch.Generator):
    """For monkeypatch.setattr(torch, "Generator", Generator): Python can give torch no other."""

    made = weakref.WeakValueDictionary()  # those of the device, by address: only they may draw here

    def __new__(cls, device="cpu"):
        self = super().__new__(cls)
        self.place = torch.device(device)
        if self.place.type == DEVICE.type:
            cls.made[self._cdata] = self
        return self

    device = property(lambda self: self.place)


def stand_in() -> torch.device:
    """Make the device known to torch, once in a process."""
    if not libraries:
        module = backend_registration._DummyBackendModule()  # and for torch.random.fork_rng:
        module.get_rng_state = lambda device: torch.get_rng_state()
        module.set_rng_state = lambda state, device: torch.set_rng_state(state)
        backend_registration._setup_privateuseone_for_python_backend(DEVICE.type, module)
        libraries.extend(torch.library.Library(ns, "IMPL", "PrivateUse1") for ns in ("_", "aten"))
        # makes new tensors; what follows goes to __torch_dispatch__
        libraries[0].fallback(on_the_cpu)
        libraries[1].impl("_copy_from", lambda source, target, non_blocking=False: on_the_cpu(
            torch.ops.aten.copy_.default, target, source))  # torch.tensor(.., device=DEVICE)
    # backward: torch starts a thread for each device at the first one, and this one may come later
    torch.autograd.set_multithreading_enabled(False)
    return DEVICE


@pytest.fixture
def accelerator(small_data, data, monkeypatch):
    """The device, which --device auto takes."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("a device can be pretended with torch 2.9 and later only")
    device = stand_in()
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(lavae, "pick_device", lambda name="auto": CPU if name == "cpu" else device)
    monkeypatch.setattr(train, "MLP_EPOCHS", 1)
    images = [part[:160] for part in data]
    for program in (train, evaluate):
        monkeypatch.setattr(program, "load_images", lambda *_, **__: images)
    readbacks.clear()
    yield device
    wrong.clear()
    torch.autograd.set_multithreading_enabled(True)


TINY = "--device auto --epochs 1 --transfer-epochs 1 --batch-size 64"  # 160 images: 5 batches


def test_the_stand_in_is_strict(accelerator):
    """It refuses what MPS refuses, counts what makes the host wait, and can be wrong."""
    x, indices = torch.ones(3, device=accelerator), torch.tensor([0, 2])
    for refusal, f in ((TypeError, lambda: x.double()),
                       (TypeError, lambda: x.sum(dtype=torch.float64)),
                       (TypeError,
                        lambda: torch.zeros(2, dtype=torch.complex128, device=accelerator)),
                       (TypeError, lambda: torch.zeros(2, dtype=torch.float64).to(accelerator)),
                       (TypeError, x.numpy), (RuntimeError, lambda: x + torch.ones(3)),
                       (RuntimeError,
                        lambda: torch.randn(2, generator=torch.Generator(), device=accelerator))):
        with pytest.raises(refusal):
            f()
    assert (x + torch.tensor(1.0))[indices].device == accelerator and not readbacks
    assert x.sum().item() == 3 and x.cpu().double().sum() == 3 and bool((x > 0).all())
    assert readbacks == {"_local_scalar_dense": 2, "_to_copy": 1}
    wrong.add("mm")
    unit = torch.eye(2, device=accelerator)
    assert (unit @ unit).sum().item() == pytest.approx(2.4)


@pytest.mark.parametrize("words", [
    "--record --augs rotate_cw flip_lr", "--model cvae", "--model cvae --condition digit",
    "--model cvae --condition both", "--model cvae-paired", "--model vae --transfer shear_x canny",
    "--latent-map mlp", "--latent-map mlp-wide", "--joint identity", "--joint signs",
    "--prior-loss mmd", "--equivariance-weight 0 --paper-involution",
    "--augs flip_lr flip_ud rotate_cw",
    "--latent-dim 2"])
def test_every_kind_of_run_on_an_accelerator(words, accelerator, quick_tsne, tmp_path, monkeypatch,
                                             capsys):
    """Training and evaluation; with all figures where others than elsewhere can be drawn."""
    figures = "--record" in words or "--latent-dim" in words
    if not figures:
        monkeypatch.setattr(evaluate, "FIGURES", {})
    model = small(tmp_path, f"{TINY} {words}")
    text = capsys.readouterr().out
    assert "privateuseone computes what the CPU does" in text and "privateuseone, seed 0" in text
    assert model.settings["device"] == "privateuseone"
    if not (figures or words in ("--model cvae --condition both", "--latent-map mlp-wide")):
        return  # evaluated like others
    evaluate.main([str(tmp_path)])
    assert "privateuseone computes what the CPU does" in capsys.readouterr().out
    assert len([*tmp_path.glob("*.png"), *tmp_path.glob("*.gif")]) >= 16 * figures


def test_an_accelerator_gets_the_cpus_numbers(accelerator, no_figures, tmp_path):
    rows = []
    for device in ("auto", "cpu"):
        out = tmp_path / device
        small(out, f"{TINY} --baselines --device {device}")
        evaluate.main([str(out), "--device", device])
        result = json_of(out / "evaluation.json")
        rows.append([result["lavae"]["total"], result["lavae"]["reverse"],
                     result["transfer"]["shear_x+canny"]["total"],
                     *(row["total"] for row in result["baselines"].values())])
    again = lavae.load(tmp_path / "auto", accelerator)
    assert again.encoder.conv1.weight.device == accelerator
    # noise differs, no more
    assert rows[0] == pytest.approx(rows[1], rel=0.05) and len(rows[0]) == 6


def test_a_run_on_an_accelerator_is_resumed(accelerator, tmp_path):
    words, out = f"{TINY} --epochs 2", tmp_path / "run"
    whole = small(tmp_path / "whole", words)
    for n in (8, 6):
        with stopped(n, Killed):
            small(out, f"{words} --resume")
    assert same_bits(whole, small(out, f"{words} --resume"))


def test_a_notebook_on_an_accelerator(accelerator, run, digits, tmp_path):
    model, x = lavae.load(run[0], accelerator), (torch.from_numpy(digits[:7]) / 255)
    drawn = ([m.augment(x, "flip_ud"), m.convert(x, "flip_lr", "flip_ud"),
              m.power(x, "flip_lr", 0.5)] for m, x in ((model, x.to(accelerator)), (run[1], x)))
    for ours, cpus in zip(*drawn):
        assert ours.device == accelerator and torch.allclose(ours.cpu(), cpus, atol=1e-4)
    lavae.save(model, tmp_path / "model.pt", model.settings)
    assert same_bits(lavae.load(tmp_path / "model.pt"), run[1])


def test_an_epoch_waits_for_nothing(accelerator, tmp_path, monkeypatch):
    """Between the first and the last batch of an epoch the host reads nothing back, in no stage."""
    seen, add = {}, train.Progress.add
    monkeypatch.setattr(train.Progress, "add", lambda self, *step: (
        seen.setdefault((self, self.epoch), []).append(readbacks.total()), add(self, *step)))
    for words in ("", "--model cvae --condition both", "--prior-loss mmd --augs rotate_cw canny",
                  "--joint identity"):
        small(tmp_path, f"{TINY} --overwrite {words}")
    assert len(seen) == 7 and {len(counts) for counts in seen.values()} == {5, 10}
    assert all(counts[0] == counts[-1] for counts in seen.values()), seen
    assert readbacks.total() > 0  # the stand-in does count: at the ends of epochs


def test_an_accelerator_that_computes_wrongly_is_not_trusted(accelerator, tmp_path, capsys):
    words, out = f"{TINY} --no-transfer", tmp_path / "cpu"
    cpus = small(out, f"{words} --device cpu")
    for operation in ("mm", "convolution_backward", "addmm"):
        wrong.add(operation)
        named = asked(tmp_path / "named", f"{words} --device mps")
        refused(train.main, named, "away", "--device cpu")
        assert not (tmp_path / "named").exists()
        ours = small(tmp_path / operation, words)
        assert "the CPU is taken" in capsys.readouterr().out
        assert same_bits(cpus, ours)
        wrong.clear()
    wrong.add("mm")
    refused(evaluate.main, [out, "--device", "mps"], "away", "--device cpu")


def test_an_accelerator_that_lacks_something_is_not_trusted(monkeypatch, capsys):
    """Whatever MPS answers to an operation or a type that it lacks, and however far it is off."""
    test, mps = lavae.self_test, torch.device("mps")
    monkeypatch.setattr(lavae, "pick_device", lambda name="auto": mps)
    for error in (NotImplementedError("The operator 'aten::what' is not implemented\nmore"),
                  TypeError("Cannot convert a MPS Tensor to float64"), RuntimeError("aten::what")):
        monkeypatch.setattr(lavae, "self_test", lambda device, optimizer: (
            failing(error)() if device == mps else test(device, optimizer)))
        assert lavae.verified_device("auto", adabelief.AdaBelief) == CPU
        assert str(error).splitlines()[0] in capsys.readouterr().out
        with pytest.raises(ValueError, match="--device cpu"):
            lavae.verified_device("mps", adabelief.AdaBelief)
    for value, verified in ((1.001, True), (1.1, False), (math.nan, False)):
        monkeypatch.setattr(lavae, "self_test", lambda device, optimizer: [
            torch.tensor([3.0]), torch.tensor(value if device == mps else 1.0)])
        assert (lavae.verified_device("auto", adabelief.AdaBelief) == mps) == verified


# ---------------------------------------------------------------- README's numbers
#
# assets/results/NAME-SEED.json holds what train.py and evaluate.py wrote of a run. README's tables and sentences are
# made from there, and a test finds them in README.

RESULTS = HERE / "assets" / "results"


def keep(run, name):
    """What README needs of a run that is finished and evaluated (flips with --baselines), to
    assets/results/NAME.json."""
    def rounded(thing):
        if isinstance(thing, dict):
            return {key: rounded(value) for key, value in thing.items()}
        if isinstance(thing, list):
            return [rounded(value) for value in thing]
        return float(f"{thing:.6g}") if isinstance(thing, float) else thing

    metrics, evaluation = (json_of(Path(run) / f"{file}.json")
                           for file in ("metrics", "evaluation"))
    del metrics["history"]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(rounded({**metrics,
                                                              "evaluation": evaluation})) + "\n")


def kept(name):
    """The runs NAME-0, NAME-1, .. in the order of their seeds."""
    runs = [json_of(path) for path in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
    assert [run["config"]["seed"] for run in runs] == [*range(len(runs))] and runs
    for run in runs:  # they differ in nothing else, but for what they were transferred to
        assert run["config"] | {"seed": 0,
                                "transfer": 0} == runs[0]["config"] | {"seed": 0,
                                                                       "transfer": 0}, name
    return runs


def limit(folder, *target):
    """To assets/results/limit-SOURCE-TARGET-SEED.json: what an ideal decoder would get that is
    given the codes z L of a heat-map's run and draws another pair. Who cannot be sure which view is
    asked paints the mean of those that may be: here p(view | z) is a classifier's, whose
    temperature is the best one for the test images, and the views are drawn by a decoder that is
    told which."""
    model, data = lavae.load(folder), augment.load_images()
    views, condition = range(2 ** len(target)), CVAE(target).to_view
    filters = model.arguments["filters"]
    z, z_test = (torch.stack(augment.views(model.encode(torch.from_numpy(x)),
                                           model.maps)) for x in data[::2])
    images, wanted = (train.view_tensor(x, target, CPU) for x in data[::2])
    torch.manual_seed(0)
    hidden = lavae.HEAD_WIDTH * filters
    classifier = torch.nn.Sequential(lavae.Decoder(z.shape[2], filters, hidden).hidden,
                                     torch.nn.Linear(hidden, len(views)))
    told = lavae.channels_last(lavae.Decoder(z.shape[2] + len(views), filters, hidden))

    def guess(index, _):
        asked = torch.arange(len(views)).repeat_interleave(len(index))
        return {"loss": torch.nn.functional.cross_entropy(classifier(z[:, index].flatten(0, 1)),
                                                          asked)}

    def draw(index, _):
        original = torch.cat([condition(z[0, index], v) for v in views])
        return {"loss": lavae.bce(told(original), lavae.pixels(images[:, index]).flatten(0, 1))}

    train.fit("p(view | z)", guess, [*classifier.parameters()], train.Batches(*z.shape[:2], 512), 8,
              2e-3)
    train.fit("told the view", draw, [*told.parameters()], train.Batches(*z.shape[:2]), 3, 4.5e-3)
    totals, temperatures = Counter(), (0.8, 1.0, 1.2, 1.5, 2.0)
    with torch.no_grad():
        for v, i in itertools.product(views, torch.arange(z_test.shape[1]).split(lavae.BLOCK)):
            x, odds = lavae.pixels(wanted[v, i]), classifier(z_test[v, i])
            drawn = torch.stack([told(condition(model.from_view(z_test[v, i], u),
                                                u)).sigmoid() for u in views])
            for t in temperatures:
                mean = torch.einsum("bu,ubhw->bhw", (odds / t).softmax(1), drawn).clamp(max=1)
                totals[t] += torch.nn.functional.binary_cross_entropy(mean, x,
                                                                      reduction="sum").item()
            totals["told"] += torch.nn.functional.binary_cross_entropy(drawn[v], x,
                                                                       reduction="sum").item()
    totals = {key: value / z_test.shape[1] for key, value in totals.items()}
    found = {"source": "+".join(model.augs), "target": "+".join(target), "told": totals["told"],
             "ideal": min(totals[t] for t in temperatures), "made": train.made_with("cpu")}
    name = f"limit-{found['source']}-{found['target']}-{model.settings['seed']}"
    (RESULTS / f"{name}.json").write_text(json.dumps(found) + "\n")
    print(found)


def spread(values):
    return evaluate.spread(values, digits=1).replace("+-",
                                                     "±") if len(values) > 1 else f"{values[0]:.1f}"


def row(*cells):
    return "| " + " | ".join(cells) + " |"


def lavae_rows(name):
    return [run["evaluation"]["lavae"] for run in kept(name)]


def direct(run):
    """The total of all views without a map, each encoded itself."""
    return sum(run["direct"].values())


def excess(run):
    """The most that a view costs over encoding it directly, %."""
    return max(100 * (run[view] / nats - 1) for view, nats in run["direct"].items())


def never_shown(run):
    return [nats for element, nats in run["elements"].items() if element not in run["direct"]]


def range_of(values, digits=0):
    low, high = (f"{f(values):.{digits}f}" for f in (min, max))
    return low if low == high else f"{low} to {high}"


def table1_row(label, rows):
    """Of a model in Table I, over seeds: the nats of each view and of all."""
    return row(label, *(spread([one[view] for one in rows])
                        for view in (*rows[0]["identity"], "total")))


def identity_row(label, rows):
    """The percentage of test images that keep their identity, over seeds."""
    *views, both = rows[0]["identity"]
    flips = [100 * np.mean([one["identity"][view] for view in views[1:]]) for one in rows]
    return row(label, f"{spread(flips)}%",
               f"{spread([100 * one['identity'][both] for one in rows])}%")


def result_row(label, rows):
    views = [spread([one[view] for one in rows]) for view in rows[0]["direct"]]
    return row(label, *views, f"**{spread([one['total'] for one in rows])}**")


def ladder_rung(label, flips, turns):
    """The kept runs of flips and of turns with the methods of a rung."""
    flips, turns = kept(flips), lavae_rows(turns)
    ours = [run["evaluation"]["lavae"] for run in flips]
    transfer = [run["evaluation"]["transfer"]["shear_x+canny"]["total"] for run in flips
                if run["config"]["transfer"]]
    return row(label, spread([*map(direct, ours)]), spread([one["total"] for one in ours]),
               spread([*map(direct, turns)]), spread([one["total"] for one in turns]),
               range_of([nats for one in turns for nats in never_shown(one)]),
               spread(transfer) if transfer else "")


def readme_parts():
    """README's rows and half-sentences with numbers in them, by name."""
    ours, published, turns = (lavae_rows(name) for name in ("flips", "published", "turns"))
    (stuck,), (signs,), (mmd,) = map(lavae_rows, ("joint-identity", "joint-signs", "mmd"))
    others = [run["evaluation"]["baselines"] for run in kept("flips")]
    made = [json_of(path)["made"] for path in sorted(RESULTS.glob("*.json"))]
    machines = sorted({(one["hardware"], one["torch"].split("+")[0]) for one in made}, reverse=True)
    days = [f(one["date"] for one in made) for f in (min, max)]
    assert {one["threads"] for one in made if one["device"] == "cpu"} == {1}
    assert stuck["group"]["directions"]["++"] == 16
    parts = {
        "result_published": result_row("as published, 6 epochs", published),
        "result_ours": result_row("ours, 6 epochs", ours),
        "ladder": "\n".join([
            ladder_rung("as published", "published", "published-turns"),
            ladder_rung("+ recipe", "recipe", "recipe-turns"),
            ladder_rung("+ orders", "recipe", "orders-turns"),
            ladder_rung("+ equivariance loss", "plain-head", "turns"),
            ladder_rung("+ gated heads", "flips", "turns"),
            ladder_rung("as published, 64 filters, 33 epochs", "published64", "published64-turns")]),
        "half_length": range_of([half["length"] for one in ours for half in one["half"].values()],
                                2),
        "half_away": range_of([half["re-encoded"] for one in ours for half in one["half"].values()],
                              2),
        "vae_total": f"{np.mean([one['vae']['total'] for one in others]):.0f}",
        "joint": f"with maps that start at the identity the total is {stuck['total']:.0f}, and all "
                 f"eigenvalues stay at +1; with diagonals of +1 and −1 that do not learn it is "
                 f"{signs['total']:.1f}; in two stages {ours[0]['total']:.1f}.",
        "cuda": f"{lavae_rows('cuda')[0]['total']:.2f}",
        "direct_total": spread([*map(direct, ours)]),
        "turns_free": f"{lavae_rows('published-turns-free')[0]['total']:.1f}",
        "turn_back": f"{turns[0]['inverse']['rotate_cw']:.0f} nats, and as published "
                     f"{lavae_rows('published-turns')[0]['inverse']['rotate_cw']:.0f}",
        "quick_total": spread([one["total"] for one in lavae_rows("quick")]),
        "mmd_total": f"{mmd['total']:.1f}",
        "three": f"{spread([one['total'] / 8 for one in lavae_rows('three')])} nats a view",
        "three_excess": f"{max(map(excess, lavae_rows('three'))):.1f}%",
        "four_excess": f"{max(map(excess, lavae_rows('four'))):.1f}%",
        "turns": "\n".join(turns_row(run) for run in (*kept("turns"), *kept("k2"))),
        "made": "; ".join(f"{hardware}, torch {torch}" for hardware, torch in machines) + "; "
        + " to ".join(days)}
    for name in ("digit", "both"):
        parts[f"told_{name}"] = f"{kept(f'cvae-{name}')[0]['evaluation']['cvae']['total']:.0f}"
    runs = [*((f"seed {seed}", one) for seed, one in enumerate(published)),
            ("MLP, seed 0", *lavae_rows("published-mlp")),
            ("no involution term, seed 0", *lavae_rows("published-free"))]
    parts["evidence"] = "\n".join(row(label, *(f"{one[view]:.1f}"
                                               for view in (*one["direct"], "reverse")), *(
        f"{one['inverse'][view]:.1f}" for view in ("flip_lr", "flip_lr+flip_ud"))) for label,
                                  one in runs)
    parts |= table1_parts([{"lavae": one, **other} for one, other in zip(ours, others)])
    return parts | heatmap_parts({source: [run["evaluation"] for run in kept(f"heat-{source}")]
                                  for source in evaluate.PAPER_TOTALS})


def table1_parts(runs):
    """The rows of Table I and of identity; runs: the rows of all models by name, over seeds."""
    parts, identity = {}, []
    for name, label in (evaluate.LABELS | {"lavae": "**LAVAE**"}).items():
        rows = [run[name] for run in runs]
        parts[f"table1_{name}"] = table1_row(label, rows)
        identity.append(identity_row(label, rows))
    return parts | {"identity": "\n".join(identity)}


def turns_row(run):
    one, label = run["evaluation"]["lavae"], "k = 2, " * run["config"]["paper_involution"]
    roots = Counter((round(re), abs(round(im))) for re,
                    im in one["group"]["eigenvalues"]["rotate_cw"])
    return row(f"{label}seed {run['config']['seed']}", f"{one['total']:.2f}",
               f"{direct(one):.2f}",
               f"{excess(one):.1f}%", range_of(never_shown(one)),
               f"{roots[1, 0]}, {roots[-1, 0]}, {roots[0, 1]}")


def heatmap_parts(found):
    """The same of the heat-maps; found: the evaluations of each source, over seeds."""
    def below(runs):
        cells = evaluate.beside_paper("mnist", {source: evaluate.heatmap_row(rows) for source,
                                                rows in runs.items()})
        return cells, f"{sum(ours < paper for *_, ours, paper in cells)} of {len(cells)}"

    cells, ours = below(found)
    theirs = below({one: [run["evaluation"] for run in kept(f"heat-published-{one}")]
                    for one in found})[1]
    (source, target, _, paper), = [cell for cell in cells if cell[2] >= cell[3]]
    seeds = [one["transfer"][target]["total"] for one in found[source]]
    heads = [one["transfer"]["shear_x+canny"] for one in found["flip_lr+flip_ud"]]
    right, wrong = (np.mean([head[kind] for head in heads]) for kind in ("correctly_classified",
                                                                         "wrongly_classified"))
    limits = [json_of(RESULTS / f"limit-rotate_cw+flip_lr-shear_x+canny-{seed}.json")
              for seed in range(3)]
    probe = []
    for one, rows in found.items():
        (further,) = (run["evaluation"]["transfer"] for run in kept(f"more-{one}"))
        probe.append(row(one.replace("+", ", "),
                         f"{100 * np.mean([run['lavae']['probe_accuracy'] for run in rows]):.1f}%",
                         *(f"{further['+'.join(pair)]['total']:.0f}"
                           for pair in train.MORE_TARGETS)))
    back = np.mean([one["lavae"]["inverse"]["canny"] for one in found["shear_x+canny"]])
    return {"heat_below": ours, "heat_published_below": theirs, "probe": "\n".join(probe),
            "heat_above": f"{source} to {target}, with {' and '.join(map('{:.0f}'.format, seeds))} "
                          f"where the paper has {paper:.0f}"
            .replace("+", ", "), "probe_right": f"{right:.1f} nats", "probe_wrong": f"{wrong:.1f}",
            "canny_back": f"{back:.0f} nats",
            "limit_ideal": " and ".join(f"{one['ideal']:.0f}" for one in limits),
            "limit_told": f"{np.mean([one['told'] for one in limits]):.0f}"}


def test_readmes_numbers_are_those_of_the_kept_runs():
    text, parts = (HERE / "README.md").read_text(encoding="utf-8"), readme_parts().values()
    unwrapped = " ".join(text.split())
    for part in parts:
        assert " ".join(part.split()) in unwrapped, f"README lacks {part}"
    # `benchmark` prints those
    text = re.sub(r"<details><summary><b>Speed.*?</details>", "", text, flags=re.DOTALL)
    rows = {line for part in parts for line in part.splitlines()}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("| paper") and line not in rows:
            for part in parts:
                line = line.replace(f"| {part} |", "")
            assert not re.search(r"\d\.\d", line), f"of no kept run: {line}"


# ---------------------------------------------------------------- benchmark: python test_lavae.py


def in_turn(rounds=7, **jobs):
    """Run the jobs in turn; print the median seconds of each and their ratio to the first one's."""
    seconds = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):
                job()
            seconds[name].append(time.perf_counter() - start)
    first = np.array(next(iter(seconds.values()))[1:])  # the first round warms up
    for name, times in seconds.items():
        print(f"  {name:24} {np.median(times[1:]):8.3f} s   {np.median(first / times[1:]):6.2f}")


def benchmark_stage1(n=8192):
    images, settings = train.view_tensor(augment.load_images()[0][:n], ["flip_lr", "flip_ud"],
                                         CPU), settings_of()
    model, same = LAVAE(filters=settings.filters), LAVAE(filters=settings.filters)
    for one in (model, same):
        lavae.channels_last(one)
    shuffled = lavae.pixels(images.flatten(0, 1)[torch.randperm(4 * n)])
    optimizer = torch.optim.Adam([*same.encoder.parameters(), *same.decoder.parameters()],
                                 fused=True)

    def bare_loop():
        for x in shuffled.split(settings.batch_size):
            mu, logvar = same.encoder(x)
            z = mu + torch.exp(logvar / 2) * torch.randn_like(mu)
            loss = lavae.bce(same.decoder(z), x) + lavae.kl(mu, logvar)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    print(f"stage 1 on {4 * n:,} images in batches of {settings.batch_size}")
    in_turn(**{"bare loop, Adam(fused)": bare_loop,
               "train.stage1": lambda: train.stage1(model, images)})


def benchmark_recipe(n=2048):
    """How long the paper's training takes here: 100 epochs of stage 1 and 60 of stage 2, batch 64,
    64 filters. (A pass of stage 2 encodes the same views without gradients to encoder or decoder:
    reckoned as a sixth.)"""
    images = train.view_tensor(augment.load_images()[0][:n], ["flip_lr", "flip_ud"], CPU)
    model, start = lavae.channels_last(LAVAE(filters=64)), time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        train.stage1(model, images, weights=lavae.WEIGHTS | {"equivariance": 0.0}, batch_size=64)
    epoch = (time.perf_counter() - start) * 60_000 / n
    print(f"the paper's 100 + 60 epochs: 100 * {epoch:.0f} s + 60 * {epoch / 6:.0f} s = "
          f"{110 * epoch / 3600:.1f} hours")


def benchmark_adabelief(filters, n=100):
    def stepping(make):
        model = LAVAE(filters=filters)
        tensors = [*model.encoder.parameters(), *model.decoder.parameters()]
        for p in tensors:
            p.grad = torch.randn_like(p)
        with contextlib.redirect_stdout(io.StringIO()):
            optimizer = make(tensors)
        return lambda: [optimizer.step() for _ in range(n)]

    print(f"{n} steps on the tensors of encoder and decoder, {filters} filters")
    in_turn(**{"AdaBelief": stepping(adabelief.AdaBelief),
               "adabelief_pytorch": stepping(lambda p: adabelief_pytorch.AdaBelief(
                   p, rectify=False, print_change_log=False)),
               "Adam(foreach)": stepping(lambda p: torch.optim.Adam(p, foreach=True))})


def benchmark_canny():
    x = augment.load_images()[0]
    tracemalloc.start()
    augment.canny(x)
    print(f"canny on {len(x):,} images: {tracemalloc.get_traced_memory()[1] / 2 ** 20:.0f} MiB at most, "
          f"{x.nbytes / 2 ** 20:.0f} of them the result")
    tracemalloc.stop()
    in_turn(3, **{"augment.canny": lambda: augment.canny(x),
                  "loop over cv2.Canny": lambda: [255 - cv2.Canny(i, 100, 200,
                                                                  L2gradient=True) for i in x],
                  "loop over skimage's": lambda: [feature.canny(i) for i in x]})


def benchmark():
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads. "
          "Median seconds, in turn; then how many times as fast as the first")
    benchmark_adabelief(32)  # before `channels_last` has had a hand in the memory
    benchmark_adabelief(64)
    benchmark_stage1()
    benchmark_recipe()
    benchmark_canny()


if __name__ == "__main__":
    if sys.argv[1:2] == ["keep"]:
        keep(*sys.argv[2:])
    elif sys.argv[1:2] == ["limit"]:
        limit(*sys.argv[2:])
    elif sys.argv[1:2] == ["tables"]:
        for name, part in readme_parts().items():
            print(f"{name}:\n{part}\n")
    else:
        from skimage import feature

        benchmark()
