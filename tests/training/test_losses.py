"""Losses against closed forms."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Condition, Config, Denoiser, EDMSchedule, FlowSchedule, Level, Model, NoiseSchedule, Prediction
from ldmkit.training import diffusion_loss, level_weight, pixel_loss
from ldmkit.training.recipes import WeightingConfig

PREDICTIONS = [
    {"type": "epsilon"},
    {"type": "v_prediction"},
    {"type": "sample"},
    {"type": "epsilon", "x0_above_sigma": 2.0},
    {"type": "flow"},
    {"type": "edm", "sigma_data": 0.4},
]


class Fixed(Denoiser):
    """Answers with a given tensor and keeps what it was asked."""

    in_channels = out_channels = 2
    multiple_of = 1
    accepts = requires = frozenset()

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.config = Config()
        self.answer = answer

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        self.asked = (x_BCHW, t_B)
        return self.answer


def levels(ts: list[float]) -> list[Level]:
    schedule = NoiseSchedule()
    return [schedule.level(t) for t in ts]


def batch(ts: list[float]) -> tuple[Tensor, Tensor, dict[str, Tensor], list[Level]]:
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, len(ts), 2, 4, 4, dtype=torch.float64, generator=generator)
    found = levels(ts)
    numbers = {
        "alpha_B": torch.tensor([level.alpha for level in found], dtype=torch.float64),
        "sigma_B": torch.tensor([level.sigma for level in found], dtype=torch.float64),
        "t_B": torch.tensor(ts),
    }
    return x0, noise, numbers, found


@pytest.mark.parametrize("kind", PREDICTIONS, ids=str)
def test_a_network_that_knows_x0_has_no_loss(kind: dict[str, Any]) -> None:
    """`Prediction.from_x0` at the noisy latents is what the loss wants, for every prediction at every level."""
    prediction = Prediction(Prediction.Config.parse(kind))
    x0, noise, numbers, found = batch([1.0, 300.0, 700.0, 999.0])
    rows = zip(x0, noise, found, strict=True)
    answer = torch.stack([prediction.from_x0(x, level.alpha * x + level.sigma * n, level) for x, n, level in rows])
    denoiser = Fixed(answer)
    loss_B = diffusion_loss(denoiser, prediction, x0, Condition(), noise, **numbers)
    assert loss_B.shape == (4,)
    # The loss is taken in float32: an error of a few eps of the answer, squared.
    assert loss_B.max() <= (4 * torch.finfo(torch.float32).eps * answer.abs().max()) ** 2
    rows = zip(x0, noise, found, strict=True)
    noisy = torch.stack([(level.alpha * x + level.sigma * n) / prediction.input_scale(level) for x, n, level in rows])
    assert torch.allclose(denoiser.asked[0], noisy, rtol=0, atol=1e-12)
    assert torch.equal(denoiser.asked[1], numbers["t_B"])


class Affine(Denoiser):
    """w x + b."""

    in_channels = out_channels = 1
    multiple_of = 1
    accepts = requires = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.w, self.b = (torch.nn.Parameter(torch.zeros((), dtype=torch.float64)) for _ in range(2))

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        return self.w * x_BCHW + self.b


MEAN, SPREAD = 0.3, 0.5
CORNERS = torch.tensor([(a, b) for a in (-1.0, 1.0) for b in (-1.0, 1.0)], dtype=torch.float64).view(4, 2, 1, 1, 1)
"""Four pairs whose first and second moments are those of independent standard normal numbers."""


def best(denoiser: Affine, prediction: Prediction, level: Level) -> None:
    """Sets w and b to where the gradient of the mean loss, which is affine in them, is zero."""

    def gradient(w: float, b: float) -> Tensor:
        denoiser.w.data.fill_(w)
        denoiser.b.data.fill_(b)
        alpha_B, sigma_B, t_B = (torch.full((4,), n, dtype=torch.float64) for n in (level.alpha, level.sigma, level.t))
        x0, noise = MEAN + SPREAD * CORNERS[:, 0], CORNERS[:, 1]
        loss_B = diffusion_loss(
            denoiser, prediction, x0, Condition(), noise, alpha_B=alpha_B, sigma_B=sigma_B, t_B=t_B
        )  # fmt: skip
        return torch.stack(torch.autograd.grad(loss_B.mean(), [denoiser.w, denoiser.b]))

    at_zero = gradient(0, 0)
    curvature = torch.stack([gradient(1, 0) - at_zero, gradient(0, 1) - at_zero], dim=1)
    w, b = torch.linalg.solve(curvature, -at_zero).tolist()
    denoiser.w.data.fill_(w)
    denoiser.b.data.fill_(b)


LEVELS = {
    "ddpm": [NoiseSchedule().level(t) for t in (0, 300, 999)],
    "zero-snr": [NoiseSchedule(NoiseSchedule.Config(rescale_betas_zero_snr=True)).level(999)],
    "flow": [FlowSchedule().level(t) for t in (20, 400, 1000)],
    "edm": [EDMSchedule().at(ratio) for ratio in (0.01, 0.5, 80.0)],
}


@pytest.mark.parametrize("schedule", LEVELS)
@pytest.mark.parametrize("kind", PREDICTIONS, ids=str)
@torch.no_grad()
def test_the_least_loss_is_that_of_the_posterior_mean(kind: dict[str, Any], schedule: str) -> None:
    """On Gaussian data: what training ends at is, read by `Model`, E[x0 | x], at every level."""
    prediction = Prediction(Prediction.Config.parse(kind))
    for level in LEVELS[schedule]:
        if level.alpha == 0 and prediction.kind_at(level) == "epsilon":
            continue  # says nothing of x0 there
        denoiser = Affine()
        with torch.enable_grad():
            best(denoiser, prediction, level)
        x = torch.linspace(-2, 2, 5, dtype=torch.float64).view(1, 1, 1, 5)
        variance = level.alpha**2 * SPREAD**2 + level.sigma**2
        posterior_mean = MEAN + level.alpha * SPREAD**2 / variance * (x - level.alpha * MEAN)
        found = Model(denoiser, prediction)(x, level, Condition())
        raw = denoiser(x / prediction.input_scale(level), x, Condition())
        denoiser.b.data += 1
        on_output = (Model(denoiser, prediction)(x, level, Condition()) - found).abs().max()
        # The loss is taken in float32: some eps of the raw output, in terms of x0.
        limit = 64 * torch.finfo(torch.float32).eps * on_output * (1 + raw.abs().max())
        assert (found - posterior_mean).abs().max() <= limit, level


@pytest.mark.parametrize("kind", PREDICTIONS, ids=str)
@given(data=st.data())
def test_min_snr_is_one_weight_on_x0_whatever_is_predicted(kind: dict[str, Any], data: st.DataObject) -> None:
    """weight |raw error|^2 = min(SNR, gamma) |x0 error|^2 (Hang et al. 2023, sec. 3.4), whatever the raw output means."""
    t, gamma = float(data.draw(st.integers(0, 999))), data.draw(st.floats(0.5, 20))
    prediction = Prediction(Prediction.Config.parse(kind))
    x0, noise, numbers, (level,) = batch([t])
    raw = data.draw(st.floats(-2, 2)) + x0.flip(2)
    loss_B = diffusion_loss(
        Fixed(raw), prediction, x0, Condition(), noise, **numbers,
        weight_B=level_weight(WeightingConfig(name="min_snr", gamma=gamma), prediction, numbers["alpha_B"], numbers["sigma_B"]),
    )  # fmt: skip
    snr = (level.alpha / level.sigma) ** 2
    x_t = level.alpha * x0 + level.sigma * noise
    expected = min(snr, gamma) * (prediction.to_x0(raw, x_t, level) - x0).square().mean()
    target = prediction.from_x0(x0, x_t, level)
    weight = expected / (raw - target).square().mean()
    rounding = 4 * torch.finfo(torch.float32).eps * weight * (raw.abs() + target.abs()).square().mean()
    assert abs(loss_B.item() - expected) <= rounding  # the loss rounds raw and target to float32, and subtracts


def test_min_snr_weights_by_hand() -> None:
    alpha, sigma = torch.tensor([0.8, 0.6, 1e-3]), torch.tensor([0.6, 0.8, 1.0])
    snr = (alpha / sigma) ** 2
    weighting = WeightingConfig(name="min_snr", gamma=1.0)
    expected = {
        "epsilon": torch.tensor([1 / snr[0], 1.0, 1.0]),
        "v_prediction": torch.tensor([1 / (snr[0] + 1), snr[1] / (snr[1] + 1), snr[2] / (snr[2] + 1)]),
        "sample": torch.tensor([1.0, snr[1], snr[2]]),
    }
    for kind, weights in expected.items():
        found = level_weight(weighting, Prediction(Prediction.Config.parse({"type": kind})), alpha, sigma)
        assert torch.allclose(found, weights, rtol=4 * torch.finfo(torch.float32).eps)


def test_weights_at_zero_signal_are_finite() -> None:
    alpha, sigma = torch.zeros(1), torch.ones(1)
    weighting = WeightingConfig(name="min_snr")
    found = {
        k["type"]: level_weight(weighting, Prediction(Prediction.Config.parse(k)), alpha, sigma).item() for k in PREDICTIONS[:3]
    }
    assert found == {"epsilon": 1.0, "v_prediction": 0.0, "sample": 0.0}


@pytest.mark.parametrize("kind", PREDICTIONS, ids=str)
def test_uniform_weights_are_one(kind: dict[str, Any]) -> None:
    prediction = Prediction(Prediction.Config.parse(kind))
    _, _, numbers, _ = batch([0.0, 500.0, 999.0])
    assert level_weight(WeightingConfig(), prediction, numbers["alpha_B"], numbers["sigma_B"]).tolist() == [1, 1, 1]


def test_pixel_losses() -> None:
    a, b = torch.tensor([[[[1.0, 0.0]]], [[[0.5, 0.5]]]]), torch.tensor([[[[0.0, 0.0]]], [[[0.0, 1.0]]]])
    assert pixel_loss(a, b, "l1").tolist() == [0.5, 0.5]
    assert pixel_loss(a, b, "l2").tolist() == [0.5, 0.25]
    assert pixel_loss(a, b, "mixed").tolist() == [0.5, 0.375]
