"""The KL-regularised autoencoder of latent diffusion and Stable Diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit_vae.base import Convolutional, ConvolutionalConfig
from ldmkit_vae.coder import Decoder, Encoder
from ldmkit_vae.diffusers_config import convert_diffusers_config, write_diffusers_config
from ldmkit_vae.posterior import DiagonalGaussian


class KLAutoencoder(Convolutional):
    """Raw pixels in [-1, 1] <=> final latents (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1 and app. G).

    State dict: encoder, quant_conv, post_quant_conv, decoder, named as in the diffusers layout. Runs in the dtype of its
    weights and returns its input's.
    """

    class Config(ConvolutionalConfig):
        """Attributes: those of `ConvolutionalConfig`, and

        use_quant_conv, use_post_quant_conv: the 1x1 convolutions around the latents.
        """

        use_quant_conv: bool = True
        use_post_quant_conv: bool = True

    config: KLAutoencoder.Config

    def __init__(self, config: KLAutoencoder.Config) -> None:
        super().__init__(config)
        latent = config.latent_channels
        self.encoder = Encoder(config.in_channels, 2 * latent, **config.shape)
        self.decoder = Decoder(latent, config.out_channels, **config.shape)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading(convert_diffusers_config(values))

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        return {"vae": Written("diffusers", "AutoencoderKL", write_diffusers_config(self.config.to_dict()))}

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Raw pixels in [-1, 1] => posterior over final latents (B, latent_channels, H / downscale, W / downscale).

        Raises:
            InputError: for another number of channels, or sides that are no multiples of `downscale`.
        """
        moments = self._encoded(x_BCHW, (self.encoder, self.quant_conv))
        return DiagonalGaussian(moments, scaling_factor=self.config.scaling_factor, shift_factor=self.config.shift_factor)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels, nominally in [-1, 1] (not clamped), (B, out_channels, H downscale, W downscale).

        Raises:
            InputError: for another number of channels.
        """
        return self._decoded(z_BCHW, (self.post_quant_conv, self.decoder))
