"""CompVis and Stability single files: recognised by keys and shapes, and made into parts without a network."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.assembling import Source, UnexpectedKeysWarning, assemble
from ldmkit.checkpoints.files import read_json
from ldmkit.checkpoints.filling import DType, check_dtype
from ldmkit.checkpoints.folders import SUPER_RESOLUTION_DEFAULTS, UPSCALER_DEFAULTS, UPSCALER_SCALING
from ldmkit.checkpoints.found import Found
from ldmkit.checkpoints.pickles import is_pickle, read_pickle
from ldmkit.checkpoints.recognise import IGNORED, VAE, recognise
from ldmkit.checkpoints.recognise_unet import UNET
from ldmkit.checkpoints.schedulers import read_scheduler
from ldmkit.checkpoints.tokenizers import BERT, CLIP, find_tokenizer
from ldmkit.checkpoints.weights import read_file
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, InputError

KINDS = {"unet": "denoiser", "vae": "autoencoder"}
"""The part that a component belongs to; all others are the conditioner's."""
PLACES = {"unet": (f"{UNET}.",), "vae": (f"{VAE}.",)}
TEXTS = ("cond_stage_model.", "conditioner.")
VOCABULARIES = {"text_encoder": ("tokenizer", CLIP), "text_encoder_2": ("tokenizer_2", CLIP), "bert": ("tokenizer", BERT)}
"""The tokenizers' folders as diffusers names them, and what belongs there."""
ORIGINALS = ("ldm", "ldm-class", "ldm-sr")
"""Families whose models differ in betas."""
BETAS: Mapping[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
UPSCALER_BETAS: Mapping[str, Any] = {**BETAS, "beta_start": 0.0001, "beta_end": 0.02}
"""Of its latents and of the small picture, by its published configuration."""
SCHEDULE: Mapping[str, Any] = {"timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}


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
            component.config.setdefault("scaling_factor", _scaling(family, tensors))
    arguments: dict[str, Any] = {"accounting": {}, "conditioner": None}
    arguments |= _settings(family, tensors, _override(config, "scheduler"), given, path)
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


def _scaling(family: str, tensors: Mapping[str, Tensor]) -> float:
    """Latents' scale: stored in the latent-diffusion originals, published for the others."""
    stored = tensors.get("scale_factor")
    if stored is not None and stored.numel() == 1:
        return float(stored)
    return {"xl": 0.13025, "x4": UPSCALER_SCALING, **dict.fromkeys(ORIGINALS, 1.0)}.get(family, 0.18215)


def _settings(
    family: str, tensors: Mapping[str, Tensor], scheduler: Mapping[str, Any], given: Mapping[str, Any], path: Path
) -> dict[str, Any]:
    """Sampler, schedule, prediction and sizes."""
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
    betas = stored.double().numpy()
    steps = len(betas) if betas.ndim == 1 else 0
    for name, power in (("scaled_linear", 0.5), ("linear", 1.0)):
        line = np.linspace(betas[0] ** power, betas[-1] ** power, steps) ** (1 / power) if steps > 1 and betas[0] > 0 else None
        if line is not None and np.allclose(line, betas, rtol=1e-5, atol=0):  # float32 roundings of the same line
            ends = {"beta_start": _short(betas[0]), "beta_end": _short(betas[-1])}
            return {**ends, "beta_schedule": name, "num_train_timesteps": steps}
    return None


def _short(value: float) -> float:
    """The number of few digits that float32 made this of."""
    return float(f"{value:.6g}")


# ----------------------------------------------------------------------------------------------------------------------- keys


def source_of(found: Found, tensors: Mapping[str, Tensor], path: Path) -> Source:
    """A component with the keys that are its own: those at its place in the file."""
    own = {key: tensor for key, tensor in tensors.items() if key.startswith(_places(found))}
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
