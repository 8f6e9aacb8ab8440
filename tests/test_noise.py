"""Noise, keyed and generated."""

import itertools
import math

import numpy as np
import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import GeneratorNoise, KeyedNoise, StepNoise, keyed_normal
from ldmkit.errors import InputError, InputTypeError

words = st.one_of(st.integers(0, 10), st.integers(0, 2**64 - 1))
SHAPE = (4, 3, 5)

RECORDED: dict[tuple[int, int, int, int], list[float]] = {
    (0, 0, -1, 0): [0.15853383451844044, 2.982879282617075, -1.925691981917186, -0.8249255452762637],
    (0, 0, 0, 0): [0.8649485670764825, 0.36483634422688255, -1.0867525720177575, 1.747602159258436],
    (1, 0, 0, 0): [0.03894499013985256, -1.5193603325418352, -0.8366544654835437, -0.7236385233987069],
    (0, 1, 0, 0): [-0.4576679004559908, -1.172456278670892, 0.04660401376352973, -0.42308503366753003],
    (0, 0, 0, 1): [1.1789600211704447, -1.8736561773618792, 1.2743853518932773, -0.16541294195959988],
    (18446744073709551615, 18446744073709551615, 999, 3): [
        -1.4801561358170272,
        1.6826384424286276,
        0.41023593686600246,
        0.45600087998911876,
    ],
}
"""(seed, image, step, draw): the first four numbers."""


@given(words, st.lists(words, min_size=1, max_size=5), st.integers(-1, 1000), st.integers(0, 5), st.data())
def test_image_k_of_a_batch_is_image_k_alone(seed: int, images: list[int], step: int, draw: int, data: st.DataObject) -> None:
    """Bit for bit, in any batch and any order."""
    batch = KeyedNoise(seed, images)((len(images), *SHAPE), step=step, draw=draw)
    order = data.draw(st.permutations(range(len(images))))
    other = KeyedNoise(seed, [images[k] for k in order])((len(images), *SHAPE), step=step, draw=draw)
    for k, image in enumerate(images):
        alone = KeyedNoise([seed], [image])((1, *SHAPE), step=step, draw=draw)
        assert torch.equal(batch[k], alone[0])
        assert torch.equal(other[order.index(k)], alone[0])


def test_noise_is_a_function_of_its_key_alone() -> None:
    """Numbers recorded once: a change of numpy, of the machine or of this code must not change pictures."""
    for key, expected in RECORDED.items():
        np.testing.assert_allclose(keyed_normal(*key, (4,)), expected, rtol=1e-14)


def test_distinct_keys_are_distinct_streams() -> None:
    """Every argument counts, and no two draws are correlated (5 sigma)."""
    keys = list(itertools.product((0, 1, 2**63), (0, 1, 7), (-1, 0, 1), (0, 1)))
    n = 512
    draws = np.stack([keyed_normal(*key, (n,)) for key in keys])
    correlation = draws @ draws.T / n
    off = correlation[~np.eye(len(keys), dtype=bool)]
    assert np.abs(off).max() < 5 / math.sqrt(n)
    for lag in (1, 2, 3, 4):  # nor with each other's neighbours: counters do not overlap
        shifted = draws[:, lag:] @ draws[:, :-lag].T / (n - lag)
        assert np.abs(shifted).max() < 5 / math.sqrt(n - lag)


def test_the_numbers_are_normal() -> None:
    """Moments, and the Kolmogorov-Smirnov distance at 1 in 10^6 (a fixed seed: it passes always or never)."""
    n = 200_000
    x = np.sort(keyed_normal(12345, 0, 0, 0, (n,)))
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(np.mean(x**power) - expected) < 5 * math.sqrt(variance / n)
    cdf = 0.5 * (1 + np.array([math.erf(v / math.sqrt(2)) for v in x]))
    ranks = np.arange(n + 1) / n
    distance = max(np.abs(cdf - ranks[1:]).max(), np.abs(cdf - ranks[:-1]).max())
    assert distance < math.sqrt(math.log(2 / 1e-6) / 2 / n)
    pairs = keyed_normal(12345, 0, 0, 0, (n,)).reshape(-1, 2)  # Box-Muller's two halves
    assert abs(np.mean(pairs[:, 0] * pairs[:, 1])) < 5 / math.sqrt(n / 2)


@given(st.integers(1, 40))
def test_any_number_of_elements(n: int) -> None:
    """A shorter draw begins like a longer one; odd counts included."""
    np.testing.assert_array_equal(keyed_normal(3, 1, 0, 0, (n,)), keyed_normal(3, 1, 0, 0, (64,))[:n])
    assert keyed_normal(3, 1, 0, 0, (n, 2)).shape == (n, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_draw_in_every_dtype(dtype: torch.dtype) -> None:
    """Half precision gets the same numbers, rounded."""
    noise = KeyedNoise(1, [0, 1])
    exact = noise((2, *SHAPE), step=0, draw=0, dtype=torch.float64)
    drawn = noise((2, *SHAPE), step=0, draw=0, dtype=dtype)
    assert drawn.dtype == dtype
    assert torch.equal(drawn, exact.to(dtype))


def test_the_global_seed_is_never_touched() -> None:
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    KeyedNoise(1, [0])((1, *SHAPE), step=0, draw=0)
    GeneratorNoise(torch.Generator().manual_seed(0), draw_dtype=torch.float32)((1, *SHAPE), step=0, draw=0)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(before_numpy, np.random.get_state()[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("many", [False, True])
def test_generators_as_in_diffusers(many: bool, dtype: torch.dtype) -> None:
    """One for the batch, or one per image; several draws in a row; drawn in the model's dtype."""

    def generators() -> torch.Generator | list[torch.Generator]:
        return [torch.Generator().manual_seed(k) for k in range(3)] if many else torch.Generator().manual_seed(7)

    mine, theirs = GeneratorNoise(generators(), draw_dtype=dtype), generators()
    for step in range(3):
        expected = randn_tensor((3, *SHAPE), generator=theirs, dtype=dtype)
        drawn = mine((3, *SHAPE), step=step, draw=0, dtype=torch.float64)
        assert drawn.dtype == torch.float64
        assert torch.equal(drawn.to(dtype), expected)


def test_seeds_one_or_one_per_image() -> None:
    shape = (3, *SHAPE)
    same = KeyedNoise(5, [0, 1, 2])(shape, step=0, draw=0)
    each = KeyedNoise([5, 6, 5], [0, 0, 2])(shape, step=0, draw=0)
    assert torch.equal(same[0], each[0])
    assert torch.equal(same[2], each[2])
    assert not torch.equal(same[1], each[1])
    assert torch.equal(same, KeyedNoise(np.int64(5), range(3))(shape, step=0, draw=0))


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**63)])
def test_seeds_never_wrap(seed: int) -> None:
    with pytest.raises(InputError, match=rf"seed = {seed}: must be at least 0 and below 2\*\*64"):
        KeyedNoise(seed, [0])
    with pytest.raises(InputError, match=rf"seed = {seed}"):
        keyed_normal(seed, 0, 0, 0, (1,))


@pytest.mark.parametrize("seed", [1.5, "1", None, True])
def test_seeds_are_whole_numbers(seed: object) -> None:
    with pytest.raises(InputTypeError, match=r"seed = .*: must be a whole number"):
        KeyedNoise([seed], [0])


def test_other_bad_arguments() -> None:
    with pytest.raises(InputError, match="2 seeds for 3 images; give one seed, or one per image"):
        KeyedNoise([1, 2], [0, 1, 2])
    with pytest.raises(InputError, match="image = -1"):
        KeyedNoise(1, [-1])
    with pytest.raises(InputError, match="step = -2"):
        keyed_normal(0, 0, -2, 0, (1,))
    with pytest.raises(InputError, match="for 4 images was asked of a source keyed for 2"):
        KeyedNoise(1, [0, 1])((4, *SHAPE), step=0, draw=0)
    with pytest.raises(InputTypeError, match=r"generator must be a torch\.Generator or a list of them"):
        GeneratorNoise([torch.Generator(), 3], draw_dtype=torch.float32)
    with pytest.raises(InputError, match="2 generators for a batch of 3"):
        GeneratorNoise([torch.Generator(), torch.Generator()], draw_dtype=torch.float32)((3, *SHAPE), step=0, draw=0)


# ----------------------------------------------------------------------------------------------------------- Brownian motion

ratio_points = st.floats(0, 200.0)


@given(st.lists(ratio_points, min_size=3, max_size=3, unique=True), st.integers(0, 2**63))
def test_increments_of_neighbouring_intervals_add_up(points: list[float], seed: int) -> None:
    low, middle, high = sorted(points)
    assume(min(high - middle, middle - low) > 1e-3 * high)
    source = KeyedNoise(seed, [3, 4])
    shape = (2, 1, 2, 2)

    def rise(b: float, a: float) -> Tensor:
        return source.brownian(shape, b, a, dtype=torch.float64) * math.sqrt(b - a)

    parts, whole = rise(high, middle) + rise(middle, low), rise(high, low)
    largest = max(1.0, float(whole.abs().max()), math.sqrt(high))
    assert float((parts - whole).abs().max()) <= 200 * 2.0**-52 * largest  # one rounding for each of up to 40 octaves and back


@pytest.mark.parametrize("interval", [(14.6, 0.03), (1.0, 0.999), (3.0, 2.0), (1e-3, 0.0), (0.301, 0.3), (900.0, 511.5)])
def test_increments_are_standard_normal(interval: tuple[float, float]) -> None:
    """20,000 numbers: mean and variance within five standard errors."""
    x = KeyedNoise(5, [0]).brownian((1, 20000), *interval, dtype=torch.float64)
    assert abs(float(x.mean())) < 5 / math.sqrt(x.numel())
    assert abs(float(x.var()) - 1) < 5 * math.sqrt(2 / x.numel())


def test_increments_of_disjoint_intervals_are_independent() -> None:
    source = KeyedNoise(5, [0])
    cuts = [0.0, 0.1, 0.15, 0.5, 0.9, 1.4, 7.0, 14.6]
    rows = torch.stack([source.brownian((1, 20000), b, a, dtype=torch.float64)[0] for a, b in itertools.pairwise(cuts)])
    correlations = torch.corrcoef(rows) - torch.eye(len(rows), dtype=torch.float64)
    assert float(correlations.abs().max()) < 5 / math.sqrt(20000)


def test_a_generator_gives_one_motion_for_its_whole_run() -> None:
    def motion() -> GeneratorNoise:
        return GeneratorNoise(torch.Generator().manual_seed(1), draw_dtype=torch.float32)

    one, other = motion(), motion()
    assert torch.equal(one.brownian((2, 3), 2.0, 1.0), other.brownian((2, 3), 2.0, 1.0))
    assert torch.equal(one.brownian((2, 3), 2.0, 1.0), other.brownian((2, 3), 2.0, 1.0))
    assert not torch.equal(*one.brownian((2, 3), 2.0, 1.0))
    lists = GeneratorNoise([torch.Generator().manual_seed(k) for k in (1, 1)], draw_dtype=torch.float32)
    assert lists.brownian((2, 3), 2.0, 1.0).shape == (2, 3)


@pytest.mark.parametrize("interval", [(1.0, 1.0), (1.0, 2.0), (1.0, -1.0), (math.inf, 1.0), (math.nan, 0.0)])
def test_intervals_that_are_none(interval: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="needs 0 <= low < high"):
        KeyedNoise(1, [0]).brownian((1, 2), *interval)


def test_an_interval_too_narrow_to_resolve() -> None:
    with pytest.raises(InputError, match="too narrow"):
        KeyedNoise(1, [0]).brownian((1, 2), math.nextafter(0.3, 1), 0.3)


def test_a_step_takes_its_draws_in_order() -> None:
    source, like = KeyedNoise(1, [0, 1]), torch.zeros(2, 3, dtype=torch.float64)
    noise = StepNoise(source, 4, like)
    first, second = noise(), noise()
    assert torch.equal(first, source((2, 3), step=4, draw=0, dtype=torch.float64))
    assert torch.equal(second, source((2, 3), step=4, draw=1, dtype=torch.float64))
    assert torch.equal(noise.between(2.0, 1.0), source.brownian((2, 3), 2.0, 1.0, dtype=torch.float64))
