"""Levels, sampler states, conditions, and the checks of the abstract parts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Condition, Config, Denoiser, Level, Levels, NoiseSchedule, Sampler, Transition
from ldmkit.errors import ConfigError, InputError
from ldmkit.schedule import CLEAN, vp_level

# -------------------------------------------------------------------------------------------------------------------- levels


@given(st.floats(0, 1e6), st.floats(1e-6, 1e6))
def test_a_levels_scale_and_ratio(sigma: float, alpha: float) -> None:
    level = Level(alpha, sigma, 0.0)
    assert level.ratio == sigma / alpha
    assert level.scale == pytest.approx(math.sqrt(alpha**2 + sigma**2), rel=1e-15)
    assert Level(0.0, 1.0, 0.0).ratio == math.inf


def fall(n: int) -> list[Level]:
    return [vp_level(float(ratio), 10.0 * ratio) for ratio in range(n, 0, -1)] + [CLEAN]


def test_levels_are_a_sequence() -> None:
    levels = Levels(fall(4), initial_scale=0.7)
    assert (len(levels), levels.num_steps) == (5, 4)
    assert list(levels) == fall(4)
    assert levels[0] == fall(4)[0]
    assert levels[-1] == CLEAN
    assert levels == Levels(fall(4), initial_scale=0.7)
    assert levels != Levels(fall(4))
    assert hash(levels) == hash(Levels(fall(4), initial_scale=0.7))
    assert eval(repr(levels)) == Levels(fall(4))


def test_part_of_a_run() -> None:
    """What image-to-image runs; only a part from the first level on starts as the whole does."""
    levels = Levels(fall(4), initial_scale=0.7)
    assert levels[0:] == levels
    assert levels[:3].initial_scale == 0.7
    later = levels[2:]
    assert list(later) == fall(4)[2:]
    assert later.initial_scale == later[0].scale
    with pytest.raises(ConfigError, match="at least 2 noise levels"):
        levels[4:]


@pytest.mark.parametrize(
    ("levels", "text"),
    [
        ([], r"at least 2 noise levels \(1 step\), got 0"),
        ([CLEAN], "got 1"),
        ([vp_level(1.0, 1.0), vp_level(2.0, 2.0)], r"must fall: sigma / alpha is 1 at level 0 and 2 at level 1"),
        ([Level(0.0, 1.0, 9.0), Level(0.0, 1.0, 8.0), CLEAN], "is inf at level 0 and inf at level 1"),
        ([vp_level(1.0, 1.0), Level(math.nan, 1.0, 0.0)], "and nan at level 1"),
    ],
)
def test_levels_must_fall(levels: list[Level], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Levels(levels)


def test_a_step_in_place_is_allowed() -> None:
    assert Levels([vp_level(1.0, 1.0), vp_level(1.0, 1.0)]).num_steps == 1


# -------------------------------------------------------------------------------------------------------------------- sampler


class Halving(Sampler):
    """The least a sampler can be."""

    class Config(Config):
        pass

    def levels(self, schedule: NoiseSchedule, num_inference_steps: int) -> Levels:
        return Levels(fall(num_inference_steps))

    def transition(self, denoise, state) -> Transition:
        return Transition(state.x / 2, 0.0, denoise(state.x, state.level), history=(state.step,))


def test_a_state_walks_the_levels() -> None:
    sampler = Halving.build()
    state = sampler.init(torch.ones(1, 1, 2, 2), sampler.levels(NoiseSchedule(), 3))
    assert state.denoised is None
    seen = []
    while not state.done:
        seen.append((state.step, state.level, state.next_level))
        before = state
        state = sampler.step(lambda x, level: x + 1, state, lambda: torch.zeros(1))
        assert (before.step, state.history) == (state.step - 1, (before.step,))  # the old state is as it was
        assert torch.equal(state.denoised, before.x + 1)
    assert seen == [(i, fall(3)[i], fall(3)[i + 1]) for i in range(3)]
    assert state.level == CLEAN


def test_where_a_run_starts() -> None:
    sampler, levels = Halving.build(), Levels(fall(3), initial_scale=0.7)
    noise, start = torch.randn(2, 1, 2, 2), torch.randn(2, 1, 2, 2)
    assert torch.equal(sampler.init(noise, levels).x, noise * 0.7)
    first = levels[0]
    assert torch.equal(sampler.init(noise, levels, start=start).x, first.alpha * start + first.sigma * noise)


def test_what_a_sampler_does_not_take() -> None:
    with pytest.raises(InputError, match="Halving does not take timesteps=; give num_inference_steps"):
        Halving.build().levels_from_timesteps(NoiseSchedule(), [1.0])
    with pytest.raises(InputError, match="Halving does not take sigmas="):
        Halving.build().levels_from_sigmas(NoiseSchedule(), [1.0, 0.0])
    with pytest.raises(ConfigError, match="Halving: unknown key 'eta'"):
        Halving.build(eta=1.0)


# ------------------------------------------------------------------------------------------------------------------ condition


def test_conditions_map_move_repeat_and_slice() -> None:
    condition = Condition(
        tokens_BLC=torch.randn(2, 3, 4), labels_B=torch.tensor([1, 2]), extra={"cache": [(torch.ones(2, 1), "name")]}
    )
    assert condition.given() == {"tokens_BLC", "labels_B"}
    assert (condition.batch_size, Condition().batch_size) == (2, None)
    half = condition.to(dtype=torch.float16)
    assert (half.tokens_BLC.dtype, half.labels_B.dtype) == (torch.float16, torch.int64)
    assert half.extra["cache"][0][0].dtype == torch.float16
    twice = condition.repeat(2)
    assert twice.labels_B.tolist() == [1, 1, 2, 2]
    assert twice.extra["cache"][0][0].shape == (4, 1)
    assert condition[1:].labels_B.tolist() == [2]
    assert condition[1:].extra["cache"][0][1] == "name"


def test_joining_batches_pads_and_masks_tokens() -> None:
    a, b = torch.randn(1, 2, 4), torch.randn(2, 5, 4)
    joined = Condition.cat([Condition(tokens_BLC=a), Condition(tokens_BLC=b)])
    assert joined.tokens_BLC.shape == (3, 5, 4)
    assert torch.equal(joined.tokens_BLC[:1, :2], a)
    assert joined.mask_BL.tolist() == [[True] * 2 + [False] * 3, [True] * 5, [True] * 5]
    assert Condition.cat([Condition(tokens_BLC=b), Condition(tokens_BLC=b)]).mask_BL is None
    nested = Condition.cat([Condition(labels_B=torch.tensor([k]), extra={"kv": (torch.full((1,), k),)}) for k in (3, 4)])
    assert nested.extra["kv"][0].tolist() == [3, 4]
    with pytest.raises(InputError, match=r"must set the same fields; one sets \['labels_B'\], another \['vector_BC'\]"):
        Condition.cat([Condition(labels_B=torch.tensor([0])), Condition(vector_BC=torch.zeros(1, 2))])
    with pytest.raises(InputError, match="must set the same `extra` keys"):
        Condition.cat([Condition(labels_B=torch.tensor([0]), extra={"a": 1}), Condition(labels_B=torch.tensor([0]))])


def test_merging_two_conditions() -> None:
    tokens, vector, spatial = torch.randn(2, 3, 4), torch.randn(2, 5), torch.randn(2, 1, 4, 4)
    merged = Condition(tokens_BLC=tokens, vector_BC=vector).merge(Condition(vector_BC=vector, spatial_BCHW=spatial))
    assert torch.equal(merged.tokens_BLC, tokens)
    assert torch.equal(merged.vector_BC, torch.cat([vector, vector], dim=1))
    assert torch.equal(merged.spatial_BCHW, spatial)
    assert Condition(tokens_BLC=tokens).merge(Condition(tokens_BLC=tokens)).tokens_BLC.shape == (2, 3, 8)
    with pytest.raises(InputError, match=r"both set labels_B \(shapes \(2,\) and \(2,\)\)"):
        Condition(labels_B=torch.zeros(2)).merge(Condition(labels_B=torch.zeros(2)))
    with pytest.raises(InputError, match=r"both set tokens_BLC \(shapes \(2, 3, 4\) and \(2, 2, 4\)\)"):
        Condition(tokens_BLC=tokens).merge(Condition(tokens_BLC=tokens[:, :2]))
    with pytest.raises(InputError, match=r"both set extra\['a'\]; rename one"):
        Condition(extra={"a": 1}).merge(Condition(extra={"a": 2}))


# ------------------------------------------------------------------------------------------------------------------- denoiser


class Picky(Denoiser):
    class Config(Config):
        pass

    in_channels = out_channels = 1
    multiple_of = 1
    accepts = frozenset({"tokens_BLC", "vector_BC"})
    requires = frozenset({"tokens_BLC"})

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return x_BCHW


def test_a_denoiser_refuses_what_it_would_ignore_and_asks_for_what_it_needs() -> None:
    picky, tokens = Picky(), torch.zeros(1, 2, 3)
    picky.check(Condition(tokens_BLC=tokens, mask_BL=torch.ones(1, 2, dtype=torch.bool)))
    with pytest.raises(InputError, match=r"Picky would ignore labels_B: it accepts \['tokens_BLC', 'vector_BC'\]; use"):
        picky.check(Condition(tokens_BLC=tokens, labels_B=torch.zeros(1)))
    with pytest.raises(InputError, match=r"Picky needs tokens_BLC, which the condition \(with \['vector_BC'\]\) does not set"):
        picky.check(Condition(vector_BC=torch.zeros(1, 2)))
