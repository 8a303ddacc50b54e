"""Tests: everything made from scratch against somebody else's code, on real digits.

python -m pytest -n 2           # against OpenCV, SciPy, adabelief-pytorch, torchvision, Pillow
"""

import base64
import contextlib
import copy
import errno
import functools
import io
import itertools
import json
import math
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import urllib.error
from argparse import Namespace
from pathlib import Path

import adabelief_pytorch
import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from scipy import linalg, ndimage, special
from torchvision.transforms import functional as F

import adabelief
import augment
import evaluate
import lavae
import train
from lavae import CVAE, LAVAE

# tests side by side: a thread for each, and for what it starts
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

HERE = Path(__file__).resolve().parent
PAGES = [HERE / "README.md", HERE / "assets/results/README.md", HERE / "assets/answers.md"]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--filters", "2", "--epochs", "3", "--transfer-epochs", "2"]
QUARTER = torch.tensor([[0.0, 1], [-1, 0]])  # a quarter turn of the plane, and a reflection
PAIRS = evaluate.PAIR_NAMES
MIRROR = torch.diag(torch.tensor([1.0, -1]))


@functools.cache
def mnist():
    """(x_train, y_train, x_test, y_test), all of MNIST."""
    return augment.load_images()


@pytest.fixture(scope="module")
def data():
    return mnist()


@pytest.fixture(scope="module")
def digits(data):
    """500 test images."""
    return data[2][:500]


def load_few(data, monkeypatch, n=400, n_test=250):
    """Both programs load n training and n_test test images, and stage 2 is short."""
    images = data[0][:n], data[1][:n], data[2][:n_test], data[3][:n_test]
    for program in (train, evaluate):
        monkeypatch.setattr(program, "load_images", lambda *_, **__: images)
    monkeypatch.setattr(train, "MAP_STEPS", 20 if n < 1000 else 250)
    return images


@pytest.fixture
def small_data(data, monkeypatch):
    return load_few(data, monkeypatch)


def options(*words):
    """The options of a run, as train.py resolves them."""
    return train.resolve(train.parser_of().parse_args([*words]))


def asked(out, words=""):
    """The words of train.py for a small run in the folder `out`."""
    return [*SMALL, *words.split(), "--out", str(out)]


def small(out, words=""):
    """The model of a small run."""
    return train.main(asked(out, words))


def tiny_run(data, out, words, n=2000):
    """All three stages on n images with 8 filters, and the trained model: some seconds."""
    tiny = "--preset quick --epochs 1 --filters 8 --batch-size 32 --lr 5e-3 --device cpu"
    with pytest.MonkeyPatch.context() as m:
        load_few(data, m, n)
        train.main([*tiny.split(), *words.split(), "--out", str(out)])
    return lavae.load(out)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A finished run folder and its model, left as they are by the tests."""
    out = tmp_path_factory.mktemp("runs") / "flip_lr+flip_ud"
    words = "--epochs 5 --transfer-epochs 2 --equivariance-weight 100 --lr 9e-3"
    return out, tiny_run(data, out, words)


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
def no_figures(monkeypatch):
    """evaluate.py only measures."""
    monkeypatch.setattr(evaluate, "FIGURES", {})


def evaluated(*runs):
    """What evaluate.py writes of the first of these runs."""
    evaluate.main([str(path) for path in runs])
    return json_of(runs[0] / "evaluation.json")["tables"]


def json_of(path):
    return json.loads(path.read_text())


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def same_bits(*models):
    a, b = (model.state_dict() for model in models)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def lavae_with(augs, *maps, latent_dim=16, **named):
    """An untrained LAVAE with these maps, or with random ones. Its weights are scaled until other
    latents are clearly other pictures: else a wrong latent would pass for a right one."""
    torch.manual_seed(2)
    size, digits = len(maps[0]) if maps else latent_dim, mnist()[2][:100]
    model = LAVAE(augs, latent_dim=size, filters=2, **named).requires_grad_(False)
    stretched = 1.3 * torch.linalg.qr(torch.randn(len(augs), size, size)).Q
    for latent_map, L in zip(model.maps, maps or stretched):
        latent_map.L.copy_(L)
    model.encoder.linear.weight.div_(model.encode(digits).std())
    for decoder in (model.decoder, *model.heads.values()):
        for layer in (decoder.linear, decoder.deconv1, decoder.deconv2):
            layer.weight.mul_(8)
    z, f = model.encode(digits), model.maps[0]
    costs = [
        evaluate.decoded(model.decoder, z_i, digits)[2] for z_i in (z, f(z), f.inverse(z), 0 * z)
    ]
    for a, b in itertools.combinations(costs, 2):
        assert (a - b).abs().mean() > 0.05 * b.mean()
        assert maps or abs(a.mean() / b.mean() - 1) > 0.05
    return model


def few(data):
    """The first images of all: 2,000 and 500."""
    return data[0][:2000], data[1][:2000], data[2][:500], data[3][:500]


def run_of(out, model, images):
    """What figures are made from, with ten digits."""
    if not hasattr(model, "settings"):
        model.settings = vars(options("--augs", *model.augs)) | {"condition": None}
    return evaluate.Run(out, model, images)


def measured(model, images):
    """The tables of a model."""
    return evaluate.measure(run_of(Path("run"), model, images))


def drawn_row(tables):
    """The model's own row of Table I."""
    return next(iter(tables[evaluate.TABLE_1].values()))


def truth(x, name):
    """Images x under the augmentations of a view's or a product's name."""
    for factor in name.split("+") if name != "orig" else []:
        aug, _, n = factor.partition("^")
        for _ in range(int(n or 1)):
            x = augment.AUGMENTATIONS[aug](x)
    return x


def computed(label, **names):
    """What a row's label says, in plain torch: D(E(x) L1^2 L2), D(E(v) (L1 L2)^-1), .."""
    code = re.sub(r"\((L\d(?: L\d)*)\)\^-1", r"power(\1, -1)", label)
    code = re.sub(r"(L\d)\^(-?\d+)", r"power(\1, \2)", code)
    code = re.sub(r"(?<=[\w)]) (?=L|power)", " @ ", code)
    return eval(code, {"power": torch.linalg.matrix_power, **names})


def names_of(model, **more):
    """What the formulas of a model are made of: E, D, D_B, L1, L2, .."""
    heads = [*model.heads.values()] or [None]
    found = {f"L{i}": f.L for i, f in enumerate(model.maps, 1)}
    found["E"] = lambda x: model.encoder(torch.from_numpy(x) / 255)[0]
    return found | {"D": model.decoder, "D_B": heads[0], **more}


def refused(main, argv, *words):
    """main ends with status 2 and one line on stderr that holds the words."""
    out, said = io.StringIO(), io.StringIO()
    captured = contextlib.redirect_stdout(out), contextlib.redirect_stderr(said)
    with captured[0], captured[1], pytest.raises(SystemExit) as end:
        main([str(word) for word in argv])
    err = said.getvalue()
    assert end.value.code == 2 and err.count("\n") == 1, err
    assert all(word in err for word in words), err


def failing(error):
    """A function that does nothing else than to raise this."""

    def fail(*_, **__):
        raise error

    return fail


@contextlib.contextmanager
def stopped(n, by=KeyboardInterrupt):
    """What is trained in here is stopped at its n-th batch."""
    seen, batches = [], train.Batches.__iter__

    def count(self):
        for index in batches(self):
            seen.append(1)
            if len(seen) == n:
                raise by
            yield index

    with pytest.MonkeyPatch.context() as m, pytest.raises(SystemExit) as end:
        m.setattr(train.Batches, "__iter__", count)
        yield
    assert end.value.code == 130


# ---------------------------------------------------------------- adabelief.py


def small_net():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(3 * 6 * 6, 5)
    ).double()


def steps(net, optimizer, n, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        x = torch.randn(8, 1, 8, 8, generator=generator, dtype=torch.double)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_adabelief_groups_and_half_precision():
    net = small_net()
    first, second = [*net[0].parameters()], [*net[3].parameters()]
    optimizer = adabelief.AdaBelief([{"params": first, "lr": 0.0}, {"params": second}], lr=1e-2)
    before = [p.detach().clone() for p in net.parameters()]
    steps(net, optimizer, 1)
    changed = [not torch.equal(a, b) for a, b in zip(before, net.parameters())]
    assert changed == [False, False, True, True]
    half = torch.ones(3, dtype=torch.float16, requires_grad=True)
    half.sum().backward()
    with pytest.raises(TypeError, match="float32 and float64"):
        adabelief.AdaBelief([half]).step()


@pytest.mark.parametrize("words", [dict(eps=1e-16), dict(betas=(0.5, 0.75), eps=0.01)])
def test_adabelief_equals_the_authors_package(words):
    ours, theirs = small_net(), small_net()
    plain = dict(rectify=False, print_change_log=False)
    a = steps(ours, adabelief.AdaBelief(ours.parameters(), lr=1e-2, **words), 200)
    package = adabelief_pytorch.AdaBelief(theirs.parameters(), lr=1e-2, **words, **plain)
    assert (a - steps(theirs, package, 200)).abs().max() < 1e-12


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


# ---------------------------------------------------------------- augment.py


def test_flips_and_rotations(digits):
    f = augment.AUGMENTATIONS
    for name, reference in (
        ("flip_lr", np.fliplr),
        ("flip_ud", np.flipud),
        ("rotate_cw", lambda x: np.rot90(x, -1)),
        ("rotate_ccw", np.rot90),
    ):
        assert np.array_equal(f[name](digits), np.stack([reference(x) for x in digits])), name
    assert f["rotate_cw"](digits[:, :9]).shape == (len(digits), 28, 9)


def odd_images(n, seed=0):
    """n arrays of uint8 images of all kinds, 1x1 to 64x64: what canny must not stumble over."""
    rng = np.random.default_rng(seed)
    for k in range(n):
        height, width = rng.integers(1, 65, 2)
        noise = rng.integers(0, 256, (height, width), dtype=np.uint8)
        ramp = np.add.outer(
            np.arange(height) * rng.integers(0, 9), np.arange(width) * rng.integers(0, 9)
        )
        point = np.zeros_like(noise)
        point[rng.integers(height), rng.integers(width)] = 255
        yield (
            noise,
            cv2.GaussianBlur(noise, (5, 5), 1.5),
            (ramp % 256).astype(np.uint8),
            np.full_like(noise, rng.integers(256)),
            point,
        )[k % 5][None]


def test_canny_is_opencvs(digits):
    """On odd images and on digits."""
    for images in (digits, *odd_images(100)):
        for low, high in ((100, 200), (0, 0), (50, 150)):
            expected = np.stack(
                [cv2.Canny(x, low, high, apertureSize=3, L2gradient=True) for x in images]
            )
            ours = augment.canny(images, low, high)
            assert np.array_equal(ours, 255 - expected), (images.shape, low)


def test_shears_and_turns_are_exact_bilinear_resamplings(digits):
    other = np.random.default_rng(0).integers(0, 256, (20, 11, 30), dtype=np.uint8)
    for images, degrees in ((digits[:50], -47.5), (digits[:50], 20.0), (other, -47.5)):
        angle, centre = math.radians(degrees), (np.array(images.shape[1:]) - 1) / 2
        c, s = math.cos(angle), math.sin(angle)
        for f, M in (
            (augment.shear_x, [[1, 0], [s / c, 1]]),
            (augment.rotate_30, [[c, -s], [s, c]]),
        ):
            options = dict(offset=centre - M @ centre, order=1, mode="grid-constant")
            for image, ours in zip(images, f(images, degrees)):
                expected = ndimage.affine_transform(image.astype(float), M, **options)
                assert np.abs(expected - ours).max() <= 0.501
    pillows = [Image.fromarray(x).rotate(-30, Image.Resampling.BILINEAR) for x in digits]
    away = np.abs(augment.rotate_30(digits).astype(int) - np.stack([*map(np.asarray, pillows)]))
    assert (away[:, 4:-4, 4:-4] <= 1).all()
    expected = F.affine(
        torch.from_numpy(digits).double(), 0, [0, 0], 1, [-47.5, 0], F.InterpolationMode.BILINEAR
    )
    assert np.abs(expected.numpy() - augment.shear_x(digits)).max() <= 0.501


def test_blur_edges_and_miniature_against_libraries(digits):
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]], float)
    same = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]], float)
    other = np.random.default_rng(0).integers(0, 256, (20, 17, 40), dtype=np.uint8)

    def blur(x):
        return ndimage.gaussian_filter(x.astype(float), 1, mode="mirror", radius=3)

    def edges(x, alpha=1.0):
        return cv2.filter2D(x, -1, alpha * kernel + (1 - alpha) * same)

    def mini(x):
        out, small = x.copy(), Image.fromarray(x).resize((8, 8), Image.Resampling.BILINEAR)
        out[:8, :8] = small
        return out

    for ours, theirs, most in (
        (augment.gaussian_blur, blur, 0.501),
        (augment.edge_detect, edges, 1),
        (lambda x: augment.edge_detect(x, 0.4), lambda x: edges(x, 0.4), 1),
        (augment.mini_image, mini, 1),
    ):
        for images in (digits, other):
            expected = np.stack([theirs(x) for x in images])
            assert np.abs(ours(images).astype(float) - expected).max() <= most


def test_noises_have_their_place_and_their_moments():
    images = np.zeros((400, 28, 28), np.uint8)
    images[:, 27, 27] = np.arange(400) % 200  # 200 images, twice each
    images[:, 27, 26] = 1
    corner, spread = augment.tl_sap_noise(images), augment.sap_noise(images)
    rest = corner.copy()
    rest[:, :7, :7] = 0
    assert np.array_equal(rest, images)
    dots = spread[:200, :27]
    assert (dots > 0).mean() == pytest.approx(0.2, abs=0.004)
    for noise, sd in ((corner[:200, :7, :7], 32), (dots[dots > 0], 16)):
        assert noise.mean() == pytest.approx(127.5, abs=1.5)
        assert noise.std() == pytest.approx(sd, abs=1)
    for f, out in ((augment.tl_sap_noise, corner), (augment.sap_noise, spread)):
        assert not np.array_equal(out, f(images, seed=1))
        assert np.array_equal(out[:200], out[200:])  # a function of the image, not of its place
        assert len(np.unique(out[:200, :27, :27], axis=0)) == 200  # another for each


def test_parts_of_augmentations(digits):
    for name, part in augment.PARTS.items():
        assert np.array_equal(part(digits, 0), digits), name
        assert np.array_equal(part(digits, 1), augment.AUGMENTATIONS[name](digits)), name
    for name, t, expected in (
        ("rotate_cw", 2, digits[:, ::-1, ::-1]),
        ("rotate_ccw", 0.5, augment.rotate_30(digits, -45)),
        ("rotate_30", 3, augment.rotate_cw(digits)),
        ("gaussian_blur", 4, augment.gaussian_blur(digits, 2)),
        ("shear_x", 0.5, augment.shear_x(digits, -28.6196)),
    ):
        assert np.abs(augment.PARTS[name](digits, t).astype(int) - expected).max() <= 1, name


def test_augmentations_have_manners(digits):
    for name, f in augment.AUGMENTATIONS.items():
        before = digits.copy()
        out = f(digits)
        assert np.array_equal(before, digits) and out.dtype == np.uint8, name
        assert out.shape == digits.shape and not np.array_equal(out, digits), name
        assert not np.shares_memory(out, digits) and f(digits[:0]).shape == (0, 28, 28), name
        assert f(digits[:2, :5, :3]).shape in ((2, 5, 3), (2, 3, 5)), name
        for wrong in (digits / 255, digits[0], None):  # the figures and train.py ask for views
            with pytest.raises(ValueError, match=r"uint8 \(N, H, W\)"):
                augment.all_views(wrong, [name])
        if name not in ("flip_lr", "flip_ud", "rotate_cw", "rotate_ccw"):  # which may be of floats
            with pytest.raises(ValueError, match="uint8"):
                f(digits / 255)


def test_values_at_the_edge_of_an_augmentation(digits):
    x = digits[:20]
    assert np.array_equal(augment.gaussian_blur(x, 1e-3), x)
    assert np.array_equal(augment.edge_detect(x, 0), x) and np.array_equal(augment.shear_x(x, 0), x)
    assert np.array_equal(augment.mini_image(x, 28), x)
    for f, wrong in ((augment.shear_x, 90), (augment.shear_x, math.nan), (augment.mini_image, 0)):
        with pytest.raises(ValueError, match="expected"):
            f(x, wrong)


def test_augment_writes_its_picture(tmp_path):
    augment.main(["--augs", "shear_x", "canny", "--out", str(tmp_path / "a.png")])
    with Image.open(tmp_path / "a.png") as page:
        assert page.size[0] > 10 * 64 and page.size[1] > 13 * 64
    refused(augment.main, ["--augs", "nope"], "nope", "canny")
    refused(augment.main, ["--out", tmp_path / "none" / "a.png"], "a.png", "another folder")
    refused(augment.main, ["--out", tmp_path / "a.what"], "a.what", "--out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


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
    assert z.mean().item() == pytest.approx(3, abs=0.01) and z.std().item() == pytest.approx(
        0.5, abs=0.01
    )


def test_a_gated_layer_multiplies():
    """(z A + a) * gelu(z B + b), where gelu(x) is x times the normal distribution's Phi(x)."""
    torch.manual_seed(0)
    layer, z = lavae.GEGLU(16, 24).double(), torch.randn(50, 16).double()
    value, gate = (
        z @ p.T + q for p, q in zip(layer.linear.weight.chunk(2), layer.linear.bias.chunk(2))
    )
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


@pytest.fixture(scope="module")
def known_maps():
    """A flip, a cyclic shift of order 4, a quarter turn and a rotation by any angle, (8, 8), with
    their orders."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.double)).Q
    shift, angle = torch.roll(torch.eye(4), 1, 0), torch.tensor([[0.6, 0.8], [-0.8, 0.6]])
    parts = [
        (torch.block_diag(MIRROR, MIRROR, MIRROR, torch.eye(2)), 2),
        (torch.block_diag(shift, shift), 4),
        (torch.block_diag(QUARTER, QUARTER, QUARTER, MIRROR), 4),
        (torch.block_diag(angle, QUARTER, angle, torch.eye(2)), None),
    ]
    return [(basis @ part.double() @ basis.T, order) for part, order in parts]


@pytest.mark.parametrize("images", [200, 20, 5])
def test_the_maps_of_a_batch_keep_lengths_and_come_back(images, known_maps):
    generator, unit = torch.Generator().manual_seed(images), torch.eye(8, dtype=torch.double)
    orders, noisy, C = [order for _, order in known_maps], [], []
    for part, _ in known_maps:
        z, z_i = torch.randn(2, images, 8, generator=generator, dtype=torch.double)
        noisy.append(z.T @ (z @ part + 0.1 * z_i))
        C.append(z.T @ z_i)
    free, found = lavae.procrustes(C, [None] * 4), lavae.procrustes(noisy, orders)
    for Q, order in zip(lavae.procrustes(C, orders), orders):
        # then some are shorter
        assert torch.allclose(Q @ Q.T, unit, atol=1e-6) or images == 5 and order is None
        assert order is None or torch.allclose(torch.linalg.matrix_power(Q, order), unit, atol=1e-6)
    for C_i, Q, Q_i, (part, _) in zip(C, free, found, known_maps):
        if images > 8:
            expected, _ = linalg.polar(C_i.numpy())
            ours = lavae.polar(C_i[None] / torch.linalg.norm(C_i))[0]
            assert np.allclose(ours, expected, atol=1e-9) and np.allclose(Q, expected, atol=2e-3)
            assert torch.allclose(Q_i, part, atol=0.2)
    assert not lavae.procrustes([torch.zeros(8, 8)], [4])[0].isnan().any()
    u = unit[0].float() + 1
    assert u @ lavae.procrustes([torch.outer(u, u)], [None])[0] @ u > 0  # one singular value is 1


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
        steps = torch.randn(6, 40, 8, generator=generator, dtype=torch.double) * 1e-4
        for k, step in enumerate(steps):
            both = torch.stack([z, z_i]).detach()
            moved = torch.zeros_like(both)
            moved[k % 2] = step
            a, b = (lavae.equivariance_loss(both + s * moved, [order]) for s in (1, -1))
            expected = (gradients[k % 2] * step).sum().item()
            assert ((a - b) / 2).item() == pytest.approx(expected, rel=0.02)


def test_a_map_is_asked_to_do_the_same_to_every_view_that_it_comes_after(known_maps):
    generator, orders = torch.Generator().manual_seed(0), [2, 4]
    (half, _), (quarter, _) = known_maps[0], known_maps[2]
    z = torch.randn(40, 8, generator=generator, dtype=torch.double)
    z = torch.stack(augment.views(z, [lambda z: z @ half, lambda z: z @ quarter]))
    assert lavae.equivariance_loss(z, orders) < 1e-6
    z[3] = z[1] @ quarter.T  # what is mirrored turns the other way: no pair of originals says so
    assert lavae.equivariance_loss(z, orders) > 0.1
    assert lavae.equivariance_loss(z[:3], orders[:1]) < 1e-6
    latents, run = torch.randn(4, 40, 16, generator=generator, requires_grad=True), options()
    model = LAVAE(["flip_lr", "rotate_cw"], filters=1, orders=orders)
    train.latent_loss(model, latents, run).backward()
    assert (latents.grad.abs().sum((1, 2)) > 0).all()
    model = LAVAE(["flip_lr", "rotate_cw"], filters=1, orders=orders, joint="signs")
    latents = latents.detach().requires_grad_()  # Eq. 6 with the model's maps: of originals alone
    train.latent_loss(model, latents, run).backward()
    assert (latents.grad[:3].abs().sum((1, 2)) > 0).all() and not latents.grad[3].any()


class OnTheHost(train.Recorded):
    """Stands in for a CUDA graph: a replay computes the step again, from the memory that was read
    when it was recorded, into the memory that was written."""

    waits = False

    def record(self, read):
        if torch.cuda.is_available():
            return super().record(read)
        if self.waits:
            raise RuntimeError("it waits for the device")
        state, written = self.noise.get_state(), self.written(read)
        self.noise.set_state(state)  # nothing is computed while a graph is recorded

        def replay():
            for old, new in zip(written, self.written(read)):
                old.copy_(new)

        return Namespace(replay=replay), read, {"loss": written[0]}, written[1:]

    def written(self, read):
        return [self.gradients_of(*read)["loss"], *(p.grad for p in self.parameters)]


@pytest.mark.parametrize("waits", [False, True])
def test_a_recorded_step_is_the_step(waits, monkeypatch, capsys):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(OnTheHost, "waits", waits)
    x, ends = torch.linspace(0, 1, 90).to(device), []
    for recording in (lambda step, *_: step, OnTheHost):
        p = torch.ones(5, device=device, requires_grad=True)
        noise = torch.Generator(device).manual_seed(0)
        optimizer = adabelief.AdaBelief([p], lr=0.1)

        def step_of(index, weights):
            drawn = torch.randn(5, generator=noise, device=device)
            loss = (x[index, None] * p + weights * drawn).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if waits:
                loss.item()
            return {"loss": loss.detach()}

        step, losses = recording(step_of, [p], noise), []
        for i, n in enumerate([9, 9, 8, 9, 8, 9, 8, 8, 9]):
            found = step((torch.arange(n) + 9 * i).to(device), x[i])
            optimizer.step()
            losses.append(found["loss"].clone())
        ends.append(torch.stack([*losses, *p]))
    assert torch.equal(*ends) and (len(step.graphs) == 2) != waits
    assert ("without a CUDA graph" in capsys.readouterr().out) == waits


def test_the_papers_cvae():
    conv = 64 * 16 + 64 + 128 * 64 * 16 + 128
    for condition, width in (("view", 4), ("digit", 10), ("both", 14), ("paired", 2)):
        model = CVAE(condition=condition)
        count = sum(p.numel() for p in model.encoder.parameters())
        assert count == conv + (128 * 49 + width) * 32 + 32
        assert model.decoder.linear.in_features == 16 + width


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

    for row, (picture, code, _) in enumerate(seen):
        view, image = divmod(row, n)
        assert torch.equal(picture, x[view, image]) and code.tolist() == told(
            model.stage1_views[view], image
        )
    assert (
        len(seen) == (n if condition == "paired" else 4 * n)
        and len(drawn) == len(model.stage1_views) * n
    )
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
        return ((1 + 2 * variance / d) ** -0.5 * math.exp(-(mean**2) / (d + 2 * variance))) ** d

    for mean, sd in ((0.0, 1.0), (1.0, 1.0), (2.0, 0.1)):
        expected = mean_kernel(0, 2 * sd**2) + mean_kernel(0, 2) - 2 * mean_kernel(mean, 1 + sd**2)
        assert distance(mean, sd) == pytest.approx(expected, abs=0.02)


def test_everything_has_the_dtype_of_the_weights(run, digits):
    model, x = lavae.load(run[0]).double(), torch.from_numpy(digits[:9]) / 255
    ours, z = model.power(x.double(), "flip_ud", 0.5), model.encode(digits[:9])
    assert ours.dtype == z.dtype == model.from_view(z, 3).dtype == torch.double
    assert torch.allclose(ours.float(), run[1].power(x, "flip_ud", 0.5), atol=1e-5)
    double = LAVAE(["flip_lr"], filters=1, latent_dim=4).double()
    images = torch.from_numpy(np.stack(augment.all_views(digits[:64], ["flip_lr"])))
    (row,) = train.stage1(double, images, None, options("--epochs", "1", "--augs", "flip_lr"))
    assert math.isfinite(row["loss"])


def test_checkpoint_round_trip(run, tmp_path):
    model = run[1]
    lavae.save(model, tmp_path / "model.pt")
    again = lavae.load(tmp_path / "model.pt")
    assert again.settings == model.settings and again.augs == ["flip_lr", "flip_ud"]
    assert again.orders == [2, 2] and again.settings["classes"] == 10
    assert same_bits(again, model) and names_in(tmp_path) == ["model.pt"]


def test_a_map_has_real_powers():
    generator, unit = torch.Generator().manual_seed(0), torch.eye(8).double()
    basis = torch.randn(8, 8, generator=generator).double()
    turn = -torch.tensor([[0.8, -0.6], [0.6, 0.8]])  # by 143 degrees

    def of(*parts):
        return basis @ torch.block_diag(*parts).double() @ torch.linalg.inv(basis)

    even, odd = of(-torch.eye(4), torch.eye(4)), of(-torch.eye(3), torch.eye(5))
    nearly = even + 1e-3 * torch.randn(8, 8, generator=generator)
    rotation = of(turn, turn, torch.eye(2), -torch.eye(2))
    quarters = of(QUARTER, QUARTER, torch.eye(2), -torch.eye(2))
    for L in (even, nearly, rotation, odd, quarters):
        powers = torch.stack([lavae.matrix_power(L, t) for t in np.linspace(0, 1, 201)])
        assert torch.allclose(powers[[0, -1]], torch.stack([unit, L]), atol=1e-8)
        assert powers.diff(dim=0).abs().max() < 0.05 * powers.abs().max()  # continuous
        for t in (0.5, 1.5, -0.5):  # of three directions one shrinks through zero
            power, whole = lavae.matrix_power(L, t), torch.linalg.matrix_power(L, int(2 * t))
            error = torch.linalg.norm(power @ power - whole) / torch.linalg.norm(whole)
            assert (error < 1e-2) == (L is not odd), (t, error)
    assert torch.linalg.matrix_rank(lavae.matrix_power(odd, 0.5), rtol=1e-9) == 7
    for L in (torch.ones(2, 2).triu(), torch.block_diag(QUARTER, torch.ones(3, 3).triu())):
        with pytest.raises(ValueError, match="eigenvectors"):
            lavae.matrix_power(L, 0.5)
    basis = torch.linalg.qr(basis).Q  # where maps keep lengths, their powers do so, too
    for degrees in (163, 175, 179):  # a plane goes its own way, also beside reversed directions
        angle = torch.tensor(math.radians(degrees)).double()
        plane = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
        for skew in (torch.eye(2), torch.tensor([[1.0, 3], [0, 1]])):
            plane = skew.double() @ plane @ torch.linalg.inv(skew.double())
            for rest in ([torch.eye(6)], [-torch.eye(4), 0.9 * plane]):
                L = of(plane, *rest)
                half = lavae.matrix_power(L, 0.5)
                assert torch.allclose(half @ half, L, atol=1e-6)
                cosine = (half - lavae.matrix_power(of(torch.eye(2), *rest), 0.5)).trace() / 2 + 1
                assert cosine.item() == pytest.approx(math.cos(angle / 2), abs=1e-6)
    half = lavae.matrix_power(of(turn, turn, torch.eye(2), -torch.eye(2)), 0.5)
    assert torch.allclose(half @ half.T, unit, atol=1e-8)
    assert half.trace().item() == pytest.approx(4 * 0.1**0.5 + 2)  # 71.6 degrees, not -108.4


def test_the_model_in_a_notebook(digits):
    """The left name first; a name twice, or with a power, is the map as often."""
    model = lavae_with(["rotate_cw", "flip_lr"], latent_dim=4)
    x, names = torch.from_numpy(digits[:5]) / 255, names_of(model)

    def drawn(label):
        return computed(f"D({label})", z=model.encoder(x)[0], **names).sigmoid()

    for view, product in (
        ("orig", ""),
        ("rotate_cw+flip_lr", " L1 L2"),
        ("flip_lr+rotate_cw", " L2 L1"),
        ("rotate_cw+rotate_cw", " L1 L1"),
        ("rotate_cw^3+flip_lr", " L1^3 L2"),
        ("flip_lr+rotate_cw^-2", " L2 L1^-2"),
    ):
        assert torch.allclose(model.convert(x, target=view), drawn(f"z{product}"), atol=1e-4), view
    for source, label in (("flip_lr+rotate_cw^-2", "z L1^2 L2^-1 L2"), ("rotate_cw", "z L1^-1 L2")):
        assert torch.allclose(model.convert(x, source, "flip_lr"), drawn(label), atol=1e-3), source
    for ours, label in (
        (model.augment(x), "z"),
        (model.augment(x, "flip_lr", "rotate_cw"), "z L2 L1"),
        (model.power(x, "rotate_cw", 1.0), "z L1"),
        (model.power(x, "flip_lr", 0.0), "z"),
    ):
        assert torch.allclose(ours, drawn(label), atol=1e-4)
    assert model.augment(x[:0], "flip_lr").shape == (0, 28, 28)
    ts = torch.linspace(0, 2, 5)
    for t in ts:
        model.power(x, "rotate_cw", t)
    assert ts.tolist() == [0, 0.5, 1, 1.5, 2]  # no argument is changed
    for call in (model.convert, model.augment, lambda x: model.power(x, "flip_lr", 1)):
        assert torch.allclose(call(digits[:5]), call(x), atol=1e-6)  # uint8 is taken, too
    assert torch.equal(model.encode(digits[:, ::-1]), model.encode(augment.flip_ud(digits)))
    with pytest.raises(ValueError, match="rotate_cw, flip_lr"):
        model.augment(x, "canny")
    for view in ("canny", "flip_lr+canny", "rotate_cw^x", "rotate_cw^1.5", "rotate_cw^"):
        with pytest.raises(ValueError):
            model.convert(x, target=view)


# ---------------------------------------------------------------- train.py


def maps_of(
    z, *targets, augs=("flip_lr", "flip_ud"), involution_weight=1.0, paper_involution=False
):
    """What stage 2 learns from z and its targets."""
    augs = augs[: len(targets)]
    model = LAVAE(augs, latent_dim=z.shape[1], filters=1)
    model.orders = [2 if paper_involution else augment.ORDERS.get(aug) for aug in augs]
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


@pytest.mark.parametrize("aug, part", [("flip_lr", -MIRROR), ("rotate_cw", QUARTER)])
def test_stage2_finds_a_known_map(aug, part):
    """In shrunk and noisy latents. The paper's k = 2 cannot have a quarter turn, k = 4 finds it."""
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    known, order = basis @ torch.block_diag(part, part, MIRROR) @ basis.T, augment.ORDERS[aug]
    z, noise = torch.randn(2, 5000, 6, generator=generator)
    pairs = z, 0.9 * z @ known + 0.2 * noise
    (free,) = maps_of(*pairs, augs=[aug], involution_weight=0.0)
    (L,) = maps_of(*pairs, augs=[aug])
    (published,) = maps_of(*pairs, augs=[aug], paper_involution=True)
    assert lavae.order_error(L, order) < 1e-3 < lavae.order_error(free, order)
    assert torch.allclose(L, known, atol=0.05) and lavae.order_error(published, 2) < 0.5
    assert torch.allclose(published, known, atol=0.5) == (order == 2)


def test_the_order_of_each_map():
    for L, order, expected in (
        (QUARTER, 4, 0),
        (QUARTER, 2, 8),
        (2 * torch.eye(2), 2, 18),
        (QUARTER, None, 0),
        (2 * torch.eye(2), None, 18 / 100),
    ):
        assert lavae.order_error(L, order).item() == pytest.approx(expected)
    halves = lavae.NonlinearMap(2, 3)
    z = torch.randn(50, 2)
    away = z - torch.nn.Sequential(halves, halves, halves, halves)(z)
    assert halves.order_error(4, z).item() == pytest.approx(away.square().sum(1).mean().item())
    assert halves.order_error(None, z) == 0
    x = np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for name in augment.AUGMENTATIONS:
        powers = [evaluate.true_picture(x, [name], [0] * k) for k in range(1, 13)]
        back = [k for k, power in enumerate(powers, 1) if np.array_equal(power, x)]
        assert back[:1] == [augment.ORDERS[name]] if name in augment.ORDERS else not back, name
    words = ["--augs", "rotate_cw", "flip_lr", "canny", "--filters", "1"]
    assert lavae.build(vars(options(*words))).orders == [4, 2, None]
    assert lavae.build(vars(options(*words, "--paper-involution"))).orders == [2, 2, 2]
    for name, width in (("mlp", 8), ("mlp-wide", 256)):
        assert lavae.build(vars(options("--latent-map", name))).maps[0][0].out_features == width


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_names_views_and_products_agree(k, digits):
    """View v by its name, by its bits, and as images: the same for K = 1 to 4."""
    augs = ["shear_x", "flip_ud", "rotate_cw", "mini_image"][:k]
    model = lavae_with(augs, latent_dim=5)
    names, z = augment.view_names(augs), torch.randn(4, 5)
    images, latents = augment.all_views(digits[:4], augs), augment.views(z, model.maps)
    assert len(names) == len(set(names)) == len(images) == len(latents) == 2**k
    for v, name in enumerate(names):
        x, product = digits[:4], torch.eye(5)
        for word in name.split("+") if v else []:
            x, product = augment.AUGMENTATIONS[word](x), product @ model.maps[augs.index(word)].L
        assert np.array_equal(images[v], x), name
        for z_v in (latents[v], model.to_view(z, v)):
            assert torch.allclose(z_v, z @ product, rtol=1e-3, atol=1e-4), name
        assert torch.allclose(model.from_view(latents[v], v), z, atol=1e-2), name
    assert train.original_and_singles(names)[1:] == augs
    assert augment.view_names("abc")[5:] == ["a+c", "b+c", "a+b+c"]


def test_one_cycle_rises_and_falls():
    rates = np.array([train.one_cycle(t) for t in np.linspace(0, 1, 1001)])
    assert rates.argmax() == 250 and rates.max() == 1 and rates[0] == 0 and rates[-1] < 1e-6
    assert (np.diff(rates[:251]) > 0).all() and (np.diff(rates[250:]) < 0).all()


def test_a_short_run_learns_all_three_stages(run, data, digits):
    out, model = run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["config"]["filters"] == 8
    assert metrics["made"]["torch"] == torch.__version__ and metrics["made"]["device"] == "cpu"
    assert [*metrics["history"]] == ["stage 1", "stage 2", "stage 3, shear_x+canny"]
    losses = [row["loss"] for row in metrics["history"]["stage 1"]]
    assert losses == sorted(losses, reverse=True) and len(losses) == 5
    first, *_, last = metrics["history"]["stage 1"]
    weight = (last["loss"] - last["bce"] - last["kl"]) / last["equivariance"]
    assert 200 < weight < 300  # it grows
    given = options("--kl-weight", "2", "--equivariance-weight", "100")
    assert train.weights_at(0.03125, given) == (1.25, 0.29296875)
    assert train.weights_at(0.25, given) == (2.0, 18.75)
    published = options("--as-published", "--kl-weight", "2")
    assert train.weights_at(0.01, published) == (2.0, 0.0)
    assert last["bce"] < first["bce"] and last["equivariance"] < 0.1
    torch.manual_seed(0)
    untrained = LAVAE(transfers=[["shear_x", "canny"]], filters=8)
    untrained, trained = (measured(m, few(data)) for m in (untrained, model))
    heads = [tables[evaluate.TRANSFER]["shear_x+canny"] for tables in (trained, untrained)]
    after, before = (head["total"] for head in heads)
    untrained, trained = drawn_row(untrained), drawn_row(trained)
    assert trained["total"] < 0.4 * untrained["total"]
    assert after < 0.7 * before
    # An augmented view comes from the original: without its map it would come out much worse.
    z, flipped = model.encode(digits), augment.flip_lr(digits)
    assert trained["flip_lr"] < 0.8 * evaluate.nats(model.decoder, z, flipped)


def test_the_equivariance_loss_sees_more_images_than_a_map_can_fit(
    small_data, tmp_path, monkeypatch
):
    """d images and d latents: some matrix fits them all, whatever they are."""
    seen, loss, sizes, bce = [], lavae.equivariance_loss, [], lavae.bce
    monkeypatch.setattr(
        lavae, "equivariance_loss", lambda z, orders: seen.append(z.shape[1]) or loss(z, orders)
    )
    monkeypatch.setattr(train, "bce", lambda logits, x: sizes.append(len(x)) or bce(logits, x))
    words = "--augs flip_lr flip_ud rotate_cw --batch-size 40 --epochs 1 --overwrite"
    small(tmp_path, words)
    assert set(seen) == {33, 34} and set(sizes) == {8 * 33, 8 * 34}
    sizes.clear()
    small(tmp_path, f"{words} --equivariance-weight 0")
    assert set(sizes) == {40} and len(seen) == 12


@pytest.mark.parametrize("augs", ["rotate_cw", "flip_lr rotate_cw shear_x"])
def test_one_augmentation_and_three(augs, small_data, tmp_path):
    targets = " ".join(augs.split()[::-1])
    model = small(tmp_path, f"--epochs 1 --transfer-epochs 1 --augs {augs} --transfer {targets}")
    names, tables = augment.view_names(augs.split()), measured(model, small_data)
    assert [*tables[evaluate.ANY]["direct"]] == [*names, "total"]
    assert ("reverse" in drawn_row(tables)) == (len(names) > 2)
    (head,) = tables[evaluate.TRANSFER].values()
    assert [*head][len(names) - 1 : len(names) + 1] == [
        "+".join(["B1", "B2", "B3"][: len(augs.split())]),
        "total",
    ]
    figures = ("fig3_views", "fig4_inverses", "fig5_recursion", "fig6_transfer")
    chosen = {name: evaluate.FIGURES[name] for name in (*figures, "eigenvalues", "group_elements")}
    lacking = evaluate.draw_figures(run_of(tmp_path, model, small_data), chosen)
    assert len(lacking) == ("shear_x" in augs)
    assert len([*tmp_path.glob("*.png")]) + len(lacking) == 6


@pytest.mark.parametrize(
    "n, words",
    [
        (1000, "--model cvae"),
        (1000, "--model cvae --condition digit"),
        (1000, "--model cvae --condition both"),
        (1000, "--model cvae-paired"),
        (1000, "--model vae"),
        (1000, "--latent-map mlp --no-transfer"),
        (1000, "--latent-map mlp-wide --no-transfer"),
        (1000, "--joint identity --no-transfer"),
        (2000, "--joint signs --no-transfer"),
        (2000, "--prior-loss mmd --no-transfer"),
    ],
)
def test_baselines_and_ablations_learn(n, words, data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MLP_EPOCHS", 2)
    settings = options(*words.split(), "--filters", "8", "--device", "cpu")
    torch.manual_seed(0)
    before = lavae.build(vars(settings))
    after = tiny_run(data, tmp_path, words, n)
    rows = [drawn_row(measured(m.eval(), few(data))) for m in (before, after)]
    key = "total" if settings.model != "cvae" and not settings.joint else "orig"
    assert rows[1][key] < 0.6 * rows[0][key]
    if "mlp" in words:  # stage 2 has learnt, too
        z, *others = (
            after.encode(torch.from_numpy(v))
            for v in augment.all_views(data[0][:n], after.augs)[:3]
        )
        for f, z_i in zip(after.maps, others):
            assert (f(z) - z_i).square().mean() < 0.5 * z_i.var()


def test_the_joint_lesson(data, tmp_path):
    """From the identity the signs of the eigenvalues never change, and a blur has to fit all
    views."""
    words = "--no-transfer --epochs 4 --equivariance-weight 30 --lr 9e-3 --joint"
    stuck, free = (
        tiny_run(data, tmp_path / start, f"{words} {start}") for start in ("identity", "signs")
    )
    for model, reversed_ in ((stuck, 0), (free, 8)):
        for values in evaluate.eigenvalues_of(model).values():
            assert sum(real < 0 for real, _ in values) == reversed_
    totals = [drawn_row(measured(m, few(data)))["total"] for m in (stuck, free)]
    assert totals[1] < 0.9 * totals[0], totals


def test_the_paired_cvae_never_sees_the_composition(small_data, tmp_path, monkeypatch):
    seen, forward = [], CVAE.forward
    monkeypatch.setattr(CVAE, "forward", lambda *all: seen.append(all[1]) or forward(*all))
    small(tmp_path, "--model cvae-paired --epochs 1")
    assert sum(x.shape[0] * x.shape[1] for x in seen) == pytest.approx(4 * 400, abs=3)
    for x in seen:
        x, flipped, turned = (255 * x).round().byte().numpy()
        assert np.array_equal(augment.flip_lr(x), flipped)
        assert np.array_equal(augment.flip_ud(x), turned)


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
        own, another = (
            evaluate.nats(model.heads["shear_x+canny"], z, torch.from_numpy(x))
            for x in (view, np.roll(view, 1, 0))
        )
        assert own < 0.98 * another


def test_the_commands_in_readme_exist():
    """Each command line that README names is accepted, and each option belongs to some program."""
    spans, known = re.findall(r"```.*?```|`[^`]+`", TEXT, re.DOTALL), set()
    spans = [span if "```" in span else " ".join(span.split()) for span in spans]
    commands = re.findall(r"python ((?:train|evaluate|augment)\.py[^&#`\n]*)", "\n".join(spans))
    assert len(commands) > 15
    parsers = {f"{module.__name__}.py": module.parser_of() for module in (train, evaluate, augment)}
    for command in commands:
        program, *words = shlex.split(command.replace("--seed N", "--seed 0"))
        if "--help" not in words:
            found = parsers[program].parse_args(words)
            assert program != "train.py" or train.resolve(found)
    for parser in parsers.values():
        known |= {option for action in parser._actions for option in action.option_strings}
    for span in spans:
        if not span.startswith(("`python -m", "```")):
            assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", span)) <= known, span


def test_the_workflow_runs_readmes_commands():
    commands = re.findall(
        r"^python -m pip .*", (HERE / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    workflow = (HERE / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8")
    assert re.findall(r"run: (python -m .*)", workflow) == [
        command.replace("python train.py", "python train.py --preset quick") for command in commands
    ]
    for word in ("ubuntu", "macos", "windows", '"3.10"', '"3.13"'):
        assert word in workflow


def test_as_published_is_what_its_help_says():
    named = "--recipe published --equivariance-weight 0 --paper-involution --head plain"
    published = train.settings_of(options("--as-published"))
    assert train.settings_of(options(*named.split())) == published
    wide = train.settings_of(options("--preset", "paper"))
    changed = {key for key in wide if wide[key] != published[key]}
    assert changed == {"filters", "epochs", "transfer_epochs"}
    assert options("--as-published", "--lr", "0.1").lr == 0.1


def test_the_published_model_has_the_papers_parameters_and_no_others():
    """Appendix C with C = 64 and d = 16, written out. Decoders are held in the test of stage 1."""
    more = "--preset paper --transfer shear_x canny --transfer canny shear_x"
    model = lavae.build(vars(options(*more.split())))
    encoder = (16 + 1) * 64 + (64 * 16 + 1) * 128 + (128 * 7 * 7 + 1) * 32
    decoder = (16 + 1) * 128 * 7 * 7 + (128 * 16) * 64 + 64 + 64 * 16 + 1
    assert sum(p.numel() for p in model.parameters()) == encoder + 3 * decoder + 2 * 16 * 16
    z = torch.randn(5, 16)
    for head in model.heads.values():
        head.load_state_dict(model.decoder.state_dict())
        assert torch.equal(head(z), model.decoder(z))


def test_stage_1_as_published_is_bce_and_kl_at_a_constant_rate(small_data, tmp_path, monkeypatch):
    """Every step's gradient beside one written here with plain torch, from the first step on."""
    steps, seen, step, f = [], [], adabelief.AdaBelief.step, torch.nn.functional

    def checked(self):
        (group,) = self.param_groups
        weights = [p.detach().clone().requires_grad_() for p in group["params"]]
        steps.append((group["lr"], weights, [p.grad.clone() for p in group["params"]]))
        step(self)

    def kept(images, dtype):
        seen.append(images[0])
        return images.to(dtype) / 255

    monkeypatch.setattr(train, "pixels", kept)
    monkeypatch.setattr(lavae, "sample", lambda mu, logvar, _: mu + 0.7 * (logvar / 2).exp())
    monkeypatch.setattr(adabelief.AdaBelief, "step", checked)
    with stopped(6):
        small(tmp_path, "--as-published --no-transfer")
    assert len(steps) == 5 and {lr for lr, *_ in steps} == {1e-3}
    views = augment.all_views(small_data[0], ["flip_lr", "flip_ud"])
    for (_, weights, gradients), images in zip(steps, seen):
        shown = [(x == images[:, None].numpy()).all((2, 3)).any(1) for x in views]  # one at a time
        assert len(images) == 64 and min(map(sum, shown)) > 5  # any views of any images
        assert len(np.unique(images.numpy(), axis=0)) > 60
        c1, b1, c2, b2, w, b, dw, db, d1, e1, d2, e2 = weights
        x = images / 255
        h = f.conv2d(f.conv2d(x[:, None], c1, b1, 2, 1).relu(), c2, b2, 2, 1).relu().flatten(1)
        mu, logvar = f.linear(h, w, b).chunk(2, 1)
        h = f.linear(mu + (logvar / 2).exp() * 0.7, dw, db).unflatten(1, (-1, 7, 7))
        logits = f.conv_transpose2d(f.conv_transpose2d(h, d1, e1, 2, 1).relu(), d2, e2, 2, 1)[:, 0]
        loss = f.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        loss = (loss + 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum()) / len(x)
        for ours, expected in zip(gradients, torch.autograd.grad(loss, weights)):
            assert torch.allclose(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def test_readmes_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8")):
            assert link.startswith("https://") or (page.parent / link).is_file(), link
    assert TEXT.count("](") > 10
    page, demo = (
        (HERE / f"assets/{name}.html").read_text(encoding="utf-8") for name in ("page", "demo")
    )
    assert re.sub(r">\{.*\}<", ">MODEL<", demo) == page and len(demo.encode()) < 350_000


def test_presets_fill_in_and_options_win():
    assert options().filters == 32 and options("--preset", "paper").filters == 64
    paper = options("--preset", "paper", "--epochs", "7")
    assert (paper.epochs, paper.transfer_epochs, paper.batch_size) == (7, 100, 64)
    assert options().transfer == [["shear_x", "canny"]] and options().out == Path(
        "runs/flip_lr+flip_ud"
    )
    assert options("--augs", "canny").transfer == options("--no-transfer").transfer == []


# ---------------------------------------------------------------- evaluate.py


def test_identity_counts_the_pictures_that_find_their_own_image(digits):
    images = torch.from_numpy(digits[:60])
    shown = torch.arange(60)
    shown[:20] = torch.arange(20).roll(1)  # twenty show another digit
    logits = (images.float() / 255)[shown].clamp(0.02, 0.98).logit()

    class Decoder(torch.nn.Module):
        def forward(self, z):
            return logits[z[:, 0].long()]

    nats, identity = evaluate.score(Decoder(), torch.arange(60.0)[:, None], digits[:60])
    assert identity == pytest.approx(100 * 40 / 60)
    twice = torch.cat([torch.arange(60.0)] * 2)[:, None]  # equal images are hits, too
    again = evaluate.score(Decoder(), twice, np.concatenate([digits[:60]] * 2))
    assert again == pytest.approx((nats, identity))
    assert nats == evaluate.nats(Decoder(), torch.arange(60.0)[:, None], images)


def test_the_group_that_augmentations_generate(monkeypatch, capsys):
    flips = [*evaluate.elements(["flip_lr", "flip_ud"])]
    assert flips == ["orig", "flip_lr", "flip_ud", "flip_lr+flip_ud"]
    dihedral = evaluate.elements(["rotate_cw", "flip_lr"])
    assert set(augment.view_names(["rotate_cw", "flip_lr"])) < set(dihedral) and len(dihedral) == 8
    assert dihedral["rotate_cw^3+flip_lr"] == (0, 0, 0, 1)
    assert len(evaluate.elements(["rotate_30", "flip_lr"])) == 24
    monkeypatch.setitem(augment.AUGMENTATIONS, "transpose", lambda x: x.transpose(0, 2, 1))
    monkeypatch.setitem(augment.ORDERS, "transpose", 2)
    assert len(evaluate.elements(["transpose", "flip_lr"])) == 8  # two mirrors
    for name, order, f in (  # small steps
        ("shift", 28, lambda x: np.roll(x, 1, 1)),
        ("rotate_5", 72, lambda x: augment.rotate_30(x, 5)),
    ):
        monkeypatch.setitem(augment.AUGMENTATIONS, name, f)
        monkeypatch.setitem(augment.ORDERS, name, order)
    monkeypatch.setitem(augment.PARTS, "rotate_5", lambda x, t: augment.rotate_30(x, 5 * t))
    assert len(evaluate.elements(["shift", "flip_lr"])) == 56
    assert len(evaluate.elements(["rotate_5"])) == 72
    assert evaluate.elements(["shift", "rotate_5"]) == {}
    assert "more than 100 products" in capsys.readouterr().out
    three = ["flip_lr", "flip_ud", "rotate_cw"]
    assert set(evaluate.elements(three)) == set(augment.view_names(three))
    turns = [*evaluate.elements(["rotate_cw", "rotate_ccw"])]
    assert turns == ["orig", "rotate_cw", "rotate_ccw", "rotate_cw^2"]
    assert evaluate.elements(["flip_lr", "canny"]) == {}


def test_the_probes_accuracy_on_clouds():
    generator = torch.Generator().manual_seed(0)
    clouds = torch.randn(3, 1000, 4, generator=generator)
    moved = clouds + 10 * torch.eye(3, 4)[:, None]

    def right(latents):
        probe = evaluate.train_probe(latents[:, :800])
        return torch.stack([probe(z[800:]).argmax(1) == v for v, z in enumerate(latents)])

    assert right(moved).all() and abs(right(clouds).double().mean() - 1 / 3) < 0.08


def test_each_number_of_the_tables_is_what_its_place_says(data, monkeypatch):
    """Rows and columns are views, products of augmentations, or powers: in plain torch."""
    augs, B = ["rotate_cw", "flip_lr"], ["shear_x", "canny"]
    model, images = lavae_with(augs, transfers=[B], latent_dim=6), few(data)
    trained_on, probe = [], torch.nn.Linear(6, 4).requires_grad_(False)  # often wrong
    monkeypatch.setattr(evaluate, "train_probe", lambda given: trained_on.append(given) or probe)
    x, names, tables = images[2], names_of(model), measured(model, images)
    E, L1 = names["E"], names["L1"]

    def product(name):  # "rotate_cw^3+flip_lr" to " L1^3 L2"
        words = name.replace("rotate_cw", "L1").replace("flip_lr", "L2").split("+")
        return "" if name == "orig" else " " + " ".join(words)

    def nats(logits, view):
        x, log = torch.from_numpy(view) / 255, torch.nn.functional.logsigmoid
        bce = -(x * log(logits.double()) + (1 - x) * log(-logits.double()))
        return bce.sum((1, 2)).mean().item()

    found, views = {}, augment.view_names(augs)
    for name in (*views, "flip_lr+rotate_cw"):
        column = "reverse" if name == "flip_lr+rotate_cw" else name
        logits = computed(f"D(E(x){product(name)})", x=x, **names)
        found[evaluate.TABLE_1, "LAVAE", column] = nats(logits, truth(x, name))
    for name, to in ((v, w) for v in views for w in views):
        back = f"({product(name).strip()})^-1" if name != "orig" else ""
        logits = computed(
            f"D(E(v) {back}{product(to)})".replace("  ", " "), v=truth(x, name), **names
        )
        found[evaluate.ANY, f"from {name}", to] = nats(logits, truth(x, to))
    for name in views:
        true, logits = truth(x, name), computed("D(E(v))", v=truth(x, name), **names)
        found[evaluate.ANY, "direct", name] = direct = nats(logits, true)
        cost = tables[evaluate.TABLE_1]["LAVAE"][name] - direct
        found[evaluate.ANY, "cost of the maps", name] = cost
        p = (torch.from_numpy(true).double() / 255).clamp(1e-12, 1 - 1e-12)
        found[evaluate.ANY, "a perfect copy", name] = nats(p.logit(), true)
    for name in tables[evaluate.GROUP]:
        logits = computed(f"D(E(x){product(name)})", x=x, **names)
        found[evaluate.GROUP, name, "nats"] = nats(logits, truth(x, name))
    for t in (0.25, 0.5, 0.75, 1.0, 1.5, 2.0):
        true, z = augment.rotate_30(x, 90 * t), E(x)
        power = torch.from_numpy(linalg.fractional_matrix_power(L1.double(), t).real).float()
        latents = {"blend": (1 - t) * z + t * z @ L1, "direct": E(true), "not moved": z}
        latents |= {"L^t": z @ power} if t in (1, 2) else {}  # others are tested elsewhere
        for name, z_t in latents.items():
            place = "rotate_cw to the power t, nats", f"t = {t}", name
            found[place] = nats(model.decoder(z_t), true)
    for v, name in enumerate(("orig", "B1", "B2", "B1+B2")):
        logits = computed(f"D_B(E(x){product(views[v])})", x=x, **names)
        found[evaluate.TRANSFER, "shear_x+canny", name] = nats(logits, augment.all_views(x, B)[v])
    for (title, row, column), expected in found.items():
        ours = tables[title][row][column]
        assert ours == pytest.approx(expected, rel=1e-3, abs=1e-3), (title, row, column)
    for title in (evaluate.TABLE_1, evaluate.ANY, evaluate.TRANSFER):
        for row in tables[title].values():
            assert row["total"] == pytest.approx(sum([*row.values()][:4]))
    assert len(tables[evaluate.GROUP]) == 8
    for view, (name, share) in zip(views, tables[evaluate.IDENTITY]["LAVAE"].items()):
        logits = computed(f"D(E(x){product(view)})", x=x, **names)
        cost = torch.cdist(
            logits.sigmoid().flatten(1), torch.from_numpy(truth(x, view)).flatten(1) / 255
        )
        hits = cost.diagonal() <= cost.min(1).values + 1e-6
        assert name == view and share == pytest.approx(100 * hits.double().mean().item(), abs=0.5)
    to_view = model.to_view
    (given,) = trained_on
    for v, z in enumerate(given):
        assert torch.allclose(z, to_view(E(images[0]), v), atol=1e-3)
    correct = [(probe(to_view(E(x), v)).argmax(1) == v).numpy() for v in range(4)]
    for name in range(10):
        share = 100 * np.mean([right[images[3] == name] for right in correct])
        assert tables[evaluate.PROBE][str(name)]["accuracy"] == pytest.approx(share)
    share = np.mean(correct)
    assert tables[evaluate.PROBE]["all"]["accuracy"] == pytest.approx(100 * share)
    row = tables[evaluate.TRANSFER]["shear_x+canny"]
    heads = zip(augment.all_views(x, B), range(4))
    bces = [
        evaluate.decoded(model.heads["shear_x+canny"], to_view(E(x), v), view)[2]
        for view, v in heads
    ]
    bces, correct = np.stack(bces), np.stack(correct)
    assert row["named rightly"] == pytest.approx(bces[correct].mean(), rel=1e-4)
    assert row["named wrongly"] == pytest.approx(bces[~correct].mean(), rel=1e-4)
    assert row["named rightly"] != pytest.approx(row["named wrongly"], rel=1e-2)


def cloud_of(run, digits):
    """Latents of all views of the digits."""
    return np.concatenate(
        [
            run[1].encode(torch.from_numpy(view)).numpy()
            for view in augment.all_views(digits, ["flip_lr", "flip_ud"])
        ]
    )


def test_pca_is_scikit_learns(run, digits):
    from sklearn.decomposition import PCA

    cloud = cloud_of(run, digits[:75]).astype(float)
    theirs, ours = PCA(3).fit_transform(cloud), evaluate.pca(cloud, 3)
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-6)


def test_ica_is_scikit_learns(digits):
    from sklearn.decomposition import PCA, FastICA

    cloud = PCA(16).fit_transform(digits[:300].reshape(300, -1) / 255)
    rng = np.random.default_rng(0)
    uniform, signs = rng.uniform(-1, 1, 2000), np.sign(rng.standard_normal(2000))
    sources = np.stack([uniform, signs, rng.laplace(size=2000)], 1)
    mixed = sources @ rng.standard_normal((3, 3))
    ica = functools.partial(FastICA, whiten="unit-variance", random_state=0, tol=1e-10)
    for x, k, reference in (
        (mixed, 3, sources),
        (mixed, 3, ica(3).fit_transform(mixed)),
        (cloud, 2, ica(2, max_iter=1000).fit_transform(cloud)),  # from any start to one optimum
    ):
        correlation = np.abs(np.corrcoef(evaluate.fast_ica(x, k).T, reference.T)[:k, k:])
        assert (correlation.max(1) > 0.99).all() and len(set(correlation.argmax(1))) == k


def test_tsne_is_as_good_as_scikit_learns(run, digits):
    """On average: each ends in a minimum of its own, and either may be the better one."""
    from sklearn.manifold import TSNE, trustworthiness

    ours, theirs = [], []
    for images in digits[:160].reshape(4, 40, 28, 28):
        x = cloud_of(run, images)
        other = TSNE(perplexity=30, init="pca", method="exact", random_state=0)
        for found, y in ((ours, evaluate.tsne(x)), (theirs, other.fit_transform(x))):
            found.append(trustworthiness(x, y, n_neighbors=12))
    print(f"trustworthiness {np.mean(ours):.4f}, scikit-learn's {np.mean(theirs):.4f}")
    assert np.mean(ours) > np.mean(theirs) - 0.01 and np.mean(ours) > 0.9


# ---------------------------------------------------------------- pictures and photos


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
        assert abs(mass @ np.arange(28) / mass.sum() - 14) <= 0.5
    Image.fromarray(255 - page).save(path)
    assert np.array_equal(augment.like_mnist(path), x)  # light on dark
    clear = np.zeros((300, 500, 4), np.uint8)
    for colour in (0, 255):  # the ink opaque, the rest clear
        clear[..., :3], clear[..., 3] = colour, 255 * (page < 100)
        Image.fromarray(clear).save(path)
        assert np.array_equal(augment.like_mnist(path), x)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    Image.fromarray(page).rotate(90, expand=True).save(tmp_path / "x.jpg", exif=exif, quality=100)
    assert np.abs(augment.like_mnist(tmp_path / "x.jpg").astype(int) - x).mean() < 2


STROKES = "2.5,0.3 1.8,4.5 5,4 8.2,6 7.5,8.8 4,10 1,9", "2.5,0.2 8.5,0"  # of a 5, in a box of 7x10
SHADES = {"shade 35%": 0.35, "shade 60%": 0.6}
PHOTOS = ("shade 35%", "shade 60%", "ruled paper", "thin pen", "grain", "off-centre")
BORDERS = {  # what else is in a photo
    "table": lambda x, y: x + y / 3 > 560,
    "margin": lambda x, y: abs(x - 70 - y / 40) < 2,
    "scan": lambda x, y: (x < 6) | (y > 630),
}


def photo(kind, rng):
    """A photo of a 5 on paper, 480x640: its light, its lines, its pen, its noise, its place."""
    x0, y0, tall = (330, 430, 160) if kind == "off-centre" else (150, 190, 270)
    pen, ink = 8 if kind == "thin pen" else 26, Image.new("L", (960, 1280))
    for stroke in STROKES:
        points = []
        for point in stroke.split():
            x, y = map(float, point.split(","))
            points.append((2 * x0 + 0.14 * tall * x, 2 * y0 + 0.2 * tall * y))
        ImageDraw.Draw(ink).line(points, 255, 2 * pen, "curve")
    ink = np.asarray(ink.resize((480, 640), Image.Resampling.BOX)) / 255
    y, x = np.mgrid[:640, :480]
    paper = np.where((y + 0.02 * x) % 42 < 2, 150.0, 228.0) if kind == "ruled paper" else 228.0
    page = paper * (1 - ink) + 55 * ink
    if kind in BORDERS:
        page = np.where(BORDERS[kind](x, y), 40, page)
    page *= 1 - SHADES.get(kind, 0) * (x / 960 + y / 1280) ** 1.3
    page = cv2.GaussianBlur(page, (0, 0), 1)
    page += rng.normal(0, {"clean": 0, "grain": 16}.get(kind, 3), page.shape)
    return Image.fromarray(page.clip(0, 255).astype(np.uint8))


def test_photos_are_read_like_drawings(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "photo.jpg"

    def read(kind):
        photo(kind, rng).save(path, quality=85)
        return cv2.GaussianBlur(augment.like_mnist(path), (0, 0), 1).ravel()

    clean = read("clean")
    for kind in (*PHOTOS, *BORDERS):
        assert np.corrcoef(read(kind), clean)[0, 1] > 0.8, kind


def test_several_pictures_are_rows_of_one_page(one, tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("one", "a_name_of_thirty_characters_or_so")]
    for digit, path in enumerate(paths):
        digit_picture(digit, 100, "black", "white").save(path)
    _, columns, rows, _ = evaluate.own_images(one, paths)
    assert [label for label, _ in rows] == ["one", "a_name_of_thirty_cha"] and len(columns) == 8
    for (_, pictures), path in zip(rows, paths):
        x = augment.like_mnist(path)[None]
        assert np.array_equal(pictures[0], x[0])
        assert np.array_equal(pictures[2], augment.flip_lr(x)[0])
        assert near(pictures[1], drawn_by(one.model.decoder, one.model.encode(x))[0])


def test_pictures_that_are_none(run, tmp_path):
    out, picture = shutil.copytree(run[0], tmp_path / "run"), tmp_path / "x.png"
    before, words = names_in(out), ["--image", str(picture), str(out)]
    refused(evaluate.main, words, "there is no", "x.png")
    picture.write_bytes(b"GIF89a?")
    refused(evaluate.main, words, "x.png", "no picture", "as JPEG")
    Image.new("1", (20000, 10000)).save(picture)
    refused(evaluate.main, words, "x.png", "smaller")
    Image.new("RGB", (40, 40), "navy").save(picture)
    refused(evaluate.main, words, "x.png", "no digit")
    assert names_in(out) == before
    digit_picture(7, 300, "black", "white").save(picture)
    evaluate.main(words)
    assert (out / "images.png").is_file()


# ---------------------------------------------------------------- the page, in a browser


CHROME = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)


class Browser:
    """A page in a headless browser, which is driven through two pipes."""

    def __init__(self, page, folder):
        early = "<script>var failures = []; onerror = text => failures.push(text);</script>"
        path = folder / "copy of it.html"
        path.write_text(page.replace("<head>", f"<head>{early}"), encoding="utf-8")
        (theirs, into), (out, answers) = os.pipe(), os.pipe()
        self.into, self.out, self.session = os.fdopen(into, "wb"), os.fdopen(out, "rb"), {}
        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        words.append(f"--user-data-dir={folder / 'profile'}")
        pipes = f"import os; os.dup2({theirs}, 3); os.dup2({answers}, 4); "
        pipes += f"os.execv({CHROME!r}, {[CHROME, *words]})"
        command = [sys.executable, "-c", pipes]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, pass_fds=(theirs, answers), **quiet)
        target = self.call("Target.createTarget", url=path.as_uri())["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = {"sessionId": session["sessionId"]}
        ready = {"result": {"type": "string", "value": "function"}}
        while self.call("Runtime.evaluate", expression="typeof savePicture") != ready:
            time.sleep(0.1)

    def call(self, method, **params):
        message = {"id": 1, "method": method, "params": params, **self.session}
        self.into.write(json.dumps(message).encode() + b"\0")
        self.into.flush()
        answer = {}
        while "id" not in answer:  # others are events
            answer = json.loads(b"".join(iter(lambda: self.out.read(1), b"\0")))
        return answer.get("result", {})

    def ask(self, script):
        """What the body of an async function returns."""
        words = dict(awaitPromise=True, returnByValue=True)
        found = self.call("Runtime.evaluate", expression=f"(async () => {{{script}}})()", **words)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def drag(self, *points):
        """Trusted: with the mouse, at shares of the paper's sides."""
        left, top, side = self.ask(
            "const b = paper.getBoundingClientRect(); return [b.x, b.y, b.width]"
        )
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 2), "mouseReleased"]
        for kind, (x, y) in zip(kinds, points):
            at = {"x": left + x * side, "y": top + y * side}
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at)
        self.ask(WAIT)


WAIT = "await new Promise(done => setTimeout(done, 100));"
PLAY = (
    """
for (const gesture of gestures.split(", ")) {
    const [kind, ...words] = gesture.split(" "), box = paper.getBoundingClientRect();
    if (kind === "press") {
        [...document.querySelectorAll("button")].find(b => b.textContent === words.join(" ")).click();
        continue;
    }
    const [x, y, pointerId = 1, button = 0] = words.map(Number);
    const at = {clientX: box.x + x * box.width, clientY: box.y + y * box.width};
    paper.dispatchEvent(new PointerEvent("pointer" + kind, {pointerId, button, ...at}));
}"""
    + WAIT
)


@pytest.fixture
def browser(run, data, tmp_path):
    if not CHROME or os.name == "nt":
        pytest.skip("needs Chromium or Chrome")
    found = Browser(evaluate.page(run_of(*run, few(data))), tmp_path)
    yield found
    assert found.ask("return failures.concat(performance.getEntriesByType('resource'))") == []
    found.process.kill()
    found.process.wait()


def test_the_page_computes_what_torch_does(run, data, browser):
    one, model = run_of(*run, few(data)), run[1]
    rows = browser.ask("""
        return model.digits.map(text => {
            const image = imageOf(text), z = encode(image);
            const at = (factors, decoder) => [...decode(mapped(z, factors), decoder)];
            return {z: [...z], views: model.views.map((_, v) => at(factorsOf(v))),
                    back: names.map((_, i) => at([[i, -1]])), parts: names.map((_, i) => at([[i, 1.5]])),
                    head: model.views.map((_, v) => at(factorsOf(v), "heads.shear_x+canny")),
                    truth: [[["rotate_30", 1.5], ["flip_lr", 3]], [["shear_x", 1], ["gaussian_blur", 2]],
                            [["flip_ud", 1], ["rotate_cw", -1]]].map(factors => [...truth(image, factors)])};
        });""")
    z, x = one.model.encode(one.digits), one.digits

    def drawn(decoder, *latents):  # (10, .., 784)
        return torch.stack([decoder(one).sigmoid().flatten(1) for one in latents], 1)

    truths = [
        augment.flip_lr(augment.rotate_30(x, 45)),
        augment.gaussian_blur(augment.shear_x(x), math.sqrt(2)),
        augment.rotate_ccw(augment.flip_ud(x)),
    ]
    for key, expected in (
        ("z", z),
        ("views", drawn(model.decoder, *augment.views(z, model.maps))),
        ("back", drawn(model.decoder, *(f.inverse(z) for f in model.maps))),
        ("parts", drawn(model.decoder, *(z @ lavae.matrix_power(f.L, 1.5) for f in model.maps))),
        ("head", drawn(model.heads["shear_x+canny"], *augment.views(z, model.maps))),
        ("truth", torch.from_numpy(np.stack(truths, 1)).flatten(2) / 255),
    ):
        ours = torch.tensor([row[key] for row in rows])
        assert ours.shape == expected.shape and (ours - expected).abs().max() < 0.01, key


def test_what_the_page_says_of_a_model(data, tmp_path):
    """Costs and scale are those of the model and its data, other networks are refused."""
    model, images = lavae_with(["rotate_cw", "flip_lr"], latent_dim=4), few(data)
    filled = [part[:, 4:24, 4:24].repeat(2, 1).repeat(2, 2)[:, 6:34, 6:34] for part in images[::2]]
    for x, x_test, side in ((images[0], images[2], 20), (*filled, 28)):
        one = run_of(tmp_path, model, (x, images[1], x_test, images[3]))
        text = evaluate.page(one)
        content = json.loads(text.split('type="application/json">')[1].split("</script>")[0])
        table = evaluate.measure(one)[evaluate.ANY]
        for name, costs in zip(one.names, content["costs"]):
            expected = table["a perfect copy"][name], table["from orig"][name]
            assert costs == pytest.approx(expected, rel=1e-4)
        assert content["side"] == side and len(content["group"]) == 8
    model.decoder.deconv3 = torch.nn.Conv2d(1, 1, 1)
    with pytest.raises(augment.Refused, match="networks of lavae.py"):
        evaluate.page(one)


GESTURES = """down .3 .3, up .3 .3|strokes.length + ' ' + strokes[0].points.length|1 1
down .3 .3 1 2, move .5 .5, up .5 .5|strokes.length|0
down .3 .3 1, down .8 .8 2, move .4 .4 1, move .7 .8 2, up .4 .4 1|strokes.length + ' ' + strokes[0].points.length|1 2
down .3 .3, up .3 .3, down .6 .6, up .6 .6, press Undo|strokes.length|1
press Eraser, down .3 .3, up .3 .3, press Clear|erases|false
press Test image, down .3 .3, up .3 .3|digit + ' ' + strokes.length|-1 1
press + L₁, press + L₁, press + L₂⁻¹, press Undo map|JSON.stringify(chain)|[[0,1],[0,1]]"""


def test_the_page_can_be_drawn_on(browser, tmp_path):
    for line in GESTURES.splitlines():
        gestures, expression, expected = line.split("|")
        gestures = json.dumps(f"press Start again, press Clear, {gestures}")
        found = browser.ask(f"const gestures = {gestures}; {PLAY} return String({expression})")
        assert found == expected, line
    browser.ask(f"const gestures = 'press Start again, press Clear'; {PLAY}")
    browser.drag((1.2, 0.3), (0.5, 0.5), (0.5, 0.5))  # begun outside
    assert browser.ask("return strokes.length") == 0
    browser.drag((0.3, 0.2), (0.7, 0.2), (0.4, 0.8), (0.4, 0.8))
    found = browser.ask("return {x: [...x], ink: paper.toDataURL()}")
    (tmp_path / "ink.png").write_bytes(base64.b64decode(found["ink"].split(",")[1]))
    ours, expected = np.array(found["x"]), augment.like_mnist(tmp_path / "ink.png").ravel() / 255
    assert np.corrcoef(ours, expected)[0, 1] > 0.9  # prepared like a photo of it
    for axis in (0, 1):
        assert np.ptp(np.flatnonzero(ours.reshape(28, 28).sum(axis) > 0.1)) < 21
    moved = browser.ask("""
        const bars = document.querySelector("[role=slider]"), before = z[1];
        for (const key of ["ArrowRight", "ArrowUp"]) bars.dispatchEvent(new KeyboardEvent("keydown", {key}));
        await new Promise(done => setTimeout(done, 700));
        const near = Math.abs(z[1] - before - 0.1) < 1e-6 && +bars.ariaValueNow === +z[1].toFixed(2);
        return [near, moved, location.hash.includes("," + z[1].toFixed(2) + ",")];""")
    assert moved == [True, True, True]


# A digit a line: the corners of its strokes, in a box of 10 x 10.
DIGITS = """5,0 2,1.5 1,5 2,8.5 5,10 8,8.5 9,5 8,1.5 5,0
5.5,0 5,10
1,3 2,1 4.5,0 7,0.8 8,2.8 6.5,5 3.5,7.5 0.8,10 4,9.7 9,10
1,1 4,0 7.5,1 7.5,3.5 3.5,4.7 7.5,6 8.5,8 5.5,10 1,9.2
2,0 1,5.5 8,5.5 / 7,1 6.5,10
2.5,0.3 1.8,4.5 5,4 8.2,6 7.5,8.8 4,10 1,9 / 2.5,0.2 8.5,0
6.5,0 3,3 1.5,7 3,9.8 6,9.8 7.5,7.5 6,5.5 3,6 1.8,7.5
1,0.5 8.5,0 6,4 4,10
7.5,1.5 4.5,0 2,1.7 3,4 6.5,5.8 7.5,8.3 4.5,10 2,8.3 3.5,5.5 7,3.5 7.5,1.5
7.5,2 5,0.3 2.5,1.8 3,4.5 6,4.8 7.5,2.5 7.3,5 6,10"""


def test_drawings_of_any_size_become_digits(browser, data):
    from sklearn.neighbors import KNeighborsClassifier

    reader = KNeighborsClassifier().fit(data[2].reshape(-1, 784), data[3])
    places = np.indices((28, 28)).reshape(2, 784).T
    for size in ("250, 250", "140, 190", "60, 70", "22, 28"):
        drawn = browser.ask(f"""
        const [width, height] = [{size}];
        const place = (x, y, lean) => [
            140 + (x - 5 - (y - 5) * lean) / 10 * width, 140 + (y - 5) / 10 * height];
        return {json.dumps(DIGITS)}.split("\\n").flatMap(digit => [-0.12, 0, 0.12].map(lean => {{
            strokes = digit.split(" / ").map(line => {{
                const corners = line.split(" ").map(corner => corner.split(",").map(Number));
                const points = corners.flatMap(([x, y], i) => {{
                    const [u, v] = corners[i + 1] || [x, y];
                    return [0, 0.25, 0.5, 0.75].map(t => place(x + t * (u - x), y + t * (v - y), lean));
                }});
                return {{erases: false, points: points.map(point => point.map(inside))}};
            }});
            return [...asMnist()];
        }}));""")
        drawn = 255 * np.array(drawn)
        assert (reader.predict(drawn) == np.arange(10).repeat(3)).mean() > 0.95, size
        # the centre of mass is MNIST's
        assert np.allclose(drawn @ places / drawn.sum(1)[:, None], 14, atol=0.1), size


# ---------------------------------------------------------------- bad input


REFUSED = """--augs flip_lr flop|flop, flip_ud, canny
--transfer shear_x|--transfer, 2 in
--transfer shear_x nope|nope, canny
--augs flip_lr flip_lr|each once
--transfer canny canny|each once
--transfer all --transfer shear_x canny|alone
--transfer all shear_x|alone
--epochs -1|--epochs, from 1
--epochs many|--epochs, int, many
--out |empty path
--lr nan|--lr, from
--kl-weight -2|--kl-weight, from 0
--filters 513|--filters, from 1 to 512
--latent-dim 1|--latent-dim, from 2 to 512
--batch-size 8193|--batch-size, from 1 to 8192
--augs flip_lr flip_ud rotate_cw rotate_ccw canny shear_x|--augs, five at most
--preset huge|quick, laptop, paper
--device tpu|cpu, cuda
--joint signs --latent-map mlp|--joint signs, --latent-map
--joint signs --equivariance-weight 0|--joint, --equivariance-weight
--recipe published|--recipe published, --equivariance-weight 0
--model gan|gan, cvae-paired
--dataset letters|letters, --data-dir
--data-dir nowhere|there is no mnist, nowhere, --data-dir
--device cuda|no cuda, cpu"""
UNUSED = """--condition digit|--condition digit
--model cvae --transfer canny flip_lr --latent-map mlp|--transfer canny flip_lr --latent-map mlp
--model vae --joint signs --equivariance-weight 2|--joint signs --equivariance-weight 2.0
--model cvae-paired --condition both|--condition both
--no-transfer --head plain --transfer-epochs 9|--transfer-epochs 9 --head plain
--preset paper --transfer all --model lavae|
--as-published --no-transfer --device cpu|"""


@pytest.mark.parametrize("line", UNUSED.splitlines())
def test_options_without_effect_are_named(line, capsys):
    words, unused = line.split("|")
    options(*words.split())
    assert capsys.readouterr().out == (f"without effect here: {unused}\n" if unused else "")


@pytest.mark.parametrize("line", REFUSED.splitlines())
def test_train_refuses(line, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words, said = line.split("|")
    argv = ["--out", tmp_path / "out", *words.split(" ")]
    refused(train.main, argv, *said.split(", "))
    assert not (tmp_path / "out").exists()


def test_train_refuses_an_out_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "run", tmp_path / "file"):
        refused(train.main, ["--device", "cpu", "--out", out], str(out), "another folder")
    assert (tmp_path / "file").read_text() == "mine"


def own_data(path, data, kind="keras", classes=10, n=400, **changes):
    """A file of one's own: digits, with their labels or as many classes as are asked for."""
    x, y, x_test, y_test = (part[:n] for part in data)
    if classes != 10:
        y, y_test = np.arange(n) % classes, np.arange(n) % classes
    content = dict(x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    if kind == "medmnist":
        content = dict(train_images=x, train_labels=y[:, None], val_images=x[:3])
        content |= dict(test_images=x_test, test_labels=y_test[:, None])
    content |= changes
    np.savez(path, **{key: value for key, value in content.items() if value is not None})
    return str(path)


@pytest.mark.parametrize("kind, classes", [("keras", 26), ("medmnist", 3), ("no labels", 10)])
def test_data_of_ones_own(kind, classes, data, no_figures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "MAP_STEPS", 20)
    changes = {"y_train": None, "y_test": None} if kind == "no labels" else {}
    path, out = own_data(tmp_path / "own.npz", data, kind, classes, **changes), tmp_path / "run"
    words = f"--epochs 1 --dataset {path}"
    small(out, f"{words} --no-transfer")
    total = drawn_row(evaluated(out))["total"]
    text = capsys.readouterr().out
    assert "  paper" not in text and "own.npz" in text
    digit = f"{words} --model cvae --condition both"
    if kind == "no labels":
        refused(train.main, asked(tmp_path / "cvae", digit), "--condition both", "no labels")
    else:
        assert small(tmp_path / "cvae", digit).classes == classes
        assert drawn_row(evaluated(tmp_path / "cvae"))["total"] > 0
    (tmp_path / "moved").mkdir()
    os.rename(path, tmp_path / "moved" / "own.npz")
    refused(evaluate.main, [out], "own.npz", "--data-dir")
    evaluate.main([str(out), "--data-dir", str(tmp_path / "moved")])
    assert drawn_row(json_of(out / "evaluation.json")["tables"])["total"] == total


def test_a_class_that_only_the_test_set_has(data, tmp_path):
    path = own_data(tmp_path / "own.npz", data, y_test=np.arange(400) % 11)
    words = f"--epochs 1 --model cvae --condition digit --dataset {path}"
    assert small(tmp_path / "run", words).classes == 11


def test_data_of_ones_own_that_is_none(data, tmp_path):
    class Code:
        def __reduce__(self):
            return ((tmp_path / "it ran").touch, ())

    x, y, path = data[0][:400], data[1][:400], tmp_path / "own.npz"
    words = ["--dataset", path, "--out", tmp_path / "run"]
    for said, changes in (
        ("x_train", dict(x_train=x / 255)),
        ("x_train", dict(x_train=x[:, :20])),
        ("x_train", dict(x_train=x // 200)),
        ("x_test", dict(x_test=x[:0])),
        ("x_train", dict(x_train=x[..., None])),
        ("x_test", dict(x_test=None)),
        ("it holds", dict(X_train=x, x_train=None)),
        ("y_train", dict(y_train=y[:9])),
        ("y_train", dict(y_train=y.astype(float))),
        ("y_test", dict(y_test=None)),
        ("y_train", dict(y_train=y.astype(int) - 1)),
        ("y_train", dict(y_train=np.eye(10)[y].astype(int))),
        ("plain arrays", dict(x_train=np.array([Code()] * 9))),
        ("30 images", dict(x_train=x[:30], y_train=y[:30])),
    ):
        own_data(path, data, **changes)
        refused(train.main, words, "own.npz", said)
    for content in (b"", b"PK\x03\x04", b"<html>", Path(path).read_bytes()[:5000]):
        path.write_bytes(content)
        refused(train.main, words, "own.npz", "plain arrays")
    path.unlink()
    refused(train.main, words, "own.npz", "--data-dir")
    assert names_in(tmp_path) == []
    own_data(path, data)
    assert len(augment.load_images(r"D:\data\own.npz", tmp_path)[0]) == 400


def test_half_a_data_set_is_one_line(tmp_path, monkeypatch):
    from torchvision import datasets

    raw, out = tmp_path / "FashionMNIST" / "raw", tmp_path / "run"
    raw.mkdir(parents=True)
    words = ["--dataset", "fashion_mnist", "--data-dir", tmp_path, "--out", out]
    for content in (b"", b"<html><body>404</body></html>", b"\0\0\x08\x03" + b"\0" * 99):
        for kind in ("images-idx3", "labels-idx1"):
            for part in ("train", "t10k"):
                (raw / f"{part}-{kind}-ubyte").write_bytes(content)
        refused(train.main, words, "fashion_mnist", "remove", str(tmp_path / "FashionMNIST"))
    for error in (EOFError(), AssertionError(), urllib.error.URLError("no network")):
        monkeypatch.setattr(datasets, "FashionMNIST", failing(error))
        refused(train.main, words, "cannot get fashion_mnist", "network", type(error).__name__)
    assert not out.exists()


def test_evaluate_refuses(tmp_path, monkeypatch, small_data, run):
    refused(evaluate.main, [tmp_path / "none"], "no", "train.py")
    empty, model = tmp_path / "empty", (run[0] / "model.pt")
    empty.mkdir()
    refused(evaluate.main, [empty], "model.pt", "train.py")
    for content in (b"", b"garbage", model.read_bytes()[:5000]):
        (empty / "model.pt").write_bytes(content)
        refused(evaluate.main, [empty], "damaged", "train again")
    for other in strange_checkpoints(model, tmp_path / "it ran"):
        torch.save(other, empty / "model.pt")
        refused(evaluate.main, [empty], str(empty), "train again")
        assert not (tmp_path / "it ran").exists()
    assert names_in(empty) == ["model.pt"]
    monkeypatch.setattr(evaluate, "FIGURES", {})  # a run that cannot be read does not stop others
    good = shutil.copytree(run[0], tmp_path / "good")
    refused(evaluate.main, [empty, good], str(empty))
    assert (good / "evaluation.json").is_file()
    with monkeypatch.context() as m:
        m.delitem(augment.AUGMENTATIONS, "canny")
        refused(evaluate.main, [good], "augment.py has no canny")
    monkeypatch.chdir(tmp_path)
    refused(evaluate.main, [], "no run", "train.py")


def test_evaluate_takes_what_the_shell_names(run, small_data, no_figures, tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    out = shutil.copytree(run[0], tmp_path / "runs" / "a")
    for name in ("heatmap.png", "heatmap.json"):
        (tmp_path / "runs" / name).write_text("")
    for words in (
        [out / "model.pt"],
        [tmp_path / "runs"],
        [out, tmp_path / "runs" / "heatmap.png"],
    ):
        evaluate.main(words)
        assert f"measuring {out}\n" in capsys.readouterr().out
    refused(evaluate.main, [out, tmp_path / "runs" / "digit.png"], "digit.png")
    (tmp_path / "runs" / "digit.png").write_text("")
    refused(evaluate.main, [out, tmp_path / "runs" / "digit.png"], "digit.png", "--image")


def test_resume_sees_that_the_data_changed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "MAP_STEPS", 20)
    own_data(path := tmp_path / "own.npz", data, n=100)
    monkeypatch.setenv("HOME", str(tmp_path))
    words = [*asked(tmp_path / "run", "--no-transfer"), "--seed", 1, "--dataset", "~/own.npz"]
    with stopped(5):
        train.main(words)
    own_data(path, data, n=100, x_train=augment.flip_ud(data[0][:100]))
    refused(train.main, [*words, "--resume"], "other data")
    own_data(path, data, n=100)
    with torch.no_grad():  # as in some notebooks
        model = train.main([*words, "--resume"])
    assert model.settings["seed"] == 1


def test_an_error_from_the_shell_is_one_line(tmp_path):
    end = subprocess.run(
        [sys.executable, HERE / "train.py", "--augs", "flop"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert end.returncode == 2 and end.stderr.count("\n") == 1 and "Traceback" not in end.stderr
    assert [*tmp_path.iterdir()] == []


def strange_checkpoints(path, trace):
    """Whole files that hold what they should not, also code that would leave a trace."""

    class Code:
        def __reduce__(self):
            return (Path(trace).touch, ())

    good = lavae.read(path)
    yield from (
        {1: 2},
        {"weight": torch.ones(3)},
        [1],
        {"x": Code()},
        {"settings": good["settings"]},
    )
    yield {"tensors": good["tensors"]}
    for key, value in (("latent_dim", 17), ("latent_map", "os"), ("augs", 1)):
        yield good | {"settings": good["settings"] | {key: value}}
    yield good | {"tensors": good["tensors"] | {"encoder.conv1.bias": torch.zeros(9)}}


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried .."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 7 bytes."),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1.00 GB, max allowed: 1.00 GB)."),
    ],
)
def test_a_failed_allocation_is_one_line(error, run, small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "stage1", failing(error))
    refused(train.main, asked(tmp_path), "memory is full", "--resume")
    monkeypatch.setattr(evaluate, "measure", failing(error))
    refused(evaluate.main, [run[0]], "memory is full")
    monkeypatch.setattr(evaluate, "measure", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # what is no lack of memory is not said to be
        evaluate.main([str(run[0])])


# ---------------------------------------------------------------- odd data, folders and words


@pytest.mark.parametrize("name", ["metrics.json", "evaluation.json"])
def test_files_of_others_are_kept(name, tmp_path):
    (tmp_path / name).write_text("mine")
    for words in ("", "--overwrite", "--resume"):
        refused(train.main, asked(tmp_path, words), str(tmp_path))
    assert names_in(tmp_path) == [name] and (tmp_path / name).read_text() == "mine"
    assert options("--out", "~/x").out == Path.home() / "x"
    refused(evaluate.main, [""], "empty path")


@pytest.mark.parametrize("name", ["measure", "sampling", "fig5_recursion", "fig10_projections"])
def test_sorted_data_are_seen_evenly(name, one, monkeypatch):
    """Where a part of the images is enough, it is one at equal distances."""
    assert augment.evenly(np.arange(1001), 11).tolist() == [*range(0, 1001, 100)]
    assert len(augment.evenly(np.arange(40), 100)) == 40
    monkeypatch.setattr(evaluate, "evenly", failing(ZeroDivisionError))
    with pytest.raises(ZeroDivisionError):
        getattr(evaluate, name)(one)


@pytest.mark.parametrize("classes", [1, 3, 12])
def test_any_number_of_classes(classes, data, trained, tmp_path, monkeypatch):
    """60 test images, gaps in the labels, and torch's other default dtype: all figures are drawn."""
    monkeypatch.setattr(evaluate, "tsne", lambda x: x[:, :2])  # tested elsewhere
    labels = np.arange(60) % classes * 5
    path = own_data(tmp_path / "own.npz", data, n=60, y_train=labels, y_test=labels)
    out = shutil.copytree(trained(""), tmp_path / "run")
    run = evaluate.Run(out, lavae.load(out), augment.load_npz(path))
    assert [*run.columns] == [str(label) for label in np.unique(labels)[:10]]
    torch.set_default_dtype(torch.float64)
    try:
        missing = evaluate.draw_figures(run, evaluate.FIGURES)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(missing) == 5 and all(" needs " in line for line in missing), missing


def test_arrays_that_are_no_images(run, digits):
    model, cvae = run[1], CVAE(filters=1)
    wrong = digits[:3] / 1.0, digits[:3] / 255 - 0.1, digits[:3].astype(int), np.pad(digits[:3], 1)
    for images in wrong:
        for encode in (model.encode, cvae.encode, model.convert, model.augment):
            with pytest.raises(ValueError, match="uint8"):
                encode(images)
    for images in (digits[:3] / 255, torch.from_numpy(digits[:3]) / 255):
        assert torch.equal(model.encode(images), model.encode(digits[:3]))
    for images in (digits[:3] / 255, model.augment(digits[:3])):  # floats would be black
        with pytest.raises(augment.Refused, match="uint8 pictures in 'mine'"):
            augment.grid("", [""] * 3, [("mine", images)])


@pytest.mark.parametrize("word", ["latent_map", "head", "entry", "condition"])
def test_words_that_a_model_does_not_know(word):
    with pytest.raises((KeyError, ValueError)):
        (CVAE if word == "condition" else LAVAE)(**{word: "Gated"})
    with pytest.raises(ValueError, match="matrix"):
        LAVAE(latent_map="mlp").power(torch.zeros(1, 28, 28), "flip_lr", 0.5)


def test_bugs_keep_their_traceback(run, tmp_path, no_figures, monkeypatch):
    out = shutil.copytree(run[0], tmp_path / "run")
    with pytest.raises(ValueError, match="a bug"), augment.one_line_errors(evaluate.parser_of()):
        raise ValueError("a bug")
    monkeypatch.setattr(evaluate, "__file__", str(tmp_path / "link.py"))
    (tmp_path / "link.py").symlink_to(HERE / "evaluate.py")
    figures = {"lacking": failing(augment.Refused("needs more")), "page": evaluate.page}
    monkeypatch.setattr(evaluate, "FIGURES", figures | {"late": evaluate.traversals})
    refused(evaluate.main, [out, "--only", "lacking", "page", "late"], "lacking needs more")
    assert {"page.html", "late.png"} <= {*names_in(out)}
    monkeypatch.setattr(evaluate, "save", failing(OSError(errno.ENOSPC, "No space left on device")))
    refused(evaluate.main, [out, "--only", "late"], "written: No space", "make room")
    refused(evaluate.main, [out / "best.pt"], "best.pt")
    (out / "model.pt").rename(out / "state.pt")
    refused(evaluate.main, [out], "--resume")


def test_a_module_that_was_loaded_again(run, data):
    load_again = runpy.run_path(str(HERE / "lavae.py"))["load"]
    assert evaluate.ANY in measured(load_again(run[0]), few(data))
    assert np.isfinite(evaluate.tsne(np.ones((50, 3)), steps=5)).all()


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("model", ["lavae", "cvae"])
def test_a_resumed_run_ends_with_the_same_bits(model, trained, small_data, tmp_path):
    words, out = f"--model {model}" if model == "cvae" else "", tmp_path / "run"
    whole = trained(words)
    with stopped(20):  # in the second epoch
        small(out, words)
    assert names_in(out) == ["state.pt"]
    for n in (15, 17, 14) if model == "lavae" else (15,):  # through the stages
        with stopped(n):
            small(out, f"{words} --resume")
    assert same_bits(lavae.load(whole), small(out, f"{words} --resume"))
    metrics = [json_of(folder / "metrics.json") for folder in (out, whole)]
    losses = [[row["loss"] for row in m["history"]["stage 1"]] for m in metrics]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_a_diverging_run_says_so_and_keeps_the_last_good_state(small_data, tmp_path, monkeypatch):
    calls, kl = [], lavae.kl

    def bad_kl(mu, logvar):
        calls.append(1)
        return kl(mu, logvar) * (math.nan if len(calls) > 16 else 1)

    monkeypatch.setattr(lavae, "kl", bad_kl)
    refused(train.main, asked(tmp_path, "--no-transfer"), "not finite", "--lr")
    assert names_in(tmp_path) == ["state.pt"]
    page = lavae.read(tmp_path / "state.pt")["stage 1"]
    assert len(page["history"]) == 1 and all(p.isfinite().all() for p in page["parameters"])


def test_damage_is_noticed(run, tmp_path):
    """A changed byte: the file is refused, or read with its content unharmed. Half a file: refused."""
    model, mnist = (run[0] / "model.pt").read_bytes(), (HERE / "data" / "mnist.npz").read_bytes()
    tensors, path = lavae.read(run[0] / "model.pt")["tensors"], tmp_path / "model.pt"
    for place in np.linspace(0, len(model) - 1, 12).astype(int):
        damaged = bytearray(model)
        damaged[place] ^= 255
        path.write_bytes(damaged)
        try:
            found = lavae.read(path)["tensors"]
            assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        except OSError as error:
            assert "train again" in str(error)
    flipped = bytearray(mnist)
    flipped[len(mnist) // 3] ^= 255
    for damaged in (flipped, mnist[: len(mnist) // 2], b"PK\x03\x04" + bytes(81)):
        (tmp_path / "mnist.npz").write_bytes(damaged)
        refused(train.main, ["--data-dir", tmp_path, "--out", tmp_path / "out"], "mnist.npz")


def test_a_reader_who_has_seen_enough(tmp_path):
    """`| head -1`: no word on stderr."""
    process = subprocess.Popen(
        [sys.executable, HERE / "evaluate.py", "--list"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def test_an_augmentation_of_ones_own_is_named_if_it_returns_something_else(digits, monkeypatch):
    for wrong in (lambda x: x[:, :27], lambda x: x / 255, lambda x: x.T, lambda x: None):
        monkeypatch.setitem(augment.AUGMENTATIONS, "mine", wrong)
        with pytest.raises(augment.Refused, match="from mine"):
            augment.check_order(digits, "mine")
    monkeypatch.setitem(augment.AUGMENTATIONS, "mine", lambda x: x[:, ::-1, ::-1])  # a view
    _, view = augment.all_views(digits, ["mine"])
    assert np.array_equal(torch.from_numpy(view), np.rot90(digits, 2, (1, 2)))


def test_an_order_that_is_wrong(digits, tmp_path, monkeypatch):
    for aug in augment.AUGMENTATIONS:
        augment.check_order(digits[:9], aug)
    for aug, order in (("rotate_30", 6), ("flip_lr", 3), ("rotate_cw", 2)):
        monkeypatch.setitem(augment.ORDERS, aug, order)
        words = asked(tmp_path / "run", f"--augs {aug}")
        refused(train.main, words, f"{aug} {order} times", "ORDERS")
    assert names_in(tmp_path) == []


def test_axes_hold_zero_with_round_ticks():
    for top, step in ((0.1, 0.02), (1.7, 0.3), (6, 1), (101, 20), (12345, 2000)):
        for low in (top / 9, 0, -top):
            ticks = evaluate.round_ticks(low, top)
            assert 0 in ticks and ticks[0] <= low and ticks[-1] >= top and len(ticks) < 9
            assert low < 0 or ticks[1] == step


def test_a_recording_shows_what_was_learnt(data, small_data, tmp_path, monkeypatch):
    """The same bits with and without it; the last moment is the model's; a GIF with one palette."""
    words = "--no-transfer --epochs 4"
    monkeypatch.setattr(train, "MOMENTS", 12)
    model = small(tmp_path / "a", f"{words} --record")
    assert same_bits(model, small(tmp_path / "b", words))
    with stopped(40):
        small(tmp_path / "c", f"{words} --record")
    small(tmp_path / "c", f"{words} --record --resume")
    first, again = (lavae.read(tmp_path / run / "recording.pt")["frames"] for run in "ac")
    assert len(first) == len(again) > 9
    for one, other in zip(first, again):
        assert one["epoch"] == other["epoch"] and one["losses"] == other["losses"]
        assert torch.equal(one["z"], other["z"]) and torch.equal(one["drawn"], other["drawn"])
    assert first[-1]["epoch"] == 4
    assert torch.equal(first[-1]["z"], model.encode(small_data[0]).half())
    ten = augment.one_of_each(*small_data[:2])
    for drawn, view in zip(first[-1]["drawn"], augment.all_views(ten, model.augs)):
        assert near(drawn.numpy(), drawn_by(model.decoder, model.encode(view)))
    refused(evaluate.main, [tmp_path / "b", "--only", "learning"], "--record")
    evaluate.main([str(tmp_path / "a"), "--only", "learning"])
    with Image.open(tmp_path / "a" / "learning.gif") as film:
        assert film.n_frames > 9 and film.info["loop"] == 0
        film.seek(film.n_frames - 1)
        assert film.info["duration"] == 2000


# ---------------------------------------------------------------- options and runs

CHANGES = [
    "--augs flip_ud flip_lr",
    "--filters 3",
    "--latent-dim 15",
    "--epochs 2",
    "--transfer-epochs 1",
    "--lr 0.01",
    "--batch-size 200",
    "--head plain",
    "--kl-weight 2",
    "--equivariance-weight 9",
    "--involution-weight 0.01",
    "--prior-loss mmd",
    "--latent-map mlp",
    "--joint identity",
    "--joint signs",
    "--seed 1",
    "--transfer canny shear_x",
    "--no-transfer",
    "--model vae",
    "--model cvae",
    "--as-published",
    "--as-published --recipe ours",
    "--preset quick --filters 2 --epochs 3 --transfer-epochs 1",
]


@pytest.mark.parametrize("words", CHANGES)
def test_each_option_changes_the_models_bits(words, trained):
    before, after = (lavae.load(trained(one)).state_dict() for one in ("", words))
    assert before.keys() != after.keys() or any(
        before[key].shape != after[key].shape or not torch.equal(before[key], after[key])
        for key in before
    )


@pytest.mark.parametrize("head, peak", [("gated", 0.001), ("plain", 0.002)])
def test_a_gated_head_learns_at_half_the_learning_rate(head, peak, monkeypatch):
    rates = []
    monkeypatch.setattr(train, "fit", lambda *given: rates.append(given[5]))
    run = options("--filters", "1", "--lr", "0.002", "--head", head)
    z, images = torch.zeros(4, 9, 16), torch.zeros(4, 9, 28, 28, dtype=torch.uint8)
    train.stage3(lavae.build(vars(run)), "shear_x+canny", z, images, run)
    assert rates == [peak]


def test_the_seed_decides_weights_noise_and_order(small_data, tmp_path, monkeypatch):
    seeds, sample = set(), lavae.sample
    for seed in (3, 4):
        with stopped(2), monkeypatch.context() as m:
            m.setattr(
                lavae, "sample", lambda *given: seeds.add(given[2].initial_seed()) or sample(*given)
            )
            small(tmp_path / str(seed), f"--seed {seed}")
        batches = train.Batches(9, 1, seed)
        seeds |= {torch.initial_seed(), batches.shuffle.initial_seed()}
    assert len(seeds) == 6


def test_the_same_options_give_the_same_bits(trained, small_data, tmp_path):
    torch.rand(17)  # whatever else was drawn
    assert same_bits(small(tmp_path), lavae.load(trained("")))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--augs rotate_cw flip_lr --transfer canny shear_x",
        "--augs shear_x",
        "--as-published",
        "--paper-involution",
        "--joint identity --latent-map mlp",
        "--prior-loss mmd",
        "--model cvae --condition both",
        "--model cvae-paired",
    ],
)
def test_stages_on_a_device_without_numbers(words, monkeypatch):
    """On torch's "meta" device nothing is computed: a read by the host, a constant that is left on
    the CPU, or a boolean mask is an error."""
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())
    monkeypatch.setattr(train, "summary", lambda names, *_: dict.fromkeys(names, 0.0))
    words += " --filters 2 --epochs 1 --transfer-epochs 1"
    run, meta = options(*words.split()), torch.device("meta")
    model, n = lavae.build(vars(run)).to(meta), 2 ** len(run.augs)
    images = torch.zeros(n, 80, 28, 28, dtype=torch.uint8, device=meta)
    train.stage1(model, images, images[0, :, 0, 0].long(), run)
    for names in run.transfer:
        train.stage3(model, "+".join(names), torch.zeros(n, 80, 16, device=meta), images, run)
    trained = [*model.encoder.parameters(), *model.decoder.parameters()]
    assert all(p.grad is not None for p in trained)


def test_a_folder_that_holds_a_run_is_kept(trained, small_data, tmp_path, capsys):
    out = shutil.copytree(trained(""), tmp_path / "a run")
    for name in ("notes.txt", "mine.png", "fig3_views.png", "page.html", "images.png"):
        (out / name).write_text("mine")
    before = (out / "model.pt").read_bytes()
    refused(train.main, asked(out), "holds a run", "--resume", "--overwrite", "--out")
    refused(train.main, asked(out, "--resume"), "no interrupted run", "leave --resume out")
    assert (out / "model.pt").read_bytes() == before
    with stopped(5):
        small(out, "--overwrite --seed 1")
    assert "--resume" in capsys.readouterr().err and names_in(out) == [
        "mine.png",
        "notes.txt",
        "state.pt",
    ]
    refused(train.main, asked(out, "--seed 1"), "holds a run")
    other = "--augs rotate_cw flip_lr --no-transfer --batch-size 20 --paper-involution --resume"
    typed = "--augs flip_lr flip_ud --transfer shear_x canny", "--batch-size 128", "--seed 1"
    refused(train.main, asked(out, other), *typed, "no --paper-involution", "same options")
    small(out, "--seed 1 --resume")
    assert f'evaluate.py" "{out}"' in capsys.readouterr().out  # the path has a blank
    assert same_bits(lavae.load(out), lavae.load(trained("--seed 1")))
    assert names_in(out) == ["metrics.json", "mine.png", "model.pt", "notes.txt"]


def test_of_two_runs_that_begin_in_one_folder_one_succeeds(tmp_path):
    run = options(*asked(tmp_path / "run"))
    train.begin(run)
    with pytest.raises(FileExistsError, match="holds a run"):
        train.begin(run)
    run.overwrite = True
    (tmp_path / "run" / "state.pt").unlink()
    train.begin(run)
    assert names_in(tmp_path / "run") == ["state.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, small_data):
    lavae.write({"a": 1}, tmp_path / "x.pt")
    no_room = failing(OSError(errno.ENOSPC, "No space left on device", "x.pt"))
    with monkeypatch.context() as m:
        m.setattr(Path, "write_bytes", no_room)
        with pytest.raises(OSError, match="No space"):
            lavae.write({"a": 2}, tmp_path / "x.pt")
        refused(train.main, asked(tmp_path / "run"), "No space left", "make room", "--resume")
    assert lavae.read(tmp_path / "x.pt") == {"a": 1} and "x.pt.part" not in names_in(tmp_path)
    small(tmp_path / "run", "--resume")


def test_an_epoch_has_means_and_a_curve():
    losses, sizes = np.random.default_rng(0).random(249), [8] * 248 + [6]
    row = train.summary(["loss"], [torch.tensor([loss]) for loss in losses], sizes)
    assert row["loss"] == pytest.approx(np.average(losses, weights=sizes))
    parts = [part.mean() for part in np.array_split(losses, 20)]
    assert np.allclose(row["curve"]["loss"], parts)


def test_no_warning_on_a_terminal(data, tmp_path):
    pty = pytest.importorskip("pty")  # which Windows lacks
    end, terminal = pty.openpty()
    own_data(tmp_path / "own.npz", data, n=300)
    words = f"--epochs 1 --no-transfer --batch-size 4 --equivariance-weight 0 --dataset {tmp_path}"
    program = [sys.executable, "-W", "error", HERE / "train.py"]
    command = [*program, *asked(tmp_path / "run", f"{words}/own.npz")]
    subprocess.run(command, check=True, stdout=terminal, stderr=terminal)
    said = os.read(end, 9999).decode()
    assert "  50%" in said and "Warning" not in said


def test_a_console_that_lacks_characters(small_data, tmp_path, monkeypatch):
    out, stream = tmp_path / "数字", io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", stream)
    small(out, "--epochs 1 --no-transfer")
    evaluate.main([str(out), "--only", "traversals"])
    stream.seek(0)
    assert (
        stream.line_buffering and "\\u6570" in stream.read() and (out / "traversals.png").is_file()
    )


# ---------------------------------------------------------------- tables and figures


def test_runs_are_put_together(trained, no_figures, small_data, tmp_path, capsys):
    """Rows of one Table I, means over seeds, a heat-map of two sources."""
    kinds = {"a": "", "b": "--seed 1", "c": "--model cvae", "d": "--model cvae-paired"}
    kinds |= {"e": "--model vae", "f": "--augs rotate_cw flip_lr", "g": "--model cvae --lr 0.01"}
    kinds["h"] = ""  # a seed counts once
    runs = [shutil.copytree(trained(words), tmp_path / key) for key, words in kinds.items()]
    capsys.readouterr()
    evaluated(*runs)
    text = capsys.readouterr().out
    tables = re.findall(r"^Table I, nats.*?\n\n", text, re.M | re.S)[:2]
    heads = [re.findall(r"^(LAVAE|CVAE[^/]*|VAE[^/]*)  /", one, re.M) for one in tables]
    first = [row.strip() for row in heads[0]]
    labels = ["LAVAE", "CVAE, naive, told the view", "CVAE, paired", "VAE of originals"]
    assert {*first} == {*labels} and len(tables) == 2  # the other pair has its own
    for word in (
        "297.10",
        "989.90",
        "596.69",
        "564.09",
        "seeds 0, 1",
        "measuring",
        "a probe names",
    ):
        assert word in text, word
    results = [json_of(out / "evaluation.json")["tables"] for out in runs[:2]]
    totals = [drawn_row(one)["total"] for one in results]
    assert f"{np.mean(totals):.2f} +- {np.std(totals, ddof=1):.2f}" in text
    (means,) = re.findall(r"^mnist, flip_lr and flip_ud: means.*?\n\n", text + "\n\n", re.M | re.S)
    heads, *rows = means.splitlines()
    for words in (
        "A: --model lavae",
        "B: --model cvae ",
        "--model cvae-paired",
        "--lr 0.01",
        "seeds 0, 1",
    ):
        assert words in text
    assert re.findall("[B-Z] - A", heads) == [f"{letter} - A" for letter in "BCDE"]
    assert text.count(" - A: of the 1 seeds that both have") == 4
    cost = [one[evaluate.ANY]["cost of the maps"]["total"] for one in results]
    (row,) = (row for row in rows if "cost of the maps" in row)
    assert row.count(f"{np.mean(cost):.2f} +- {np.std(cost, ddof=1):.2f}") == 1
    rows = json_of(tmp_path / "heatmap.json")
    assert rows["flip_lr+flip_ud"]["flip_lr+flip_ud"] == [np.mean(totals), 297.1]
    heads = [one[evaluate.TRANSFER]["shear_x+canny"]["total"] for one in results]
    assert rows["flip_lr+flip_ud"]["shear_x+canny"] == [np.mean(heads), 564.09]
    assert (tmp_path / "heatmap.png").is_file()


def test_cells_of_the_heat_map_and_their_colours():
    def one(total, other):
        tables = {evaluate.TABLE_1: {"LAVAE": {"total": total}}}
        tables[evaluate.TRANSFER] = {"shear_x+canny": {"total": other}}
        return tables | {evaluate.PROBE: {"all": {"accuracy": 90}}}

    flips, turns = PAIRS[0], PAIRS[2]
    results = [(flips, 0, one(300, 460)), (flips, 1, one(302, 466)), (turns, 0, one(1, 900))]
    results.append((flips, 0, one(300, 460)))  # a seed counts once
    fewer = one(3, 0) | {evaluate.TRANSFER: {flips: {"total": 7}}}
    results.append((turns, 1, fewer))  # each run has what it was transferred to
    rows = evaluate.heatmap_rows("mnist", results)
    assert rows[flips] == {
        "shear_x+canny": (463, 564.09),
        flips: (301, 297.10),
        "probe accuracy, %": (90, None),
    }
    assert rows[turns][turns] == (2, 329.20) and rows[turns][flips] == (7, 440.25)
    assert rows[turns]["shear_x+canny"] == (900, 491.55)
    del rows[turns][flips]
    assert evaluate.heatmap_rows("kmnist", results)[flips]["shear_x+canny"] == (463, None)
    page = np.asarray(evaluate.heatmap(rows)).astype(int)
    columns = (np.ptp(page, 2) > 1).any(0)  # of coloured cells: flips, turns, shear_x+canny
    edges = np.flatnonzero(np.diff(columns.astype(int)))
    first, second, third = (page[:, a + 1 : b] for a, b in zip(edges[::2], edges[1::2]))
    colours = [
        [part[at, 3] for at in range(len(part)) if np.ptp(part[at, 3]) > 1]
        for part in (first, second, third)
    ]
    assert all(r > b for r, _, b in colours[0])  # 301 of 297
    assert all(b > r for r, _, b in colours[1])  # 2 of 329
    signs = [bool(r > b) for r, _, b in colours[2]]
    assert signs == sorted(signs) and len({*signs}) == 2  # 463 of 564, below it 900 of 491


def test_the_papers_numbers_are_mnists(no_figures, small_data, tmp_path, capsys):
    small(tmp_path, "--dataset fashion_mnist --epochs 1")
    capsys.readouterr()
    evaluated(tmp_path)
    text = capsys.readouterr().out
    assert "  paper" not in text and "297.10" not in text and "fashion_mnist" in text
    assert {len(set(names.split())) for names in augment.CLASSES.values()} == {10}


@pytest.fixture
def figure_data(monkeypatch):
    """Figures return the data that they would lay out: the arguments of grid and of chart."""

    def arguments(*given, **named):
        return (*given, named)

    monkeypatch.setattr(evaluate, "grid", arguments)
    monkeypatch.setattr(evaluate, "chart", arguments)
    monkeypatch.setattr(evaluate, "table", lambda rows: rows)


@pytest.fixture
def one(run, data, figure_data):
    """A Run, with formulas to compare its figures with."""
    return run_of(*run, few(data))


def tiles(rows):
    """{label: pictures} of a grid's rows; a label that repeats has its number."""
    found = {}
    for row in rows:
        if row:
            label = row[0] if row[0] not in found else f"{row[0]} {len(found)}"
            found[label] = np.stack([*row[1]])
    return found


def drawn_by(decoder, z):
    return np.rint(255 * decoder(z).sigmoid().numpy()).astype(np.uint8)


def near(ours, expected):
    return ours.shape == expected.shape and np.abs(ours.astype(int) - expected).max() <= 1


def formulas(one, x=None):
    """The latents of x (the digits) under: nothing, L1, L2, L1 L2, L2 L1."""
    model = one.model
    x = one.digits if x is None else x
    z = model.encoder(torch.from_numpy(x) / 255)[0]
    L1, L2 = (f.L for f in model.maps)
    return {"": z, " L1": z @ L1, " L2": z @ L2, " L1 L2": z @ L1 @ L2, " L2 L1": z @ L2 @ L1}


@pytest.mark.parametrize("augs", ["flip_lr flip_ud", "rotate_cw flip_lr"])
def test_each_row_shows_what_its_label_says(augs, data, figure_data, tmp_path):
    model = lavae_with(augs.split(), transfers=[["shear_x", "canny"]])
    one = run_of(tmp_path, model, few(data))
    x, names = one.digits, names_of(model)
    z, t = names["E"](x), torch.linspace(0, 1, 10)[:, None]
    far = names["E"](one.data[0])
    low, high = far.min(0).values, far.max(0).values
    share = torch.from_numpy(np.random.default_rng(0).random((10, 16), np.float32))
    seen = []
    for figure, start in (
        (evaluate.fig3_views, None),
        (evaluate.fig4_inverses, None),
        (lambda one: evaluate.fig5_recursion(one)[0][0], None),
        (lambda one: evaluate.fig6_transfer(one)[0][0], None),
        (evaluate.sampling, low + share * (high - low)),
        (evaluate.interpolation, (1 - t) * z[2] + t * z[7]),
    ):
        _, heads, rows, *_ = figure(one)
        assert start is not None or heads == [*"0123456789"]
        known = {"x": x, "z": start}
        for label, pictures in filter(None, rows):
            name, _, formula = label.rpartition(" = ")
            if "D" in formula:
                expected = np.rint(255 * computed(formula, **known, **names).sigmoid().numpy())
            else:
                expected = x if formula == "x" else truth(x, formula)
            assert near(pictures, expected), label
            known[name or "x"] = pictures if name else x
            seen.append(label)
    assert len(seen) == 10 + 8 + 8 + 8 + 5 + 5


def test_heads_and_rows_of_the_parts_and_of_the_group(data, figure_data, tmp_path):
    """A column's head and a row's label, together, are the formula."""
    quarters = torch.block_diag(QUARTER, QUARTER, QUARTER)
    model = lavae_with(["rotate_cw", "flip_lr"], quarters, torch.diag(torch.tensor([1.0, -1] * 3)))
    one = run_of(tmp_path, model, few(data))
    names, z = names_of(model), names_of(model)["E"](one.digits)
    _, heads, rows, *_ = evaluate.group_elements(one)
    found = tiles(rows)
    assert len(heads) == 8 and heads[0] == "I" and heads[-1] == "L1^3\nL2 *"
    for k, head in enumerate(heads):
        product = head.removesuffix(" *").replace("\n", " ")
        formula = "D(z)" if product == "I" else f"D(z {product})"
        drawn = np.rint(255 * computed(formula, z=z, **names).sigmoid().numpy())
        name = product.replace("L1", "rotate_cw").replace("L2", "flip_lr").replace(" ", "+")
        true = truth(one.digits, "orig" if product == "I" else name)
        for digit in (2, 7):
            assert np.array_equal(found[f"{digit}: true"][k], true[digit]), head
            assert near(found[f"{digit}: drawn"][k], drawn[digit]), head
    _, heads, rows, *_ = evaluate.partial_augmentation(one)
    found = tiles(rows)
    assert [float(head.removesuffix("°")) for head in heads] == [22.5 * i for i in range(9)]
    for k, t in enumerate(i / 4 for i in range(9)):
        c, s = math.cos(math.pi / 2 * t), math.sin(math.pi / 2 * t)
        turn = torch.block_diag(*[torch.tensor([[c, s], [-s, c]])] * 3)
        assert np.array_equal(found["7: true"][k], augment.rotate_30(one.digits, 90 * t)[7])
        for word, z_t in (("L^t", z @ turn), ("blend", (1 - t) * z + t * z @ quarters)):
            assert near(found[f"7: {word}"][k], drawn_by(model.decoder, z_t)[7]), (word, t)
    frames = evaluate.turning(one)
    title, _, rows, _ = frames[20]  # t = 4/3
    assert len(frames) == 61 and title == "rotate_cw: L^1.33   120 degrees"
    c, s = math.cos(2 * math.pi / 3), math.sin(2 * math.pi / 3)
    turn = torch.block_diag(*[torch.tensor([[c, -s], [s, c]])] * 3).T
    assert np.array_equal(tiles(rows)["true"], augment.rotate_30(one.digits[1::2], 120))
    assert near(tiles(rows)["L^t"], drawn_by(model.decoder, z[1::2] @ turn))
    one.augs = ["flip_lr"]  # which has no true parts
    _, heads, rows, *_ = evaluate.partial_augmentation(one)
    assert heads[-1] == "t = 1" and len(tiles(rows)) == 2 * len(
        {*tiles(rows)} & {f"{i}: L^t" for i in range(10)}
    )
    half = computed("D(z)", z=(z + z @ quarters) / 2, **names).sigmoid().numpy()
    assert near(tiles(rows)["7: blend"][4], np.rint(255 * half[7]))
    one.augs = ["rotate_cw", "flip_lr"]
    _, (panels,), side, _ = evaluate.eigenvalues(one)
    assert [heading for heading, _ in panels] == one.augs
    assert np.allclose(np.abs(panels[0][1][1][1]), [[0, 1]] * 6, atol=1e-6)
    turn, flip = (
        {label: points[0] for label, points, style in series if style == "word"}
        for _, series in panels
    )
    assert np.allclose(turn["3 at -90°"], [0, -0.84]) and np.allclose(turn["i"], [0, 1.2])
    assert np.allclose(flip["3 at 180°"], [-0.68, 0]) and {*flip} - {*turn} == {
        "3 at 0°",
        "3 at 180°",
    }


def test_a_clock_of_all_powers(data, tmp_path):
    """Each place shows its product, and only views have thick frames."""
    angle = torch.tensor(5 * math.pi / 6)
    plane = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    model = lavae_with(["rotate_30", "flip_lr"], torch.block_diag(plane, plane), torch.eye(4))
    one = run_of(tmp_path, model, few(data))
    page, L = np.asarray(evaluate.clock(one, 7)), model.maps[0].L
    blue = (page == (31, 119, 180)).all(2)
    assert blue.sum() == pytest.approx(4 * (100**2 - 84**2), abs=20)
    middle = np.array(page.shape[:2]) / 2
    for hour in (2, 3, 7):
        z = one.z[7:8] @ torch.linalg.matrix_power(L, hour)
        tile = np.kron(one.draw(z)[0], np.ones((3, 3), np.uint8))
        error, _, place, _ = cv2.minMaxLoc(cv2.matchTemplate(page[..., 0], tile, cv2.TM_SQDIFF))
        x, y = np.array(place) + 42 - middle
        at = math.atan2(x, -y - 15) * 6 / math.pi % 12
        assert error < 1000 and at == pytest.approx(hour, abs=0.1)


@pytest.mark.parametrize(
    "order, rounds, steps", [(2, 7, 6), (4, 7, 4), (12, 12, 12), (30, 7, 0), (0, 7, 0)]
)
def test_figure_5_goes_round(order, rounds, steps, one, monkeypatch):
    monkeypatch.setitem(augment.ORDERS, "flip_lr", order)
    (((_, _, rows, _), (_, panels, *_)),) = evaluate.fig5_recursion(one)
    path = torch.stack([one.model.encode(pictures) for _, pictures in rows])
    series = panels[0][0][1]
    assert [style for *_, style in series[:4]] == ["dots"] * 4
    assert len(rows) == rounds + 1 and [len(points) for _, points, _ in series[:4]] == [400] * 4
    paths = [
        label for label, points, style in series if style == "path" and len(points) == steps + 1
    ]
    away = (path[steps] - path[0]).norm(dim=1)
    words = [f"steadiest, {away.argmin()}: {away.min():.2f} away"]
    words.append(f"least steady, {away.argmax()}: {away.max():.2f} away")
    assert paths == (words if steps else []) and len(series) == 4 + len(paths)


@pytest.mark.parametrize("kind", ["cvae", "cvae --condition digit", "cvae-paired"])
def test_figures_8_and_9_draw_cvaes(kind, one, trained, small_data):
    digits, n = one.digits, len(one.digits)
    model = lavae.load(trained(f"--model {kind}"))
    other = evaluate.Run(one.folder, model, one.data)
    other.peers, views = [one], [*formulas(one).values()]
    conditions = torch.eye(10) if "digit" in kind else model.view_conditions
    own = {"cvae": conditions[[0] * n], "cvae-paired": 0 * conditions[[0] * n]}  # of originals
    z = model.encoder(torch.from_numpy(digits) / 255, own.get(kind, conditions))[0]
    figure = evaluate.fig9_paired_cvae if "paired" in kind else evaluate.fig8_cvae
    rows = [row for row in figure(other)[2] if row]
    step = {"cvae": 2, "cvae-paired": 3}.get(kind, 1)
    for v, condition in enumerate(conditions):
        expected = drawn_by(model.decoder, torch.cat([z, condition.expand(n, -1)], 1))
        assert near(rows[v * step + 1][1], expected), v
        if step == 3:
            assert near(rows[v * step + 2][1], drawn_by(one.model.decoder, views[v]))


def test_figure_10_projects_what_it_says(one, monkeypatch):
    seen = []
    for name in ("pca", "fast_ica", "tsne"):
        monkeypatch.setattr(evaluate, name, lambda x: (seen.append(x), x[:, :2])[1])
    one.data = [part[:50] for part in one.data]
    _, panels, *_ = evaluate.fig10_projections(one)
    images = np.concatenate(augment.all_views(one.data[2], one.augs))
    mapped = torch.cat([*formulas(one, one.data[2][:50]).values()][:4])
    for i in range(0, 9, 3):
        assert np.allclose(seen[i], images.reshape(200, -1) / 255)
        assert np.allclose(seen[i + 1], formulas(one, images)[""], atol=1e-4)
        assert np.allclose(seen[i + 2], mapped, atol=1e-4)
    assert [label for label, *_ in panels[0][0][1]] == one.names
    assert np.array_equal(panels[1][2][1][3][1], seen[5][150:, :2])


def test_pictures_of_the_decoder_alone(one):
    decoder, z = one.model.decoder, np.random.default_rng(0).standard_normal((60, 16), np.float32)
    ours = np.concatenate([pictures for _, pictures in evaluate.prior_samples(one)[2]])
    assert near(ours, drawn_by(decoder, torch.from_numpy(z)))
    found = tiles(evaluate.traversals(one)[2])
    z = formulas(one)[""][2].repeat(9, 1)
    z[:, 4] = torch.linspace(-3, 3, 9)
    assert len(found) == 16 and near(found["z5"], drawn_by(decoder, z))


def test_the_latent_plane_and_the_curves(trained, figure_data, small_data, tmp_path):
    out = trained("--latent-dim 2 --no-transfer --epochs 1")
    model = lavae.load(out)
    two = run_of(out, model, small_data)
    _, heads, rows, _ = evaluate.latent_plane(two)
    label, pictures = rows[1]  # the second from the top: z2 is high
    z = torch.tensor([[i / 3, 2.0] for i in range(-7, 8)])
    assert label == "2.00" and heads[-2] == 2 and near(pictures, drawn_by(model.decoder, z))
    _, rows, *_ = evaluate.training_curves(two)
    history = json_of(out / "metrics.json")["history"]["stage 1"]
    for (heading, [(_, points, _)]), key in zip(rows[0], ("bce", "kl", "equivariance")):
        assert heading.startswith(f"stage 1: {key} ")
        assert np.allclose(points[:, 1], history[0]["curve"][key][2:])
    (tmp_path / "metrics.json").write_text('{"history": {"a": [{"curve": {"b": [7]}}]}}')
    two.folder = tmp_path  # an epoch of one batch
    assert evaluate.training_curves(two)[1][0][0][1][0][1].tolist() == [[1, 7]]


def test_figures_are_saved_and_others_named(trained, small_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "tsne", lambda x: x[:, :2])  # tested elsewhere
    out = shutil.copytree(trained(""), tmp_path / "run")
    cvae = shutil.copytree(trained("--model cvae"), tmp_path / "cvae")
    evaluated(out, cvae)
    made = {"fig8_cvae.png", "training_curves.png", "model.pt", "metrics.json", "evaluation.json"}
    assert {*names_in(cvae)} == made
    lacking = {"fig8_cvae", "fig9_paired_cvae", "group_elements", "latent_plane", "fig6_transfer"}
    for name in set(evaluate.FIGURES) - lacking - {"page", "turning", "learning"}:
        pixels = cv2.imread(str(out / f"{name}.png"))
        assert pixels.shape[1] > 600 and pixels[:8].min() == 255 and pixels.min() < 50, name
    refused(evaluate.main, [out, "--only", "fig8_cvae", "fig3_views"], "fig8_cvae needs")
    refused(evaluate.main, [cvae, "--only", "page"], "page needs a LAVAE")
    refused(evaluate.main, [out, "--digits", "11"], "11")
    before = (out / "fig3_views.png").stat().st_mtime_ns
    evaluate.main([str(out), "--only", "tables"])
    assert (out / "fig3_views.png").stat().st_mtime_ns == before
    evaluate.main([str(out), "--only", "fig3_views", "--digits", *"34578"])
    high, wide, _ = cv2.imread(str(out / "fig3_views.png")).shape
    assert 500 < high < wide < 1600  # in two blocks
    blank = Image.new("RGB", (500, 100), "white")
    for name, figure in evaluate.FIGURES.items():
        page = evaluate.captioned(blank, figure)
        lines = np.asarray(page)[100:].min((1, 2)) < 50
        assert page.width == 500 and lines.any() == (name != "page"), name
    capsys.readouterr()
    evaluate.main(["--list"])
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == [*evaluate.FIGURES]


def test_a_grid_shows_each_image(digits):
    rows = [("row", digits[:3]), None, ("long label", digits[3:6])]
    page = np.asarray(augment.grid("Title", [*"abc"], rows, cell=28).convert("L"))
    places = []
    for image in digits[:6]:
        error, _, place, _ = cv2.minMaxLoc(cv2.matchTemplate(page, image, cv2.TM_SQDIFF))
        assert error < 100
        places.append(place)
    assert [x for x, _ in places[:3]] == [x for x, _ in places[3:]]
    assert len({y for _, y in places[:3]}) == len({y for _, y in places[3:]}) == 1
    assert page[:20].min() == page[-20:].min() == page[:, :20].min() == 255


def test_readmes_numbers_are_those_of_the_kept_runs():
    tables = runpy.run_path(str(HERE / "assets/results/tables.py"))
    parts, unwrapped = tables["readme_parts"]().values(), " ".join(TEXT.split())
    for part in parts:
        assert " ".join(part.split()) in unwrapped, f"README lacks {part}"
    # assets/benchmark.py prints those
    text = re.sub(r"## Speed.*?\n## ", "", TEXT, flags=re.DOTALL)
    rows = {line for part in parts for line in part.splitlines()}
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith("| paper") and line not in rows:
            for part in parts:
                line = line.replace(f"| {part} |", "")
            assert not re.search(r"\d\.\d", line), f"of no kept run: {line}"
