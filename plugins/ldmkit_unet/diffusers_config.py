"""The `config.json` of diffusers' `UNet2DConditionModel`, read as ours and written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldmkit.errors import ConfigError
from ldmkit_unet.both_configs import READ, SAME, Fixed, attention_levels, refused
from ldmkit_unet.config import UNetConfig
from ldmkit_unet.unconditional_config import convert_unconditional, write_unconditional

# Switches that no Stable Diffusion U-Net turns: what our U-Net is. None stands for "not given".
_FIXED: Fixed = {
    "act_fn": ("silu", None),
    "addition_embed_type": ("text_time", None),
    "attention_type": ("default", None),
    "center_input_sample": (False, None),
    "class_embed_type": (None,),
    "class_embeddings_concat": (False, None),
    "conv_in_kernel": (3, None),
    "conv_out_kernel": (3, None),
    "cross_attention_norm": (None,),
    "downsample_padding": (1, None),
    "dual_cross_attention": (False, None),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (False, None),
    "mid_block_scale_factor": (1, None),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,),
    "resnet_out_scale_factor": (1, None),
    "resnet_skip_time_act": (False, None),
    "resnet_time_scale_shift": ("default", None),
    "reverse_transformer_layers_per_block": (None,),
    "time_embedding_act_fn": (None,),
    "time_embedding_dim": (None,),
    "time_embedding_type": ("positional", None),
    "timestep_post_act": (None,),
}
# The usual size, numerics that ours always has, and what only the conditioner or another switch reads.
_WITHOUT_EFFECT = frozenset({"sample_size", "upcast_attention", "addition_embed_type_num_heads", "addition_time_embed_dim"})
_READ = READ | {
    "cross_attention_dim",
    "only_cross_attention",
    "projection_class_embeddings_input_dim",
    "time_cond_proj_dim",
    "transformer_layers_per_block",
    "use_linear_projection",
}
_DOWN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
_UP = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}


def convert_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers U-Net's config => values for `UNet.Config`.

    What diffusers calls `attention_head_dim` is the number of heads (its issue 2011). Input channels beyond those predicted are
    taken to come from the condition's `spatial_BCHW` (inpainting, upscaling).

    Raises:
        ConfigError: for unknown keys, and values that our U-Net cannot serve; all of them are named.
    """
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    if values.get("_class_name") == "UNet2DModel":
        return convert_unconditional(given)
    if wrong := refused(given, _READ | _WITHOUT_EFFECT, _FIXED):
        raise ConfigError(f"diffusers U-Net config: {'; '.join(wrong)}")
    widths = given.get("block_out_channels", (320, 640, 1280, 1280))
    depths = given.get("transformer_layers_per_block", 1)
    depths = [depths] * len(widths) if isinstance(depths, int) else depths
    attended = _attended(given, len(widths))
    return {key: given[key] for key in SAME if key in given} | {
        "block_out_channels": widths,
        "transformer_layers_per_block": [depth if has else 0 for depth, has in zip(depths, attended, strict=True)],
        "mid_transformer_layers": depths[-1],
        "num_attention_heads": given.get("attention_head_dim", 8),
        "cross_attention_dim": given.get("cross_attention_dim", 1280),
        "only_cross_attention": given.get("only_cross_attention", False),
        "use_linear_projection": given.get("use_linear_projection", False),
        "num_class_embeds": given.get("num_class_embeds"),
        "vector_dim": given.get("projection_class_embeddings_input_dim") if given.get("addition_embed_type") else None,
        "guidance_dim": given.get("time_cond_proj_dim"),
        "freq_shift": float(given.get("freq_shift", 0)),
        "spatial_channels": max(given.get("in_channels", 4) - given.get("out_channels", 4), 0),
    }


def write_diffusers_config(config: UNetConfig) -> tuple[str, dict[str, Any]]:
    """Our config => the class of diffusers and its `config.json`; what `convert_diffusers_config` reads.

    Raises:
        ConfigError: for a U-Net that diffusers cannot express.
    """
    attended = [depth > 0 for depth in config.transformer_layers_per_block]
    values = config.to_dict()
    result = {key: values[key] for key in (*SAME, "block_out_channels", "num_class_embeds")}
    result |= {
        "freq_shift": int(config.freq_shift),
        "downsample_padding": int(not config.asymmetric_downsampling),
        "act_fn": "silu",
    }
    if config.freq_shift != int(config.freq_shift):
        raise ConfigError(f"freq_shift = {config.freq_shift}: diffusers has whole numbers only")
    if config.attention_block == "plain":
        return "UNet2DModel", result | write_unconditional(config)
    for name in ("time_scale_shift", "resnet_resampling", "asymmetric_downsampling"):
        if getattr(config, name):
            raise ConfigError(f"{name} = true: diffusers has these with attention_block = 'plain' only")
    if config.cross_attention_dim is None:
        raise ConfigError("diffusers has no U-Net whose transformers have no cross-attention (cross_attention_dim = None)")
    if (
        attended[-1] and config.transformer_layers_per_block[-1] != config.mid_transformer_layers
    ) or not config.mid_transformer_layers:
        raise ConfigError(
            f"mid_transformer_layers = {config.mid_transformer_layers}: in diffusers the middle has as many as the last level, "
            f"{config.transformer_layers_per_block[-1]}, and not none"
        )
    depths = [depth or config.mid_transformer_layers for depth in config.transformer_layers_per_block]
    result |= {
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]],
        "transformer_layers_per_block": depths[0] if len(set(depths)) == 1 else depths,
        "attention_head_dim": values["num_attention_heads"],
        "cross_attention_dim": config.cross_attention_dim,
        "only_cross_attention": values["only_cross_attention"],
        "use_linear_projection": config.use_linear_projection,
    }
    if config.guidance_dim is not None:
        result["time_cond_proj_dim"] = config.guidance_dim
    if config.vector_dim is not None:
        result |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
        result["projection_class_embeddings_input_dim"] = config.vector_dim
    return "UNet2DConditionModel", result


def _attended(given: Mapping[str, Any], levels: int) -> list[bool]:
    """Which levels have attention, by the names of their blocks."""
    down = given.get("down_block_types", ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",))
    up = given.get("up_block_types", ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3)
    return attention_levels(down, up, known_down=_DOWN, known_up=_UP, levels=levels, config="diffusers U-Net config")
