"""Randomness of training: pure functions of seed and step, right in distribution, the same for N processes as for one."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.training.draws import Batches, Draw, Order, normal, permutation, shifted, uniform
from ldmkit.training.stage import Share


@given(samples=st.integers(1, 30), batch_size=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
def test_every_pass_visits_every_sample_once(samples: int, batch_size: int, seed: int) -> None:
    order = Order(seed, samples, batch_size)
    steps = -(-3 * samples // batch_size)
    stream = np.concatenate([order(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


@given(st.permutations(range(6)))
def test_a_step_is_the_same_whenever_it_is_asked_for(steps: list[int]) -> None:
    in_turn, shuffled = Order(3, 7, 4), Order(3, 7, 4)
    expected = [in_turn(step).tolist() for step in range(6)]
    assert {step: shuffled(step).tolist() for step in steps} == dict(enumerate(expected))


def test_passes_differ() -> None:
    assert len({tuple(permutation(0, Draw.ORDER, epoch, 20)) for epoch in range(5)}) == 5


@given(seed=st.integers(0, 2**32 - 1), step=st.integers(0, 10**6))
def test_purposes_and_steps_have_streams_of_their_own(seed: int, step: int) -> None:
    streams = [tuple(uniform(seed, purpose, s, 4)) for purpose in Draw for s in (step, step + 1)]
    streams += [tuple(normal(seed, purpose, s, (4,))) for purpose in Draw for s in (step, step + 1)]
    assert len(set(streams)) == len(streams)


def test_distributions() -> None:
    """Mean and variance within five standard errors of those of U(0, 1) and N(0, 1)."""
    n = 200_000
    u, z = uniform(1, Draw.TIME, 2, n), normal(1, Draw.NOISE, 2, (n,)).astype(np.float64)
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / n)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n)
    assert 0 <= u.min() <= u.max() < 1
    assert abs(z.mean()) < 5 / math.sqrt(n)
    assert abs(z.var() - 1) < 5 * math.sqrt(2 / n)


@given(u=st.floats(0, 1, exclude_max=True), shift=st.floats(0.01, 100))
def test_shifted_times_are_those_of_the_inverse_shift(u: float, shift: float) -> None:
    """Shifts by s and 1/s undo each other; one half goes to s / (1 + s), 1 leaves every bit."""
    eps = np.finfo(np.float64).eps
    moved = float(shifted(np.array(u), shift))
    assert 0 <= moved <= 1
    slope = (1 + (shift - 1) * u) ** 2 / shift  # of the inverse: what its argument's rounding becomes
    assert abs(float(shifted(np.array(moved), 1 / shift)) - u) <= 8 * eps * max(1.0, slope)
    assert abs(float(shifted(np.array(0.5), shift)) - shift / (1 + shift)) <= 4 * eps
    assert float(shifted(np.array(u), 1.0)) == u


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_step_of_one(processes: int) -> None:
    whole = np.arange(8)
    shares = [Share(rank, processes)(whole) for rank in range(processes)]
    assert np.concatenate(shares).tolist() == whole.tolist()


def test_batches_ahead_are_those_of_their_steps() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return step * step

    with Batches(make) as batches:
        assert [batches(step) for step in (5, 6, 7, 3)] == [25, 36, 49, 9]
    assert made[:3] == [5, 6, 7]


def test_an_error_in_a_batch_reaches_the_loop() -> None:
    with Batches(lambda step: 1 // (2 - step)) as batches:
        assert (batches(0), batches(1)) == (0, 1)
        with pytest.raises(ZeroDivisionError):
            batches(2)
