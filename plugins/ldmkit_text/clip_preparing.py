"""`preprocessor_config.json`: how pictures are prepared for CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldmkit.checkpoints.files import read_object
from ldmkit.errors import ConfigError

PREPROCESSOR = "preprocessor_config.json"
BICUBIC = 3
_FIXED = {
    "do_resize": True,
    "do_center_crop": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": BICUBIC,
    "rescale_factor": 1 / 255,
}


def read_preprocessor(folder: Path, image_size: int) -> dict[str, Any]:
    """Values of `CLIPImageConditioner.Config` from a folder of transformers.

    Raises:
        CheckpointError: for a file that is missing or damaged. ConfigError: for another way of preparing pictures.
    """
    path = folder / PREPROCESSOR
    given = read_object(path)
    wrong = [
        f"{key} = {given[key]!r} (only {value!r} can be served)"
        for key, value in _FIXED.items()
        if given.get(key) is not None and given[key] != value
    ]
    size, crop = given.get("size", 224), given.get("crop_size", 224)
    edge = size.get("shortest_edge") if isinstance(size, dict) else size
    if not isinstance(edge, int):
        wrong.append(f"size = {size!r} (only a shortest_edge can be served)")
    sides = {crop.get("height"), crop.get("width")} if isinstance(crop, dict) else {crop}
    if sides != {image_size}:
        wrong.append(f"crop_size = {crop!r}, and the network sees {image_size} x {image_size} pixels")
    if wrong:
        raise ConfigError(f"{path}: {'; '.join(wrong)}")
    told = {ours: given[theirs] for ours, theirs in (("mean", "image_mean"), ("std", "image_std")) if theirs in given}
    return {"shortest_edge": edge, **told}


def write_preprocessor(edge: int, side: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """The file's content; what `read_preprocessor` reads."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        **_FIXED,
        "size": {"shortest_edge": edge},
        "crop_size": {"height": side, "width": side},
        "image_mean": list(mean),
        "image_std": list(std),
    }
