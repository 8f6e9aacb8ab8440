"""Recipes: everything that decides a training run, as strict configs; `recipe_files` reads them from YAML.

A recipe's numbers and the data decide the result; where it is written, for how long this process runs and on which device are
arguments of the call. Paths in a recipe are relative to the recipe's own folder.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from ldmkit.config import Config
from ldmkit.prediction import Prediction
from ldmkit.schedule import NoiseSchedule
from ldmkit.settings import Defaults


def _named(spec: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(spec.get("name"), str):
        raise ValueError("a part is given as {name: ..., and its config}; 'name' is missing or not a string")
    return spec


PartSpec = Annotated[dict[str, Any], AfterValidator(_named)]
"""A part by its registered name, with the keys of its config beside it: {name: kl, latent_channels: 4}."""

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]


class DataConfig(Config):
    """Where pictures (and their conditions) come from. Exactly one of `npz`, `folder`, `dataset`, `source` is given.

    Attributes:
        npz: a file with x (N, H, W, C) or (N, H, W) uint8 and, optionally, text (N,) strings or y (N,) labels.
        folder: pictures, with a metadata.jsonl of {"file_name": ..., <condition_key>: ...} where conditions are used.
        dataset: a folder that Hugging Face `datasets` wrote with save_to_disk.
        source: what a plugin offers by name, with its config; see `ldmkit_data_sources` in ldmkit.plugin.spec.
        split: which split, where the dataset has several.
        image_key: the dataset's column of pictures.
        condition_key: the array, key or column the conditioner's inputs are read from ("text", "y", "label", ...).
        size: pictures are brought to size x size, or (height, width).
        fit: "crop" resizes the shorter side and crops the centre; "exact" demands the size.
        upscale: allow pictures smaller than `size` to be enlarged; otherwise they are an error.
        flip: mirror half of the pictures, at random.
        memory_mib: decoded pictures are kept in memory up to this many MiB in all, and decoded again each time beyond it.
    """

    npz: str | None = None
    folder: str | None = None
    dataset: str | None = None
    source: PartSpec | None = None
    split: str | None = None
    image_key: str = "image"
    condition_key: str = "text"
    size: Count | tuple[Count, Count]
    fit: Literal["crop", "exact"] = "crop"
    upscale: bool = False
    flip: bool = False
    memory_mib: int = Field(4096, ge=0)

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        given = [name for name in ("npz", "folder", "dataset", "source") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of npz, folder, dataset, source; got {', '.join(given) or 'none'}")
        return self

    @property
    def height_width(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size


class OptimizerConfig(Config):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) and its learning rate over the run.

    Attributes:
        lr: the learning rate after warm-up.
        warmup_steps: steps of linear rise from 0.
        decay: "constant", or "cosine" or "linear" down to `final` x lr at the recipe's last step.
        decay_steps: the decay takes up the last so many steps, and the rate is constant before them (Hägele et al. 2024,
            arXiv:2405.18392); a run that has not come to them yet can be given more `steps` and is the run that had them from
            the start. None: the decay begins after the warm-up.
    """

    lr: float = Field(1e-4, gt=0)
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay: Literal["constant", "cosine", "linear"] = "constant"
    decay_steps: int | None = Field(None, ge=1)
    final: float = Field(0.0, ge=0, le=1)

    @model_validator(mode="after")
    def _betas_in_range(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas = {self.betas}: each must be at least 0 and below 1")
        return self

    @model_validator(mode="after")
    def _something_decays(self) -> OptimizerConfig:
        if self.decay_steps is not None and self.decay == "constant":
            raise ValueError(
                f"decay_steps = {self.decay_steps} with decay 'constant': choose 'cosine' or 'linear', or leave it out"
            )
        return self


class EMAConfig(Config):
    """The moving average of the weights that samples are drawn with and that is exported.

    Attributes:
        profile: "exponential": min(decay, (1 + n) / (10 + n)) after n updates; "power":
            (1 - 1/(n + 1))^(gamma + 1), whose length is a fixed share of the run so far (Karras et al. 2024,
            arXiv:2312.02696, sec. 3.1; gamma 6.94 is a width of 10%).
    """

    profile: Literal["exponential", "power"] = "exponential"
    decay: float = Field(0.9999, ge=0, lt=1)
    gamma: float = Field(6.94, gt=0)


class Recipe(Config):
    """What both stages share.

    Attributes:
        batch_size: pictures per step, over all processes.
        gradient_clip: largest norm of the gradient; None = no limit.
        channels_last: keep convolution weights and pictures in channels-last order (often faster).
        compile: run the networks through torch.compile.
        keep: how many of the latest checkpoints are kept.
    """

    data: DataConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    batch_size: Count
    steps: Count
    gradient_clip: float | None = Field(1.0, gt=0)
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile: bool = False
    seed: int = Field(0, ge=0, lt=2**32)
    log_every: Count = 50
    sample_every: Count = 1000
    checkpoint_every: Count = 1000
    keep: Count = 2

    @model_validator(mode="after")
    def _warm_up_fits(self) -> Recipe:
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is above steps = {self.steps}")
        return self


class PerceptualConfig(Config):
    """Distance between VGG-16 features. `weights`: a safetensors file with torchvision's vgg16 names."""

    weights: str
    weight: Weight = 1.0


class AdversarialConfig(Config):
    """A patch discriminator with hinge loss (Esser et al. 2021, arXiv:2012.09841).

    Attributes:
        start: first step on which it plays a part.
        weight: multiplies the adaptive weight of eq. 7.
        last_layer: the decoder's last parameter, where eq. 7 compares gradients.
        channels, layers: width and depth of the discriminator.
        lr: its learning rate; the recipe's own where None.
    """

    start: int = Field(0, ge=0)
    weight: Weight = 0.5
    last_layer: str = "decoder.conv_out.weight"
    channels: Count = 64
    layers: Count = 3
    lr: float | None = Field(None, gt=0)


class AutoencoderLossConfig(Config):
    """Stage one's loss: pixel + kl_weight x KL / (values per picture) + perceptual + adversarial.

    The KL term is divided by H W C, as the pixel term is, so that `kl_weight` means what it does in Rombach et al. 2022.
    """

    pixel: Literal["l1", "l2", "mixed"] = "l1"
    kl_weight: Weight = 1e-6
    perceptual: PerceptualConfig | None = None
    adversarial: AdversarialConfig | None = None


class LatentScaleConfig(Config):
    """How the exported autoencoder's latents are brought to unit standard deviation (Rombach et al. 2022, app. G).

    Attributes:
        samples: pictures to measure on; all of them where there are fewer.
        per_channel: one scale per channel rather than one over all components.
        shift: also subtract the mean (per channel if `per_channel`).
    """

    samples: Count = 4096
    per_channel: bool = False
    shift: bool = False


class AutoencoderRecipe(Recipe):
    """Stage one: `ldmkit train autoencoder`."""

    autoencoder: PartSpec
    loss: AutoencoderLossConfig = AutoencoderLossConfig()
    latent_scale: LatentScaleConfig = LatentScaleConfig()
    preview_images: Count = 8


class WeightingConfig(Config):
    """Weight of each noise level: "uniform" in what the network predicts, or "min_snr" (Hang et al. 2023, arXiv:2303.09556)."""

    name: Literal["uniform", "min_snr"] = "uniform"
    gamma: float = Field(5.0, gt=0)


class PreviewConfig(Config):
    """Pictures drawn every `sample_every` steps. `inputs`: prompts or labels; None for unconditional models."""

    inputs: tuple[str | int, ...] = ()
    sampler: PartSpec = Field({"name": "ddim"})
    num_inference_steps: Count = 20
    guidance_scale: float = Field(5.0, ge=0)


class DiffusionRecipe(Recipe):
    """Stage two: `ldmkit train diffusion`.

    Attributes:
        autoencoder: a folder written by stage one, or by save_part.
        loss: a distance that a plugin offers by name, with its config; the squared error where None. See
            `ldmkit_training_losses` in ldmkit.plugin.spec.
        time_shift: 1 draws training times uniformly, more has more of them noisy, less fewer: t / T = s u / (1 + (s - 1) u) for
            uniform u (Esser et al. 2024, arXiv:2403.03206, eq. 23). Half of the times are above s / (1 + s).
        guidance_dropout: share of pictures whose condition is replaced by the conditioner's null input.
        freeze_conditioner: train the denoiser only.
        conditioner_lr: the conditioner's learning rate after warm-up; the optimizer's where None. A text encoder that starts
            from random weights often wants less; one that collapses gives nearly one output for every prompt.
        denoiser_weights, conditioner_weights: folders written by save_part to start from, as those in an exported pipeline.
        cache_latents: encode every picture once, and keep posterior means and deviations in memory and on disk.
        cache_dtype: their floating-point type.
        defaults, preview.sampler: go into the exported pipeline.
    """

    autoencoder: str
    denoiser: PartSpec
    denoiser_weights: str | None = None
    conditioner: PartSpec | None = None
    conditioner_weights: str | None = None
    freeze_conditioner: bool = False
    conditioner_lr: float | None = Field(None, gt=0)
    schedule: NoiseSchedule.Config = NoiseSchedule.Config()
    prediction: Prediction.Config = Prediction.Config()
    time_shift: float = Field(1.0, gt=0)
    guidance_dropout: float = Field(0.1, ge=0, le=1)
    weighting: WeightingConfig = WeightingConfig()
    loss: PartSpec | None = None
    cache_latents: bool = True
    cache_dtype: Literal["float16", "float32"] = "float16"
    preview: PreviewConfig | None = None
    defaults: Defaults = Defaults()

    @model_validator(mode="after")
    def _fits(self) -> DiffusionRecipe:
        if self.cache_latents and self.data.flip:
            raise ValueError("data.flip and cache_latents exclude one another: latents of mirrored pictures are not cached")
        if self.conditioner is None and (self.freeze_conditioner or self.conditioner_weights is not None):
            raise ValueError("freeze_conditioner and conditioner_weights need a conditioner")
        if self.conditioner is None and self.preview is not None and "guidance_scale" in self.preview.model_fields_set:
            raise ValueError(f"preview.guidance_scale = {self.preview.guidance_scale:g} has no effect without a conditioner")
        return self
