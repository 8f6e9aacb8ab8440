"""Attention in Triton: forward and backward, for CUDA tensors, or CPU tensors in Triton's interpreter.

Few keys (a text, a class) stay on chip while queries stream past them; many keys stream past blocks of queries.
"""

from __future__ import annotations

import functools
import math
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ldmkit.kernels.cross_attention.triton import launches
from ldmkit.kernels.cross_attention.triton.static import static_cases

__all__ = ["backward", "forward", "refusal", "static_cases"]
MAX_DIM = 512


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """The raw op: (B, H, L, D), dense (B, L, H, D) in memory, and the log-sum-exp, (B, H, L)."""
    out, lse = _heads_inside(q), q.new_empty(q.shape[:3], dtype=_wide(q))
    if out.numel() == 0 or k.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if q.dtype == torch.float64:  # a kernel's scalars are fp32
        q, scale = q * scale, 1.0
    with _on(q):
        for launch in launches.forward_launches(q, k, v, mask, scale, out, lse, _target(q.device)):
            launch.run()
    return out, lse


def backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, each dense (B, L or S, H, D) in memory."""
    dq, dk, dv = map(_heads_inside, (q, k, v))
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    factor = 1.0
    if q.dtype == torch.float64:
        q, scale, factor = q * scale, 1.0, scale
    (B, H, L, D), S = q.shape, k.shape[2]
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    chunks = launches.chunks_of(L, S)
    partial = q.new_empty((2, chunks, B, S, H, D), dtype=lse.dtype) if chunks > 1 else None
    results = {"dq": dq, "dk": dk, "dv": dv, "delta": torch.empty_like(lse, memory_format=torch.contiguous_format)}
    saved = {"out": out, "lse": lse.contiguous()}
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    tensors = {"g": grad, "q": q, "k": k, "v": v}
    with _on(q):
        for launch in launches.backward_launches(tensors, mask, scale, saved, grad_lse, results, partial, _target(q.device)):
            launch.run()
    return dq.mul_(factor) if factor != 1.0 else dq, dk, dv


def refusal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
    """Why these arguments cannot be served; None where they can."""
    if not 1 <= q.shape[3] <= MAX_DIM:
        return f"it serves head dimensions 1 to {MAX_DIM}, not {q.shape[3]}"
    return None


def _heads_inside(like: Tensor) -> Tensor:
    B, H, L, D = like.shape
    return like.new_empty((B, L, H, D)).transpose(1, 2)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _on(q: Tensor) -> AbstractContextManager[object]:
    return torch.cuda.device(q.device) if q.is_cuda else nullcontext()


@functools.cache
def _target(device: torch.device) -> launches.Target:
    if device.type == "cpu":
        return launches.Target(large=False, processors=1)
    properties = torch.cuda.get_device_properties(device)
    return launches.Target(large=properties.major in (9, 10), processors=properties.multi_processor_count)
