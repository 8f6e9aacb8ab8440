"""Attention in Triton, on a GPU, or in Triton's interpreter where there is none; the contract is in test_contract."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.kernels import cross_attention
from ldmkit.kernels.triton_support import interpreting, lacks
from tests.kernels.oracle import DTYPES, assert_within_bound, judge_attention, randn, seeds, values_and_gradients
from tests.kernels.test_cross_attention import oracle

pytestmark = pytest.mark.skipif(lacks() is not None, reason=str(lacks()))
DEVICE = "cpu" if interpreting() else "cuda"
DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
INF = float("inf")


def inputs(B, H, L, S, D, dtype, seed):
    """q, k, v and the gradient of the output, whose heads lie inside."""
    return [randn((B, n, H, D), seed + i, dtype).transpose(1, 2).to(DEVICE) for i, n in enumerate((L, S, S, L))]


def check(B, H, L, S, D, dtype, *, mask=None, scale=None, seed=0):
    """Values and gradients against float64, by plain torch's own error."""
    q, k, v, grad = inputs(B, H, L, S, D, dtype, seed)
    factor = D**-0.5 if scale is None else scale
    truth = values_and_gradients(lambda *t: oracle(*t, mask, factor), [q.double(), k.double(), v.double()], grad.double())
    got = values_and_gradients(lambda *t: cross_attention(*t, mask=mask, scale=scale, backend="triton"), [q, k, v], grad)
    plain = values_and_gradients(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask, scale=scale), [q, k, v], grad)
    assert_within_bound(got, plain, truth, dtype)


@pytest.mark.parametrize("S", [77, 170], ids=["few", "many"])
@pytest.mark.parametrize("D", DIMS)
def test_every_head_dimension(D, S):
    check(1, 1, 17, S, D, torch.bfloat16 if D % 16 else torch.float16)


@given(
    S=st.integers(2, 170),
    D=st.sampled_from([4, 8, 20, 40]),
    dtype=st.sampled_from(DTYPES),
    seed=seeds,
    scale=st.sampled_from([None, -0.3, 0.0]),
)
def test_any_number_of_keys(S, D, dtype, seed, scale):
    q, k, v, grad = inputs(1, 2, 17, S, D, dtype, seed)
    judge_attention(partial(cross_attention, backend="triton"), q, k, v, grad, scale=scale)


def test_what_a_row_shares_is_not_rounded_more_than_once():
    """The log-sum-exp and the scale times log2(e): both rounded, dV of three queries was off by 1.46 times the bound."""
    check(1, 2, 3, 9, 20, torch.float32, seed=444, scale=-0.3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("S", range(1, 161))
def test_every_number_of_keys(S):
    check(1, 1, 5, S, 40, torch.float16)


@pytest.mark.exhaustive
@pytest.mark.parametrize("S", [4096, 16384])
def test_long_contexts(S):
    check(1, 1, 64, S, 64, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_queries_are_dealt_out_for_the_gradient_of_few_keys(dtype):
    from ldmkit.kernels.cross_attention.triton.launches import chunks_of

    assert chunks_of(260, 9) == 7
    check(1, 2, 260, 9, 24, dtype)


@pytest.mark.parametrize("S", [40, 200], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["keys", "rows", "added"])
def test_masks(kind, S):
    mask = randn((1, 1, 1 if kind == "keys" else 20, S), 1) > 0
    if kind == "added":
        mask = randn(mask.shape, 2, torch.bfloat16).masked_fill(~mask, -INF)
    check(2, 2, 20, S, 40, torch.bfloat16, mask=mask.to(DEVICE))


def test_rows_that_start_at_16_bytes_are_known_to():
    """So that Triton loads vectors at D = 40 too, where the strides are no multiples of 16."""
    from ldmkit.kernels.cross_attention.triton.launches import Target, forward_launches

    def align(q):
        (launch,) = forward_launches(q, q, q, None, 1.0, q, q, Target(large=True, processors=1))
        return launch.arguments["ALIGN"]

    heads_inside = torch.empty(2, 5, 8, 40, dtype=torch.float16).transpose(1, 2)
    assert align(heads_inside) == 8
    assert align(heads_inside.float()) == 4
    assert align(torch.empty(2, 5, 8, 41, dtype=torch.float16)[..., 1:].transpose(1, 2)) == 1
    assert align(torch.empty(2, 8, 40, 5, dtype=torch.float16).mT) == 1
