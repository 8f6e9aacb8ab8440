"""Families of single files: the numbers that their models share, and that files lack or hold as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ldmkit.checkpoints.folders import SUPER_RESOLUTION_DEFAULTS, UPSCALER_DEFAULTS, UPSCALER_SCALING
from ldmkit.checkpoints.found import Found
from ldmkit.checkpoints.schedulers import read_scheduler
from ldmkit.errors import CheckpointError, ConfigError, InputError

ORIGINALS = ("ldm", "ldm-class", "ldm-sr")
"""Families whose models differ in betas."""
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UPSCALER_BETAS: Mapping[str, Any] = {**BETAS, "beta_start": 0.0001, "beta_end": 0.02}
"""Of its latents and of the small picture, by its published configuration."""
SCHEDULE: Mapping[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


def family_of(found: list[Found]) -> str:
    """ "xl", "x4", "sd2", "sd1", "ldm-text", "ldm-class", "ldm-sr" or "ldm": models that share numbers which files lack."""
    names = {component.name: component for component in found}
    unet = names["unet"].config if "unet" in names else {}
    if unet.get("addition_embed_type") or "text_encoder_2" in names:
        return "xl"
    if unet.get("num_class_embeds") and "text_encoder" in names:
        return "x4"
    if "text_encoder" not in names:
        taken, made = unet.get("in_channels"), unet.get("out_channels")
        told = taken - made if isinstance(taken, int) and isinstance(made, int) else 0
        if told and "vae" in names and told == names["vae"].config["in_channels"]:
            return "ldm-sr"
        return "ldm-text" if "bert" in names else "ldm-class" if "class_embedder" in names else "ldm"
    return "sd2" if names["text_encoder"].config["hidden_act"] == "gelu" else "sd1"


def scaling_of(family: str, tensors: Mapping[str, Tensor], path: Path) -> float:
    """Latents' scale: stored in the latent-diffusion originals, published for the others. Raises: CheckpointError."""
    stored = tensors.get("scale_factor")
    if stored is not None and (stored.numel() != 1 or stored.is_complex()):
        raise CheckpointError(f"{path}: scale_factor must be one number, and is {tuple(stored.shape)} of {stored.dtype}")
    if stored is not None:
        return float(stored)
    return {"xl": 0.13025, "x4": UPSCALER_SCALING, **dict.fromkeys(ORIGINALS, 1.0)}.get(family, 0.18215)


def settings_of(
    family: str, tensors: Mapping[str, Tensor], scheduler: Mapping[str, Any], given: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Sampler, schedule, prediction and sizes.

    Args:
        scheduler: the values of a `scheduler_config.json`, which go before all that is known of the family; {} = none.
        given: the constructor's arguments that the caller replaces.
        path: for messages.

    Raises:
        InputError, ConfigError: for what neither file nor family tells, and is not given.
    """
    read: dict[str, Any] = read_scheduler(scheduler) if scheduler else {}
    if "schedule" not in read:
        read["sampler"] = {"name": "euler" if family == "xl" else "ddim"}
        read["schedule"] = _schedule(family, tensors, given, path)
        read["prediction"] = {"type": _prediction(family, tensors, given, path)}
    prediction = given.get("prediction", read["prediction"]["type"])
    sizes = {"xl": 1024, "sd1": 512, "x4": None, "ldm-sr": None, **dict.fromkeys(("ldm", "ldm-class", "ldm-text"), 256)}
    size = sizes.get(family, 768 if prediction == "v_prediction" else 512)
    read["defaults"] = {"height": size, "width": size, "guidance_scale": 5.0 if family == "xl" else 7.5}
    if family == "ldm-sr":
        read["defaults"] |= SUPER_RESOLUTION_DEFAULTS
        read |= {} if "upscaling" in given else {"upscaling": {}}
    if family == "x4":
        read["defaults"] |= UPSCALER_DEFAULTS
    if family == "x4" and "upscaling" not in given:
        stored = tensors.get("low_scale_model.betas")
        betas = UPSCALER_BETAS if stored is None else _line(stored)
        if betas is None:
            raise ConfigError(f"{path}: low_scale_model.betas follow no schedule that is known here; pass upscaling=...")
        read["upscaling"] = {"noise": {"schedule": betas}}
    return read


def _prediction(family: str, tensors: Mapping[str, Tensor], given: Mapping[str, Any], path: Path) -> str:
    if "v_pred" in tensors or family == "x4":
        return "v_prediction"
    if family == "sd2" and "prediction" not in given:
        raise InputError(
            f"{path} is a Stable Diffusion 2 model, and keys do not tell what it predicts: pass prediction='v_prediction' for "
            "the 768-pixel models, or prediction='epsilon' for the 512-pixel base and inpainting models"
        )
    return "epsilon"


def _schedule(family: str, tensors: Mapping[str, Tensor], given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """As the file's betas have it; else Stable Diffusion's. The originals differ, so there the betas are needed."""
    marked = {"rescale_betas_zero_snr": True} if "ztsnr" in tensors else {}
    stored = tensors.get("betas")
    if stored is None:
        if family in ORIGINALS and "schedule" not in given:
            raise InputError(
                f"{path} holds no betas, and latent-diffusion models differ in theirs: pass schedule={{'beta_start': ..., "
                "'beta_end': ..., 'beta_schedule': ...}} (0.0015, 0.0195 and 'scaled_linear' for most)"
            )
        return {**SCHEDULE, **marked, **(UPSCALER_BETAS if family == "x4" else BETAS)}
    betas = _line(stored)
    if betas is not None:
        return {**SCHEDULE, **marked, **betas}
    if "schedule" in given:
        return {}
    raise ConfigError(f"{path}: its betas follow neither a linear nor a scaled linear schedule; pass schedule=...")


def _line(stored: Tensor) -> dict[str, Any] | None:
    """The settings that betas were made by; None for those of neither a linear nor a scaled linear schedule."""
    if stored.ndim != 1 or len(stored) < 2 or stored.is_complex():
        return None
    betas = stored.double().numpy()
    if not 0 < betas[0] <= betas[-1] < 1:
        return None
    for name, power in (("scaled_linear", 0.5), ("linear", 1.0)):
        line = np.linspace(betas[0] ** power, betas[-1] ** power, len(betas)) ** (1 / power)
        if np.allclose(line, betas, rtol=1e-5, atol=0):  # float32 roundings of the same line
            ends = {"beta_start": _short(betas[0]), "beta_end": _short(betas[-1])}
            return {**ends, "beta_schedule": name, "num_train_timesteps": len(betas)}
    return None


def _short(value: float) -> float:
    """The number of few digits that float32 made this of."""
    return float(f"{value:.6g}")
