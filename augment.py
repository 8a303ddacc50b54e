"""Image augmentations in numpy, and the images that they change.

An augmentation takes images, uint8 (N, H, W), and returns new ones. (A quarter turn exchanges H and
W.) Each is a fixed function of the image, so that a matrix can learn to do the same to the latent.

    flipped = AUGMENTATIONS["flip_lr"](images)
    x, a1, a2, a2_a1 = views(images, [flip_lr, flip_ud])

    python augment.py                          # writes augmentations.png: each on ten digits
    python augment.py --augs shear_x canny     # the same, with another composition last

The file needs no torch. In order: views, augmentations, data, photos of digits, pictures with
labels, and the one-line errors of the command line. Read it after lavae.py and train.py.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import math
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

# ---------------------------------------------------------------- views


def views(x, maps: Sequence[Callable]) -> list:
    """Double for every map: [x] -> [x, A1 x] -> [x, A1 x, A2 x, A2 A1 x], 2^K items for K maps.

    For images the maps are augmentations, for latents they are z -> z L. The order is the same, so
    latent number i should be decoded to image number i.
    """
    out = [x]
    for f in maps:
        out += [f(v) for v in out]
    return out


def view_names(augs: Sequence[str]) -> list[str]:
    """The names of the views: orig, flip_lr, flip_ud, flip_lr+flip_ud. The left one goes first."""
    chains = views((), [lambda chain, a=a: (*chain, a) for a in augs])
    return ["+".join(chain) or "orig" for chain in chains]


# ---------------------------------------------------------------- augmentations


def flip_lr(images: np.ndarray) -> np.ndarray:
    """Mirror left and right. Its own inverse: order 2."""
    return _checked(images)[:, :, ::-1].copy()


def flip_ud(images: np.ndarray) -> np.ndarray:
    """Mirror top and bottom. Its own inverse: order 2."""
    return _checked(images)[:, ::-1].copy()


def rotate_cw(images: np.ndarray) -> np.ndarray:
    """A quarter turn clockwise (H and W change places). Order 4; its inverse is rotate_ccw."""
    return np.rot90(_checked(images), -1, axes=(1, 2)).copy()


def rotate_ccw(images: np.ndarray) -> np.ndarray:
    """A quarter turn anticlockwise (H and W change places). Order 4; its inverse is rotate_cw."""
    return np.rot90(_checked(images), 1, axes=(1, 2)).copy()


def shear_x(images: np.ndarray, degrees: float = -47.5) -> np.ndarray:
    """Slide each row sideways by tan(degrees) times its height above the centre.

    Between two pixels the grey is interpolated, and outside it is zero. What slides out is lost, so
    there is no inverse. (The authors draw the angle from -50 to -45 degrees for every image. The
    default is the middle.)
    """
    height, width = _checked(images).shape[1:]
    _expect(-90 < degrees < 90, "an angle between -90 and 90 degrees", degrees)
    out = np.zeros_like(images)
    for y in range(height):
        shift = math.tan(math.radians(degrees)) * (y - (height - 1) / 2)  # out[x] = in[x + shift]
        left = math.floor(shift)
        x = np.arange(left, left + width + 1)
        row = (images[:, y, x.clip(0, width - 1)] * ((0 <= x) & (x < width))).astype(np.float32)
        f = np.float32(shift - left)
        out[:, y] = np.rint((1 - f) * row[:, :-1] + f * row[:, 1:])
    return out


def gaussian_blur(images: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Smooth with a Gaussian of `sigma` pixels, cut off at 7x7. It has no inverse.

    The image is mirrored at its borders. (The authors draw sigma from 0.1 to 2 for every image.)
    """
    _expect(1e-3 <= sigma < math.inf, "a sigma of 0.001 pixels or more", sigma)
    weights = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)

    def blur(block):
        height, width = block.shape[1:]
        p = np.pad(block, ((0, 0), (3, 3), (3, 3)), "reflect").astype(np.float32)
        p = sum(w * p[:, i:i + height] for i, w in enumerate(weights))
        p = sum(w * p[:, :, i:i + width] for i, w in enumerate(weights))
        return np.rint(p).astype(np.uint8)

    return _in_blocks(blur, images)


def edge_detect(images: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Blend the image with its Laplacian: (1 - alpha) x + alpha Lx. It has no inverse.

    The Laplacian has the kernel 0 1 0 / 1 -4 1 / 0 1 0. The image is mirrored at its borders, and
    the result is cut to 0..255. (The authors draw alpha from 0 to 1 for every image.)
    """
    _expect(0 <= alpha <= 1, "an alpha from 0 to 1", alpha)

    def blend(block):
        p = np.pad(block, ((0, 0), (1, 1), (1, 1)), "reflect").astype(np.int16)
        centre = p[:, 1:-1, 1:-1]
        laplacian = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:] - 4 * centre
        return np.rint((1 - alpha) * centre + alpha * laplacian).clip(0, 255).astype(np.uint8)

    return _in_blocks(blend, images)


def mini_image(images: np.ndarray, size: int = 8) -> np.ndarray:
    """Put a copy of the image, shrunk to size x size, into its top left corner.

    Each small pixel is a weighted mean of large ones. The weights are a triangle, twice as wide as
    the small pixel (antialiased bilinear). Where the corner was empty, clearing it is the inverse.
    It has no order: applied twice it is not undone.
    """
    _expect(size >= 1, "a size of 1 pixel or more", size)

    def shrink(n):  # (min(size, n), n), each row the weights of one small pixel
        scale = n / min(size, n)
        centres = (np.arange(min(size, n))[:, None] + 0.5) * scale
        weights = np.maximum(0, 1 - np.abs(np.arange(n) + 0.5 - centres) / scale)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)

    out = _checked(images).copy()
    rows, columns = (shrink(n) for n in images.shape[1:])
    out[:, :size, :size] = np.rint(rows @ images.astype(np.float32) @ columns.T)
    return out


def tl_sap_noise(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replace the top left corner, a quarter of each side, by Gaussian noise. It has no inverse.

    The noise has mean 128 and standard deviation 32. The same image and seed get the same noise.
    """
    out = _checked(images).copy()
    height, width = images.shape[1] // 4, images.shape[2] // 4
    for image, rng in zip(out, _generators(images, seed)):
        image[:height, :width] = _noise(rng, 32, (height, width))
    return out


def sap_noise(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replace a fifth of the pixels by Gaussian noise. It has no inverse.

    The noise has mean 128 and standard deviation 16. The same image and seed get the same noise.
    """
    out = _checked(images).copy()
    for image, rng in zip(out, _generators(images, seed)):
        chosen = rng.random(image.shape, np.float32) < 0.2
        image[chosen] = _noise(rng, 16, chosen.sum())
    return out


def _generators(images, seed):  # seeded by the pixels: then noise is a function of the image
    for image in images:
        digest = hashlib.blake2b(image.tobytes(), digest_size=8).digest()
        yield np.random.default_rng((seed, int.from_bytes(digest, "little")))


def _noise(rng, sd, shape):
    noise = rng.standard_normal(shape, np.float32)
    return (noise * np.float32(sd) + 128).clip(0, 255).astype(np.uint8)


def canny(images: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny's edges, black (0) on white (255), the same pixels as cv2.Canny(L2gradient=True).

    1. Gradient: Sobel's, 3x3. The pixels at the borders are repeated.
    2. Thin: keep a pixel if its gradient is longer than that of both neighbours in the direction of
       the gradient. There are four directions.
    3. Follow: a kept pixel over `high` is an edge. So is one over `low` that touches an edge.

    It has no inverse. Raises ValueError: the images are smaller than 3x3 pixels. (The authors draw
    the thresholds near the defaults for every image.)
    """
    if min(_checked(images).shape[1:]) < 3:
        raise ValueError(f"expected images of 3x3 pixels or more, got {images.shape}")
    _expect(not math.isnan(low + high), "thresholds that are numbers", (low, high))
    low, high = (math.floor(min(t, 32767) ** 2) if t > 0 else 0 for t in sorted((low, high)))
    return _in_blocks(lambda block: _canny(block, low, high), images)


def _canny(images, low, high):  # the thresholds squared, as the gradients are
    border = ((0, 0), (1, 1), (1, 1))
    p = np.pad(images, border, "edge").astype(np.int16)
    smooth_y = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    smooth_x = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    # From here on the images have a border of zeros and are flat: a neighbour is an offset.
    gx = np.pad(smooth_y[:, :, 2:] - smooth_y[:, :, :-2], border).ravel()
    gy = np.pad(smooth_x[:, 2:] - smooth_x[:, :-2], border).ravel()
    right, down = 1, p.shape[2]
    magnitude = np.square(gx, dtype=np.int32) + np.square(gy, dtype=np.int32)

    # Thin. The direction of the gradient is rounded to 45 degrees: |gy| is compared with
    # tan(22.5) |gx| and with tan(67.5) |gx| = (tan(22.5) + 2) |gx|. OpenCV has 15 bits of the tan.
    at = np.flatnonzero(magnitude > low)
    x, y, m = gx[at].astype(np.int32), gy[at].astype(np.int32), magnitude[at]
    ax, ay = np.abs(x), np.abs(y) << 15
    horizontal, vertical = ay < 13573 * ax, ay > (13573 + (2 << 15)) * ax
    step = np.where((x ^ y) < 0, right - down, right + down)
    step[horizontal], step[vertical] = right, down
    before, after = magnitude[at - step], magnitude[at + step]
    # Of two equal neighbours the first is kept; on a diagonal, neither.
    longest = (m > before) & np.where(horizontal | vertical, m >= after, m > after)
    at, m = at[longest], m[longest]

    # Follow: go on from the edges found last to the weak pixels around them, until there are none.
    weak = np.zeros(magnitude.shape, bool)
    weak[at] = True
    edges = np.full(magnitude.shape, 255, np.uint8)
    around = np.array([-down - 1, -down, -down + 1, -1, 1, down - 1, down, down + 1])
    front = at[m > high]
    while front.size:
        weak[front], edges[front] = False, 0
        front = (front[:, None] + around).ravel()
        front = np.unique(front[weak[front]])
    return edges.reshape(p.shape)[:, 1:-1, 1:-1]


AUGMENTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {f.__name__: f for f in (
    flip_lr, flip_ud, rotate_cw, rotate_ccw, gaussian_blur, edge_detect, shear_x, canny, mini_image,
    tl_sap_noise, sap_noise)}
PAIRS = [["flip_lr", "flip_ud"], ["mini_image", "edge_detect"], ["rotate_cw", "flip_lr"],
         ["shear_x", "canny"]]  # of the paper's heat-map
ORDERS = {"flip_lr": 2, "flip_ud": 2, "rotate_cw": 4, "rotate_ccw": 4}  # k with A^k x = x, if any


def all_views(images: np.ndarray, augs: Sequence[str]) -> list[np.ndarray]:
    """The 2^K views of images, uint8 (N, H, W), under augmentations given by name."""
    return views(images, [AUGMENTATIONS[a] for a in augs])


def _checked(images):
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8):
        raise TypeError(f"expected a uint8 array, got {getattr(images, 'dtype', type(images))}")
    if images.ndim != 3 or 0 in images.shape[1:]:
        raise ValueError(f"expected images of shape (N, H, W), H and W not 0, got {images.shape}")
    return images


def _expect(there, what, given):
    if not there:
        raise ValueError(f"expected {what}, got {given}")


def _in_blocks(f, images, pixels=400_000):  # few enough for the processor's caches
    n = max(1, pixels // max(1, math.prod(_checked(images).shape[1:])))
    out = np.empty_like(images)
    for i in range(0, len(images), n):
        out[i:i + n] = f(images[i:i + n])
    return out


# ---------------------------------------------------------------- data

DATA_DIR = Path(__file__).resolve().parent / "data"
MNIST_SHA256 = "b5e394bc34918bacb3c7d30dae8a52f2e99dbccb1317eccfc24e1d09f564e406"
DATASETS = {"mnist": None, "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
CLASSES = {"mnist": [*"0123456789"],
           "fashion_mnist": ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt",
                             "sneaker", "bag", "boot"],
           "kmnist": ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]}


def load_images(dataset: str = "mnist", data_dir: str | Path = DATA_DIR) -> tuple:
    """(x_train, y_train, x_test, y_test): images uint8 (N, 28, 28), labels integers (N,) or None.

    MNIST comes with the repository. The other data sets are downloaded to `data_dir` by
    torchvision. A name with .npz is a file of one's own, see `load_npz` and `pinned`.

    Raises:
        OSError: a file is missing, damaged or cannot be downloaded; the message says what to do.
        ValueError: a .npz file does not hold what it should.
    """
    data_dir = Path(data_dir)
    if ".npz" in dataset:
        return load_npz(dataset, data_dir)[0]
    if dataset == "mnist":
        path, cure = data_dir / "mnist.npz", "restore it: git checkout -- data/mnist.npz"
        if data_dir.resolve() != DATA_DIR:
            cure = f"copy {DATA_DIR / 'mnist.npz'} there, or leave --data-dir out"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {cure}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != MNIST_SHA256:
            raise OSError(f"{path} is damaged: {cure}")
        with np.load(path) as file:
            return tuple(file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    try:
        from torchvision import datasets  # here, because it takes seconds to import
    except Exception as error:  # where the two do not fit, anything may be raised
        raise OSError("torch and torchvision do not belong together here: install both at once, "
                      "`python -m pip install --force-reinstall torch torchvision` "
                      f"({_one_line(error)})") from error
    try:
        parts = [getattr(datasets, DATASETS[dataset])(data_dir, train=train, download=True)
                 for train in (True, False)]
        return tuple(a for p in parts for a in (p.data.numpy(), p.targets.numpy().astype(np.uint8)))
    except Exception as error:  # no network, and whatever half a file may raise
        raise OSError(f"cannot get {dataset}: check the network, remove "
                      f"{data_dir / DATASETS[dataset]}, try again ({_one_line(error)})") from error


def pinned(dataset: str) -> str:
    """The name of a data set. A .npz file gets the start of its SHA-256, "letters.npz#1f0c..": so
    another file of the same name is noticed. Raises OSError: there is no such file."""
    if not dataset.endswith(".npz"):
        return dataset
    return f"{dataset}#{hashlib.sha256(Path(dataset).read_bytes()).hexdigest()[:16]}"


def load_npz(dataset: str, data_dir: Path = DATA_DIR) -> tuple[tuple, list[str] | None]:
    """From a .npz file of one's own: what `load_images` returns; the names of the classes, or None.

    Keras's names are x_train, y_train, x_test and y_test. MedMNIST's are train_images,
    train_labels, test_images and test_labels. Images are uint8 (N, 28, 28), 200 or more. Labels are
    integers from 0 on, (N,) or (N, 1), and may be missing. An array class_names may name them.
    Nothing is unpickled. Raises OSError: the file cannot be read; ValueError: it holds something
    else.
    """
    name, _, digest = dataset.partition("#")
    path = Path(name) if Path(name).is_file() else data_dir / Path(name).name
    if digest and pinned(str(path)).partition("#")[2] != digest:
        raise ValueError(f"{path} is not the file that the model was trained on: restore that one")
    try:
        with np.load(path) as file:
            content = {key: file[key] for key in file.files if not key.startswith("val_")}
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file of plain arrays ({_one_line(error)})") from error
    keys = ("x_train", "y_train", "x_test", "y_test")
    if "x_train" not in content:
        keys = ("train_images", "train_labels", "test_images", "test_labels")
    x_train, y_train, x_test, y_test = (content.get(key) for key in keys)
    names = content["class_names"].astype(str).tolist() if "class_names" in content else None
    for key, x in zip(keys[::2], (x_train, x_test)):
        _expect(x is not None and x.dtype == np.uint8 and x.shape[1:] == (28, 28) and len(x) >= 200,
                f"{path} to hold 200 or more images, uint8 (N, 28, 28), as {key}", _kind(x))
    if y_train is None and y_test is None:
        return (x_train, None, x_test, None), names
    ys = []
    for key, x, y in zip(keys[1::2], (x_train, x_test), (y_train, y_test)):
        good = y is not None and y.dtype.kind in "iu" and y.shape in ((len(x),), (len(x), 1))
        _expect(good and y.min() >= 0 and y.max() < (len(names) if names else 1000),
                f"{path} to hold a label for each image, integers from 0 on, as {key}", _kind(y))
        ys.append(y.ravel().astype(np.int64))
    return (x_train, ys[0], x_test, ys[1]), names


def _kind(array):
    return "nothing" if array is None else f"{array.dtype} {array.shape}"


def class_names(dataset: str, labels: np.ndarray | None, data_dir: Path = DATA_DIR) -> list[str]:
    """The names of the classes 0, 1, .. of a data set that has these labels."""
    names = load_npz(dataset, data_dir)[1] if ".npz" in dataset else CLASSES[dataset]
    return names or [str(label) for label in range(1 if labels is None else labels.max() + 1)]


def _one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def like_mnist(path: str | Path) -> np.ndarray:
    """A drawing or photo of one digit, changed to look as in MNIST, uint8 (28, 28).

    MNIST's digits are white on black, in a box of 20x20, with the centre of mass in the middle. The
    picture may have up to 50 megapixels. It may be in colour, dark on light or light on dark, and
    partly transparent. It is turned as its EXIF data say.

    The ink is what differs from the page, whatever the light. Ruled lines and specks are left out,
    and thin strokes become as thick as MNIST's. If there are several figures, the largest is taken
    and a line says so.

    Raises ValueError: the file is no picture or a huge one, there is no ink, or there is too little
    page around it.
    """
    if not Path(path).is_file():
        raise ValueError(f"there is no {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                if file.width * file.height > 50_000_000:
                    raise Image.DecompressionBombError
                picture = ImageOps.exif_transpose(file)
                picture.load()
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} has more than 50 megapixels: make it smaller") from error
    except Exception as error:  # a broken file may raise anything
        raise ValueError(f"{path} is no picture that can be read") from error
    grey = _grey(picture, path)
    ink, noise, figure, others = _figure_in(grey)
    if figure.shape != grey.shape and 0 < _size(figure) < 40:  # small in a large picture: cut out
        margin, cut = _size(figure), []
        for axis, side in zip((1, 0), grey.shape):
            at, scale = np.flatnonzero(figure.any(axis)), side / figure.shape[1 - axis]
            cut.append(slice(int(max(0, at[0] - margin) * scale), int((at[-1] + margin) * scale)))
        ink, noise, figure, _ = _figure_in(grey[tuple(cut)])
    darkest = np.quantile(ink[figure], 0.98) if figure.any() else 0
    floor = min(1, max(0.2, 3 * noise / max(darkest, 1e-9)))  # paper is not quite even
    ink = (ink - floor * darkest).clip(0, (1 - floor) * darkest) * _grown(figure, 2)
    if ink.max() <= 0:
        raise ValueError(f"{path} is empty, or its digit cannot be told from the page: leave more "
                         "paper around it")
    if others:
        print(f"{path} shows {others + 1} figures: the largest is taken")
    return _boxed(np.rint(255 * ink / ink.max()).astype(np.uint8))


def _figure_in(grey):
    """Of a smaller copy, which is quick to search: the ink, the noise, and `_largest_figure`."""
    shrink = math.ceil(min(max(grey.shape) / 500, (grey.size / 125_000) ** 0.5))
    size = [max(1, side // shrink) for side in grey.shape[::-1]]
    ink, noise = _ink(np.asarray(Image.fromarray(grey.astype(np.float32)).resize(
        size, Image.Resampling.BOX), np.float64) if shrink > 1 else grey)
    return ink, noise, *_largest_figure(ink, noise)


def _size(figure):
    """The longer side of what is true in a mask, in pixels. 0: nothing is."""
    sides = [np.flatnonzero(figure.any(axis)) for axis in (0, 1)]
    return max(side[-1] - side[0] + 1 if side.size else 0 for side in sides)


def _ink(grey):
    """(ink, noise). ink: how much darker than the page each pixel is, or how much lighter. noise: a
    number, how uneven the page is.

    The page is a surface of degree 2. It is fitted again and again, without what lies far off it.
    """
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in grey.shape), indexing="ij")
    terms = np.stack([x ** 0, x, y, x * x, x * y, y * y], 2)
    step = max(1, min(math.ceil(max(grey.shape) / 100), min(grey.shape) // 20))
    points, values = terms[::step, ::step].reshape(-1, 6), grey[::step, ::step].ravel()
    fits = []
    # Start from all pixels, and from those of the commonest grey: better if there is little page.
    for off in (np.zeros(len(values)), np.abs(values - np.median(values))):
        for _ in range(20):
            page = off <= max(2, 4 * np.median(off))
            weights = np.linalg.lstsq(points[page], values[page], rcond=None)[0]
            off = np.abs(values - points @ weights)
        fits.append((np.median(off), weights))
    weights = min(fits, key=lambda fit: fit[0])[1]
    light = (terms @ weights).clip(16)
    ink = light - grey
    if (ink.clip(0) ** 2).sum() < (ink.clip(max=0) ** 2).sum():
        ink = -ink
    else:
        ink *= light.max() / light  # in the shade black differs less from the page
    noise = 1.5 * np.median(np.abs(ink))
    for across in (ink, ink.T):  # ink.T is a view: both change ink
        across -= _lines(across)
    return ink.clip(0), noise


def _lines(ink):
    """The ink of ruled lines, nearly level: what most of a row and both its ends have in common."""
    height, width = ink.shape
    y, x, end = np.arange(height)[:, None], np.arange(width), max(1, width // 20)
    best, lines = 0, np.zeros_like(ink)
    for slope in np.linspace(-0.06, 0.06, 25):
        rise = np.rint(slope * (x - width / 2)).astype(int)
        row = ink[(y + rise).clip(0, height - 1), x]
        depth = np.minimum.reduce([np.quantile(row, 0.25, axis=1), np.median(row[:, :end], axis=1),
                                   np.median(row[:, -end:], axis=1)]).clip(0)
        if (depth ** 2).sum() > best:
            best, lines = (depth ** 2).sum(), depth[(y - rise).clip(0, height - 1)]
    return np.where(ink < 2 * lines, ink, 0)  # where a stroke crosses one it stays


def _largest_figure(ink, noise):
    """(mask, others): where the figure with the most ink is; how many have a third of its ink.

    Parts that nearly touch are one figure. Without ink the mask is empty.
    """
    soft = Image.fromarray(np.rint(ink).clip(max=255).astype(np.uint8))
    soft = np.asarray(soft.filter(ImageFilter.GaussianBlur(min(500, max(ink.shape)) / 400)))
    inked = soft > max(8, 4 * noise, 0.3 * soft.max())
    if not inked.any():
        return inked, 0
    inked = soft > 0.4 * np.median(soft[inked])
    parts, mass = _parts(inked, soft * inked)
    largest = parts == mass.argmax()
    inked &= (mass > 0.01 * mass.max())[parts]  # no specks
    parts, mass = _parts(_grown(inked, 0.04 * _size(largest)), soft * inked)
    return inked & (parts == mass.argmax()), (mass > mass.max() / 3).sum() - 1


def _parts(mask, ink):
    """(labels, ink): a number for each connected part of a mask, 0 outside; the ink of each."""
    labels = np.where(mask, np.arange(1, mask.size + 1, dtype=np.int32).reshape(mask.shape), 0)
    while True:  # a pixel takes the largest label around it, then the label of the pixel named so
        around = np.where(mask, _grown(labels, 1), 0)
        new = np.append(0, around).astype(np.int32)[around]
        if (new == labels).all():
            return labels, np.bincount(labels.ravel(), ink.ravel())
        labels = new


def _grown(picture, pixels):
    """Each pixel becomes the largest of those up to so many pixels away, in a square."""
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.MaxFilter(2 * round(pixels) + 1)))


def _boxed(ink):
    """Ink, uint8, to the size, thickness and place of MNIST's digits, uint8 (28, 28)."""
    rows, columns = np.flatnonzero(ink.max(1)), np.flatnonzero(ink.max(0))
    ink = np.pad(ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], 1)
    dark = ink > 127
    rim = dark[1:-1, 1:-1] & ~(dark[2:, 1:-1] & dark[:-2, 1:-1] & dark[1:-1, 2:] & dark[1:-1, :-2])
    more = max(0, round(0.05 * (max(ink.shape) - 2) - dark.sum() / max(1, rim.sum())))
    ink = _grown(np.pad(ink, more), more)[1:-1, 1:-1]  # strokes of two pixels of 20 at least
    size = [max(1, round(n * 20 / max(ink.shape))) for n in ink.shape]
    box = np.asarray(Image.fromarray(ink).resize(
        size[::-1], Image.Resampling.BOX if max(ink.shape) > 20 else Image.Resampling.BICUBIC))
    box = np.minimum(box * (255 / box.max()), 255).astype(np.uint8)
    at = [round(13.5 - box.sum(axis) @ np.arange(n) / box.sum()) for axis, n in zip((1, 0), size)]
    at = [min(max(a, 0), 28 - n) for a, n in zip(at, size)]
    return np.pad(box, [(a, 28 - n - a) for a, n in zip(at, size)])


def _grey(picture, path):
    """A picture in grey, floats from 0 to 255. Behind what is transparent: white or black, the one
    with more contrast."""
    if picture.mode.startswith(("I", "F")):  # 16 bits and more
        grey = np.asarray(picture, np.float64)
        if not np.isfinite(grey).all():
            raise ValueError(f"{path} holds numbers that are not finite: replace them")
        return (grey - grey.min()) * (255 / (np.ptp(grey) or 1))
    picture = picture.convert("RGBA")
    layers = [Image.alpha_composite(Image.new("RGBA", picture.size, ground), picture).convert("L")
              for ground in ("white", "black")]
    return max((np.asarray(layer, np.float64) for layer in layers), key=np.std)


# ---------------------------------------------------------------- pictures


def text(words: str, size: int = 24, colour="black", paper="white") -> Image.Image:
    """Words as a picture. Lines are centred. size: about the height of a line, in pixels.

    Raises ValueError: this Pillow cannot draw text.
    """
    try:
        font, lines = ImageFont.load_default(size), words.split("\n")
    except ImportError as error:
        raise ValueError("this Pillow was built without FreeType and cannot write text: `python -m "
                         "pip install --force-reinstall pillow`") from error
    width, height = 8 + math.ceil(max(map(font.getlength, lines))), size * 5 // 4 * len(lines)
    page = Image.new("RGB", (width, height), paper)
    ImageDraw.Draw(page).text((width / 2, height / 2), words, colour, font, "mm", align="center")
    return page


def table(rows: Sequence[Sequence[Image.Image | None]], align: str = "rc", gap: int = 4,
          paper="white") -> Image.Image:
    """Pictures in rows and columns. None leaves a place empty, and an empty row leaves a gap.

    align: a letter for each column, l, c or r: left, centre, right. The last letter is also that of
    all further columns. gap: between two pictures, in pixels.
    """
    widths = [max((p.width for p in column if p), default=0) for column in zip_longest(*rows)]
    heights = [max((p.height for p in row if p), default=14) for row in rows]
    page = Image.new("RGB", [sum(sides) + gap * max(0, len(sides) - 1)
                             for sides in (widths, heights)], paper)
    for j, row in enumerate(rows):
        for i, picture in enumerate(row):
            if picture:
                room = (widths[i] - picture.width) * "lcr".index(align[i:i + 1] or align[-1]) // 2
                page.paste(picture, (sum(widths[:i]) + gap * i + room, sum(heights[:j]) + gap * j
                                     + (heights[j] - picture.height) // 2))
    return page


def box(size: tuple[int, int], paper, *lines: tuple[str, int], ink="black") -> Image.Image:
    """A coloured box, with lines of (words, font size) in its middle."""
    page = Image.new("RGB", size, paper)
    words = table([[text(*line, ink, paper)] for line in lines], "c", 2, paper)
    page.paste(words, ((page.width - words.width) // 2, (page.height - words.height) // 2))
    return page


def titled(title: str, *pictures: Image.Image) -> Image.Image:
    """Pictures one above the other, under a title."""
    return ImageOps.expand(table([[text(title, 32)], *zip(pictures)], "l", gap=10), 23, "white")


def grid(title: str, columns: Sequence[str], rows: Sequence[tuple[str, np.ndarray] | None],
         cell: int = 84) -> Image.Image:
    """Images in labelled rows and columns under a title, black on white.

    rows: (label, images), one image for each column, uint8 (len(columns), H, W). None is a gap.
    cell: the side of an image, in pixels.
    """
    def tile(image):
        image = Image.fromarray(image).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)
        return ImageOps.expand(image, 1, "silver")

    heads = [text(words) for words in columns]
    widest = Image.new("RGB", (max(head.width for head in heads), 0))  # so wide are all columns
    heads = [table([[widest], [head]], "c", gap=0) for head in heads]
    return titled(title, table([[None, *heads]] * any(columns) + [
        [text(row[0]), *map(tile, row[1])] if row else [] for row in rows]))


def save(page: Image.Image | list[Image.Image] | str, path: Path) -> None:
    """Write a picture, a list of pictures as a moving one, or a text. Raises OSError, ValueError:
    the message names the file."""
    if isinstance(page, str):
        path.write_text(page, encoding="utf-8")
        return
    first, *more = page if isinstance(page, list) else [page]
    try:
        first.save(path, **dict(save_all=True, append_images=more, duration=120, loop=0)
                   if more else {})
    except OSError as error:
        error.filename = path
        raise
    except ValueError as error:
        raise ValueError(f"cannot write {path} ({error}): choose another --out") from error


def one_of_each(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The second image of each class, in order. (The first 5 of MNIST's test set looks like an S.)
    """
    return images[[np.flatnonzero(labels == label)[:2][-1] for label in np.unique(labels)]]


# ---------------------------------------------------------------- command line


class Output(io.TextIOBase):
    """Standard output that never ends the program.

    A character that the console lacks is shown as its code. When nobody reads any more (`| head`),
    or the disk with the log is full, the rest is not shown. `stream` may be None, or any object
    with `write`.
    """

    def __init__(self, stream):
        self.stream = stream
        with contextlib.suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")

    def write(self, words: str) -> int:
        """Write and flush, or do nothing."""
        with contextlib.suppress(AttributeError, OSError, ValueError):
            self.stream.write(words)
            self.stream.flush()
        return len(words)

    def isatty(self) -> bool:
        """Whether the stream says that it is a terminal."""
        with contextlib.suppress(AttributeError, ValueError):
            return self.stream.isatty()
        return False


@contextlib.contextmanager
def tolerant_output() -> Iterator[None]:
    """`print` writes to an `Output` in here. It also serves as a decorator."""
    with contextlib.redirect_stdout(Output(sys.stdout)):
        yield


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, go_on: str = "") -> Iterator[None]:
    """An OSError, ValueError, FloatingPointError or full memory ends the program with one line and
    status 2, Ctrl-C with status 130. Other errors are bugs, and keep their traceback.

    go_on: what the line adds when the disk or the memory is full.
    """
    try:
        with tolerant_output():
            yield
    except (MemoryError, RuntimeError) as error:
        words = r"out of memory|can't allocate memory|not enough memory|Unable to allocate"
        if not (isinstance(error, MemoryError) or re.search(words, str(error))):
            raise
        parser.error(f"the memory is full: close other programs{go_on}")
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = f"make room{go_on}" if full else "choose another folder"
        parser.error(f"{error.filename}: {error.strerror}: {cure}" if error.errno else str(error))
    except (ValueError, FloatingPointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt as stop:
        parser.exit(130, f"\nstopped{': ' * bool(stop.args)}{stop}\n")


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--augs", nargs="+", choices=AUGMENTATIONS, metavar="A",
                        default=["flip_lr", "flip_ud"], help="to compose, the left one first, of\n"
                        + ", ".join(AUGMENTATIONS) + "\n(default flip_lr flip_ud)")
    parser.add_argument("--out", type=Path, default=Path("augmentations.png"), metavar="FILE",
                        help="(default augmentations.png)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write a picture of all augmentations, the composition of the named ones last."""
    parser = parser_of()
    options = parser.parse_args(argv)
    with one_line_errors(parser):
        digits = one_of_each(*load_images()[2:])
        rows = [("original", digits), None, *((a, f(digits)) for a, f in AUGMENTATIONS.items()),
                None, ("+".join(options.augs), all_views(digits, options.augs)[-1])]
        save(grid("Augmentations", CLASSES["mnist"], rows, cell=64), options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
