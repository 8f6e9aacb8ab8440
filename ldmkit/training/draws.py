"""The randomness of training, as pure functions of (seed, step): resuming needs no state, N processes draw as one does."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum
from typing import Any, Self

import numpy as np

from ldmkit.noise import keyed_normal


class Draw(IntEnum):
    """What a random number is for: each purpose has a stream of its own."""

    ORDER = 0
    FLIP = 1
    POSTERIOR = 2
    NOISE = 3
    TIME = 4
    DROPOUT = 5
    SCALE = 6


def _bits(seed: int, purpose: Draw, step: int, n: int) -> np.ndarray:
    # keyed_normal leaves the second word of the key at 0; 1 keeps these streams apart from its own.
    philox = np.random.Philox(
        counter=np.array([0, purpose, step, 0], dtype=np.uint64), key=np.array([seed % 2**64, 1], dtype=np.uint64)
    )
    bits: np.ndarray = philox.random_raw(n)
    return bits


def uniform(seed: int, purpose: Draw, step: int, n: int) -> np.ndarray:
    """n float64 numbers in [0, 1)."""
    uniforms: np.ndarray = (_bits(seed, purpose, step, n) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniforms


def shifted(u: np.ndarray, shift: float) -> np.ndarray:
    """Numbers in [0, 1] moved towards 1 by shifts above 1, to 0 below it (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    moved: np.ndarray = shift * u / (1 + (shift - 1) * u)
    return moved


def normal(seed: int, purpose: Draw, step: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 numbers."""
    return keyed_normal(seed, purpose, step, 0, shape).astype(np.float32)


def permutation(seed: int, purpose: Draw, epoch: int, n: int) -> np.ndarray:
    """A random order of n things: the ranks of n random numbers of 64 bits."""
    return np.argsort(_bits(seed, purpose, epoch, n), kind="stable")


class Order:
    """Which samples make each step: passes over the data, each in a new random order, cut into batches end to end."""

    def __init__(self, seed: int, samples: int, batch_size: int) -> None:
        self.seed, self.samples, self.batch_size = seed, samples, batch_size
        self._epochs: dict[int, np.ndarray] = {}

    def __call__(self, step: int) -> np.ndarray:
        """Indices of the samples of a step (batch_size,)."""
        positions = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs = positions // self.samples
        for stale in set(self._epochs) - set(epochs.tolist()):
            del self._epochs[stale]
        for epoch in set(epochs.tolist()) - set(self._epochs):
            self._epochs[epoch] = permutation(self.seed, Draw.ORDER, epoch, self.samples)
        return np.array([self._epochs[e][p % self.samples] for e, p in zip(epochs.tolist(), positions.tolist(), strict=True)])


class Batches:
    """The batch of each step, made one step ahead in a thread: a batch depends on nothing but its step."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self._make = make
        self._ahead: dict[int, Future[Any]] = {}

    def __enter__(self) -> Self:
        self._thread = ThreadPoolExecutor(max_workers=1)
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __call__(self, step: int) -> Any:
        """The batch of a step; the next step's is begun."""
        future = self._ahead.pop(step, None) or self._thread.submit(self._make, step)
        self._ahead[step + 1] = self._thread.submit(self._make, step + 1)
        return future.result()
