"""Composed pictures: two emoji side by side, or one that is small, on the left, on the right, or large, on any background.

Scenes are made of fruit, birds and sea animals only: half a hundred well-known things, so that a short training sees each of
them often in each place. A small emoji is the 64x64 picture at half its size, by the mean over blocks of 2x2 pixels.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldmkit_emoji.captions import COLOURS, article
from ldmkit_emoji.glyphs import SIZE, Emoji, Glyphs, compose

SUBGROUPS = ("food-fruit", "animal-bird", "animal-marine")
"""Unicode's subgroups that scenes are made of."""
HALF = SIZE // 2
"""Pixels along each side of a small emoji."""
PLACES = {"left": 0, "centre": HALF // 2, "right": HALF}
"""Where a small emoji begins, from the left; each is in the middle of the picture's height."""

PAIRS = (
    "{a} and {b}",
    "{a} left of {b}",
    "{b} right of {a}",
    "{a} next to {b}",
    "{a} on the left and {b} on the right",
)
"""How two emoji are asked for; `a` is the one on the left."""
SINGLES = {"left": "small {a} on the left", "right": "small {a} on the right", "centre": "small {a}", "large": "large {a}"}
PAIR_SHARE = 0.7
"""Share of scenes that show two emoji."""


@dataclass(frozen=True)
class Scene:
    """What a picture shows: (index of the glyph, place) once or twice, a background and a caption."""

    parts: tuple[tuple[int, str], ...]
    colour: str
    text: str


def pair_text(wording: str, a: Emoji, b: Emoji, colour: str) -> str:
    """The caption of two emoji, `a` on the left.

    >>> apple, owl = (Emoji(text="", name=name, group="", subgroup="", family=name, keywords=()) for name in ("apple", "owl"))
    >>> pair_text("{b} right of {a}", apple, owl, "blue")
    'an owl right of an apple on a blue background'
    """
    return _on(wording.format(a=article(a.name) + a.name, b=article(b.name) + b.name), colour)


def single_text(place: str, emoji: Emoji, colour: str) -> str:
    """The caption of one emoji that is "large", or small at a place.

    >>> owl = Emoji(text="", name="owl", group="", subgroup="", family="owl", keywords=())
    >>> single_text("left", owl, "white")
    'a small owl on the left'
    """
    return _on("a " + SINGLES[place].format(a=emoji.name), colour)


def _on(text: str, colour: str) -> str:
    return text.lower() if colour == "white" else f"{text} on {article(colour)}{colour} background".lower()


def cast(glyphs: Glyphs) -> list[int]:
    """Indices of the glyphs that scenes may be made of, held out or not."""
    return [i for i, emoji in enumerate(glyphs.emoji) if emoji.subgroup in SUBGROUPS]


def plan_scenes(glyphs: Glyphs, indices: Sequence[int], count: int, seed: int) -> list[Scene]:
    """`count` scenes made of some glyphs; no two emoji that `scene_held_out` names appear together."""
    from ldmkit_emoji.data import scene_held_out

    scenes: list[Scene] = []
    draw = random.Random(f"{seed}/scenes")
    while len(scenes) < count:
        colour = "white" if draw.random() < 0.4 else draw.choice([c for c in COLOURS if c != "white"])
        i, j = draw.sample(indices, 2)
        a, b = glyphs.emoji[i], glyphs.emoji[j]
        if draw.random() >= PAIR_SHARE:
            place = draw.choice(list(SINGLES))
            scenes.append(Scene(((i, place),), colour, single_text(place, a, colour)))
        elif not scene_held_out(a.family, b.family):
            scenes.append(Scene(((i, "left"), (j, "right")), colour, pair_text(draw.choice(PAIRS), a, b, colour)))
    return scenes


def paint(scene: Scene, glyphs: Glyphs) -> NDArray[np.uint8]:
    """The picture of a scene: uint8 (64, 64, 3)."""
    rgb = COLOURS[scene.colour]
    picture_HWC = np.empty((SIZE, SIZE, 3), np.uint8)
    picture_HWC[:] = rgb
    for index, place in scene.parts:
        whole_HWC = compose(glyphs.rgba_NHWC[index], rgb)
        if place == "large":
            return whole_HWC
        picture_HWC[window(place)] = np.rint(whole_HWC.reshape(HALF, 2, HALF, 2, 3).mean(axis=(1, 3)))
    return picture_HWC


def window(place: str) -> tuple[Any, ...]:
    """Where a small emoji lies in pictures (..., 64, 64, 3), as an index.

    >>> np.zeros((5, 64, 64, 3))[window("right")].shape
    (5, 32, 32, 3)
    """
    top, left = HALF // 2, PLACES[place]
    return (..., slice(top, top + HALF), slice(left, left + HALF), slice(None))
