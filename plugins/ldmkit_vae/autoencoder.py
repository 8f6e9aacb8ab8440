"""The KL-regularised autoencoder of latent diffusion and Stable Diffusion."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.func import functional_call

import ldmkit
from ldmkit import Autoencoder
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.errors import InputError
from ldmkit_vae.coder import Decoder, Encoder
from ldmkit_vae.diffusers_config import convert_diffusers_config, write_diffusers_config
from ldmkit_vae.posterior import DiagonalGaussian, Factor, from_final
from ldmkit_vae.tiling import tiled


class KLAutoencoder(Autoencoder):
    """Raw pixels in [-1, 1] <=> final latents (Rombach et al. 2022, arXiv:2112.10752, sec. 3.1 and app. G).

    State dict: encoder, quant_conv, post_quant_conv, decoder, named as in the diffusers layout. Runs in the dtype of its
    weights and returns its input's.
    """

    class Config(ldmkit.Config):
        """Attributes:
        in_channels, out_channels: of the images.
        latent_channels: of the latents.
        block_out_channels: width of each level; each level but the last halves the image.
        layers_per_block: res blocks per level (the decoder has one more).
        norm_num_groups: groups of every group norm; must divide every width.
        attention_levels: which levels have attention after each res block; empty = none. The LDM originals at 1/16 and 1/32 do.
        mid_block_add_attention: attention between the two innermost res blocks.
        use_quant_conv, use_post_quant_conv: the 1x1 convolutions around the latents.
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
        use_quant_conv: bool = True
        use_post_quant_conv: bool = True
        scaling_factor: Factor = 0.18215
        shift_factor: Factor = 0.0
        force_upcast: bool = False

        @model_validator(mode="after")
        def _fits(self) -> KLAutoencoder.Config:
            widths, groups = self.block_out_channels, self.norm_num_groups
            if not widths or any(width < 1 or width % groups for width in widths):
                raise ValueError(f"block_out_channels = {list(widths)}: each must be a multiple of norm_num_groups = {groups}")
            if self.attention_levels and len(self.attention_levels) != len(widths):
                raise ValueError(
                    f"attention_levels has {len(self.attention_levels)} entries for {len(widths)} levels (block_out_channels)"
                )
            for name in ("scaling_factor", "shift_factor"):
                factor = getattr(self, name)
                if isinstance(factor, tuple) and len(factor) != self.latent_channels:
                    raise ValueError(f"{name} has {len(factor)} entries for latent_channels = {self.latent_channels}")
            scales = self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)
            if any(scale <= 0 for scale in scales):
                raise ValueError(f"scaling_factor = {self.scaling_factor}: must be positive")
            return self

    config: KLAutoencoder.Config

    def __init__(self, config: KLAutoencoder.Config) -> None:
        super().__init__()
        self.config = config
        self.image_channels = config.in_channels
        self.latent_channels = config.latent_channels
        self.downscale = 2 ** (len(config.block_out_channels) - 1)
        latent = config.latent_channels
        shape = {
            "block_out_channels": config.block_out_channels,
            "layers_per_block": config.layers_per_block,
            "num_groups": config.norm_num_groups,
            "attention_levels": config.attention_levels or (False,) * len(config.block_out_channels),
            "mid_attention": config.mid_block_add_attention,
        }
        self.encoder = Encoder(config.in_channels, 2 * latent, **shape)  # type: ignore[arg-type]
        self.decoder = Decoder(latent, config.out_channels, **shape)  # type: ignore[arg-type]
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if config.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if config.use_post_quant_conv else None
        self._tiling: tuple[int, int] | None = None
        self._slicing = False

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading(convert_diffusers_config(values))

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        return {"vae": Written("diffusers", "AutoencoderKL", write_diffusers_config(self.config.to_dict()))}

    # ----------------------------------------------------------------------------------------------------------- the two ways

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Raw pixels in [-1, 1] => posterior over final latents (B, latent_channels, H / downscale, W / downscale).

        Raises:
            InputError: for another number of channels, or sides that are no multiples of `downscale`.
        """
        _, channels, height, width = x_BCHW.shape
        if channels != self.config.in_channels:
            raise InputError(f"the autoencoder takes images of {self.config.in_channels} channels, got {tuple(x_BCHW.shape)}")
        if height % self.downscale or width % self.downscale:
            raise InputError(f"image height and width must be multiples of {self.downscale}, got {height} x {width}")
        networks = (self.encoder, self.quant_conv)
        moments = self._run(networks, x_BCHW, latent_size=max(height, width) // self.downscale, in_unit=self.downscale)
        return DiagonalGaussian(moments, scaling_factor=self.config.scaling_factor, shift_factor=self.config.shift_factor)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels, nominally in [-1, 1] (not clamped), (B, out_channels, H downscale, W downscale).

        Raises:
            InputError: for another number of channels.
        """
        if z_BCHW.shape[1] != self.latent_channels:
            raise InputError(f"the autoencoder takes latents of {self.latent_channels} channels, got {tuple(z_BCHW.shape)}")
        z_BCHW = from_final(z_BCHW, self.config.scaling_factor, self.config.shift_factor)
        networks = (self.post_quant_conv, self.decoder)
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
        dtype = self.decoder.conv_in.weight.dtype
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
