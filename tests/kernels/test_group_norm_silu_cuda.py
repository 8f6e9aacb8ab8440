"""group_norm_silu's CUDA kernels on the emulated GPU, where tiles are so small that these shapes come through every regime."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import group_norm_silu
from ldmkit.testing import emulation
from tests.kernels.group_norm_silu_calls import assert_accurate, calls, formatted
from tests.kernels.oracle import randn

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")
SHAPES = [(2, 8, 2, 4), (2, 24, 8, 8), (1, 30, 5, 7), (2, 64, 16, 16), (1, 512, 2, 4), (1, 303, 3, 4)]


@pytest.fixture(scope="module", autouse=True)
def registered():
    emulation.register()


def both_ways(x, groups, **arguments):
    """y and the gradients of x and weight."""
    weight = randn((x.shape[1],), 1, x.dtype).requires_grad_()
    x = x.detach().requires_grad_()
    y = group_norm_silu(x, groups, weight, backend="cuda-emulated", **arguments)
    return [y.detach(), *torch.autograd.grad(y, [x, weight], randn(x.shape, 2, x.dtype))]


@given(call=calls(), schedule=st.sampled_from(emulation.SCHEDULES))
def test_values_and_gradients(call, schedule):
    with emulation.schedule(schedule, seed=5):
        assert_accurate(call, "cuda-emulated")


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_image_alone_in_any_place_and_under_any_schedule_has_the_same_bits(shape, last):
    x = formatted(randn((3, *shape[1:]), 0, torch.bfloat16), last)
    groups = 2 if shape[1] % 2 == 0 else 3
    y, grad, grad_weight = both_ways(x, groups)
    for name in ("reverse", "random"):
        with emulation.schedule(name, seed=1):
            assert all(map(torch.equal, both_ways(x, groups), (y, grad, grad_weight)))
    assert torch.equal(both_ways(x[1:2], groups)[0], y[1:2])
    odd = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride()).copy_(x)  # no 16-byte accesses
    assert all(map(torch.equal, both_ways(odd, groups), (y, grad, grad_weight)))
    assert y.stride() == grad.stride() == x.stride()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad, last):
    x = formatted(randn((2, 24, 8, 8), 0), last)
    clean, dirty = x.clone(), x.clone()
    dirty[1, 7, 3, 3] = bad
    ours, theirs = (group_norm_silu(t, 8, backend="cuda-emulated") for t in (dirty, clean))
    groups = ours.reshape(2, 8, -1)
    assert groups[1, 2].isnan().all()
    groups[1, 2] = theirs.reshape(2, 8, -1)[1, 2]
    assert torch.equal(groups, theirs.reshape(2, 8, -1))


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_nothing_in_nothing_out(shape):
    y, grad, grad_weight = both_ways(torch.zeros(shape), 2)
    assert y.shape == grad.shape == shape
    assert torch.equal(grad_weight, torch.zeros(4))


def test_numbers_to_1e18():
    x = randn((1, 8, 16, 16), 0) * 1e18
    y, grad, _ = both_ways(x, 2)
    assert y.isfinite().all()
    assert grad.isfinite().all()
