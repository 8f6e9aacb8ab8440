"""What a network's output means: from a raw prediction to D(x, level) -> x0, and the target it is trained towards.

With x = alpha x0 + sigma noise and a = alpha / scale, s = sigma / scale, scale = sqrt(alpha^2 + sigma^2), the network sees
x / scale and its output is read as
    epsilon       the noise                           x0 = (x / scale - s eps) / a      (Ho et al. 2020, eq. 15)
    v_prediction  v = a noise - s x0                  x0 = a x / scale - s v            (Salimans and Ho 2022, app. D)
    sample        x0 itself
These hold for variance-preserving, -exploding and flow-like levels alike. Two more have inputs of their own:
    flow          noise - x0, from x / (alpha + sigma)                                  (Liu et al. 2023, eq. 1)
    edm           F of D = c_skip x + c_out F(c_in x), x = x0 + ratio noise             (Karras et al. 2022, eq. 7, table 1)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import ldmkit.config
from ldmkit.briefly import config_briefly
from ldmkit.denoised import Denoised
from ldmkit.errors import ConfigError
from ldmkit.interfaces import Condition, Denoiser, Level, Levels


class Prediction:
    """How to read a denoiser's output."""

    class Config(ldmkit.config.Config):
        """Attributes:
        type: "epsilon", "v_prediction", "sample", "flow" or "edm".
        x0_above_sigma: with "epsilon" only: above this sigma / alpha the output is read as x0 itself, where dividing by a
            small alpha would blow up the network's error; a network trained so works down to zero signal.
        sigma_data: with "edm" only: the data's standard deviation.
        variance: "learned_range" for a network with twice the channels: the second half is v, and (v + 1) / 2 says where the
            variance of a step of DDPM is between its bounds (Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15). For sampling:
            the trainer here has no loss for it.
        clip: when sampling, x0 is held within [-clip, clip], after guidance: 1 for models of pixels, if they were made so.
        """

        type: Literal["epsilon", "v_prediction", "sample", "flow", "edm"] = "epsilon"
        x0_above_sigma: float | None = Field(None, gt=0)
        sigma_data: float | None = Field(None, gt=0)
        variance: Literal["learned_range"] | None = None
        clip: float | None = Field(None, gt=0)

        @model_validator(mode="after")
        def _fits(self) -> Prediction.Config:
            if self.x0_above_sigma is not None and self.type != "epsilon":
                raise ValueError(f"x0_above_sigma = {self.x0_above_sigma:g} goes with type 'epsilon', not {self.type!r}")
            if (self.sigma_data is not None) != (self.type == "edm"):
                raise ValueError(
                    f"sigma_data = {self.sigma_data} and type {self.type!r}: 'edm' needs it, and only 'edm' (usual: 0.5)"
                )
            return self

    __repr__ = config_briefly

    def __init__(self, config: Prediction.Config | None = None) -> None:
        self.config = config or Prediction.Config()

    def kind_at(self, level: Level) -> str:
        """The type in force at a level."""
        above = self.config.x0_above_sigma
        return "sample" if above is not None and level.sigma > above * level.alpha else self.config.type

    def channels(self, latent_channels: int) -> int:
        """How many the network's output has."""
        return latent_channels * (2 if self.config.variance else 1)

    def check(self, levels: Levels) -> None:
        """Raise ConfigError where the run starts from pure noise and the prediction says nothing about x0 there."""
        if levels[0].alpha == 0 and self.kind_at(levels[0]) == "epsilon":
            raise ConfigError(
                "the run starts at zero signal (alpha = 0), where a noise prediction holds no information about the image; "
                "use a v_prediction or sample model, x0_above_sigma, or a schedule without rescale_betas_zero_snr"
            )

    def check_trainable(self) -> None:
        """Raise ConfigError for what there is no loss for: a learned variance."""
        if self.config.variance is not None:
            raise ConfigError(
                f"prediction variance = {self.config.variance!r}: there is no loss for it here (it would need the variational "
                "bound of Nichol and Dhariwal 2021); such models can be sampled from; train with variance = None"
            )

    def input_scale(self, level: Level) -> float:
        """What x is divided by for the network."""
        if self.config.type == "flow":
            return level.alpha + level.sigma
        return math.hypot(level.sigma, level.alpha * (self.config.sigma_data or 1.0))

    def input_scale_B(self, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """The same with one level per image, (B,)."""
        if self.config.type == "flow":
            return alpha_B + sigma_B
        return torch.sqrt((alpha_B * (self.config.sigma_data or 1.0)) ** 2 + sigma_B**2)

    def to_x0(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """Raw output at x => x0."""
        on_x, on_output = self._coefficients(level)
        return output if (on_x, on_output) == (0.0, 1.0) else on_x * x + on_output * output

    def _coefficients(self, level: Level) -> tuple[float, float]:
        """x0 = on_x x + on_output output."""
        kind, scale = self.kind_at(level), self.input_scale(level)
        a, s = level.alpha / scale, level.sigma / scale
        if kind == "sample":
            return 0.0, 1.0
        if kind == "epsilon":
            return 1 / level.alpha, -level.sigma / level.alpha
        if kind == "v_prediction":
            return a / scale, -s
        if kind == "flow":
            return 1 / scale, -s
        sigma_data = self.config.sigma_data or 1.0
        return sigma_data**2 * a / scale, sigma_data * s

    def from_x0(self, x0: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 at x => the raw output that means it (the inverse of `to_x0`; the level has sigma > 0)."""
        on_x, on_output = self._coefficients(level)
        return x0 if (on_x, on_output) == (0.0, 1.0) else (x0 - on_x * x) / on_output

    def target(self, x0: Tensor, noise: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """The training target at x = alpha x0 + sigma noise, (B, C, H, W), with one level per image, (B,)."""
        shape = (-1,) + (1,) * (x0.ndim - 1)
        scale_B = self.input_scale_B(alpha_B, sigma_B)
        a, s = (alpha_B / scale_B).view(shape), (sigma_B / scale_B).view(shape)
        if self.config.type == "sample":
            return x0
        if self.config.type == "flow":
            return noise - x0
        if self.config.sigma_data is not None:  # (x0 - c_skip x) / c_out
            return (s / self.config.sigma_data * x0 - a * self.config.sigma_data * noise).to(x0.dtype)
        if self.config.type == "v_prediction":
            return (a * noise - s * x0).to(x0.dtype)
        if self.config.x0_above_sigma is None:
            return noise
        return torch.where((sigma_B > self.config.x0_above_sigma * alpha_B).view(shape), x0, noise)


class Model:
    """D(x, level, condition) -> x0: a denoiser, read by its prediction. Runs in the denoiser's dtype; keeps x's dtype.

    Args:
        keep_variance: give `Denoised`, x0 with the variance predicted beside it, to a sampler that takes it
            (`Sampler.takes_variance`). Without, a predicted variance is left out here, and nobody else meets it.

    Raises:
        ConfigError: to keep the variance of a prediction that has none.
    """

    def __init__(self, denoiser: Denoiser, prediction: Prediction, *, keep_variance: bool = False) -> None:
        self.denoiser = denoiser
        self.prediction = prediction
        self.keep_variance = keep_variance
        if keep_variance and prediction.config.variance is None:
            raise ConfigError(
                "the sampler takes the variance that the model predicts (variance = 'learned_range'), and the prediction has "
                "none (variance = None); take the sampler's variance 'fixed_small' or 'fixed_large', or, for a denoiser whose "
                "second half of channels is the variance, prediction={..., 'variance': 'learned_range'}"
            )

    def __call__(self, x_BCHW: Tensor, level: Level, condition: Condition) -> Tensor:
        """Noisy latents at `level` => estimate of the clean latents, in x's dtype.

        Raises:
            ConfigError: where a learned variance is said, and the output has not twice x's channels.
        """
        dtype = next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), x_BCHW.dtype)
        t_B = torch.full((len(x_BCHW),), level.t, device=x_BCHW.device, dtype=torch.promote_types(dtype, torch.float32))
        scaled = x_BCHW / self.prediction.input_scale(level)
        output = self.denoiser(scaled.to(dtype), t_B, condition).to(x_BCHW.dtype)
        if self.prediction.config.variance is None:
            return self.prediction.to_x0(output, x_BCHW, level)
        if output.shape[1] != 2 * x_BCHW.shape[1]:
            raise ConfigError(
                f"{type(self.denoiser).__name__} predicts {output.shape[1]} channels; with a learned variance they must be "
                f"twice the latents' {x_BCHW.shape[1]}"
            )
        mean, v = output.chunk(2, dim=1)
        x0 = self.prediction.to_x0(mean, x_BCHW, level)
        return Denoised.of(x0, (v + 1) / 2) if self.keep_variance else x0
