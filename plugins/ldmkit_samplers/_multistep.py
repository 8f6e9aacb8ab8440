"""What multistep methods share: a memory of earlier estimates, and integrals of the polynomials through them.

Along the probability flow z = x / alpha obeys dz / d ratio = eps(x, ratio), with ratio = sigma / alpha and eps = (x - alpha x0)
/ sigma (Song et al. 2021, arXiv:2010.02502, eq. 14). Methods differ in the variable in which eps, or x0, is a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor

from ldmkit.interfaces import Level, SamplerState

Memory = tuple[tuple[Tensor, float], ...]
"""Estimates and the ratios they were made at, the newest first."""


def remember(state: SamplerState, estimate: Tensor, order: int) -> Memory:
    """The newest `order` estimates. One made at pure noise (an infinite ratio) is on no polynomial, and is forgotten."""
    older: tuple[Any, ...] = tuple(entry for entry in state.history if math.isfinite(entry[1]))
    return ((estimate, state.level.ratio), *older)[:order]


def slopes(memory: Memory, h: float) -> tuple[list[Tensor], list[float]]:
    """How estimates change from each to the next older one, the newest first, and how far apart these two are; both in
    log(alpha / sigma), in units of a step's h.
    """
    estimates, ratios = zip(*memory, strict=True)
    gaps = [math.log(before / ratio) / h for ratio, before in pairwise(ratios)]
    return [(new - old) / gap for (new, old), gap in zip(pairwise(estimates), gaps, strict=True)], gaps


def noise_in(x: Tensor, denoised: Tensor, level: Level) -> Tensor:
    """eps, given x0."""
    return (x - level.alpha * denoised) / level.sigma


def along_the_flow(x: Tensor, level: Level, to: Level, weights: Sequence[float], estimates: Sequence[Tensor]) -> Tensor:
    """x' = alpha' (z + sum of weight * eps), the weights adding up to ratio' - ratio. Needs alpha > 0.

    Multiplied out, so that nothing of z's size, which float16 may not hold, is formed.
    """
    return sum(((to.alpha * w) * e for w, e in zip(weights, estimates, strict=True)), start=(to.alpha / level.alpha) * x)


def lagrange_weights(nodes: Sequence[float], moments: Sequence[float]) -> list[float]:
    """The integrals of the Lagrange polynomials that are 1 at one node and 0 at the others, moments[k] being that of u^k.

    With nodes counted from where a step starts, powers do not cancel.
    """
    weights = []
    for i, node in enumerate(nodes):
        polynomial, size = [1.0], 1.0
        for other in (*nodes[:i], *nodes[i + 1 :]):
            polynomial = [below - other * here for below, here in zip([0.0, *polynomial], [*polynomial, 0.0], strict=True)]
            size *= node - other
        weights.append(sum(a * moment for a, moment in zip(polynomial, moments, strict=True)) / size)
    return weights
