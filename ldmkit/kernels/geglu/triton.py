"""GEGLU in Triton: one pass over memory, forward and backward, 16 bytes an access where N, strides and pointers allow it.

A program takes a tile of ROWS x COLUMNS, which follow from N alone; nothing is shared between elements.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldmkit.kernels.backends import DTYPES
from ldmkit.kernels.layout import as_rows
from ldmkit.kernels.triton_casts import narrow, widen
from ldmkit.kernels.triton_support import TRITON_DTYPES, StaticCase

TILE = 2048
"""Elements a program takes: two 16-byte pieces of each half for each of its 128 threads in fp16 and bf16."""
WARPS = 4


@triton.jit
def gelu_parts(x, FAST: tl.constexpr):
    """(Phi(x), x phi(x)): the normal distribution function, and what its derivative adds to that of x Phi(x).

    Q(a) = 1 - Phi(a) for a = |x| is exp(-a^2 / 2) R(a), where R = t (c0 + c1 t + ...) in t = 1 / (1 + p a); so the lower tail
    keeps its relative accuracy, which 1 + erf(x) loses. Minimax fits to R, relative: FAST to 2^-14.8 (for 16-bit results), else
    2^-24.8; fp64 trusts erf.
    """
    if x.dtype == tl.float64:
        cdf = 0.5 * (1.0 + tl.erf(x * 0.70710678118654752440))
        density = 0.39894228040143267794 * tl.exp(-0.5 * x * x)
    else:
        if FAST:
            a = tl.abs(x)
            t = 1.0 / tl.fma(a, 0.38, 1.0)
            r = tl.fma(t, -0.08992831408977509, 0.18887639045715332)
            r = tl.fma(r, t, 0.09197980165481567)
            r = tl.fma(r, t, 0.15782944858074188)
            r = tl.fma(r, t, 0.15122513473033905)
            exponential = tl.exp2((x * -0.72134752044448170368) * x)
        else:
            a = tl.minimum(tl.abs(x), 15.0)  # Q(15) is 0 in fp32
            t = 1.0 / tl.fma(a, 0.34, 1.0)
            r = tl.fma(t, -0.025876503437757492, 0.13835732638835907)
            r = tl.fma(r, t, -0.27087146043777466)
            r = tl.fma(r, t, 0.1997179090976715)
            r = tl.fma(r, t, -0.043106406927108765)
            r = tl.fma(r, t, 0.11471360921859741)
            r = tl.fma(r, t, 0.11535170674324036)
            r = tl.fma(r, t, 0.13609223067760468)
            r = tl.fma(r, t, 0.135621577501297)
            # a^2 / 2 = s + d with s exact: `high` has the upper half of a's bits. s = k ln 2 + f, and k ln 2 is exact as well.
            high = (a.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
            s = (0.5 * high) * high
            d = (0.5 * (a - high)) * (a + high)
            k = tl.floor(s * 1.4426950408889634 + 0.5)
            f = ((s - k * 0.693359375) + k * 2.12194440e-4) + d
            exponential = tl.exp2(f * -1.4426950408889634) * tl.exp2(-k)
        tail = (r * t) * exponential
        cdf = tl.where(x < 0, tail, 1.0 - tail)
        density = 0.3989422804014327 * exponential
    return cdf, x * density


@triton.jit
def _place(rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(row, column, inside) of this program's tile: tiles go along a row first."""
    tiles = tl.cdiv(n, COLUMNS)
    tile = tl.program_id(0)
    row = (tile // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tile % tiles) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    return row, column, (row < rows) & (column < n)


@triton.jit(do_not_specialize=["rows", "units", "x_units"])
def _forward(x, y, rows, units, x_units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """x (rows, 2n) with x_units * UNIT elements from row to row => dense y (rows, n), n = units * UNIT."""
    n = units * UNIT
    row, column, inside = _place(rows, n, ROWS, COLUMNS)
    at = x + row * x_units * UNIT + column
    value, gate = widen(tl.load(at, inside)), widen(tl.load(at + n, inside))
    dtype: tl.constexpr = y.dtype.element_ty
    cdf, _ = gelu_parts(gate, dtype.primitive_bitwidth == 16)
    tl.store(y + row * units * UNIT + column, narrow(value * (gate * cdf), dtype), inside)


@triton.jit(do_not_specialize=["rows", "units", "grad_units", "x_units"])
def _backward(grad, x, grad_x, rows, units, grad_units, x_units, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """grad (rows, n) and x (rows, 2n) => dense grad_x (rows, 2n)."""
    n = units * UNIT
    row, column, inside = _place(rows, n, ROWS, COLUMNS)
    at = x + row * x_units * UNIT + column
    incoming = widen(tl.load(grad + row * grad_units * UNIT + column, inside))
    value, gate = widen(tl.load(at, inside)), widen(tl.load(at + n, inside))
    dtype: tl.constexpr = grad_x.dtype.element_ty
    cdf, slope = gelu_parts(gate, dtype.primitive_bitwidth == 16)
    out = grad_x + row * (2 * units) * UNIT + column
    tl.store(out, narrow(incoming * (gate * cdf), dtype), inside)
    tl.store(out + n, narrow(incoming * value * (cdf + slope), dtype), inside)


def _shape(n: int) -> dict[str, int]:
    """The tile: 256 columns, or all where there are fewer. The models' N are multiples of 256."""
    columns = min(256, triton.next_power_of_2(n))
    return {"ROWS": TILE // columns, "COLUMNS": columns}


def _grid(rows: int, n: int, tile: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, tile["ROWS"]) * triton.cdiv(n, tile["COLUMNS"]),)


def unit(dtype: torch.dtype, *sizes: int) -> int:
    """Elements in 16 bytes where these sizes and strides are all multiples of that, else 1: a factor that Triton sees."""
    vector = 16 // dtype.itemsize
    return vector if all(size % vector == 0 for size in sizes) else 1


def forward(x: Tensor) -> Tensor:
    """(..., 2N), any strides => dense (..., N)."""
    n = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], n))
    if y.numel():
        x_RN, tile = as_rows(x), _shape(n)
        rows, width = x_RN.shape[0], unit(x.dtype, n, x_RN.stride(0))
        with torch.cuda.device_of(x):
            _forward[_grid(rows, n, tile)](
                x_RN, y, rows, n // width, x_RN.stride(0) // width, UNIT=width, **tile, num_warps=WARPS
            )
    return y


def backward(grad: Tensor, x: Tensor) -> Tensor:
    """grad (..., N), x (..., 2N), any strides => dense (..., 2N)."""
    n = grad.shape[-1]
    grad_x = x.new_empty(x.shape)
    if grad.numel():
        x_RN, grad_RN, tile = as_rows(x), as_rows(grad), _shape(n)
        rows, width = x_RN.shape[0], unit(x.dtype, n, x_RN.stride(0), grad_RN.stride(0))
        strides = grad_RN.stride(0) // width, x_RN.stride(0) // width
        with torch.cuda.device_of(x):
            _backward[_grid(rows, n, tile)](
                grad_RN, x_RN, grad_x, rows, n // width, *strides, UNIT=width, **tile, num_warps=WARPS
            )
    return grad_x


def refusal(x: Tensor) -> str | None:
    """It serves everything."""
    return None


def static_cases() -> Iterator[StaticCase]:
    """Every dtype in both directions; and rows of no alignment."""
    for dtype, width in [(d, unit(d, 0)) for d in DTYPES] + [(torch.bfloat16, 1)]:
        for kernel, pointers, sizes in (
            (_forward, ("x", "y"), ("rows", "units", "x_units")),
            (_backward, ("grad", "x", "grad_x"), ("rows", "units", "grad_units", "x_units")),
        ):
            signature = dict.fromkeys(pointers, f"*{TRITON_DTYPES[dtype]}") | dict.fromkeys(sizes, "i32")
            yield StaticCase(
                kernel=kernel,
                label=f"{TRITON_DTYPES[dtype]}{'' if width > 1 else ' odd'}",
                signature=signature,
                constants={"UNIT": width, **_shape(1280)},
                aligned=pointers if width > 1 else (),
                options={"num_warps": WARPS},
            )
