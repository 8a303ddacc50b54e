"""LAVAE: a VAE in which an image augmentation is a linear map of the latent space.

              E              L_i               D
    image x ----> latent z ------> latent z L_i ----> augmented image A_i x

From "Towards Composable Distributions of Latent Space Augmentations" (arXiv 2303.03462), in its
order: encoder and decoder, the maps, the model, the losses of the three stages.

    model = load("runs/flip_lr+flip_ud")
    mu, logvar = model.encoder(x)                          # x (B, 28, 28), values in [0, 1]
    flipped = model.decoder(model.maps[0](mu)).sigmoid()   # A_1 x, drawn from z L_1
"""

import os
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---------------------------------------------------------------- encoder and decoder (appendix C)


def pixels(images: Tensor) -> Tensor:
    """uint8 images to floats in [0, 1], same shape, on the same device."""
    return images.float().div_(255)


class Encoder(nn.Module):
    """E(x) = (mu, logvar): two convolutions of stride 2 and one linear layer."""

    def __init__(self, latent_dim: int = 16, filters: int = 64):
        super().__init__()
        self.conv1 = nn.Conv2d(1, filters, kernel_size=4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(filters, 2 * filters, kernel_size=4, stride=2, padding=1)
        self.linear = nn.Linear(2 * filters * 7 * 7, 2 * latent_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 28, 28) in [0, 1] to mu and logvar, (B, latent_dim) each."""
        h = F.relu(self.conv1(x[:, None]))  # (B, C, 14, 14)
        h = F.relu(self.conv2(h))  # (B, 2C, 7, 7)
        mu, logvar = self.linear(h.flatten(1)).chunk(2, dim=1)
        return mu, logvar


class Decoder(nn.Module):
    """D(z): a linear layer and two transposed convolutions of stride 2.

    `hidden` adds ReLUs and a layer of that width before the linear one, for the heads of stage 3:
    they must draw what the latents were not made for. The first decoder stays linear at its entry,
    which is what makes the latents so.
    """

    def __init__(self, latent_dim: int = 16, filters: int = 64, hidden: int = 0):
        super().__init__()
        self.hidden = nn.Linear(latent_dim, hidden) if hidden else None
        self.linear = nn.Linear(hidden or latent_dim, 2 * filters * 7 * 7)
        self.deconv1 = nn.ConvTranspose2d(2 * filters, filters, kernel_size=4, stride=2, padding=1)
        self.deconv2 = nn.ConvTranspose2d(filters, 1, kernel_size=4, stride=2, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to logits of the pixels, (B, 28, 28)."""
        if self.hidden is None:
            h = self.linear(z)
        else:
            h = F.relu(self.linear(F.relu(self.hidden(z))))
        h = h.unflatten(1, (-1, 7, 7))  # (B, 2C, 7, 7)
        h = F.relu(self.deconv1(h))  # (B, C, 14, 14)
        return self.deconv2(h).squeeze(1)


def sample(mu: Tensor, logvar: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """z = mu + exp(logvar / 2) * eps with eps ~ N(0, I): the reparameterisation trick."""
    eps = torch.randn(mu.shape, generator=generator, device=mu.device)
    return mu + torch.exp(logvar / 2) * eps


# ---------------------------------------------------------------- the maps and the model


class LatentMap(nn.Module):
    """One augmentation in latent space: z -> z L, a row vector times a square matrix."""

    def __init__(self, latent_dim: int = 16):
        super().__init__()
        self.L = nn.Parameter(torch.eye(latent_dim))

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent_dim) to (B, latent_dim)."""
        return z @ self.L


class LAVAE(nn.Module):
    """Encoder, decoder, a map for every augmentation, and a decoder head for every transfer.

    Args:
        augs: the augmentations' names, in the order in which they compose.
        transfers: for each further head the names that it puts in the place of `augs`, one to one.
        latent_dim, filters: d and C of appendix C.

    `decoder` draws the views that the latents were learnt from, `heads["shear_x+canny"]` those of
    that transfer; `maps[i]` belongs to augs[i], whichever of them draws.
    """

    def __init__(self, augs: Sequence[str] = ("flip_lr", "flip_ud"),
                 transfers: Sequence[Sequence[str]] = (), latent_dim: int = 16, filters: int = 64):
        super().__init__()
        self.augs, self.transfers = list(augs), [list(names) for names in transfers]
        self.latent_dim, self.filters = latent_dim, filters
        self.encoder = Encoder(latent_dim, filters)
        self.decoder = Decoder(latent_dim, filters)
        self.maps = nn.ModuleList(LatentMap(latent_dim) for _ in self.augs)
        self.heads = nn.ModuleDict({"+".join(names): Decoder(latent_dim, filters, HEAD_HIDDEN)
                                    for names in self.transfers})
        # Start with latents that hardly matter: what each becomes, the data decides, not the draw.
        self.decoder.linear.weight.data.mul_(0.1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """uint8 images (N, 28, 28) to posterior means (N, latent_dim): the z of stages 2 and 3."""
        return torch.cat([self.encoder(pixels(block))[0] for block in images.split(1000)])


HEAD_HIDDEN = 256  # units between z and a transfer head's first layer

# ---------------------------------------------------------------- the losses of the three stages


def bce(logits: Tensor, x: Tensor) -> Tensor:
    """Reconstruction loss, nats an image: binary cross-entropy summed over pixels, mean of images.

    logits and x (B, 28, 28), x in [0, 1]. Stages 1 and 3 minimise it; the tables report it.
    """
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) in nats an image: summed over latents, mean of images."""
    return -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).sum() / len(mu)


def moments(z: Tensor, z_i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All that stage 2 needs: G = E[z^T z] and C_i = E[z^T z_i], both (d, d), and E|z_i|^2.

    z = E(x) and z_i = E(A_i x), (N, d) each; the result is float64 on the CPU.
    """
    z, z_i = z.double().cpu(), z_i.double().cpu()
    return z.T @ z / len(z), z.T @ z_i / len(z), (z_i ** 2).sum() / len(z)


def map_error(L: Tensor, G: Tensor, C_i: Tensor, z_i_squared: Tensor) -> Tensor:
    """Mean over images and latents of (z L - z_i)^2, from the moments: the data is not needed."""
    return ((L.T @ G @ L).trace() - 2 * (L.T @ C_i).trace() + z_i_squared) / len(L)


def involution_error(L: Tensor) -> Tensor:
    """||I - L L||_F^2: zero where applying L twice changes nothing."""
    return (torch.eye(len(L), dtype=L.dtype, device=L.device) - L @ L).square().sum()


# ---------------------------------------------------------------- checkpoints and devices

CHECKPOINT = "LAVAE checkpoint, version 1"


def save(model: LAVAE, path: str | Path, settings: dict) -> None:
    """Write the model and the plain-data settings that it was trained with to `path`."""
    arguments = {key: getattr(model, key) for key in ("augs", "transfers", "latent_dim", "filters")}
    part = Path(path).with_suffix(".part")  # the old file stays good until the new one is whole
    torch.save({"kind": CHECKPOINT, "arguments": arguments, "settings": settings,
                "tensors": {key: value.cpu() for key, value in model.state_dict().items()}}, part)
    os.replace(part, path)


def load(path: str | Path, device: str | torch.device = "cpu") -> LAVAE:
    """The model saved in a run folder (or a model.pt), ready for use: in eval mode, on `device`.

    `model.settings` holds what `train.py` was told. Only tensors and plain data are read: no code
    in the file can run.

    Raises:
        FileNotFoundError: there is no such file, or no model.pt in the folder.
        ValueError: the file is not a checkpoint of this program.
    """
    path = Path(path)
    path = path / "model.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: train a model with `python train.py`")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["kind"] != CHECKPOINT:
            raise ValueError(checkpoint["kind"])
        model = LAVAE(**checkpoint["arguments"])
        model.load_state_dict(checkpoint["tensors"])
        model.settings = checkpoint["settings"]
    except (pickle.UnpicklingError, AttributeError, EOFError, LookupError, OSError, RuntimeError,
            TypeError, ValueError) as error:
        raise ValueError(f"{path} is no LAVAE checkpoint: make one with train.py") from error
    return model.requires_grad_(False).eval().to(device)


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; "auto" takes CUDA, MPS or the CPU. Raises ValueError: not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    if name == "auto":
        name = next(key for key, there in available.items() if there)
    if not available.get(name):
        there = ", ".join(key for key in available if available[key])
        raise ValueError(f"device {name!r} is not available here: choose from auto, {there}")
    return torch.device(name)
