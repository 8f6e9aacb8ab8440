"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) over a few keys: the op and its checks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, overload

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError, KernelError
from ldmkit.kernels import compiled, triton_support
from ldmkit.kernels.backends import choose, forced_backend, register
from ldmkit.kernels.cross_attention import op, reference

_AUTOCAST = (torch.float32, torch.float16, torch.bfloat16)
WIDEST_CUDA = 512
"""The head dimension up to which the CUDA kernels serve."""


@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v over heads; self-attention is the case S = L.

    Args:
        q: (B, H, L, D), floating point, any strides.
        k, v: (B, H, S, D), in the dtype and on the device of q. S may be 0, which gives 0.
        mask: (B, S), one flag or number per key, or anything that broadcasts to (B, H, L, S) with as many dimensions. bool,
            True where a query may attend to a key; or in the dtype of q, added to the scores (-inf hides a key). A query that
            may attend to no key gives exactly 0, with gradient 0. A key that no query of a head may attend to is not read: it
            may hold NaN.
        scale: of the scores; None is 1 / sqrt(D).
        return_lse: also gives the log of the sum of exponentials of every query's scores, by which attention to parts of a
            context can be merged exactly.
        backend: forces one implementation; None chooses by device, dtype and the shape of one image.

    Returns:
        (B, H, L, D) in the dtype of q; with `return_lse` also (B, H, L) in float32 (float64 for float64), -inf where a query
        has no key. Under autocast, torch decides the dtype.

    Raises:
        InputError: shapes or devices that do not fit.
        InputTypeError: dtypes that do not fit.
        KernelError: a forced backend cannot serve.
    """
    if torch.amp.is_autocast_available(q.device.type) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (t.to(dtype) if t.dtype in _AUTOCAST else t for t in (q, k, v))
        mask = mask.to(dtype) if mask is not None and mask.dtype in _AUTOCAST else mask
    _check(q, k, v)
    mask_BHLS = None if mask is None else _mask_BHLS(mask, q, k)
    arguments = (q, k, v, mask_BHLS, q.shape[-1] ** -0.5 if scale is None else scale)
    features = {"H": q.shape[1], "L": q.shape[2], "S": k.shape[2], "D": q.shape[3], "mask": int(mask is not None)}
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        backend = _differentiating_the_mask(backend)
    name = choose("cross_attention", arguments, features, backend)
    if name != "reference":
        out, lse = op.cross_attention(*arguments, name)
        return (out, lse) if return_lse else out
    out = reference.cross_attention(*arguments)
    return (out, reference.log_sum_exp(q, k, *arguments[3:])) if return_lse else out


def _differentiating_the_mask(backend: str | None) -> str:
    forced = backend or forced_backend("cross_attention")
    if forced not in (None, "auto", "reference"):
        raise KernelError(f"cross_attention: backend {forced!r} gives no gradient for a mask; detach it, or use 'reference'")
    return "reference"


def _check(q_BHLD: Tensor, k_BHSD: Tensor, v_BHSD: Tensor) -> None:
    q_shape, k_shape = q_BHLD.shape, k_BHSD.shape
    if (
        len(q_shape) != 4
        or len(k_shape) != 4
        or q_shape[:2] != k_shape[:2]
        or q_shape[3] != k_shape[3]
        or k_shape != v_BHSD.shape
    ):
        shapes = ", ".join(str(tuple(t.shape)) for t in (q_BHLD, k_BHSD, v_BHSD))
        raise InputError(f"cross_attention: q, k, v have shapes {shapes}; they need (B, H, L, D), (B, H, S, D), (B, H, S, D)")
    if not (q_BHLD.device == k_BHSD.device == v_BHSD.device):
        raise InputError(f"cross_attention: q, k, v are on {q_BHLD.device}, {k_BHSD.device}, {v_BHSD.device}; move them to one")
    if not q_BHLD.is_floating_point():
        raise InputTypeError(f"cross_attention: q is {q_BHLD.dtype}; it needs a floating-point dtype")
    if not (q_BHLD.dtype == k_BHSD.dtype == v_BHSD.dtype):
        raise InputTypeError(
            f"cross_attention: q, k, v are {q_BHLD.dtype}, {k_BHSD.dtype}, {v_BHSD.dtype}; convert them to one"
        )


def _mask_BHLS(mask: Tensor, q_BHLD: Tensor, k_BHSD: Tensor) -> Tensor:
    """The mask in four dimensions, each 1 or full."""
    (B, H, L, _), S = q_BHLD.shape, k_BHSD.shape[2]
    mask_BHLS = mask[:, None, None, :] if mask.dim() == 2 else mask
    if mask_BHLS.dim() != 4 or any(have not in (1, want) for have, want in zip(mask_BHLS.shape, (B, H, L, S), strict=True)):
        raise InputError(
            f"cross_attention: mask has shape {tuple(mask.shape)}; it needs (B, S) = ({B}, {S}) or four dimensions that"
            f" broadcast to (B, H, L, S) = ({B}, {H}, {L}, {S})"
        )
    if mask.device != q_BHLD.device:
        raise InputError(f"cross_attention: mask is on {mask.device}, q on {q_BHLD.device}; move it there")
    if mask.dtype != torch.bool and mask.dtype != q_BHLD.dtype:
        raise InputTypeError(
            f"cross_attention: mask is {mask.dtype}; it needs torch.bool (True = attend) or {q_BHLD.dtype} (added)"
        )
    return mask_BHLS


def _refusal_cuda(q: Tensor, *rest: object) -> str | None:
    return f"it serves head dimensions up to {WIDEST_CUDA}, not {q.shape[3]}" if q.shape[3] > WIDEST_CUDA else None


register("cross_attention", "cpu", compiled.implementation("cross_attention", "cpu"))
register("cross_attention", "cuda", replace(compiled.implementation("cross_attention", "cuda"), refusal=_refusal_cuda))
register("cross_attention", "triton", triton_support.implementation("cross_attention"))
