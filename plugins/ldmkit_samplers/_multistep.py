"""What multistep methods share: a memory of earlier estimates, and integrals of the polynomials through them.

Along the probability flow z = x / alpha obeys dz / d ratio = eps(x, ratio), with ratio = sigma / alpha and eps = (x - alpha x0)
/ sigma (Song et al. 2021, arXiv:2010.02502, eq. 14). Methods differ in the variable in which eps, or x0, is a polynomial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ldmkit.interfaces import Level, SamplerState

Memory = tuple[tuple[Tensor, float], ...]
"""Estimates and the ratios they were made at, the newest first."""


def remember(state: SamplerState, estimate: Tensor, order: int) -> Memory:
    """The newest `order` estimates. One made at pure noise (an infinite ratio) is on no polynomial, and is forgotten."""
    older: tuple[Any, ...] = tuple(entry for entry in state.history if math.isfinite(entry[1]))
    return ((estimate, state.level.ratio), *older)[:order]


def noise_in(x: Tensor, denoised: Tensor, level: Level) -> Tensor:
    """eps, given x0."""
    return (x - level.alpha * denoised) / level.sigma


def along_the_flow(x: Tensor, level: Level, to: Level, weights: Sequence[float], estimates: Sequence[Tensor]) -> Tensor:
    """x' = alpha' (z + sum of weight * eps), the weights adding up to ratio' - ratio. Needs alpha > 0.

    Multiplied out, so that nothing of z's size, which float16 may not hold, is formed.
    """
    return sum(((to.alpha * w) * e for w, e in zip(weights, estimates, strict=True)), start=(to.alpha / level.alpha) * x)


def lagrange_weights(nodes: Sequence[float], low: float, high: float) -> list[float]:
    """The integrals from low to high of the Lagrange polynomials that are 1 at one node and 0 at the others."""
    weights = []
    for i, node in enumerate(nodes):
        others = np.array([other for j, other in enumerate(nodes) if j != i])
        # In units around `low`, so that the powers do not cancel.
        polynomial = np.poly1d(np.poly(others - low) if len(others) else [1.0]) / np.prod(node - others)
        weights.append(float(polynomial.integ()(high - low)))
    return weights
