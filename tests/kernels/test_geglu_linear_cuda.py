"""GEGLU of a linear layer in CUDA, on the emulated GPU. tests/kernels/test_emulation.py shows that it finds mistakes."""

import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import geglu_linear
from ldmkit.kernels.geglu_linear import op
from ldmkit.testing import emulation
from tests.kernels.oracle import DTYPES, LOW, layouts, randn, seeds, strided
from tests.kernels.test_geglu_linear import check, inputs

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")
BACKEND = "cuda-emulated"


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulation.register()


@pytest.fixture(params=["recomputed", "kept"])
def hidden(request, monkeypatch):
    """Whether the forward keeps hidden for the backward."""
    monkeypatch.setitem(op.RECOMPUTED, "cpu", {"recomputed": 10**9, "kept": -1}[request.param])


def by_emulated(*tensors):
    return geglu_linear(*tensors, backend=BACKEND)


# A block has 128 rows and 64 outputs, a slice of k 64 bytes, a ring of slices 4.
SIZES = [
    ((), 1, 1),
    ((3,), 5, 8),
    ((1,), 64, 40),
    ((129,), 65, 33),
    ((2, 70), 72, 160),
    ((0,), 4, 4),
    ((3,), 0, 4),
    ((3,), 4, 0),
]


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(("lead", "n", "k"), SIZES)
def test_values_and_gradients(lead, n, k, dtype):
    check(by_emulated, inputs(lead, n, k, dtype, 0, bias=k != 40), randn((*lead, n), 3, dtype))


@pytest.mark.usefixtures("hidden")
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(bias):
    leaves = [t.requires_grad_() for t in inputs((2, 3), 3, 5, torch.float64, 0, bias=bias)]
    assert torch.autograd.gradcheck(by_emulated, leaves)


def test_many_blocks_of_rows():
    """Past 8 of them, the order of blocks turns to the next column."""
    check(by_emulated, inputs((1100,), 130, 16, torch.bfloat16, 0), randn((1100, 130), 3, torch.bfloat16))


@given(layout=layouts, weight_layout=layouts, expanded=st.booleans(), dtype=st.sampled_from(LOW), seed=seeds)
def test_any_strides(layout, weight_layout, expanded, dtype, seed):
    x, weight, bias = inputs((2, 3), 6, 24, dtype, seed)
    grad = randn((2, 3, 1 if expanded else 6), seed, dtype).expand(2, 3, 6)
    check(by_emulated, [strided(x, layout), strided(weight, weight_layout), bias], grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_schedule_and_every_batch_give_the_same_bits(dtype):
    tensors = inputs((130,), 70, 48, dtype, 0)
    grad = randn((130, 70), 3, dtype)
    x, *rest = tensors
    results = []
    for name in emulation.SCHEDULES:
        with emulation.schedule(name, seed=3):
            y, kept = torch.ops.ldmkit.geglu_linear(*tensors, True, BACKEND)
            nothing = kept[:, :0]
            recomputed = torch.ops.ldmkit.geglu_linear_backward(grad, *tensors, nothing, BACKEND)
            results.append((y, kept, recomputed))
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            assert torch.equal(got, want)
    y, kept, recomputed = results[0]
    for rows in (slice(5, 6), slice(100, 130)):
        assert torch.equal(torch.ops.ldmkit.geglu_linear(x[rows], *rest, False, BACKEND)[0], y[rows])
        again = torch.ops.ldmkit.geglu_linear_backward(grad[rows], x[rows], *rest, kept[rows, :0], BACKEND)
        assert torch.equal(again, recomputed[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_a_number_stays_in_its_row(dtype):
    x, *rest = inputs((140,), 66, 40, dtype, 0)
    y = by_emulated(x, *rest)
    x[7, 3] = float("nan")
    poisoned = by_emulated(x, *rest)
    assert poisoned[7].isnan().all()
    assert torch.equal(poisoned[torch.arange(140) != 7], y[torch.arange(140) != 7])
