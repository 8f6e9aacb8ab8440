"""A whole pipeline on disk: `pipeline.json` and a folder for each part that has weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from ldmkit.checkpoints.files import atomic_folder, read_json, write_json
from ldmkit.checkpoints.folders import is_diffusers_folder, read_folder
from ldmkit.checkpoints.formats import read_foreign
from ldmkit.checkpoints.hub import fetch, is_hub_name
from ldmkit.checkpoints.parts import DType, describe_part, load_part, write_part
from ldmkit.checkpoints.weights import WEIGHT_FILES
from ldmkit.config import Config
from ldmkit.errors import CheckpointError, InputError, InputTypeError, UnknownPartError
from ldmkit.interfaces import Part
from ldmkit.plugin.provenance import Saved, check_installed, name_to_load
from ldmkit.plugin.registry import registry

FORMAT = 1
INDEX = "pipeline.json"
MODULES = ("autoencoder", "denoiser", "conditioner")
OPTIONAL = ("upscaling",)
"""Settings that only some pipelines have."""
PROVIDERS = "providers"
"""Where the index says which distribution and version provided the parts that have no folder of their own."""


def write_pipeline(
    folder: Path, parts: Mapping[str, Part | None], settings: Mapping[str, Config], *, max_shard_size: int | None = None
) -> Path:
    """Write a pipeline's parts (by kind) and settings (by name); see `ldmkit.Pipeline.save_pretrained`."""
    from ldmkit import __version__

    index: dict[str, Any] = {"format": FORMAT, "ldmkit_version": __version__, "parts": dict.fromkeys(MODULES), PROVIDERS: {}}
    with atomic_folder(folder, stale=WEIGHT_FILES) as temporary:
        for kind, part in parts.items():
            if kind in MODULES and part is not None:
                (temporary / kind).mkdir()
                write_part(part, temporary / kind, max_shard_size=max_shard_size)
                index["parts"][kind] = kind
            elif part is not None:
                description = describe_part(part)
                index[kind] = {"name": description["name"], **description["config"]}
                index[PROVIDERS][kind] = {key: description[key] for key in ("distribution", "version")}
        write_json(temporary / INDEX, index | {name: config.to_dict() for name, config in settings.items()})
    return folder


def holds_pipeline(folder: Path) -> bool:
    """Whether a folder is one that `save_pretrained` or diffusers wrote."""
    return (folder / INDEX).is_file() or is_diffusers_folder(folder)


def resolve(name_or_folder: str | Path) -> Path:
    """Where a saved pipeline lies: a path, or the name of one that a plugin registers.

    Where both exist, the folder is meant if it holds a pipeline: a folder of pictures called "emoji" hides no model.

    Raises:
        UnknownPartError: when it is neither.
    """
    path = Path(name_or_folder)
    if holds_pipeline(path):
        return path
    if isinstance(name_or_folder, Path) or path.parent != Path() or path == Path():
        if path.exists():
            return path
        raise CheckpointError(f"{path} is not a folder")
    try:
        return Path(registry().load("pipeline", name_or_folder)())
    except UnknownPartError as error:
        if path.exists():
            return path
        raise UnknownPartError(f"{name_or_folder!r} is not a folder, and {error}") from None


def located(name_or_folder: Any, *, allow_download: bool, revision: str | None, variant: str | None) -> Any:
    """The folder of a model on the hub where that is asked for; anything else as it is.

    Raises:
        InputError: for a revision of what is not on the hub. CheckpointError: for a hub model that may not be fetched.
    """
    hub = isinstance(name_or_folder, str) and is_hub_name(name_or_folder) and not Path(name_or_folder).exists()
    if not hub and (revision is not None or allow_download):
        raise InputError(f"{name_or_folder!r} is no name on the hub, 'owner/model'; revision and allow_download are for these")
    if hub and not allow_download:
        raise CheckpointError(
            f"{name_or_folder} is not a folder. If it is a model on the Hugging Face hub: "
            "from_pretrained(..., allow_download=True, revision=COMMIT) fetches it"
        )
    return fetch(name_or_folder, revision=revision, variant=variant) if hub else name_or_folder


def read_pipeline(
    name_or_folder: str | Path,
    *,
    dtype: DType,
    device: torch.device | str,
    variant: str | None = None,
    strict: bool = True,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments that make a saved pipeline again; see `ldmkit.Pipeline.from_pretrained`.

    Args:
        variant, strict: for folders in the diffusers layout; see `ldmkit.checkpoints.folders`.
        without: parts not to read.
    """
    if not isinstance(name_or_folder, str | Path):
        raise InputTypeError(f"from_pretrained takes a folder or a name, got {type(name_or_folder).__name__}")
    folder = resolve(name_or_folder)
    if not (folder / INDEX).is_file() and is_diffusers_folder(folder):
        return read_folder(folder, dtype=dtype, device=device, variant=variant, strict=strict, without=without)
    if variant is not None or not strict:
        raise InputError(f"variant and strict are for folders in the diffusers layout, and {folder} is none")
    if not (folder / INDEX).is_file():
        foreign = read_foreign(folder, dtype=dtype, device=device)
        if foreign is not None:
            return foreign
        if not folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder, and no plugin's checkpoint format recognises it; single files that ldmkit itself "
                "knows are read by from_single_file"
            )
        files = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt"))
        hint = f"; {', '.join(files[:3])} in it: from_single_file reads such" if files else ""
        raise CheckpointError(
            f"{folder} is no pipeline: it has neither {INDEX}, as ldmkit writes it, nor model_index.json, as diffusers{hint}"
        )
    index = read_json(folder / INDEX)
    try:
        if index["format"] > FORMAT:
            raise CheckpointError(
                f"{folder / INDEX} has format {index['format']}; this ldmkit reads up to {FORMAT}: upgrade it"
            )
        arguments: dict[str, Any] = {key: index[key] for key in ("sampler", "schedule", "prediction", "defaults")}
        arguments |= {key: index[key] for key in OPTIONAL if key in index}
        present = {kind: index["parts"][kind] is not None for kind in MODULES}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / INDEX} lacks or mangles {error}; it is not a pipeline that save_pretrained wrote"
        ) from None
    read = [kind for kind in (*MODULES, "sampler") if kind not in without and present.get(kind, True)]
    saved = {kind: _saved(kind, index, folder) for kind in read}
    check_installed(registry(), list(saved.values()))  # all that has to be installed is said before any weights are read
    if "sampler" in saved:
        arguments["sampler"] = {**index["sampler"], "name": name_to_load(registry(), saved["sampler"])}
    for kind in (kind for kind in MODULES if kind not in without):
        arguments[kind] = load_part(folder / kind, kind=kind, dtype=dtype, device=device) if present[kind] else None
    return arguments


def _saved(kind: str, index: dict[str, Any], folder: Path) -> Saved:
    """What is recorded of a part: in its own folder, or in the index."""
    if kind in MODULES:
        path = folder / kind / "part.json"
        return Saved.read(kind, read_json(path), str(path))
    providers = index.get(PROVIDERS, {})
    if not isinstance(index[kind], dict) or not isinstance(providers, dict) or not isinstance(providers.get(kind, {}), dict):
        raise CheckpointError(f"{folder / INDEX}: {kind} and {PROVIDERS} must be mappings; it is damaged")
    return Saved.read(kind, {**providers.get(kind, {}), "name": index[kind].get("name")}, str(folder / INDEX))
