"""DPM-Solver with adaptive steps: k-diffusion's `sample_dpm_adaptive` (Lu et al. 2022, arXiv:2206.00927, app. C), a controller
choosing their lengths (Soderlind 2003, doi:10.1145/641876.641877).

How many steps a run takes is not known before. A run is given ordinary levels: its ends, where image-to-image begins, and the
first step's length come from them. Each step then goes as far as the controller lets it, and puts the level that it reaches in
the place of those that it passed.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from pydantic import Field
from torch import Tensor

from ldmkit.errors import NumericalError
from ldmkit.interfaces import Denoise, Level, Noise, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, phi
from ldmkit_samplers._multistep import along_the_flow, noise_in
from ldmkit_samplers._two_stage import ancestral, euler

SHORTEST = 1e-4
"""In log(alpha / sigma): steps that shrink below it will not reach the tolerance by shrinking further."""
SAME = 1e-5
"""In log(alpha / sigma): levels nearer than this are one; k-diffusion stops this far from the end."""


@dataclasses.dataclass(frozen=True)
class Controller:
    """The step's length in log(alpha / sigma), and the inverse errors of this step and the two accepted before it."""

    h: float
    inverse: tuple[float, float, float] | None = None


class DPMAdaptiveSampler(DPMFamily):
    """DPM-Solver-3 (or -2) with the solver of one order less inside it to tell the error, and steps as long as that allows. An
    attempt takes three (or two) evaluations, of which a repeated one keeps the first, and waits for the device. One length
    serves the whole batch: here a picture does depend, within the tolerance, on those beside it.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: the run's ends, see `DPMConfig`; onto the clean image a run
            takes one plain step more.
        order: 2 or 3.
        rtol, atol: the error of a step, relative to x / alpha at either end and absolute. Where a run begins with sigma / alpha
            in the thousands ("squaredcos_cap_v2" with trailing or linspace times), x / alpha is as large, and the default lets
            the first steps be too long: from Gaussians of std 0.5 it makes 2.0, rtol = 0.005 makes 0.507.
        h_init: the first step's length in log(alpha / sigma); None is the whole way by num_inference_steps.
        pcoeff, icoeff, dcoeff: of the controller; its share in proportion, integral and difference.
        accept_safety: a step is taken again, shorter, where the controller would shrink the next one by more than this factor.
        eta: how much ancestral noise; 0 is deterministic.
        s_noise: the noise's standard deviation.
        """

        order: int = Field(3, ge=2, le=3)
        rtol: float = Field(0.05, gt=0)
        atol: float = Field(0.0078, gt=0)
        h_init: float | None = Field(None, ge=SHORTEST)
        pcoeff: float = 0.0
        icoeff: float = 1.0
        dcoeff: float = 0.0
        accept_safety: float = Field(0.81, gt=0, le=1)
        eta: float = Field(0.0, ge=0, le=1)
        s_noise: float = Field(1.0, ge=0)

    facts = SamplerFacts(
        order=3,
        evaluations=3,
        stochastic=False,
        source="Lu et al. 2022, arXiv:2206.00927; k-diffusion",
        stages=False,
        adaptive=True,
    )

    def __init__(self, config: DPMAdaptiveSampler.Config) -> None:
        super().__init__(config)

    def step(self, denoise: Denoise, state: SamplerState, noise: Noise) -> SamplerState:
        """One accepted step; the state's levels are then those that were visited, the one reached, and the rest."""
        after = super().step(denoise, state, noise)
        visited, ahead = list(state.levels)[: state.step + 1], list(state.levels)[state.step + 1 :]
        reached = after.history[-1]
        here = next((level for level in ahead if level.ratio == reached), None)
        rest = [level for level in ahead if level.ratio < reached * (1 - SAME)]
        return dataclasses.replace(after, levels=state.levels.through([*visited, here or state.levels.between(reached), *rest]))

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The law of the first attempt that is accepted. The history holds the controller, the lower-order x / alpha, and the
        ratio that is reached.

        Raises:
            NumericalError: the error is no number, or no step is short enough for the tolerance.
        """
        level, config = state.level, self.config
        denoised = denoise(state.x, level)
        end = next(level for level in reversed(state.levels) if level.sigma > 0)
        if level.alpha == 0 or level.ratio <= end.ratio:
            to = state.next_level
            return Transition(euler(state.x, denoised, level, to), 0.0, denoised, ((), to.ratio))
        controller, before = self._memory(state, end)
        noise = noise_in(state.x, denoised, level)
        while True:
            if controller.h < SHORTEST:
                raise NumericalError(
                    f"dpm-adaptive finds no step from sigma / alpha = {level.ratio:g} with an error within rtol = "
                    f"{config.rtol:g}, atol = {config.atol:g} in {state.x.dtype}; raise them, or use a wider dtype"
                )
            left = math.log(level.ratio / end.ratio)
            to = end if controller.h > left - SAME else state.levels.between(level.ratio * math.exp(-controller.h))
            down, up = ancestral(level, to, config.eta)
            below = to if up == 0 else end if down <= end.ratio else state.levels.between(down)
            low, high = self._pair(denoise, state, noise, below)
            low = low / below.alpha
            error = _error(low, high / below.alpha, before, rtol=config.rtol, atol=config.atol)
            if not math.isfinite(error):
                raise NumericalError(
                    f"dpm-adaptive's error is {error} at sigma / alpha = {level.ratio:g}: the network's output is not finite; "
                    "in float16 this is usually an overflow: try dtype=torch.bfloat16 or float32"
                )
            controller, accepted = self._propose(controller, error)
            if accepted:
                break
        std = to.alpha * math.sqrt(max(0.0, (to.ratio - below.ratio) * (to.ratio + below.ratio))) * config.s_noise
        history = ((controller.h, controller.inverse, low), to.ratio)
        return Transition((to.alpha / below.alpha) * high, std, denoised, history, interval=(level.ratio, to.ratio))

    def _memory(self, state: SamplerState, end: Level) -> tuple[Controller, Tensor]:
        if state.history and state.history[0]:
            h, inverse, before = state.history[0]
            return Controller(h, inverse), before
        h = self.config.h_init or math.log(state.level.ratio / end.ratio) / state.levels.num_steps
        return Controller(max(h, SHORTEST)), state.x / state.level.alpha

    def _pair(self, denoise: Denoise, state: SamplerState, noise: Tensor, to: Level) -> tuple[Tensor, Tensor]:
        """The results of the lower and the higher order (Lu et al. 2022, alg. 1 and 2; alg. 4 with r1 = 1/3, r2 = 2/3)."""
        x, level = state.x, state.level
        h = math.log(level.ratio / to.ratio)

        def weight(k: int, share: float) -> float:
            """- (sigma / alpha at that share of the step) z phi_k(z), z = share h."""
            z = share * h
            return -level.ratio * math.exp(-z) * z * phi(k, z)

        def at(share: float, weights: list[float], noises: list[Tensor]) -> Tensor:
            place = state.levels.between(level.ratio * math.exp(-share * h))
            ahead = along_the_flow(x, level, place, weights, noises)
            return noise_in(ahead, denoise(ahead, place), place)

        if self.config.order == 2:
            half = at(1 / 2, [weight(1, 1 / 2)], [noise])
            low = along_the_flow(x, level, to, [weight(1, 1)], [noise])
            return low, low + (to.alpha * weight(1, 1)) * (half - noise)
        third = at(1 / 3, [weight(1, 1 / 3)], [noise])
        low = along_the_flow(x, level, to, [weight(1, 1), 3 / 2 * weight(1, 1)], [noise, third - noise])
        later = at(2 / 3, [weight(1, 2 / 3), 2 * weight(2, 2 / 3)], [noise, third - noise])
        return low, along_the_flow(x, level, to, [weight(1, 1), 3 / 2 * weight(2, 1)], [noise, later - noise])

    def _propose(self, controller: Controller, error: float) -> tuple[Controller, bool]:
        """Soderlind's H211-like filter in k-diffusion's form: the next length, and whether this one will do."""
        config, order = self.config, 1.5 if self.config.eta else self.config.order
        newest = 1 / (error + 1e-8)
        _, one, two = controller.inverse or (newest, newest, newest)
        power = (config.pcoeff + config.icoeff + config.dcoeff, -(config.pcoeff + 2 * config.dcoeff), config.dcoeff)
        raw = math.prod(e ** (p / order) for e, p in zip((newest, one, two), power, strict=True))
        factor = 1 + math.atan(raw - 1)
        accepted = factor >= config.accept_safety
        return Controller(controller.h * factor, (newest, newest, one) if accepted else (newest, one, two)), accepted


def _error(low: Tensor, high: Tensor, before: Tensor, *, rtol: float, atol: float) -> float:
    """Root mean square over the batch of the difference in units of the tolerance; the one number a run waits for."""
    dtype = torch.promote_types(low.dtype, torch.float32)
    low, high, before = low.to(dtype), high.to(dtype), before.to(dtype)
    delta = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
    return float(((low - high) / delta).square().mean().sqrt())
