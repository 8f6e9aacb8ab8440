"""GroupNorm (Wu and He 2018, arXiv:1803.08494, eq. 1 and 2) followed by SiLU: the op and its checks."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels import compiled, triton_support
from ldmkit.kernels.backends import choose, register
from ldmkit.kernels.group_norm_silu import op, reference


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalises each group of channels of x + shift + residual to mean 0 and variance 1, applies weight and bias per channel,
    then y * sigmoid(y).

    Args:
        x: (N, C, *spatial), floating point, any strides.
        num_groups: a divisor of C; each group is C / num_groups neighbouring channels with all their pixels.
        weight, bias: (C,), or None for 1 and 0.
        eps: added to the variance.
        silu: False leaves out the SiLU.
        shift: (N, C), added to every pixel before normalising: a time embedding.
        residual: (N, C, *spatial), added before normalising: a skip connection.
        backend: forces one implementation; None chooses by device, dtype and the shape of one image.

    Returns:
        (N, C, *spatial) in the dtype of x; channels_last where x is. All tensors share dtype and device; under autocast, all
        are converted to float32, as torch does for group norms.

    Raises:
        InputError: C not divisible by num_groups, a negative eps, wrong shapes, tensors on different devices.
        InputTypeError: x not floating point, or another tensor of another dtype.
        KernelError: a forced backend cannot serve.
    """
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        x, weight, bias, shift, residual = _widened(x), *(_widened(t) for t in (weight, bias, shift, residual))
    _check(x, num_groups, eps, weight=weight, bias=bias, shift=shift, residual=residual)
    arguments = (x, num_groups, weight, bias, eps, silu, shift, residual)
    features = {"C": x.shape[1], "spatial": math.prod(x.shape[2:]), "groups": num_groups}
    name = choose("group_norm_silu", arguments, features, backend)
    return reference.group_norm_silu(*arguments) if name == "reference" else op.group_norm_silu(*arguments, name)


T = TypeVar("T", Tensor, Tensor | None)


def _widened(tensor: T) -> T:
    return tensor.float() if tensor is not None and tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _check(x_NC: Tensor, num_groups: int, eps: float, **others: Tensor | None) -> None:
    if x_NC.dim() < 2:
        raise InputError(f"group_norm_silu: x has shape {tuple(x_NC.shape)}; it needs (N, C, *spatial)")
    channels = x_NC.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise InputError(f"group_norm_silu: {channels} channels cannot be split into {num_groups} groups of equal size")
    if eps < 0:
        raise InputError(f"group_norm_silu: eps is {eps}; it is added to a variance and must not be negative")
    if not x_NC.is_floating_point():
        raise InputTypeError(f"group_norm_silu: x is {x_NC.dtype}; it needs a floating-point dtype")
    shapes = {"shift": ("(N, C)", x_NC.shape[:2]), "residual": ("the shape of x", x_NC.shape)}
    for name, tensor in others.items():
        if tensor is None:
            continue
        words, shape = shapes.get(name, ("(C,)", x_NC.shape[1:2]))
        if tensor.shape != shape:
            raise InputError(
                f"group_norm_silu: {name} has shape {tuple(tensor.shape)}; it needs {words}, here {tuple(shape)}, since x"
                f" has shape {tuple(x_NC.shape)}"
            )
        if tensor.device != x_NC.device:
            raise InputError(f"group_norm_silu: {name} is on {tensor.device}, x on {x_NC.device}")
        if tensor.dtype != x_NC.dtype:
            raise InputTypeError(f"group_norm_silu: {name} is {tensor.dtype}, x is {x_NC.dtype}; convert one of them")


register("group_norm_silu", "cpu", compiled.implementation("group_norm_silu", "cpu"))
register("group_norm_silu", "cuda", compiled.implementation("group_norm_silu", "cuda"))
register("group_norm_silu", "triton", triton_support.implementation("group_norm_silu"))
