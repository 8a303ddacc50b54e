"""LAVAE: a VAE in which an image augmentation is a linear map of the latent space.

              E              L_i               D
    image x ----> latent z ------> latent z L_i ----> augmented image A_i x

This is the model of "Towards Composable Distributions of Latent Space Augmentations" (arXiv
2303.03462). Read this file first. In order: encoder and decoder, the maps and the model, the losses
of the three stages; then half an augmentation, the ablations, the CVAE, files.

    model = load("runs/flip_lr+flip_ud")                   # python train.py has made this folder
    mu, logvar = model.encoder(x)                          # x (B, 28, 28), values in [0, 1]
    flipped = model.decoder(model.maps[0](mu)).sigmoid()   # A_1 x, drawn from z L_1
"""

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial, reduce
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- encoder and decoder (appendix C)


def pixels(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images (.., 28, 28), uint8 or numbers in [0, 1], to numbers in [0, 1]. Raises ValueError:
    they are not that."""
    whole = images.dtype == torch.uint8
    good = whole or images.is_floating_point() and torch.equal(images, images.clamp(0, 1))
    if not good or images.shape[-2:] != (28, 28):
        raise ValueError(
            "expected images (.., 28, 28), uint8 or floats in [0, 1], got "
            f"{images.dtype} {tuple(images.shape)}"
        )
    return (images / 255 if whole else images).to(dtype)


class Encoder(nn.Module):
    """x to mu and logvar: two convolutions of stride 2 and a linear layer. In formulas E(x) is mu.

    condition_dim: for a CVAE, how many numbers more its linear layer gets, beside the features.
    """

    def __init__(self, latent_dim: int = 16, filters: int = 64, condition_dim: int = 0):
        super().__init__()
        self.conv1 = nn.Conv2d(1, filters, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(filters, 2 * filters, kernel_size=4, stride=2, padding=1)
        self.linear = nn.Linear(2 * filters * 7 * 7 + condition_dim, 2 * latent_dim)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, and so of the images and latents."""
        return self.linear.weight.dtype

    def forward(self, x: Tensor, condition: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(B, 28, 28) in [0, 1] to mu and logvar, (B, latent_dim) each."""
        h = F.relu(self.conv1(x[:, None]))  # (B, C, 14, 14)
        h = F.relu(self.conv2(h)).flatten(1)  # (B, 2C * 7 * 7)
        if condition is not None:
            h = torch.cat([h, condition], 1)
        return self.linear(h).chunk(2, dim=1)  # mu, logvar


class GEGLU(nn.Module):
    """Gated linear units with GELU, (z A + a) * gelu(z B + b). A unit can multiply two latents."""

    def __init__(self, inputs: int, units: int):
        super().__init__()
        self.linear = nn.Linear(inputs, 2 * units)

    def forward(self, z: Tensor) -> Tensor:
        """(B, inputs) to (B, units)."""
        value, gate = self.linear(z).chunk(2, dim=1)
        return value * F.gelu(gate)


class Decoder(nn.Module):
    """D(z): a linear layer and two transposed convolutions of stride 2.

    entry: what follows the linear layer: "relu", or "linear" for nothing, as in the authors' code.
    hidden: the width of two more layers before the linear one, for gated heads; 0 for none, as in
    the paper. A head must recognise the view of a latent, and views that look alike are close
    together. The first of the two layers is a GEGLU layer: the product of two latents can show
    which maps were applied, where the sign of one alone does not.
    """

    def __init__(
        self, latent_dim: int = 16, filters: int = 64, hidden: int = 0, entry: str = "relu"
    ):
        super().__init__()
        self.entry = {"relu": F.relu, "linear": nn.Identity()}[entry]
        self.hidden = nn.Sequential()
        if hidden:
            self.hidden.extend([GEGLU(latent_dim, hidden), nn.Linear(hidden, hidden), nn.GELU()])
        self.linear = nn.Linear(hidden or latent_dim, 2 * filters * 7 * 7)
        self.deconv1 = nn.ConvTranspose2d(2 * filters, filters, kernel_size=4, stride=2, padding=1)
        self.deconv2 = nn.ConvTranspose2d(filters, 1, kernel_size=4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to logits of the pixels, (B, 28, 28)."""
        h = self.entry(self.linear(self.hidden(z))).unflatten(1, (-1, 7, 7))  # (B, 2C, 7, 7)
        h = F.relu(self.deconv1(h))  # (B, C, 14, 14)
        return self.deconv2(h).squeeze(1)


def sample(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + exp(logvar / 2) * eps with eps ~ N(0, I): the reparameterisation trick.

    eps is drawn in float32 on the device of the generator. So a generator on the CPU gives the same
    numbers to a model on any device, of any dtype.
    """
    drawn_on = (generator or mu).device
    eps = torch.randn(mu.shape, generator=generator, device=drawn_on, dtype=torch.float32).to(mu)
    return mu + torch.exp(logvar / 2) * eps


# ---------------------------------------------------------------- the maps and the model


def apply_in_order(x, maps: Iterable[Callable]):
    """Apply the first map to x, then the second to the result, and so on."""
    return reduce(lambda x, f: f(x), maps, x)


class LatentMap(nn.Module):
    """One augmentation in latent space: z -> z L, a row vector times a square matrix."""

    def __init__(self, latent_dim: int = 16):
        super().__init__()
        self.L = nn.Parameter(torch.eye(latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to (B, latent_dim)."""
        return z @ self.L

    def inverse(self, z: Tensor) -> Tensor:
        """z L^-1, (B, latent_dim) to the same."""
        return z @ torch.linalg.inv(self.L.cpu().double()).to(self.L)

    def order_error(self, order: int | None, z: Tensor | None = None) -> Tensor:
        """`order_error` of L. z is not needed; `NonlinearMap` needs it."""
        return order_error(self.L, order)


class LAVAE(nn.Module):
    """Encoder, decoder, a map for every augmentation, and a decoder head for every transfer.

    Args:
        augs: the names of the augmentations, in the order in which they compose.
        transfers: for each head the names that replace `augs`, one for each.
        latent_dim, filters: d and C of appendix C.
        latent_map: "linear", or "mlp" or "mlp-wide" for the ablation.
        originals_only: True for the VAE of originals, a baseline: stage 1 sees no augmented view.
        head: "gated", or "plain" for heads like the first decoder, as in the paper.
        entry: of all decoders, see `Decoder`.
        orders: of the augmentations, see `order_error`; None for all of them by default.
        joint: the ablation of stages 1 and 2 together, Eq. 6 with the model's maps is in the loss
            of stage 1. "identity": the maps start at I and learn in stage 1. "signs": they stay
            diagonals of +1 and -1, with each pattern of signs equally often.

    `decoder` draws the views that stage 1 has seen. A head draws other augmentations from the same
    latents: heads["shear_x+canny"] draws shear_x(x) from z L_1, although L_1 was learnt for
    flip_lr. Views are numbered in the order of `augment.views`. View v uses map i if bit i of v is
    set, so view 3 uses both maps.
    """

    def __init__(
        self,
        augs: Sequence[str] = ("flip_lr", "flip_ud"),
        transfers: Sequence[Sequence[str]] = (),
        latent_dim: int = 16,
        filters: int = 64,
        latent_map: str = "linear",
        originals_only: bool = False,
        head: str = "gated",
        entry: str = "relu",
        orders: Sequence[int | None] | None = None,
        joint: str | None = None,
    ):
        super().__init__()
        self.augs, self.transfers = list(augs), [list(names) for names in transfers]
        self.orders = list(orders or [None] * len(self.augs))
        self.latent_dim, self.joint = latent_dim, joint
        self.stage1_views = [0] if originals_only else range(2 ** len(self.augs))
        self.encoder = Encoder(latent_dim, filters)
        self.decoder = Decoder(latent_dim, filters, entry=entry)
        self.maps = nn.ModuleList(LATENT_MAPS[latent_map](latent_dim) for _ in self.augs)
        hidden = {"gated": HEAD_WIDTH * filters, "plain": 0}[head]
        self.heads = nn.ModuleDict()
        for names in self.transfers:
            self.heads["+".join(names)] = Decoder(latent_dim, filters, hidden, entry)
        if joint == "signs":
            for i, f in enumerate(self.maps):
                signs = 1.0 - 2.0 * (torch.arange(latent_dim) >> i & 1)
                f.L.data.copy_(torch.diag(signs))

    def forward(
        self, x: Tensor, noise: torch.Generator | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Of the `stage1_views`, (V, B, 28, 28) in [0, 1]: logits (V B, 28, 28), mu and logvar."""
        mu, logvar = self.encoder(x.flatten(0, 1))
        return self.decoder(sample(mu, logvar, noise)), mu, logvar

    @torch.no_grad()
    def encode(self, images: Tensor | np.ndarray, labels: object = None) -> Tensor:
        """E(x): images (N, 28, 28), see `pixels`, to means (N, latent_dim), the z of stages 2, 3.
        (Only a CVAE needs labels.)"""
        blocks = in_blocks(images, self.encoder)
        return torch.cat([self.encoder(block)[0] for block in blocks])

    def to_view(self, z: Tensor, view: int, labels: object = None) -> Tensor:
        """Map the latents (B, latent_dim) of originals to those of a view: z L_1 L_2 for view 3."""
        return apply_in_order(z, self._maps_of(view))

    def from_view(self, z: Tensor, view: int) -> Tensor:
        """Map the latents of a view back to those of originals: z L_2^-1 L_1^-1 for view 3."""
        return apply_in_order(z, [f.inverse for f in reversed(self._maps_of(view))])

    def _maps_of(self, view):
        return [f for i, f in enumerate(self.maps) if view >> i & 1]

    # For notebooks. Images go in as in `encode`, and come out in [0, 1], (B, 28, 28).

    def augment(self, x: Tensor | np.ndarray, *names: str) -> Tensor:
        """x under the named augmentations, the left one first: D(E(x) L L ..)."""
        return self.convert(x, target="+".join(names) or "orig")

    @torch.no_grad()
    def convert(self, x: Tensor | np.ndarray, source: str = "orig", target: str = "orig") -> Tensor:
        """From any view to any: D(E(x) L_source^-1 L_target).

        Views have the names of the tables. The left augmentation goes first: "flip_lr+flip_ud",
        "rotate_cw^2", "rotate_cw+flip_lr+rotate_cw", "rotate_cw^-1" for the inverse.
        """
        z, back = self.encode(x), [(f, -n) for f, n in reversed(self._named(source))]
        for f, n in back + self._named(target):
            z = apply_in_order(z, [f if n > 0 else f.inverse] * abs(n))
        return self.decoder(z).sigmoid()

    @torch.no_grad()
    def power(self, x: Tensor | np.ndarray, name: str, t: float) -> Tensor:
        """A part of an augmentation, or more than it: D(E(x) L^t), see `matrix_power`."""
        f = self._map(name)
        if not hasattr(f, "L"):
            raise ValueError("only a matrix has powers: train without --latent-map")
        return self.decoder(self.encode(x) @ matrix_power(f.L, t)).sigmoid()

    def _named(self, view):  # "a^2+b": the maps of a and b, each with its exponent
        found = []
        for part in view.split("+") if view != "orig" else []:
            power = re.fullmatch(r"(.+?)(\^(-?\d+))?", part)
            found.append((self._map(power[1]), int(power[3] or 1)))
        return found

    def _map(self, name):
        if name not in self.augs:
            raise ValueError(f"this model has no {name!r}: choose from {', '.join(self.augs)}")
        return self.maps[self.augs.index(name)]


def in_blocks(images: Tensor | np.ndarray, encoder: Encoder) -> list[Tensor]:
    """`pixels` of images (N, 28, 28), in blocks, on the encoder's device and of its dtype."""
    if isinstance(images, np.ndarray):
        images = np.ascontiguousarray(images)  # x[:, ::-1] is a view that torch does not take
    images = torch.as_tensor(images, device=encoder.linear.weight.device)
    return [pixels(block, encoder.dtype) for block in images.split(BLOCK)]


BLOCK = 250  # images at a time: few enough for the processor's caches
HEAD_WIDTH = 16  # the two further layers of a gated head have this times `filters` units

# ---------------------------------------------------------------- the losses of the three stages
#
#   stage 1   bce + kl + equivariance_loss   of a batch, with maps Q made for this batch alone
#   stage 2   map_error + order_error        of all data, by their moments, with the model's maps L
#   stage 3   bce                            of a batch


def bce(logits: Tensor, x: Tensor) -> Tensor:
    """Binary cross-entropy in nats an image: summed over the pixels, mean over the images.

    logits and x are (B, 28, 28), x in [0, 1]. Stages 1 and 3 minimise it, and the tables report it.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats an image: summed over the latents, mean over the
    images. mu and logvar are (B, latent_dim)."""
    return (mu**2 + logvar.expm1() - logvar).sum() * (0.5 / len(mu))


def original_and_singles(views: Sequence) -> list:
    """Choose from 2^K views the original and the K that stage 2 sees: x, A_1 x, .. A_K x."""
    return [view for i, view in enumerate(views) if i.bit_count() <= 1]


def equivariance_loss(z: Tensor, orders: Sequence[int | None]) -> Tensor:
    """How far the latents of a batch are from having good maps.

    It is the mean over images and latents of (before Q_i - after)^2, summed over the augmentations.
    "before" are latents, and "after" those of the same images under A_i. Q_i is the best map for
    this batch among those that keep lengths and have the order of A_i, see `procrustes`. It is not
    kept: stage 2 learns the maps L_i of the model.

    A_i must do the same to every view that it comes after: A_2 to x and to A_1 x. (Pairs with
    originals alone allow a map that turns mirrored digits the wrong way.)

    z: the latents of all views of B images, (2^K, B, d), in the order of `augment.views`. orders:
    the k of each augmentation, or None.

    Why it is needed: let images have a feature a, which A_i keeps, and a feature b, whose sign A_i
    changes. Eq. 5 allows the latents (a, b), but also (a, 2^b), and no matrix takes 2^b to 2^-b.
    This loss makes the encoder choose latents like (a, b).
    """
    # Views 0 .. 2^i - 1 come before A_i. View v + 2^i is A_i of view v.
    ends = [2**i for i in range(len(orders))]
    pairs = [(z[:n].flatten(0, 1), z[n : 2 * n].flatten(0, 1)) for n in ends]
    with torch.no_grad():  # the loss is minimal in Q: no gradient through Q
        Q = procrustes([before.T @ after for before, after in pairs], orders)
    errors = [F.mse_loss(before @ Q_i, after) for (before, after), Q_i in zip(pairs, Q)]
    return sum(errors[1:], errors[0])


def procrustes(C: Sequence[Tensor], orders: Sequence[int | None]) -> list[Tensor]:
    """The orthogonal Q_i (d, d) with Q_i^k = I that bring z Q_i nearest to z_i.

    C: z^T z_i of each augmentation, (d, d). orders: its k. None: Q_i may be any orthogonal matrix.
    For k > 2 the result is nearly the best.

    This is the orthogonal Procrustes problem, and its solution is the polar factor of C_i. For
    k = 2 it is that of C_i + C_i^T, which makes Q_i symmetric. For k > 2, each angle of Q_i then
    goes to the nearest multiple of 2 pi / k, by a <- a - sin(k a) / k. A small multiple of I is
    added to C_i, so that Q_i is I on latents that have collapsed to zero.
    """
    C = torch.stack([C_i + C_i.T if order == 2 else C_i for C_i, order in zip(C, orders)])
    norms = torch.linalg.matrix_norm(C, keepdim=True).clamp(min=1e-30)
    X = C / (1.0001 * norms)  # so that the next line does not take a singular value above 1
    X.diagonal(dim1=1, dim2=2).add_(1e-5)
    Q = [*polar(X)]
    for order in {*orders} - {None, 2}:
        turns = torch.stack(Q)
        for _ in range(9):
            power = torch.linalg.matrix_power(turns, order)
            turns = torch.baddbmm(turns, turns, power - power.mT, alpha=-0.5 / order)
            turns = polar_step(turns)
        Q = [turn if k == order else Q_i for turn, Q_i, k in zip(turns, Q, orders)]
    return Q


def polar(X: Tensor, rounds: int = 16) -> Tensor:
    """The orthogonal matrices nearest to X (K, d, d) of norm < 1: the SVD's U V^T, if X = U S V^T.

    It is found by the iteration of Newton and Schulz. Singular values of 1e-5 or more become 1
    within 16 rounds. (With `svd` the host would wait for the device.) If all singular values are
    between `least` and 1, X is scaled so that the step brings both ends equally near to 1.
    """
    least = 1e-5
    for _ in range(rounds):
        scale = math.sqrt(3 / (1 + least + least**2))
        X = polar_step(X, scale)
        least *= scale
        least *= (3 - least**2) / 2
    return X


def polar_step(X: Tensor, scale: float = 1.0) -> Tensor:
    """(3 Y - Y Y^T Y) / 2 with Y = scale X: each singular value s of Y becomes (3 s - s^3) / 2."""
    return torch.baddbmm(X, X, X.mT @ X, beta=1.5 * scale, alpha=-0.5 * scale**3)


def moments(z: Tensor, z_i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The means over the images that stage 2 needs: G of z^T z (d, d), C_i of z^T z_i (d, d), and
    that of |z_i|^2, a number.

    z = E(x) and z_i = E(A_i x), (N, d) each. The results are float64 on the CPU.
    """
    z, z_i = z.cpu().double(), z_i.cpu().double()  # not every device has float64
    return z.T @ z / len(z), z.T @ z_i / len(z), (z_i**2).sum() / len(z)


def map_error(L: Tensor, G: Tensor, C_i: Tensor, z_i_squared: Tensor) -> Tensor:
    """The first term of Eq. 6, the mean over images and latents of (z L - z_i)^2, by `moments`."""
    return ((L.T @ G @ L - 2 * L.T @ C_i).trace() + z_i_squared) / len(L)


def order_error(L: Tensor, order: int | None) -> Tensor:
    """The second term of Eq. 6, the involution term ||I - L^k||_F^2: 0 if L^k changes nothing.

    order: the k of the augmentation, the smallest number with A^k x = x. It is 2 for a flip (an
    involution) and 4 for a quarter turn.

    Some augmentations have no such k, for instance canny. For them the order is None, and the term
    is ||I - L L^T||_F^2 / 100. All views have the same prior, so a map should keep lengths. The
    small weight lets the data decide. The term only matters for directions in which the originals
    do not differ, because the data say nothing there.
    """
    unit = torch.eye(len(L)).to(L)
    if order is None:
        return (unit - L @ L.T).square().sum() / 100
    return (unit - torch.linalg.matrix_power(L, order)).square().sum()


# ---------------------------------------------------------------- half an augmentation


def matrix_power(L: Tensor, t: float) -> Tensor:
    """L^t for a real matrix (d, d): I at t = 0, L at t = 1, and real and continuous between them.

    For other t, whole powers of L are multiplied by one of these: L^(3/2) is L L^(1/2), and
    L^(-1/2) is L^-1 L^(1/2).

    A plane that L rotates by an angle is rotated by t times this angle. A direction that L reverses
    (an eigenvalue on the negative axis, or within half a degree of it: they are learnt) has no real
    power of its own. Two of them together span a plane, which L^t rotates by pi t, so that they
    keep their length. If their number is odd, the last one is scaled by 1 - 2 t. Then (L^(1/2))^2
    is not L; no real matrix has the square L in this case.

    Raises ValueError: L has no full set of eigenvectors, like [[1, 1], [0, 1]].
    """
    M, whole = L.cpu().double(), math.floor(t)
    t = t - whole  # not in place: t may be a tensor of the caller
    values, vectors = torch.linalg.eig(M)
    back = torch.linalg.inv_ex(vectors).inverse
    if not torch.allclose((vectors * values @ back).real, M, atol=1e-6):
        raise ValueError("this matrix has no full set of eigenvectors, so its powers are not known")
    reverses = values.angle().abs() > math.radians(179.5)
    power = (vectors * torch.where(reverses, 0, values**t) @ back).real
    if n := int(reverses.sum()):
        P = (vectors * reverses @ back).real  # the projection to the n reversed directions
        U = torch.linalg.svd(P).U[:, :n]  # (d, n), their basis: -U^T M U is near I
        c, s = math.cos(math.pi * t), math.sin(math.pi * t)
        turns = [torch.tensor([[c, -s], [s, c]])] * (n // 2)
        if n % 2:
            turns.append(torch.tensor([[1 - 2 * t]]))
        rest = matrix_power(-U.T @ M @ U, t)
        power += U @ torch.block_diag(*turns).double() @ rest @ U.T @ P
    return (torch.linalg.matrix_power(M, whole) @ power).to(L)


# ---------------------------------------------------------------- ablations: each changes one thing


class NonlinearMap(nn.Sequential):
    """The authors' ablation: an MLP in the place of L."""

    def __init__(self, latent_dim: int, hidden: int):
        super().__init__(
            nn.Linear(latent_dim, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, latent_dim),
        )

    def inverse(self, z: Tensor) -> Tensor:
        """The map again. It has no inverse, but a flip's map should be its own inverse."""
        return self(z)

    def order_error(self, order: int | None, z: Tensor) -> Tensor:
        """The mean of |z - f(f(..z))|^2 over latents z (N, latent_dim), with k times f; 0 if the
        order is None. For a linear f and z ~ N(0, I) it is ||I - L^k||^2."""
        again = apply_in_order(z, [self] * (order or 0))
        return (z - again).square().sum() / len(z)


LATENT_MAPS = {
    "linear": LatentMap,
    "mlp": partial(NonlinearMap, hidden=8),  # the authors' width
    "mlp-wide": partial(NonlinearMap, hidden=256),
}


def maps_loss(model: LAVAE, involution_weight: float, z: Tensor, *augmented: Tensor) -> Tensor:
    """Eq. 6 on a batch: z = E(x) and E(A_1 x), .. E(A_K x), (B, latent_dim) each."""
    loss = 0
    for f, z_i, order in zip(model.maps, augmented, model.orders):
        loss = loss + ((f(z) - z_i).square().mean() + involution_weight * f.order_error(order, z))
    return loss


def mmd(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """InfoVAE's prior loss: 1000 times the squared maximum mean discrepancy between B samples of
    q(z) and B of N(0, I). The kernel is exp(-|a - b|^2 / d).

    It asks that the latents of all images together look normal. `kl` asks it for each image.
    """
    z, prior = sample(mu, logvar, generator), sample(0 * mu, 0 * logvar, generator)

    def mean_kernel(a, b):
        return torch.exp(-(a[:, None] - b).square().mean(2)).mean()

    squared = mean_kernel(z, z) + mean_kernel(prior, prior) - 2 * mean_kernel(z, prior)
    return 1000 * squared


# ---------------------------------------------------------------- the baseline


class CVAE(nn.Module):
    """The paper's baseline, a conditional VAE. The encoder gets a condition beside the features,
    and the decoder gets it beside z.

    It has no maps. condition: what the model is told:
        "view"      the view, one-hot; each view is encoded and drawn again ("naive")
        "digit"     the digit, one-hot, labels 0 to classes - 1; the same training
        "both"      the view and the digit; the same training
        "paired"    a bit for each augmentation; the original is encoded, and drawn as itself and
                    under each augmentation. Two bits at once are never shown.
    """

    def __init__(
        self,
        augs: Sequence[str] = ("flip_lr", "flip_ud"),
        condition: str = "view",
        latent_dim: int = 16,
        filters: int = 64,
        entry: str = "relu",
        classes: int = 10,
    ):
        super().__init__()
        self.augs, self.transfers, self.maps = list(augs), [], ()
        self.latent_dim, self.classes = latent_dim, classes
        self.paired, self.by_digit = condition == "paired", condition in ("digit", "both")
        n = 2 ** len(self.augs)
        self.stage1_views = original_and_singles(range(n)) if self.paired else range(n)
        bits = torch.arange(n)[:, None] >> torch.arange(len(self.augs)) & 1
        one_hot = torch.eye(n)
        told = {"view": one_hot, "both": one_hot, "digit": one_hot[:, :0], "paired": bits}
        self.register_buffer("view_conditions", told[condition].float())  # a row for each view
        width = self.view_conditions.shape[1]
        if self.by_digit:
            width += classes
        self.encoder = Encoder(latent_dim, filters, width)
        self.decoder = Decoder(latent_dim + width, filters, entry=entry)  # of z and the condition

    def conditions(
        self, views: Sequence[int], n: int, labels: Tensor | np.ndarray | None = None
    ) -> Tensor:
        """The conditions of n images under each view, (V n, width). labels: the digits, (n,)."""
        conditions = self.view_conditions[views].repeat_interleave(n, dim=0)
        if self.by_digit:
            digits = torch.as_tensor(labels, device=conditions.device).long()
            digits = F.one_hot(digits, self.classes).to(conditions)
            conditions = torch.cat([conditions, digits.repeat(len(views), 1)], 1)
        return conditions

    def forward(
        self, x: Tensor, noise: torch.Generator | None = None, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Of the `stage1_views`, (V, B, 28, 28) in [0, 1]: logits (V B, 28, 28), mu and logvar."""
        source, n = x[:1] if self.paired else x, x.shape[1]
        condition = self.conditions(self.stage1_views, n, labels)
        mu, logvar = self.encoder(source.flatten(0, 1), condition[: len(source) * n])
        repeats = len(x) // len(source)  # "paired": an original is decoded once for each view
        z = sample(mu.repeat(repeats, 1), logvar.repeat(repeats, 1), noise)
        return self.decoder(torch.cat([z, condition], 1)), mu, logvar

    @torch.no_grad()
    def encode(
        self, images: Tensor | np.ndarray, labels: Tensor | np.ndarray | None = None
    ) -> Tensor:
        """E(x): originals (N, 28, 28), see `pixels`, to means (N, latent_dim). labels: see
        `conditions`."""
        conditions = self.conditions([0], len(images), labels).split(BLOCK)
        pairs = zip(in_blocks(images, self.encoder), conditions)
        return torch.cat([self.encoder(block, condition)[0] for block, condition in pairs])

    def to_view(self, z: Tensor, view: int, labels: Tensor | None = None) -> Tensor:
        """What the decoder must be given to draw a view: latents (N, latent_dim) and condition."""
        return torch.cat([z, self.conditions([view], len(z), labels)], 1)


# ---------------------------------------------------------------- files


def write(content: dict, path: str | Path) -> None:
    """Write tensors and plain data. An old file stays until the new one is complete.

    Raises OSError: the disk is full, or writing is not allowed.
    """
    part = Path(f"{path}.part")
    torch.save(content, buffer := io.BytesIO())
    try:
        part.write_bytes(buffer.getbuffer())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def read(path: str | Path) -> dict:
    """Read what `write` wrote. Only tensors and plain data are read: no code in the file can run.

    Raises OSError: the file is missing, damaged, or something else.
    """
    data = io.BytesIO(Path(path).read_bytes())
    try:
        with zipfile.ZipFile(data) as file:
            if file.testzip():  # compares the content of each part with its checksum
                raise ValueError("a part has another checksum")
        data.seek(0)
        return dict(torch.load(data, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file may raise anything
        raise OSError(f"{path} is damaged, or no file of train.py: train again") from error


def build(settings: dict) -> LAVAE | CVAE:
    """The untrained model that the settings of train.py describe. It keeps them, as `settings`."""
    s = SimpleNamespace(**settings)
    if s.condition:
        model = CVAE(s.augs, s.condition, s.latent_dim, s.filters, s.entry, s.classes)
    else:
        model = LAVAE(
            s.augs,
            s.transfer,
            s.latent_dim,
            s.filters,
            s.latent_map,
            originals_only=s.model == "vae",
            head=s.head or "plain",
            entry=s.entry,
            orders=s.orders,
            joint=s.joint,
        )
    model.settings = settings
    return model


def save(model: LAVAE | CVAE, path: str | Path) -> None:
    """Write a model that `build` has made, with its settings. Raises OSError."""
    write({"settings": model.settings, "tensors": model.state_dict()}, path)


def load(path: str | Path, device: str | torch.device = "cpu") -> LAVAE | CVAE:
    """Load the model of a run folder, or of a model.pt, in eval mode on `device`.

    Its weights have no gradients. `model.settings` has the settings of train.py. Raises
    FileNotFoundError: there is no such file, or no model.pt in the folder; OSError: the file is not
    a checkpoint of this program.
    """
    path = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}: train a model with `python train.py`, or go on with --resume if "
            "there is a state.pt"
        )
    checkpoint = read(path)
    try:
        with torch.random.fork_rng([]):  # its first weights are random: who loads draws no numbers
            model = build(checkpoint["settings"])
        model.load_state_dict(checkpoint["tensors"])
    except Exception as error:  # a key or a tensor that is not there, or another one
        raise OSError(f"{path} is of another version of this program: train again") from error
    return channels_last(model.requires_grad_(False).eval().to(device))


def channels_last(model: LAVAE | CVAE) -> LAVAE | CVAE:
    """Store a model on a CPU in channels_last order: 1.5 times as fast, with the same results."""
    if model.encoder.linear.weight.device.type == "cpu":
        model.to(memory_format=torch.channels_last)  # the order that CPU convolutions are made for
    return model
