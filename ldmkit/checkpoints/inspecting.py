"""What a file or a folder is, from headers and configs: no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldmkit.checkpoints.assembling import prepare
from ldmkit.checkpoints.families import family_of
from ldmkit.checkpoints.files import read_json, read_object
from ldmkit.checkpoints.folders import COMPONENTS, TOKENIZERS, components, is_diffusers_folder, source
from ldmkit.checkpoints.lora import EMBEDDING, is_embedding
from ldmkit.checkpoints.lora_files import LoraFile, read_lora
from ldmkit.checkpoints.lora_names import describe
from ldmkit.checkpoints.pickles import is_pickle, read_pickle
from ldmkit.checkpoints.recognise import IGNORED
from ldmkit.checkpoints.schedulers import read_scheduler
from ldmkit.checkpoints.single_file import read_any, recognised
from ldmkit.checkpoints.textual_inversion import read_textual_inversion
from ldmkit.checkpoints.weights import read_weights
from ldmkit.errors import CheckpointError, LdmkitError

FAMILIES = {
    "sd1": "Stable Diffusion 1",
    "sd2": "Stable Diffusion 2",
    "xl": "Stable Diffusion XL",
    "x4": "Stable Diffusion x4 upscaler",
    "ldm-text": "latent diffusion, text to image",
    "ldm-class": "latent diffusion, class-conditional",
    "ldm-sr": "latent diffusion, super-resolution",
    "ldm": "latent diffusion, unconditional",
}
PREDICTIONS = {"sd1": "epsilon", "sd2": "epsilon or v_prediction: keys do not tell", "x4": "v_prediction"}


@dataclass(frozen=True)
class Component:
    """One component: its name and class, and what its tensors amount to."""

    name: str
    class_name: str
    keys: int
    parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        path: the file or folder.
        layout: "CompVis single file", "diffusers folder" or "ldmkit folder".
        architecture: in words.
        prediction: what the denoiser predicts, where that can be known.
        components: with their sizes.
        ignored: keys that loading leaves out, and why.
        unknown: keys that nothing is known of.
        problems: why it, or a component of it, cannot be loaded as it is.
    """

    path: str
    layout: str
    architecture: str
    prediction: str
    components: list[Component]
    ignored: Mapping[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def inspect(path: Path, *, allow_pickle: bool = False, variant: str | None = None) -> Inspection:
    """Look at a single file, a LoRA, an embedding, a folder in the diffusers layout, or one of our own.

    Raises:
        CheckpointError: for what is missing, damaged or none of these. ArchitectureMismatchError: for an unknown file.
    """
    if not path.is_dir():
        return inspect_addition(path, allow_pickle=allow_pickle) or _file(path, allow_pickle)
    if is_diffusers_folder(path):
        return _diffusers(path, variant)
    if (path / "pipeline.json").is_file():
        return _own(path)
    raise CheckpointError(f"{path} holds neither model_index.json (diffusers) nor pipeline.json (ldmkit)")


def inspect_addition(path: Path, *, allow_pickle: bool) -> Inspection | None:
    """A LoRA, or words of textual inversion; None for a file that is neither."""
    if is_pickle(path):
        if not allow_pickle:
            return None
        try:
            file = LoraFile(str(path), read_pickle(path))
        except CheckpointError:
            return None
    else:
        file = read_lora(path)
    tensors, told = file.tensors, {key: describe(key) for key in file.tensors}
    if any(found is not None and found[2] == "down" for found in told.values()):
        parts: dict[str, dict[str, Tensor]] = {}
        for key, found in told.items():
            if found is not None:
                parts.setdefault(found[0], {})[key] = tensors[key]
        embeddings = {key: EMBEDDING for key in tensors if is_embedding(key, file.metadata)}
        return Inspection(
            path=str(path),
            layout=" and ".join(dict.fromkeys(found[1] for found in told.values() if found is not None)),
            architecture=_lora_for(tensors, told),
            prediction="nothing: it is added to a model",
            components=[_component(name or "not named", "LoRA", part) for name, part in sorted(parts.items(), reverse=True)],
            ignored=embeddings,
            unknown=[key for key, found in told.items() if found is None and key not in embeddings],
        )
    try:
        words = read_textual_inversion(path, allow_pickle=allow_pickle)
    except LdmkitError:
        return None
    sizes = {}
    for word, each in words.items():
        sizes[word] = ", ".join(f"{name} {len(x)} x {x.shape[1]}".strip() for name, x in sorted(each.items(), reverse=True))
    lines = [_component(word, sizes[word], each) for word, each in words.items()]
    return Inspection(str(path), "embeddings of words", "textual inversion", "nothing: it is added to a model", lines)


def _lora_for(tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> str:
    """Ranks, and the model by the width of the texts that its cross-attention looks at."""
    downs = [key for key, found in told.items() if found is not None and found[2] == "down" and tensors[key].ndim > 1]
    ranks = sorted({len(tensors[key]) for key in downs})
    widths = {tensors[key].shape[1] for key in downs if re.search(r"attn2[._].*to_[kv]|^unet:[67]:", key)}
    names = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}
    known = [names[width] for width in sorted(widths) if width in names]
    return f"LoRA of rank {', '.join(map(str, ranks))}" + (f" for {known[0]}" if len(known) == 1 else "")


def _file(path: Path, allow_pickle: bool) -> Inspection:
    tensors = read_any(path, allow_pickle=allow_pickle)
    found = recognised(tensors, path)
    family = family_of(found)
    own: dict[str, dict[str, Tensor]] = {component.name: {} for component in found}
    ignored, unknown = {}, []
    patterns = {**IGNORED, **{pattern: why for component in found for pattern, why in component.ignored.items()}}
    for key, tensor in tensors.items():
        reason = next((why for pattern, why in patterns.items() if re.match(pattern, key)), None)
        owner = next((component.name for component in found if component.keymap.targets(key)), None)
        if reason is not None:
            ignored[key] = reason
        elif owner is not None:
            own[owner][key] = tensor
        else:
            unknown.append(key)
    unet = next((component.config for component in found if component.name == "unet"), {})
    inpainting = ", inpainting" if unet.get("in_channels") == 9 else ""
    prediction = PREDICTIONS.get(family, "v_prediction" if "v_pred" in tensors else "epsilon")
    return Inspection(
        path=str(path),
        layout=f"single file ({'pickle' if path.suffix != '.safetensors' and is_pickle(path) else 'safetensors'})",
        architecture=FAMILIES[family] + inpainting,
        prediction=prediction,
        components=[_component(component.name, component.class_name, own[component.name]) for component in found],
        ignored=ignored,
        unknown=unknown,
    )


def _diffusers(folder: Path, variant: str | None) -> Inspection:
    index = read_object(folder / "model_index.json")
    present = components(folder, without=index)  # so that components of no known purpose stop nothing here
    tokenizers = {name: folder / name for name in TOKENIZERS if name in present}
    lines: list[Component] = []
    ignored: dict[str, str] = {}
    unknown: list[str] = []
    problems: list[str] = []
    for kind, names in COMPONENTS.items():
        try:
            sources = {name: source(folder / name, present[name], variant) for name in names if name in present}
            lines += [_component(name, item.class_name, item.tensors) for name, item in sources.items()]
            if sources:
                _, _, accounting = prepare(kind, sources, tokenizers)
                ignored |= {f"{kind}: {key}": why for key, why in accounting.ignored.items()}
                unknown += [f"{kind}: {key}" for key in accounting.unexpected]
                accounting.check()
        except LdmkitError as error:
            problems.append(str(error))
    prediction = "not told"
    if "scheduler" in present:
        try:
            prediction = read_scheduler(read_object(folder / "scheduler" / "scheduler_config.json"))["prediction"]["type"]
        except LdmkitError as error:
            problems.append(str(error))
    return Inspection(
        str(folder), "diffusers folder", str(index.get("_class_name")), prediction, lines, ignored, unknown, problems
    )


def _own(folder: Path) -> Inspection:
    index = read_json(folder / "pipeline.json")
    try:
        kinds = [kind for kind, place in index["parts"].items() if place is not None]
        prediction = str(index["prediction"]["type"])
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'pipeline.json'} lacks or mangles {error}") from None
    lines, names = [], []
    for kind in kinds:
        part = read_json(folder / kind / "part.json")
        name = str(part.get("name")) if isinstance(part, dict) else "?"
        names.append(f"{kind} {name}")
        lines.append(_component(kind, name, read_weights(folder / kind)))
    return Inspection(str(folder), "ldmkit folder", ", ".join(names), prediction, lines)


def _component(name: str, class_name: str, tensors: Mapping[str, Tensor]) -> Component:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    parameters = sum(tensor.numel() for tensor in tensors.values() if tensor.is_floating_point())
    return Component(name, class_name, len(tensors), parameters, tuple(dtypes))
