"""The U-Net of a CompVis or Stability file, from its keys and shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ldmkit.checkpoints.compvis import unet_map
from ldmkit.checkpoints.found import Found, Shapes, count, shape_of
from ldmkit.errors import ArchitectureMismatchError, ConfigError

UNET = "model.diffusion_model"
"""Where it is in a file."""
PLAIN_HEAD_CHANNELS = 32
"""Channels of a head in the unconditional originals' attention (`num_head_channels` of their configs);"""
PLAIN_HEADS = 8
"""but in the one that scales and shifts by the time, churches, that many heads at all levels (`num_heads`)."""


def unet(shapes: Shapes, told: Mapping[str, Any]) -> Found:
    """From keys without `model.diffusion_model.`"""

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(shapes, key, "the U-Net")

    upward = [key for key in shapes if re.fullmatch(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", key)]
    by_res_block = bool(upward)
    levels = 1 + len(upward or [key for key in shapes if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key)])
    blocks = count(shapes, r"input_blocks\.(\d+)\.")
    if "input_blocks.1.0.in_layers.0.weight" not in shapes or blocks % levels or blocks // levels < 2:
        raise ArchitectureMismatchError(
            f"the U-Net has {blocks} input blocks on {levels} levels, and no architecture known here has that"
        )
    layers = blocks // levels - 1
    first = [level * (layers + 1) + 1 for level in range(levels)]
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
    scaled = shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0]
    plain = "middle_block.1.qkv.weight" in shapes
    if not plain and (scaled or by_res_block):
        raise ArchitectureMismatchError(
            "the U-Net has transformers, and scales and shifts by the time embedding (use_scale_shift_norm) or changes the "
            "resolution by res blocks (resblock_updown): no architecture known here does"
        )
    depths = [count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in first]
    attended = [f"input_blocks.{i}.1.norm.weight" in shapes for i in first]
    config: dict[str, Any] = {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
    }
    if plain:
        config |= _plain(widths, attended, scaled=scaled, by_res_block=by_res_block, groups=told.get("norm_num_groups", 32))
    else:
        config |= _transformers(shapes, shape, widths, depths, attended, first)
    keymap = unet_map(
        levels=levels,
        layers_per_block=layers,
        attention=tuple(attended),
        plain_head_channels=_head_channels({**config, **told}["attention_head_dim"], widths) if plain else None,
        resnet_resampling=by_res_block,
    )
    class_name = "UNet2DModel" if plain else "UNet2DConditionModel"
    return Found("unet", class_name, config, keymap.prefixed(UNET))


def _plain(widths: list[int], attended: list[bool], *, scaled: bool, by_res_block: bool, groups: Any) -> dict[str, Any]:
    """The unconditional originals: blocks of attention, no transformers."""
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if by_res_block else ("DownBlock2D", "UpBlock2D")
    config: dict[str, Any] = {
        "down_block_types": ["AttnDownBlock2D" if has else down for has in attended],
        "up_block_types": ["AttnUpBlock2D" if has else up for has in attended[::-1]],
        "attention_head_dim": [width // PLAIN_HEADS for width in widths] if scaled else PLAIN_HEAD_CHANNELS,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }
    if scaled:
        config |= {"resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": groups}
    if by_res_block:
        config |= {"downsample_type": "resnet", "upsample_type": "resnet"}
    return config


def _head_channels(size: Any, widths: list[int]) -> list[int]:
    """Channels of a head at each level, by which packed queries, keys and values are told apart. Raises: ConfigError."""
    sizes = list(size) if isinstance(size, list | tuple) else [size] * len(widths)
    if len(sizes) != len(widths) or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in sizes):
        raise ConfigError(
            f"config: unet attention_head_dim = {size!r} must be the channels of a head, one number or one for each of the "
            f"{len(widths)} levels"
        )
    return sizes


def _transformers(
    shapes: Shapes, shape: Any, widths: list[int], depths: list[int], attended: list[bool], first: list[int]
) -> dict[str, Any]:
    mid = count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if attended[-1] and depths[-1] != mid:
        raise ArchitectureMismatchError(f"the U-Net's last level has {depths[-1]} transformer layers and its middle {mid}")
    middle = "middle_block.1.transformer_blocks.0"
    context = shape(f"{middle}.attn2.to_k.weight")[1]
    linear = len(shape("middle_block.1.proj_in.weight")) == 2
    only_cross = [
        has and (keys := shape(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight"))[0] != keys[1]
        for i, has in zip(first, attended, strict=True)
    ]
    config: dict[str, Any] = {
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]],
        "transformer_layers_per_block": [depth if has else mid for depth, has in zip(depths, attended, strict=True)],
        "attention_head_dim": _heads(widths, context=context, linear=linear, labelled="label_emb.weight" in shapes),
        "use_linear_projection": linear,
        "only_cross_attention": only_cross if any(only_cross) else False,
        "num_class_embeds": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape("label_emb.0.0.weight")[1],
        }
    return config


def _heads(widths: list[int], *, context: int, linear: bool, labelled: bool) -> int | list[int]:
    """Heads leave no trace in shapes: 64 channels each in SD2 and SDXL, else 8, and 1 in class-conditional latent diffusion."""
    if linear and not labelled:
        return [width // 64 for width in widths]
    return 1 if context == 512 and not linear else 8
