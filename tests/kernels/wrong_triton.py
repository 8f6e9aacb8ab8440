"""Triton kernels whose machine code is wrong on purpose, listed as a kernel's module lists its own."""

import triton
import triton.language as tl

from ldmkit.kernels.triton_support import StaticCase


@triton.jit
def narrow_loads(x, y, stride, D: tl.constexpr, BLOCK: tl.constexpr):
    """Rows of D = 40 whose stride nobody says is a multiple of anything: two bytes a load."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, 64)[None, :]
    tl.store(y + row * stride + column, tl.load(x + row * stride + column, column < D), column < D)


@triton.jit
def spills(x, y, SIZE: tl.constexpr):
    """More numbers in a thread than it has registers."""
    at = tl.arange(0, SIZE)
    values = tl.exp(tl.load(x + at).to(tl.float32))
    tl.store(y + at, (values / tl.sum(values)).to(tl.bfloat16))


@triton.jit
def in_double(x, y, eps, SIZE: tl.constexpr):
    """eps arrives as a float64, and takes all else with it."""
    at = tl.arange(0, SIZE)
    tl.store(y + at, (tl.load(x + at) + eps).to(tl.bfloat16))


@triton.jit
def product_without_tensor_cores(x, y, SIZE: tl.constexpr):
    """In full fp32. A sum of products would not do: Triton 3.7 gives that to the tensor cores."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    a = tl.load(x + at).to(tl.float32)
    tl.store(y + at, tl.dot(a, a, input_precision="ieee").to(tl.bfloat16))


@triton.jit
def spills_in_fp32(x, y, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    values = tl.exp(tl.load(x + at))
    tl.store(y + at, values / tl.sum(values))


def static_cases():
    """One case for each."""
    low, wide = {"x": "*bf16", "y": "*bf16"}, {"x": "*fp32", "y": "*fp32"}
    one_warp = {"num_warps": 1}

    def case(kernel, label, signature, constants, **more):
        common = {"kernel": kernel, "label": label, "signature": signature, "constants": constants}
        return StaticCase(**common, aligned=("x", "y"), **more)

    yield case(narrow_loads, "one element at a time", {**low, "stride": "i32"}, {"D": 40, "BLOCK": 32})
    yield case(spills, "a stack frame of", low, {"SIZE": 8192}, options=one_warp)
    yield case(in_double, "float64 instructions", {**low, "eps": "fp64"}, {"SIZE": 1024})
    yield case(product_without_tensor_cores, "no tensor-core", low, {"SIZE": 16}, dot=True)
    yield case(spills_in_fp32, "a stack frame of", wide, {"SIZE": 8192}, options=one_warp)
    yield case(spills_in_fp32, "only noted: a stack frame of", wide, {"SIZE": 8192}, options=one_warp, dispatched=False)
