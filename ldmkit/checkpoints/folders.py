"""Folders in the diffusers layout, read and written: `model_index.json` and a folder for each component."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.assembling import Source, assemble
from ldmkit.checkpoints.compvis import clip_map
from ldmkit.checkpoints.files import atomic_folder, read_json, write_json
from ldmkit.checkpoints.filling import DType, check_dtype
from ldmkit.checkpoints.foreign import Written
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.checkpoints.schedulers import read_betas, read_scheduler, write_betas, write_scheduler
from ldmkit.checkpoints.weights import read_weights, write_weights
from ldmkit.errors import CheckpointError, ConfigError, InputError, OutputError
from ldmkit.interfaces import Part
from ldmkit.plugin.registry import registry

INDEX = "model_index.json"
STEMS = ("diffusion_pytorch_model", "model")
COMPONENTS: Mapping[str, tuple[str, ...]] = {
    "denoiser": ("unet",),
    "autoencoder": ("vae", "vqvae"),
    "conditioner": ("text_encoder", "text_encoder_2", "bert", "image_encoder"),
}
"""The components that make up our parts."""
SUPER_RESOLUTION = "LDMSuperResolutionPipeline"
"""Of diffusers, for latent diffusion's; it decodes latents as they are, whatever `scaling_factor` its autoencoder says."""
LATENT_DIFFUSION = ("LDMTextToImagePipeline", "LDMPipeline", SUPER_RESOLUTION)
"""Pipelines of diffusers for the originals of latent diffusion."""
TOKENIZERS = ("tokenizer", "tokenizer_2", "feature_extractor")
"""Folders without weights that a conditioner reads."""
LOW_RES = "low_res_scheduler"
"""Of the x4 upscaler: the noise of the small picture."""
SKIPPED = {
    "safety_checker": "it looks at finished pictures and has no part in making them",
    "feature_extractor": "it prepares pictures for the safety checker",
    "image_encoder": "beside a text encoder, it is for image prompts, which are no part of this pipeline",
    "watermark": "it marks finished pictures",
    "watermarker": "it marks finished pictures",
}
"""Components that are left out, and why."""
UPSCALER_DEFAULTS = {"guidance_scale": 9.0, "num_inference_steps": 75}
"""Of diffusers' x4 upscaler."""
UPSCALER_SCALING = 0.08333
"""Of its latents."""
SUPER_RESOLUTION_DEFAULTS = {"num_inference_steps": 100}
"""Of diffusers' super-resolution by latent diffusion."""
IGNORED = {r"(.*\.)?position_ids$": "a constant, 0 to 76, that old versions stored"}
WEIGHT_FILES = tuple(f"{stem}{end}" for stem in STEMS for end in (".safetensors.index.json", ".safetensors", "-*.safetensors"))
_LEGACY = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of the autoencoder's attention in files from before diffusers 0.15."""


def is_diffusers_folder(folder: Path) -> bool:
    """Whether it holds a `model_index.json`."""
    return (folder / INDEX).is_file()


def read_folder(
    folder: Path,
    *,
    dtype: DType,
    device: torch.device | str = "cpu",
    variant: str | None = None,
    strict: bool = True,
    without: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments that make a `Pipeline` of a folder; with them, as "accounting", that of each part.

    Args:
        variant: "fp16" reads `*.fp16.safetensors`.
        strict: whether keys that a part does not have are an error; else they are left out with a warning.
        without: parts, and components with no part in this pipeline, that are not wanted.

    Raises:
        CheckpointError, ArchitectureMismatchError: for files that are missing, damaged or do not fit.
        ConfigError, UnknownPartError: for components or settings that cannot be served, by name.
    """
    check_dtype(dtype)
    present, pipeline_class = components(folder, without), read_object(folder / INDEX).get("_class_name")
    arguments: dict[str, Any] = {"accounting": {}, "conditioner": None}
    tokenizers = {name: folder / name for name in TOKENIZERS if name in present}
    for kind, names in COMPONENTS.items():
        sources = {
            name: source(folder / name, present[name], variant) for name in names if name in present and kind not in without
        }
        if not sources and kind not in without and kind != "conditioner":
            raise CheckpointError(f"{folder / INDEX} names no {' or '.join(names)}; pass {kind}=...")
        if LOW_RES in present and "vae" in sources:  # which old copies of the x4 upscaler do not say, and diffusers knows
            told = {"scaling_factor": UPSCALER_SCALING, **sources["vae"].config}
            sources["vae"] = dataclasses.replace(sources["vae"], config=told)
        if pipeline_class == SUPER_RESOLUTION and kind == "autoencoder":
            unscaled = {"scaling_factor": 1.0}
            sources = {name: dataclasses.replace(each, config={**each.config, **unscaled}) for name, each in sources.items()}
        if sources:
            part, accounting = assemble(kind, sources, tokenizers, dtype=dtype, device=device, strict=strict)
            arguments[kind], arguments["accounting"][kind] = part, accounting
    if "scheduler" in present and not {"sampler", "schedule", "prediction"} <= set(without):
        arguments |= read_scheduler(read_object(folder / "scheduler" / "scheduler_config.json"))
    unet = read_object(folder / "unet" / "config.json") if "unet" in present else {}
    arguments["defaults"] = _defaults(unet, arguments.get("autoencoder"), pipeline_class)
    if pipeline_class == SUPER_RESOLUTION and "upscaling" not in without:
        arguments["upscaling"] = {}
        arguments["defaults"] |= SUPER_RESOLUTION_DEFAULTS
    if LOW_RES in present and not {LOW_RES, "upscaling"} & set(without):
        schedule = read_betas(read_object(folder / LOW_RES / "scheduler_config.json"))
        noise = {"schedule": schedule, "max_level": read_object(folder / INDEX).get("max_noise_level", 350)}
        arguments["upscaling"] = {"noise": noise}
        arguments["defaults"] |= UPSCALER_DEFAULTS
    return arguments


def components(folder: Path, without: Collection[str]) -> dict[str, str]:
    """Name and class of the components to read. Raises: ConfigError for those whose purpose is not known."""
    index = read_object(folder / INDEX)
    given = {
        name: value
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value != [None, None]
    }
    wanted = {name for names in COMPONENTS.values() for name in names} | {*TOKENIZERS, "scheduler", LOW_RES}
    if "image_encoder" not in given or {"text_encoder", "text_encoder_2"} & given.keys():
        wanted -= {"image_encoder", "feature_extractor"}
    unknown = [name for name in given if name not in wanted | SKIPPED.keys() | set(without)]
    if unknown:
        raise ConfigError(
            f"{folder / INDEX}: component {', '.join(map(repr, unknown))} is none that is known here; "
            f"from_pretrained(..., {unknown[0]}=None) loads the rest without it"
        )
    odd = [name for name, value in given.items() if name in wanted and not all(isinstance(item, str) for item in value)]
    if odd:
        raise CheckpointError(f"{folder / INDEX}: {odd[0]} = {given[odd[0]]!r} must be the names of a library and a class")
    return {name: value[1] for name, value in given.items() if name in wanted}


def source(folder: Path, class_name: str, variant: str | None) -> Source:
    """One component's config and tensors, mapped into memory. Raises: CheckpointError."""
    config = read_object(folder / "config.json")
    stems = [stem for stem in STEMS if any(folder.glob(f"{stem}*.safetensors*"))]
    if not stems:
        pickles = sorted(path.name for pattern in ("*.bin", "*.ckpt", "*.pt") for path in folder.glob(pattern))
        raise CheckpointError(
            f"{folder} holds no safetensors file"
            + (
                f", only {', '.join(pickles)}; pickles can run code and are not read from folders: convert it"
                if pickles
                else ""
            )
        )
    tensors = read_weights(folder, stem=stems[0], variant=variant)
    return Source(class_name, config, tensors, str(folder), _names(class_name, tensors), IGNORED)


def _names(class_name: str, tensors: Mapping[str, Tensor]) -> KeyMap:
    """Older names in a file <-> the layout's."""
    if class_name.startswith("CLIPText"):
        return clip_map(nested=any(key.startswith("text_model.") for key in tensors))
    paths = {match[1]: match[2] for key in tensors if (match := re.match(r"((?:.*\.)?attentions\.\d+\.(\w+))\.", key))}
    legacy = [Rule(path, path[: -len(old)] + _LEGACY[old], axes=2) for path, old in paths.items() if old in _LEGACY]
    return KeyMap([Rule("", ""), *legacy])


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises: CheckpointError."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds a {type(value).__name__}")
    return value


def _defaults(unet: Mapping[str, Any], autoencoder: Any, pipeline_class: Any) -> dict[str, Any]:
    """Sizes as diffusers has them, and its pipelines' guidance."""
    size = unet.get("sample_size")
    factor = getattr(autoencoder, "downscale", None)
    pixels = size * factor if isinstance(size, int) and factor else None
    xl = unet.get("addition_embed_type") == "text_time"
    scale = 1.0 if pipeline_class in LATENT_DIFFUSION else 5.0 if xl else 7.5
    return {"height": pixels, "width": pixels, "guidance_scale": scale}


# ----------------------------------------------------------------------------------------------------------------- writing


def write_folder(
    folder: Path, parts: Mapping[str, Part | None], settings: Mapping[str, Any], *, max_shard_size: int | None = None
) -> Path:
    """Write a pipeline's parts (by kind) and settings (by name) so that diffusers loads them.

    Raises:
        ConfigError: naming what diffusers has no counterpart for, before anything is written.
        OutputError: where the folder cannot be written.
    """
    written: dict[str, tuple[Written, Part]] = {}
    for kind in COMPONENTS:
        part = parts.get(kind)
        if part is None:
            continue
        if not hasattr(part, "to_diffusers"):
            raise ConfigError(f"the {kind} {type(part).__name__} has no counterpart in diffusers; save in our own format")
        written |= {name: (component, part) for name, component in part.to_diffusers().items()}
    low_res = settings["upscaling"].to_dict()["noise"] if "upscaling" in settings else None
    noised = low_res is not None if "upscaling" in settings else None
    scheduler, pipeline_class = _scheduler(parts["sampler"], settings), _pipeline_class(parts, written, noised)
    written = _placed(written, pipeline_class)
    height, downscale = settings["defaults"].height, getattr(parts["autoencoder"], "downscale", 1)
    sample_size = None if height is None else height // downscale
    with atomic_folder(folder, stale=WEIGHT_FILES) as temporary:
        for name, (component, part) in written.items():
            (temporary / name).mkdir()
            _write_component(temporary / name, component, part, max_shard_size, sample_size)
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        if low_res is not None:
            (temporary / LOW_RES).mkdir()
            write_json(temporary / LOW_RES / "scheduler_config.json", write_betas(low_res["schedule"]))
        index: dict[str, Any] = {"_class_name": pipeline_class, "_diffusers_version": "0.35.0"}
        index |= {name: [component.library, component.class_name] for name, (component, _) in written.items()}
        index["scheduler"] = ["diffusers", scheduler["_class_name"]]
        if low_res is not None:
            index |= {LOW_RES: ["diffusers", "DDPMScheduler"], "max_noise_level": low_res["max_level"]}
            index |= {name: [None, None] for name in ("safety_checker", "feature_extractor", "watermarker")}
        elif {"text_encoder", "image_encoder"} & written.keys() and "text_encoder_2" not in written:
            nothing = {name: [None, None] for name in ("safety_checker", "feature_extractor") if name not in written}
            index |= {**nothing, "requires_safety_checker": False}
        write_json(temporary / INDEX, index)
    return folder


def _placed(written: dict[str, Any], pipeline_class: str) -> dict[str, Any]:
    """The components under the names of this pipeline's: the latent-diffusion originals call every autoencoder `vqvae`.

    Raises:
        InputError: for an autoencoder that the pipeline does not take, or whose scale it passes over.
    """
    place = "vqvae" if pipeline_class in LATENT_DIFFUSION else "vae"
    result = {place if name in COMPONENTS["autoencoder"] else name: value for name, value in written.items()}
    if place == "vae" and any(component.class_name == "VQModel" for component, _ in written.values()):
        raise InputError(f"diffusers' {pipeline_class} takes no VQModel as its autoencoder; save in our own format")
    if pipeline_class == SUPER_RESOLUTION and (scale := result[place][0].config["scaling_factor"]) != 1:
        raise InputError(
            f"diffusers' {pipeline_class} decodes latents unscaled, and scaling_factor = {scale}; use our own format"
        )
    return result


def _scheduler(sampler: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    _, component = registry().offer_of(type(sampler))
    defaults = type(sampler.config)().to_dict()
    schedule, prediction = settings["schedule"].to_dict(), settings["prediction"].to_dict()
    return write_scheduler(component.name, sampler.config.to_dict(), defaults, schedule, prediction)


def _write_component(folder: Path, component: Written, part: Any, limit: int | None, sample_size: int | None) -> None:
    for file, content in component.files.items():
        try:
            if isinstance(content, Path):
                shutil.copyfile(content, folder / file)
            else:
                (folder / file).write_bytes(content)
        except OSError as error:
            raise OutputError(f"cannot write {folder / file}: {error.strerror or error}") from error
    if component.config is None:
        return
    config = dict(component.config)
    if component.library == "diffusers":
        config = {"_class_name": component.class_name, **config}
        if folder.name == "unet":
            config["sample_size"] = sample_size
    write_json(folder / "config.json", config)
    assert isinstance(part, nn.Module)
    own = {key: tensor for key, tensor in part.state_dict().items() if component.names.source(key) is not None}
    write_weights(folder, component.names.restore(own), max_shard_size=limit, stem=STEMS[component.library != "diffusers"])


def _pipeline_class(parts: Mapping[str, Any], written: Mapping[str, Any], noised: bool | None) -> str:
    """The pipeline of diffusers that serves these components. Raises: InputError where there is none.

    Args:
        noised: whether it noises the small picture; None = it does not upscale.
    """
    encoders = tuple(name for name in COMPONENTS["conditioner"] if name in written)
    extra = getattr(parts["denoiser"].config, "spatial_channels", 0)
    known = {
        ((), 0, None): "LDMPipeline",
        ((), 3, False): SUPER_RESOLUTION,
        (("bert",), 0, None): "LDMTextToImagePipeline",
        (("text_encoder",), 0, None): "StableDiffusionPipeline",
        (("text_encoder",), 5, None): "StableDiffusionInpaintPipeline",
        (("text_encoder",), 3, True): "StableDiffusionUpscalePipeline",
        (("text_encoder", "text_encoder_2"), 0, None): "StableDiffusionXLPipeline",
        (("text_encoder", "text_encoder_2"), 5, None): "StableDiffusionXLInpaintPipeline",
        (("text_encoder_2",), 0, None): "StableDiffusionXLImg2ImgPipeline",
        (("image_encoder",), 0, None): "StableDiffusionImageVariationPipeline",
    }
    unconditional = any(component.class_name == "UNet2DModel" for component, _ in written.values())
    if (encoders, extra, noised) not in known or unconditional != (not encoders):
        upscaling = "" if noised is None else f" and upscaling {'with' if noised else 'without'} noise"
        raise InputError(
            f"diffusers has no pipeline for the encoders {list(encoders)}, {extra} channels beside the latents"
            f"{upscaling}; save in our own format"
        )
    return known[encoders, extra, noised]
