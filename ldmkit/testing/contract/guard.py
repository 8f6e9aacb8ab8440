"""Guard bands round what a kernel allocates, and NaN in it that the kernel must overwrite."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

BAND = 256
"""Bytes before and after each block; a multiple of every alignment that kernels ask for."""
FILL = 0xFF
"""All bits set is NaN in every floating format."""


class Guards:
    """The blocks handed out while it is in force."""

    def __init__(self) -> None:
        self._blocks: list[torch.UntypedStorage] = []
        self._seeds: dict[tuple[torch.dtype, str], Tensor] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def covers(self, t: Tensor) -> bool:
        """Whether a tensor lies in one of the blocks."""
        return any(t.untyped_storage().data_ptr() == block.data_ptr() for block in self._blocks)

    def check(self) -> None:
        """Asserts that nothing was written outside of any block."""
        for block in self._blocks:
            written = torch.tensor([], dtype=torch.uint8, device=block.device).set_(block)
            for band, where in ((written[:BAND], "before"), (written[-BAND:], "after")):
                broken = (band != FILL).nonzero()
                size = len(written) - 2 * BAND
                assert not len(broken), f"{len(broken)} bytes were written {where} a block of {size} bytes"

    def allocate(self, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        elements = 0 if 0 in size else 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if not elements:  # nothing to guard; and torch may let such a one grow later, into the room of the bands
            empty = self._seeds[dtype, device.type].as_strided((0,), (1,))
            return empty.set_(torch.UntypedStorage(0, device=device), 0, tuple(size), tuple(stride))
        block = torch.UntypedStorage(2 * BAND + elements * dtype.itemsize, device=device)
        self._blocks.append(block)
        # Views of what is there already: making a tensor would allocate again.
        self._seeds[torch.uint8, device.type].as_strided((0,), (1,)).set_(block).fill_(FILL)
        t = self._seeds[dtype, device.type].as_strided((0,), (1,))
        return t.set_(block, BAND // dtype.itemsize, tuple(size), tuple(stride))

    @contextmanager
    def in_force(self, device: str) -> Iterator[None]:
        """Torch's two allocating ops give guarded blocks, to C++ as to Python, in this process, on one thread."""
        others = (torch.uint8, torch.int32, torch.int64, torch.bool)
        floats = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        self._seeds = {(dtype, device): torch.empty(0, dtype=dtype, device=device) for dtype in (*floats, *others)}
        library = torch.library.Library("aten", "IMPL")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # Python cannot be called from a worker thread that this one waits for
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "overriding a previously registered kernel", which is the point
                for name, function in (("empty.memory_format", self._empty), ("empty_strided", self._empty_strided)):
                    library.impl(name, function, device.upper())
            yield
        finally:
            library._destroy()
            torch.set_num_threads(threads)

    def _empty(self, size: Sequence[int], *, memory_format: torch.memory_format | None = None, **options: Any) -> Tensor:
        dtype, device = _kind(options)
        meta = torch.empty(size, dtype=dtype, device="meta", memory_format=memory_format or torch.contiguous_format)
        return self.allocate(size, meta.stride(), dtype, device)

    def _empty_strided(self, size: Sequence[int], stride: Sequence[int], **options: Any) -> Tensor:
        return self.allocate(size, stride, *_kind(options))


def _kind(options: dict[str, Any]) -> tuple[torch.dtype, torch.device]:
    dtype = options.get("dtype") or torch.get_default_dtype()
    return dtype, torch.device(options.get("device") or "cpu")
