"""Attention against its formula in float64, and what masks mean."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels import cross_attention
from ldmkit.kernels.cross_attention.reference import attend_without_dead_rows
from tests.kernels.oracle import DTYPES, LOW, assert_within_bound, judge_attention, randn, seeds, values_and_gradients

INF = float("inf")


def oracle(q, k, v, mask, scale):
    """Vaswani et al. 2017, eq. 1, with rows that have no key set to 0."""
    scores = torch.einsum("bhld,bhsd->bhls", q, k) * scale
    if mask is not None:
        scores = scores + (torch.zeros_like(scores).masked_fill(~mask, -INF) if mask.dtype == torch.bool else mask.double())
    top = scores.detach().amax(dim=-1, keepdim=True) if scores.shape[-1] else scores.new_zeros((*scores.shape[:-1], 1))
    e = torch.exp(scores - top.masked_fill(top == -INF, 0.0))
    total = e.sum(dim=-1, keepdim=True)
    return torch.einsum("bhls,bhsd->bhld", e / total.masked_fill(total == 0, 1.0), v)


@st.composite
def problems(draw):
    """q, k, v, a mask of some kind (or none), and the same mask in four dimensions."""
    B, H, L, S, D = (draw(st.integers(low, high)) for low, high in ((1, 2), (1, 3), (1, 6), (0, 9), (1, 9)))
    dtype, seed = draw(st.sampled_from(DTYPES)), draw(seeds)
    q, k, v = randn((B, H, L, D), seed, dtype, 2.0), randn((B, H, S, D), seed + 1, dtype), randn((B, H, S, D), seed + 2, dtype)
    kind = draw(st.sampled_from([None, "keys", "full", "heads", "queries"]))
    if kind is None:
        return q, k, v, None, None
    shape = {"keys": (B, S), "full": (B, H, L, S), "heads": (1, H, 1, S), "queries": (B, 1, L, S)}[kind]
    mask = randn(shape, seed + 3) > draw(st.sampled_from([-1.0, 0.5, 9.0]))  # the last hides every key
    if draw(st.booleans()):
        mask = randn(shape, seed + 4, dtype).masked_fill(~mask, -INF)
    return q, k, v, mask, mask[:, None, None, :] if kind == "keys" else mask


@given(problem=problems(), scale=st.sampled_from([None, 0.3]), seed=seeds)
def test_values_and_gradients(problem, scale, seed):
    q, k, v, mask, _ = problem
    judge_attention(cross_attention, q, k, v, randn(q.shape, seed, q.dtype), mask=mask, scale=scale)


@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reference", ["as called", "off the CPU"])
def test_a_row_without_keys_is_zero_with_gradient_zero(additive, dtype, reference):
    q, k, v = (randn((2, 3, n, 8), n, dtype).requires_grad_() for n in (5, 7, 7))
    mask = randn((2, 1, 5, 7), 3) > -0.5
    mask[0, 0, 2] = mask[1, 0, 4] = False
    dead = [(0, 2), (1, 4)]
    given_mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -INF) if additive else mask
    if reference == "as called":
        y = cross_attention(q, k, v, mask=given_mask)
    else:  # the branch for other devices, whose SDPA may give NaN for such rows
        y = attend_without_dead_rows(q, k, v, given_mask, None)
        truth = oracle(q.double(), k.double(), v.double(), given_mask, 8**-0.5)
        assert_within_bound([y.double()], [truth], [truth], dtype)
    gradients = torch.autograd.grad(y.square().sum() + y.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in gradients)
    for b, row in dead:
        assert not y[b, :, row].any()
        assert not gradients[0][b, :, row].any()


def test_a_sample_without_keys_gives_its_keys_no_gradient():
    q, k, v = (randn((2, 3, n, 8), n).requires_grad_() for n in (5, 7, 7))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1] = False
    gradients = torch.autograd.grad(cross_attention(q, k, v, mask=mask).square().sum(), (q, k, v))
    for gradient in gradients:
        assert gradient[0].any()
        assert not gradient[1].any()


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0])
@pytest.mark.parametrize("dtype", LOW)
def test_large_scores_keep_their_gradients(dtype, scale):
    """Scores in half precision would break the bound here."""
    for seed in range(10):
        q, k, v = (randn((2, 3, n, 16), seed + i, dtype, scale if i == 0 else 1.0) for i, n in enumerate((16, 77, 77)))
        grad = randn(q.shape, seed + 9, dtype)
        truth = values_and_gradients(lambda *t: oracle(*t, None, 0.25), [q.double(), k.double(), v.double()], grad.double())
        got = values_and_gradients(cross_attention, [q, k, v], grad)
        assert_within_bound(got, values_and_gradients(F.scaled_dot_product_attention, [q, k, v], grad), truth, dtype)


def test_autocast_decides_the_dtype():
    q, k = randn((2, 3, 5, 8), 0), randn((2, 3, 7, 8), 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = cross_attention(q, k.bfloat16(), k)
        with torch.no_grad():
            sampled = cross_attention(q, k.bfloat16(), k)
    assert trained.dtype == sampled.dtype == torch.bfloat16
    truth = oracle(q.double(), k.double(), k.double(), None, 8**-0.5)
    assert_within_bound([trained.double()], [sampled.double()], [truth], torch.bfloat16)


def test_no_keys_at_all_give_zero():
    q, k, v = (randn((2, 3, n, 8), 0).requires_grad_() for n in (5, 0, 0))
    for mask in (None, torch.ones(2, 0, dtype=torch.bool)):
        y = cross_attention(q, k, v, mask=mask)
        assert torch.equal(y, torch.zeros(2, 3, 5, 8))
        assert torch.equal(torch.autograd.grad(y.sum(), q)[0], torch.zeros_like(q))


@given(problem=problems(), seed=seeds)
def test_order_and_hidden_keys_do_not_matter(problem, seed):
    """Permuting keys with their values, or changing hidden ones, changes nothing but rounding."""
    q, k, v, mask, mask_4d = problem
    q, k, v = q.double(), k.double(), v.double()
    order = torch.randperm(k.shape[2], generator=torch.Generator().manual_seed(seed))
    if mask is not None and mask.is_floating_point():
        mask, mask_4d = mask.double(), mask_4d.double()
    y = cross_attention(q, k, v, mask=mask)
    torch.testing.assert_close(
        cross_attention(q, k[:, :, order], v[:, :, order], mask=mask if mask is None else mask[..., order]), y
    )
    if mask is None or mask.dim() != 2:
        return
    hidden = (mask if mask.dtype == torch.bool else mask > -INF).logical_not()[:, None, :, None]
    torch.testing.assert_close(cross_attention(q, k.masked_fill(hidden, 5.0), v.masked_fill(hidden, -7.0), mask=mask), y)


def test_a_square_mask_of_two_dimensions_is_per_sample_and_key():
    q, k, v = (randn((3, 2, 3, 4), i) for i in range(3))
    mask = torch.eye(3, dtype=torch.bool)
    y = cross_attention(q, k, v, mask=mask)
    torch.testing.assert_close(y, torch.stack([v[i, :, i : i + 1].expand(2, 3, 4) for i in range(3)]))


def test_scores_beyond_exp():
    q = torch.full((1, 1, 1, 1), 1e18)
    k = torch.tensor([1e18, -1e18, 1e18]).view(1, 1, 3, 1)
    v = torch.tensor([1.0, 5.0, 3.0]).view(1, 1, 3, 1)
    assert cross_attention(q, k, v).item() == 2.0


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        (((1, 2, 3), (1, 2, 3), (1, 2, 3)), r"shapes \(1, 2, 3\)"),
        (((1, 2, 3, 8), (1, 2, 3, 4), (1, 2, 3, 4)), r"\(1, 2, 3, 8\), \(1, 2, 3, 4\)"),
        (((1, 2, 3, 8), (2, 2, 3, 8), (2, 2, 3, 8)), "they need"),
        (((1, 2, 3, 8), (1, 2, 5, 8), (1, 2, 4, 8)), "they need"),
    ],
)
def test_bad_shapes(shapes, told):
    with pytest.raises(InputError, match=told):
        cross_attention(*(torch.zeros(s) for s in shapes))


@pytest.mark.parametrize(
    ("mask", "error", "told"),
    [
        (torch.ones(1, 4, dtype=torch.bool), InputError, r"\(B, S\) = \(2, 5\)"),
        (torch.ones(3, 5, dtype=torch.bool), InputError, r"mask has shape \(3, 5\)"),
        (torch.ones(2, 3, 5, dtype=torch.bool), InputError, "four dimensions"),
        (torch.ones(2, 5, dtype=torch.int64), InputTypeError, r"torch\.bool \(True = attend\)"),
        (torch.ones(2, 5, dtype=torch.float64), InputTypeError, r"torch\.float32 \(added\)"),
        (torch.ones(2, 5, dtype=torch.bool, device="meta"), InputError, "mask is on meta"),
    ],
)
def test_bad_masks(mask, error, told):
    q, k = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 4)
    with pytest.raises(error, match=told):
        cross_attention(q, k, k, mask=mask)


def test_bad_dtypes_and_devices():
    q, k = torch.zeros(2, 1, 3, 4), torch.zeros(2, 1, 5, 4)
    with pytest.raises(InputTypeError, match="convert them to one"):
        cross_attention(q, k.double(), k)
    with pytest.raises(InputTypeError, match=r"q is torch\.int64"):
        cross_attention(q.long(), k.long(), k.long())
    with pytest.raises(InputError, match="move them to one"):
        cross_attention(q, k.to("meta"), k)
