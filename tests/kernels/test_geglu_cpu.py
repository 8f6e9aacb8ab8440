"""The C++ kernel of GEGLU: every 16-bit gate there is, tails and zero against float64, and how large outputs are written."""

import pytest
import torch

from ldmkit.kernels import geglu
from ldmkit.kernels.compiled import ABSENT
from tests.kernels.oracle import LOW, phi, randn

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


def with_value(value: float, gate: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.full_like(gate, value), gate], dim=-1)


def roundings(got: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Errors in units of the last place of the truth, which is float64; below the least normal number, of that one's."""
    info = torch.finfo(got.dtype)
    place = truth.abs().clamp_min(info.tiny).log2().floor().exp2() * info.eps
    return (got.double() - truth).abs() / place


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_gate_of_16_bits_is_rounded_once(dtype):
    """All 65536: what is added to the half unit of rounding is the polynomials' error. Subnormals are kept, NaNs stay NaNs."""
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    y = geglu(with_value(1.0, gate), backend="cpu")
    truth = gate.double() * phi(gate)
    finite = gate.isfinite()
    assert roundings(y[finite], truth[finite]).max() <= 0.5 + 1e-5 / torch.finfo(dtype).eps
    infinite = torch.tensor([float("inf"), float("nan")], dtype=dtype)
    torch.testing.assert_close(geglu(with_value(1.0, infinite), backend="cpu"), infinite, equal_nan=True)
    assert y[gate.isnan()].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_every_gate_of_16_bits(dtype):
    gate = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    gate = gate[gate.isfinite() & (gate.abs() < 1e4)]
    x = with_value(1.0, gate).requires_grad_()
    (got,) = torch.autograd.grad(geglu(x, backend="cpu").sum(), x)
    of_value, of_gate = got.chunk(2)
    exact = gate.double()
    bell = torch.exp(-exact.square() / 2) / (2 * torch.pi) ** 0.5
    allowance = 1e-5 / torch.finfo(dtype).eps
    assert roundings(of_value, exact * phi(gate)).max() <= 0.5 + allowance
    # Phi(g) + g phi(g) crosses zero: the polynomials' error is relative to its parts.
    error = (of_gate.double() - (phi(gate) + exact * bell)).abs()
    parts = (phi(gate) + (exact * bell).abs()).clamp_min(torch.finfo(dtype).tiny)
    assert (error / parts).max() <= torch.finfo(dtype).eps / 2 + 1e-5


def test_relative_accuracy_in_far_tails_and_near_zero():
    """fp32, where plain torch's 1 + erf has lost all digits below -5."""
    tails = torch.linspace(-13, 13, 40001)
    zero = torch.logspace(-37, 0, 20001)
    for gate in (tails, zero, -zero):
        truth = gate.double() * phi(gate)
        assert roundings(geglu(with_value(1.0, gate), backend="cpu"), truth).max() <= 5
    beyond = torch.tensor([-14.5, -15.0, -100.0, -1e18, -torch.finfo(torch.float32).max])
    assert torch.equal(geglu(with_value(1.0, beyond), backend="cpu"), torch.zeros(5))


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("n", [4096, 4099])
def test_large_outputs_have_the_bits_of_small_ones(dtype, n):
    """Past half the cache they are written around it (rows of whole cache lines only), and past 32 MiB in huge pages."""
    rows = 34 * 2**20 // (n * dtype.itemsize)
    x = randn((64, 2 * n), 0, dtype, 2.0)[torch.arange(rows) % 64].requires_grad_()
    few = x[:64].detach().requires_grad_()
    y, part = geglu(x, backend="cpu"), geglu(few, backend="cpu")
    grad = randn((1, n), 1, dtype)
    (got,) = torch.autograd.grad(y, x, grad.expand_as(y))
    (want,) = torch.autograd.grad(part, few, grad.expand_as(part))
    for large, small in ((y, part), (got, want)):
        assert all(torch.equal(rest, small[: rest.shape[0]]) for rest in large.split(64))
