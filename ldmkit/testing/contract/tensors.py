"""Tensors to try kernels on: drawn numbers under all kinds of strides, built again from a few plain values."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = ("float32", "float16", "bfloat16", "float64")
LOW = DTYPES[:3]

dtypes = st.sampled_from(DTYPES)
low_dtypes = st.sampled_from(LOW)
half_dtypes = st.sampled_from(("float16", "bfloat16"))
seeds = st.integers(0, 2**16)
layouts = st.sampled_from(
    ("dense", "sliced", "transposed", "chunk-half", "expanded", *(f"offset-{elements}" for elements in range(1, 16)))
)
"""What `strided` understands."""


def dtype_of(name: str) -> torch.dtype:
    """ "bfloat16" => torch.bfloat16"""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def randn(shape: Sequence[int], seed: int, dtype: torch.dtype, device: str, *, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """scale * normal numbers + mean, the same on every device, rounded once."""
    numbers = torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (numbers * scale + mean).to(dtype).to(device)


def strided(values: Tensor, layout: str) -> Tensor:
    """The same numbers under other strides; "expanded" repeats the first item of the first dimension instead."""
    shape = values.shape
    if layout == "expanded":
        return values[:1].expand(shape) if values.dim() and shape[0] else values
    if layout == "sliced":
        view = values.new_zeros((*shape[:-1], 2 * shape[-1] + 1))[..., 1::2]
    elif layout == "transposed":
        view = torch.empty_like(values.mT.contiguous()).mT if values.dim() > 1 else torch.empty_like(values)
    elif layout == "chunk-half":
        view = values.new_zeros((*shape[:-1], 2 * shape[-1])).chunk(2, dim=-1)[1]
    elif layout.startswith("offset-"):
        start = int(layout.removeprefix("offset-"))
        view = values.new_zeros(values.numel() + start)[start:].view(shape)
    elif layout == "channels-last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        return values.contiguous(memory_format=formats.get(values.dim(), torch.contiguous_format))
    elif layout == "BLHD":  # attention's heads as a projection leaves them
        return values.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        assert layout == "dense", layout
        return values.contiguous()
    return view.copy_(values)


# Not all systems have the second, which says that the room is not to be set aside.
_UNTOUCHED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


def far_apart(values: Tensor) -> Tensor:
    """The same numbers with more than 2^31 elements between one item of the first dimension and the next.

    On a CPU the memory between is never touched, so that it takes no room.
    """
    step = 2**31 + 64
    elements = (values.shape[0] - 1) * step + values[0].numel()
    if values.is_cpu:
        room = mmap.mmap(-1, elements * values.element_size(), flags=_UNTOUCHED)
        flat = torch.frombuffer(room, dtype=values.dtype)
    else:
        flat = values.new_empty(elements)
    return flat.as_strided(values.shape, (step, *values[0].contiguous().stride())).copy_(values)
