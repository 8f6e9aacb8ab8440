"""GEGLU of a linear layer in Triton: a tile of the product holds values and their gates, so that only results leave the chip.

Columns of the tile alternate, value and gate, so that one matrix instruction serves both and a thread that holds one holds the
other: rows of weight are picked in that order as they are loaded. Tiles follow from dtype, N and K alone, never from the number
of rows.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ldmkit.kernels.geglu import triton as gate
from ldmkit.kernels.geglu.triton import gelu_parts, unit
from ldmkit.kernels.layout import as_rows
from ldmkit.kernels.triton_casts import INTERPRETED, narrow, widen
from ldmkit.kernels.triton_support import TRITON_DTYPES, StaticCase, interpreting

GROUP = tl.constexpr(8)
"""Tiles of rows that run side by side, so that they share weight in the L2 cache."""


@triton.jit
def _finish(
    sums, bias, grad, y, hidden, row, first, rows, n, grad_stride,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Turns a (M, 2C) tile of alternating values and gates into results, in PARTS pieces, so that fewer registers are alive."""
    M: tl.constexpr = sums.shape[0]
    C: tl.constexpr = sums.shape[1] // 2
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(sums, (M, 2, C)), (0, 2, 1)))
        _finish(left, bias, grad, y, hidden, row, first, rows, n, grad_stride, HAS_BIAS, MODE, PARTS // 2)
        _finish(right, bias, grad, y, hidden, row, first + C // 2, rows, n, grad_stride, HAS_BIAS, MODE, PARTS // 2)
    else:
        column = first + tl.arange(0, C)
        inside = (row < rows)[:, None] & (column < n)[None, :]
        value, gate = tl.split(tl.reshape(sums, (M, C, 2)))
        if HAS_BIAS:
            value += widen(tl.load(bias + column, column < n, 0.0))[None, :]
            gate += widen(tl.load(bias + n + column, column < n, 0.0))[None, :]
        dtype: tl.constexpr = bias.dtype.element_ty
        cdf, slope = gelu_parts(gate, dtype.primitive_bitwidth == 16)
        if MODE == "backward":
            incoming = widen(tl.load(grad + row[:, None] * grad_stride + column[None, :], inside, 0.0))
            value, gate = incoming * (gate * cdf), incoming * value * (cdf + slope)
        else:
            tl.store(y + row[:, None] * n + column[None, :], narrow(value * (gate * cdf), dtype), inside)
        if MODE != "forward":
            at = hidden + row[:, None] * (2 * n) + column[None, :]
            tl.store(at, narrow(value, dtype), inside)
            tl.store(at + n, narrow(gate, dtype), inside)


@triton.jit(do_not_specialize=["rows", "n_units", "k_pieces", "x_pieces", "weight_pieces", "grad_units"])
def _product(
    x, weight, bias, grad, y, hidden, rows, n_units, k_pieces, x_pieces, weight_pieces, grad_units,
    HAS_BIAS: tl.constexpr, MODE: tl.constexpr, EVEN_K: tl.constexpr, PIECE: tl.constexpr, UNIT: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """MODE "forward" writes y (rows, n), "keep" also hidden (rows, 2n), "backward" writes the gradient of hidden there.

    x is (rows, k), weight (2n, k), grad (rows, n). Sizes and the distances of rows come in pieces of 16 bytes or in UNITs.
    """
    SUM: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    n = n_units * UNIT
    k = k_pieces * PIECE
    down, across = tl.cdiv(rows, M), tl.cdiv(n, C)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(down - group * GROUP, GROUP)
    place = tl.program_id(0) % (GROUP * across)
    row = (group * GROUP + place % height).to(tl.int64) * M + tl.arange(0, M)
    first = (place // height) * C

    # What is beyond the last row or column is computed from that one, and not stored.
    inner = tl.arange(0, K)
    pair = tl.arange(0, 2 * C)
    weight_row = (pair % 2) * n + tl.minimum(first + pair // 2, n - 1)
    x_at = x + tl.minimum(row, rows - 1)[:, None] * x_pieces * PIECE + inner[None, :]
    weight_at = weight + weight_row.to(tl.int64)[:, None] * weight_pieces * PIECE + inner[None, :]
    sums = tl.zeros((M, 2 * C), SUM)
    for start in range(0, k, K):
        if EVEN_K:
            a, b = tl.load(x_at), tl.load(weight_at)
        else:
            inside = (inner < k - start)[None, :]
            a, b = tl.load(x_at, inside, 0.0), tl.load(weight_at, inside, 0.0)
        if INTERPRETED:  # its dot is numpy's, whose bits depend on where in the tile a row is
            sums += tl.sum(widen(a)[:, None, :] * widen(b)[None, :, :], 2)
        else:
            sums = tl.dot(a, tl.trans(b), sums, input_precision=PRECISION, out_dtype=SUM)
        x_at += K
        weight_at += K
    _finish(sums, bias, grad, y, hidden, row, first, rows, n, grad_units * UNIT, HAS_BIAS, MODE, PARTS)


class Tile(NamedTuple):
    """M rows, C columns of results, K of the inner dimension at a time."""

    M: int
    C: int
    K: int
    parts: int
    warps: int
    stages: int


def tile_of(dtype: torch.dtype, n: int, k: int, precision: str) -> Tile:
    """Where k is small, the gate's arithmetic weighs: two blocks on a multiprocessor then do it under each other's products."""
    if dtype == torch.float64:
        return Tile(32, 16, 16, 1, 4, 2)
    if precision == "plain" or n <= 64 or unit(dtype, n) == 1:
        return Tile(64, 32, 32, 1, 4, 3)
    if precision == "tf32":
        return Tile(128, 64, 32, 4, 4, 3)
    step = 32 if interpreting() else 64  # the interpreter's tensors may have 2^20 elements
    return Tile(128, 64, step, 4, 4, 3) if k < 1024 else Tile(128, 128, step, 4, 8, 3)


def _precision(dtype: torch.dtype) -> str:
    """Of the product: "half", "tf32" or "plain", which is that of the dtype, without tensor cores but for float64."""
    if dtype.itemsize == 2:
        return "half"
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "plain"


def _constants(tile: Tile, mode: str, dtype: torch.dtype, precision: str, n: int, k: int, *, bias: bool) -> dict[str, Any]:
    return {
        "HAS_BIAS": bias,
        "MODE": mode,
        "EVEN_K": k % tile.K == 0,
        "PIECE": unit(dtype, 0),
        "UNIT": unit(dtype, n),
        "M": tile.M,
        "C": tile.C,
        "K": tile.K,
        "PARTS": tile.parts,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def _pieces(x: Tensor) -> Tensor:
    """(..., K) => rows that start at multiples of 16 bytes and end there too, with zeros; a view where that is so already."""
    piece = unit(x.dtype, 0)
    missing = -x.shape[-1] % piece if x.shape[-1] else piece
    x_RK = as_rows(F.pad(x, (0, missing)) if missing else x)
    return x_RK.clone(memory_format=torch.contiguous_format) if x_RK.stride(0) % piece or x_RK.data_ptr() % 16 else x_RK


def _launch(
    mode: str, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, y: Tensor | None, hidden: Tensor | None
) -> None:
    x_RK, weight_MK = _pieces(x), _pieces(weight)
    n, (rows, k) = weight.shape[0] // 2, x_RK.shape
    grad_RN = None if grad is None else _pieces(grad) if unit(x.dtype, n) > 1 else as_rows(grad)
    precision = _precision(x.dtype)
    tile = tile_of(x.dtype, n, k, precision)
    constants = _constants(tile, mode, x.dtype, precision, n, k, bias=bias is not None)
    sizes = (rows, n // constants["UNIT"], *(size // constants["PIECE"] for size in (k, x_RK.stride(0), weight_MK.stride(0))))
    grad_units = 0 if grad_RN is None else grad_RN.stride(0) // constants["UNIT"]
    tensors = (x_RK, weight_MK, bias if bias is None else bias.contiguous(), grad_RN, y, hidden)
    grid = (triton.cdiv(rows, tile.M) * triton.cdiv(n, tile.C),)
    with torch.cuda.device_of(x):
        _product[grid](
            *(weight_MK if t is None else t for t in tensors),
            *sizes,
            grad_units,
            **constants,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> tuple[Tensor, Tensor]:
    """x (..., K), weight (2N, K), bias (2N,) => (y (..., N), hidden (..., 2N), or (..., 0) where it is not kept)."""
    lead, columns = x.shape[:-1], weight.shape[0]
    y, hidden = x.new_empty((*lead, columns // 2)), x.new_empty((*lead, columns if keep else 0))
    if y.numel():
        _launch("keep" if keep else "forward", x, weight, bias, None, y, hidden)
    return y, hidden


def backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor) -> Tensor:
    """The gradient of hidden, (..., 2N); from hidden, or where that is (..., 0), from the product computed anew."""
    if hidden.numel():
        return gate.backward(grad, hidden)
    grad_hidden = x.new_empty((*x.shape[:-1], weight.shape[0]))
    if grad.numel():
        _launch("backward", x, weight, bias, grad, None, grad_hidden)
    return grad_hidden


def refusal(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool) -> str | None:
    """It serves everything."""
    return None


def static_cases() -> Iterator[StaticCase]:
    """bf16 with every tile in every mode; the mode that needs most registers for other dtypes, and for an N that is odd."""
    sizes = ("rows", "n_units", "k_pieces", "x_pieces", "weight_pieces", "grad_units")
    pointers = ("x", "weight", "bias", "grad", "y", "hidden")
    small, large, odd = (1280, 320), (5120, 1280), (1283, 328)
    cases = [(torch.bfloat16, "half", shape, mode) for shape in (small, large) for mode in ("forward", "keep", "backward")]
    cases += [(torch.float16, "half", shape, "backward") for shape in (small, large, odd)]
    cases += [(torch.float32, "plain", small, "backward"), (torch.float32, "tf32", small, "backward")]
    cases += [(torch.float64, "plain", small, "backward")]
    for dtype, precision, (n, k), mode in cases:
        tile = tile_of(dtype, n, k, precision)
        yield StaticCase(
            kernel=_product,
            label=f"{TRITON_DTYPES[dtype]} {precision} N {n} K {k} {mode}",
            signature=dict.fromkeys(pointers, f"*{TRITON_DTYPES[dtype]}") | dict.fromkeys(sizes, "i32"),
            constants=_constants(tile, mode, dtype, precision, n, k, bias=True),
            aligned=pointers,
            options={"num_warps": tile.warps, "num_stages": tile.stages},
            dot=precision != "plain",
            dispatched=precision != "plain",  # no rule chooses it
        )
