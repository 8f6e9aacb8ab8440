"""What the model reaches, in figures: `python -m ldmkit_emoji.evaluate`. `ldmkit_emoji.measures` says what each figure means.

With `-o report.json` the figures are written there, and beside it report-curves.png (fidelity against guidance scale and
against steps), report-image-to-image.png and report-inpainting.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import ldmkit
from ldmkit import Pipeline
from ldmkit.errors import InputError, OutputError
from ldmkit_emoji import gallery
from ldmkit_emoji.charts import beside, chart
from ldmkit_emoji.glyphs import SIZE, Glyphs, load
from ldmkit_emoji.measures import Draw, autoencoder_fidelity, composed_scenes, diversity, fidelity, held_out_pairs
from ldmkit_emoji.metrics import Floats, NearestGlyph
from ldmkit_emoji.plainly import plainly

FULL, FAST = 256, 64
"""Prompts per measurement; a quarter as many per point of a curve."""
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0, 9.0)
STEPS = (3, 6, 12, 25, 50)


def pipeline_draw(pipe: Pipeline, seed: int, batch_size: int = 32, **settings: Any) -> Draw:
    """Draw with a pipeline's default settings, or others; picture k has the noise of (seed, k)."""

    def draw(prompts: Sequence[str]) -> Floats:
        starts = tqdm(range(0, len(prompts), batch_size), "drawing", unit="batch")
        batches = [
            pipe(
                list(prompts[i : i + batch_size]), seed=seed, first_image=i, output_type="np", progress=False, **settings
            ).images
            for i in starts
        ]
        pictures_BHWC: Floats = np.concatenate(batches)
        if pictures_BHWC.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(
                f"the model draws pictures of shape {pictures_BHWC.shape[1:]}; this evaluation is for {SIZE}x{SIZE} RGB"
            )
        return pictures_BHWC

    return draw


def over(pipe: Pipeline, glyphs: Glyphs, setting: str, values: Sequence[float], count: int, seed: int) -> dict[str, Any]:
    """Fidelity with one setting at several values, the same prompts and noise for each."""
    nearest = NearestGlyph(glyphs)
    settings: list[dict[str, Any]] = [{setting: value} for value in values]
    draws = [pipeline_draw(pipe, seed, **changed) for changed in settings]
    figures = [fidelity(draw, glyphs, count, seed, nearest) for draw in draws]
    return {"points": [{setting: value, **found} for value, found in zip(values, figures, strict=True)]}


MEASUREMENTS = ("autoencoder", "fidelity", "pairs", "scenes", "diversity", "guidance", "steps")


def evaluate(
    pipe: Pipeline, glyphs: Glyphs, *, fast: bool = False, seed: int = 0, only: Sequence[str] = MEASUREMENTS
) -> dict[str, Any]:
    """All figures (or only some), with the settings, versions and times that belong to them."""
    count, draw = FAST if fast else FULL, pipeline_draw(pipe, seed)
    measurements: dict[str, Callable[[], dict[str, Any]]] = {
        "autoencoder": lambda: autoencoder_fidelity(pipe.autoencoder, glyphs),
        "fidelity": lambda: fidelity(draw, glyphs, count, seed),
        "pairs": lambda: held_out_pairs(draw, glyphs, count, seed),
        "scenes": lambda: composed_scenes(draw, glyphs, count, seed),
        "diversity": lambda: diversity(draw, glyphs, count // 16, seed),
        "guidance": lambda: over(pipe, glyphs, "guidance_scale", GUIDANCE, count // 4, seed),
        "steps": lambda: over(pipe, glyphs, "num_inference_steps", STEPS, count // 4, seed),
    }
    report: dict[str, Any] = {}
    for name in only:
        wall, cpu = time.perf_counter(), time.process_time()
        figures = measurements[name]()
        spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        report[name] = figures | spent
    report["settings"] = {
        "seed": seed,
        "fast": fast,
        "sampler": type(pipe.sampler).__name__,
        "defaults": pipe.defaults.to_dict(),
        "dtype": str(pipe.dtype),
        "device": str(pipe.device),
        "threads": torch.get_num_threads(),
    }
    report["versions"] = {"ldmkit": ldmkit.__version__, "torch": str(torch.__version__), "python": platform.python_version()}
    return report


def table(report: dict[str, Any]) -> str:
    """The figures as lines of text."""
    rows = [(report.get(name), line) for name, line in LINES.items()]
    shown = [line(figures) for figures, line in rows if figures is not None]
    for name, setting in CURVES.items():
        if name in report:
            points = report[name]["points"]
            found = ", ".join(f"{p[setting]:g}: {p['top1']:.0%} {p['top5']:.0%}" for p in points)
            shown.append((f"top-1 and top-5 by {name}", found, f"{points[0]['prompts']} names"))
    return "\n".join(f"{what:30}  {value:34}  {of}" for what, value, of in shown)


LINES: dict[str, Callable[[dict[str, Any]], tuple[str, str, str]]] = {
    "autoencoder": lambda a: (
        "autoencoder, held-out glyphs",
        f"PSNR {a['psnr']:.2f} dB (worst {a['worst']:.2f}), distance of features {a['distance']:.3f}",
        f"{a['glyphs']} glyphs",
    ),
    "fidelity": lambda f: (
        "prompt fidelity",
        f"top-1 {f['top1']:.1%}, top-5 {f['top5']:.1%}"
        + (f"; no people: {f['others']['top1']:.1%}, {f['others']['top5']:.1%}" if "others" in f else ""),
        f"{f['prompts']} names",
    ),
    "pairs": lambda p: (
        "held-out pairs",
        f"background {p['background']:.1%}, emoji top-1 {p['top1']:.1%}, top-5 {p['top5']:.1%}",
        f"{p['prompts']} pairs",
    ),
    "scenes": lambda s: (
        "scenes never trained on",
        f"both right {s['scenes']:.1%} (top-5 {s['top5']:.1%}), each {s['parts']:.1%}, background {s['background']:.1%}",
        f"{s['prompts']} scenes",
    ),
    "diversity": lambda d: (
        "diversity",
        f"one prompt {d['same']:.3f}, different {d['different']:.3f}",
        f"{d['prompts']}x{d['seeds']} pictures",
    ),
}
"""What a report says of each measurement: its name, figures, and on how many."""
CURVES = {"guidance": "guidance_scale", "steps": "num_inference_steps"}


def curves(report: dict[str, Any]) -> Image.Image:
    """Fidelity against guidance scale, and against steps, side by side: those that the report has."""
    charts = []
    for name in (name for name in CURVES if name in report):
        points, setting = report[name]["points"], CURVES[name]
        lines = {label: [(p[setting], p[key]) for p in points] for label, key in (("top-5", "top5"), ("top-1", "top1"))}
        charts.append(chart(f"prompt fidelity against {name}", setting.replace("_", " "), lines, percent=True))
    return beside(charts)


def write(report: dict[str, Any], pipe: Pipeline, path: Path, seed: int) -> list[Path]:
    """Write the report and its pictures; returns the paths. Raises: OutputError."""
    try:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from None
    pictures: dict[str, Callable[[], Image.Image]] = {
        "image-to-image": lambda: gallery.image_to_image(pipe, seed),
        "inpainting": lambda: gallery.inpainting(pipe, seed),
    }
    if CURVES.keys() & report.keys():
        pictures["curves"] = lambda: curves(report)
    written = [path]
    for name, make in pictures.items():
        written.append(path.with_name(f"{path.stem}-{name}.png"))
        gallery.save(make(), written[-1])
    return written


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.evaluate", description="Measure the emoji model.")
    parser.add_argument("--model", default="emoji", help="name or folder of a saved pipeline (default emoji)")
    parser.add_argument("--data", type=Path, help="folder made by ldmkit_emoji.data; without it glyphs are drawn from the font")
    parser.add_argument("--fast", action="store_true", help=f"{FAST} prompts per measurement rather than {FULL}")
    parser.add_argument("--only", choices=MEASUREMENTS, action="append", help="one measurement (may be given again)")
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts and noise (default 0)")
    parser.add_argument("--device", default="cpu", help="where to run (default cpu)")
    parser.add_argument("-o", "--output", type=Path, help="write the report here as JSON, and pictures beside it")
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.parent.is_dir():
        raise OutputError(f"cannot write {args.output}: the folder {args.output.parent} does not exist")
    pipe = Pipeline.from_pretrained(args.model, device=args.device)
    pipe.set_progress_bar_config(disable=True)
    glyphs = load(progress=lambda emoji: tqdm(emoji, "drawing glyphs", unit="glyph")) if args.data is None else None
    glyphs = glyphs or Glyphs.read(args.data / "glyphs.npz")
    report = evaluate(pipe, glyphs, fast=args.fast, seed=args.seed, only=args.only or MEASUREMENTS)
    report["settings"]["model"] = str(args.model)
    print(table(report))
    if args.output is not None:
        print("written: " + ", ".join(map(str, write(report, pipe, args.output, args.seed))))


if __name__ == "__main__":
    plainly(main)
