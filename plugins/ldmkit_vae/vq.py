"""The vector-quantised autoencoder of latent diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from ldmkit import Posterior
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit_vae.base import Convolutional, ConvolutionalConfig
from ldmkit_vae.coder import Decoder, Encoder
from ldmkit_vae.diffusers_config import convert_vq_config, write_vq_config
from ldmkit_vae.posterior import Factor, from_final, to_final
from ldmkit_vae.quantizer import CodeUsage, Quantizer


class VQAutoencoder(Convolutional):
    """Raw pixels in [-1, 1] <=> final latents, which are those before quantising: the decoder quantises them
    (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1: "the quantization layer is absorbed by the decoder").

    State dict: encoder, quant_conv, quantize.embedding, post_quant_conv, decoder, named as in the diffusers layout.
    """

    class Config(ConvolutionalConfig):
        """Attributes: those of `ConvolutionalConfig`, and

        num_vq_embeddings: size of the codebook.
        vq_embed_dim: length of its vectors, and channels of the final latents; None = latent_channels.
        codebook: "loss": learned by the loss; "ema": follows moving averages of what falls to each code.
        ema_decay: of these averages, per training step.
        commitment: weight of the term that ties the encoder to the codes (van den Oord et al. 2017, eq. 3).
        quantize_before_decode: False decodes latents as they are.
        """

        num_vq_embeddings: int = Field(8192, ge=1)
        vq_embed_dim: int | None = Field(None, ge=1)
        codebook: Literal["loss", "ema"] = "loss"
        ema_decay: float = Field(0.99, ge=0, lt=1)
        commitment: float = Field(0.25, ge=0)
        quantize_before_decode: bool = True
        scaling_factor: Factor = 1.0

        @property
        def final_channels(self) -> int:
            """Channels of the final latents."""
            return self.latent_channels if self.vq_embed_dim is None else self.vq_embed_dim

    config: VQAutoencoder.Config

    def __init__(self, config: VQAutoencoder.Config) -> None:
        super().__init__(config)
        latent, final = config.latent_channels, config.final_channels
        self.encoder = Encoder(config.in_channels, latent, **config.shape)
        self.quant_conv = nn.Conv2d(latent, final, 1)
        decay = config.ema_decay if config.codebook == "ema" else None
        self.quantize = Quantizer(config.num_vq_embeddings, final, ema_decay=decay)
        self.post_quant_conv = nn.Conv2d(final, latent, 1)
        self.decoder = Decoder(latent, config.out_channels, **config.shape)

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading(convert_vq_config(values))

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        return {"vqvae": Written("diffusers", "VQModel", write_vq_config(self.config.to_dict()))}

    def encode(self, x_BCHW: Tensor) -> Quantized:
        """Raw pixels in [-1, 1] => the final latents, sure of themselves, (B, final channels, H / downscale, W / downscale).

        Raises:
            InputError: for another number of channels, or sides that are no multiples of `downscale`.
        """
        return Quantized(self._encoded(x_BCHW, (self.encoder, self.quant_conv)), self)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels, nominally in [-1, 1] (not clamped), (B, out_channels, H downscale, W downscale).

        Raises:
            InputError: for another number of channels.
        """
        quantize = self.quantize if self.config.quantize_before_decode else None
        return self._decoded(z_BCHW, (quantize, self.post_quant_conv, self.decoder))

    def indices(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => their codes, (B, h, w), int64."""
        return self.quantize.indices(from_final(z_BCHW, self.config.scaling_factor, self.config.shift_factor))

    def code_usage(self, z_BCHW: Tensor) -> CodeUsage:
        """How the codebook is used by some final latents."""
        return self.quantize.usage(self.indices(z_BCHW))


class Quantized(Posterior):
    """All probability on the latents before quantising.

    Attributes:
        z_BCHW: in the encoder's own units, before shift and scale.
    """

    def __init__(self, z_BCHW: Tensor, autoencoder: VQAutoencoder) -> None:
        self.z_BCHW = z_BCHW
        self._of = autoencoder

    def mode(self) -> Tensor:
        """The final latents, (B, C, H, W)."""
        config = self._of.config
        return to_final(self.z_BCHW, config.scaling_factor, config.shift_factor)

    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """The same, whatever the noise."""
        return self.mode()

    def loss_B(self) -> Tensor:
        """Codebook and commitment loss, summed over each image's latents, (B,), at least float32; see `Quantizer.loss_B`."""
        return self._of.quantize.loss_B(self.z_BCHW, self._of.config.commitment)
