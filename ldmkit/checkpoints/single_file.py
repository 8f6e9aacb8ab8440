"""CompVis and Stability single files: recognised by keys and shapes, and made into parts without a network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.assembling import Source, UnexpectedKeysWarning, assemble
from ldmkit.checkpoints.families import family_of, scaling_of, settings_of
from ldmkit.checkpoints.files import read_json
from ldmkit.checkpoints.filling import DType, check_dtype
from ldmkit.checkpoints.found import Found
from ldmkit.checkpoints.pickles import is_pickle, read_pickle
from ldmkit.checkpoints.recognise import IGNORED, VAE, recognise
from ldmkit.checkpoints.recognise_unet import UNET
from ldmkit.checkpoints.tokenizers import BERT, CLIP, find_tokenizer
from ldmkit.checkpoints.weights import read_file
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError

KINDS = {"unet": "denoiser", "vae": "autoencoder"}
"""The part that a component belongs to; all others are the conditioner's."""
PLACES = {"unet": (f"{UNET}.",), "vae": (f"{VAE}.",)}
TEXTS = ("cond_stage_model.", "conditioner.")
VOCABULARIES = {"text_encoder": ("tokenizer", CLIP), "text_encoder_2": ("tokenizer_2", CLIP), "bert": ("tokenizer", BERT)}
"""The tokenizers' folders as diffusers names them, and what belongs there."""


def read_single_file(
    path: Path,
    *,
    dtype: DType,
    device: torch.device | str = "cpu",
    config: str | Path | Mapping[str, Any] | None = None,
    tokenizer: str | Path | None = None,
    allow_pickle: bool = False,
    ema: bool = False,
    strict: bool = True,
    given: Mapping[str, Any],
) -> dict[str, Any]:
    """The arguments that make a `Pipeline` of a file; see `ldmkit.Pipeline.from_single_file`.

    Args:
        given: the constructor's arguments that the caller replaces; what they replace is not read.
    """
    check_dtype(dtype)
    tensors = read_any(path, allow_pickle=allow_pickle)
    if ema:
        tensors = with_averages(tensors, path)
    found = recognised(tensors, path, config)
    _check_components(found, config)
    family = family_of(found)
    for component in found:
        if component.name == "vae":
            component.config.setdefault("scaling_factor", scaling_of(family, tensors, path))
    arguments: dict[str, Any] = {"accounting": {}, "conditioner": None}
    arguments |= settings_of(family, tensors, _override(config, "scheduler"), given, path)
    arguments["accounting"]["file"] = _account_for_the_rest(tensors, found, given, str(path), strict=strict)
    for kind in ("denoiser", "autoencoder", "conditioner"):
        own = [component for component in found if KINDS.get(component.name, "conditioner") == kind]
        if kind in given or (not own and kind == "conditioner"):
            continue
        if not own:
            raise CheckpointError(f"{path} holds no {kind}; pass {kind}=...")
        sources = {component.name: source_of(component, tensors, path) for component in own}
        texts = [VOCABULARIES[component.name] for component in own if component.name in VOCABULARIES]
        tokenizers = {folder: find_tokenizer(path, tokenizer, vocabulary) for folder, vocabulary in texts}
        part, accounting = assemble(kind, sources, tokenizers, dtype=dtype, device=device, strict=strict)
        arguments[kind], arguments["accounting"][kind] = part, accounting
    return arguments


def read_any(path: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a `.ckpt` where that is allowed. Raises: CheckpointError."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; from_pretrained reads those")
    if not path.is_file():
        raise CheckpointError(f"weights file {path} is missing")
    if not (path.suffix != ".safetensors" and is_pickle(path)):
        return read_file(path)
    if not allow_pickle:
        raise CheckpointError(
            f"{path} is a pickle, a format that can run code. allow_pickle=True reads it with torch's unpickler for tensors "
            "alone (weights_only), which runs none; a safetensors file of the same model is safer"
        )
    return read_pickle(path)


def recognised(tensors: Mapping[str, Tensor], path: Path, config: str | Path | Mapping[str, Any] | None = None) -> list[Found]:
    """The components of a file. Raises: ArchitectureMismatchError, ConfigError, as `recognise`, and naming the file."""
    try:
        return recognise({key: tuple(tensor.shape) for key, tensor in tensors.items()}, partial(_override, config))
    except ArchitectureMismatchError as error:
        raise ArchitectureMismatchError(f"{path}: {error}") from None


def with_averages(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The U-Net's weights replaced by their running averages, which the file has under names without dots.

    Raises:
        CheckpointError: where an average is missing.
    """
    result = dict(tensors)
    names = {key: "model_ema." + key.removeprefix("model.").replace(".", "") for key in tensors if key.startswith(f"{UNET}.")}
    lacking = [key for key, average in names.items() if average not in tensors]
    if lacking or not names:
        raise CheckpointError(
            f"{path}: ema=True, but {len(lacking)} of {len(names)} weights of the U-Net have no average"
            + (f", {lacking[0]} first" if lacking else "")
        )
    return result | {key: tensors[average] for key, average in names.items()}


# --------------------------------------------------------------------------------------------------------------- configuration


def _check_components(found: list[Found], config: str | Path | Mapping[str, Any] | None) -> None:
    """Raise ConfigError where `config` has values for components that the file does not have."""
    known = {component.name for component in found} | {"scheduler"}
    unknown = sorted(set(config) - known) if isinstance(config, Mapping) else []
    if unknown:
        raise ConfigError(f"config has {', '.join(map(repr, unknown))}; the file's components are {', '.join(sorted(known))}")


def _override(config: str | Path | Mapping[str, Any] | None, name: str) -> dict[str, Any]:
    """What `config` says of a component: a folder with `unet/config.json` and so on, or values by component."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        value = config.get(name, {})
    else:
        folder = Path(config)
        if not folder.is_dir():
            raise ConfigError(f"config = {str(config)!r} must be a folder in the diffusers layout, or values by component")
        names = ("vae", "vqvae") if name == "vae" else (name,)
        files = [folder / each / ("scheduler_config.json" if name == "scheduler" else "config.json") for each in names]
        value = next((read_json(file) for file in files if file.is_file()), {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"config: {name} = {value!r} must be a mapping")
    return {key: item for key, item in value.items() if not key.startswith("_") or name == "scheduler"}


# ----------------------------------------------------------------------------------------------------------------------- keys


def source_of(found: Found, tensors: Mapping[str, Tensor], path: Path) -> Source:
    """A component with the keys that are its own: those at its place in the file."""
    places = _places(found)
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(places)}
    return Source(found.class_name, found.config, own, str(path), found.keymap, {**IGNORED, **found.ignored})


def _places(found: Found) -> tuple[str, ...]:
    """What a component's keys begin with."""
    places = PLACES.get(found.name) or tuple({f"{rule.theirs.split('.')[0]}." for rule in found.keymap.rules})
    if places == ("conditioner.",):  # conditioner.embedders.0. and so on: each encoder has a number
        places = tuple({".".join(rule.theirs.split(".")[:3]) + "." for rule in found.keymap.rules})
    return places


def _account_for_the_rest(
    tensors: Mapping[str, Tensor], found: list[Found], given: Mapping[str, Any], path: str, *, strict: bool
) -> Accounting:
    """Keys at no component's place. Raises: ArchitectureMismatchError for those without a reason to be left out."""
    places = tuple(place for component in found for place in _places(component))
    places += TEXTS if "conditioner" in given else ()
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(places)}
    reasons = {key: next((why for pattern, why in IGNORED.items() if re.match(pattern, key)), None) for key in rest}
    unexpected = {key: tuple(rest[key].shape) for key, why in reasons.items() if why is None}
    accounting = Accounting(
        source=path,
        model="no part",
        mapped={},
        ignored={key: why for key, why in reasons.items() if why is not None},
        unexpected=unexpected,
    )
    if unexpected and not strict:
        warnings.warn(f"{accounting.report()}\n  left out (strict=False)", UnexpectedKeysWarning, stacklevel=4)
    elif unexpected:
        accounting.check()
    return accounting
