"""The C++ group norm with SiLU: values and gradients against float64, and what only it promises."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import group_norm_silu
from ldmkit.kernels.compiled import ABSENT
from tests.kernels.oracle import DTYPES, LOW, assert_within_bound, randn, seeds, strided, values_and_gradients

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


def oracle(x, groups, weight, bias, shift, residual, silu):
    """Wu and He 2018, eq. 1 and 2, in two passes."""
    h = x + shift.view(*shift.shape, *(1,) * (x.dim() - 2)) + residual
    grouped = h.reshape(h.shape[0], groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    normal = (centred / (centred.square().mean(dim=2, keepdim=True) + 1e-5).sqrt()).reshape(h.shape)
    shape = (1, -1) + (1,) * (h.dim() - 2)
    y = normal * weight.view(shape) + bias.view(shape)
    return y * torch.sigmoid(y) if silu else y


def call(backend, groups, silu):
    def op(x, weight, bias, shift, residual):
        return group_norm_silu(x, groups, weight, bias, silu=silu, shift=shift, residual=residual, backend=backend)

    return op


def worst_mean(x, groups, shift, residual):
    h = x.double() + shift.double().view(*shift.shape, *(1,) * (x.dim() - 2)) + residual.double()
    grouped = h.reshape(h.shape[0], groups, -1)
    return 1 + (grouped.mean(2).abs() / (grouped.var(2, unbiased=False) + 1e-5).sqrt()).max().item()


def check(x, groups, silu, seed):
    channels, dtype = x.shape[1], x.dtype
    weight, bias = randn((channels,), seed + 1, dtype), randn((channels,), seed + 2, dtype)
    shift, residual = randn(x.shape[:2], seed + 3, dtype), randn(x.shape, seed + 4, dtype)
    inputs, grad = [x, weight, bias, shift, residual], randn(x.shape, seed + 5, dtype)
    truth = values_and_gradients(
        lambda x, w, b, s, r: oracle(x, groups, w, b, s, r, silu), [t.double() for t in inputs], grad.double()
    )
    got, plain = (values_and_gradients(call(backend, groups, silu), inputs, grad) for backend in ("cpu", "reference"))
    assert_within_bound(got, plain, truth, dtype, worst_mean(x, groups, shift, residual))


def laid_out(x, layout):
    if layout == "channels_last":
        return x.to(memory_format=torch.channels_last)
    return strided(x, layout)


layouts = st.sampled_from(["dense", "channels_last", "sliced", "transposed", "chunk-half", "offset"])
# Fewer pixels or channels than a vector has, a vector's own number, one more; groups of many channels, large planes.
shapes = st.sampled_from(
    [(2, 6, 1, 3), (1, 8, 3, 5), (2, 36, 4, 4), (2, 30, 5, 7), (1, 68, 8, 9), (3, 64, 2, 8), (1, 4, 130, 131), (2, 520, 4, 5)]
)


@given(
    shape=shapes,
    dtype=st.sampled_from(DTYPES),
    layout=layouts,
    offset=st.sampled_from([0.0, 30.0]),
    silu=st.booleans(),
    seed=seeds,
)
def test_values_and_gradients(shape, dtype, layout, offset, silu, seed):
    x = laid_out(randn(shape, seed, torch.float64).add(offset).to(dtype), layout)
    check(x, 2, silu, seed)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", LOW)
def test_a_row_has_the_same_bits_alone_in_any_order_and_on_any_threads(dtype, layout):
    """33 x 33 pixels are cut into parts in channels_last; with one thread for one group, groups are one thread's each."""
    x, weight, bias = randn((4, 64, 33, 33), 0, dtype).to(memory_format=layout), randn((64,), 1, dtype), randn((64,), 2, dtype)
    grad = randn(x.shape, 3, dtype).to(memory_format=layout)

    def run(order):
        leaf, w = x[order].detach().requires_grad_(), weight.detach().requires_grad_()
        y = group_norm_silu(leaf, 32, w, bias, backend="cpu")
        return (y.detach(), *torch.autograd.grad(y, (leaf, w), grad[order]))

    y, grad_x, grad_weight = run(slice(None))
    order, threads = torch.tensor([2, 0, 3, 1]), torch.get_num_threads()
    for got, want in zip(run(order)[:2], (y, grad_x), strict=True):
        assert torch.equal(got, want[order])
    for got, want in zip(run(slice(1, 2))[:2], (y, grad_x), strict=True):
        assert torch.equal(got, want[1:2])
    try:
        for count in (1, 2, 3, 70):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(slice(None)), (y, grad_x, grad_weight), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1e18, 1e30])
def test_extreme_magnitudes(scale, dtype, layout):
    x = (randn((2, 32, 5, 5), 0, torch.float64) * scale).to(dtype).to(memory_format=layout)
    shift, residual = torch.zeros(2, 32, dtype=dtype), torch.zeros_like(x)
    weight, bias = randn((32,), 1, dtype), torch.zeros(32, dtype=dtype)
    truth = oracle(*(t.double() if isinstance(t, torch.Tensor) else t for t in (x, 4, weight, bias, shift, residual, True)))
    y = group_norm_silu(x, 4, weight, bias, backend="cpu")
    assert (y.double() - truth).abs().max() <= 2 * torch.finfo(dtype).eps * truth.abs().max()


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_means_far_from_zero(ratio):
    """E[x^2] - E[x]^2 would lose 1 / std in floats from a ratio of 3e3 on."""
    x = randn((1, 32, 16, 16), 0).add(ratio)
    truth = oracle(*(t.double() if isinstance(t, torch.Tensor) else t for t in (x, 4, *constants(x), True)))
    y = group_norm_silu(x, 4, backend="cpu")
    assert (y - truth).abs().max() <= 2 * torch.finfo(torch.float32).eps * truth.abs().max()


def constants(x):
    return torch.ones(x.shape[1]), torch.zeros(x.shape[1]), torch.zeros(x.shape[:2]), torch.zeros_like(x)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_what_is_not_finite_stays_in_its_group(bad, layout):
    x = randn((2, 64, 6, 6), 0).to(memory_format=layout)
    clean = group_norm_silu(x, 4, backend="cpu")
    x[1, 20, 3, 3] = bad
    y = group_norm_silu(x, 4, backend="cpu")
    inside = torch.zeros_like(y, dtype=torch.bool)
    inside[1, 16:32] = True
    assert y[inside].isnan().all()
    assert torch.equal(y[~inside], clean[~inside])


NARROWER = """
from ldmkit.kernels.compiled import build_info
from tests.kernels.oracle import DTYPES, randn
from tests.kernels.test_group_norm_silu_cpu import check, laid_out
for dtype in DTYPES:
    for layout in ("dense", "channels_last"):
        for shape in ((2, 30, 5, 7), (1, 64, 8, 8)):
            check(laid_out(randn(shape, 0, dtype, 3.0), layout), 2, True, 1)
print(build_info()["cpu"])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_narrower_instruction_sets(capability, root):
    """The code paths that this processor would not take by itself: torch's own switch restricts our kernels too."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", NARROWER], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"default", "avx2", capability}
