"""What a network's output means: from a raw prediction to D(x, level) -> x0, and the target it is trained towards.

With x = alpha x0 + sigma noise and a = alpha / scale, s = sigma / scale, scale = sqrt(alpha^2 + sigma^2), the network sees
x / scale and its output is read as
    epsilon       the noise                           x0 = (x / scale - s eps) / a      (Ho et al. 2020, eq. 15)
    v_prediction  v = a noise - s x0                  x0 = a x / scale - s v            (Salimans and Ho 2022, app. D)
    sample        x0 itself
These hold for variance-preserving, -exploding and flow-like levels alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

import ldmkit.config
from ldmkit.errors import ConfigError
from ldmkit.interfaces import Condition, Denoiser, Level, Levels


class Prediction:
    """How to read a denoiser's output."""

    class Config(ldmkit.config.Config):
        """Attributes:
        type: "epsilon", "v_prediction" or "sample".
        x0_above_sigma: with "epsilon" only: above this sigma / alpha the output is read as x0 itself, where dividing by a
            small alpha would blow up the network's error; a network trained so works down to zero signal.
        """

        type: Literal["epsilon", "v_prediction", "sample"] = "epsilon"
        x0_above_sigma: float | None = Field(None, gt=0)

        @model_validator(mode="after")
        def _fits(self) -> Prediction.Config:
            if self.x0_above_sigma is not None and self.type != "epsilon":
                raise ValueError(f"x0_above_sigma = {self.x0_above_sigma:g} goes with type 'epsilon', not {self.type!r}")
            return self

    def __init__(self, config: Prediction.Config | None = None) -> None:
        self.config = config or Prediction.Config()

    def kind_at(self, level: Level) -> str:
        """The type in force at a level."""
        above = self.config.x0_above_sigma
        return "sample" if above is not None and level.sigma > above * level.alpha else self.config.type

    def check(self, levels: Levels) -> None:
        """Raise ConfigError where the run starts from pure noise and the prediction says nothing about x0 there."""
        if levels[0].alpha == 0 and self.kind_at(levels[0]) == "epsilon":
            raise ConfigError(
                "the run starts at zero signal (alpha = 0), where a noise prediction holds no information about the image; "
                "use a v_prediction or sample model, x0_above_sigma, or a schedule without rescale_betas_zero_snr"
            )

    def to_x0(self, output: Tensor, x: Tensor, level: Level) -> Tensor:
        """Raw output at x => x0."""
        a, s, kind = level.alpha / level.scale, level.sigma / level.scale, self.kind_at(level)
        if kind == "sample":
            return output
        x = x / level.scale
        return (x - s * output) / a if kind == "epsilon" else a * x - s * output

    def from_x0(self, x0: Tensor, x: Tensor, level: Level) -> Tensor:
        """x0 at x => the raw output that means it (the inverse of `to_x0`; the level has sigma > 0)."""
        a, s, kind = level.alpha / level.scale, level.sigma / level.scale, self.kind_at(level)
        if kind == "sample":
            return x0
        x = x / level.scale
        return (x - a * x0) / s if kind == "epsilon" else (a * x - x0) / s

    def target(self, x0: Tensor, noise: Tensor, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
        """The training target at x = alpha x0 + sigma noise, (B, C, H, W), with one level per image, (B,)."""
        shape = (-1,) + (1,) * (x0.ndim - 1)
        scale_B = torch.sqrt(alpha_B**2 + sigma_B**2)
        a, s = (alpha_B / scale_B).view(shape), (sigma_B / scale_B).view(shape)
        if self.config.type == "sample":
            return x0
        if self.config.type == "v_prediction":
            return (a * noise - s * x0).to(x0.dtype)
        if self.config.x0_above_sigma is None:
            return noise
        return torch.where((sigma_B > self.config.x0_above_sigma * alpha_B).view(shape), x0, noise)


class Model:
    """D(x, level, condition) -> x0: a denoiser, read by its prediction. Runs in the denoiser's dtype; keeps x's dtype."""

    def __init__(self, denoiser: Denoiser, prediction: Prediction) -> None:
        self.denoiser = denoiser
        self.prediction = prediction

    def __call__(self, x_BCHW: Tensor, level: Level, condition: Condition) -> Tensor:
        """Noisy latents at `level` => estimate of the clean latents, in x's dtype."""
        dtype = next((p.dtype for p in self.denoiser.parameters() if p.is_floating_point()), x_BCHW.dtype)
        t_B = torch.full((len(x_BCHW),), level.t, device=x_BCHW.device, dtype=torch.promote_types(dtype, torch.float32))
        output = self.denoiser((x_BCHW / level.scale).to(dtype), t_B, condition).to(x_BCHW.dtype)
        return self.prediction.to_x0(output, x_BCHW, level)
