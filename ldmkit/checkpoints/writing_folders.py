"""Folders in the diffusers layout, written, so that diffusers loads them and `folders` reads them again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ldmkit.checkpoints.files import atomic_folder, write_json
from ldmkit.checkpoints.folders import COMPONENTS, INDEX, LATENT_DIFFUSION, LOW_RES, PIXELS, STEMS, SUPER_RESOLUTION
from ldmkit.checkpoints.foreign import Written
from ldmkit.checkpoints.schedulers import write_betas, write_scheduler
from ldmkit.checkpoints.weights import write_weights
from ldmkit.errors import ConfigError, InputError, OutputError
from ldmkit.interfaces import Part
from ldmkit.plugin.registry import registry

WEIGHT_FILES = tuple(f"{stem}{end}" for stem in STEMS for end in (".safetensors.index.json", ".safetensors", "-*.safetensors"))


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
    scheduler = _scheduler(parts["sampler"], settings)
    pipeline_class = _pipeline_class(parts, written, scheduler["_class_name"], noised)
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


def _pipeline_class(parts: Mapping[str, Any], written: Mapping[str, Any], scheduler: str, noised: bool | None) -> str:
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
    if not set(COMPONENTS["autoencoder"]) & written.keys():
        of_pixels = scheduler.replace("Scheduler", "Pipeline")
        if encoders or extra or of_pixels not in PIXELS:
            raise InputError(
                f"diffusers has no pipeline for pixels with the encoders {list(encoders)}, {extra} channels beside the pixels "
                f"and the scheduler {scheduler}: {' and '.join(PIXELS)} take none, and ddpm or ddim; save in our own format"
            )
        return of_pixels
    unconditional = any(component.class_name == "UNet2DModel" for component, _ in written.values())
    if (encoders, extra, noised) not in known or unconditional != (not encoders):
        upscaling = "" if noised is None else f" and upscaling {'with' if noised else 'without'} noise"
        raise InputError(
            f"diffusers has no pipeline for the encoders {list(encoders)}, {extra} channels beside the latents"
            f"{upscaling}; save in our own format"
        )
    return known[encoders, extra, noised]
