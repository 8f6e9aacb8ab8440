"""The convolutional encoder and decoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752, app. E.1, G)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import cast

from torch import Tensor, nn

from ldmkit.nn import AttentionBlock, Downsample, GroupNorm, ResBlock, Upsample

EPS = 1e-6
"""Of every group norm."""


class MidBlock(nn.Module):
    """Res block, attention over all pixels (one head), res block. State dict: resnets.{0,1}, attentions.0."""

    def __init__(self, channels: int, *, num_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(_res_block(channels, channels, num_groups) for _ in range(2))
        self.attentions = nn.ModuleList(_attention(channels, num_groups) for _ in range(int(attention)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) => the same shape."""
        h_BCHW, skip_BCHW = self.branches(x_BCHW)
        return h_BCHW + skip_BCHW

    def branches(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The two branches of the last res block, yet to be added."""
        x_BCHW = self.resnets[0](x_BCHW)
        for attention in self.attentions:
            x_BCHW = attention(x_BCHW)
        return cast(ResBlock, self.resnets[1]).branches(x_BCHW)


class Level(nn.Module):
    """Res blocks of one resolution, each followed by attention if asked, then a change of resolution.

    State dict: resnets.i, attentions.i, downsamplers.0 or upsamplers.0.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        num_layers: int,
        num_groups: int,
        attention: bool,
        down: bool = False,
        up: bool = False,
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(
            _res_block(in_channels if i == 0 else out_channels, out_channels, num_groups) for i in range(num_layers)
        )
        self.attentions = nn.ModuleList(_attention(out_channels, num_groups) for _ in range(num_layers if attention else 0))
        self.downsamplers = nn.ModuleList([Downsample(out_channels, asymmetric=True)] if down else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if up else [])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) => (B, out_channels, H', W'), half or double the size where it resamples."""
        h_BCHW, skip_BCHW = self.branches(x_BCHW)
        x_BCHW = h_BCHW + skip_BCHW
        for resample in (*self.downsamplers, *self.upsamplers):
            x_BCHW = resample(x_BCHW)
        return x_BCHW

    def branches(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """The two branches of the last layer, yet to be added, before any change of resolution."""
        *layers, last = chain(*zip(self.resnets, self.attentions, strict=True)) if self.attentions else self.resnets
        for layer in layers:
            x_BCHW = layer(x_BCHW)
        return cast(ResBlock | AttentionBlock, last).branches(x_BCHW)


class Encoder(nn.Module):
    """Image => features at 1/2^(levels - 1) of its size.

    State dict: conv_in, down_blocks, mid_block, conv_norm_out, conv_out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        num_groups: int,
        attention_levels: Sequence[bool],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        channels, last = block_out_channels, len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                channels[i],
                num_layers=layers_per_block,
                num_groups=num_groups,
                attention=attention_levels[i],
                down=i < last,
            )
            for i in range(len(channels))
        )
        self.mid_block = MidBlock(channels[-1], num_groups=num_groups, attention=mid_attention)
        self.conv_norm_out = GroupNorm(num_groups, channels[-1], eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) => (B, out_channels, H / 2^(levels - 1), W / 2^(levels - 1))."""
        h_BCHW = self.conv_in(x_BCHW)
        for block in self.down_blocks:
            h_BCHW = block(h_BCHW)
        h_BCHW, residual_BCHW = self.mid_block.branches(h_BCHW)
        out: Tensor = self.conv_out(self.conv_norm_out(h_BCHW, residual_BCHW=residual_BCHW))
        return out


class Decoder(nn.Module):
    """Latents => image at 2^(levels - 1) times their size.

    State dict: conv_in, mid_block, up_blocks, conv_norm_out, conv_out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        block_out_channels: Sequence[int],
        layers_per_block: int,
        num_groups: int,
        attention_levels: Sequence[bool],
        mid_attention: bool,
    ) -> None:
        super().__init__()
        channels, last = block_out_channels[::-1], len(block_out_channels) - 1
        self.conv_in = nn.Conv2d(in_channels, channels[0], 3, padding=1)
        self.mid_block = MidBlock(channels[0], num_groups=num_groups, attention=mid_attention)
        self.up_blocks = nn.ModuleList(
            Level(
                channels[max(i - 1, 0)],
                channels[i],
                num_layers=layers_per_block + 1,
                num_groups=num_groups,
                attention=attention_levels[last - i],
                up=i < last,
            )
            for i in range(len(channels))
        )
        self.conv_norm_out = GroupNorm(num_groups, channels[-1], eps=EPS, silu=True)
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """(B, in_channels, H, W) => (B, out_channels, H 2^(levels - 1), W 2^(levels - 1))."""
        h_BCHW = self.mid_block(self.conv_in(z_BCHW))
        for block in self.up_blocks[:-1]:
            h_BCHW = block(h_BCHW)
        h_BCHW, residual_BCHW = cast(Level, self.up_blocks[-1]).branches(h_BCHW)
        out: Tensor = self.conv_out(self.conv_norm_out(h_BCHW, residual_BCHW=residual_BCHW))
        return out


def _res_block(in_channels: int, out_channels: int, num_groups: int) -> ResBlock:
    return ResBlock(in_channels, out_channels, time_channels=None, num_groups=num_groups, eps=EPS)


def _attention(channels: int, num_groups: int) -> AttentionBlock:
    return AttentionBlock(channels, heads=1, num_groups=num_groups, eps=EPS)
