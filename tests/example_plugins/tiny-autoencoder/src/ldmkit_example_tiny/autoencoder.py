"""A tiny autoencoder, in the spirit of TAESD: plain convolutions, no posterior to speak of."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor, nn

import ldmkit
from ldmkit import Autoencoder, InputError, Posterior


class TinyAutoencoder(Autoencoder):
    """Four pixels per latent along each side."""

    class Config(ldmkit.Config):
        """Attributes:
        image_channels: 3 for colour, 1 for grey.
        latent_channels: of the latents.
        width: channels of the hidden layers.
        latent_scale: what the encoder's outputs are multiplied by to have about unit standard deviation.
        """

        image_channels: int = Field(3, ge=1)
        latent_channels: int = Field(4, ge=1)
        width: int = Field(16, ge=1)
        latent_scale: float = Field(1.0, gt=0)

    config: TinyAutoencoder.Config
    downscale = 4

    def __init__(self, config: TinyAutoencoder.Config) -> None:
        super().__init__()
        self.config = config
        self.image_channels, self.latent_channels = config.image_channels, config.latent_channels
        width = config.width
        self.encoder = nn.Sequential(
            nn.Conv2d(config.image_channels, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, config.latent_channels, 3, padding=1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.latent_channels, width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, config.image_channels, 3, padding=1),
        )

    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raw pixels in [-1, 1] => certain final latents, (B, latent_channels, H/4, W/4).

        Raises:
            InputError: for a height or width that is no multiple of 4.
        """
        height, width = x_BCHW.shape[2:]
        if height % self.downscale or width % self.downscale:
            raise InputError(f"a picture of {height} x {width}: both must be multiples of {self.downscale}; crop or resize it")
        return Certain(self.encoder(x_BCHW) * self.config.latent_scale)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels."""
        decoded: Tensor = self.decoder(z_BCHW / self.config.latent_scale)
        return decoded


class Certain(Posterior):
    """All probability on one value; nothing to regularise."""

    def __init__(self, z_BCHW: Tensor) -> None:
        self.z_BCHW = z_BCHW

    def mode(self) -> Tensor:
        """The value."""
        return self.z_BCHW

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """The value, whatever the noise; one for each of its rows."""
        return self.z_BCHW.expand_as(noise_BCHW)

    def loss_B(self) -> Tensor:
        """0."""
        return self.z_BCHW.new_zeros(len(self.z_BCHW))
