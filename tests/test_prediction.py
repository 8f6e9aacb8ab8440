"""Raw predictions and what they mean."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Condition, Denoiser, Level, Levels, Model, Prediction
from ldmkit.config import Config
from ldmkit.errors import ConfigError
from ldmkit.schedule import CLEAN, vp_level
from ldmkit.testing.strategies import configs

EPS = 2.0**-52
KINDS = ["epsilon", "v_prediction", "sample"]

ratios = st.floats(1e-3, 1e3)
levels = st.one_of(
    ratios.map(lambda r: vp_level(r, 5.0)),  # variance-preserving
    ratios.map(lambda r: Level(1.0, r, 5.0)),  # variance-exploding
    st.floats(0.001, 0.999).map(lambda s: Level(1 - s, s, 5.0)),  # flow
)


def prediction(**values: object) -> Prediction:
    return Prediction(Prediction.Config.parse(values))


def normal(seed: int) -> Tensor:
    return torch.randn((3, 2, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(configs(Prediction.Config), levels)
def test_to_x0_and_from_x0_are_inverses(config: Prediction.Config, level: Level) -> None:
    read, x, output = Prediction(config), normal(0) * level.scale, normal(1)
    x0 = read.to_x0(output, x, level)
    amplified = 1 + 1 / level.sigma * level.scale + level.ratio + 1 / level.ratio
    torch.testing.assert_close(
        read.from_x0(x0, x, level), output, rtol=0, atol=40 * EPS * amplified * float(x0.abs().max() + 5)
    )


@given(configs(Prediction.Config), levels)
def test_the_target_is_the_output_that_means_x0(config: Prediction.Config, level: Level) -> None:
    read, x0, noise = Prediction(config), normal(0), normal(1)
    x = level.alpha * x0 + level.sigma * noise
    columns = [torch.full((3,), value, dtype=torch.float64) for value in (level.alpha, level.sigma)]
    target = read.target(x0, noise, *columns)
    atol = 100 * EPS * (1 + level.ratio) * 5
    torch.testing.assert_close(read.to_x0(target, x, level), x0, rtol=0, atol=atol)


def test_the_target_takes_one_level_per_image() -> None:
    x0, noise = normal(0), normal(1)
    alpha_B, sigma_B = torch.tensor([1.0, 0.6, 0.0]).double(), torch.tensor([0.0, 0.8, 1.0]).double()
    v = prediction(type="v_prediction").target(x0, noise, alpha_B, sigma_B)
    for b in range(3):
        torch.testing.assert_close(v[b], alpha_B[b] * noise[b] - sigma_B[b] * x0[b])
    assert torch.equal(prediction().target(x0, noise, alpha_B, sigma_B), noise)
    assert torch.equal(prediction(type="sample").target(x0, noise, alpha_B, sigma_B), x0)
    mixed = prediction(x0_above_sigma=2.0).target(x0, noise, alpha_B, sigma_B)
    assert torch.equal(mixed, torch.cat([noise[:2], x0[2:]]))


def test_textbook_formulas() -> None:
    level, x, output = Level(0.6, 0.8, 1.0), normal(0), normal(1)
    torch.testing.assert_close(prediction().to_x0(output, x, level), (x - 0.8 * output) / 0.6)
    torch.testing.assert_close(prediction(type="v_prediction").to_x0(output, x, level), 0.6 * x - 0.8 * output)
    assert prediction(type="sample").to_x0(output, x, level) is output


@given(ratios, ratios)
def test_x0_above_a_sigma(threshold: float, ratio: float) -> None:
    read, level = prediction(x0_above_sigma=threshold), vp_level(ratio, 1.0)
    x, output = normal(0), normal(1)
    if abs(ratio - threshold) > 1e-9 * threshold:
        above = ratio > threshold
        assert read.kind_at(level) == ("sample" if above else "epsilon")
        expected = output if above else prediction().to_x0(output, x, level)
        assert torch.equal(read.to_x0(output, x, level), expected)
    columns = [torch.full((3,), value, dtype=torch.float64) for value in (level.alpha, level.sigma)]
    is_x0 = torch.equal(read.target(x, output, *columns), x)
    assert is_x0 == (read.kind_at(level) == "sample"), "training and sampling disagree at this level"


def test_pure_noise_needs_more_than_epsilon() -> None:
    from_nothing = Levels([Level(0.0, 1.0, 999.0), CLEAN])
    for values in ({"type": "v_prediction"}, {"type": "sample"}, {"x0_above_sigma": 100.0}):
        prediction(**values).check(from_nothing)
        assert torch.isfinite(prediction(**values).to_x0(normal(0), normal(1), from_nothing[0])).all()
    with pytest.raises(ConfigError, match=r"zero signal \(alpha = 0\).*use a v_prediction or sample model"):
        prediction().check(from_nothing)
    prediction().check(Levels([vp_level(1e6, 999.0), CLEAN]))


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"type": "eps"}, "type = 'eps': Input should be 'epsilon', 'v_prediction', 'sample', 'flow' or 'edm'"),
        ({"type": "v_prediction", "x0_above_sigma": 3.0}, "x0_above_sigma = 3 goes with type 'epsilon', not 'v_prediction'"),
        ({"x0_above_sigma": 0.0}, r"x0_above_sigma = 0\.0: Input should be greater than 0"),
        ({"x0_above_sigma": "3"}, "x0_above_sigma = '3': Input should be a valid number"),
    ],
)
def test_impossible_predictions(values: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        prediction(**values)


class Spy(Denoiser):
    """Remembers what it was given."""

    class Config(Config):
        pass

    in_channels = out_channels = 2
    multiple_of = 1
    accepts = requires = frozenset()

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones((), dtype=dtype))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        self.given = (x_BCHW, t_B)
        return self.weight * x_BCHW


@pytest.mark.parametrize(
    ("weights", "time"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
@torch.no_grad()
def test_the_model_runs_in_its_own_dtype_and_sees_unit_variance(weights: torch.dtype, time: torch.dtype) -> None:
    spy, level = Spy(weights), Level(1.0, 3.0, 950.25)
    x = normal(0).float() * level.scale
    x0 = Model(spy, prediction(type="sample"))(x, level, Condition())
    seen, t_B = spy.given
    assert (seen.dtype, t_B.dtype, x0.dtype) == (weights, time, torch.float32)
    assert t_B.tolist() == [950.25] * 3
    assert torch.equal(seen, (x / math.sqrt(10)).to(weights))
