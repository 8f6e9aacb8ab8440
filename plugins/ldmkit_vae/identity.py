"""No compression: for denoisers that work on pixels."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

import ldmkit
from ldmkit import Autoencoder, Posterior
from ldmkit.checkpoints.foreign import Written


class IdentityAutoencoder(Autoencoder):
    """Latents are the raw pixels in [-1, 1] themselves, so that pixel-space models (DDPM, ADM) run in the same pipeline."""

    class Config(ldmkit.Config):
        """Attributes:
        channels: of the pictures.
        """

        channels: int = Field(3, ge=1)

    config: IdentityAutoencoder.Config
    downscale = 1

    def __init__(self, config: IdentityAutoencoder.Config) -> None:
        super().__init__()
        self.config = config
        self.image_channels = self.latent_channels = config.channels

    def to_diffusers(self) -> dict[str, Written]:
        """Nothing: diffusers' pipelines for models of pixels have no autoencoder. See `ldmkit.checkpoints.foreign`."""
        return {}

    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raw pixels => a posterior that is sure of them."""
        return Certain(x_BCHW)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => themselves."""
        return z_BCHW


class Certain(Posterior):
    """All probability on one value."""

    def __init__(self, x_BCHW: Tensor) -> None:
        self.x_BCHW = x_BCHW

    def mode(self) -> Tensor:
        return self.x_BCHW

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        return self.x_BCHW.expand_as(noise_BCHW)

    def loss_B(self) -> Tensor:
        return self.x_BCHW.new_zeros(len(self.x_BCHW))
