"""Folders in the diffusers layout, read: `model_index.json` and a folder for each component."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.checkpoints.assembling import Source, assemble
from ldmkit.checkpoints.compvis import clip_map
from ldmkit.checkpoints.files import read_object
from ldmkit.checkpoints.filling import DType, check_dtype
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.checkpoints.schedulers import read_betas, read_scheduler
from ldmkit.checkpoints.weights import read_weights
from ldmkit.errors import CheckpointError, ConfigError
from ldmkit.plugin.registry import build

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
PIXELS: Mapping[str, int] = {"DDPMPipeline": 1000, "DDIMPipeline": 50}
"""Pipelines of diffusers for models of pixels, which have no autoencoder, and the steps they take."""
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
    present, pipeline_class = components(folder, without), str(read_object(folder / INDEX).get("_class_name"))
    arguments: dict[str, Any] = {"accounting": {}, "conditioner": None}
    tokenizers = {name: folder / name for name in TOKENIZERS if name in present}
    for kind, names in COMPONENTS.items():
        if kind in without:
            continue
        sources = {name: source(folder / name, present[name], variant) for name in names if name in present}
        if sources:
            sources = {name: _rescaled(name, each, LOW_RES in present, pipeline_class) for name, each in sources.items()}
            part, accounting = assemble(kind, sources, tokenizers, dtype=dtype, device=device, strict=strict)
            arguments[kind], arguments["accounting"][kind] = part, accounting
        elif kind == "autoencoder" and pipeline_class in PIXELS:
            arguments[kind] = build(
                kind, "identity", channels=read_object(folder / "unet" / "config.json").get("in_channels", 3)
            )
        elif kind != "conditioner":
            raise CheckpointError(f"{folder / INDEX} names no {' or '.join(names)}; pass {kind}=...")
    if "scheduler" in present and not {"sampler", "schedule", "prediction"} <= set(without):
        arguments |= read_scheduler(read_object(folder / "scheduler" / "scheduler_config.json"))
    unet = read_object(folder / "unet" / "config.json") if "unet" in present else {}
    arguments["defaults"] = _defaults(unet, arguments.get("autoencoder"), pipeline_class)
    if pipeline_class == SUPER_RESOLUTION and "upscaling" not in without:
        arguments["upscaling"] = {}
        arguments["defaults"] |= SUPER_RESOLUTION_DEFAULTS
    if pipeline_class in PIXELS:
        arguments["defaults"] |= {"num_inference_steps": PIXELS[pipeline_class]}
    if LOW_RES in present and not {LOW_RES, "upscaling"} & set(without):
        schedule = read_betas(read_object(folder / LOW_RES / "scheduler_config.json"))
        noise = {"schedule": schedule, "max_level": read_object(folder / INDEX).get("max_noise_level", 350)}
        arguments["upscaling"] = {"noise": noise}
        arguments["defaults"] |= UPSCALER_DEFAULTS
    return arguments


def _rescaled(name: str, component: Source, low_res: bool, pipeline_class: str) -> Source:
    """An autoencoder with the scale that its pipeline in diffusers has, whatever its own config says; others as they are."""
    config = component.config
    if low_res and name == "vae":  # old copies of the x4 upscaler do not say it
        config = {"scaling_factor": UPSCALER_SCALING, **config}
    if pipeline_class == SUPER_RESOLUTION and name in COMPONENTS["autoencoder"]:
        config = {**config, "scaling_factor": 1.0}
    return dataclasses.replace(component, config=config)


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


def _defaults(unet: Mapping[str, Any], autoencoder: Any, pipeline_class: str) -> dict[str, Any]:
    """Sizes as diffusers has them, and its pipelines' guidance."""
    size = unet.get("sample_size")
    factor = getattr(autoencoder, "downscale", None)
    pixels = size * factor if isinstance(size, int) and factor else None
    xl = unet.get("addition_embed_type") == "text_time"
    scale = 1.0 if pipeline_class in (*LATENT_DIFFUSION, *PIXELS) else 5.0 if xl else 7.5
    return {"height": pixels, "width": pixels, "guidance_scale": scale}
