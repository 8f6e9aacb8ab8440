"""How the embedded model came to be, in two small pictures: `python -m ldmkit_emoji.history RUN... -o FOLDER`.

loss.png      the loss of all runs, one after another.
samples.png   the first prompts of the runs' previews, a row for each of a few steps.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ldmkit.checkpoints.files import check_writable
from ldmkit.errors import DataError
from ldmkit_emoji.charts import Points, chart
from ldmkit_emoji.gallery import save
from ldmkit_emoji.plainly import plainly

ROWS = 8
"""Previews shown, spread evenly over those there are."""


def losses(runs: Sequence[Path]) -> dict[str, Points]:
    """(step, loss) of each run, the steps counted through. Raises: DataError for a folder without a log."""
    found: dict[str, Points] = {}
    before = 0
    for run in runs:
        try:
            lines = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
            points = [(before + int(line["step"]), float(line["loss"])) for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"{run} is no folder of a training run ({error}); `ldmkit train ... --out RUN` makes one") from None
        if not points:
            raise DataError(f"{run / 'log.jsonl'} is empty: the run logs every log_every steps, and has not come so far")
        found[run.name] = points
        before = int(points[-1][0])
    return found


def samples(runs: Sequence[Path]) -> Image.Image:
    """The top row of some previews, oldest first, each named by run and step. Raises: DataError where there are none."""
    sheets = [path for run in runs for path in sorted((run / "samples").glob("step-*.png"))]
    if not sheets:
        raise DataError(
            f"no samples/step-*.png in {', '.join(map(str, runs))}: the recipe has no preview, or none was drawn yet"
        )
    chosen = [sheets[round(k * (len(sheets) - 1) / (ROWS - 1))] for k in range(ROWS)] if len(sheets) > ROWS else sheets
    rows = []
    for path in chosen:
        with Image.open(path) as sheet:
            rows.append(sheet.convert("RGB"))
    width, line = max(row.width for row in rows), 16
    height = max(row.height for row in rows)
    columns = 4
    whole = Image.new("RGB", (columns * width, -(-len(rows) // columns) * (height + line)), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(12)
    for k, (path, row) in enumerate(zip(chosen, rows, strict=True)):
        left, top = k % columns * width, k // columns * (height + line)
        step = int(path.stem.removeprefix("step-"))
        pen.text((left + 6, top + 2), f"{path.parent.parent.name}, step {step:,}", fill=(40, 40, 40), font=font)
        whole.paste(row, (left, top + line))
    return whole


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.history", description="Draw what a training's logs tell.")
    parser.add_argument("runs", type=Path, nargs="+", help="folders of training runs, in their order")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write loss.png and samples.png to")
    args = parser.parse_args(argv)
    check_writable(args.output)
    save(chart("training loss", "step", losses(args.runs)), args.output / "loss.png")
    save(samples(args.runs), args.output / "samples.png")
    print(f"{args.output / 'loss.png'}, {args.output / 'samples.png'}")


if __name__ == "__main__":
    plainly(main)
