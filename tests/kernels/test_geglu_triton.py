"""GEGLU in Triton, on a GPU, or in Triton's interpreter where there is none."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import geglu
from ldmkit.kernels.triton_support import interpreting, lacks
from tests.kernels.oracle import DTYPES, assert_within_bound, layouts, randn, seeds, strided, values_and_gradients
from tests.kernels.test_geglu import oracle, plain

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))
DEVICE = "cpu" if interpreting() else "cuda"


def by_triton(x):
    return geglu(x, backend="triton")


@given(
    lead=st.lists(st.integers(0, 3), max_size=2),
    n=st.sampled_from([0, 1, 3, 8, 24, 255, 256, 257, 512]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 5.0, 100.0]),
    layout=layouts,
    expanded=st.booleans(),
    seed=seeds,
)
def test_values_and_gradients(lead, n, dtype, scale, layout, expanded, seed):
    x = strided(randn((*lead, 2 * n), seed, dtype, scale), layout).to(DEVICE)
    grad = randn((*lead, 1 if expanded else n), seed + 1, dtype).to(DEVICE).expand(*lead, n)
    truth = values_and_gradients(oracle, [x.double()], grad.double())
    got = values_and_gradients(by_triton, [x], grad)
    assert_within_bound(got, values_and_gradients(plain, [x], grad), truth, dtype)


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 4), (torch.bfloat16, 0.51), (torch.float16, 0.51)])
def test_both_tails_keep_their_relative_accuracy(dtype, roundings):
    """16-bit results are those of exact arithmetic, rounded; those in fp32 are a few roundings off."""
    gate = torch.linspace(-13, 13, 20001).to(dtype)
    x = torch.stack([torch.ones_like(gate), gate], dim=-1).to(DEVICE)
    truth = oracle(x)
    normal = truth.abs() > torch.finfo(dtype).smallest_normal
    relative = ((by_triton(x).double() - truth) / truth).abs()[normal].max()
    assert relative <= roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(dtype):
    gates = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e18, -1e18, 1e-40, float("nan"), float("inf"), -float("inf")]).to(dtype)
    x = torch.stack([torch.full_like(gates, 0.5), gates], dim=-1).to(DEVICE).requires_grad_()
    results = []
    for op in (by_triton, plain):
        y = op(x)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    for got, want in zip(*results, strict=True):
        info = torch.finfo(dtype)
        torch.testing.assert_close(got, want, rtol=2 * info.eps, atol=info.smallest_normal * info.eps, equal_nan=True)


@given(rows=st.integers(1, 9), n=st.sampled_from([1, 7, 8, 260]), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_a_row_has_the_same_bits_alone_and_in_any_order(rows, n, dtype, seed):
    x = randn((rows, 2 * n), seed, dtype, 3.0).to(DEVICE)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    y = by_triton(x)
    assert torch.equal(by_triton(x[order]), y[order])
    assert torch.equal(by_triton(x[:1]), y[:1])
