"""Steps that are Gaussian given one estimate of the clean image: x' ~ N(on_x x + on_x0 x0, std^2) with x0 = D(x, level)."""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmkit.denoised import Denoised
from ldmkit.interfaces import Denoise, Level, SamplerState, Transition
from ldmkit_samplers._base import SpacedSampler


@dataclass(frozen=True)
class Coefficients:
    """The law of one step, x' ~ N(on_x x + on_x0 x0, std^2).

    Attributes:
        most: where the model says itself how much noise there is, between `std` and this.
    """

    on_x: float
    on_x0: float
    std: float
    most: float | None = None

    def std_of(self, variance_fraction: Tensor) -> float | Tensor:
        """std^(1 - fraction) most^fraction: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15."""
        if self.most is None:
            return self.std
        least, most = math.log(self.std), math.log(self.most)
        return torch.exp(least + (most - least) * variance_fraction)


class GaussianSampler(SpacedSampler):
    """A sampler of such steps; the concrete ones say which levels, and which Gaussian."""

    @abstractmethod
    def coefficients(self, level: Level, to: Level) -> Coefficients:
        """The law of the step from one level to the next."""

    @abstractmethod
    def draws(self, level: Level) -> bool:
        """Whether the step from this level takes noise: exactly where diffusers takes it, so that a generator stays in step."""

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The Gaussian that `coefficients` say, by one evaluation of the model."""
        denoised, law = denoise(state.x, state.level), self.coefficients(state.level, state.next_level)
        std: float | Tensor = law.std
        if self.takes_variance:
            denoised, fraction = Denoised.parts_of(denoised)
            std = law.std_of(fraction)
        mean = law.on_x * state.x + law.on_x0 * denoised
        return Transition(mean, std, denoised, draws=self.draws(state.level))


def ratio_kept(level: Level, to: Level) -> float:
    """rho, the next level's sigma / alpha over this one's, in [0, 1]; 0 from pure noise or to a clean image."""
    return min(1.0, (to.sigma * level.alpha) / (level.sigma * to.alpha))  # rounding can pass 1 where the levels are equal


def ddim(level: Level, to: Level, eta: float) -> Coefficients:
    """DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 and 16), which is also Euler's ancestral step.

    With rho = `ratio_kept`, eq. 16 reads std = eta sigma' sqrt(1 - rho^2). In variance-exploding coordinates this is
    k-diffusion's `get_ancestral_step`: sigma_up = eta sigma' sqrt(1 - rho^2), sigma_down = sqrt(sigma'^2 - sigma_up^2).
    """
    rho = ratio_kept(level, to)
    on_noise = to.sigma * math.sqrt((1 - eta) * (1 + eta) + (eta * rho) ** 2)  # sqrt(sigma'^2 - std^2), without cancellation
    on_x = on_noise / level.sigma
    std = eta * to.sigma * math.sqrt((1 - rho) * (1 + rho))
    return Coefficients(on_x=on_x, on_x0=to.alpha - on_x * level.alpha, std=std)
