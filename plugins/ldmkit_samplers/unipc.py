"""UniPC: Zhao et al. 2023, arXiv:2302.04867, on x0 ("data prediction"), with B(h) = h (bh1) or e^h - 1 (bh2)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from pydantic import Field
from torch import Tensor

from ldmkit.interfaces import Denoise, Level, SamplerFacts, SamplerState, Transition
from ldmkit_samplers._dpm import DPMConfig, DPMFamily, decay, log_snr, phi
from ldmkit_samplers._multistep import Memory, lagrange_weights, remember


class UniPCSampler(DPMFamily):
    """A multistep predictor, whose result the next step's evaluation corrects: one evaluation a step, one order more.

    The first steps have lower orders, and so have the last ones, down to 1 onto the clean image.
    """

    class Config(DPMConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho, final_sigmas_type: which levels a run visits; see `DPMConfig`.
        order: of the predictor, 1 to 3; the corrector's is one more.
        solver_type: B(h): "bh1" is h, "bh2" is e^h - 1 (better with guidance, section 4.1).
        correct: whether to correct; without, it is UniP.
        """

        order: int = Field(2, ge=1, le=3)
        solver_type: Literal["bh1", "bh2"] = "bh2"
        correct: bool = True

    facts = SamplerFacts(order=3, evaluations=1, stochastic=False, source="Zhao et al. 2023, arXiv:2302.04867")

    def __init__(self, config: UniPCSampler.Config) -> None:
        super().__init__(config)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """Corrects x (eq. 3), then predicts the next (eq. 8); the history holds x0 estimates, and the last step's order.

        Both equations are x = c x_before + d x0 + bend, so that x is corrected by the difference of the bends: what was blended
        into it, or changed by a callback, stays.
        """
        x, level, to = state.x, state.level, state.next_level
        denoised = denoise(x, level)
        memory, order = state.history or ((), 0)
        if memory and self.config.correct and state.levels[state.step - 1].alpha > 0:
            origin = state.levels[state.step - 1]
            bends = (self._bend(origin, level, memory[:order], at_end=at_end) for at_end in (denoised, None))
            corrected, predicted = bends
            x = x + (corrected - predicted)
        memory = remember(dataclasses.replace(state, history=memory), denoised, self.config.order)
        order = min(len(memory), state.levels.num_steps - state.step)
        bend = self._bend(level, to, memory[:order])
        ahead = (to.sigma / level.sigma) * x + to.alpha * (1 - decay(level, to)) * denoised + bend
        return Transition(ahead, 0.0, denoised, (memory, order))

    def _bend(self, level: Level, to: Level, memory: Memory, *, at_end: Tensor | None = None) -> Tensor | float:
        """What the changes of x0 add to a step from `level` to `to`: by x0 at `level` (the newest in memory), before it, and,
        corrected, at `to` itself.
        """
        (newest, _), *older = memory
        kept = decay(level, to)
        if kept == 0 or not (older or at_end is not None):
            return 0.0
        h = -math.log(kept)
        places = [(-math.log(ratio) - log_snr(level)) / h for _, ratio in older]
        changes = [estimate - newest for estimate, _ in older]
        if at_end is not None:
            places.append(1.0)
            changes.append(at_end - newest)
        weights = _weights(places, h, self._b_of(h), simple=at_end is None or not older)
        on = -to.alpha * self._b_of(h)
        parts = [(on * w / r) * change for w, r, change in zip(weights, places, changes, strict=True)]
        return sum(parts[1:], start=parts[0])

    def _b_of(self, h: float) -> float:
        return -h if self.config.solver_type == "bh1" else math.expm1(-h)


def _weights(places: list[float], h: float, b_of_h: float, *, simple: bool) -> list[float]:
    """a of eq. 5 (R a = b, R being the places' powers), in h' = -h; `simple` takes 1/2 for a single place, as the authors do
    (any value keeps order 2).
    """
    if len(places) == 1 and simple:
        return [0.5]
    b = [-h * phi(i + 1, -h) * math.factorial(i) / b_of_h for i in range(1, len(places) + 1)]
    return lagrange_weights(places, b)
