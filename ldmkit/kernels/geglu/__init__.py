"""GEGLU (Shazeer 2020, arXiv:2002.05202, eq. 6, without the matrix products): the op and its checks."""

from __future__ import annotations

from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels import compiled, triton_support
from ldmkit.kernels.backends import choose, register
from ldmkit.kernels.geglu import op, reference


def geglu(x: Tensor, *, backend: str | None = None) -> Tensor:
    """First half of the last dimension times GELU of the second half, with the exact GELU(g) = g (1 + erf(g / sqrt(2))) / 2.

    Args:
        x: (..., 2N), floating point, any strides.
        backend: forces one implementation; None chooses by device, dtype and N.

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
    name = choose("geglu", (x,), {"N": x.shape[-1] // 2}, backend)
    return reference.geglu(x) if name == "reference" else op.geglu(x, name)


register("geglu", "cpu", compiled.implementation("geglu", "cpu"))
register("geglu", "cuda", compiled.implementation("geglu", "cuda"))
register("geglu", "triton", triton_support.implementation("geglu"))
