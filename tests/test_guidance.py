"""Guidance: closures over D."""

import dataclasses

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Condition, Denoiser, Level, Model, Prediction, classifier_free, unguided
from ldmkit.config import Config
from ldmkit.errors import InputError
from ldmkit.schedule import vp_level

EPS = 2.0**-52


class Shifted(Denoiser):
    """tanh(x + c), which counts its calls and its preparations."""

    class Config(Config):
        pass

    in_channels = out_channels = 2
    multiple_of = 1
    accepts = requires = frozenset({"vector_BC"})

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []
        self.prepared = 0

    def prepare(self, condition: Condition) -> Condition:
        self.prepared += 1
        return dataclasses.replace(condition, extra={"c": condition.vector_BC})

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        self.batches.append(len(x_BCHW))
        return torch.tanh(x_BCHW + condition.extra["c"].view(-1, 1, 1, 1))


def conditions(n: int = 3) -> tuple[Condition, Condition]:
    column = torch.linspace(0.2, 1.0, n, dtype=torch.float64).view(-1, 1)
    return Condition(vector_BC=column), Condition(vector_BC=-column)


def normal(seed: int = 0) -> Tensor:
    return torch.randn((3, 2, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


models = st.sampled_from(["epsilon", "v_prediction", "sample"]).map(
    lambda t: Model(Shifted(), Prediction(Prediction.Config(type=t)))
)
levels: st.SearchStrategy[Level] = st.floats(0.01, 100).map(lambda ratio: vp_level(ratio, 1.0))


@given(models, levels)
def test_scale_1_is_no_guidance_and_scale_0_is_the_negative(model: Model, level: Level) -> None:
    asked, negative = conditions()
    alone, away = unguided(model, asked)(normal(), level), unguided(model, negative)(normal(), level)
    size = 8 * EPS * float(torch.maximum(alone.abs(), away.abs()).max())
    torch.testing.assert_close(classifier_free(model, asked, negative, 1.0)(normal(), level), alone, rtol=0, atol=size)
    torch.testing.assert_close(classifier_free(model, asked, negative, 0.0)(normal(), level), away, rtol=0, atol=size)


@given(models, levels, st.floats(0, 20), st.floats(0, 1))
def test_one_pass_or_two(model: Model, level: Level, scale: float, rescale: float) -> None:
    asked, negative = conditions()
    one, two = (
        classifier_free(model, asked, negative, scale, rescale=rescale, batched=batched)(normal(), level)
        for batched in (True, False)
    )
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12 * float(one.abs().max()))


@given(st.sampled_from(["epsilon", "v_prediction"]), levels, st.floats(1, 15), st.floats(0, 1))
def test_raw_predictions_are_mixed_as_in_diffusers(kind: str, level: Level, scale: float, rescale: float) -> None:
    """Guidance and rescaling on eps or v, then read as x0."""
    read = Prediction(Prediction.Config(type=kind))
    model, x, (asked, negative) = Model(Shifted(), read), normal(), conditions()
    raw, raw_away = (torch.tanh(x / level.scale + c.vector_BC.view(-1, 1, 1, 1)) for c in (asked, negative))
    mixed = raw_away + scale * (raw - raw_away)
    mixed = rescale_noise_cfg(mixed, raw, guidance_rescale=rescale)
    expected = read.to_x0(mixed, x, level)
    mine = classifier_free(model, asked, negative, scale, rescale=rescale)(x, level)
    torch.testing.assert_close(
        mine, expected, rtol=0, atol=1e3 * EPS * (1 + level.ratio) * (1 + level.scale / level.sigma) * scale
    )


def test_conditions_are_prepared_once_a_run() -> None:
    network = Shifted()
    model, (asked, negative) = Model(network, Prediction()), conditions()
    for denoise, passes in (
        (unguided(model, asked), [3]),
        (classifier_free(model, asked, negative, 7.5), [6]),
        (classifier_free(model, asked, negative, 7.5, batched=False), [3, 3]),
    ):
        before = network.prepared
        network.batches.clear()
        for _ in range(4):
            denoise(normal(), vp_level(1.0, 1.0))
        assert network.prepared == before
        assert network.batches == passes * 4
    assert network.prepared == 1 + 1 + 2


@pytest.mark.parametrize("rescale", [-0.1, 1.5, float("nan")])
def test_rescale_outside(rescale: float) -> None:
    with pytest.raises(InputError, match=r"guidance rescale = .*: must be from 0 to 1"):
        classifier_free(Model(Shifted(), Prediction()), *conditions(), 7.5, rescale=rescale)


def test_conditions_that_do_not_fit() -> None:
    model = Model(Shifted(), Prediction())
    with pytest.raises(InputError, match="for 2 and 3 images; repeat some"):
        classifier_free(model, conditions(3)[0], conditions(2)[1], 7.5)
    with pytest.raises(InputError, match=r"must set the same fields; one sets \['labels_B'\], another \['vector_BC'\]"):
        classifier_free(model, conditions(3)[0], Condition(labels_B=torch.zeros(3, dtype=torch.int64)), 7.5)
