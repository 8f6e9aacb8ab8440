"""The `config.json` of diffusers' `AutoencoderKL`, read as ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ldmkit.errors import ConfigError

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_SAME = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
    "use_quant_conv",
    "use_post_quant_conv",
    "scaling_factor",
    "force_upcast",
)
# Where a default of AutoencoderKL is not ours. Old files leave scaling_factor out: 0.18215 in both.
_DEFAULTS = {"block_out_channels": (64,), "layers_per_block": 1, "force_upcast": True}
# The usual size; the activation (checked below); statistics that diffusers stores for the user and applies nowhere itself.
_WITHOUT_EFFECT = {"sample_size", "act_fn", "latents_mean", "latents_std"}


def convert_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A diffusers autoencoder's config => values for `KLAutoencoder.Config`.

    Raises:
        ConfigError: for unknown keys, and values that our autoencoder cannot serve.
    """
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    down = given.pop("down_block_types", ("DownEncoderBlock2D",))
    up = given.pop("up_block_types", ("UpDecoderBlock2D",))
    shift = given.pop("shift_factor", None)
    unknown = sorted(set(given) - set(_SAME) - _WITHOUT_EFFECT)
    if unknown:
        raise ConfigError("diffusers autoencoder config: " + "; ".join(f"unknown key {k!r} (= {given[k]!r})" for k in unknown))
    if given.get("act_fn", "silu") != "silu":
        raise ConfigError(f"diffusers autoencoder config: act_fn = {given['act_fn']!r}: only 'silu' can be served")
    for key in ("latents_mean", "latents_std"):
        if given.get(key) is not None:
            raise ConfigError(
                f"diffusers autoencoder config: {key} = {given[key]!r} is read by no Stable Diffusion pipeline; set "
                "scaling_factor and shift_factor of our config instead, one number per channel"
            )
    wrong = sorted({*down} - {*_DOWN}) + sorted({*up} - {*_UP})
    if wrong:
        raise ConfigError(f"diffusers autoencoder config: block types {wrong} are none of {[*_DOWN, *_UP]}")
    attention = [_DOWN[name] for name in down]
    if [_UP[name] for name in up] != attention[::-1]:
        raise ConfigError(f"diffusers autoencoder config: {list(down)} and {list(up)} must mirror each other")
    result = _DEFAULTS | {key: given[key] for key in _SAME if key in given}
    if any(attention):
        result["attention_levels"] = attention
    if shift is not None:
        result["shift_factor"] = shift
    return result


def write_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `KLAutoencoder.Config` => the `config.json` of an AutoencoderKL, which `convert_diffusers_config` reads.

    Raises:
        ConfigError: for factors per channel, which no pipeline of diffusers applies.
    """
    for key in ("scaling_factor", "shift_factor"):
        if not isinstance(values[key], int | float):
            raise ConfigError(f"{key} = {values[key]!r}: diffusers' AutoencoderKL has one number for all channels")
    attention = values["attention_levels"] or [False] * len(values["block_out_channels"])
    return {key: values[key] for key in _SAME} | {
        "act_fn": "silu",
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in attention[::-1]],
        "shift_factor": values["shift_factor"] or None,
    }
