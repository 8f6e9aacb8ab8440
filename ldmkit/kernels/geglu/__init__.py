"""GEGLU (Shazeer 2020, arXiv:2002.05202, eq. 6, without the matrix products): the op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels.backends import Implementation, choose, register
from ldmkit.kernels.compiled import build_info, lacks
from ldmkit.kernels.geglu import compiled, reference


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """First half of the last dimension times GELU of the second half, with the exact GELU(g) = g (1 + erf(g / sqrt(2))) / 2.

    Args:
        x: (..., 2N), floating point, any strides.
        backend: forces one implementation; None chooses by device and dtype.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        InputError: x is a scalar, or its last dimension is odd.
        InputTypeError: x is not floating point.
        KernelError: a forced backend cannot serve.
    """
    if x.dim() < 1 or x.shape[-1] % 2:
        raise InputError(f"geglu: x has shape {tuple(x.shape)}; its last dimension must be even, value and gate side by side")
    if not x.is_floating_point():
        raise InputTypeError(f"geglu: x is {x.dtype}; it needs a floating-point dtype")
    result: Tensor = choose("geglu", x, backend)(x)
    return result


_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the C++ kernel was measured to be faster than plain torch: fp16 nowhere yet, bf16 with AVX-512 only.
_FASTER = {"avx512_bf16": (torch.float32, torch.bfloat16), "avx512": (torch.float32, torch.bfloat16), "avx2": (torch.float32,)}

register("geglu", "reference", Implementation(call=reference.geglu))
register(
    "geglu",
    "cpu",
    Implementation(
        call=compiled.geglu,
        device="cpu",
        dtypes=_DTYPES,
        automatic=_FASTER.get(build_info()["cpu"], ()),
        missing=lacks("cpu"),
    ),
)
register("geglu", "cuda", Implementation(call=compiled.geglu, device="cuda", dtypes=_DTYPES, missing=lacks("cuda")))
