"""The gradient of attention (Dao et al. 2022, arXiv:2205.14135, appendix B.4): a pass for queries, one for keys and values.

With P = exp(scores - lse), dP = dOut V^T and delta = rowsum(dOut * Out) - dLse: dScores = P * (dP - delta),
dQ = scale dScores K, dK = scale dScores^T Q, dV = P^T dOut. Every sum has one owner and one order.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.cross_attention.triton.pieces import (
    STRIDES,
    exponents_of_lse,
    factor_of_probabilities,
    load_bias,
    load_pieces,
    mask_scores,
    probabilities,
    product,
    readable_keys,
    store_rows,
)
from ldmkit.kernels.triton_casts import narrow, widen

UNSPECIALISED = ["g_b", "g_h", "g_l", *STRIDES, "H", "L", "S", "CHUNKS"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def queries_backward(
    g, q, k, v, mask, shown, out, lse, g_lse, delta, dq,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, m_b, m_h, m_l, m_s, n_b, n_h,
    H, L, S, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, SCALED: tl.constexpr, HAS_G_LSE: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dQ of one block of queries, and their delta for `keys_backward`. Grid: (B H ceil(L / BLOCK),)."""
    blocks = tl.cdiv(L, BLOCK)
    head = tl.program_id(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    g += (b * g_b + h * g_h) * ALIGN
    q += (b * q_b + h * q_h) * ALIGN
    k += (b * k_b + h * k_h) * ALIGN
    v += (b * v_b + h * v_h) * ALIGN
    mask += b * m_b + h * m_h
    shown += b * n_b + h * n_h
    out += (b * L * H + h) * D
    dq += (b * L * H + h) * D
    first = head.to(tl.int64) * L
    HALF: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    factor = factor_of_probabilities(scale, SCALED, ACC, HALF)

    rows = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    g1, g2 = load_pieces(g, rows, rows < L, g_l, g_d, D, D1, D2, ALIGN, True)
    out1, out2 = load_pieces(out, rows, rows < L, H * (D // ALIGN), 1, D, D1, D2, ALIGN, True)
    row_lse = tl.load(lse + first + rows, mask=rows < L, other=float("-inf"))
    row_delta = tl.sum(widen(g1) * widen(out1), 1)
    if D2 > 0:
        row_delta += tl.sum(widen(g2) * widen(out2), 1)
    if HAS_G_LSE:
        row_delta -= tl.load(g_lse + first + rows, mask=rows < L, other=0.0)
    row_delta = tl.where(row_lse == float("-inf"), 0.0, row_delta)
    tl.store(delta + first + rows, row_delta, mask=rows < L)

    row_lse = exponents_of_lse(row_lse, HALF)
    q1, q2 = load_pieces(q, rows, rows < L, q_l, q_d, D, D1, D2, ALIGN, True)
    dq1 = tl.zeros([BLOCK, D1], ACC)
    dq2 = tl.zeros([BLOCK, D2 if D2 > 0 else 1], ACC)
    for start in range(0, S, KEYS):
        keys = start + tl.arange(0, KEYS)
        read = readable_keys(shown, keys, S, MASK)
        k1, k2 = load_pieces(k, keys, read, k_s, k_d, D, D1, D2, ALIGN, True)
        v1, v2 = load_pieces(v, keys, read, v_s, v_d, D, D1, D2, ALIGN, True)
        scores = product(q1, k1.T, tl.zeros([BLOCK, KEYS], ACC), PRECISION)
        dp = product(g1, v1.T, tl.zeros([BLOCK, KEYS], ACC), PRECISION)
        if D2 > 0:
            scores = product(q2, k2.T, scores, PRECISION)
            dp = product(g2, v2.T, dp, PRECISION)
        bias = 0.0
        if MASK > 0:
            bias = load_bias(mask, rows, keys, L, S, m_l, m_s, MASK, BY_ROW, ACC)
        # Keys past the end are zeros, which add nothing.
        scores = mask_scores(scores, bias, keys, S, scale, MASK, SCALED, False)
        ds = probabilities(scores, row_lse[:, None], factor, HALF) * (dp - row_delta[:, None])
        ds = narrow(ds, k.dtype.element_ty)
        dq1 = product(ds, k1, dq1, PRECISION)
        if D2 > 0:
            dq2 = product(ds, k2, dq2, PRECISION)
    store_rows(dq, rows, L, H * D, dq1 * scale, 0, D1, D)
    if D2 > 0:
        store_rows(dq, rows, L, H * D, dq2 * scale, D1, D2, D)


@triton.jit(do_not_specialize=UNSPECIALISED)
def keys_backward(
    g, q, k, v, mask, shown, lse, delta, dk, dv,
    g_b, g_h, g_l, g_d, q_b, q_h, q_l, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, m_b, m_h, m_l, m_s, n_b, n_h,
    H, L, S, CHUNKS, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, SCALED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK and dV of one block of keys from one of CHUNKS chunks of queries, into its slice of dk and dv, (CHUNKS, B, S, H, D).
    Grid: (B H ceil(S / KEYS), CHUNKS).
    """
    blocks = tl.cdiv(S, KEYS)
    head = tl.program_id(0) // blocks
    heads = tl.num_programs(0) // blocks
    b = (head // H).to(tl.int64)
    h = (head % H).to(tl.int64)
    g += (b * g_b + h * g_h) * ALIGN
    q += (b * q_b + h * q_h) * ALIGN
    k += (b * k_b + h * k_h) * ALIGN
    v += (b * v_b + h * v_h) * ALIGN
    mask += b * m_b + h * m_h
    shown += b * n_b + h * n_h
    lse += head.to(tl.int64) * L
    delta += head.to(tl.int64) * L
    dk += (tl.program_id(1).to(tl.int64) * S * heads + b * S * H + h) * D
    dv += (tl.program_id(1).to(tl.int64) * S * heads + b * S * H + h) * D
    HALF: tl.constexpr = q.dtype.element_ty.primitive_bitwidth == 16
    factor = factor_of_probabilities(scale, SCALED, ACC, HALF)

    keys = (tl.program_id(0) % blocks) * KEYS + tl.arange(0, KEYS)
    read = readable_keys(shown, keys, S, MASK)
    k1, k2 = load_pieces(k, keys, read, k_s, k_d, D, D1, D2, ALIGN, True)
    v1, v2 = load_pieces(v, keys, read, v_s, v_d, D, D1, D2, ALIGN, True)
    dk1 = tl.zeros([KEYS, D1], ACC)
    dv1 = tl.zeros([KEYS, D1], ACC)
    dk2 = tl.zeros([KEYS, D2 if D2 > 0 else 1], ACC)
    dv2 = tl.zeros([KEYS, D2 if D2 > 0 else 1], ACC)
    chunk = tl.cdiv(tl.cdiv(L, BLOCK), CHUNKS) * BLOCK
    begin = tl.program_id(1) * chunk
    for start in range(begin, tl.minimum(begin + chunk, L), BLOCK):
        rows = start + tl.arange(0, BLOCK)
        q1, q2 = load_pieces(q, rows, rows < L, q_l, q_d, D, D1, D2, ALIGN, True)
        g1, g2 = load_pieces(g, rows, rows < L, g_l, g_d, D, D1, D2, ALIGN, True)
        row_lse = exponents_of_lse(tl.load(lse + rows, mask=rows < L, other=float("-inf")), HALF)
        row_delta = tl.load(delta + rows, mask=rows < L, other=0.0)
        # Transposed: a row is a key.
        scores = product(k1, q1.T, tl.zeros([KEYS, BLOCK], ACC), PRECISION)
        dp = product(v1, g1.T, tl.zeros([KEYS, BLOCK], ACC), PRECISION)
        if D2 > 0:
            scores = product(k2, q2.T, scores, PRECISION)
            dp = product(v2, g2.T, dp, PRECISION)
        bias = 0.0
        if MASK > 0:
            bias = load_bias(mask, rows, keys, L, S, m_l, m_s, MASK, BY_ROW, ACC).T
        scores = mask_scores(scores, bias, keys, S, scale, MASK, SCALED, False)
        p = probabilities(scores, row_lse[None, :], factor, HALF)
        ds = p * (dp - row_delta[None, :])
        p = narrow(p, k.dtype.element_ty)
        ds = narrow(ds, k.dtype.element_ty)
        dv1 = product(p, g1, dv1, PRECISION)
        dk1 = product(ds, q1, dk1, PRECISION)
        if D2 > 0:
            dv2 = product(p, g2, dv2, PRECISION)
            dk2 = product(ds, q2, dk2, PRECISION)
    store_rows(dk, keys, S, H * D, dk1 * scale, 0, D1, D)
    store_rows(dv, keys, S, H * D, dv1, 0, D1, D)
    if D2 > 0:
        store_rows(dk, keys, S, H * D, dk2 * scale, D1, D2, D)
        store_rows(dv, keys, S, H * D, dv2, D1, D2, D)


@triton.jit(do_not_specialize=["COUNT", "CHUNKS"])
def add_chunks(partial, total, COUNT, CHUNKS, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """(CHUNKS, COUNT ALIGN) => (COUNT ALIGN,), added in the order of chunks. Grid: (ceil(COUNT ALIGN / BLOCK),)."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < COUNT.to(tl.int64) * ALIGN
    pointers = partial + place
    accumulator = tl.zeros([BLOCK], partial.dtype.element_ty)
    for _ in range(CHUNKS):
        accumulator += tl.load(pointers, mask=inside, other=0.0)
        pointers += COUNT.to(tl.int64) * ALIGN
    tl.store(total + place, narrow(accumulator, total.dtype.element_ty), mask=inside)
