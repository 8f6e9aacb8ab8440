"""Which kernels a call launches, and with what: built from shapes and strides alone, so that tensors without data will do."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ldmkit.kernels.cross_attention.triton import tiles
from ldmkit.kernels.cross_attention.triton.backward import add_chunks, keys_backward, queries_backward
from ldmkit.kernels.cross_attention.triton.few_keys import few_keys_forward
from ldmkit.kernels.cross_attention.triton.many_keys import many_keys_forward

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
_ADDED_AT_ONCE = 1024
"""Elements a program of `add_chunks` takes."""


class Launch(NamedTuple):
    """One kernel, ready to run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Puts it into the current stream."""
        self.kernel[self.grid](**self.arguments, num_warps=self.warps, num_stages=self.stages)


class Target(NamedTuple):
    """What a launch must know of where it runs."""

    large: bool
    """Whether tensor cores read shared memory, of which there is much (sm_90, sm_100)."""
    processors: int


def forward_launches(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, out: Tensor, lse: Tensor, target: Target
) -> list[Launch]:
    """(B, H, L, D), (B, H, S, D), L and S > 0 => `out`, dense (B, L, H, D) in memory, and `lse`."""
    (B, H, L, _), S = q.shape, k.shape[2]
    common = {**_common({"q": q, "k": k, "v": v}, mask, scale, target), "out": out, "lse": lse}
    choice = tiles.Choice(common["D1"] + common["D2"], q.element_size(), target.large, mask is not None)
    few = choice.few_keys(S)
    if few is not None:
        blocks = _ceil(L, few.queries)
        run = max(1, min(8, B * H * blocks // (8 * target.processors)))  # changes no result
        first, second = tiles.pieces(S)
        arguments = {**common, "RUN": run, "SA": first, "SB": second, "BLOCK": few.queries}
        return [Launch(few_keys_forward, (B * H * _ceil(blocks, run),), arguments, few.warps, few.stages)]
    many = choice.forward()
    arguments = {**common, "BLOCK": many.queries, "KEYS": many.keys, "CHUNK": many.columns}
    return [Launch(many_keys_forward, (B * H * _ceil(L, many.queries),), arguments, many.warps, many.stages)]


def chunks_of(L: int, S: int) -> int:
    """Into how many parts the queries are dealt for the gradient of few keys, so that all of a GPU has work."""
    return max(1, min(8, L // (4 * S)))


def backward_launches(
    tensors: dict[str, Tensor],
    mask: Tensor | None,
    scale: float,
    saved: dict[str, Tensor],
    grad_lse: Tensor | None,
    results: dict[str, Tensor],
    partial: Tensor | None,
    target: Target,
) -> list[Launch]:
    """The gradients.

    Args:
        tensors: g (the incoming gradient), q, k, v.
        saved: out, lse.
        results: dq, dk, dv, dense (B, L|S, H, D) in memory; delta, like lse.
        partial: (2, chunks, B, S, H, D) in the dtype of lse, for dk and dv; None where there is one chunk.
    """
    (B, H, L, _), S = tensors["q"].shape, tensors["k"].shape[2]
    common = {**_common(tensors, mask, scale, target), "lse": saved["lse"], "delta": results["delta"]}
    choice = tiles.Choice(common["D1"] + common["D2"], tensors["q"].element_size(), target.large, mask is not None)

    by_queries = choice.queries()
    own = {"g_lse": results["delta"] if grad_lse is None else grad_lse, "HAS_G_LSE": grad_lse is not None, "out": saved["out"]}
    arguments = {**common, **own, "dq": results["dq"], "BLOCK": by_queries.queries, "KEYS": by_queries.keys}
    grid: tuple[int, ...] = (B * H * _ceil(L, by_queries.queries),)
    launches = [Launch(queries_backward, grid, arguments, by_queries.warps, by_queries.stages)]

    by_keys = choice.keys()
    chunks = 1 if partial is None else partial.shape[1]
    dk, dv = (results["dk"], results["dv"]) if partial is None else partial
    arguments = {**common, "dk": dk, "dv": dv, "CHUNKS": chunks, "BLOCK": by_keys.queries, "KEYS": by_keys.keys}
    grid = (B * H * _ceil(S, by_keys.keys), chunks)
    launches.append(Launch(keys_backward, grid, arguments, by_keys.warps, by_keys.stages))
    if partial is not None:
        launches += [_addition(dk, results["dk"]), _addition(dv, results["dv"])]
    return launches


def _addition(partial: Tensor, total: Tensor) -> Launch:
    count = total.numel()
    align = 4 if count % 4 == 0 else 1
    arguments = {"partial": partial, "total": total, "COUNT": count // align, "CHUNKS": partial.shape[0], "ALIGN": align}
    return Launch(add_chunks, (_ceil(count, _ADDED_AT_ONCE),), {**arguments, "BLOCK": _ADDED_AT_ONCE}, 4, 1)


def _common(tensors: dict[str, Tensor], mask: Tensor | None, scale: float, target: Target) -> dict[str, Any]:
    """What all kernels take: tensors and their strides, sizes, and how to compute."""
    q = tensors["q"]
    (_, H, L, D), S = q.shape, tensors["k"].shape[2]
    align = _alignment(tensors.values())
    D1, D2 = tiles.pieces(D)
    arguments: dict[str, Any] = {**tensors, "H": H, "L": L, "S": S, "scale": scale, "D": D, "D1": D1, "D2": D2, "ALIGN": align}
    for name, t in tensors.items():
        of_batch, of_head, of_row, of_column = _strides(t)
        row = "s" if name in ("k", "v") else "l"
        arguments |= {f"{name}_b": of_batch // align, f"{name}_h": of_head // align, f"{name}_{row}": of_row // align}
        arguments[f"{name}_d"] = of_column
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
    strides = (0, 0, 0, 0) if mask is None else _strides(mask)
    arguments |= dict(zip(("m_b", "m_h", "m_l", "m_s"), strides, strict=True))
    arguments["mask"] = q if mask is None else mask.view(torch.uint8) if kind == BOOL_MASK else mask
    shown = None if mask is None else _shown(mask, S)
    arguments["shown"] = q if shown is None else shown
    arguments["n_b"], arguments["n_h"] = (0, 0) if shown is None else _strides(shown)[:2]
    # Where a mask or the sign of the scale forbids taking the maximum of unscaled scores, scores are scaled first.
    arguments |= {"MASK": kind, "BY_ROW": strides[2] != 0, "SCALED": kind != NO_MASK or scale <= 0 or q.dtype == torch.float64}
    tf32 = q.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    arguments["ACC"] = tl.float64 if q.dtype == torch.float64 else tl.float32
    return {**arguments, "PRECISION": "tf32" if tf32 else "ieee"}


def _shown(mask: Tensor, S: int) -> Tensor:
    """(B or 1, H or 1, S) bytes: 0 for a key that every query of a head has masked."""
    attended = mask if mask.dtype == torch.bool else mask != -math.inf
    return attended.any(dim=2).expand(-1, -1, S).contiguous().view(torch.uint8)


def _strides(t: Tensor) -> list[int]:
    """The strides, 0 for dimensions of size 1."""
    return [stride if size > 1 else 0 for stride, size in zip(t.stride(), t.shape, strict=True)]


def _alignment(tensors: Iterable[Tensor]) -> int:
    """By how many elements all rows start apart: 16 bytes' worth, or 1."""
    for t in tensors:
        unit = 16 // t.element_size()
        if t.stride(3) != 1 or t.shape[3] % unit or any(stride % unit for stride in _strides(t)[:3]):
            return 1
    return unit


def _ceil(n: int, d: int) -> int:
    return -(-n // d)
