"""To the dtype that is computed in and back, for kernels in Triton.

Triton's interpreter cuts bf16 off instead of rounding, and loses subnormals on the way; there, integer
arithmetic does it right.
"""
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False, disallow_untyped_calls=False

from __future__ import annotations

import triton
import triton.language as tl

from ldmkit.kernels.triton_support import interpreting

INTERPRETED = tl.constexpr(interpreting())


@triton.jit
def widen(x):
    """fp16 and bf16 => fp32; the others stay."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif x.dtype.primitive_bitwidth == 16:
        x = x.to(tl.float32)
    return x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """fp32 => fp32, fp16 or bf16, or fp64 => fp64; to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, 0x7FC0).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y
