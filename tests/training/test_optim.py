"""Learning rates, weight decay and moving averages against closed forms."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from ldmkit.errors import ConfigError
from ldmkit.training.optim import EMA, lr_factor, make_optimizer
from ldmkit.training.recipes import EMAConfig, OptimizerConfig


def factors(steps: int, **values: object) -> list[float]:
    config = OptimizerConfig.parse(values)
    return [lr_factor(config, step, steps) for step in range(steps)]


def test_warm_up_rises_linearly_to_one() -> None:
    assert factors(8, warmup_steps=4) == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_decays_reach_their_final_value_at_the_last_step(final: float) -> None:
    for decay in ("cosine", "linear"):
        found = factors(11, warmup_steps=1, decay=decay, final=final)
        assert found[1] == 1
        assert found[-1] == pytest.approx(final, abs=1e-15)
        middle = found[1 + 9 // 2 : 1 + 9 // 2 + 2]  # halfway, both decays are halfway down
        assert sum(middle) / 2 == pytest.approx((1 + final) / 2)
        assert all(a >= b for a, b in pairwise(found[1:]))
    assert factors(5, decay="cosine")[1] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_beyond_the_last_step_nothing_rises_again() -> None:
    config = OptimizerConfig(decay="cosine", final=0.2)
    assert lr_factor(config, 100, 10) == pytest.approx(0.2)


def test_a_late_decay_leaves_the_steps_before_it_as_they_are() -> None:
    late = {"warmup_steps": 2, "decay": "linear", "decay_steps": 4}
    np.testing.assert_allclose(factors(10, **late), [0.5, 1, 1, 1, 1, 1, 1, 2 / 3, 1 / 3, 0], atol=1e-15)
    assert factors(20, **late)[:16] == [*factors(10, **late)[:7], *[1.0] * 9], "a longer run is the same until its own decay"
    for steps in (8, 100):
        assert factors(10, **late | {"decay_steps": steps}) == factors(10, warmup_steps=2, decay="linear")
    with pytest.raises(ConfigError, match="decay_steps = 4 with decay 'constant'"):
        factors(10, decay_steps=4)


def test_only_matrices_decay() -> None:
    network = nn.Sequential(nn.Conv2d(2, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 2))
    optimizer = make_optimizer([(network, 1.0)], OptimizerConfig(weight_decay=0.5))
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decays[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.5, "0.bias": 0, "1.weight": 0, "1.bias": 0, "2.weight": 0.5, "2.bias": 0,
    }  # fmt: skip


@pytest.mark.parametrize("profile", ["exponential", "power"])
def test_averages_against_a_plain_loop(profile: str) -> None:
    config = EMAConfig.parse({"profile": profile, "decay": 0.6, "gamma": 3.0})
    layer = nn.Linear(3, 2, bias=False)
    ema = EMA({"m": layer}, config)
    expected = layer.weight.detach().double().numpy().copy()
    for n in range(12):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=torch.Generator().manual_seed(n)))
        ema.update(n)
        decay = (1 - 1 / (n + 1)) ** 4 if profile == "power" else min(0.6, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double().numpy()
    eps = np.finfo(np.float32).eps
    assert np.abs(ema.averages["m.weight"].numpy() - expected).max() <= 12 * 2 * eps * np.abs(expected).max()


def test_the_power_average_forgets_its_start_and_weighs_late_weights_by_a_power() -> None:
    """Of weights theta(1..n), theta(k) counts as k^(gamma+1) - (k-1)^(gamma+1) over n^(gamma+1) (Karras et al. 2024, eq. 2)."""
    layer = nn.Linear(1, 1, bias=False)
    ema = EMA({"m": layer}, EMAConfig(profile="power", gamma=2.0))
    for k in range(1, 9):
        with torch.no_grad():
            layer.weight.fill_(float(k * k % 7))
        ema.update(k - 1)
    expected = sum((k**3 - (k - 1) ** 3) * (k * k % 7) for k in range(1, 9)) / 8**3
    assert ema.averages["m.weight"].item() == pytest.approx(expected, rel=1e-5)


def test_swapping_twice_changes_nothing() -> None:
    layer = nn.Linear(3, 3)
    ema = EMA({"m": layer}, EMAConfig())
    with torch.no_grad():
        layer.weight.add_(1)
    weights, averages = layer.weight.detach().clone(), ema.averages["m.weight"].clone()
    ema.swap()
    assert torch.equal(layer.weight, averages)
    assert torch.equal(ema.averages["m.weight"], weights)
    ema.swap()
    assert torch.equal(layer.weight, weights)
    assert torch.equal(ema.averages["m.weight"], averages)


def test_each_part_has_its_own_learning_rate() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    optimizer = make_optimizer([(first, 1.0), (second, 0.2)], OptimizerConfig())
    scales = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert [scales[id(p)] for p in first.parameters()] == [1.0, 1.0]
    assert [scales[id(p)] for p in second.parameters()] == [0.2, 0.2]
