"""TAESD: a tiny autoencoder for the latents of Stable Diffusion; fast enough to preview every step."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

import ldmkit
from ldmkit import Autoencoder, Posterior
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.checkpoints.weights import load_weights, read_file
from ldmkit.errors import ArchitectureMismatchError, InputError
from ldmkit_vae.diffusers_config import convert_tiny_config, write_tiny_config
from ldmkit_vae.identity import Certain

LIMIT = 3.0
"""The decoder squashes latents into +-LIMIT: LIMIT tanh(z / LIMIT)."""


class TinyAutoencoder(Autoencoder):
    """Raw pixels in [-1, 1] <=> final latents of another autoencoder, by convolutions and ReLUs alone
    (TAESD, Ollin Boer Bohan).

    State dict: encoder.layers.i, decoder.layers.i, named as in diffusers' AutoencoderTiny.
    """

    class Config(ldmkit.Config):
        """Attributes:
        in_channels, out_channels: of the images.
        latent_channels: of the latents.
        channels: of every layer between.
        encoder_blocks, decoder_blocks: res blocks per level; the encoder's from fine to coarse, the decoder's the other way.
        """

        in_channels: int = Field(3, ge=1)
        out_channels: int = Field(3, ge=1)
        latent_channels: int = Field(4, ge=1)
        channels: int = Field(64, ge=1)
        encoder_blocks: tuple[int, ...] = (1, 3, 3, 3)
        decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)

        @model_validator(mode="after")
        def _fits(self) -> TinyAutoencoder.Config:
            up, down = self.decoder_blocks, self.encoder_blocks
            if not down or len(up) != len(down) or min(*up, *down, 1) < 1:
                raise ValueError(f"encoder_blocks = {list(down)} and decoder_blocks = {list(up)}: one or more for each level")
            return self

    config: TinyAutoencoder.Config

    def __init__(self, config: TinyAutoencoder.Config) -> None:
        super().__init__()
        self.config = config
        self.image_channels, self.latent_channels = config.in_channels, config.latent_channels
        self.downscale = 2 ** (len(config.encoder_blocks) - 1)
        width = config.channels
        down: list[nn.Module] = []
        for level, blocks in enumerate(config.encoder_blocks):
            first = nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False) if level else _conv(config.in_channels, width)
            down += [first, *(Block(width) for _ in range(blocks))]
        self.encoder = Layers([*down, _conv(width, config.latent_channels)])
        up: list[nn.Module] = [_conv(config.latent_channels, width), nn.ReLU()]
        for level, blocks in enumerate(config.decoder_blocks):
            up += [Block(width) for _ in range(blocks)]
            if level + 1 < len(config.decoder_blocks):
                up += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
        self.decoder = Layers([*up, _conv(width, config.out_channels)])

    @classmethod
    def from_files(cls, encoder: str | Path, decoder: str | Path, *, dtype: torch.dtype | None = None) -> Self:
        """From the two safetensors files that TAESD is published as (layers by number; the decoder's begin with its squashing).

        Args:
            dtype: float32 if not given.

        Raises:
            CheckpointError: for a damaged file. ArchitectureMismatchError: for files of something else.
        """
        weights = {f"encoder.layers.{key}": tensor for key, tensor in read_file(Path(encoder)).items()}
        for key, tensor in read_file(Path(decoder)).items():
            number, dot, rest = key.partition(".")
            if not number.isdigit():
                raise ArchitectureMismatchError(f"{decoder}: {key!r} is no layer's number; this is not a TAESD decoder")
            weights[f"decoder.layers.{int(number) - 1}{dot}{rest}"] = tensor
        made = cls(cls.Config())
        load_weights(made, weights, source=f"{encoder} and {decoder}")
        return made if dtype is None else made.to(dtype)

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading(convert_tiny_config(values))

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`."""
        return {"vae": Written("diffusers", "AutoencoderTiny", write_tiny_config(self.config.to_dict()))}

    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raw pixels in [-1, 1] => final latents, sure of themselves, (B, latent_channels, H / downscale, W / downscale).

        Raises:
            InputError: for another number of channels, or sides that are no multiples of `downscale`.
        """
        if x_BCHW.shape[1] != self.image_channels or any(side % self.downscale for side in x_BCHW.shape[2:]):
            raise InputError(
                f"the autoencoder takes images of {self.image_channels} channels, sides multiples of {self.downscale}; "
                f"got {tuple(x_BCHW.shape)}"
            )
        return Certain(self.encoder((x_BCHW + 1) / 2))

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels, nominally in [-1, 1] (not clamped), (B, out_channels, H downscale, W downscale).

        Raises:
            InputError: for another number of channels.
        """
        if z_BCHW.shape[1] != self.latent_channels:
            raise InputError(f"the autoencoder takes latents of {self.latent_channels} channels, got {tuple(z_BCHW.shape)}")
        pixels: Tensor = self.decoder(torch.tanh(z_BCHW / LIMIT) * LIMIT)
        return 2 * pixels - 1


class Layers(nn.Module):
    """A sequence. State dict: layers.i."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """One layer after the other, in the dtype of the weights; returns x's dtype."""
        out: Tensor = self.layers(x_BCHW.to(next(self.parameters()).dtype))
        return out.to(x_BCHW.dtype)


class Block(nn.Module):
    """ReLU(conv(x) + x), of three convolutions. State dict: conv.{0,2,4}."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        convolutions = (_conv(channels, channels) for _ in range(3))
        first, *rest = convolutions
        self.conv = nn.Sequential(first, *(layer for conv in rest for layer in (nn.ReLU(), conv)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) => the same shape."""
        return torch.relu(self.conv(x_BCHW) + x_BCHW)


def _conv(channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out_channels, 3, padding=1)
