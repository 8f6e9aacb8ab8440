"""Parts composed: text, image, mask or class in, pictures out. Here is the one sampling loop; tasks only prepare its inputs."""

from __future__ import annotations

import dataclasses
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Self, TypeVar, cast, get_args

import torch
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from ldmkit.checkpoints.parts import DType
from ldmkit.config import Config
from ldmkit.errors import ConfigError, InputError, InputTypeError, NumericalError
from ldmkit.guidance import classifier_free, unguided
from ldmkit.images import OutputType, from_pixels
from ldmkit.interfaces import Autoencoder, Condition, Conditioner, Denoise, Denoiser, Levels, Sampler, SamplerState
from ldmkit.noise import GeneratorNoise, KeyedNoise, NoiseSource
from ldmkit.plugin.registry import build
from ldmkit.prediction import Model, Prediction
from ldmkit.schedule import NoiseSchedule
from ldmkit.tasks import Task, prepare_task

C = TypeVar("C", bound=Config)

PartLike = Any
"""An instance of a part, a registered name, or a mapping {"name": ..., **config}."""

Callback = Callable[["Pipeline", int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""Called after each step with (pipe, step, timestep, {"latents": ..., "denoised": ...}); may return {"latents": changed}."""


OVERFLOW = "in float16 this is usually an overflow: try dtype=torch.bfloat16 or float32"


class Defaults(Config):
    """What a call uses for arguments that it does not give. Sizes in pixels; None = the caller must say."""

    height: int | None = Field(None, ge=1)
    width: int | None = Field(None, ge=1)
    num_inference_steps: int = Field(50, ge=1)
    guidance_scale: float = Field(7.5, ge=0)
    guidance_rescale: float = Field(0.0, ge=0, le=1)


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        images: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or final latents, by `output_type`.
        seed: the seed of the run's keyed noise (one for all images, or one each); None where a generator was given.
    """

    images: Any
    seed: int | list[int] | None


class Pipeline:
    """An autoencoder, a denoiser, a conditioner and a sampler, composed.

    Example:
        >>> pipe = Pipeline.from_pretrained("emoji")             # doctest: +SKIP
        >>> pipe("a red apple", seed=7).images[0].save("apple.png")  # doctest: +SKIP

    Args:
        autoencoder, denoiser, conditioner, sampler: each an instance, a registered name, or {"name": ..., **config}. The
            conditioner may be None (unconditional). `pipe.sampler = "euler"` swaps by name.
        schedule: the denoiser's training schedule (`NoiseSchedule`, its config, or plain values).
        prediction: what the denoiser predicts: "epsilon", "v_prediction", "sample", or a `Prediction` or its config.
        defaults: values for arguments that calls leave out.

    Raises:
        UnknownPartError, ConfigError: for a name or config nobody knows.
        InputTypeError: for an instance of the wrong kind.
        ConfigError: where the parts do not fit one another (channels).
    """

    def __init__(
        self,
        *,
        autoencoder: PartLike,
        denoiser: PartLike,
        conditioner: PartLike = None,
        sampler: PartLike = "ddim",
        schedule: NoiseSchedule | NoiseSchedule.Config | Mapping[str, Any] | None = None,
        prediction: Prediction | Prediction.Config | Mapping[str, Any] | str = "epsilon",
        defaults: Defaults | Mapping[str, Any] | None = None,
    ) -> None:
        self.autoencoder: Autoencoder = _part("autoencoder", autoencoder, Autoencoder)
        self.denoiser: Denoiser = _part("denoiser", denoiser, Denoiser)
        self.conditioner: Conditioner | None = None if conditioner is None else _part("conditioner", conditioner, Conditioner)
        self.sampler = sampler
        self.schedule = (
            schedule if isinstance(schedule, NoiseSchedule) else NoiseSchedule(_config(NoiseSchedule.Config, schedule))
        )
        if isinstance(prediction, str):
            prediction = {"type": prediction}
        self.prediction = (
            prediction if isinstance(prediction, Prediction) else Prediction(_config(Prediction.Config, prediction))
        )
        self.defaults = _config(Defaults, defaults) or Defaults()
        self._progress: dict[str, Any] = {}
        if self.denoiser.out_channels != self.autoencoder.latent_channels:
            raise ConfigError(
                f"the denoiser predicts {self.denoiser.out_channels} channels and the autoencoder's latents have "
                f"{self.autoencoder.latent_channels}; they must agree"
            )
        self.eval()

    # ------------------------------------------------------------------------------------------------------------ housekeeping

    @property
    def sampler(self) -> Sampler:
        """The sampler; assign an instance, a name or {"name": ..., **config} to swap it."""
        return self._sampler

    @sampler.setter
    def sampler(self, value: PartLike) -> None:
        self._sampler: Sampler = _part("sampler", value, Sampler)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next((p.device for p in self.denoiser.parameters()), torch.device("cpu"))

    @property
    def dtype(self) -> torch.dtype:
        """The denoiser's floating-point type. Latents are kept in float32, or in float64 where the denoiser is."""
        return next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), torch.float32)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """The parts that have weights, by kind."""
        parts = {"autoencoder": self.autoencoder, "denoiser": self.denoiser, "conditioner": self.conditioner}
        return {kind: part for kind, part in parts.items() if part is not None}

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move or cast all parts, as torch.nn.Module.to does. Returns self."""
        for module in self.modules.values():
            module.to(*args, **kwargs)
        return self

    def eval(self) -> Self:
        """Put all parts in evaluation mode. Returns self."""
        for module in self.modules.values():
            module.eval()
        return self

    def set_progress_bar_config(self, **kwargs: Any) -> None:
        """Options for tqdm; `disable=True` switches the progress bar off."""
        self._progress = kwargs

    def save_pretrained(self, folder: str | Path, *, max_shard_size: int | None = None) -> Path:
        """Write everything to a folder that `from_pretrained` gives back bit for bit. Raises: OutputError, PluginError."""
        from ldmkit.checkpoints.pipelines import save_pipeline

        return save_pipeline(self, Path(folder), max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: DType | None = None,
        torch_dtype: DType | None = None,
        device: torch.device | str = "cpu",
        **parts: PartLike,
    ) -> Self:
        """Load a folder written by `save_pretrained`, or a pipeline that a plugin registers by name ("emoji").

        Args:
            dtype: floating-point type of the weights (`torch_dtype` is accepted too); float32 if not given, "auto" = as stored.
            parts: replacements, as for the constructor (`sampler="euler"`); a replaced part is not read.

        Raises:
            CheckpointError, ArchitectureMismatchError: for files that are missing, damaged or do not fit.
            UnknownPartError: when it is neither a folder nor a registered name.
        """
        from ldmkit.checkpoints.pipelines import load_pipeline

        if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
            raise InputError(f"dtype = {dtype} and torch_dtype = {torch_dtype} differ; give one of them")
        return load_pipeline(cls, name_or_folder, dtype=dtype or torch_dtype or torch.float32, device=device, parts=parts)

    # -------------------------------------------------------------------------------------------------------------------- call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        class_labels: int | str | Sequence[int | str] | None = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        eta: float | None = None,
        seed: int | Sequence[int] | None = None,
        first_image: int = 0,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | Condition | None = None,
        negative_prompt_embeds: Tensor | Condition | None = None,
        clip_skip: int | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Draw pictures.

        Args:
            prompt: what to draw; one picture (times `num_images_per_prompt`) for each.
            class_labels: instead of a prompt, for class-conditional models.
            image: start from this picture (image-to-image), or, with `mask_image`, repaint it where the mask is white.
            strength: how much of the noise schedule an image goes through, in [0, 1]; 0.8 if not given, 1.0 with a mask.
            height, width: in pixels; the pipeline's defaults, or the image's size.
            timesteps, sigmas: visit these instead of the sampler's own; falling. sigmas are sigma / alpha, the last included.
            guidance_scale: classifier-free guidance; up to 1 it is off, as in diffusers.
            guidance_rescale: Lin et al. 2024, eq. 15-16; in [0, 1].
            eta: the sampler's eta for this call.
            seed: of keyed noise: picture k depends on (seed, first_image + k) alone, whatever the batch. Not given: a new one.
            generator: noise from torch.Generator instead, one or one per picture, in the order diffusers draws.
            latents: the starting noise itself (B, C, H/f, W/f); it is multiplied by the first level's scale.
            prompt_embeds, negative_prompt_embeds: conditions made before, tensors (B, L, C) or `Condition`s.
            clip_skip: for conditioners that take it.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent".
            callback_on_step_end: see `Callback`.
            progress: show a progress bar (default: as set by `set_progress_bar_config`).

        Raises:
            InputError, InputTypeError: for arguments that cannot be served, before any work.
            NumericalError: when a part produces NaN or infinity, naming the part and the step.
        """
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type = {output_type!r}: must be one of {', '.join(get_args(OutputType))}")
        guidance_scale = (
            self.defaults.guidance_scale if guidance_scale is None else _number("guidance_scale", guidance_scale, low=0)
        )
        rescale = _number(
            "guidance_rescale", self.defaults.guidance_rescale if guidance_rescale is None else guidance_rescale, 0, 1
        )
        if isinstance(num_images_per_prompt, bool) or not isinstance(num_images_per_prompt, int) or num_images_per_prompt < 1:
            raise InputError(f"num_images_per_prompt = {num_images_per_prompt!r}: must be a whole number of at least 1")
        inputs = self._inputs(prompt, class_labels, prompt_embeds)
        negatives = self._negatives(negative_prompt, negative_prompt_embeds, inputs, guidance_scale)
        count = (_batch(prompt_embeds) if inputs is None else len(inputs)) * num_images_per_prompt
        sampler = self._sampler if eta is None else self._with_eta(eta)
        levels = self._levels(sampler, num_inference_steps, timesteps, sigmas)
        self.prediction.check(levels)
        noise, used_seed = self._noise(seed, generator, count, first_image)

        compute = torch.promote_types(self.dtype, torch.float32)
        task = prepare_task(
            self, image=image, mask_image=mask_image, strength=strength, height=height, width=width, latents=latents,
            levels=levels, count=count, noise=noise, dtype=compute,
        )  # fmt: skip
        condition = self._condition(inputs, prompt_embeds, clip_skip).repeat(num_images_per_prompt)
        condition = task.extend(condition)
        self.denoiser.check(condition)
        _finite(condition.tokens_BLC, "the conditioner", "encoding the prompt")

        model = Model(self.denoiser, self.prediction)
        if guidance_scale > 1 and negatives is not None:
            negative = self._condition(negatives.inputs, negatives.embeds, clip_skip).repeat(num_images_per_prompt)
            denoise = classifier_free(model, condition, task.extend(negative), guidance_scale, rescale=rescale)
        else:
            denoise = unguided(model, condition)
        state = sampler.init(task.noise, task.levels, start=task.start)
        state = self._run(sampler, denoise, state, task, noise, callback_on_step_end, progress)
        if output_type == "latent":
            return PipelineOutput(images=state.x, seed=used_seed)
        pixels = self.autoencoder.decode(state.x.to(_dtype_of(self.autoencoder)))
        _finite(pixels, "the autoencoder", "decoding")
        return PipelineOutput(images=from_pixels(pixels, output_type), seed=used_seed)

    def _run(
        self,
        sampler: Sampler,
        denoise: Denoise,
        state: SamplerState,
        task: Task,
        noise: NoiseSource,
        callback: Callback | None,
        progress: bool | None,
    ) -> SamplerState:
        """The sampling loop: step, blend (inpainting), check, call back, until the last level."""
        options = {"total": state.levels.num_steps, "unit": "step", **self._progress}
        if progress is not None:
            options["disable"] = not progress
        healthy: list[Tensor] = []
        with tqdm(**options) as bar:
            while not state.done:
                step, level = state.step, state.level
                draws = iter(range(2**62))

                def draw(step: int = step, draws: Any = draws, like: Tensor = state.x) -> Tensor:
                    return noise(like.shape, step=step, draw=next(draws), dtype=like.dtype)

                state = sampler.step(denoise, state, draw)
                state = task.blend(state)
                healthy.append(torch.isfinite(state.x).all())
                if state.done or state.x.device.type == "cpu":  # elsewhere, looking at a number would wait for the device
                    _check_steps(healthy, self.denoiser, state.levels.num_steps)
                if callback is not None:
                    tensors = {"latents": state.x, "denoised": cast(Tensor, state.denoised)}
                    changed = callback(self, step, level.t, tensors) or {}
                    state = dataclasses.replace(state, x=changed.get("latents", state.x))
                bar.update()
        return state

    # ------------------------------------------------------------------------------------------------------------ the arguments

    def _inputs(self, prompt: Any, labels: Any, embeds: Any) -> list[Any] | None:
        given = [name for name, v in (("prompt", prompt), ("class_labels", labels), ("prompt_embeds", embeds)) if v is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} were both given; give one of them")
        if not given:
            if self.conditioner is not None:
                raise InputError("nothing to draw was given: pass prompt=, class_labels= or prompt_embeds=")
            return [None]
        if embeds is not None:
            return None
        value = prompt if prompt is not None else labels
        if self.conditioner is None:
            raise InputError(f"{given[0]} was given, but this pipeline has no conditioner: it is unconditional")
        if prompt is not None and not isinstance(prompt, str) and not isinstance(prompt, Sequence):
            raise InputTypeError(f"prompt must be a string or a list of strings, got {type(prompt).__name__}")
        inputs = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        if not inputs:
            raise InputError(f"{given[0]} is an empty list")
        if prompt is not None:
            for k, entry in enumerate(inputs):
                if not isinstance(entry, str):
                    raise InputTypeError(f"prompt must be a string or a list of strings, but entry {k} is {entry!r}")
        self.conditioner.check(inputs)
        return inputs

    def _negatives(self, prompt: Any, embeds: Any, inputs: list[Any] | None, scale: float) -> _Negatives | None:
        if self.conditioner is None and embeds is None:
            if prompt is not None:
                raise InputError("negative_prompt was given, but this pipeline has no conditioner")
            return None
        if prompt is not None and embeds is not None:
            raise InputError("negative_prompt and negative_prompt_embeds were both given; give one of them")
        if scale <= 1 and (prompt is not None or embeds is not None):
            warnings.warn(
                f"the negative prompt has no effect at guidance_scale = {scale:g}: guidance is off up to 1", stacklevel=3
            )
        if embeds is not None:
            return _Negatives(None, embeds)
        if self.conditioner is None:
            raise InputError("guidance of prompt_embeds without a conditioner needs negative_prompt_embeds")
        wanted = 1 if inputs is None else len(inputs)
        if prompt is not None and not isinstance(prompt, Sequence):
            raise InputTypeError(f"negative_prompt must be a string or a list of strings, got {type(prompt).__name__}")
        values = [self.conditioner.null_input] if prompt is None else [prompt] if isinstance(prompt, str) else list(prompt)
        if len(values) == 1:
            values = values * wanted
        if len(values) != wanted:
            raise InputError(f"{len(values)} negative prompts for {wanted} prompts; give one, or one per prompt")
        for k, entry in enumerate(values):
            if prompt is not None and not isinstance(entry, str):
                raise InputTypeError(f"negative_prompt must be a string or a list of strings, but entry {k} is {entry!r}")
        self.conditioner.check(values)
        return _Negatives(values, None)

    def _condition(self, inputs: list[Any] | None, embeds: Any, clip_skip: int | None) -> Condition:
        options: dict[str, Any] = {}
        if clip_skip is not None:
            if self.conditioner is None or "clip_skip" not in signature(self.conditioner.forward).parameters:
                raise InputError(f"clip_skip = {clip_skip} was given, but {type(self.conditioner).__name__} does not take it")
            options["clip_skip"] = clip_skip
        if embeds is not None:
            made = embeds if isinstance(embeds, Condition) else Condition(tokens_BLC=embeds)
        elif self.conditioner is None or inputs is None:
            return Condition()
        else:
            made = self.conditioner(inputs, **options)
        return made.to(device=self.device, dtype=self.dtype)

    def _with_eta(self, eta: float) -> Sampler:
        sampler = self._sampler
        if "eta" not in type(sampler.config).model_fields:
            raise InputError(f"eta = {eta!r} was given, but the sampler {type(sampler).__name__} has none; leave it out")
        return type(sampler)(sampler.config.replace(eta=_number("eta", eta, low=0)))

    def _levels(self, sampler: Sampler, steps: int | None, timesteps: Any, sigmas: Any) -> Levels:
        named = {"num_inference_steps": steps, "timesteps": timesteps, "sigmas": sigmas}
        given = [name for name, value in named.items() if value is not None]
        if len(given) > 1:
            raise InputError(f"{' and '.join(given)} were given; they exclude one another")
        if timesteps is not None:
            return sampler.levels_from_timesteps(self.schedule, list(timesteps))
        if sigmas is not None:
            return sampler.levels_from_sigmas(self.schedule, list(sigmas))
        return sampler.levels(self.schedule, self.defaults.num_inference_steps if steps is None else steps)

    def _noise(self, seed: Any, generator: Any, count: int, first: int) -> tuple[NoiseSource, int | list[int] | None]:
        if generator is not None:
            if seed is not None:
                raise InputError("seed and generator were both given; give one of them")
            return GeneratorNoise(generator, device=self.device, draw_dtype=self.dtype), None
        if seed is None:
            seed = secrets.randbits(32)
        seeds = list(seed) if isinstance(seed, Sequence) else seed
        images = [first + k for k in range(count)] if isinstance(seeds, int) else [first] * count
        return KeyedNoise(seeds, images, device=self.device), seeds


@dataclasses.dataclass(frozen=True)
class _Negatives:
    inputs: list[Any] | None
    embeds: Any


def _batch(embeds: Tensor | Condition | None) -> int:
    size = embeds.batch_size if isinstance(embeds, Condition) else None if embeds is None else len(embeds)
    if size is None:
        raise InputError("prompt_embeds is an empty Condition: it sets no field")
    return size


def _config(cls: type[C], value: C | Mapping[str, Any] | None) -> C | None:
    return value if value is None or isinstance(value, cls) else cls.parse(cast(Mapping[str, Any], value))


def _part(kind: str, value: PartLike, base: type) -> Any:
    if isinstance(value, str):
        return build(kind, value)
    if isinstance(value, Mapping):
        config = dict(value)
        if "name" not in config:
            raise ConfigError(f"{kind}: a mapping must have the key 'name', got {sorted(config)}")
        return build(kind, config.pop("name"), **config)
    if not isinstance(value, base):
        raise InputTypeError(f"{kind} must be a {base.__name__}, a name or a mapping with 'name', got {type(value).__name__}")
    return value


def _number(name: str, value: Any, low: float, high: float = float("inf")) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        allowed = f"a number of at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise InputError(f"{name} = {value!r}: must be {allowed}")
    return float(value)


def _dtype_of(module: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def _check_steps(healthy: list[Tensor], denoiser: Denoiser, steps: int) -> None:
    bad = [k for k, good in enumerate(torch.stack(healthy).tolist(), start=1) if not good]
    if bad:
        name = type(denoiser).__name__
        raise NumericalError(f"the denoiser {name} produced NaN or infinite values at step {bad[0]} of {steps}; {OVERFLOW}")


def _finite(x: Tensor | None, part: str, when: str) -> None:
    if x is not None and not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise NumericalError(f"{part} produced {count} NaN or infinite values of {x.numel()} at {when}; {OVERFLOW}")
