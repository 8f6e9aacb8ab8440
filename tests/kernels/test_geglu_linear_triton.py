"""GEGLU of a linear layer in Triton, on a GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import geglu_linear
from ldmkit.kernels.geglu_linear import op
from ldmkit.kernels.triton_support import interpreting, lacks
from tests.kernels.oracle import LOW, layouts, randn, seeds, strided
from tests.kernels.test_geglu_linear import check, inputs

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))
DEVICE = "cpu" if interpreting() else "cuda"


@pytest.fixture(params=["recomputed", "kept"])
def hidden(request, monkeypatch):
    """Whether the forward keeps hidden for the backward."""
    monkeypatch.setitem(op.RECOMPUTED, DEVICE, {"recomputed": 10**9, "kept": -1}[request.param])


def by_triton(*tensors):
    return geglu_linear(*tensors, backend="triton")


def on_device(tensors):
    return [t.to(DEVICE) for t in tensors]


# Tiles have 64 or 128 rows, 32 or 64 results and 32 or 64 of K; 128 results where K is 1024 or more.
SIZES = [((), 1, 1), ((3,), 5, 8), ((129,), 65, 33), ((2, 70), 72, 160), ((3,), 136, 1030)]
SIZES += [((0,), 4, 4), ((3,), 0, 4), ((3,), 4, 0)]


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("lead", "n", "k"), SIZES)
def test_values_and_gradients(lead, n, k, dtype):
    check(by_triton, on_device(inputs(lead, n, k, dtype, 0, bias=k != 160)), randn((*lead, n), 3, dtype).to(DEVICE))


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    leaves = [t.requires_grad_() for t in on_device(inputs((3,), 1, 2, torch.float64, 0, bias=bias))]
    assert torch.autograd.gradcheck(by_triton, leaves)


def test_many_blocks_of_rows():
    """Past 8 of them, the order of blocks turns to the next column."""
    tensors = on_device(inputs((600,), 33, 8, torch.bfloat16, 0))
    check(by_triton, tensors, randn((600, 33), 3, torch.bfloat16).to(DEVICE))


@given(layout=layouts, weight_layout=layouts, expanded=st.booleans(), dtype=st.sampled_from(LOW), seed=seeds)
def test_any_strides(layout, weight_layout, expanded, dtype, seed):
    x, weight, bias = inputs((2, 3), 8, 24, dtype, seed)
    grad = randn((2, 3, 1 if expanded else 8), seed, dtype).to(DEVICE).expand(2, 3, 8)
    check(by_triton, on_device([strided(x, layout), strided(weight, weight_layout), bias]), grad)


@pytest.mark.parametrize("dtype", LOW)
def test_every_batch_gives_the_same_bits(dtype):
    x, *rest = on_device(inputs((130,), 72, 48, dtype, 0))
    grad = randn((130, 72), 3, dtype).to(DEVICE)
    y, nothing = torch.ops.ldmkit.geglu_linear(x, *rest, False, "triton")
    grad_hidden = torch.ops.ldmkit.geglu_linear_backward(grad, x, *rest, nothing, "triton")
    for rows in (slice(5, 6), slice(100, 130)):
        again, nothing = torch.ops.ldmkit.geglu_linear(x[rows], *rest, False, "triton")
        assert torch.equal(again, y[rows])
        again = torch.ops.ldmkit.geglu_linear_backward(grad[rows], x[rows], *rest, nothing, "triton")
        assert torch.equal(again, grad_hidden[rows])


@pytest.mark.parametrize("dtype", LOW)
def test_not_a_number_stays_in_its_row(dtype):
    x, *rest = on_device(inputs((140,), 66, 40, dtype, 0))
    y = by_triton(x, *rest)
    x[7, 3] = float("nan")
    poisoned = by_triton(x, *rest)
    others = torch.arange(140, device=DEVICE) != 7
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[others], y[others])
