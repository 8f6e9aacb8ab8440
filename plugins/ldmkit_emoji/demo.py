"""Sixteen pictures from sixteen prompts in one grid: `python -m ldmkit_emoji.demo`, or `make demo`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from ldmkit.checkpoints.files import check_writable
from ldmkit.errors import OutputError
from ldmkit_emoji.plainly import plainly

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


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.demo", description="Draw sixteen pictures in one grid.")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/demo.png"), help="picture to write (default out/demo.png)"
    )
    parser.add_argument("--model", default="emoji", help="name or folder of a saved pipeline (default emoji)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    args = parser.parse_args(argv)
    check_writable(args.output.parent)

    began = time.perf_counter()
    from ldmkit import Pipeline  # imports torch: part of the loading that is timed
    from ldmkit.images import grid

    pipe = Pipeline.from_pretrained(args.model)
    loaded = time.perf_counter()
    pictures = pipe(list(PROMPTS), seed=args.seed).images
    drawn = time.perf_counter()
    try:
        grid(pictures, columns=4, scale=2, labels=PROMPTS).save(args.output)
    except OSError as error:
        raise OutputError(f"cannot write {args.output}: {error}") from None
    written = time.perf_counter()
    print(f"{len(PROMPTS)} pictures: {args.output.resolve()}")
    print(f"loading {loaded - began:.1f} s, drawing {drawn - loaded:.1f} s, writing {written - drawn:.1f} s")


if __name__ == "__main__":
    plainly(main)
