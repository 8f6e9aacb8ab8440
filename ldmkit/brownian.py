"""Brownian motion that is a pure function of its key: the noise of stochastic differential equations.

An increment over [low, high] is the same whatever steps cut that interval, so that runs of different numbers of steps follow
one path. The axis of ratios (0, inf) is cut into octaves [2^k, 2^(k+1)], whose increments are independent; inside an octave the
path is refined by Levy's bisection (Karatzas and Shreve 1991, section 2.3), each midpoint with normal numbers of its own key.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ldmkit.errors import InputError

Normal = Callable[[int, int], np.ndarray]
"""(octave, node) => standard normal numbers of the latents' shape, always the same for the same arguments."""

DEPTH = 24
"""Bisections inside an octave; between two leaves the path is straight, so that ratios equal but for rounding see the same."""
OCTAVES = range(-40, 40)


def increment(normal: Normal, high: float, low: float) -> np.ndarray:
    """W(high) - W(low), divided by sqrt(high - low), so that it is standard normal.

    Raises:
        InputError: not 0 <= low < high < 2^40, or an interval not much wider than the leaves of the bisection.
    """
    if not 0 <= low < high < 2.0**OCTAVES.stop:
        raise InputError(f"a Brownian increment over [{low:g}, {high:g}]: needs 0 <= low < high < 2^{OCTAVES.stop}")
    first, last = (max(OCTAVES.start, math.frexp(x)[1] - 1) if x else OCTAVES.start for x in (low, high))
    if high - low < _length(last) * 2.0 ** (10 - DEPTH):
        raise InputError(f"a Brownian increment over [{low!r}, {high!r}]: the interval is too narrow to be resolved")
    total = _from_octave_start(normal, last, high)
    for octave in range(first, last):
        total = total + _whole(normal, octave)
    if low:
        total = total - _from_octave_start(normal, first, low)
    return total / math.sqrt(high - low)


def _length(octave: int) -> float:
    """The lowest octave reaches down to 0."""
    return 2.0 ** (octave + 1) if octave == OCTAVES.start else 2.0**octave


def _whole(normal: Normal, octave: int) -> np.ndarray:
    return math.sqrt(_length(octave)) * normal(octave, 0)


def _from_octave_start(normal: Normal, octave: int, x: float) -> np.ndarray:
    """W(x) - W(the octave's lower end)."""
    length = _length(octave)
    start = 0.0 if octave == OCTAVES.start else 2.0**octave
    left, right, at_left, at_right = 0.0, 1.0, np.zeros(1), _whole(normal, octave)
    where, node = (x - start) / length, 1
    for _ in range(DEPTH):
        if where in (left, right):
            break
        middle = (left + right) / 2
        at_middle = (at_left + at_right) / 2 + math.sqrt(length * (right - left)) / 2 * normal(octave, node)
        if where < middle:
            right, at_right, node = middle, at_middle, 2 * node
        else:
            left, at_left, node = middle, at_middle, 2 * node + 1
    if where == left:
        return np.broadcast_to(at_left, at_right.shape)
    if where == right:
        return at_right
    share = (where - left) / (right - left)
    at_x: np.ndarray = at_left + share * (at_right - at_left)
    return at_x
