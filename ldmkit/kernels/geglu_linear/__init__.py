"""GEGLU of a linear layer (Shazeer 2020, arXiv:2002.05202, eq. 6): the matrix product and the gate in one, and its checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels import compiled, triton_support
from ldmkit.kernels.backends import choose, register
from ldmkit.kernels.geglu import geglu
from ldmkit.kernels.geglu_linear import op

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`geglu(F.linear(x, weight, bias))`, without taking the linear layer's output through memory where that is faster.

    Args:
        x: (..., K), floating point, any strides.
        weight: (2N, K), as in nn.Linear: N rows for values, then N for their gates.
        bias: (2N,), or None.
        backend: forces one implementation; None chooses by device, dtype, N and K. "reference" is F.linear, then `geglu`: where
            that is the automatic choice, geglu's own choice holds.

    Returns:
        (..., N) in the dtype of x; under autocast, torch decides the dtype.

    Raises:
        InputError: shapes or devices that do not fit.
        InputTypeError: x not floating point, or dtypes that differ.
        KernelError: a forced backend cannot serve.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = (t.to(dtype) if t.dtype in _AUTOCAST else t for t in (x, weight))
        bias = bias.to(dtype) if bias is not None and bias.dtype in _AUTOCAST else bias
    _check(x, weight, bias)
    features = {"N": weight.shape[0] // 2, "K": weight.shape[1]}
    name = choose("geglu_linear", (x, weight, bias, False), features, backend)
    if name == "reference":
        return geglu(F.linear(x, weight, bias), backend=backend)
    return op.geglu_linear(x, weight, bias, name)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() < 1 or weight.dim() != 2 or weight.shape[0] % 2 or x.shape[-1] != weight.shape[1]:
        raise InputError(
            f"geglu_linear: x has shape {tuple(x.shape)}, weight {tuple(weight.shape)}; they need (..., K) and (2N, K)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(
            f"geglu_linear: bias has shape {tuple(bias.shape)}; it needs {tuple(weight.shape[:1])}, as weight has rows"
        )
    if not x.is_floating_point():
        raise InputTypeError(f"geglu_linear: x is {x.dtype}; it needs a floating-point dtype")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise InputError(f"geglu_linear: {name} is on {tensor.device}, x on {x.device}; move them to one")
        if tensor.dtype != x.dtype:
            raise InputTypeError(f"geglu_linear: {name} is {tensor.dtype}, x is {x.dtype}; convert one of them")


register("geglu_linear", "cpu", compiled.implementation("geglu_linear", "cpu"))
register("geglu_linear", "cuda", compiled.implementation("geglu_linear", "cuda"))
register("geglu_linear", "triton", triton_support.implementation("geglu_linear"))
