"""Attention to many keys, forward: online softmax (Milakov and Gimelshein 2018, arXiv:1805.02867; Dao 2023, arXiv:2307.08691).

A program serves one block of queries and walks over all keys. The head dimension comes in two pieces (1 and 2).
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.cross_attention.triton.pieces import (
    STRIDES,
    exponent_of,
    exponential,
    load_bias,
    load_pieces,
    load_rows,
    mask_scores,
    product,
    readable_keys,
    store_rows,
)
from ldmkit.kernels.triton_casts import narrow

UNSPECIALISED = [*STRIDES, "H", "L", "S"]


@triton.jit
def _attend(
    q, q1, q2, k, v, mask, shown, rows, start, top, total, out1, out2,
    q_l, q_d, k_s, k_d, v_s, v_d, m_l, m_s, L, S, scale, factor,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, SCALED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, CHECK: tl.constexpr,
):  # fmt: skip
    """Takes KEYS more keys into the running maximum, total and output."""
    CHECK_KEYS: tl.constexpr = CHECK or MASK > 0
    keys = start + tl.arange(0, KEYS)
    read = readable_keys(shown, keys, S, MASK)
    scores = tl.zeros([rows.shape[0], KEYS], ACC)
    if CHUNK == 0:
        k1, k2 = load_pieces(k, keys, read, k_s, k_d, D, D1, D2, ALIGN, CHECK_KEYS)
        scores = product(q1, k1.T, scores, PRECISION)
        if D2 > 0:
            scores = product(q2, k2.T, scores, PRECISION)
    else:  # too wide to keep queries in registers
        for column in tl.static_range(0, D, CHUNK):
            q_chunk = load_rows(q, rows, rows < L, q_l, q_d, column, CHUNK, D, ALIGN, True)
            k_chunk = load_rows(k, keys, read, k_s, k_d, column, CHUNK, D, ALIGN, CHECK_KEYS)
            scores = product(q_chunk, k_chunk.T, scores, PRECISION)
    bias = 0.0
    if MASK > 0:
        bias = load_bias(mask, rows, keys, L, S, m_l, m_s, MASK, BY_ROW, ACC)
    scores = mask_scores(scores, bias, keys, S, scale, MASK, SCALED, CHECK)

    higher = tl.maximum(top, tl.max(scores, 1))
    reference = higher
    if MASK > 0:  # rows that have seen no key yet
        reference = tl.where(higher == float("-inf"), 0.0, higher)
    p = exponential(scores - reference[:, None], factor, ACC)
    shrink = exponential(top - reference, factor, ACC)
    total = total * shrink + tl.sum(p, 1)
    p = narrow(p, v.dtype.element_ty)

    v1, v2 = load_pieces(v, keys, read, v_s, v_d, D, D1, D2, ALIGN, CHECK_KEYS)
    out1 = product(p, v1, out1 * shrink[:, None], PRECISION)
    if D2 > 0:
        out2 = product(p, v2, out2 * shrink[:, None], PRECISION)
    return higher, total, out1, out2


@triton.jit(do_not_specialize=UNSPECIALISED)
def many_keys_forward(
    q, k, v, mask, shown, out, lse,
    q_b, q_h, q_l, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, m_b, m_h, m_l, m_s, n_b, n_h,
    H, L, S, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, CHUNK: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, SCALED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B H ceil(L / BLOCK),). S is at least 1."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    q += (b * q_b + h * q_h) * ALIGN
    k += (b * k_b + h * k_h) * ALIGN
    v += (b * v_b + h * v_h) * ALIGN
    mask += b * m_b + h * m_h
    shown += b * n_b + h * n_h
    out += (b * L * H + h) * D
    lse += head.to(tl.int64) * L
    factor = exponent_of(scale, SCALED)

    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    q1, q2 = 0.0, 0.0
    if CHUNK == 0:
        q1, q2 = load_pieces(q, rows, rows < L, q_l, q_d, D, D1, D2, ALIGN, True)
    top = tl.full([BLOCK], float("-inf"), ACC)
    total = tl.zeros([BLOCK], ACC)
    out1 = tl.zeros([BLOCK, D1], ACC)
    out2 = tl.zeros([BLOCK, D2 if D2 > 0 else 1], ACC)

    whole = S // KEYS * KEYS
    for start in range(0, whole, KEYS):
        top, total, out1, out2 = _attend(
            q, q1, q2, k, v, mask, shown, rows, start, top, total, out1, out2,
            q_l, q_d, k_s, k_d, v_s, v_d, m_l, m_s, L, S, scale, factor,
            D, D1, D2, KEYS, CHUNK, ALIGN, MASK, BY_ROW, SCALED, ACC, PRECISION, False,
        )  # fmt: skip
    if whole < S:
        top, total, out1, out2 = _attend(
            q, q1, q2, k, v, mask, shown, rows, whole, top, total, out1, out2,
            q_l, q_d, k_s, k_d, v_s, v_d, m_l, m_s, L, S, scale, factor,
            D, D1, D2, KEYS, CHUNK, ALIGN, MASK, BY_ROW, SCALED, ACC, PRECISION, True,
        )  # fmt: skip

    # A row without keys has total 0; it gives 0 and log-sum-exp -inf. NaN stays NaN.
    dead = total == 0.0
    total = tl.where(dead, 1.0, total)
    norm = 1.0 / total
    store_rows(out, rows, L, H * D, out1 * norm[:, None], 0, D1, D)
    if D2 > 0:
        store_rows(out, rows, L, H * D, out2 * norm[:, None], D1, D2, D)
    if not SCALED:
        top = top * scale
    tl.store(lse + rows, tl.where(dead, float("-inf"), top + tl.log(total)), mask=rows < L)
