"""What a pipeline has beside its networks: sampler, schedule, prediction, defaults; assigned as the constructor takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from pydantic import Field

from ldmkit.config import Config
from ldmkit.continuous import make_schedule
from ldmkit.errors import ConfigError, InputError, InputTypeError
from ldmkit.interfaces import Sampler
from ldmkit.plugin.registry import build
from ldmkit.prediction import Prediction
from ldmkit.schedule import Schedule

C = TypeVar("C", bound=Config)

PartLike = Any
"""An instance of a part, a registered name, or a mapping {"name": ..., **config}."""

ELSEWHERE = {
    "scheduler": "sampler (steps), schedule (noise) and prediction",
    "unet": "denoiser",
    "transformer": "denoiser",
    "vae": "autoencoder",
    "text_encoder": "conditioner",
    "text_encoder_2": "conditioner",
    "tokenizer": "conditioner",
    "image_encoder": "conditioner",
    "components": "modules",
}
"""What diffusers' pipelines have by other names."""


class Defaults(Config):
    """What a call uses for arguments that it does not give. Sizes in pixels; None = the caller must say."""

    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    guidance_rescale: float = Field(0.0, ge=0, le=1)


class Settings:
    """The part of `Pipeline` that holds them."""

    @property
    def sampler(self) -> Sampler:
        """The sampler; assign an instance, a name or {"name": ..., **config} to swap it."""
        return self._sampler

    @sampler.setter
    def sampler(self, value: PartLike) -> None:
        self._sampler: Sampler = as_part("sampler", value, Sampler)

    @property
    def schedule(self) -> Schedule:
        """The denoiser's training schedule; assign one, its config or plain values."""
        return self._schedule

    @schedule.setter
    def schedule(self, value: Schedule | Config | Mapping[str, Any] | None) -> None:
        self._schedule: Schedule = make_schedule(value)

    @property
    def prediction(self) -> Prediction:
        """What the denoiser predicts; assign one, its type ("v_prediction"), its config or plain values."""
        return self._prediction

    @prediction.setter
    def prediction(self, value: Prediction | Prediction.Config | Mapping[str, Any] | str) -> None:
        value = {"type": value} if isinstance(value, str) else value
        made = value if isinstance(value, Prediction) else Prediction(as_config(Prediction.Config, value))
        self._prediction: Prediction = made

    @property
    def defaults(self) -> Defaults:
        """What calls use for arguments that they leave out; assign plain values to replace them all."""
        return self._defaults

    @defaults.setter
    def defaults(self, value: Defaults | Mapping[str, Any] | None) -> None:
        self._defaults: Defaults = as_config(Defaults, value) or Defaults()

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises: InputError for diffusers' name of something, which assigned would do nothing (unless a subclass has it)."""
        if name in ELSEWHERE and not hasattr(type(self), name):
            raise InputError(f"a Pipeline has no {name!r} to assign: what diffusers calls so is here {ELSEWHERE[name]}")
        super().__setattr__(name, value)

    if not TYPE_CHECKING:  # to a type checker it would say that every name is there

        def __getattr__(self, name: str) -> Any:
            hint = f"; what diffusers calls so is here {ELSEWHERE[name]}" if name in ELSEWHERE else ""
            text = f"{type(self).__name__!r} object has no attribute {name!r}{hint}"
            raise AttributeError(text, name=name, obj=self)


def as_config(cls: type[C], value: C | Mapping[str, Any] | None) -> C | None:
    """A config from itself or plain values. Raises: ConfigError."""
    return value if value is None or isinstance(value, cls) else cls.parse(cast(Mapping[str, Any], value))


def built(kind: str, value: str | Mapping[str, Any]) -> Any:
    """A part from its name, or from {"name": ..., **config}. Raises: InputTypeError, ConfigError, UnknownPartError."""
    if not isinstance(value, str | Mapping):
        raise InputTypeError(f"{kind} must be a name or a mapping with 'name', got {type(value).__name__}")
    config = {"name": value} if isinstance(value, str) else dict(value)
    if "name" not in config:
        raise ConfigError(f"{kind}: a mapping must have the key 'name', got {sorted(config)}")
    return build(kind, config.pop("name"), **config)


def as_part(kind: str, value: PartLike, base: type) -> Any:
    """A part from itself, or as `built`. Raises: InputTypeError for one of another kind."""
    if isinstance(value, str | Mapping):
        return built(kind, value)
    if not isinstance(value, base):
        raise InputTypeError(f"{kind} must be a {base.__name__}, a name or a mapping with 'name', got {type(value).__name__}")
    return value
