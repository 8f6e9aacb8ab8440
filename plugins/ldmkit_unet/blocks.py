"""The levels of the U-Net: res blocks, each followed by attention where asked, then a change of resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn

from ldmkit.nn import AttentionBlock, Context, Downsample, ResBlock, SpatialTransformer, Upsample

if TYPE_CHECKING:
    from ldmkit_unet.config import UNetConfig


def res_block(
    config: UNetConfig, in_channels: int, out_channels: int, resample: Literal["down", "up"] | None = None
) -> ResBlock:
    """A res block told the time, 4 x the first level's width."""
    return ResBlock(
        in_channels,
        out_channels,
        time_channels=4 * config.block_out_channels[0],
        num_groups=config.norm_num_groups,
        eps=config.norm_eps,
        dropout=config.dropout,
        scale_shift=config.time_scale_shift,
        resample=resample,
    )


def resampler(config: UNetConfig, level: int, way: Literal["down", "up"]) -> nn.Module:
    """What halves or doubles height and width below or above a level."""
    channels = config.block_out_channels[level]
    if config.resnet_resampling:
        return res_block(config, channels, channels, way)
    return Downsample(channels, asymmetric=config.asymmetric_downsampling) if way == "down" else Upsample(channels)


def resample(layer: nn.Module, x_BCHW: Tensor, time_BC: Tensor) -> Tensor:
    """Half or twice the height and width; res blocks are told the time."""
    out: Tensor = layer(x_BCHW, time_BC) if isinstance(layer, ResBlock) else layer(x_BCHW)
    return out


def attention(config: UNetConfig, level: int, depth: int, *, mid: bool = False) -> SpatialTransformer | AttentionBlock:
    """The attention of a level, or of the middle."""
    channels, heads = config.block_out_channels[level], config.per_level(config.num_attention_heads)[level]
    if config.attention_block == "plain":
        return AttentionBlock(channels, heads=heads, num_groups=config.norm_num_groups, eps=config.norm_eps)
    return SpatialTransformer(
        channels,
        heads=heads,
        depth=depth,
        context_channels=config.cross_attention_dim,
        num_groups=config.norm_num_groups,
        linear_projection=config.use_linear_projection,
        only_cross_attention=not mid and config.per_level(config.only_cross_attention)[level],
    )


def attend(layer: nn.Module, x_BCHW: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
    """The two branches, yet to be added, of either kind of attention."""
    assert isinstance(layer, SpatialTransformer | AttentionBlock)
    return layer.branches(x_BCHW, context)


class DownBlock(nn.Module):
    """A level on the way down. State dict: resnets.i, attentions.i, downsamplers.0."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, depth = config.block_out_channels, config.transformer_layers_per_block[level]
        own, layers = widths[level], config.layers_per_block
        inputs = (own if i else widths[max(level - 1, 0)] for i in range(layers))
        self.resnets = nn.ModuleList(res_block(config, channels, own) for channels in inputs)
        self.attentions = nn.ModuleList(attention(config, level, depth) for _ in range(layers if depth else 0))
        self.downsamplers = nn.ModuleList([resampler(config, level, "down")] if level < len(widths) - 1 else [])

    def forward(self, x_BCHW: Tensor, time_BC: Tensor, context: Context | None) -> tuple[Tensor, list[Tensor]]:
        """Features => features, and those that the way up will join in again."""
        skips = []
        for i, resnet in enumerate(self.resnets):
            x_BCHW = resnet(x_BCHW, time_BC)
            if self.attentions:
                x_BCHW = torch.add(*attend(self.attentions[i], x_BCHW, context))
            skips.append(x_BCHW)
        for downsample in self.downsamplers:
            x_BCHW = resample(downsample, x_BCHW, time_BC)
            skips.append(x_BCHW)
        return x_BCHW, skips


class MidBlock(nn.Module):
    """The coarsest features. State dict: resnets.{0,1}, attentions.0."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, depth = config.block_out_channels[-1], config.mid_transformer_layers
        self.resnets = nn.ModuleList(res_block(config, channels, channels) for _ in range(2))
        self.attentions = nn.ModuleList([attention(config, -1, depth, mid=True)] if depth else [])

    def forward(self, x_BCHW: Tensor, time_BC: Tensor, context: Context | None) -> Tensor:
        """Features => features."""
        x_BCHW = self.resnets[0](x_BCHW, time_BC)
        for layer in self.attentions:
            x_BCHW = torch.add(*attend(layer, x_BCHW, context))
        out: Tensor = self.resnets[1](x_BCHW, time_BC)
        return out


class UpBlock(nn.Module):
    """A level on the way up; each res block is given one of the features from the way down. State dict: resnets.i,
    attentions.i, upsamplers.0."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        widths, depth, layers = config.block_out_channels, config.transformer_layers_per_block[level], config.layers_per_block
        own = widths[level]
        inputs = (own if i else widths[min(level + 1, len(widths) - 1)] for i in range(layers + 1))
        skips = (own if i < layers else widths[max(level - 1, 0)] for i in range(layers + 1))
        self.resnets = nn.ModuleList(res_block(config, a + b, own) for a, b in zip(inputs, skips, strict=True))
        self.attentions = nn.ModuleList(attention(config, level, depth) for _ in range(layers + 1 if depth else 0))
        self.upsamplers = nn.ModuleList([resampler(config, level, "up")] if level > 0 else [])

    def forward(self, x_BCHW: Tensor, skips: Sequence[Tensor], time_BC: Tensor, context: Context | None) -> Tensor:
        """Features, and as many skipped ones as there are res blocks, the last of them first to be used => features."""
        x_BCHW = torch.add(*self.branches(x_BCHW, skips, time_BC, context))
        for upsample in self.upsamplers:
            x_BCHW = resample(upsample, x_BCHW, time_BC)
        return x_BCHW

    def branches(
        self, x_BCHW: Tensor, skips: Sequence[Tensor], time_BC: Tensor, context: Context | None
    ) -> tuple[Tensor, Tensor]:
        """The two branches of the last layer, yet to be added, before any change of resolution."""
        branches: tuple[Tensor, Tensor] | None = None
        for i, resnet in enumerate(self.resnets):
            x_BCHW = x_BCHW if branches is None else torch.add(*branches)
            branches = cast(ResBlock, resnet).branches(torch.cat([x_BCHW, skips[-1 - i]], dim=1), time_BC)
            if self.attentions:
                branches = attend(self.attentions[i], torch.add(*branches), context)
        assert branches is not None
        return branches
