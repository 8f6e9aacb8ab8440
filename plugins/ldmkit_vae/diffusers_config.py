"""The `config.json`s of diffusers' `AutoencoderKL`, `VQModel` and `AutoencoderTiny`, read as ours and written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ldmkit.errors import ConfigError

_DOWN = {"DownEncoderBlock2D": False, "AttnDownEncoderBlock2D": True}
_UP = {"UpDecoderBlock2D": False, "AttnUpDecoderBlock2D": True}
_BOTH = (
    "in_channels",
    "out_channels",
    "latent_channels",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "mid_block_add_attention",
    "scaling_factor",
    "force_upcast",
)
_SAME = (*_BOTH, "use_quant_conv", "use_post_quant_conv")
_VQ = (*_BOTH, "num_vq_embeddings", "vq_embed_dim")
# Where a default of theirs is not ours. Old files leave scaling_factor out: 0.18215 in both.
_DEFAULTS = {"block_out_channels": (64,), "layers_per_block": 1, "force_upcast": True}
_VQ_DEFAULTS = {
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "latent_channels": 3,
    "num_vq_embeddings": 256,
    "scaling_factor": 0.18215,
}
# The usual size; the activation (checked below); statistics that diffusers stores for the user and applies nowhere itself.
_WITHOUT_EFFECT = {"sample_size", "act_fn", "latents_mean", "latents_std"}


def convert_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an AutoencoderKL => values for `KLAutoencoder.Config`.

    Raises:
        ConfigError: for unknown keys, and values that our autoencoder cannot serve.
    """
    given = _without_notes(values)
    shift = given.pop("shift_factor", None)
    for key in ("latents_mean", "latents_std"):
        if given.get(key) is not None:
            raise ConfigError(
                f"diffusers autoencoder config: {key} = {given[key]!r} is read by no Stable Diffusion pipeline; set "
                "scaling_factor and shift_factor of our config instead, one number per channel"
            )
    result = _DEFAULTS | _levels(given, _SAME, _WITHOUT_EFFECT)
    if shift is not None:
        result["shift_factor"] = shift
    return result


def convert_vq_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a VQModel => values for `VQAutoencoder.Config`. Raises: ConfigError, as above."""
    given = _without_notes(values)
    for key, served in (("norm_type", "group"), ("lookup_from_codebook", False)):
        if given.pop(key, served) != served:
            raise ConfigError(f"diffusers autoencoder config: {key} = {values[key]!r}: only {served!r} can be served")
    return _VQ_DEFAULTS | _levels(given, _VQ, {"sample_size", "act_fn"})


def convert_tiny_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The config of an AutoencoderTiny => values for `TinyAutoencoder.Config`. Raises: ConfigError, as above."""
    given = _without_notes(values)
    widths = {*given.pop("encoder_block_out_channels", (64,)), *given.pop("decoder_block_out_channels", (64,))}
    widths |= {*given.pop("block_out_channels", ())}  # written beside them, and the decoder's
    served = {"act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2, "scaling_factor": 1.0}
    served |= {"shift_factor": 0.0, "latent_magnitude": 3, "latent_shift": 0.5, "force_upcast": False}
    for key, value in served.items():
        if given.pop(key, value) != value:
            raise ConfigError(f"diffusers autoencoder config: {key} = {values[key]!r}: only {value!r} can be served")
    if len(widths) > 1:
        raise ConfigError(f"diffusers autoencoder config: layers of {sorted(widths)} channels; they must all be of one width")
    names = {"num_encoder_blocks": "encoder_blocks", "num_decoder_blocks": "decoder_blocks"}
    names |= {key: key for key in ("in_channels", "out_channels", "latent_channels")}
    _refuse_unknown(given, names)
    return {"channels": widths.pop()} | {names[key]: value for key, value in given.items()}


def _without_notes(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if not key.startswith("_")}


def _refuse_unknown(given: Mapping[str, Any], known: Iterable[str]) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise ConfigError("diffusers autoencoder config: " + "; ".join(f"unknown key {k!r} (= {given[k]!r})" for k in unknown))


def _levels(given: dict[str, Any], same: Sequence[str], without_effect: set[str]) -> dict[str, Any]:
    """Keys that mean the same, and attention from the types of blocks."""
    down = given.pop("down_block_types", ("DownEncoderBlock2D",))
    up = given.pop("up_block_types", ("UpDecoderBlock2D",))
    _refuse_unknown(given, {*same, *without_effect})
    if given.get("act_fn", "silu") != "silu":
        raise ConfigError(f"diffusers autoencoder config: act_fn = {given['act_fn']!r}: only 'silu' can be served")
    wrong = sorted({*down} - {*_DOWN}) + sorted({*up} - {*_UP})
    if wrong:
        raise ConfigError(f"diffusers autoencoder config: block types {wrong} are none of {[*_DOWN, *_UP]}")
    attention = [_DOWN[name] for name in down]
    if [_UP[name] for name in up] != attention[::-1]:
        raise ConfigError(f"diffusers autoencoder config: {list(down)} and {list(up)} must mirror each other")
    result = {key: given[key] for key in same if key in given}
    return result | ({"attention_levels": attention} if any(attention) else {})


def write_diffusers_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `KLAutoencoder.Config` => the `config.json` of an AutoencoderKL, which `convert_diffusers_config` reads.

    Raises:
        ConfigError: for factors per channel, which no pipeline of diffusers applies.
    """
    for key in ("scaling_factor", "shift_factor"):
        if not isinstance(values[key], int | float):
            raise ConfigError(f"{key} = {values[key]!r}: diffusers' AutoencoderKL has one number for all channels")
    return _written_levels(values, _SAME) | {"shift_factor": values["shift_factor"] or None}


def write_vq_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `VQAutoencoder.Config` => the `config.json` of a VQModel. Raises: ConfigError for what it cannot express."""
    if not isinstance(values["scaling_factor"], int | float) or values["shift_factor"] != 0:
        raise ConfigError(
            f"scaling_factor = {values['scaling_factor']!r}, shift_factor = {values['shift_factor']!r}: diffusers' VQModel has "
            "one scale for all channels and no shift"
        )
    if not values["quantize_before_decode"]:
        raise ConfigError("quantize_before_decode = False: diffusers' VQModel says that in each call, not in its config")
    return _written_levels(values, _VQ)


def write_tiny_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of `TinyAutoencoder.Config` => the `config.json` of an AutoencoderTiny."""
    widths = [values["channels"]] * len(values["encoder_blocks"])
    return {key: values[key] for key in ("in_channels", "out_channels", "latent_channels")} | {
        "num_encoder_blocks": values["encoder_blocks"],
        "num_decoder_blocks": values["decoder_blocks"],
        "encoder_block_out_channels": widths,
        "decoder_block_out_channels": widths,
    }


def _written_levels(values: Mapping[str, Any], same: Sequence[str]) -> dict[str, Any]:
    attention = values["attention_levels"] or [False] * len(values["block_out_channels"])
    return {key: values[key] for key in same} | {
        "act_fn": "silu",
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attention],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in attention[::-1]],
    }
