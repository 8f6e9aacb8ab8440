"""What a U-Net can be, and what it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

from pydantic import Field, model_validator

import ldmkit

T = TypeVar("T")


class UNetConfig(ldmkit.Config):
    """Tuples hold one entry per level, from the finest to the coarsest; each level but the last halves height and width.

    Attributes:
        in_channels: in all: latents, plus `spatial_channels`.
        out_channels: of the prediction.
        spatial_channels: how many of `in_channels` come from the condition's `spatial_BCHW` (inpainting 5, x4 upscaler 3).
        block_out_channels: width of each level.
        layers_per_block: res blocks per level on the way down; one more on the way up.
        transformer_layers_per_block: depth of the transformer after each res block of a level; 0 = none there.
        mid_transformer_layers: depth of the one in the middle; 0 = none.
        num_attention_heads: heads, one number or per level; the middle has the last level's. (diffusers' configs call this
            number `attention_head_dim`, see its issue 2011.)
        attention_block: "transformer", or "plain" for the attention blocks of the unconditional originals, where each entry of
            `transformer_layers_per_block` can only be 0 or 1.
        cross_attention_dim: channels of the condition's `tokens_BLC`; None = the transformers have no cross-attention.
        only_cross_attention: which levels' transformers attend to the tokens only, not to the pixels; one answer, or per level.
            The middle always does both.
        use_linear_projection: projections around the transformers are linear layers (SD2, SDXL) or 1x1 convolutions.
        norm_num_groups: groups of every group norm; must divide every width.
        norm_eps: of the group norms, but those in transformers (1e-6).
        dropout: in res blocks.
        time_scale_shift: the time scales and shifts after the second norm of a res block, rather than being added before it.
        resnet_resampling: res blocks, rather than convolutions, halve and double height and width. (Both are of Dhariwal and
            Nichol 2021, arXiv:2105.05233, and of latent diffusion's churches.)
        asymmetric_downsampling: convolutions that halve height and width pad right and bottom only (Ho et al. 2020's code).
        num_class_embeds: size of the table of class labels (`labels_B`), added to the time embedding; None = no labels.
        vector_dim: length of `vector_BC`, projected and added to the time embedding (SDXL 2816); None = no vector.
        guidance_dim: length of the embedding of the guidance scale (`guidance_B`), for models distilled with it (Meng et al.
            2023, arXiv:2210.03142; 256 in latent consistency models, diffusers' `time_cond_proj_dim`); None = not told.
        flip_sin_to_cos, freq_shift: of the time embedding, see `ldmkit.nn.sinusoidal_embedding`.
        cache_context: let `prepare` compute cross-attention's keys and values once per run rather than at every step.
    """

    in_channels: int = Field(4, ge=1)
    out_channels: int = Field(4, ge=1)
    spatial_channels: int = Field(0, ge=0)
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = Field(2, ge=1)
    transformer_layers_per_block: tuple[int, ...] = (1, 1, 1, 0)
    mid_transformer_layers: int = Field(1, ge=0)
    num_attention_heads: int | tuple[int, ...] = 8
    attention_block: Literal["transformer", "plain"] = "transformer"
    cross_attention_dim: int | None = Field(768, ge=1)
    only_cross_attention: bool | tuple[bool, ...] = False
    use_linear_projection: bool = False
    norm_num_groups: int = Field(32, ge=1)
    norm_eps: float = Field(1e-5, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    time_scale_shift: bool = False
    resnet_resampling: bool = False
    asymmetric_downsampling: bool = False
    num_class_embeds: int | None = Field(None, ge=1)
    vector_dim: int | None = Field(None, ge=1)
    guidance_dim: int | None = Field(None, ge=4)
    flip_sin_to_cos: bool = True
    freq_shift: float = 0.0
    cache_context: bool = True

    def per_level(self, value: T | tuple[T, ...]) -> tuple[T, ...]:
        """One entry per level, from one value or a tuple."""
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)

    @model_validator(mode="after")
    def _widths(self) -> UNetConfig:
        widths, groups = self.block_out_channels, self.norm_num_groups
        if not widths or any(width < 1 or width % groups for width in widths):
            raise ValueError(f"block_out_channels = {list(widths)}: each must be a multiple of norm_num_groups = {groups}")
        if widths[0] // 2 <= self.freq_shift:
            raise ValueError(f"freq_shift = {self.freq_shift:g} must be below half of block_out_channels[0] = {widths[0]}")
        if self.asymmetric_downsampling and self.resnet_resampling:
            raise ValueError("asymmetric_downsampling = true has no effect with resnet_resampling = true; leave one out")
        if self.spatial_channels >= self.in_channels:
            raise ValueError(
                f"spatial_channels = {self.spatial_channels} of in_channels = {self.in_channels} leave none for the latents"
            )
        return self

    @model_validator(mode="after")
    def _attention(self) -> UNetConfig:
        levels = len(self.block_out_channels)
        for name in ("transformer_layers_per_block", "num_attention_heads", "only_cross_attention"):
            value = getattr(self, name)
            if isinstance(value, tuple) and len(value) != levels:
                raise ValueError(f"{name} has {len(value)} entries for {levels} levels (block_out_channels)")
        depths = (*self.transformer_layers_per_block, self.mid_transformer_layers)
        widths = (*self.block_out_channels, self.block_out_channels[-1])
        heads = self.per_level(self.num_attention_heads)
        self._check_heads(depths, widths, (*heads, heads[-1]))
        if self.attention_block == "plain":
            if max(depths) > 1:
                raise ValueError(f"attention_block 'plain' has no depth: transformer layers {list(depths)} must be 0 or 1")
            if self.cross_attention_dim is not None:
                raise ValueError(
                    f"attention_block 'plain' cannot use cross_attention_dim = {self.cross_attention_dim}; set None"
                )
        if self.cross_attention_dim is None and any(self.per_level(self.only_cross_attention)):
            raise ValueError("only_cross_attention needs a cross_attention_dim")
        return self

    @staticmethod
    def _check_heads(depths: Sequence[int], widths: Sequence[int], heads: Sequence[int]) -> None:
        for depth, width, number in zip(depths, widths, heads, strict=True):
            if depth < 0:
                raise ValueError(f"transformer layers {list(depths)} must not be negative")
            if depth and (number < 1 or width % number):
                raise ValueError(f"num_attention_heads = {number} does not divide the level's {width} channels")
