"""The training set: `python -m ldmkit_emoji.data -o DIR`.

Writes, the same bytes for the same seed and packages:
    train.npz     x: uint8 (N, 64, 64, 3), text: N captions. Glyphs on white and on some named backgrounds each, then scenes.
    glyphs.npz    every glyph as RGBA with its names, and whether it is held out.
    captions.txt  the captions of train.npz, one a line.
    vocab.txt     the WordPiece vocabulary for the names of all emoji (the same as recipes/vocab.txt).
    splits.json   what is held out, counts, versions and licences.

Held out whatever the seed: 5% of the emoji families (all skin tones together), and of the others 5% of the pairs (family,
background) and 5% of the pairs of families in one scene. Which ones is decided by a hash of the name alone, so that evaluation
needs no record of the training.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from pathlib import Path

import numpy as np
import PIL
from tqdm import tqdm

from ldmkit.errors import InputError, OutputError
from ldmkit_emoji.captions import COLOURS, caption
from ldmkit_emoji.glyphs import SIZE, Emoji, Glyphs, compose, load, read_emoji
from ldmkit_emoji.plainly import plainly
from ldmkit_emoji.scenes import cast, paint, plan_scenes
from ldmkit_emoji.vocabulary import vocabulary

HELD_OUT = 0.05
TURNS = 2
"""How many glyphs' pictures a family of several glyphs has in `plan_families`."""


def glyph_held_out(family: str) -> bool:
    """Whether no picture of this family is ever trained on."""
    return _fraction(family) < HELD_OUT


def pair_held_out(family: str, colour: str) -> bool:
    """Whether this (trained) family is never trained on with this background; white is never held out."""
    return colour != "white" and not glyph_held_out(family) and _fraction(f"{family} on {colour}") < HELD_OUT


def scene_held_out(a: str, b: str) -> bool:
    """Whether these two (trained) families are never trained on in one scene, whichever of them is on the left."""
    return _fraction(" and ".join(sorted((a, b)))) < HELD_OUT


def _fraction(key: str) -> float:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def backgrounds(emoji: Emoji, count: int, seed: int) -> list[str]:
    """`count` named backgrounds, none of them white or held out for this emoji."""
    allowed = [colour for colour in COLOURS if colour != "white" and not pair_held_out(emoji.family, colour)]
    return random.Random(f"{seed}/{emoji.name}").sample(allowed, min(count, len(allowed)))


def plan(glyphs: Glyphs, *, white: int, coloured: int, seed: int) -> list[tuple[int, str, str]]:
    """The training pictures as (index of the glyph, background, caption), glyph by glyph."""
    return [
        (i, colour, caption(emoji, colour, number, seed))
        for i, emoji in enumerate(glyphs.emoji)
        if not glyph_held_out(emoji.family)
        for number, colour in enumerate(["white"] * white + backgrounds(emoji, coloured, seed))
    ]


def plan_families(glyphs: Glyphs, *, white: int, coloured: int, seed: int) -> list[tuple[int, str, str]]:
    """As `plan`, but a family has as many pictures as one glyph, or as `TURNS` if it has several: they take turns to be shown.

    Every other caption on white is the plain name. Glyph by glyph, 59% of the pictures are people with skin tones.
    """
    families: dict[str, list[int]] = {}
    for i, emoji in enumerate(glyphs.emoji):
        if not glyph_held_out(emoji.family):
            families.setdefault(emoji.family, []).append(i)
    rows = []
    for family, members in families.items():
        draw, turns = random.Random(f"{seed}/{family}"), min(TURNS, len(members))
        others = backgrounds(glyphs.emoji[members[0]], len(COLOURS), seed)
        colours = ["white"] * (white * turns) + [others[k % len(others)] for k in range(coloured * turns)]
        shown = (draw.sample(members, len(members)) * len(colours))[: len(colours)]
        draw.shuffle(shown)
        for number, (i, colour) in enumerate(zip(shown, colours, strict=True)):
            plain = colour == "white" and number % 2 == 0
            rows.append((i, colour, caption(glyphs.emoji[i], colour, 0 if plain else number, seed)))
    return rows


def make(
    folder: Path,
    *,
    seed: int = 0,
    white: int = 3,
    coloured: int = 4,
    families: bool = False,
    scenes: int = 0,
    limit: int | None = None,
) -> dict[str, int]:
    """Write the five files and return their counts.

    Args:
        white: pictures (captions) of each glyph on white.
        coloured: pictures of each glyph on other backgrounds, at most 11, each a different one (families take theirs in turns).
        families: count families rather than glyphs (see `plan_families`).
        scenes: composed pictures (see `ldmkit_emoji.scenes`).
        limit: about how many glyphs to take, evenly spread, for quick trials; all of them when None.

    Raises:
        InputError: for counts out of range.
        MissingDependencyError: without the system's packages.
        OutputError: for a folder that cannot be written.
    """
    if white < 1 or not 0 <= coloured < len(COLOURS) or scenes < 0 or (limit is not None and limit < 1):
        raise InputError(
            f"white={white} must be >= 1, coloured={coloured} in 0..{len(COLOURS) - 1}, scenes={scenes} >= 0, "
            f"limit={limit} >= 1"
        )
    glyphs = load(progress=lambda emoji: tqdm(emoji, "drawing glyphs", unit="glyph"))
    if limit is not None:
        kept = np.linspace(0, len(glyphs) - 1, min(limit, len(glyphs))).astype(int)
        glyphs = Glyphs(tuple(glyphs.emoji[i] for i in kept), glyphs.rgba_NHWC[kept])
    rows = (plan_families if families else plan)(glyphs, white=white, coloured=coloured, seed=seed)
    held_out = [glyph_held_out(e.family) for e in glyphs.emoji]
    trained = [i for i in cast(glyphs) if not held_out[i]]
    if scenes and len(trained) < 2:
        raise InputError(f"limit={limit} leaves {len(trained)} glyphs to make scenes of; at least 2 are needed")
    composed = plan_scenes(glyphs, trained, scenes, seed)
    x_NHWC = np.empty((len(rows) + scenes, SIZE, SIZE, 3), np.uint8)
    for n, (i, colour, _) in enumerate(tqdm(rows, "composing", unit="picture")):
        x_NHWC[n] = compose(glyphs.rgba_NHWC[i], COLOURS[colour])
    for n, scene in enumerate(composed, start=len(rows)):
        x_NHWC[n] = paint(scene, glyphs)
    texts = [text for _, _, text in rows] + [scene.text for scene in composed]
    pairs = [[e.name, c] for e in glyphs.emoji for c in COLOURS if pair_held_out(e.family, c)]
    counts = {"glyphs": len(glyphs), "held_out_glyphs": sum(held_out), "held_out_pairs": len(pairs), "pictures": len(texts)}
    splits = {
        "counts": counts,
        "settings": {
            "seed": seed,
            "white": white,
            "coloured": coloured,
            "families": families,
            "scenes": scenes,
            "limit": limit,
            "held_out": HELD_OUT,
        },
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
        "licences": {"pictures": "Noto Color Emoji, Google, SIL OFL 1.1", "names, keywords": "Unicode, Unicode licence"},
        "colours": COLOURS,
        "held_out_glyphs": [e.name for e, out in zip(glyphs.emoji, held_out, strict=True) if out],
        "held_out_pairs": pairs,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "train.npz", x=x_NHWC, text=np.array(texts))
        glyphs.save(folder / "glyphs.npz", held_out)
        (folder / "captions.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        (folder / "vocab.txt").write_text("\n".join(vocabulary(read_emoji())) + "\n", encoding="utf-8")
        (folder / "splits.json").write_text(json.dumps(splits, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write the data set to {folder}: {error}") from None
    return counts


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.data", description="Make the emoji data set.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--seed", type=int, default=0, help="chooses captions and backgrounds, not what is held out (default 0)"
    )
    parser.add_argument("--white", type=int, default=3, help="pictures of each glyph on white (default 3)")
    parser.add_argument("--coloured", type=int, default=4, help="pictures of each glyph on other backgrounds (default 4)")
    parser.add_argument("--families", action="store_true", help="count families, not glyphs: skin tones take turns to be shown")
    parser.add_argument("--scenes", type=int, default=0, help="composed pictures, of one or two emoji (default 0)")
    parser.add_argument("--limit", type=int, help="about how many glyphs to take, for quick trials")
    args = parser.parse_args(argv)
    counts = make(
        args.output,
        seed=args.seed,
        white=args.white,
        coloured=args.coloured,
        families=args.families,
        scenes=args.scenes,
        limit=args.limit,
    )
    print(f"{args.output}: " + ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in counts.items()))


if __name__ == "__main__":
    plainly(main)
