"""Where the package keeps its trained pipeline, and how it gets there: `python -m ldmkit_emoji.bundle RUN/pipeline`."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from ldmkit.errors import CheckpointError, OutputError
from ldmkit_emoji.plainly import plainly

MIB = 2**20
FILE_LIMIT, TOTAL_LIMIT = 15 * MIB, 36 * MIB
"""Most bytes of one file, and of all: the package must stay quick to clone and to install."""
SHARD = 14 * MIB
"""Bytes of weights per file."""


def folder() -> Path:
    """The folder of the saved pipeline `emoji`, as `ldmkit.Pipeline.from_pretrained` reads it.

    Raises:
        CheckpointError: when the package was installed without its weights.
    """
    path = Path(__file__).parent / "weights"
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is missing: this install of ldmkit has no embedded weights; install a complete wheel, "
            "or train them with the commands in ldmkit_emoji/MODEL_CARD.md"
        )
    return path


def sizes(path: Path) -> dict[str, int]:
    """Bytes of every file under a folder. Raises: OutputError where one file, or all together, are above the limits."""
    found = {str(file.relative_to(path)): file.stat().st_size for file in sorted(path.rglob("*")) if file.is_file()}
    large = [f"{name} has {size / MIB:.1f} MiB" for name, size in found.items() if size >= FILE_LIMIT]
    if large:
        raise OutputError(f"{'; '.join(large)}: each file must stay below {FILE_LIMIT // MIB} MiB")
    if sum(found.values()) > TOTAL_LIMIT:
        raise OutputError(f"{path} has {sum(found.values()) / MIB:.1f} MiB in all; at most {TOTAL_LIMIT // MIB} are allowed")
    return found


def pack(trained: Path, target: Path) -> dict[str, int]:
    """Write a trained pipeline as float16 in small files, and return their sizes. A pipeline in `target` is replaced.

    Raises:
        CheckpointError: for what is no saved pipeline.
        OutputError: where the files would be above the limits, or `target` is a folder of something else; it is untouched then.
    """
    import torch

    from ldmkit import Pipeline

    if target.exists() and not (target / "pipeline.json").is_file():
        raise OutputError(f"{target} exists and is no saved pipeline; remove it or write elsewhere")
    pipe = Pipeline.from_pretrained(trained, dtype=torch.float16)
    fresh = target.with_name(f".{target.name}.new")
    try:
        written = sizes(pipe.save_pretrained(fresh, max_shard_size=SHARD))
        if target.exists():
            shutil.rmtree(target)  # shards of another number would stay beside the new ones
        fresh.rename(target)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return written


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m ldmkit_emoji.bundle", description="Put a trained pipeline into the package."
    )
    parser.add_argument("trained", type=Path, help="the pipeline that `ldmkit train diffusion` exported")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path(__file__).parent / "weights", help="default: the package's own"
    )
    args = parser.parse_args(argv)
    written = pack(args.trained, args.output)
    for name, size in written.items():
        print(f"{size / MIB:8.2f} MiB  {name}")
    print(f"{sum(written.values()) / MIB:8.2f} MiB  in all, in {args.output}")


if __name__ == "__main__":
    plainly(main)
