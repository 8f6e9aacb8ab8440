"""What the model is measured by. Each function draws what it asks for, and returns plain figures.

autoencoder   PSNR and distance of features of held-out glyphs on white, encoded and decoded.
fidelity      names drawn from those trained on: is the true glyph the nearest of all on white (top-1), or among the five
              nearest (top-5)? Skin tones count as one.
pairs         held-out (emoji, background) pairs: is the background the right one, and is the emoji, on that background?
scenes        two emoji side by side that were never trained on together: is each the nearest of all glyphs in its half?
diversity     how far apart pictures of one prompt are under several seeds, beside pictures of different prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ldmkit import Autoencoder
from ldmkit.errors import InputError
from ldmkit_emoji.captions import COLOURS, article
from ldmkit_emoji.data import glyph_held_out, pair_held_out, scene_held_out
from ldmkit_emoji.glyphs import Emoji, Glyphs
from ldmkit_emoji.metrics import Floats, NearestGlyph, background, feature_distance, psnr
from ldmkit_emoji.scenes import PAIRS, cast, pair_text, window

T = TypeVar("T")

PEOPLE = "People & Body"
"""Unicode's group of all that has skin tones: 59% of all emoji."""

Draw = Callable[[Sequence[str]], Floats]
"""Prompts => pictures (B, 64, 64, 3) in [0, 1]."""


def autoencoder_fidelity(autoencoder: Autoencoder, glyphs: Glyphs, batch_size: int = 32) -> dict[str, float]:
    """Mean and worst PSNR (dB), and mean `feature_distance`, of the held-out glyphs on white; pixels are clamped to [-1, 1]."""
    kept = [i for i, e in enumerate(glyphs.emoji) if glyph_held_out(e.family)]
    truth_NHWC = Glyphs(tuple(glyphs.emoji[i] for i in kept), glyphs.rgba_NHWC[kept]).on(COLOURS["white"]) / 255
    parameter = next(autoencoder.parameters())
    decoded = []
    with torch.no_grad():
        for batch_BHWC in np.array_split(truth_NHWC, range(batch_size, len(truth_NHWC), batch_size)):
            x_BCHW = torch.from_numpy(batch_BHWC * 2 - 1).permute(0, 3, 1, 2).to(parameter.device, parameter.dtype)
            y_BCHW = autoencoder.decode(autoencoder.encode(x_BCHW).mode())
            decoded.append(y_BCHW.float().clamp(-1, 1).permute(0, 2, 3, 1).cpu().numpy() / 2 + 0.5)
    decoded_NHWC = np.concatenate(decoded)
    psnr_N = psnr(decoded_NHWC, truth_NHWC)
    distance = float(feature_distance(decoded_NHWC, truth_NHWC).mean())
    return {"psnr": float(psnr_N.mean()), "worst": float(psnr_N.min()), "distance": distance, "glyphs": len(kept)}


def fidelity(draw: Draw, glyphs: Glyphs, count: int, seed: int, nearest: NearestGlyph | None = None) -> dict[str, Any]:
    """Draw `count` names of those trained on; the share whose family is nearest, and among the five nearest.

    Args:
        nearest: `NearestGlyph(glyphs)`, where it is made already.

    Returns:
        top1, top5: the shares, of so many prompts. Most emoji are people, as each skin tone is one.
        others: the same of those prompts that name no people, where there are any.
    """
    chosen = _sample([e for e in glyphs.emoji if not glyph_held_out(e.family)], count, seed)
    ranks_B = (nearest or NearestGlyph(glyphs)).ranks(draw([e.name.lower() for e in chosen]), [e.family for e in chosen])
    others = ranks_B[[e.group != PEOPLE for e in chosen]]
    return _shares(ranks_B) | ({"others": _shares(others)} if len(others) else {})


def _shares(ranks_B: NDArray[np.int64]) -> dict[str, float]:
    return {"top1": float((ranks_B < 1).mean()), "top5": float((ranks_B < 5).mean()), "prompts": len(ranks_B)}


def held_out_pairs(draw: Draw, glyphs: Glyphs, count: int, seed: int) -> dict[str, float]:
    """Draw `count` held-out pairs; the share with the right background, and with the right emoji on that background."""
    chosen = _sample([(e, c) for e in glyphs.emoji for c in COLOURS if pair_held_out(e.family, c)], count, seed)
    pictures_BHWC = draw([pair_prompt(e, colour) for e, colour in chosen])
    colours = [colour for _, colour in chosen]
    ranks_B = _ranks(glyphs, pictures_BHWC, colours, [e.family for e, _ in chosen])
    return {
        "background": float((np.array(background(pictures_BHWC)) == colours).mean()),
        "top1": float((ranks_B < 1).mean()),
        "top5": float((ranks_B < 5).mean()),
        "prompts": len(chosen),
    }


def composed_scenes(draw: Draw, glyphs: Glyphs, count: int, seed: int) -> dict[str, float]:
    """Draw `count` scenes of two emoji never trained on together, half of them on white, in all wordings by turns.

    Returns:
        scenes: the share in which both are right: the emoji asked for is the nearest of all families to its half.
        parts: the share of emoji that are right.
        top5: the share of scenes in which each emoji is among the five nearest to its half.
        background: the share with the right background.
    """
    chosen = _sample(held_out_scenes(glyphs), count, seed)
    others = [colour for colour in COLOURS if colour != "white"]
    colours = ["white" if n % 2 else others[n // 2 % len(others)] for n in range(len(chosen))]
    texts = [pair_text(PAIRS[n % len(PAIRS)], a, b, colours[n]) for n, (a, b) in enumerate(chosen)]
    pictures_BHWC = draw(texts)
    families = [a.family for a, _ in chosen] + [b.family for _, b in chosen]
    halves_BHWC = np.concatenate([pictures_BHWC[window(place)] for place in ("left", "right")])
    halves_BHWC = halves_BHWC.repeat(2, axis=1).repeat(2, axis=2)  # they are compared at 32x32: as they are
    ranks_2B = _ranks(glyphs, halves_BHWC, [*colours, *colours], families).reshape(2, -1)
    return {
        "scenes": float((ranks_2B < 1).all(axis=0).mean()),
        "parts": float((ranks_2B < 1).mean()),
        "top5": float((ranks_2B < 5).all(axis=0).mean()),
        "background": float((np.array(background(pictures_BHWC)) == colours).mean()),
        "prompts": len(chosen),
    }


def held_out_scenes(glyphs: Glyphs) -> list[tuple[Emoji, Emoji]]:
    """All (left, right) of trained emoji that scenes are made of, and that were never trained on together."""
    trained = [glyphs.emoji[i] for i in cast(glyphs) if not glyph_held_out(glyphs.emoji[i].family)]
    return [(a, b) for a in trained for b in trained if a.family != b.family and scene_held_out(a.family, b.family)]


def diversity(draw: Draw, glyphs: Glyphs, count: int, seed: int, seeds: int = 8) -> dict[str, float]:
    """Draw `count` names with `seeds` noises each.

    Returns:
        same: root mean square difference (of pixels in [0, 1]) between two pictures of one prompt.
        different: the same between pictures of different prompts.
    """
    chosen = _sample([e for e in glyphs.emoji if not glyph_held_out(e.family)], count, seed)
    x_PSHWC = draw([e.name.lower() for e in chosen for _ in range(seeds)]).reshape(len(chosen), seeds, -1)
    same = np.sqrt(2 * x_PSHWC.var(axis=1, ddof=1).mean())
    different = np.sqrt(2 * x_PSHWC.var(axis=0, ddof=1).mean())
    return {"same": float(same), "different": float(different), "prompts": len(chosen), "seeds": seeds}


def pair_prompt(emoji: Emoji, colour: str) -> str:
    """How a pair is asked for: "red apple on a blue background"."""
    return f"{emoji.name} on {article(colour)}{colour} background".lower()


def _ranks(glyphs: Glyphs, pictures_BHWC: Floats, colours: Sequence[str], families: Sequence[str]) -> np.ndarray:
    """Ranks of the true families among all, each on its own background, (B,)."""
    ranks_B = np.empty(len(families), int)
    for colour in sorted(set(colours)):
        on_it = [i for i, c in enumerate(colours) if c == colour]
        ranks_B[on_it] = NearestGlyph(glyphs, colour).ranks(pictures_BHWC[on_it], [families[i] for i in on_it])
    return ranks_B


def _sample(items: Sequence[T], count: int, seed: int) -> list[T]:
    if not items:
        raise InputError("there is nothing to measure on: none of the given glyphs is of the kind asked for")
    return random.Random(seed).sample(items, min(count, len(items)))
