"""Every emoji with its names and its picture, from what the system's Unicode and font packages hold.

`read_emoji` lists the fully-qualified emoji of emoji-test.txt with their CLDR keywords; `draw` renders one with the bitmaps of
Noto Color Emoji; `load` does both for all, and says which emoji are one family (skin tones, and pictures that are the same).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, features

from ldmkit.errors import DataError, InputError, MissingDependencyError

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_TEST = Path("/usr/share/unicode/emoji/emoji-test.txt")
ANNOTATIONS = tuple(Path("/usr/share/unicode/cldr/common") / name / "en.xml" for name in ("annotations", "annotationsDerived"))
APT = "apt-get install fonts-noto-color-emoji unicode-data unicode-cldr-core"

SIZE = 64
"""Pixels along each side of a picture."""
STRIKE = 109
"""The one size (in pixels per em) at which the font has bitmaps."""
BITMAP = (136, 128)
"""Width and height of a glyph's bitmap."""
FITTED = (62, 58)
"""Width and height of a glyph in the picture: the bitmap's shape with a margin of at least one pixel."""


@dataclass(frozen=True, kw_only=True)
class Emoji:
    """One emoji: `text` is the character sequence, `name` the Unicode name, `family` the name that all its skin tones share."""

    text: str
    name: str
    group: str
    subgroup: str
    family: str
    keywords: tuple[str, ...]


@dataclass(frozen=True)
class Glyphs:
    """All emoji and their pictures.

    Attributes:
        emoji: N of them, in the order of emoji-test.txt.
        rgba_NHWC: uint8 (N, 64, 64, 4), colours not multiplied by alpha, zero where fully transparent.
    """

    emoji: tuple[Emoji, ...]
    rgba_NHWC: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.emoji)

    def on(self, rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
        """All pictures on a plain background: uint8 (N, 64, 64, 3)."""
        return np.stack([compose(rgba_HWC, rgb) for rgba_HWC in self.rgba_NHWC])

    def save(self, path: Path, held_out: Sequence[bool]) -> None:
        """Write an npz with the pictures, every text field, and the given flags. The same input gives the same bytes."""
        fields: dict[str, Any] = {
            name: np.array([getattr(e, name) for e in self.emoji]) for name in ("text", "name", "group", "subgroup", "family")
        }
        fields["keywords"] = np.array(["|".join(e.keywords) for e in self.emoji])
        np.savez_compressed(path, rgba=self.rgba_NHWC, held_out=np.array(held_out), **fields)

    @staticmethod
    def read(path: Path) -> Glyphs:
        """Read what `save` wrote. Raises: DataError."""
        try:
            with np.load(path, allow_pickle=False) as file:
                columns = [file[n].tolist() for n in ("text", "name", "group", "subgroup", "family", "keywords")]
                rgba_NHWC = file["rgba"]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"{path} is no glyph file ({error}); make it with: python -m ldmkit_emoji.data -o {path.parent}"
            ) from None
        emoji = tuple(
            Emoji(text=t, name=n, group=g, subgroup=s, family=f, keywords=tuple(k.split("|")) if k else ())
            for t, n, g, s, f, k in zip(*columns, strict=True)
        )
        return Glyphs(emoji, rgba_NHWC)


def compose(rgba_HWC: NDArray[np.uint8], rgb: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One picture on a plain background: uint8 (64, 64, 3)."""
    alpha_HW1 = rgba_HWC[..., 3:].astype(np.float32) / 255
    blended = rgba_HWC[..., :3] * alpha_HW1 + np.array(rgb, np.float32) * (1 - alpha_HW1)
    return np.rint(blended).astype(np.uint8)


def load(every: int = 1, progress: Callable[[Sequence[Emoji]], Any] = iter) -> Glyphs:
    """All emoji (or every n-th), drawn. `progress` wraps the sequence that is looped over (tqdm, say).

    Raises:
        MissingDependencyError: when a file of the system's packages, or Pillow's RAQM, is not there.
    """
    emoji = read_emoji()[::every]
    font = open_font()
    rgba_NHWC = np.stack([draw(e.text, font) for e in progress(emoji)])
    return Glyphs(_same_pictures_same_family(emoji, rgba_NHWC), rgba_NHWC)


# ------------------------------------------------------------------------------------------------------------------ the names


def read_emoji(emoji_test: Path = EMOJI_TEST, annotations: Sequence[Path] = ANNOTATIONS) -> tuple[Emoji, ...]:
    """The fully-qualified emoji with their keywords, in file order. Raises: MissingDependencyError, DataError."""
    keywords = _read_keywords(annotations)
    emoji, group, subgroup = [], "", ""
    for line in _present(emoji_test).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ")
        elif match := re.fullmatch(r"([0-9A-F ]+?)\s*; fully-qualified\s*# \S+ E[0-9.]+ (.+)", line):
            text, name = "".join(chr(int(code, 16)) for code in match[1].split()), match[2]
            words = keywords.get(text.replace("\ufe0f", ""), ())
            emoji.append(Emoji(text=text, name=name, group=group, subgroup=subgroup, family=family_name(name), keywords=words))
    if not emoji:
        raise DataError(f"{emoji_test} lists no fully-qualified emoji; it should be Unicode's emoji-test.txt ({APT})")
    return tuple(emoji)


def family_name(name: str) -> str:
    """The name without its skin tones.

    >>> family_name("person: light skin tone, blond hair")
    'person: blond hair'
    >>> family_name("kiss: person, person, light skin tone, dark skin tone")
    'kiss'
    """
    head, _, tail = name.partition(": ")
    parts = [part for part in tail.split(", ") if part and not part.endswith("skin tone")]
    if parts == ["person", "person"]:  # only the names with two tones spell this out
        parts = []
    return f"{head}: {', '.join(parts)}" if parts else head


def _read_keywords(paths: Sequence[Path]) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for path in paths:
        for item in ElementTree.parse(_present(path)).iter("annotation"):
            if item.get("type") is None and item.text:
                found[item.get("cp", "")] = tuple(word.strip() for word in item.text.split("|"))
    return found


# --------------------------------------------------------------------------------------------------------------- the pictures


def open_font(path: Path = FONT) -> ImageFont.FreeTypeFont:
    """The font at its bitmaps' size, laid out so that sequences join to one glyph. Raises: MissingDependencyError."""
    if not features.check("raqm"):
        raise MissingDependencyError(
            "this Pillow was built without RAQM, so flags and other emoji sequences would fall apart into several glyphs; "
            "install Pillow's own wheel (pip install --force-reinstall pillow)"
        )
    return ImageFont.truetype(_present(path), STRIKE, layout_engine=ImageFont.Layout.RAQM)


def draw(text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.uint8]:
    """One emoji as uint8 (64, 64, 4), resampled with alpha multiplied in.

    Raises:
        InputError: when the text is not exactly one glyph of the font's bitmaps.
    """
    box = list(font.getbbox(text))
    if box != [0, 0, *BITMAP]:
        raise InputError(f"{text!r} is not one glyph of the font: it covers {box}, one glyph covers {[0, 0, *BITMAP]}")
    black_HWC, white_HWC = (_draw_on(shade, text, font) for shade in (0, 255))
    alpha_HW = 255 - (white_HWC - black_HWC).mean(axis=-1)
    planes = [_fit(plane) for plane in (*np.moveaxis(black_HWC, -1, 0), alpha_HW)]  # on black, colours are multiplied by alpha
    alpha_HW = np.rint(np.clip(planes[3], 0, 255))
    rgb_HWC = np.stack(planes[:3], axis=-1) * 255 / np.maximum(alpha_HW, 1)[..., None]
    rgb_HWC = np.where(alpha_HW[..., None] > 0, np.clip(rgb_HWC, 0, 255), 0)
    rgba_HWC = np.zeros((SIZE, SIZE, 4), np.uint8)
    top, left = (SIZE - FITTED[1]) // 2, (SIZE - FITTED[0]) // 2
    rgba_HWC[top : top + FITTED[1], left : left + FITTED[0]] = np.rint(np.concatenate([rgb_HWC, alpha_HW[..., None]], axis=-1))
    return rgba_HWC


def _draw_on(shade: int, text: str, font: ImageFont.FreeTypeFont) -> NDArray[np.float32]:
    image = Image.new("RGB", BITMAP, (shade,) * 3)
    ImageDraw.Draw(image).text((0, 0), text, font=font, embedded_color=True)
    return np.asarray(image, np.float32)


def _fit(plane_HW: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(Image.fromarray(plane_HW.astype(np.float32)).resize(FITTED, Image.Resampling.LANCZOS), np.float32)


def _same_pictures_same_family(emoji: Sequence[Emoji], rgba_NHWC: NDArray[np.uint8]) -> tuple[Emoji, ...]:
    """Norway's flag is Svalbard's: families that share a picture become one, named after the first."""
    parent: dict[str, str] = {}

    def root(family: str) -> str:
        while family in parent:
            family = parent[family]
        return family

    first: dict[bytes, str] = {}
    for e, rgba_HWC in zip(emoji, rgba_NHWC, strict=True):
        a, b = root(first.setdefault(rgba_HWC.tobytes(), e.family)), root(e.family)
        if a != b:
            parent[b] = a
    return tuple(replace(e, family=root(e.family)) for e in emoji)


def _present(path: Path) -> Path:
    if not path.is_file():
        raise MissingDependencyError(f"{path} is not there; on Debian and Ubuntu: {APT}")
    return path
