"""The diagonal Gaussian that a KL autoencoder's encoder describes."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit import Posterior

Factor = float | tuple[float, ...]
"""One number, or one per latent channel."""

LOGVAR_RANGE = (-30.0, 20.0)
"""Log-variances are clamped to this, as in latent diffusion's original code, so that exp() stays finite."""


class DiagonalGaussian(Posterior):
    """q(z | x) = N(mean, exp(logvar)) in the encoder's own units; samples and mode are final latents, (z - shift) * scale.

    Attributes:
        mean_BCHW, logvar_BCHW: in the encoder's own units, before shift and scale; logvar clamped to `LOGVAR_RANGE`.
    """

    def __init__(self, moments_BCHW: Tensor, *, scaling_factor: Factor = 1.0, shift_factor: Factor = 0.0) -> None:
        """`moments_BCHW`: mean and log-variance, one after the other along the channels."""
        self.mean_BCHW, logvar_BCHW = moments_BCHW.chunk(2, dim=1)
        self.logvar_BCHW = logvar_BCHW.clamp(*LOGVAR_RANGE)
        self._scale = scaling_factor
        self._shift = shift_factor

    def mode(self) -> Tensor:
        """The most likely final latents, (B, C, H, W)."""
        return to_final(self.mean_BCHW, self._scale, self._shift)

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """Final latents drawn with the given standard normal noise, (B, C, H, W)."""
        return to_final(self.mean_BCHW + torch.exp(0.5 * self.logvar_BCHW) * noise_BCHW, self._scale, self._shift)

    @property
    def std(self) -> Tensor:
        """Standard deviation of the final latents, (B, C, H, W)."""
        return to_final(torch.exp(0.5 * self.logvar_BCHW), self._scale, 0.0)

    def loss_B(self) -> Tensor:
        """KL(q || N(0, I)) of the unscaled posterior, in nats, summed over each image's latents, (B,), at least float32.

        1/2 sum(mean^2 + var - 1 - log var) (Kingma and Welling 2014, arXiv:1312.6114, app. B).
        """
        dtype = torch.promote_types(self.mean_BCHW.dtype, torch.float32)
        mean, logvar = self.mean_BCHW.to(dtype), self.logvar_BCHW.to(dtype)
        return 0.5 * (mean.square() + torch.expm1(logvar) - logvar).flatten(1).sum(dim=1)


def to_final(z_BCHW: Tensor, scale: Factor, shift: Factor) -> Tensor:
    """The encoder's own units => final latents: (z - shift) * scale, in z's dtype."""
    return ((z_BCHW - _broadcast(shift, z_BCHW)) * _broadcast(scale, z_BCHW)).to(z_BCHW.dtype)


def from_final(z_BCHW: Tensor, scale: Factor, shift: Factor) -> Tensor:
    """Final latents => the decoder's own units: z / scale + shift, in z's dtype."""
    return (z_BCHW / _broadcast(scale, z_BCHW) + _broadcast(shift, z_BCHW)).to(z_BCHW.dtype)


def _broadcast(factor: Factor, like: Tensor) -> float | Tensor:
    """A number as it is; a tuple as (C, 1, 1) in at least float32, so that a half-precision model does not round it."""
    if isinstance(factor, float):
        return factor
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.tensor(factor, dtype=dtype, device=like.device).view(-1, 1, 1)
