"""`ldmkit train`: run a recipe."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

EPILOG = """\
A run whose folder has a checkpoint is resumed, to the same bits as if it had never stopped; --fresh starts over.
Ctrl-C once stops after the current step, with a checkpoint. Several processes: accelerate launch -m ldmkit.cli train ...
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the arguments."""
    parser.epilog = EPILOG
    parser.add_argument("stage", choices=("autoencoder", "diffusion"), help="which stage to train")
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml", help="what to train, on what and how")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: runs/NAME beside the recipe NAME.yaml)"
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="demand a checkpoint to resume from")
    start.add_argument("--fresh", action="store_true", help="start over: delete the run's checkpoints, log and samples")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override the recipe: optimizer.lr=1e-4",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after N steps of this process, with a checkpoint")
    parser.add_argument("--max-minutes", type=float, metavar="M", help="stop after M minutes, with a checkpoint")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU where there is one")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar (there is none without a terminal either)")


def run(args: argparse.Namespace) -> int:
    """Train; returns 0."""
    from ldmkit.errors import InputError
    from ldmkit.training import AutoencoderRecipe, DiffusionRecipe, Options, load_recipe, train_autoencoder, train_diffusion

    for name in ("max_steps", "max_minutes"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: must be above 0")
    main_process = os.environ.get("RANK", "0") == "0"
    stopping = _Stopping()
    options = Options(
        out=args.out if args.out is not None else args.recipe.parent / "runs" / args.recipe.stem,
        start="resume" if args.resume else "fresh" if args.fresh else "auto",
        max_steps=args.max_steps,
        max_minutes=args.max_minutes,
        device=args.device,
        progress=not args.no_progress and sys.stderr.isatty(),
        say=lambda line: print(line, file=sys.stderr, flush=True) if main_process else None,
        should_stop=stopping,
    )
    with stopping:
        if args.stage == "autoencoder":
            result = train_autoencoder(
                load_recipe(AutoencoderRecipe, args.recipe, args.overrides), options, base=args.recipe.parent
            )
        else:
            result = train_diffusion(
                load_recipe(DiffusionRecipe, args.recipe, args.overrides), options, base=args.recipe.parent
            )
    if main_process:
        state = "finished" if result.finished else "stopped; run the same command to go on"
        print(f"{state} after step {result.step}: {result.exported}")
    return 0


class _Stopping:
    """Whether Ctrl-C or SIGTERM has asked for a stop; a second one stops at once."""

    def __init__(self) -> None:
        self._asked = False

    def __call__(self) -> bool:
        return self._asked

    def __enter__(self) -> None:
        self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
