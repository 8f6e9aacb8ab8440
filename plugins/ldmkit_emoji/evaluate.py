"""What the model reaches, in figures: `python -m ldmkit_emoji.evaluate`.

autoencoder   PSNR of held-out glyphs on white, encoded and decoded.
fidelity      names drawn from those trained on, default settings: is the true glyph the nearest of all on white (top-1), or
              among the five nearest (top-5)? Skin tones count as one.
pairs         held-out (emoji, background) pairs: is the background the right one, and is the emoji, on that background?
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm

import ldmkit
from ldmkit import Autoencoder, Pipeline
from ldmkit.errors import InputError, OutputError
from ldmkit_emoji.captions import COLOURS, article
from ldmkit_emoji.data import glyph_held_out, pair_held_out
from ldmkit_emoji.glyphs import SIZE, Emoji, Glyphs, load
from ldmkit_emoji.metrics import Floats, NearestGlyph, background, psnr
from ldmkit_emoji.plainly import plainly

T = TypeVar("T")

Draw = Callable[[Sequence[str]], Floats]
"""Prompts => pictures (B, 64, 64, 3) in [0, 1]."""

FULL, FAST = 256, 64
"""Prompts per measurement."""


def autoencoder_psnr(autoencoder: Autoencoder, glyphs: Glyphs, batch_size: int = 32) -> dict[str, float]:
    """Mean and worst PSNR (dB) of the held-out glyphs on white; decoded pixels are clamped to [-1, 1]."""
    kept = [i for i, e in enumerate(glyphs.emoji) if glyph_held_out(e.family)]
    truth_NHWC = Glyphs(tuple(glyphs.emoji[i] for i in kept), glyphs.rgba_NHWC[kept]).on(COLOURS["white"]) / 255
    parameter = next(autoencoder.parameters())
    decoded = []
    with torch.no_grad():
        for batch_BHWC in np.array_split(truth_NHWC, range(batch_size, len(truth_NHWC), batch_size)):
            x_BCHW = torch.from_numpy(batch_BHWC * 2 - 1).permute(0, 3, 1, 2).to(parameter.device, parameter.dtype)
            y_BCHW = autoencoder.decode(autoencoder.encode(x_BCHW).mode())
            decoded.append(y_BCHW.float().clamp(-1, 1).permute(0, 2, 3, 1).cpu().numpy() / 2 + 0.5)
    psnr_N = psnr(np.concatenate(decoded), truth_NHWC)
    return {"psnr": float(psnr_N.mean()), "worst": float(psnr_N.min()), "glyphs": len(kept)}


def fidelity(draw: Draw, glyphs: Glyphs, count: int, seed: int) -> dict[str, float]:
    """Draw `count` names of those trained on; the share whose family is nearest, and among the five nearest."""
    chosen = _sample([e for e in glyphs.emoji if not glyph_held_out(e.family)], count, seed)
    ranks_B = NearestGlyph(glyphs).ranks(draw([e.name.lower() for e in chosen]), [e.family for e in chosen])
    return {"top1": float((ranks_B < 1).mean()), "top5": float((ranks_B < 5).mean()), "prompts": len(chosen)}


def held_out_pairs(draw: Draw, glyphs: Glyphs, count: int, seed: int) -> dict[str, float]:
    """Draw `count` held-out pairs; the share with the right background, and with the right emoji on that background."""
    chosen = _sample([(e, c) for e in glyphs.emoji for c in COLOURS if pair_held_out(e.family, c)], count, seed)
    pictures_BHWC = draw([pair_prompt(e, colour) for e, colour in chosen])
    right_B = np.array([found == colour for found, (_, colour) in zip(background(pictures_BHWC), chosen, strict=True)])
    ranks_B = np.empty(len(chosen), int)
    for colour in sorted({colour for _, colour in chosen}):
        on_it = [i for i, (_, c) in enumerate(chosen) if c == colour]
        ranks_B[on_it] = NearestGlyph(glyphs, colour).ranks(pictures_BHWC[on_it], [chosen[i][0].family for i in on_it])
    return {
        "background": float(right_B.mean()),
        "top1": float((ranks_B < 1).mean()),
        "top5": float((ranks_B < 5).mean()),
        "prompts": len(chosen),
    }


def pair_prompt(emoji: Emoji, colour: str) -> str:
    """How a pair is asked for: "red apple on a blue background"."""
    return f"{emoji.name} on {article(colour)}{colour} background".lower()


def pipeline_draw(pipe: Pipeline, seed: int, batch_size: int = 32) -> Draw:
    """Draw with a pipeline's default settings; picture k has the noise of (seed, k)."""

    def draw(prompts: Sequence[str]) -> Floats:
        starts = tqdm(range(0, len(prompts), batch_size), "drawing", unit="batch")
        batches = [
            pipe(list(prompts[i : i + batch_size]), seed=seed, first_image=i, output_type="np", progress=False).images
            for i in starts
        ]
        pictures_BHWC: Floats = np.concatenate(batches)
        if pictures_BHWC.shape[1:] != (SIZE, SIZE, 3):
            raise InputError(
                f"the model draws pictures of shape {pictures_BHWC.shape[1:]}; this evaluation is for {SIZE}x{SIZE} RGB"
            )
        return pictures_BHWC

    return draw


def evaluate(pipe: Pipeline, glyphs: Glyphs, *, fast: bool = False, seed: int = 0) -> dict[str, Any]:
    """All figures, with the settings, versions and times that belong to them."""
    count, draw = FAST if fast else FULL, pipeline_draw(pipe, seed)
    measurements: dict[str, Callable[[], dict[str, float]]] = {
        "autoencoder": lambda: autoencoder_psnr(pipe.autoencoder, glyphs),
        "fidelity": lambda: fidelity(draw, glyphs, count, seed),
        "pairs": lambda: held_out_pairs(draw, glyphs, count, seed),
    }
    report: dict[str, Any] = {}
    for name, measure in measurements.items():
        start = time.perf_counter()
        report[name] = {**measure(), "seconds": round(time.perf_counter() - start, 1)}
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
    a, f, p = report["autoencoder"], report["fidelity"], report["pairs"]
    rows = [
        ("autoencoder, held-out glyphs", f"PSNR {a['psnr']:.2f} dB (worst {a['worst']:.2f})", f"{a['glyphs']} glyphs"),
        ("prompt fidelity", f"top-1 {f['top1']:.1%}, top-5 {f['top5']:.1%}", f"{f['prompts']} names"),
        ("held-out pairs, background", f"right {p['background']:.1%}", f"{p['prompts']} pairs"),
        ("held-out pairs, emoji", f"top-1 {p['top1']:.1%}, top-5 {p['top5']:.1%}", f"{p['prompts']} pairs"),
    ]
    return "\n".join(f"{what:30}  {value:34}  {of}" for what, value, of in rows)


def _sample(items: Sequence[T], count: int, seed: int) -> list[T]:
    if not items:
        raise InputError("there is nothing to measure on: none of the given glyphs is of the kind asked for")
    return random.Random(seed).sample(items, min(count, len(items)))


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.evaluate", description="Measure the emoji model.")
    parser.add_argument("--model", default="emoji", help="name or folder of a saved pipeline (default emoji)")
    parser.add_argument("--data", type=Path, help="folder made by ldmkit_emoji.data; without it glyphs are drawn from the font")
    parser.add_argument("--fast", action="store_true", help=f"{FAST} prompts per measurement rather than {FULL}")
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts and noise (default 0)")
    parser.add_argument("--device", default="cpu", help="where to run (default cpu)")
    parser.add_argument("-o", "--output", type=Path, help="write the report here as JSON")
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.parent.is_dir():
        raise OutputError(f"cannot write {args.output}: the folder {args.output.parent} does not exist")
    pipe = Pipeline.from_pretrained(args.model, device=args.device)
    glyphs = load(progress=lambda emoji: tqdm(emoji, "drawing glyphs", unit="glyph")) if args.data is None else None
    report = evaluate(pipe, glyphs or Glyphs.read(args.data / "glyphs.npz"), fast=args.fast, seed=args.seed)
    report["settings"]["model"] = str(args.model)
    print(table(report))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        print(f"report: {args.output}")


if __name__ == "__main__":
    plainly(main)
