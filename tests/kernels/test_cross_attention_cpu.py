"""The C++ attention: every length of keys, long keys in blocks, masks in every form, merging, the same bits everywhere."""

import math
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ldmkit.kernels import cross_attention
from ldmkit.kernels.compiled import ABSENT, build_info
from ldmkit.testing import contract
from ldmkit.testing.contract.cross_attention import PLAIN_CASE
from tests.kernels.oracle import DTYPES, LOW, assert_within_bound, randn, seeds, values_and_gradients

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
INF = float("inf")
BOUND = "the bound, over shapes, dtypes, layouts, sizes"
NAMES = ("float32", "bfloat16", "float16")
HEAD_DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)


def heads_inside(shape, seed, dtype, scale=1.0):
    """(B, H, rows, D) as a network has it: a view of (B, rows, H, D)."""
    B, H, rows, D = shape
    return randn((B, rows, H, D), seed, dtype, scale).transpose(1, 2)


def attention(B, H, L, S, D, seed, dtype):
    return [heads_inside((B, H, rows, D), seed + i, dtype) for i, rows in enumerate((L, S, S))]


def check(L, S, D, dtype, **case):
    """Values, log-sum-exp and gradients within the contract's bound."""
    contract.replay(
        "cross_attention", BOUND, "cpu", **{**PLAIN_CASE, "queries": L, "keys": S, "dim": D, "dtype": dtype, **case}
    )


@given(S=st.integers(1, 160), D=st.sampled_from(HEAD_DIMS), L=st.integers(1, 20), dtype=st.sampled_from(NAMES), seed=seeds)
def test_any_number_of_keys_at_any_width(S, D, L, dtype, seed):
    check(L, S, D, dtype, seed=seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", NAMES)
def test_every_number_of_keys_at_every_width(dtype):
    for S in range(1, 161):
        for D in HEAD_DIMS:
            check(7, S, D, dtype, batch=1, heads=1, seed=S * D)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize("S", [4096, 16384])
def test_long_contexts(S, dtype):
    check(64, S, 64, dtype, batch=1, heads=1)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("L", "S", "D"), [(100, 513, 8), (37, 1100, 40), (9, 1025, 160), (700, 600, 24), (64, 4096, 16)])
def test_keys_in_several_blocks(L, S, D, dtype):
    """More queries than one block of the backward pass, and more keys than one block of either pass."""
    for mask in (None, "full", "keys"):
        check(L, S, D, dtype, batch=1, heads=1, mask=mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("shape", [(2, 1, 1, 40), (2, 3, 9, 40), (1, 1, 9, 40), (1, 3, 1, 40), (2, 1, 9, 1)])
def test_masks_of_every_shape_and_keys_that_nobody_sees(shape, additive, dtype):
    """Such keys may hold NaN, and get gradient 0; the others' results do not change by a bit."""
    q, k, v = attention(2, 3, 9, 40, 24, 0, dtype)
    mask = randn(shape, 7) > -0.7
    hidden = slice(0, 0) if shape[3] == 1 else slice(5, 9)
    mask[..., hidden] = False
    if additive:
        mask = randn(shape, 8, dtype).masked_fill(~mask, -INF)
    spoilt = [t.index_fill(2, torch.arange(*hidden.indices(40)), math.nan) for t in (k, v)]
    grad = heads_inside(q.shape, 9, dtype)
    clean = values_and_gradients(lambda *t: cross_attention(*t, mask=mask, backend="cpu"), [q, k, v], grad)
    leaves = [t.detach().requires_grad_() for t in (q, *spoilt)]
    y = cross_attention(*leaves, mask=mask, backend="cpu")
    for got, want in zip((y, *torch.autograd.grad(y, leaves, grad)), clean, strict=True):
        assert torch.equal(got.double(), want)
    assert not clean[2][:, :, hidden].any()
    assert not clean[3][:, :, hidden].any()


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e30])
def test_the_least_finite_bias_hides_nothing_where_all_keys_have_it(fill):
    q, k, v = attention(1, 1, 3, 20, 8, 0, torch.float32)
    bias = torch.full((1, 1, 3, 20), fill)
    torch.testing.assert_close(cross_attention(q, k, v, mask=bias, backend="cpu"), v.mean(dim=2, keepdim=True).expand_as(q))


@given(
    B=st.integers(1, 3),
    L=st.integers(1, 200),
    S=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    mask=st.booleans(),
)
@example(B=2, L=1300, S=1100, dtype=torch.bfloat16, seed=0, mask=False)
@example(B=2, L=1300, S=1100, dtype=torch.float32, seed=0, mask=True)
def test_the_same_bits_alone_and_on_any_threads(B, L, S, dtype, seed, mask):
    """Three threads, two heads: the pieces of a head run side by side; one thread: one after the other."""
    inputs = attention(B, 2, L, S, 8, seed, dtype)
    flags = randn((B, S), seed + 3) > -1.0 if mask else None
    grad = heads_inside(inputs[0].shape, seed + 4, dtype)

    def run(item=slice(None)):
        q, k, v = (t[item].detach().requires_grad_() for t in inputs)
        y, lse = cross_attention(q, k, v, mask=None if flags is None else flags[item], return_lse=True, backend="cpu")
        return y, lse, *torch.autograd.grad(y, (q, k, v), grad[item])

    one = run()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        many = run()
        last = run(slice(B - 1, B))
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, many, last, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[B - 1 :], c)


@given(S=st.integers(2, 60), cut=st.integers(1, 59), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_contexts_merge_by_log_sum_exp(S, cut, dtype, seed):
    """Weighted by exp(lse), attention to two parts is attention to both; gradients flow through lse, too."""
    cut = min(cut, S - 1)
    inputs = attention(1, 2, 5, S, 16, seed, dtype)
    grad = heads_inside(inputs[0].shape, seed + 4, dtype)

    def merged(q, k, v):
        parts = [
            cross_attention(q, k[:, :, part], v[:, :, part], return_lse=True, backend="cpu")
            for part in (slice(0, cut), slice(cut, S))
        ]
        weights = torch.stack([lse for _, lse in parts]).softmax(dim=0).unsqueeze(-1)
        return sum(w * y for w, (y, _) in zip(weights, parts, strict=True))

    def in_torch(q, k, v):
        parts = [(q @ k[:, :, part].mT * q.shape[-1] ** -0.5, v[:, :, part]) for part in (slice(0, cut), slice(cut, S))]
        weights = torch.stack([scores.float().logsumexp(dim=-1) for scores, _ in parts]).softmax(dim=0).unsqueeze(-1)
        return sum(w * (scores.softmax(dim=-1) @ v) for w, (scores, v) in zip(weights, parts, strict=True))

    together = values_and_gradients(merged, inputs, grad)
    plain = values_and_gradients(in_torch, inputs, grad)
    whole = values_and_gradients(lambda *t: cross_attention(*t, backend="cpu"), [t.double() for t in inputs], grad.double())
    assert_within_bound(together, plain, whole, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_huge_scores_keep_finite_gradients(dtype):
    q = torch.full((1, 1, 1, 1), 1e18, dtype=dtype).requires_grad_()
    k = torch.tensor([1e18, -1e18, 1e18], dtype=dtype).view(1, 1, 3, 1).requires_grad_()
    v = torch.tensor([1.0, 5.0, 3.0], dtype=dtype).view(1, 1, 3, 1).requires_grad_()
    y = cross_attention(q, k, v, backend="cpu")
    assert y.item() == 2.0
    assert all(t.isfinite().all() for t in torch.autograd.grad(y, (q, k, v)))


@pytest.mark.parametrize("dtype", LOW)
def test_one_key_gives_its_value_and_no_gradient_to_queries(dtype):
    q, k, v = (t.requires_grad_() for t in attention(2, 2, 9, 1, 40, 0, dtype))
    y = cross_attention(q, k, v, backend="cpu")
    assert torch.equal(y, v.expand_as(y))
    for gradient in torch.autograd.grad(y, (q, k), heads_inside(y.shape, 3, dtype)):
        assert not gradient.any()


@pytest.mark.parametrize("dtype", LOW)
def test_nan_stays_in_its_row_or_head(dtype):
    q, k, v = attention(1, 2, 9, 20, 8, 0, dtype)
    q[0, 0, 4, 3] = math.nan
    y = cross_attention(q, k, v, backend="cpu").isnan().any(dim=-1)
    assert y[0, 0].tolist() == [row == 4 for row in range(9)]
    assert not y[0, 1].any()
    k[0, 1, 7, 2] = math.nan
    assert cross_attention(q, k, v, backend="cpu")[0, 1].isnan().all()


NARROWER = """
from ldmkit.kernels.compiled import build_info
from ldmkit.testing import contract
report = contract.check("cross_attention", backend="cpu", only=[1, 5, 8, 13, 14, "hidden keys change nothing"])
assert report.passed, report.table()
print(build_info()["cpu"])
"""


@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_narrower_instruction_sets_hold_the_contract(capability, root):
    if build_info()["cpu"] not in ("avx512_bf16", capability) and capability == "avx512":
        pytest.skip("this processor has no AVX-512")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NARROWER], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"default", capability}
