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
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, zip_longest
from pathlib import Path, PureWindowsPath

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


class Refused(ValueError):
    """Something that a user asked for and cannot have. The message says what to do."""


def _expect(there, what, given):
    if not there:
        raise Refused(f"expected {what}, got {given}")


def _kind(array):
    return f"{getattr(array, 'dtype', 'no array')} {np.shape(array)}"


def _checked(images):  # of floats in [0, 1] most augmentations would make black pictures
    good = _kind(images).startswith("uint8") and images.ndim == 3
    _expect(good, "images, 0 to 255, uint8 (N, H, W)", _kind(images))
    return images


def _in_blocks(f, images, pixels=400_000):  # few enough for the processor's caches
    blocks = np.array_split(_checked(images), 1 + images.size // pixels)
    return np.concatenate([f(block).astype(np.uint8) for block in blocks])


def flip_lr(images: np.ndarray) -> np.ndarray:
    """Mirror left and right. Its own inverse: order 2."""
    return images[:, :, ::-1].copy()


def flip_ud(images: np.ndarray) -> np.ndarray:
    """Mirror top and bottom. Its own inverse: order 2."""
    return images[:, ::-1].copy()


def rotate_cw(images: np.ndarray) -> np.ndarray:
    """A quarter turn clockwise (H and W change places). Order 4; its inverse is rotate_ccw."""
    return np.rot90(images, -1, axes=(1, 2)).copy()


def rotate_ccw(images: np.ndarray) -> np.ndarray:
    """A quarter turn anticlockwise (H and W change places). Order 4; its inverse is rotate_cw."""
    return np.rot90(images, 1, axes=(1, 2)).copy()


def rotate_30(images: np.ndarray, degrees: float = 30.0) -> np.ndarray:
    """Turn clockwise about the centre. Order 12; its inverse turns by -30 degrees.

    The grey is interpolated between four pixels, and outside the image it is zero. So twelve turns,
    one after the other, give the image back, but smoother and without what left it. A pixel is a
    complex number x + i y here: a turn multiplies it. (The paper has no such augmentation.)
    """
    y, x = np.indices(images.shape[1:]).reshape(2, -1)
    at = x + 1j * y
    at -= at.mean()  # the place of each pixel, from the centre
    source = at * np.exp(-1j * math.radians(degrees))  # where a new pixel comes from
    away = source - at[:, None]  # from each pixel (row), for each new pixel (column)
    weights = np.maximum(0, 1 - np.abs(away.real)) * np.maximum(0, 1 - np.abs(away.imag))
    weights = weights.astype(np.float32)

    def turn(block):
        flat = block.reshape(len(block), len(at))
        return np.rint(flat @ weights).reshape(block.shape)

    return _in_blocks(turn, images)


def shear_x(images: np.ndarray, degrees: float = -47.5) -> np.ndarray:
    """Slide each row sideways by tan(degrees) times its height above the centre.

    Between two pixels the grey is interpolated, and outside it is zero. What slides out is lost, so
    there is no inverse. (The authors draw the angle from -50 to -45 degrees for every image. The
    default is the middle.)
    """
    height, width = images.shape[1:]
    _expect(-90 < degrees < 90, "an angle between -90 and 90 degrees", degrees)

    def slide(block):
        out = np.empty_like(block)
        for y in range(height):
            shift = math.tan(math.radians(degrees)) * (y - (height - 1) / 2)
            left = math.floor(shift)  # out[x] = in[x + shift]
            x = np.arange(left, left + width + 1)
            inside = (x >= 0) & (x < width)
            row = (block[:, y, x.clip(0, width - 1)] * inside).astype(np.float32)
            f = np.float32(shift - left)
            out[:, y] = np.rint((1 - f) * row[:, :-1] + f * row[:, 1:])
        return out

    return _in_blocks(slide, images)


def gaussian_blur(images: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Smooth with a Gaussian of `sigma` pixels, cut off at 7x7. It has no inverse.

    The image is mirrored at its borders. (The authors draw sigma from 0.1 to 2 for every image.)
    """
    weights = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)

    def blur(block):
        height, width = block.shape[1:]
        p = np.pad(block, ((0, 0), (3, 3), (3, 3)), "reflect").astype(np.float32)
        p = sum(w * p[:, i : i + height] for i, w in enumerate(weights))
        p = sum(w * p[:, :, i : i + width] for i, w in enumerate(weights))
        return np.rint(p)

    return _in_blocks(blur, images)


def edge_detect(images: np.ndarray, alpha: float = 1.0) -> np.ndarray:
    """Blend the image with its Laplacian: (1 - alpha) x + alpha Lx. It has no inverse.

    The Laplacian has the kernel 0 1 0 / 1 -4 1 / 0 1 0. The image is mirrored at its borders, and
    the result is cut to 0..255. (The authors draw alpha from 0 to 1 for every image.)
    """

    def blend(block):
        p = np.pad(block, ((0, 0), (1, 1), (1, 1)), "reflect").astype(np.int16)
        centre = p[:, 1:-1, 1:-1]
        laplacian = p[:, :-2, 1:-1] + p[:, 2:, 1:-1] + p[:, 1:-1, :-2] + p[:, 1:-1, 2:] - 4 * centre
        return np.rint((1 - alpha) * centre + alpha * laplacian).clip(0, 255)

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

    rows, columns = (shrink(n) for n in images.shape[1:])

    def put(block):
        out = block.copy()
        out[:, :size, :size] = np.rint(rows @ block.astype(np.float32) @ columns.T)
        return out

    return _in_blocks(put, images)


def tl_sap_noise(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replace the top left corner, a quarter of each side, by Gaussian noise. It has no inverse.

    The noise has mean 128 and standard deviation 32. The same image and seed get the same noise.
    """
    out = images.copy()
    height, width = images.shape[1] // 4, images.shape[2] // 4
    for image, rng in zip(out, _generators(images, seed)):
        image[:height, :width] = _noise(rng, 32, (height, width))
    return out


def sap_noise(images: np.ndarray, seed: int = 0) -> np.ndarray:
    """Replace a fifth of the pixels by Gaussian noise. It has no inverse.

    The noise has mean 128 and standard deviation 16. The same image and seed get the same noise.
    """
    out = images.copy()
    for image, rng in zip(out, _generators(images, seed)):
        chosen = rng.random(image.shape, np.float32) < 0.2
        image[chosen] = _noise(rng, 16, chosen.sum())
    return out


def _generators(images, seed):  # seeded by the pixels: then noise is a function of the image
    for image in _checked(images):
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

    It has no inverse. (The authors draw the thresholds near the defaults for every image.)
    """
    low, high = (math.floor(min(max(t, 0), 32767) ** 2) for t in (low, high))
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


ALL = [flip_lr, flip_ud, rotate_cw, rotate_ccw, rotate_30, gaussian_blur, edge_detect, shear_x]
ALL += [canny, mini_image, tl_sap_noise, sap_noise]
AUGMENTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {f.__name__: f for f in ALL}
PAIRS = [  # of the paper's heat-map
    ["flip_lr", "flip_ud"],
    ["mini_image", "edge_detect"],
    ["rotate_cw", "flip_lr"],
    ["shear_x", "canny"],
]
ORDERS = {  # k with A^k x = x, if any
    "flip_lr": 2,
    "flip_ud": 2,
    "rotate_cw": 4,
    "rotate_ccw": 4,
    "rotate_30": 12,
}
SLOPE = math.tan(math.radians(-47.5))  # of shear_x
TURNS = {"rotate_cw": 90, "rotate_ccw": -90, "rotate_30": 30}  # degrees, clockwise
PARTS = {  # A^t x, from images and t >= 0, where a part of an augmentation has a meaning
    "shear_x": lambda images, t: shear_x(images, math.degrees(math.atan(t * SLOPE))),
    "gaussian_blur": lambda images, t: gaussian_blur(
        images, max(0.001, math.sqrt(t))
    ),  # variances add
}
for _name, _degrees in TURNS.items():
    PARTS[_name] = lambda images, t, degrees=_degrees: rotate_30(images, degrees * t)


def all_views(images: np.ndarray, augs: Sequence[str]) -> list[np.ndarray]:
    """The 2^K views of images, uint8 (N, H, W), under augmentations given by name. Raises Refused:
    one of your own returns something else."""
    found = views(_checked(images), [AUGMENTATIONS[a] for a in augs])
    for name, view in zip(view_names(augs), found):
        _expect(_kind(view) == _kind(images), f"{_kind(images)} from {name}", _kind(view))
    return [*map(np.ascontiguousarray, found)]  # an own function may return x[:, ::-1]


def true_picture(images: np.ndarray, augs: Sequence[str], word: Sequence[int]) -> np.ndarray:
    """Images (N, 28, 28) under a product of augmentations, by their numbers. Equal neighbours are
    done in one step, two turns as one of twice the angle, so that pixels are interpolated once."""
    for i, same in groupby(word):
        aug, n = augs[i], len([*same])
        if aug in PARTS:
            images, n = PARTS[aug](images, n), 0
        for _ in range(n):
            images = AUGMENTATIONS[aug](images)
    return images


def check_order(images: np.ndarray, aug: str) -> None:
    """Raises Refused: k times an augmentation of order k does not give images (N, H, W) back. (They
    should be nearer to what they were than after one time.) Or it returns something else."""
    k, (_, once) = ORDERS.get(aug, 0), all_views(images, [aug])
    again, x = true_picture(images, [aug], [0] * k), images.astype(int)
    if np.abs(again - x).sum() > 0.7 * np.abs(once - x).sum():
        raise Refused(
            f"{aug} {k} times does not give the image back: correct ORDERS, and enter a turn in "
            "TURNS, or in PARTS what else interpolates pixels"
        )


# ---------------------------------------------------------------- data

DATA_DIR = Path(__file__).resolve().parent / "data"
DOWNLOADS = {"fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # torchvision's names
CLASSES = {
    "fashion_mnist": "T-shirt trouser pullover dress coat sandal shirt sneaker bag boot",
    "kmnist": "o ki su tsu na ha ma ya re wo",
}
KERAS = ("x_train", "y_train", "x_test", "y_test")
MEDMNIST = ("train_images", "train_labels", "test_images", "test_labels")


def load_images(dataset: str = "mnist", data_dir: str | Path = DATA_DIR) -> tuple:
    """(x_train, y_train, x_test, y_test): images uint8 (N, 28, 28), labels integers (N,) or None.

    MNIST comes with the repository. fashion_mnist and kmnist are downloaded to `data_dir` by
    torchvision. Any other name is a file of one's own, see `load_npz`; where it is no more, a file
    of that name in `data_dir`.

    Raises:
        OSError: a file is missing or cannot be downloaded; the message says what to do.
        Refused: a .npz file does not hold what it should.
    """
    if dataset in DOWNLOADS:
        return _download(dataset, data_dir)
    path = Path(dataset).expanduser()
    if not path.is_file():
        name = "mnist.npz" if dataset == "mnist" else PureWindowsPath(dataset).name
        path = Path(data_dir, name)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {dataset}, and no {path}: check the name, or give the folder that "
            "holds it as --data-dir"
        )
    return load_npz(path)


def load_npz(path: str | Path) -> tuple:
    """What `load_images` returns, from a .npz file with the names of Keras or of MedMNIST.

    Keras's are x_train, y_train, x_test and y_test. MedMNIST's are train_images, train_labels,
    test_images and test_labels. Images are uint8 (N, 28, 28). Labels are integers from 0 to 999,
    (N,) or (N, 1); both may be missing. Nothing is unpickled. Raises Refused: it holds something
    else.
    """
    try:
        with np.load(path) as file:
            there = file.files
            keys = MEDMNIST if MEDMNIST[0] in there else KERAS
            found = {key: file[key] for key in keys if key in there}
    except Exception as error:  # a damaged file may raise anything
        raise Refused(f"{path} is no whole .npz file of plain arrays") from error
    labelled, parts = {*keys[1::2]} & {*there}, []
    for x_key, y_key in (keys[:2], keys[2:]):
        x, y = found.get(x_key), found.get(y_key)
        good = x is not None and x.dtype == np.uint8 and x.shape[1:] == (28, 28) and len(x)
        good = good and x.max() > 1  # images of 0 and 1 would be black
        given = f"{_kind(x)}; it holds {', '.join(there)}"
        _expect(good, f"{path} to hold images, 0 to 255, uint8 (N, 28, 28), as {x_key}", given)
        if labelled:
            good = y is not None and y.dtype.kind in "iu" and y.shape in ((len(x),), (len(x), 1))
            good = good and y.min() >= 0 and y.max() < 1000
            what = f"{path} to hold a label from 0 to 999 for each image, as {y_key}"
            _expect(good, what, _kind(y))
            y = y.ravel()
        parts += [x, y]
    return tuple(parts)


def _download(dataset, data_dir):
    try:
        from torchvision import datasets  # here, because it takes seconds to import

        kind, found = getattr(datasets, DOWNLOADS[dataset]), []
        for train in (True, False):
            part = kind(data_dir, train=train, download=True)
            found += [part.data.numpy(), part.targets.numpy()]
        return tuple(found)
    except Exception as error:  # no network, half a file, a torchvision that does not fit torch
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(
            f"cannot get {dataset}: check the network, remove {Path(data_dir, DOWNLOADS[dataset])} "
            f"and try again, or reinstall torch and torchvision together ({why})"
        ) from error


def like_mnist(path: str | Path) -> np.ndarray:
    """A drawing or photo of one digit, changed to look as in MNIST, uint8 (28, 28).

    MNIST's digits are white on black, in a box of 20x20, with the centre of mass in the middle. The
    picture may be in colour, dark on light or light on dark, and partly transparent. It is turned
    as its EXIF data say. The ink is what differs from the sheet around it, whatever the light. Ink
    that reaches the border of the picture is the edge of a table or a ruled line, and is left out,
    if there is other ink.

    Raises Refused: the file is no picture, or there is no ink on it.
    """
    try:
        with Image.open(path) as file:
            picture = _grey(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise Refused(f"there is no {path}: check the name") from error
    except Image.DecompressionBombError as error:
        raise Refused(f"{path} has too many pixels: make it smaller") from error
    except Exception as error:  # a broken file may raise anything
        raise Refused(f"{path} is no picture that can be read: save it as JPEG or PNG") from error
    picture.thumbnail((200, 200))
    grey = np.asarray(picture, np.float64)
    if np.median(grey) - grey.min() < grey.max() - np.median(grey):  # light on dark
        picture, grey = ImageOps.invert(picture), 255 - grey
    for _ in range(12):  # the sheet: strokes of less than 48 pixels are covered
        picture = picture.filter(ImageFilter.MaxFilter(5))
    sheet = np.asarray(picture.filter(ImageFilter.GaussianBlur(10)), np.float64)
    ink = 1 - grey / sheet.clip(1)
    darkest = np.quantile(ink, 0.995)
    if not darkest > 0.1:
        raise Refused(f"{path} shows no digit: write it darker, and leave some paper around it")
    framed = ImageOps.expand(Image.fromarray(np.uint8(ink > darkest / 2)), 3, 1)
    ImageDraw.floodfill(framed, (0, 0), 2)  # the border, and the ink that it is connected with
    outside = np.asarray(framed.filter(ImageFilter.MaxFilter(5)))[3:-3, 3:-3] == 2
    rest = np.where(outside, 0, ink)
    if np.quantile(rest, 0.995) > 0.1:
        ink, darkest = rest, np.quantile(rest, 0.995)
    ink = ink > darkest / 2
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    height, width = (max(1, round(side * 20 / max(ink.shape))) for side in ink.shape)
    small = Image.fromarray(255 * ink.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BOX
    )
    small = np.asarray(small) / np.max(small)
    out = np.zeros((28, 28), np.uint8)
    mass_y, mass_x = np.indices(small.shape).reshape(2, -1) @ small.ravel() / small.sum()
    y = min(max(round(14 - mass_y), 0), 28 - height)  # of MNIST's digits, the centre lies at 14
    x = min(max(round(14 - mass_x), 0), 28 - width)
    out[y : y + height, x : x + width] = np.rint(255 * small)
    return out


def _grey(picture):
    """A picture in grey. Behind what is transparent: white or black, the one with more contrast."""
    picture, layers = picture.convert("RGBA"), []
    for ground in ("white", "black"):
        ground = Image.new("RGBA", picture.size, ground)
        layers.append(Image.alpha_composite(ground, picture).convert("L"))
    return max(layers, key=np.std)


# ---------------------------------------------------------------- pictures


def text(
    words: str, size: int = 24, colour="black", paper="white", least: tuple[int, int] = (0, 0)
) -> Image.Image:
    """Words as a picture. Lines are centred. size: about the height of a line, in pixels. least:
    the least width and height of the picture."""
    font, lines = ImageFont.load_default(size), words.split("\n")
    width = max(least[0], 8 + math.ceil(max(map(font.getlength, lines))))
    height = max(least[1], size * 5 // 4 * len(lines))
    picture, middle = Image.new("RGB", (width, height), paper), (width / 2, height / 2)
    ImageDraw.Draw(picture).text(middle, words, colour, font, "mm", align="center")
    return picture


def table(
    rows: Sequence[Sequence[Image.Image | None]], align: str = "rc", gap: int = 4
) -> Image.Image:
    """Pictures in rows and columns. None leaves a place empty, and an empty row leaves a gap.

    align: a letter for each column, l, c or r: left, centre, right. The last letter is also that of
    all further columns. gap: between two pictures, in pixels.
    """
    columns = [*zip_longest(*rows)]
    widths = [max((p.width for p in column if p), default=0) for column in columns]
    heights = [max((p.height for p in row if p), default=14) for row in rows]
    size = [sum(sides) + gap * max(0, len(sides) - 1) for sides in (widths, heights)]
    picture, top = Image.new("RGB", size, "white"), 0
    for row, height in zip(rows, heights):
        left = 0
        for i, (cell, width) in enumerate(zip(row, widths)):
            if cell:
                letter = align[min(i, len(align) - 1)]
                x = left + (width - cell.width) * "lcr".index(letter) // 2
                picture.paste(cell, (x, top + (height - cell.height) // 2))
            left += width + gap
        top += height + gap
    return picture


def titled(title: str, *pictures: Image.Image) -> Image.Image:
    """Pictures one above the other, under a title."""
    rows = [[text(title, 32)], *zip(pictures)]
    return ImageOps.expand(table(rows, "l", gap=10), 23, "white")


def grid(
    title: str,
    columns: Sequence[str | float],
    rows: Sequence[tuple[str, np.ndarray] | None],
    cell: int = 84,
) -> Image.Image:
    """Images in rows and columns, with labels and a title.

    rows: (label, images), one image for each column, uint8 (len(columns), H, W). None is a gap.
    Where they would be higher than wide, they stand in two blocks, side by side. cell: the side of
    an image, in pixels.
    """
    gaps = [i for i, row in enumerate(rows) if not row]
    lines, n = _lines(columns, rows, cell), len(columns)
    if gaps and len(rows) - len(gaps) > n:
        cut = min(gaps, key=lambda i: abs(2 * i - len(rows)))  # the one nearest to the middle
        left, right = (_lines(columns, part, cell) for part in (rows[:cut], rows[cut + 1 :]))
        lines = []
        for one, other in zip_longest(left, right, fillvalue=[]):
            filled = one + [None] * (n + 1 - len(one)) if other else one
            lines.append(filled + other)
    return titled(title, table(lines, "r" + n * "c" + "rc"))


def _lines(columns, rows, cell):
    lines, columns = [], [c if isinstance(c, str) else f"{c:.2f}" for c in columns]
    if any(columns):
        widest = max(text(words).width for words in columns)  # so wide are all columns
        heads = [text(words, least=(widest, 0)) for words in columns]
        lines.append([None, *heads])
    for row in rows:
        line = []
        if row:
            line = [text(row[0], 30)]
            for image in row[1]:
                wanted = f"uint8 pictures in {row[0]!r}, like (255 * x).byte().numpy()"
                _expect(image.dtype == np.uint8, wanted, _kind(image))
                tile = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
                line.append(ImageOps.expand(tile.convert("RGB"), 1, "silver"))
        lines.append(line)
    return lines


def save(content: Image.Image | list[Image.Image] | str, path: Path) -> None:
    """Write a picture, several of the same size as a moving one (GIF), or a text.

    A GIF shows ten pictures a second, the last one for two seconds, and begins again. All have one
    palette, so that nothing flickers. Raises OSError, Refused: the message names the file.
    """
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
        return
    options = {}
    if isinstance(content, list):
        few = [[content[0]], [content[len(content) // 2]], [content[-1]]]
        colours = table(few).quantize(96, Image.Quantize.FASTOCTREE)
        content, *rest = [one.quantize(palette=colours, dither=0) for one in content]
        durations = [100] * len(rest) + [2000]
        options = dict(save_all=True, append_images=rest, duration=durations, loop=0)
    try:
        content.save(path, **options)
    except OSError as error:
        error.filename = path
        raise
    except ValueError as error:
        raise Refused(f"cannot write {path} ({error}): choose another --out") from error


def evenly(items: np.ndarray, n: int) -> np.ndarray:
    """n of the items, or all of them if there are fewer, at equal distances: data may be sorted."""
    return items[np.linspace(0, len(items) - 1, min(n, len(items))).astype(int)]


def one_of_each(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The second image of each class, in order. (The first 5 of MNIST's test set looks like S.)"""
    chosen = [np.flatnonzero(labels == label)[:2][-1] for label in np.unique(labels)]
    return images[chosen]


def recorded(images: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    """The numbers of the ten images that `train.py --record` draws, one of each class if known."""
    numbers = np.arange(len(images))
    return evenly(numbers if labels is None else one_of_each(numbers, labels), 10)


# ---------------------------------------------------------------- command line


@contextlib.contextmanager
def one_line_errors(parser: argparse.ArgumentParser, go_on: str = "") -> Iterator[None]:
    """An OSError, Refused, FloatingPointError or full memory ends the program with one line and
    status 2, Ctrl-C with status 130. Other errors are bugs, and keep their traceback.

    go_on: what the line adds when the disk or the memory is full, or after Ctrl-C.
    """
    if hasattr(sys.stdout, "reconfigure"):  # a character that the console lacks is shown as a code
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = r"out of memory|allocate memory|enough memory|Unable to allocate"
        if not (isinstance(error, MemoryError) or re.search(words, str(error))):
            raise
        parser.error(f"the memory is full: close other programs{go_on}")
    except BrokenPipeError:  # nobody reads any more, as with | head; nothing is left to be written
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        parser.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        cure = f"make room{go_on}" if full else "choose another folder"
        name = error.filename or "a file cannot be written"
        parser.error(f"{name}: {error.strerror}: {cure}" if error.errno else str(error))
    except (Refused, FloatingPointError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, f"\nstopped{go_on}\n")


def new_parser(doc: str) -> argparse.ArgumentParser:
    """A parser without a usage line, so that an error is one line."""
    form = argparse.RawTextHelpFormatter
    return argparse.ArgumentParser(description=doc, usage=argparse.SUPPRESS, formatter_class=form)


def parsed(parser: argparse.ArgumentParser, argv: Sequence | None) -> argparse.Namespace:
    """What the command line says: argv, words or numbers, or what the program was started with."""
    return parser.parse_args(argv and [*map(str, argv)])


DERIVED = ("entry", "orders", "classes", "data")  # settings that are no options


def as_typed(options: dict) -> str:
    """Options as one types them: batch_size=64 is --batch-size 64."""
    words = []
    for name, value in options.items():
        option = "--" + name.replace("_", "-")
        if value == []:
            words.append("--no-transfer")
        elif value is True:
            words.append(option)
        elif value is None or value is False:
            words.append(f"no {option}")
        else:
            for one in value if name == "transfer" else [value]:  # it is repeated
                one = one if isinstance(one, list) else [one]
                words.append(" ".join([option, *map(str, one)]))
    return " ".join(words)


def path_of(words: str) -> Path:
    """A type for argparse: a path, which is not empty; ~ is one's home."""
    if not words.strip():
        raise argparse.ArgumentTypeError("an empty path: give a name, or leave the option out")
    return Path(words).expanduser()


def parser_of() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser(__doc__)
    parser.add_argument(
        "--augs",
        nargs="+",
        choices=AUGMENTATIONS,
        metavar="A",
        default=["flip_lr", "flip_ud"],
        help=f"to compose, the left one first, of\n{', '.join(AUGMENTATIONS)}\n"
        "(default flip_lr flip_ud)",
    )
    parser.add_argument(
        "--out",
        type=path_of,
        default=Path("augmentations.png"),
        metavar="FILE",
        help="(default augmentations.png)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Write a picture of all augmentations, the composition of the named ones last."""
    parser = parser_of()
    options = parsed(parser, argv)
    with one_line_errors(parser):
        digits = one_of_each(*load_images()[2:])
        single = [(name, f(digits)) for name, f in AUGMENTATIONS.items()]
        composed = ("+".join(options.augs), all_views(digits, options.augs)[-1])
        rows = [("original", digits), None, *single, None, composed]
        save(grid("Augmentations", [*"0123456789"], rows, cell=64), options.out)
        print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
