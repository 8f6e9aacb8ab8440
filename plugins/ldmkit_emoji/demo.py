"""Sixteen pictures from sixteen prompts in one grid: `python -m ldmkit_emoji.demo`, or `make demo`."""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldmkit.errors import OutputError

PROMPTS = (
    "red apple",
    "grinning face",
    "a rocket on a blue background",
    "sunflower on a purple background",
    "pizza",
    "blue heart on a yellow background",
    "dog face on a green background",
    "snowman on a teal background",
    "flag: japan",
    "octopus on an orange background",
    "a picture of a cactus on a pink background",
    "thumbs up: dark skin tone",
    "birthday cake on a brown background",
    "full moon face on a black background",
    "soccer ball on a red background",
    "owl on a gray background",
)
COLUMNS = 4
SCALE = 2
"""Pixels of the grid per pixel of a picture."""
CAPTION, MARGIN = 34, 12
"""Height of a caption and space between cells, in pixels of the grid."""
WRAP = 23
"""Characters per line of a caption."""


def grid(pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = COLUMNS) -> Image.Image:
    """Pictures of one size in rows, enlarged, each over its caption."""
    width, height = (side * SCALE for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    cell_width, cell_height = width + MARGIN, height + CAPTION + MARGIN
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, rows * cell_height + MARGIN), (245, 245, 245))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left, top = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        sheet.paste(picture.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        text = "\n".join(textwrap.wrap(caption, WRAP))
        pen.multiline_text(
            (left + width / 2, top + height + 4), text, fill=(40, 40, 40), font=font, anchor="ma", align="center"
        )
    return sheet


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.demo", description="Draw sixteen pictures in one grid.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/demo.png"), help="picture to write (default out/demo.png)"
    )
    parser.add_argument("--model", default="emoji", help="name or folder of a saved pipeline (default emoji)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    args = parser.parse_args(argv)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {args.output.parent}: {error.strerror}") from None

    began = time.perf_counter()
    from ldmkit import Pipeline  # imports torch: part of the loading that is timed

    pipe = Pipeline.from_pretrained(args.model)
    loaded = time.perf_counter()
    pictures = pipe(list(PROMPTS), seed=args.seed).images
    drawn = time.perf_counter()
    try:
        grid(pictures, PROMPTS).save(args.output)
    except OSError as error:
        raise OutputError(f"cannot write {args.output}: {error}") from None
    written = time.perf_counter()
    print(f"{len(PROMPTS)} pictures: {args.output.resolve()}")
    print(f"loading {loaded - began:.1f} s, drawing {drawn - loaded:.1f} s, writing {written - drawn:.1f} s")


if __name__ == "__main__":
    main()
