"""What a picture carries of how it was drawn: written into its PNG, and read back by `--like`."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ldmkit.commands.models import path_and_word
from ldmkit.config import Config
from ldmkit.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ldmkit.pipeline import Pipeline

CHUNK = "ldmkit"
"""The text chunk's name."""
PICTURES = ("image", "mask", "image_prompt")
"""Settings that name a picture."""
PATHS = (*PICTURES, "config", "tokenizer")
"""Those that name a file or a folder."""


class Recorded(Config):
    """Options of `ldmkit generate` that decide a picture, by name, as given; and what decides it besides.

    Attributes:
        prompt: or class; None where the model took none.
        number: of the picture under its seed.
    """

    prompt: str | None = None
    seed: int
    number: int = Field(0, ge=0)
    model: str = "emoji"
    variant: str | None = None
    revision: str | None = None
    config: str | None = None
    tokenizer: str | None = None
    ema: bool | None = None
    prediction: str | None = None
    lora: tuple[str, ...] | None = None
    embedding: tuple[str, ...] | None = None
    sampler: str | None = None
    steps: int | None = None
    guidance: float | None = None
    negative: str | None = None
    height: int | None = None
    width: int | None = None
    image: str | None = None
    mask: str | None = None
    strength: float | None = None
    noise_level: int | None = None
    image_prompt: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    image_sha256: str | None = None
    mask_sha256: str | None = None
    image_prompt_sha256: str | None = None
    versions: dict[str, str] = Field(default_factory=dict)


_BESIDE = {"prompt", "seed", "number", "versions", *(f"{name}_sha256" for name in PICTURES)}
SETTINGS = tuple(name for name in Recorded.model_fields if name not in _BESIDE)
"""The options."""


def read(picture: Path) -> Recorded:
    """What drew a picture. Raises: InputError where the file is no picture, or was not drawn by `ldmkit generate`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            text = image.info.get(CHUNK)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"--like {picture}: cannot be read as a picture ({error})") from None
    if not isinstance(text, str):
        raise InputError(f"--like {picture}: carries no ldmkit settings; only pictures from 'ldmkit generate' do")
    try:
        return Recorded.parse_json(text, owner=f"--like {picture}: its ldmkit settings")
    except ConfigError as error:
        raise InputError(f"{error} (spoilt, or of a newer ldmkit)") from None


def chunks(settings: dict[str, Any], prompt: str | None, seed: int, number: int, pipe: Pipeline) -> dict[str, str]:
    """The text chunks of a picture: everything, and prompt and seed once more for people and other programs."""
    import torch

    from ldmkit import __version__

    used = {name: value for name, value in settings.items() if value is not None}
    used |= {name: str(Path(used[name]).resolve()) for name in PATHS if name in used}
    used |= {name: [_in_full(text) for text in used[name]] for name in ("lora", "embedding") if name in used}
    used["model"] = _located(used["model"])
    used |= {f"{name}_sha256": _sha256(Path(used[name])) for name in PICTURES if name in used}
    used.setdefault("steps", pipe.defaults.num_inference_steps)
    if pipe.conditioner is not None:
        used.setdefault("guidance", pipe.defaults.guidance_scale)
    asked = {} if prompt is None else {"prompt": prompt}
    versions = {"ldmkit": __version__, "torch": torch.__version__}
    everything = {**asked, "seed": seed, "number": number, **used, "versions": versions}
    return {CHUNK: json.dumps(everything), **asked, "seed": str(seed)}


def check_same_pictures(recorded: Recorded, settings: dict[str, Any]) -> None:
    """Raise InputError where a picture that was drawn from is gone or has changed, and no other was given."""
    for name in PICTURES:
        path, option = settings[name], f"--{name.replace('_', '-')}"
        if path is None or path != getattr(recorded, name):
            continue
        if not Path(path).is_file():
            raise InputError(
                f"--like: the picture was drawn from {option} {path}, which is gone; pass {option} with where it is now"
            )
        if _sha256(Path(path)) != getattr(recorded, f"{name}_sha256"):
            raise InputError(
                f"--like: {path} has changed since the picture was drawn; pass {option} {path} to use it as it is now"
            )


def _in_full(text: str) -> str:
    """`FILE` or `FILE=WORD`, the file as `--like` finds it from anywhere."""
    path, word = path_and_word(text)
    return str(path.resolve()) if word is None else f"{path.resolve()}={word}"


def _located(model: str) -> str:
    """A folder or file in full, which `--like` finds from anywhere; a registered name as it is."""
    from ldmkit.checkpoints.pipelines import holds_pipeline
    from ldmkit.plugin.registry import available

    path = Path(model)
    named = model in available("pipeline") and not holds_pipeline(path)
    return str(path.resolve()) if path.exists() and not named else model


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
