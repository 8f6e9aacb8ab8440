"""Attention to few keys, forward: all keys and values stay on chip while queries stream past, and softmax takes one pass.

softmax(scale q k^T + mask) v (Vaswani et al. 2017, arXiv:1706.03762, eq. 1). A program serves one head and a run of blocks of
queries. Keys come in two pieces (A and B), as the head dimension does (1 and 2).
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
    mask_scores,
    product,
    readable_keys,
    store_rows,
)
from ldmkit.kernels.triton_casts import narrow

UNSPECIALISED = [*STRIDES, "H", "L", "S", "RUN"]


@triton.jit(do_not_specialize=UNSPECIALISED)
def few_keys_forward(
    q, k, v, mask, shown, out, lse,
    q_b, q_h, q_l, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, m_b, m_h, m_l, m_s, n_b, n_h,
    H, L, S, RUN, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, SA: tl.constexpr, SB: tl.constexpr, BLOCK: tl.constexpr,
    ALIGN: tl.constexpr, MASK: tl.constexpr, BY_ROW: tl.constexpr, SCALED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (B H ceil(L / (BLOCK RUN)),)."""
    runs = tl.cdiv(L, BLOCK * RUN)
    head = tl.program_id(0) // runs
    first = (tl.program_id(0) % runs) * RUN
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

    keysA = tl.arange(0, SA)
    readA = readable_keys(shown, keysA, S, MASK)
    kA1, kA2 = load_pieces(k, keysA, readA, k_s, k_d, D, D1, D2, ALIGN, True)
    vA1, vA2 = load_pieces(v, keysA, readA, v_s, v_d, D, D1, D2, ALIGN, True)
    if SB > 0:
        keysB = SA + tl.arange(0, SB)
        readB = readable_keys(shown, keysB, S, MASK)
        kB1, kB2 = load_pieces(k, keysB, readB, k_s, k_d, D, D1, D2, ALIGN, True)
        vB1, vB2 = load_pieces(v, keysB, readB, v_s, v_d, D, D1, D2, ALIGN, True)

    for block in range(first, tl.minimum(first + RUN, tl.cdiv(L, BLOCK))):
        rows = block * BLOCK + tl.arange(0, BLOCK)
        q1, q2 = load_pieces(q, rows, rows < L, q_l, q_d, D, D1, D2, ALIGN, True)

        scoresA = product(q1, kA1.T, tl.zeros([BLOCK, SA], ACC), PRECISION)
        if D2 > 0:
            scoresA = product(q2, kA2.T, scoresA, PRECISION)
        biasA = 0.0
        if MASK > 0:
            biasA = load_bias(mask, rows, keysA, L, S, m_l, m_s, MASK, BY_ROW, ACC)
        scoresA = mask_scores(scoresA, biasA, keysA, S, scale, MASK, SCALED, True)
        top = tl.max(scoresA, 1)
        if SB > 0:
            scoresB = product(q1, kB1.T, tl.zeros([BLOCK, SB], ACC), PRECISION)
            if D2 > 0:
                scoresB = product(q2, kB2.T, scoresB, PRECISION)
            biasB = 0.0
            if MASK > 0:
                biasB = load_bias(mask, rows, keysB, L, S, m_l, m_s, MASK, BY_ROW, ACC)
            scoresB = mask_scores(scoresB, biasB, keysB, S, scale, MASK, SCALED, True)
            top = tl.maximum(top, tl.max(scoresB, 1))
        if MASK > 0:
            top = tl.where(top == float("-inf"), 0.0, top)

        pA = exponential(scoresA - top[:, None], factor, ACC)
        total = tl.sum(pA, 1)
        pA = narrow(pA, v.dtype.element_ty)
        out1 = product(pA, vA1, tl.zeros([BLOCK, D1], ACC), PRECISION)
        if D2 > 0:
            out2 = product(pA, vA2, tl.zeros([BLOCK, D2], ACC), PRECISION)
        if SB > 0:
            pB = exponential(scoresB - top[:, None], factor, ACC)
            total += tl.sum(pB, 1)
            pB = narrow(pB, v.dtype.element_ty)
            out1 = product(pB, vB1, out1, PRECISION)
            if D2 > 0:
                out2 = product(pB, vB2, out2, PRECISION)

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
