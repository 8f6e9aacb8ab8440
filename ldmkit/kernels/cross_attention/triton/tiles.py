"""Tile sizes, by the shape of one image alone: every one compiles to tensor-core code without spills (see `static_cases`)."""

from __future__ import annotations

from typing import NamedTuple

FEW_KEYS = 160
"""Up to so many keys may be held on chip at once."""


class Tiles(NamedTuple):
    """Queries and keys a step takes, warps and pipeline stages; and how many columns a product of queries and keys takes at
    once, 0 for all of them.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    columns: int = 0


def pieces(n: int) -> tuple[int, int]:
    """Two powers of two (the second may be 0), at least 16, that hold n: 40 => (32, 16), 77 => (64, 16), 64 => (64, 0)."""
    first = max(16, 1 << (n.bit_length() - 1))
    if n <= first:
        return first, 0
    second = max(16, 1 << (n - first - 1).bit_length())
    return (2 * first, 0) if second == first else (first, second)


# Keyed by the widest head dimension they serve. The first of each pair is for GPUs whose tensor cores read registers and which
# may have no more than 99 KiB of shared memory a block (sm_80 to sm_89, sm_120), the second for those that read shared memory
# (sm_90 and sm_100).
_FORWARD = (
    {
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 2),
        160: Tiles(128, 64, 8, 2, columns=32),
        192: Tiles(64, 32, 4, 2),
        256: Tiles(64, 32, 8, 2, columns=64),
        512: Tiles(32, 32, 8, 2, columns=64),
    },
    {
        64: Tiles(128, 64, 4, 3),
        128: Tiles(128, 64, 8, 3),
        192: Tiles(128, 64, 8, 2),
        256: Tiles(64, 64, 8, 2),
        512: Tiles(32, 32, 8, 2, columns=64),
    },
)
_QUERIES = (
    {
        80: Tiles(64, 64, 4, 2),
        128: Tiles(64, 64, 8, 2),
        160: Tiles(64, 32, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(32, 16, 8, 2),
    },
    {
        96: Tiles(64, 64, 4, 2),
        192: Tiles(64, 64, 8, 2),
        256: Tiles(64, 32, 8, 2),
        512: Tiles(32, 32, 8, 2),
    },
)
_KEYS = (
    {
        48: Tiles(64, 64, 4, 2),
        96: Tiles(32, 64, 4, 2),
        128: Tiles(32, 64, 8, 2),
        192: Tiles(16, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 32, 8, 2),
    },
    {
        64: Tiles(64, 64, 4, 2),
        160: Tiles(32, 64, 8, 2),
        192: Tiles(16, 64, 8, 2),
        256: Tiles(32, 32, 8, 2),
        512: Tiles(16, 32, 8, 2),
    },
)
# With a mask, whose tiles take registers too, on every GPU.
_MASKED_FORWARD = {
    96: Tiles(64, 32, 4, 2),
    128: Tiles(64, 32, 8, 2, columns=64),
    192: Tiles(64, 16, 8, 2),
    512: Tiles(16, 16, 8, 2, columns=64),
}
_MASKED_QUERIES = {96: Tiles(64, 32, 4, 2), 128: Tiles(64, 32, 8, 2), 512: Tiles(32, 16, 8, 2)}
_MASKED_KEYS = {
    64: Tiles(32, 32, 4, 2),
    96: Tiles(16, 32, 4, 2),
    128: Tiles(32, 32, 8, 2),
    160: Tiles(16, 16, 8, 1),
    256: Tiles(16, 32, 8, 2),
    512: Tiles(16, 16, 8, 1),
}
# fp32 without tensor cores, and fp64, which serves checks: small tiles.
_FP32 = {64: Tiles(32, 32, 4, 1), 512: Tiles(16, 16, 4, 1, columns=64)}
_FP64 = {64: Tiles(16, 16, 4, 1), 512: Tiles(16, 16, 4, 1, columns=64)}


class Choice(NamedTuple):
    """What tiles follow from: the sum of the pieces of D, bytes of an element, whether shared memory feeds the tensor cores,
    and whether there is a mask.
    """

    width: int
    itemsize: int
    large: bool
    masked: bool

    def forward(self) -> Tiles:
        """For many keys."""
        return self._of(_FORWARD, _MASKED_FORWARD)

    def queries(self) -> Tiles:
        """For the gradient of queries."""
        return self._of(_QUERIES, _MASKED_QUERIES)

    def keys(self) -> Tiles:
        """For the gradient of keys and values."""
        return self._of(_KEYS, _MASKED_KEYS)

    def few_keys(self, S: int) -> Tiles | None:
        """For few keys; None where they are too many or too wide to be held on chip at once."""
        keys = sum(pieces(S))
        if self.itemsize != 2 or keys > (80 if self.masked else FEW_KEYS):
            return None
        if self.width <= 80 or (self.width <= 96 and keys <= 80):
            return Tiles(64, keys, 4, 2)
        if self.width <= 160 and keys <= 80 and not self.masked:
            return Tiles(128, keys, 8, 2) if self.large else Tiles(64, keys, 4, 2)
        return None

    def _of(self, plain: tuple[dict[int, Tiles], dict[int, Tiles]], masked: dict[int, Tiles]) -> Tiles:
        in_half = masked if self.masked else plain[self.large]
        table = {2: in_half, 4: _FP32, 8: _FP64}[self.itemsize]
        return next(tiles for widest, tiles in table.items() if self.width <= widest)
