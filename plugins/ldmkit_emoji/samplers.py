"""One prompt by many samplers and numbers of steps, in one picture: `python -m ldmkit_emoji.samplers`. See docs/samplers.md."""

from __future__ import annotations

import argparse
from pathlib import Path

from ldmkit.checkpoints.files import check_writable
from ldmkit.errors import OutputError
from ldmkit_emoji.plainly import plainly

SAMPLERS = (
    "ddim",
    "euler",
    "euler-ancestral",
    "heun",
    "lms",
    "plms",
    "dpm-singlestep",
    "dpm++-2m",
    "dpm++-2m-sde",
    "unipc",
)
STEPS = (2, 3, 5, 8, 15, 30)
PROMPT = "grinning face"


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ldmkit_emoji.samplers", description="Draw one prompt by many samplers: a row each, steps rising."
    )
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("out/samplers.png"), help="picture to write (default out/samplers.png)"
    )
    parser.add_argument("--prompt", default=PROMPT, help=f"what to draw (default {PROMPT!r})")
    parser.add_argument("--seed", type=int, default=0, help="of the noise, the same for all (default 0)")
    args = parser.parse_args(argv)
    check_writable(args.output.parent)

    from ldmkit import Pipeline
    from ldmkit.images import grid

    pipe = Pipeline.from_pretrained("emoji")
    pictures, labels = [], []
    for name in SAMPLERS:
        pipe.sampler = {"name": name, "timestep_spacing": "trailing"} if name != "plms" else name
        for steps in STEPS:
            pictures += pipe(args.prompt, num_inference_steps=steps, seed=args.seed, progress=False).images
            labels.append(f"{name}, {steps}")
    try:
        sheet = grid(pictures, columns=len(STEPS), scale=2, labels=labels)
        sheet.quantize(256).save(args.output, optimize=True)  # a third of the bytes
    except OSError as error:
        raise OutputError(f"cannot write {args.output}: {error}") from None
    print(f"{len(pictures)} pictures: {args.output.resolve()}")


if __name__ == "__main__":
    plainly(main)
