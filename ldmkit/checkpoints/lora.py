"""LoRA files => for each layer of a pipeline the two matrices and their scale, with every key accounted for."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.accounting import Accounting, Shape, grouped
from ldmkit.checkpoints.assembling import UnexpectedKeysWarning
from ldmkit.checkpoints.lora_files import SETTINGS, LoraFile, scale_of, settings_of
from ldmkit.checkpoints.lora_names import NUMBERED_CLASSES, Layers
from ldmkit.checkpoints.textual_inversion import BUNDLE
from ldmkit.errors import CheckpointError

EMBEDDING = "an embedding of textual inversion: load_textual_inversion loads it from the same file"
_OTHER_KINDS = re.compile(r"(hada_\w+|lokr_\w+|lora_mid|lora_embedding_[AB]|oft_\w+|\.diff(_b)?$|lora_B.*\.bias$)")


@dataclass(frozen=True)
class Pair:
    """The change of one layer's weight: scale * up @ down, as stored in the file.

    Attributes:
        magnitude: DoRA's, which the changed weight is brought to: of each output, (out, 1), or of each input, (1, in), with two
            more dimensions of 1 for a convolution; None for LoRA.
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None


def pairs_of(file: LoraFile, layers: Layers, *, model: str, strict: bool = True) -> tuple[dict[str, Pair], Accounting]:
    """What a file adds to each layer, by the layer's name in `Layers`.

    Raises:
        CheckpointError: for kinds of adapters that are neither LoRA nor DoRA, two keys for one matrix, NaN or infinity.
        ArchitectureMismatchError: listing every key that the pipeline has no place for, or of another shape.
    """
    _check_kinds(file)
    found: dict[str, dict[str, str]] = {}
    ignored: dict[str, str] = {}
    unexpected: dict[str, Shape] = {}
    for key, tensor in file.tensors.items():
        place = layers.place(key)
        if is_embedding(key, file.metadata):
            ignored[key] = EMBEDDING
        elif place is None:
            unexpected[key] = tuple(tensor.shape)
        elif (first := found.setdefault(place.layer, {}).setdefault(place.role, key)) != key:
            raise CheckpointError(f"{file.source}: {first} and {key} are both the {place.role} of {place.layer}")
    if not strict and unexpected:
        lines = "\n  ".join(grouped(unexpected))
        text = f"{file.source}: {len(unexpected)} keys are left out (strict=False)\n  {lines}"
        warnings.warn(text, UnexpectedKeysWarning, stacklevel=4)
        ignored |= dict.fromkeys(unexpected, "not known to the pipeline, and strict=False")
        unexpected = {}
    accounting = Accounting(
        source=file.source,
        model=model,
        mapped={f"{layer}.{role}": key for layer, keys in found.items() for role, key in keys.items()},
        ignored=ignored,
        missing={f"{layer}.{role}": () for layer, keys in found.items() for role in ("down", "up") if role not in keys},
        unexpected=unexpected,
    )
    if not accounting.missing:
        accounting = dataclasses.replace(accounting, misshapen=_misshapen(file, found, layers))
    accounting.check()
    if not found:
        raise CheckpointError(f"{file.source} holds no LoRA weights")
    _check_finite(file, accounting)
    return {layer: _pair(file, layer, keys, layers.by_name[layer]) for layer, keys in found.items()}, accounting


def is_embedding(key: str, metadata: Mapping[str, str]) -> bool:
    """Whether a key of a LoRA file is a word of textual inversion, as kohya and cloneofsimo store them."""
    return key.startswith(BUNDLE) or metadata.get(key) == "<embed>"


def _check_kinds(file: LoraFile) -> None:
    other = sorted({match[1].lstrip(".") for key in file.tensors if (match := _OTHER_KINDS.search(key))})
    if other:
        raise CheckpointError(
            f"{file.source} holds adapters of another kind ({', '.join(other)}); only pairs of down and up (LoRA, DoRA) are "
            "read, so merge it into a checkpoint with the tool that made it"
        )
    for component, known in NUMBERED_CLASSES.items():
        if any(key.startswith(f"{component}:") for key in file.tensors) and component in file.metadata:
            named = file.metadata[component]
            if set(re.findall(r'"(\w+)"', named)) != known:
                raise CheckpointError(
                    f"{file.source} numbers the layers of {named}; only the usual {sorted(known)} can be told from numbers"
                )


def _misshapen(file: LoraFile, found: Mapping[str, Mapping[str, str]], layers: Layers) -> dict[str, tuple[Shape, Shape]]:
    wrong = {}
    for name, keys in found.items():
        weight = layers.by_name[name].weight
        assert isinstance(weight, Tensor)
        down, up = (tuple(file.tensors[keys[role]].shape) for role in ("down", "up"))
        wanted_down, wanted_up = _wanted((down or (0,))[0], layers.by_name[name])
        for role, given, wanted in (("down", down, wanted_down), ("up", up, wanted_up)):
            if _plain(given) != _plain(wanted) or not given[0]:
                wrong[f"{name}.{role}"] = (given, wanted)
        if "alpha" in keys and (alpha := file.tensors[keys["alpha"]]).numel() != 1:
            wrong[f"{name}.alpha"] = (tuple(alpha.shape), ())
        if "magnitude" in keys and _magnitude_shape(file, keys["magnitude"], weight) is None:
            wrong[f"{name}.magnitude"] = (tuple(file.tensors[keys["magnitude"]].shape), (weight.shape[0], 1))
    return wrong


def _wanted(rank: int, layer: nn.Module) -> tuple[Shape, Shape]:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (rank, *weight.shape[1:]), (weight.shape[0], rank, *(1 for _ in weight.shape[2:]))


def _magnitude_shape(file: LoraFile, key: str, weight: Tensor) -> Shape | None:
    """A number for each output, as the paper and PEFT have it, or for each input, as other trainers may; None is neither."""
    shape, (out, into, *more) = tuple(file.tensors[key].shape), weight.shape
    count, ones = math.prod(shape), (1 for _ in more)
    if count == out and (not key.endswith(".dora_scale") or shape[0] == out):
        return (out, 1, *ones)
    if count == into and shape[:2] == (1, into) and key.endswith(".dora_scale"):
        return (1, into, *ones)
    return None


def _plain(shape: Shape) -> Shape:
    """A 1x1 convolution's weight is as good as a matrix: trainers write both."""
    return shape[:2] if set(shape[2:]) == {1} else shape


def _check_finite(file: LoraFile, accounting: Accounting) -> None:
    for key in accounting.mapped.values():
        tensor = file.tensors[key]
        if not tensor.is_floating_point() and not key.endswith(".alpha"):
            raise CheckpointError(f"{file.source}: {key} has dtype {tensor.dtype}; weights must be floating-point numbers")
        if bad := int((~torch.isfinite(tensor)).sum()):
            raise CheckpointError(f"{file.source}: {key} holds {bad} NaN or infinite numbers of {tensor.numel()}")


def _pair(file: LoraFile, name: str, keys: Mapping[str, str], layer: nn.Module) -> Pair:
    down, up = file.tensors[keys["down"]], file.tensors[keys["up"]]
    wanted_down, wanted_up = _wanted(len(down), layer)
    alpha = float(file.tensors[keys["alpha"]]) if "alpha" in keys else None
    scale = scale_of(file, name, keys["down"], alpha, len(down))
    return Pair(down.reshape(wanted_down).clone(), up.reshape(wanted_up).clone(), scale, _magnitude(file, name, keys, layer))


def _magnitude(file: LoraFile, name: str, keys: Mapping[str, str], layer: nn.Module) -> Tensor | None:
    if "magnitude" in keys:
        assert isinstance(layer.weight, Tensor)
        shape = _magnitude_shape(file, keys["magnitude"], layer.weight)
        assert shape is not None
        return file.tensors[keys["magnitude"]].reshape(shape).clone()
    if (settings_of(file, name) or {}).get("use_dora"):
        raise CheckpointError(f"{file.source}: {SETTINGS} says use_dora, and there is no lora_magnitude_vector of {name}")
    return None
