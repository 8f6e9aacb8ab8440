"""The `config.json` of diffusers' `UNet2DModel`: plain attention, no cross-attention; read as ours and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ldmkit.errors import ConfigError
from ldmkit_unet.both_configs import READ, SAME, Fixed, attention_levels, refused
from ldmkit_unet.config import UNetConfig

_FIXED: Fixed = {  # switches that the originals of latent diffusion do not turn
    "act_fn": ("silu",),
    "add_attention": (True,),
    "center_input_sample": (False,),
    "class_embed_type": (None,),
    "downsample_padding": (0, 1, None),
    "mid_block_scale_factor": (1, None),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_train_timesteps": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional",),
}
_READ = READ | {"attn_norm_num_groups", "downsample_type", "upsample_type"}
_WITHOUT_EFFECT = frozenset({"sample_size"})  # the usual size, which the pipeline's defaults are made of
_DOWN = {"DownBlock2D": False, "ResnetDownsampleBlock2D": False, "AttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "ResnetUpsampleBlock2D": False, "AttnUpBlock2D": True}
_WAY = dict.fromkeys(("DownBlock2D", "UpBlock2D"), "conv")
_WAY |= dict.fromkeys(("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "resnet")
"""Blocks that resample in one way whatever `downsample_type` and `upsample_type` say."""


def convert_unconditional(given: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet2DModel's config => values for `UNet.Config`.

    `attention_head_dim` is what its name says here; a list, which diffusers does not have, gives one number per level. Input
    channels beyond those predicted are taken to come from the condition's `spatial_BCHW` (super-resolution).

    Raises:
        ConfigError: for unknown keys, and values that our U-Net cannot serve; all of them are named.
    """
    wrong = refused(given, _READ | _WITHOUT_EFFECT, _FIXED)
    shift = given.get("resnet_time_scale_shift", "default")
    groups, own = given.get("norm_num_groups", 32), given.get("attn_norm_num_groups")
    if own != groups and (own is not None or shift == "scale_shift"):  # None: the middle's attention then has no norm
        wrong.append(f"attn_norm_num_groups = {own!r} (only norm_num_groups = {groups!r} can be served)")
    if wrong:
        raise ConfigError(f"diffusers UNet2DModel config: {'; '.join(wrong)}")
    widths = given.get("block_out_channels", (224, 448, 672, 896))
    return (
        {"in_channels": 3, "out_channels": 3}
        | {key: given[key] for key in SAME if key in given}
        | {
            "block_out_channels": widths,
            "transformer_layers_per_block": [int(has) for has in _attended(given, len(widths))],
            "num_attention_heads": _heads(given.get("attention_head_dim", 8), widths),
            "attention_block": "plain",
            "cross_attention_dim": None,
            "time_scale_shift": shift == "scale_shift",
            "resnet_resampling": (by_res_block := _by_res_block(given)),
            "asymmetric_downsampling": given.get("downsample_padding") == 0 and not by_res_block,
            "num_class_embeds": given.get("num_class_embeds"),
            "freq_shift": float(given.get("freq_shift", 0)),
            "spatial_channels": max(given.get("in_channels", 3) - given.get("out_channels", 3), 0),
        }
    )


def _types(given: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str]]:
    down = given.get("down_block_types", ("DownBlock2D", *("AttnDownBlock2D",) * 3))
    return down, given.get("up_block_types", (*("AttnUpBlock2D",) * 3, "UpBlock2D"))


def _attended(given: Mapping[str, Any], levels: int) -> list[bool]:
    """Which levels have attention, by the names of their blocks."""
    down, up = _types(given)
    return attention_levels(down, up, known_down=_DOWN, known_up=_UP, levels=levels, config="diffusers UNet2DModel config")


def _by_res_block(given: Mapping[str, Any]) -> bool:
    """Whether res blocks resample: everywhere or nowhere. The last block of either way does not resample at all."""
    down, up = _types(given)
    ways = {_WAY.get(name, given.get("downsample_type") or "conv") for name in down[:-1]}
    ways |= {_WAY.get(name, given.get("upsample_type") or "conv") for name in up[:-1]}
    if len(ways) > 1 or not ways <= {"conv", "resnet"}:
        raise ConfigError(
            f"diffusers UNet2DModel config: blocks {list(down)} and {list(up)}, downsample_type, upsample_type: resampled by "
            f"{' and '.join(sorted(map(str, ways)))}; it must be 'conv' or 'resnet' at all levels"
        )
    return ways == {"resnet"}


def _heads(size: Any, widths: Sequence[int]) -> list[int]:
    """Numbers of heads, from the channels of each. Raises: ConfigError for sizes below 1."""
    sizes = list(size) if isinstance(size, list | tuple) else [size] * len(widths)
    sizes = [width if each is None else each for each, width in zip(sizes, widths, strict=True)]
    if any(each < 1 for each in sizes):
        raise ConfigError(f"diffusers UNet2DModel config: attention_head_dim = {size!r} must be positive")
    return [max(width // each, 1) for width, each in zip(widths, sizes, strict=True)]


def write_unconditional(config: UNetConfig) -> dict[str, Any]:
    """What a UNet2DModel's config has beside the keys common to both classes.

    Raises:
        ConfigError: for heads of several sizes, a middle without attention, a vector or a guidance scale.
    """
    for name in ("vector_dim", "guidance_dim"):
        if (value := getattr(config, name)) is not None:
            raise ConfigError(f"{name} = {value}: diffusers' UNet2DModel is told no such thing")
    attended = [depth > 0 for depth in config.transformer_layers_per_block]
    widths, heads = config.block_out_channels, config.per_level(config.num_attention_heads)
    levels = zip(widths, heads, (*attended[:-1], True), strict=True)  # the middle has the last level's, and attention
    sizes = sorted({width // number for width, number, has in levels if has})
    if len(sizes) > 1 or not config.mid_transformer_layers:
        raise ConfigError(f"heads of {sizes} channels, or no attention in the middle: diffusers' UNet2DModel has one size")
    result: dict[str, Any] = {
        "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]],
        "attention_head_dim": sizes[0],
    }
    if config.time_scale_shift:
        result |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": config.norm_num_groups}
    if config.resnet_resampling:
        names = {"DownBlock2D": "ResnetDownsampleBlock2D", "UpBlock2D": "ResnetUpsampleBlock2D"}
        result |= {"downsample_type": "resnet", "upsample_type": "resnet"}
        result |= {key: [names.get(name, name) for name in result[key]] for key in ("down_block_types", "up_block_types")}
    return result
