"""Image augmentations in numpy, the doubling that composes them, the data and grids to see them.

An augmentation takes images, uint8 (N, H, W), and gives new ones of the same shape. Each is a fixed
function of the image: that is what lets a linear map of the latent space learn to copy it.

    flipped = AUGMENTATIONS["flip_lr"](images)
    x, a1, a2, a2_a1 = views(images, [flip_lr, flip_ud])
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# ---------------------------------------------------------------- views


def views(x, maps: Sequence[Callable]) -> list:
    """Double for every map: [x] -> [x, A1 x] -> [x, A1 x, A2 x, A2 A1 x], 2^K items for K maps.

    The same for images (maps are augmentations) and for latents (maps are z -> z L), so that view
    number i of the one is what view number i of the other should decode to.
    """
    out = [x]
    for f in maps:
        out += [f(v) for v in out]
    return out


def view_names(augs: Sequence[str]) -> list[str]:
    """The names of the views: orig, flip_lr, flip_ud, flip_lr+flip_ud (the left one goes first)."""
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

    Bilinear between neighbouring pixels, zero outside. What slides out is lost: no inverse. (The
    authors draw the angle from -50 to -45 for every image; the default is its middle.)
    """
    n, height, width = _checked(images).shape
    out = np.zeros_like(images)
    for y in range(height):
        shift = math.tan(math.radians(degrees)) * (y - (height - 1) / 2)  # out[x] = in[x + shift]
        left = math.floor(shift)
        row = np.zeros((n, width + 1), np.float32)  # the pixels from `left` to `left + width`
        a, b = max(left, 0), min(left + width + 1, width)
        if a < b:
            row[:, a - left:b - left] = images[:, y, a:b]
        f = np.float32(shift - left)
        out[:, y] = np.rint((1 - f) * row[:, :-1] + f * row[:, 1:])
    return out


def canny(images: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny's edges, black (0) on white (255): every pixel as cv2.Canny(L2gradient=True) has it.

    1. Gradient by Sobel, 3x3, borders repeated. 2. Keep a pixel whose squared length is the largest
    of three along the gradient's direction (four directions). 3. Edges are the kept pixels over
    `high`, and those over `low` that touch an edge. Shape only, no grey levels: no inverse.
    """
    images = _checked(images)
    if images.size == 0 or min(images.shape[1:]) < 3:
        if images.size:
            raise ValueError(f"canny needs images of 3x3 pixels or more, got {images.shape}")
        return images.copy()
    per_chunk = max(1, 2_000_000 // images[0].size)  # keeps the work in the processor's caches
    chunks = [images[i:i + per_chunk] for i in range(0, len(images), per_chunk)]
    return np.concatenate([_canny(chunk, *sorted((low, high))) for chunk in chunks])


def _canny(images, low, high):
    low, high = (math.floor(min(t, 32767) ** 2) if t > 0 else math.floor(t) for t in (low, high))
    n, height, width = images.shape
    p = np.pad(images, ((0, 0), (1, 1), (1, 1)), "edge").astype(np.int16)
    smooth_y = p[:, :-2] + 2 * p[:, 1:-1] + p[:, 2:]
    smooth_x = p[:, :, :-2] + 2 * p[:, :, 1:-1] + p[:, :, 2:]
    # Everything below is on images with a border of zeros, flattened: a neighbour is an offset.
    gx, gy = np.zeros((2, *p.shape), np.int32)
    gx[:, 1:-1, 1:-1] = smooth_y[:, :, 2:] - smooth_y[:, :, :-2]
    gy[:, 1:-1, 1:-1] = smooth_x[:, 2:] - smooth_x[:, :-2]
    magnitude = (gx * gx + gy * gy).ravel()
    inside = np.zeros(p.shape, bool)
    inside[:, 1:-1, 1:-1] = True
    down, right = width + 2, 1

    # Thin: the direction is that of the gradient, rounded to a multiple of 45 degrees by comparing
    # |gy| with tan(22.5) |gx| and tan(67.5) |gx|, in OpenCV's fixed point (15 bits).
    at = np.flatnonzero((magnitude > low) & inside.ravel())
    x, y, m = gx.ravel()[at], gy.ravel()[at], magnitude[at]
    tan22 = np.abs(x) * 13573
    tan67 = tan22 + (np.abs(x) << 16)
    y15 = np.abs(y) << 15
    horizontal, vertical = y15 < tan22, y15 > tan67
    diagonal = np.where((x ^ y) < 0, right - down, right + down)
    step = np.where(horizontal, right, np.where(vertical, down, diagonal))
    before, after = magnitude[at - step], magnitude[at + step]
    # Ties: an edge two pixels wide keeps its first pixel (horizontal, vertical) or neither.
    ridge = (m > before) & np.where(horizontal | vertical, m >= after, m > after)
    at, m = at[ridge], m[ridge]

    # Follow: from the strong pixels to all weak ones that they reach through neighbours.
    weak = np.zeros(magnitude.shape, bool)
    weak[at] = True
    edges = np.full(p.shape, 255, np.uint8)
    neighbours = np.array([dy * down + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1) if dy or dx])
    front = at[m > high]
    while front.size:
        weak[front] = False
        edges.ravel()[front] = 0
        front = (front[:, None] + neighbours).ravel()
        front = np.unique(front[weak[front]])
    return edges[:, 1:-1, 1:-1]


AUGMENTATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {f.__name__: f for f in (
    flip_lr, flip_ud, rotate_cw, rotate_ccw, shear_x, canny)}


def all_views(images: np.ndarray, augs: Sequence[str]) -> list[np.ndarray]:
    """The 2^K views of images, uint8 (N, H, W), under augmentations given by name."""
    return views(images, [AUGMENTATIONS[a] for a in augs])


def _checked(images):
    if not (isinstance(images, np.ndarray) and images.dtype == np.uint8):
        raise TypeError(f"expected a uint8 array, got {getattr(images, 'dtype', type(images))}")
    if images.ndim != 3:
        raise ValueError(f"expected images of shape (N, H, W), got {images.shape}")
    return images


# ---------------------------------------------------------------- data

DATA_DIR = Path(__file__).resolve().parent / "data"
MNIST_SHA256 = "b5e394bc34918bacb3c7d30dae8a52f2e99dbccb1317eccfc24e1d09f564e406"
DATASETS = {"mnist": None, "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}


def load_images(dataset: str = "mnist", data_dir: str | Path = DATA_DIR) -> tuple[np.ndarray, ...]:
    """(x_train, y_train, x_test, y_test): images uint8 (N, 28, 28), labels uint8 (N,).

    MNIST comes with the repository; torchvision downloads the others to `data_dir`.

    Raises:
        OSError: a file is missing, damaged or cannot be downloaded; the message says what to do.
    """
    if dataset == "mnist":
        path, cure = Path(data_dir) / "mnist.npz", "restore it: git checkout -- data/mnist.npz"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: {cure}")
        if hashlib.sha256(path.read_bytes()).hexdigest() != MNIST_SHA256:
            raise OSError(f"{path} is damaged: {cure}")
        with np.load(path) as file:
            return tuple(file[key] for key in ("x_train", "y_train", "x_test", "y_test"))
    from torchvision import datasets  # here, because it takes seconds to import

    try:
        parts = [getattr(datasets, DATASETS[dataset])(data_dir, train=train, download=True)
                 for train in (True, False)]
    except (OSError, RuntimeError) as error:  # torchvision's words for no network and a bad archive
        raise OSError(f"cannot download {dataset} to {data_dir}: check the network, remove what is "
                      f"left there, try again ({error})".replace("\n", " ")) from error
    return tuple(a for p in parts for a in (p.data.numpy(), p.targets.numpy().astype(np.uint8)))


# ---------------------------------------------------------------- pictures


def grid(title: str, columns: Sequence[str], rows: Sequence[tuple[str, np.ndarray] | None],
         cell: int = 84) -> Image.Image:
    """Images in labelled rows and columns under a title, black on white.

    rows: (label, images) with one image for each column, uint8 (len(columns), H, W); None leaves a
    gap. cell: the side of an image, in pixels.
    """
    gap, margin = 6, 24
    label_font, title_font = ImageFont.load_default(24), ImageFont.load_default(32)
    labels = [row[0] for row in rows if row]
    left = margin + max(math.ceil(label_font.getlength(label)) for label in labels) + 16
    width = left + len(columns) * (cell + gap) - gap + margin
    width = max(width, 2 * margin + math.ceil(title_font.getlength(title)))
    top = margin + 48 + 36
    height = top + sum(cell + gap if row else 3 * gap for row in rows) - gap + margin
    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin), title, "black", title_font)
    for i, column in enumerate(columns):
        x = left + i * (cell + gap) + cell // 2
        draw.text((x, top - 10), column, "black", label_font, "ms")
    y = top
    for row in rows:
        if row:
            draw.text((left - 16, y + cell // 2), row[0], "black", label_font, "rm")
            for i, image in enumerate(row[1]):
                tile = Image.fromarray(image).resize((cell, cell), Image.Resampling.NEAREST)
                page.paste(tile, (left + i * (cell + gap), y))
        y += cell + gap if row else 3 * gap
    return page
