"""Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762, eq. 1) over a few keys: the op and its checks."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels.backends import Implementation, choose, register
from ldmkit.kernels.cross_attention import reference


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """softmax(scale q k^T + mask) v over heads; self-attention is the case S = L.

    Args:
        q: (B, H, L, D), floating point.
        k, v: (B, H, S, D), in the dtype and on the device of q. S may be 0, which gives 0.
        mask: (B, S), one flag or number per key, or anything that broadcasts to (B, H, L, S) with as many dimensions. bool,
            True where a query may attend to a key; or in the dtype of q, added to the scores (-inf hides a key). A query that
            may attend to no key gives exactly 0, with gradient 0. Hidden keys and values must be finite.
        scale: of the scores; None is 1 / sqrt(D).
        backend: forces one implementation; None chooses by device and dtype.

    Returns:
        (B, H, L, D) in the dtype of q. Under autocast, torch decides the dtype.

    Raises:
        InputError: shapes or devices that do not fit.
        InputTypeError: dtypes that do not fit.
        KernelError: a forced backend cannot serve.
    """
    _check(q, k, v)
    if mask is not None:
        mask = _mask_BHLS(mask, q, k)
    result: Tensor = choose("cross_attention", q, backend)(q, k, v, mask, scale)
    return result


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
    if not (q_BHLD.dtype == k_BHSD.dtype == v_BHSD.dtype) and not torch.is_autocast_enabled(q_BHLD.device.type):
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
    if mask.dtype != torch.bool and mask.dtype != q_BHLD.dtype and not torch.is_autocast_enabled(q_BHLD.device.type):
        raise InputTypeError(
            f"cross_attention: mask is {mask.dtype}; it needs torch.bool (True = attend) or {q_BHLD.dtype} (added)"
        )
    return mask_BHLS


register("cross_attention", "reference", Implementation(call=reference.cross_attention))
