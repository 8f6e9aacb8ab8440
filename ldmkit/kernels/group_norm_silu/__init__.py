"""GroupNorm (Wu and He 2018, arXiv:1803.08494, eq. 1 and 2) followed by SiLU: the op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels.backends import Implementation, choose, register
from ldmkit.kernels.group_norm_silu import reference


def group_norm_silu(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    backend: str | None = None,
) -> Tensor:
    """Normalises each group of channels to mean 0 and variance 1, applies weight and bias per channel, then y * sigmoid(y).

    Args:
        x: (N, C, *spatial), floating point, any strides.
        num_groups: a divisor of C; each group is C / num_groups neighbouring channels with all their pixels.
        weight, bias: (C,) in the dtype and on the device of x, or None for 1 and 0.
        eps: added to the variance.
        silu: False leaves out the SiLU.
        backend: forces one implementation; None chooses by device and dtype.

    Returns:
        (N, C, *spatial) in the dtype of x; channels_last where x is. Under autocast, torch decides the dtype.

    Raises:
        InputError: C not divisible by num_groups, wrong shapes, tensors on different devices.
        InputTypeError: x not floating point, or weight or bias of another dtype.
        KernelError: a forced backend cannot serve.
    """
    _check(x, num_groups, weight, bias)
    result: Tensor = choose("group_norm_silu", x, backend)(x, num_groups, weight, bias, eps, silu)
    return result


def _check(x_NC: Tensor, num_groups: int, weight_C: Tensor | None, bias_C: Tensor | None) -> None:
    if x_NC.dim() < 2:
        raise InputError(f"group_norm_silu: x has shape {tuple(x_NC.shape)}; it needs (N, C, *spatial)")
    channels = x_NC.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise InputError(f"group_norm_silu: {channels} channels cannot be split into {num_groups} groups of equal size")
    if not x_NC.is_floating_point():
        raise InputTypeError(f"group_norm_silu: x is {x_NC.dtype}; it needs a floating-point dtype")
    for name, parameter_C in (("weight", weight_C), ("bias", bias_C)):
        if parameter_C is None:
            continue
        if parameter_C.shape != x_NC.shape[1:2]:
            raise InputError(f"group_norm_silu: {name} has shape {tuple(parameter_C.shape)}; x has {channels} channels")
        if parameter_C.device != x_NC.device:
            raise InputError(f"group_norm_silu: {name} is on {parameter_C.device}, x on {x_NC.device}")
        if parameter_C.dtype != x_NC.dtype and not torch.is_autocast_enabled(x_NC.device.type):
            raise InputTypeError(f"group_norm_silu: {name} is {parameter_C.dtype}, x is {x_NC.dtype}; convert one of them")


register("group_norm_silu", "reference", Implementation(call=reference.group_norm_silu))
