"""What the convolutional autoencoders of latent diffusion share: config, geometry, tiling, the dtype they run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

import ldmkit
from ldmkit import Autoencoder
from ldmkit.errors import InputError
from ldmkit_vae.posterior import Factor, from_final
from ldmkit_vae.tiling import tiled


class ConvolutionalConfig(ldmkit.Config):
    """Attributes:
    in_channels, out_channels: of the images.
    latent_channels: of the latents.
    block_out_channels: width of each level; each level but the last halves the image.
    layers_per_block: res blocks per level (the decoder has one more).
    norm_num_groups: groups of every group norm; must divide every width.
    attention_levels: which levels have attention after each res block; empty = none. The LDM originals at 1/16 and 1/32 do.
    mid_block_add_attention: attention between the two innermost res blocks.
    scaling_factor, shift_factor: final latents = (z - shift) * scale; one number, or one per latent channel.
    force_upcast: run in float32 when the weights are float16 (SDXL's overflows there).
    """

    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    latent_channels: int = Field(4, ge=1)
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = Field(2, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    attention_levels: tuple[bool, ...] = ()
    mid_block_add_attention: bool = True
    scaling_factor: Factor = 0.18215
    shift_factor: Factor = 0.0
    force_upcast: bool = False

    @property
    def final_channels(self) -> int:
        """Channels of the final latents."""
        return self.latent_channels

    @model_validator(mode="after")
    def _fits(self) -> ConvolutionalConfig:
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ValueError(f"block_out_channels = {list(widths)}: each must be a multiple of norm_num_groups = {groups}")
        if self.attention_levels and len(self.attention_levels) != len(widths):
            raise ValueError(
                f"attention_levels has {len(self.attention_levels)} entries for {len(widths)} levels (block_out_channels)"
            )
        for name in ("scaling_factor", "shift_factor"):
            factor = getattr(self, name)
            if isinstance(factor, tuple) and len(factor) != self.final_channels:
                raise ValueError(f"{name} has {len(factor)} entries for latent_channels = {self.final_channels}")
        scales = self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)
        if any(scale <= 0 for scale in scales):
            raise ValueError(f"scaling_factor = {self.scaling_factor}: must be positive")
        return self

    @property
    def shape(self) -> dict[str, Any]:
        """Arguments of `Encoder` and `Decoder`."""
        return {
            "block_out_channels": self.block_out_channels,
            "layers_per_block": self.layers_per_block,
            "num_groups": self.norm_num_groups,
            "attention_levels": self.attention_levels or (False,) * len(self.block_out_channels),
            "mid_attention": self.mid_block_add_attention,
        }


class Convolutional(Autoencoder):
    """Runs networks in the dtype of their weights, sliced and tiled where enabled, and returns its input's dtype."""

    config: ConvolutionalConfig

    def __init__(self, config: ConvolutionalConfig) -> None:
        super().__init__()
        self.config = config
        self.image_channels = config.in_channels
        self.latent_channels = config.final_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        self._tiling: tuple[int, int] | None = None
        self._slicing = False

    def _encoded(self, x_BCHW: Tensor, networks: Sequence[nn.Module | None]) -> Tensor:
        """What the networks make of images. Raises: InputError for another number of channels, or sides that do not fit."""
        _, channels, height, width = x_BCHW.shape
        if channels != self.config.in_channels:
            raise InputError(f"the autoencoder takes images of {self.config.in_channels} channels, got {tuple(x_BCHW.shape)}")
        if height % self.downscale or width % self.downscale:
            raise InputError(f"image height and width must be multiples of {self.downscale}, got {height} x {width}")
        return self._run(networks, x_BCHW, latent_size=max(height, width) // self.downscale, in_unit=self.downscale)

    def _decoded(self, z_BCHW: Tensor, networks: Sequence[nn.Module | None]) -> Tensor:
        """What the networks make of final latents. Raises: InputError for another number of channels."""
        if z_BCHW.shape[1] != self.latent_channels:
            raise InputError(f"the autoencoder takes latents of {self.latent_channels} channels, got {tuple(z_BCHW.shape)}")
        z_BCHW = from_final(z_BCHW, self.config.scaling_factor, self.config.shift_factor)
        return self._run(networks, z_BCHW, latent_size=max(z_BCHW.shape[2:]), out_unit=self.downscale)

    def rescaled(self, *, scaling_factor: Factor, shift_factor: Factor) -> None:
        """Replace what final latents are shifted and scaled by, once it has been measured; the weights stay.

        Raises:
            ConfigError: for a number of channels that is not the latents', or a scale that is not positive.
        """
        self.config = self.config.replace(scaling_factor=scaling_factor, shift_factor=shift_factor)

    def _run(
        self, networks: Sequence[nn.Module | None], x_BCHW: Tensor, *, latent_size: int, in_unit: int = 1, out_unit: int = 1
    ) -> Tensor:
        """Apply the networks one after the other, sliced and tiled if enabled, in the weights' dtype (or upcast)."""
        dtype = next(self.parameters()).dtype
        if self.config.force_upcast and dtype == torch.float16:
            dtype = torch.float32
        calls = [_in_dtype(network, dtype) for network in networks if network is not None]

        def apply(part_BCHW: Tensor) -> Tensor:
            for call in calls:
                part_BCHW = call(part_BCHW)
            return part_BCHW

        def whole_or_tiled(part_BCHW: Tensor) -> Tensor:
            if self._tiling is None or latent_size <= self._tiling[0]:
                return apply(part_BCHW)
            tile, overlap = self._tiling
            return tiled(apply, part_BCHW, tile=tile, overlap=overlap, in_unit=in_unit, out_unit=out_unit)

        slices = torch.split(x_BCHW.to(dtype), 1 if self._slicing else max(len(x_BCHW), 1))
        return torch.cat([whole_or_tiled(part) for part in slices]).to(x_BCHW.dtype)

    # --------------------------------------------------------------------------------------------------------- memory savings

    def enable_tiling(self, tile: int = 64, overlap: int = 16) -> None:
        """Work through larger inputs in overlapping tiles; memory then no longer grows with the image.

        Attention and group norms see one tile at a time, so the result differs slightly from the whole image's.

        Args:
            tile, overlap: in latent pixels.

        Raises:
            InputError: unless 0 <= overlap <= tile / 2.
        """
        if tile < 1 or not 0 <= overlap <= tile // 2:
            raise InputError(f"tile = {tile}, overlap = {overlap}: the overlap must be from 0 to half a tile")
        self._tiling = (tile, overlap)

    def disable_tiling(self) -> None:
        """Work on whole images again."""
        self._tiling = None

    def enable_slicing(self) -> None:
        """Work on one image at a time; memory then no longer grows with the batch."""
        self._slicing = True

    def disable_slicing(self) -> None:
        """Work on whole batches again."""
        self._slicing = False


def _in_dtype(network: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The network itself, or one that computes with a copy of its weights in `dtype`."""
    weights = dict(network.named_parameters())
    if all(weight.dtype == dtype for weight in weights.values()):
        return network
    copies = {name: weight.to(dtype) for name, weight in weights.items()}
    return lambda x: functional_call(network, copies, (x,))
