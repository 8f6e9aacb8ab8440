"""Parts composed: text, image, mask or class in, pictures out. Here is the one sampling loop; tasks only prepare its inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any, Literal, Self, cast, get_args

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldmkit import arguments
from ldmkit.adapters import Adaptable, Adapters
from ldmkit.briefly import fields_briefly
from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.filling import verify
from ldmkit.checkpoints.formats import read_foreign
from ldmkit.checkpoints.parts import DType
from ldmkit.checkpoints.pipelines import located, read_pipeline, write_pipeline
from ldmkit.checkpoints.single_file import read_single_file
from ldmkit.checkpoints.writing_folders import write_folder
from ldmkit.config import Config
from ldmkit.conjunction import And
from ldmkit.errors import ConfigError, InputError, InputTypeError, NumericalError
from ldmkit.guidance.classifier import Classifier
from ldmkit.guidance.combination import has_negative_share
from ldmkit.images import OutputType, from_pixels
from ldmkit.interfaces import Autoencoder, Condition, Conditioner, Denoise, Denoiser, Part, Sampler, SamplerState
from ldmkit.noise import NoiseSource, StepNoise
from ldmkit.plugin.registry import registry
from ldmkit.prediction import Model, Prediction
from ldmkit.runs import RunState, Trajectory, describe, rejoin, resumed
from ldmkit.schedule import Schedule
from ldmkit.settings import Defaults, PartLike, Settings, as_config, as_part, built
from ldmkit.stages import ended, go_on, steps_before
from ldmkit.tasks import Run, Task, like_weights, prepare_task
from ldmkit.upscaling import Upscaling, prepare_upscaling

Callback = Callable[["Pipeline", int, float, dict[str, Any]], Mapping[str, Any] | None]
"""Called after each step with (pipe, step, timestep, {"latents": ..., "denoised": ..., "state": a RunState}). May return
{"latents": changed} and {"stop": True}: the run then ends after this step, its pictures are decoded from the estimate
"denoised", and its output's `state` is where `resume=` goes on."""


OVERFLOW = "in float16 this is usually an overflow: try dtype=torch.bfloat16 or float32"


@dataclasses.dataclass(frozen=True)
class PipelineOutput:
    """What a call returns.

    Attributes:
        images: a list of PIL images, an array (B, H, W, C), a tensor (B, C, H, W), or final latents, by `output_type`.
        seed: the seed of the run's keyed noise (one for all images, or one each); None where a generator was given.
        state: where the run stands, for `resume=`; finished unless a callback stopped it.
        trajectory: the way it took, if asked for.
    """

    images: Any
    seed: int | list[int] | None
    state: RunState
    trajectory: Trajectory | None = None

    __repr__ = fields_briefly


class Pipeline(Adaptable, Settings):
    """An autoencoder, a denoiser, a conditioner and a sampler, composed.

    Example:
        >>> pipe = Pipeline.from_pretrained("emoji")             # doctest: +SKIP
        >>> pipe("a red apple", seed=7).images[0].save("apple.png")  # doctest: +SKIP

    Args:
        autoencoder, denoiser, conditioner, sampler: each an instance, a registered name, or {"name": ..., **config}. The
            conditioner may be None (unconditional). `pipe.sampler = "euler"` swaps by name.
        schedule: the denoiser's training schedule: a `NoiseSchedule`, `FlowSchedule` or `EDMSchedule`, its config, or plain
            values (with "kind": "flow" or "edm" for these).
        prediction: what the denoiser predicts: "epsilon", "v_prediction", "sample", "flow", or a `Prediction` or its config.
        defaults: values for arguments that calls leave out.
        upscaling: for denoisers that are told a small picture, which is then the calls' `image`: an `Upscaling` or its values.

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
        schedule: Schedule | Config | Mapping[str, Any] | None = None,
        prediction: Prediction | Prediction.Config | Mapping[str, Any] | str = "epsilon",
        defaults: Defaults | Mapping[str, Any] | None = None,
        upscaling: Upscaling | Mapping[str, Any] | None = None,
    ) -> None:
        self.autoencoder: Autoencoder = as_part("autoencoder", autoencoder, Autoencoder)
        self.denoiser: Denoiser = as_part("denoiser", denoiser, Denoiser)
        self.conditioner: Conditioner | None = None if conditioner is None else as_part("conditioner", conditioner, Conditioner)
        self.sampler = sampler
        self.schedule, self.prediction, self.defaults = schedule, prediction, defaults
        self.upscaling = as_config(Upscaling, upscaling)
        self.accounting: Mapping[str, Accounting] = {}
        self._adapters = Adapters()
        self._progress: dict[str, Any] = {}
        predicted, latent = self.denoiser.out_channels, self.autoencoder.latent_channels
        if predicted != self.prediction.channels(latent):
            raise ConfigError(
                f"the denoiser predicts {predicted} channels and the autoencoder's latents have {latent}; they must "
                "agree, or be twice as many where the prediction has the variance 'learned_range', and only there"
            )
        if self.upscaling is not None:
            self.upscaling.check(self.denoiser, self.autoencoder)
        self.eval()

    # ------------------------------------------------------------------------------------------------------------ housekeeping

    def __repr__(self) -> str:
        parts = (self.autoencoder, self.denoiser, self.conditioner)
        names = ", ".join("None" if part is None else type(part).__name__ for part in parts)
        dtype = str(self.dtype).removeprefix("torch.")
        predicts = self.prediction.config.type
        return f"Pipeline({names}, {self.sampler!r}, {self.schedule!r}, predicts {predicts}; {dtype} on {self.device})"

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

    def _verify(self) -> None:
        """Raise CheckpointError for loaded weights that are NaN or infinite; they are looked at once."""
        for module in self.modules.values():
            verify(module)

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

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        max_shard_size: int | None = None,
        format: Literal["ldmkit", "diffusers"] = "ldmkit",
    ) -> Path:
        """Write everything to a folder that `from_pretrained` gives back bit for bit.

        Args:
            max_shard_size: bytes of a weights file at most.
            format: "diffusers" writes a folder that diffusers loads too.

        Raises:
            OutputError, PluginError: where nothing can be written, or a part's class is not registered.
            ConfigError: for parts and settings that diffusers has no counterpart for, with format="diffusers".
            InputError: for another format, or with LoRA adapters that are not fused.
        """
        self._check_savable()
        if max_shard_size is not None:
            max_shard_size = arguments.count("max_shard_size (bytes)", max_shard_size)
        self._verify()
        parts: dict[str, Part | None] = {
            "autoencoder": self.autoencoder,
            "denoiser": self.denoiser,
            "conditioner": self.conditioner,
            "sampler": self._sampler,
        }
        settings = {"schedule": self.schedule.config, "prediction": self.prediction.config, "defaults": self.defaults}
        settings |= {} if self.upscaling is None else {"upscaling": self.upscaling}
        if format == "diffusers":
            return write_folder(Path(folder), parts, settings, max_shard_size=max_shard_size)
        if format != "ldmkit":
            raise InputError(f"format = {format!r}: must be 'ldmkit' or 'diffusers'")
        return write_pipeline(Path(folder), parts, settings, max_shard_size=max_shard_size)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        *,
        dtype: DType | None = None,
        torch_dtype: DType | None = None,
        device: torch.device | str = "cpu",
        variant: str | None = None,
        strict: bool = True,
        allow_download: bool = False,
        revision: str | None = None,
        **parts: PartLike,
    ) -> Self:
        """Load a folder written by `save_pretrained` or by diffusers, or a pipeline that a plugin registers by name ("emoji").

        Args:
            dtype: floating-point type of the weights (`torch_dtype` is accepted too); float32 if not given, "auto" = as stored.
            variant: of a folder in the diffusers layout, "fp16" reads `*.fp16.safetensors`.
            strict: whether keys that a part does not have are errors (see `accounting`); else they are left out with a warning.
            allow_download: fetch "owner/model" from the Hugging Face hub; `revision` is then its full commit hash.
            parts: replacements, as for the constructor (`sampler="euler"`); a replaced part is not read. A component of a
                diffusers folder that has no part here may be given as None (`safety_checker=None`).

        Raises:
            CheckpointError, ArchitectureMismatchError: for files that are missing, damaged or do not fit.
            UnknownPartError: when it is neither a folder nor a registered name.
            InputTypeError: for an argument that there is not, or a dtype that is none.
        """
        known = _check_parts(cls, "from_pretrained", parts)
        wanted = _wanted_dtype(dtype, torch_dtype)
        name_or_folder = located(name_or_folder, allow_download=allow_download, revision=revision, variant=variant)
        read = read_pipeline(name_or_folder, dtype=wanted, device=device, variant=variant, strict=strict, without=parts)
        accounting = read.pop("accounting", {})
        pipe = cls(**{**read, **{name: part for name, part in parts.items() if name in known}})
        pipe.accounting = accounting
        return pipe

    @classmethod
    def from_single_file(
        cls,
        file: str | Path,
        config: str | Path | Mapping[str, Any] | None = None,
        tokenizer: str | Path | None = None,
        *,
        dtype: DType | None = None,
        torch_dtype: DType | None = None,
        device: torch.device | str = "cpu",
        allow_pickle: bool = False,
        ema: bool = False,
        strict: bool = True,
        **parts: PartLike,
    ) -> Self:
        """Load a file in the layout of CompVis or Stability; the architecture is recognised by keys and shapes, offline.
        A file that a plugin's checkpoint format recognises is read by it instead.

        Args:
            file: a `.safetensors` file, or a `.ckpt`.
            config: what the file cannot tell, or tells otherwise: a folder in the diffusers layout (its `config.json`s and
                `scheduler_config.json` are read), or their values by component, `{"unet": {"attention_head_dim": 8}}`.
            tokenizer: the folder of CLIP's vocabulary; not given, it is looked for beside the file, in the Hugging Face cache
                and in an installed open_clip.
            dtype, torch_dtype, device: as for `from_pretrained`.
            allow_pickle: read a `.ckpt`, by torch's unpickler for tensors alone, which runs no code of the file.
            ema: take the U-Net's averaged weights, where the file has them, instead of its last ones.
            strict: whether keys that nothing is known of are an error; else they are left out with a warning.
            parts: replacements, as for the constructor; Stable Diffusion 2 needs `prediction`, which its files do not tell.

        Raises:
            CheckpointError, ArchitectureMismatchError: for a file that is missing, damaged, a pickle, or not recognised.
            InputError, ConfigError: where something must be said that the file does not tell.
        """
        known = _check_parts(cls, "from_single_file", parts)
        wanted = _wanted_dtype(dtype, torch_dtype)
        options: dict[str, Any] = {"allow_pickle": allow_pickle, "ema": ema, "strict": strict, "given": parts}
        foreign = read_foreign(Path(file), dtype=wanted, device=device)
        if foreign is None:
            read = read_single_file(Path(file), dtype=wanted, device=device, config=config, tokenizer=tokenizer, **options)
        elif config is not None or tokenizer is not None or allow_pickle or ema or not strict:
            raise InputError(
                f"config, tokenizer, allow_pickle, ema and strict are for layouts that ldmkit itself reads, and {file} is "
                "read by a plugin's checkpoint format"
            )
        else:
            read = foreign
        accounting = read.pop("accounting", {})
        pipe = cls(**{**read, **{name: part for name, part in parts.items() if name in known}})
        pipe.accounting = accounting
        return pipe

    # -------------------------------------------------------------------------------------------------------------------- call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | And | Sequence[str | And] | None = None,
        *,
        class_labels: int | str | And | Sequence[int | str | And] | None = None,
        image_prompt: Any = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        noise_level: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_batched: bool | None = None,
        guidance_method: str | Mapping[str, Any] | None = None,
        pag_scale: float | None = None,
        pag_layers: str | Sequence[str] | None = None,
        classifier: Classifier | None = None,
        classifier_scale: float | None = None,
        dynamic_thresholding_ratio: float | None = None,
        dynamic_thresholding_limit: float | None = None,
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
        prompt_syntax: Literal["plain", "weighted"] | None = None,
        prompt_2: str | Sequence[str] | None = None,
        negative_prompt_2: str | Sequence[str] | None = None,
        original_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        negative_original_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        crops_coords_top_left: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        negative_crops_coords_top_left: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        target_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        negative_target_size: tuple[int, int] | Sequence[tuple[int, int]] | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        output_type: OutputType = "pil",
        return_trajectory: bool = False,
        resume: RunState | str | Path | None = None,
        callback_on_step_end: Callback | None = None,
        progress: bool | None = None,
    ) -> PipelineOutput:
        """Draw pictures.

        Args:
            prompt: what to draw; one picture (times `num_images_per_prompt`) for each. `And(...)` joins several in one.
            class_labels: instead of a prompt, for class-conditional models.
            image_prompt: instead of a prompt, a picture or several, for conditioners that take pictures (`clip-image`).
            image: start from this picture (image-to-image), or, with `mask_image`, repaint it where the mask is white. Of an
                upscaler: the small picture.
            strength: how much of the noise schedule an image goes through, in [0, 1]; 0.8 if not given, 1 with a mask.
            noise_level: of upscalers that noise the small picture: how much, as a time of its schedule. More hides its flaws,
                and is less true to it.
            height, width: in pixels; the pipeline's defaults, or the image's size. PIL images and masks are resized to them.
            timesteps, sigmas: visit these instead of the sampler's own; falling. sigmas are sigma / alpha, the last included.
            denoising_end: end after this share of the training's times, between 0 and 1. output_type="latent" then gives the
                latents as they are there, still noisy; pictures are decoded from the estimate.
            denoising_start: go on from there with `image` = these latents, maybe by another model (SDXL's refiner).
            guidance_scale: classifier-free guidance; up to 1 it is off, as in diffusers. A denoiser that is told the scale
                makes one pass.
            guidance_rescale: Lin et al. 2024, eq. 15-16; in [0, 1].
            guidance_interval: (low, high) in sigma / alpha, outside of which there is no guidance (and no pass for it).
            guidance_batched: all conditions in one pass (True), one pass each (False: less memory), or (None) one pass until
                the device's memory does not hold it.
            guidance_method: a plugin's way to guide, by name or as {"name": ..., **config}, in the place of classifier-free.
            pag_scale, pag_layers: perturbed-attention guidance, beside guidance_scale or alone, and where: "mid" if not given.
            classifier, classifier_scale: (x, level) -> log p(y | x), (B,): classifier guidance by its gradient.
            dynamic_thresholding_ratio, dynamic_thresholding_limit: of Imagen, for pixel-space models: 0.995 and 1.
            eta: the sampler's eta for this call.
            seed: of keyed noise: picture k depends on (seed, first_image + k) alone, whatever the batch. Not given: a new one.
                A list gives each picture a seed of its own, under which it has the number first_image.
            generator: noise from torch.Generator instead, one or one per picture, in the order diffusers draws.
            latents: the starting noise itself (B, C, H/f, W/f); it is multiplied by the first level's scale.
            prompt_embeds, negative_prompt_embeds: conditions made before, tensors (B, L, C) or `Condition`s; one negative one
                serves all prompts.
            clip_skip, prompt_syntax: for conditioners that take them. "weighted" reads `(word:1.3)`, `[word]`, BREAK, prompts
                of any length, and "one AND other :0.5"; "plain" (the default) takes every character as it is.
            prompt_2, original_size, crops_coords_top_left, target_size, aesthetic_score: what Stable Diffusion XL is told
                besides, see `sdxl-text`; sizes are (height, width) in pixels, one or one for each prompt. With `negative_`
                before them, for what is not wanted: sizes are those of what is, unless one is given; the text and the score
                (2.5) are its own.
            output_type: "pil", "np" (B, H, W, C in [0, 1]), "pt" (B, C, H, W in [0, 1]) or "latent".
            return_trajectory: keep every step and its probability, as `trajectory` of the output.
            resume: go on from the `state` of an output or callback, or from a file it was saved to; noise is the saved run's,
                and the other arguments are to be those it was begun with.
            callback_on_step_end: see `Callback`; it may change the latents, and stop the run.
            progress: show a progress bar (default: as set by `set_progress_bar_config`).

        Raises:
            InputError, InputTypeError: for arguments that cannot be served, before any work.
            CheckpointError: for loaded weights that are NaN or infinite, before any work.
            NumericalError: when a part produces NaN or infinity, naming the part and the step.
        """
        if output_type not in get_args(OutputType):
            raise InputError(f"output_type = {output_type!r}: must be one of {', '.join(get_args(OutputType))}")
        for name, said in (("progress", progress), ("return_trajectory", return_trajectory)):
            if not isinstance(said, bool | None):
                raise InputTypeError(f"{name} = {said!r}: must be True or False")
        if callback_on_step_end is not None and not callable(callback_on_step_end):
            raise InputTypeError(f"callback_on_step_end must be a function, see `Callback`, got {callback_on_step_end!r}")
        seed, first_image = arguments.seeds(seed), arguments.count("first_image", first_image, low=0)
        given = self.defaults
        guidance = arguments.guidance(
            given,
            self.denoiser,
            guided=self.conditioner is not None or prompt_embeds is not None,
            told={
                "guidance_scale": guidance_scale,
                "guidance_rescale": guidance_rescale,
                "guidance_interval": guidance_interval,
                "guidance_batched": guidance_batched,
                "pag_scale": pag_scale,
                "pag_layers": pag_layers,
                "classifier": classifier,
                "classifier_scale": classifier_scale,
                "dynamic_thresholding_ratio": dynamic_thresholding_ratio,
                "dynamic_thresholding_limit": dynamic_thresholding_limit,
            },
        )
        if guidance_method is not None:
            guidance = dataclasses.replace(guidance, method=built("guidance-method", guidance_method))
        copies = arguments.count("num_images_per_prompt", num_images_per_prompt)
        options = arguments.conditioner_options(
            self.conditioner,
            prompt_embeds,
            clip_skip=clip_skip,
            prompt_syntax=prompt_syntax,
            prompt_2=prompt_2,
            original_size=original_size,
            crops_coords_top_left=crops_coords_top_left,
            target_size=target_size,
            aesthetic_score=aesthetic_score,
        )
        away_options = arguments.negative_options(
            self.conditioner,
            negative_prompt_embeds,
            options,
            prompt_2=negative_prompt_2,
            original_size=negative_original_size,
            crops_coords_top_left=negative_crops_coords_top_left,
            target_size=negative_target_size,
            aesthetic_score=negative_aesthetic_score,
        )
        positive = arguments.asked(self.conditioner, prompt, class_labels, image_prompt, prompt_embeds, options)
        negative = arguments.refused(
            self.conditioner, negative_prompt, negative_prompt_embeds, positive, guidance, away_options
        )
        told = image is not None or self.upscaling is not None
        spatial = self.denoiser.in_channels > self.autoencoder.latent_channels and told
        noised = self.upscaling is not None and self.upscaling.noise is not None
        extra = {"spatial_BCHW": spatial, "guidance_B": guidance.told is not None, "labels_B": noised}
        for on in (positive, negative):  # what does not fit is said before anything is encoded
            arguments.check_fits(
                self.denoiser, self.conditioner, on, frozenset(name for name, is_set in extra.items() if is_set)
            )
        count = positive.count * copies
        sampler = arguments.with_eta(self._sampler, eta)
        levels = arguments.levels(
            sampler, self.schedule, num_inference_steps, timesteps, sigmas, default=given.num_inference_steps
        )
        self.prediction.check(levels)
        model = Model(self.denoiser, self.prediction, keep_variance=sampler.takes_variance)
        earlier = resumed(resume, seed=seed, first_image=first_image, generator=generator, sampler=sampler)
        if earlier is not None:
            seed, first_image = earlier.seed, earlier.first_image
        noise, used_seed = arguments.noise_source(
            seed, generator, count=count, first_image=first_image, device=self.device, dtype=self.dtype
        )
        self._verify()
        dtype = torch.promote_types(self.dtype, torch.float32)
        run = Run(self.autoencoder, self.denoiser, sampler, levels, count, noise, self.device, dtype)
        task = self._task(
            run,
            image=image,
            mask_image=mask_image,
            strength=arguments.plain(strength),
            size=(arguments.plain(height), arguments.plain(width)),
            latents=latents,
            noise_level=arguments.plain(noise_level),
            start=arguments.plain(denoising_start),
            end=arguments.plain(denoising_end),
        )
        if arguments.takes(self.conditioner, "image_size"):
            height_width = tuple(side * self.autoencoder.downscale for side in task.noise.shape[2:])
            options, away_options = ({"image_size": height_width, **told} for told in (options, away_options))

        def conditioned(on: arguments.Asked, options: Mapping[str, Any]) -> Condition:
            made = on.condition(self.conditioner, **options).repeat(copies)
            _finite(made.tokens_BLC, "the conditioner", "encoding the prompt")
            made = task.extend(made).to(device=self.device, dtype=self.dtype)
            if guidance.told is not None:
                made = dataclasses.replace(made, guidance_B=torch.full((count,), guidance.told, device=self.device))
            self.denoiser.check(made)
            return made

        terms, shares = positive.terms()
        weights = [torch.tensor(share, dtype=dtype, device=self.device).repeat_interleave(copies) for share in shares]
        away = (
            conditioned(negative, away_options)
            if negative is not None and has_negative_share(guidance.scale, weights)
            else None
        )
        guided = partial(guidance.closure, model, [conditioned(term, options) for term in terms], weights, away)
        state = task.begin(sampler)
        state = state if earlier is None else rejoin(earlier, state)
        if state.step >= task.steps:
            raise InputError(f"the run to resume has taken {state.step} steps, and denoising_end ends it after {task.steps}")
        begun = RunState(state, task.levels, used_seed, first_image, describe(sampler))
        states = self._run(sampler, guided(), begun, task, noise, callback_on_step_end, progress, keep=return_trajectory)
        state = states[-1]
        handed_on = output_type == "latent" and task.until == state.step  # to a next stage, noisy as they are
        images: Any = state.x if state.done or handed_on else cast(Tensor, state.denoised)
        if output_type != "latent":
            pixels = self.autoencoder.decode(like_weights(images, self.autoencoder))
            _finite(pixels, "the autoencoder", "decoding")
            images = from_pixels(pixels, output_type)
        left = dataclasses.replace(begun, state=dataclasses.replace(state, drawn=(), laws=()))
        way = Trajectory(tuple(states), sampler, guided) if return_trajectory else None
        return PipelineOutput(images=images, seed=used_seed, state=left, trajectory=way)

    def _task(
        self,
        run: Run,
        *,
        image: Any,
        mask_image: Any,
        strength: Any,
        size: tuple[Any, Any],
        latents: Any,
        noise_level: Any,
        start: Any,
        end: Any,
    ) -> Task:
        """What the call asks for: upscaling, the second stage of a run, or what `prepare_task` knows; ended early if told."""
        skipped, until = (
            steps_before(name, share, run, self.schedule)
            for name, share in (("denoising_start", start), ("denoising_end", end))
        )
        others = {"mask_image": mask_image, "strength": strength}
        if self.upscaling is not None:
            others["denoising_start"] = start
            task = prepare_upscaling(
                self.upscaling, run, image=image, noise_level=noise_level, size=size, latents=latents, others=others
            )
        elif noise_level is not None:
            raise InputError(f"noise_level = {noise_level!r} was given, but this pipeline is no upscaler; leave it out")
        elif skipped is not None:
            others |= {"latents": latents, "height": size[0], "width": size[1]}
            task = go_on(run, skipped, image=image, others=others)
        else:
            default_size = (self.defaults.height, self.defaults.width)
            task = prepare_task(run, **others, image=image, size=size, default_size=default_size, latents=latents)
        return ended(task, run.levels, until)

    def run_task(self, name: str, /, *args: Any, **kwargs: Any) -> PipelineOutput:
        """What a plugin does with a pipeline beside drawing, by name; see `ldmkit_tasks` in `ldmkit.plugin.spec`.

        Raises:
            UnknownPartError, PartClashError, PluginError: for a name that nobody offers, or cannot be had.
        """
        output: PipelineOutput = registry().load("task", name)(self, *args, **kwargs)
        return output

    def _run(
        self,
        sampler: Sampler,
        denoise: Denoise,
        begun: RunState,
        task: Task,
        noise: NoiseSource,
        callback: Callback | None,
        progress: bool | None,
        *,
        keep: bool,
    ) -> list[SamplerState]:
        """The sampling loop: step, blend (inpainting), check, call back, until the task's end or a callback's word.

        Returns:
            The last state, or with `keep` all of them.
        """
        state = begun.state
        first, states, stop = state.step, [state], False
        options = {"total": task.steps, "initial": first, "unit": "step", **self._progress}
        if progress is not None:
            options["disable"] = not progress
        denoiser, healthy = f"the denoiser {type(self.denoiser).__name__}", _Health(state.levels.num_steps)
        with tqdm(**options) as bar:
            while not (state.done or stop or state.step == task.until):
                step, level = state.step, state.level
                state = sampler.step(denoise, state, StepNoise(noise, step, state.x))
                state = task.blend(state)
                healthy.note(denoiser, state)
                if state.done or state.x.device.type == "cpu":  # elsewhere, looking at a number would wait for the device
                    healthy.check()
                if callback is not None:
                    now = dataclasses.replace(begun, state=dataclasses.replace(state, drawn=(), laws=()))
                    tensors = {"latents": state.x, "denoised": state.denoised, "state": now}
                    latents, stop = _answer(callback(self, step, level.t, tensors), tensors)
                    if latents is not state.x:
                        state = dataclasses.replace(state, x=latents.to(state.x))
                        healthy.note("callback_on_step_end", state)
                if not keep:
                    states.clear()
                states.append(state)
                bar.total = task.until or state.levels.num_steps  # known better now, where a sampler chooses its steps
                bar.update()
        healthy.check()
        return states


def _check_parts(cls: type[Pipeline], method: str, parts: Mapping[str, Any]) -> list[str]:
    """The constructor's arguments. Raises: InputTypeError for one that there is not (None is how a component is left out)."""
    known = [name for name in signature(cls.__init__).parameters if name != "self"]
    for name, part in parts.items():
        if name not in known and part is not None:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(known)}"
            raise InputTypeError(f"{method} has no argument {name!r}; {hint}")
    return known


def _wanted_dtype(dtype: DType | None, torch_dtype: DType | None) -> DType:
    if dtype is not None and torch_dtype is not None and dtype != torch_dtype:
        raise InputError(f"dtype = {dtype} and torch_dtype = {torch_dtype} differ; give one of them")
    return dtype or torch_dtype or torch.float32


def _answer(answer: Any, tensors: Mapping[str, Any]) -> tuple[Tensor, bool]:
    """The latents to go on with, and whether to stop, as a callback says. Raises: InputTypeError, InputError."""
    if answer is None:
        return tensors["latents"], False
    if not isinstance(answer, Mapping):
        raise InputTypeError(f"callback_on_step_end must return None or a mapping like {{'latents': ...}}, got {answer!r}")
    changed = {name: value for name, value in answer.items() if value is not tensors.get(name)}
    if unknown := sorted(set(changed) - {"latents", "stop"}):
        shown = ", ".join(map(repr, unknown))
        raise InputError(f"callback_on_step_end returned {shown}; only 'latents' can be changed, and 'stop' said")
    if not isinstance(stop := answer.get("stop", False), bool):
        raise InputTypeError(f"callback_on_step_end returned 'stop' = {stop!r}; it must be True or False")
    latents = answer.get("latents", tensors["latents"])
    if not isinstance(latents, Tensor):
        raise InputTypeError(f"callback_on_step_end returned latents that are no tensor: {type(latents).__name__}")
    shape, wanted = tuple(latents.shape), tuple(tensors["latents"].shape)
    if shape != wanted:
        raise InputError(f"callback_on_step_end returned latents of shape {shape}; they were {wanted}")
    return latents, stop


class _Health:
    """Whether the latents are finite, and who made them when first they were not; looked at only when asked."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._notes: list[tuple[str, int, Tensor]] = []

    def note(self, by: str, state: SamplerState) -> None:
        """Latents made by somebody."""
        self._notes.append((by, state.step, torch.isfinite(state.x).all()))

    def check(self) -> None:
        """Raise NumericalError for the first that are not finite."""
        fine = torch.stack([good for _, _, good in self._notes]).tolist() if self._notes else []
        for (by, step, _), good in zip(self._notes, fine, strict=True):
            if not good:
                raise NumericalError(f"{by} produced NaN or infinite values at step {step} of {self._steps}; {OVERFLOW}")
        self._notes.clear()


def _finite(x: Tensor | None, part: str, when: str) -> None:
    if x is not None and not bool(torch.isfinite(x).all()):
        count = int((~torch.isfinite(x)).sum())
        raise NumericalError(f"{part} produced {count} NaN or infinite values of {x.numel()} at {when}; {OVERFLOW}")
