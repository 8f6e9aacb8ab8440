"""A diffusion transformer (Peebles and Xie 2023, arXiv:2212.09748): patches as tokens, the time by adaLN-zero, the condition's
tokens in front of the patches ("in-context conditioning").
"""

from __future__ import annotations

import math
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

import ldmkit
from ldmkit import Condition, Denoiser


class Block(nn.Module):
    """Attention and feed-forward, each scaled, shifted and gated by the time (adaLN-zero, sec. 3.2)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x_BLC: Tensor, time_BC: Tensor, mask_BL: Tensor | None) -> Tensor:
        """(B, L, C), told the time; True in `mask_BL` = attend."""
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(F.silu(time_BC))[:, None].chunk(6, dim=-1)
        x_BLC = x_BLC + gate * self._attention(_normed(x_BLC) * (1 + scale) + shift, mask_BL)
        return x_BLC + gate2 * self.feed_forward(_normed(x_BLC) * (1 + scale2) + shift2)

    def _attention(self, x_BLC: Tensor, mask_BL: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.to_qkv(x_BLC).chunk(3, dim=-1))
        seen = None if mask_BL is None else mask_BL[:, None, None]
        attended: Tensor = self.to_out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return attended


class DiT(Denoiser):
    """Noisy latents, in patches => a raw prediction. With `condition_size` it is told tokens; without, nothing but the time."""

    class Config(ldmkit.Config):
        """Attributes:
        in_channels: of the latents, and of the prediction.
        patch: pixels of the latents along each side of a patch.
        width, depth, heads: of the transformer; width is a multiple of 4 and of heads.
        condition_size: width of the condition's tokens; 0 takes none.
        """

        in_channels: int = Field(4, ge=1)
        patch: int = Field(2, ge=1)
        width: int = Field(64, ge=4)
        depth: int = Field(2, ge=1)
        heads: int = Field(4, ge=1)
        condition_size: int = Field(0, ge=0)

        @model_validator(mode="after")
        def _divisible(self) -> Self:
            if self.width % 4 or self.width % self.heads:
                raise ValueError(f"width = {self.width} must be a multiple of 4 and of heads = {self.heads}")
            return self

    config: DiT.Config

    def __init__(self, config: DiT.Config) -> None:
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.in_channels
        self.multiple_of = config.patch
        self.accepts = frozenset({"tokens_BLC"} if config.condition_size else ())
        self.requires = self.accepts
        values = config.in_channels * config.patch**2
        self.from_patches, self.to_patches = nn.Linear(values, config.width), nn.Linear(config.width, values)
        nn.init.zeros_(self.to_patches.weight)
        nn.init.zeros_(self.to_patches.bias)
        self.time = nn.Sequential(nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.from_tokens = nn.Linear(config.condition_size, config.width) if config.condition_size else None
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """The raw prediction, (B, C, H, W).

        Raises:
            InputError: for a condition with other fields than the config has it take.
        """
        self.check(condition)
        patch, (height, width) = self.config.patch, x_BCHW.shape[2:]
        tokens_BLC = self.from_patches(F.pixel_unshuffle(x_BCHW, patch).flatten(2).transpose(1, 2))
        tokens_BLC = tokens_BLC + _places(height // patch, width // patch, self.config.width).to(tokens_BLC)
        told, mask_BL = 0, None
        if self.from_tokens is not None and condition.tokens_BLC is not None:
            told = condition.tokens_BLC.shape[1]
            if condition.mask_BL is not None:
                mask_BL = F.pad(condition.mask_BL, (0, tokens_BLC.shape[1]), value=True)
            tokens_BLC = torch.cat([self.from_tokens(condition.tokens_BLC), tokens_BLC], dim=1)
        time_BC = self.time(_waves(t_B.to(x_BCHW.dtype), self.config.width))
        for block in self.blocks:
            tokens_BLC = block(tokens_BLC, time_BC, mask_BL)
        patches_BCHW = self.to_patches(_normed(tokens_BLC[:, told:])).transpose(1, 2)
        return F.pixel_shuffle(patches_BCHW.unflatten(2, (height // patch, width // patch)), patch)


def _normed(x_BLC: Tensor) -> Tensor:
    return F.layer_norm(x_BLC, x_BLC.shape[-1:], eps=1e-6)


def _waves(values: Tensor, width: int) -> Tensor:
    """Sines and cosines of wavelengths up to 10,000 (Vaswani et al. 2017, sec. 3.5): (N,) => (N, width)."""
    rates = torch.exp(-math.log(1e4) / (width // 2) * torch.arange(width // 2, device=values.device, dtype=values.dtype))
    angles = values[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _places(height: int, width: int, channels: int) -> Tensor:
    """Half of the channels tell the row, half the column: (height * width, channels)."""
    rows, columns = (_waves(torch.arange(n, dtype=torch.float32), channels // 2) for n in (height, width))
    return torch.cat([rows.repeat_interleave(width, dim=0), columns.repeat(height, 1)], dim=1)
