"""group_norm_silu in Triton, on a GPU or in Triton's interpreter, where tiles are so small that these shapes come through every
mode.
"""

import pytest
import torch
from hypothesis import given

from ldmkit.errors import KernelError
from ldmkit.kernels import group_norm_silu
from ldmkit.kernels.triton_support import interpreting, lacks
from tests.kernels.group_norm_silu_calls import assert_accurate, calls, formatted
from tests.kernels.oracle import randn

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))
DEVICE = "cpu" if interpreting() else "cuda"


def both_ways(x, groups):
    """y and the gradients of x and weight."""
    weight = randn((x.shape[1],), 1, x.dtype).to(DEVICE).requires_grad_()
    x = x.detach().requires_grad_()
    y = group_norm_silu(x, groups, weight, backend="triton")
    return [y.detach(), *torch.autograd.grad(y, [x, weight], randn(x.shape, 2, x.dtype).to(DEVICE))]


@given(call=calls())
def test_values_and_gradients(call):
    assert_accurate(call, "triton", DEVICE)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(8, 2, 4), (30, 5, 7), (16, 8, 16)])
def test_an_image_alone_and_in_any_place_has_the_same_bits(shape, last):
    x = formatted(randn((2, *shape), 0, torch.bfloat16), last).to(DEVICE)
    y, grad, grad_weight = both_ways(x, 2)
    assert torch.equal(both_ways(x[1:2], 2)[0], y[1:2])
    assert all(map(torch.equal, both_ways(x, 2), (y, grad, grad_weight)))
    odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert all(map(torch.equal, both_ways(odd, 2), (y, grad, grad_weight)))
    assert y.stride() == grad.stride() == x.stride()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(bad):
    clean = formatted(randn((2, 24, 8, 8), 0), True).to(DEVICE)
    dirty = clean.clone()
    dirty[1, 7, 3, 3] = bad
    ours, theirs = (group_norm_silu(t, 8, backend="triton").reshape(2, 8, -1) for t in (dirty, clean))
    assert ours[1, 2].isnan().all()
    ours[1, 2] = theirs[1, 2]
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_nothing_in_nothing_out(shape):
    y, grad, grad_weight = both_ways(torch.zeros(shape, device=DEVICE), 2)
    assert y.shape == grad.shape == shape
    assert torch.equal(grad_weight, torch.zeros(4, device=DEVICE))


def test_numbers_to_1e18():
    y, grad, _ = both_ways(randn((1, 8, 16, 16), 0).to(DEVICE) * 1e18, 2)
    assert y.isfinite().all()
    assert grad.isfinite().all()


def test_a_group_too_wide_for_a_tile_is_refused():
    with pytest.raises(KernelError, match="at most 4096 channels, these have 4097"):
        group_norm_silu(torch.zeros(1, 4097, 1, device=DEVICE), 1, backend="triton")
