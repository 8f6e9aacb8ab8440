"""DPM-Solver, singlestep: Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2, and on x0 arXiv:2211.01095, algorithm 1.

As diffusers lays it out: the points inside a step of order k are levels of the run, k to a block, so that `steps` counts
evaluations, and every level has its x. From the block's start s, with h = lambda' - lambda_s, u = h on the noise and -h on x0,
    x' = c x_s - d (u phi_1(u) E + u phi_2(u) E' + u phi_3(u) E''),
E, E' and E'' being the estimates' value and derivatives at s in units of the step; c, d = alpha'/alpha_s, sigma' on the noise,
sigma'/sigma_s, alpha' on x0.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from ldmkit.interfaces import Denoise, Level, Levels, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, log_snr, phi
from ldmkit_samplers._multistep import noise_in
from ldmkit_samplers._two_stage import euler


class DPMSinglestepSampler(DPMFamily):
    """An exponential integrator that starts anew every `order` evaluations, and so forgets what is behind. The last block has
    lower orders, and a step onto the clean image the first.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        order: evaluations in a block, 1 (DDIM) to 3.
        algorithm_type: what is taken to be a polynomial in log(alpha / sigma): x0 ("dpmsolver++", steadier with guidance), or
            the noise ("dpmsolver").
        solver_type: "midpoint" takes the derivative by one difference, and keeps the third order on even levels only; "heun"
            takes all there are.
        """

        order: int = Field(2, ge=1, le=3)
        algorithm_type: Literal["dpmsolver++", "dpmsolver"] = "dpmsolver++"
        solver_type: Literal["midpoint", "heun"] = "midpoint"

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="Lu et al. 2022, arXiv:2206.00927", stages=False)

    def __init__(self, config: DPMSinglestepSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step; the history holds the block's first x, its estimates so far, oldest first, and the x that the
        last step led to: what was blended into it since, or changed by a callback, is carried back to the block's start.
        """
        level, to = state.level, state.next_level
        denoised = denoise(state.x, level)
        on_noise = self.config.algorithm_type == "dpmsolver"
        estimate = noise_in(state.x, denoised, level) if on_noise else denoised
        order = orders(state.levels, self.config.order)[state.step]
        if order == 1:
            x = euler(state.x, denoised, level, to)
            return Transition(x, 0.0, denoised, (state.x, (estimate,), x))
        start, before, led_to = state.history
        estimates = (*before, estimate)
        block = state.levels[state.step - order + 1 : state.step + 2]
        back = block[0].alpha / level.alpha if on_noise else block[0].sigma / level.sigma
        start = start + back * (state.x - led_to)
        x = self._step(start, block, estimates)
        return Transition(x, 0.0, denoised, (start, estimates, x))

    def _step(self, start: Tensor, block: Levels, estimates: tuple[Tensor, ...]) -> Tensor:
        """From the block's first level to its last, by the estimates at all but the last."""
        first, *inner, to = block
        h = log_snr(to) - log_snr(first)
        first_slope, *more = (
            (estimate - estimates[0]) * (h / (log_snr(level) - log_snr(first)))
            for level, estimate in zip(inner, estimates[1:], strict=True)
        )
        u, kept, on = (h, to.alpha / first.alpha, to.sigma)
        if self.config.algorithm_type == "dpmsolver++":
            u, kept, on = (-h, to.sigma / first.sigma, to.alpha)
        x = kept * start - (on * u * phi(1, u)) * estimates[0]
        if self.config.solver_type == "midpoint":
            weight = u * phi(2, u) if more else u * phi(1, u) / 2
            return x - (on * weight) * [first_slope, *more][-1]
        if not more:
            return x - (on * u * phi(2, u)) * first_slope
        near, far = ((log_snr(level) - log_snr(first)) / h for level in inner)
        slope = (far * first_slope - near * more[0]) / (far - near)
        bend = 2 * (more[0] - first_slope) / (far - near)
        return x - (on * u * phi(2, u)) * slope - (on * u * phi(3, u)) * bend


def orders(levels: Levels, order: int) -> list[int]:
    """The place of each step in its block, which is its order; from pure noise, and onto the clean image, 1."""
    if levels[0].alpha == 0:
        return [1, *_orders(levels[1:], order)] if levels.num_steps > 1 else [1]
    return _orders(levels, order)


def _orders(levels: Levels, order: int) -> list[int]:
    steps = levels.num_steps
    whole, rest = divmod(steps, order)
    if order > 1 and rest == 0:  # the last block is shared between two of lower orders
        whole, rest = whole - 1, order
    tail = {0: [], 1: [1], 2: [1, 2] if order == 3 else [1, 1], 3: [1, 2, 1]}[rest]
    places = list(range(1, order + 1)) * whole + tail
    return [*places[:-1], 1] if _clean(levels[-1]) else places


def _clean(level: Level) -> bool:
    return level.sigma == 0
