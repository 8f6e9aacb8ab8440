"""How well pictures fit what was asked for. Pictures are float arrays (B, 64, 64, 3) in [0, 1]; nothing here knows a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldmkit.errors import InputError
from ldmkit_emoji.captions import COLOURS
from ldmkit_emoji.glyphs import SIZE, Glyphs

Floats = NDArray[np.floating[Any]]

SMALL = 32
"""Glyphs are compared at 32x32."""
BORDER = 2
"""Pixels of the border that shows the background; glyphs leave more than half of it free."""


FLAT = 0.02
"""Differences between neighbours well below this (5 of 255) count as a flat place."""


def psnr(a_NHWC: Floats, b_NHWC: Floats) -> Floats:
    """Peak signal-to-noise ratio of each picture in dB, (N,); infinite where they are equal."""
    mse_N = np.square(_pictures(a_NHWC) - _pictures(b_NHWC)).mean(axis=(1, 2, 3))
    with np.errstate(divide="ignore"):
        ratio_N: Floats = -10 * np.log10(mse_N)
    return ratio_N


def feature_distance(a_NHWC: Floats, b_NHWC: Floats) -> Floats:
    """A distance made like LPIPS (Zhang et al. 2018, arXiv:1801.03924, eq. 1), without a trained network, (N,).

    Features are the differences to the next pixel, right and below, of each colour, at full, half and quarter size: six
    channels per scale. They are scaled to unit length at each place, their squared difference is averaged over places, and the
    scales are added. Flat places have (almost) no features and (almost) no part in it; lost or invented edges do.
    """
    total_N: Floats = np.zeros(len(a_NHWC))
    a_NHWC, b_NHWC = _pictures(a_NHWC), _pictures(b_NHWC)
    for _ in range(3):
        difference = np.square(_edges(a_NHWC) - _edges(b_NHWC)).sum(axis=-1)
        total_N = total_N + difference.mean(axis=(1, 2))
        a_NHWC, b_NHWC = (
            x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, 3).mean(axis=(2, 4)) for x in (a_NHWC, b_NHWC)
        )
    return total_N


def _edges(x_NHWC: Floats) -> Floats:
    inner = x_NHWC[:, :-1, :-1]
    features = np.concatenate([x_NHWC[:, :-1, 1:] - inner, x_NHWC[:, 1:, :-1] - inner], axis=-1)
    unit: Floats = features / np.sqrt(np.square(features).sum(axis=-1, keepdims=True) + FLAT**2)
    return unit


class NearestGlyph:
    """Ranks all emoji families by mean squared distance to a picture, at 32x32 on one background.

    A family's distance is that of its nearest member, so skin tones count as one.
    """

    def __init__(self, glyphs: Glyphs, colour: str = "white") -> None:
        self.families = sorted({e.family for e in glyphs.emoji})
        index = {family: i for i, family in enumerate(self.families)}
        self._order = np.argsort([index[e.family] for e in glyphs.emoji], kind="stable")
        self._starts = np.searchsorted(np.array([index[glyphs.emoji[i].family] for i in self._order]), range(len(index)))
        self._reference_NC = _small(glyphs.on(COLOURS[colour]).astype(np.float32) / 255)[self._order]

    def distances(self, pictures_BHWC: Floats) -> Floats:
        """Mean squared distance of each picture to each family, (B, families)."""
        pictures_BC = _small(pictures_BHWC)
        rows = [np.square(self._reference_NC - picture_C).mean(axis=1) for picture_C in pictures_BC]
        return np.minimum.reduceat(np.stack(rows), self._starts, axis=1)

    def ranks(self, pictures_BHWC: Floats, families: Sequence[str]) -> NDArray[np.int64]:
        """How many other families are at least as near as the true one, (B,): 0 = it is the single nearest."""
        distances_BF = self.distances(pictures_BHWC)
        true_B1 = np.array([[self.families.index(family)] for family in families])
        nearer_BF = distances_BF <= np.take_along_axis(distances_BF, true_B1, axis=1)
        ranks_B: NDArray[np.int64] = nearer_BF.sum(axis=1) - 1
        return ranks_B


def background(pictures_BHWC: Floats) -> list[str]:
    """The named colour nearest to the median of each picture's border."""
    pictures_BHWC = _pictures(pictures_BHWC)
    frame_HW = np.ones((SIZE, SIZE), bool)
    frame_HW[BORDER:-BORDER, BORDER:-BORDER] = False
    median_BC = np.median(pictures_BHWC[:, frame_HW], axis=1)
    named_KC = np.array(list(COLOURS.values())) / 255
    nearest_B = np.square(median_BC[:, None] - named_KC).sum(axis=-1).argmin(axis=1)
    return [list(COLOURS)[k] for k in nearest_B]


def _small(pictures_BHWC: Floats) -> Floats:
    """Mean over blocks, down to (B, 32 * 32 * 3)."""
    step = SIZE // SMALL
    blocks = _pictures(pictures_BHWC).reshape(-1, SMALL, step, SMALL, step, 3)
    means: Floats = blocks.mean(axis=(2, 4), dtype=np.float32)
    return means.reshape(len(blocks), -1)


def _pictures(pictures_BHWC: Floats) -> Floats:
    if pictures_BHWC.ndim != 4 or pictures_BHWC.shape[1:] != (SIZE, SIZE, 3):
        raise InputError(f"pictures must be (B, {SIZE}, {SIZE}, 3), got shape {pictures_BHWC.shape}")
    return pictures_BHWC
