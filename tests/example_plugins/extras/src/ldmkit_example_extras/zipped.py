"""A folder that save_pretrained wrote, as one zip file."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ldmkit


class Zipped:
    """What `ldmkit_checkpoint_formats` asks of a target."""

    @staticmethod
    def detect(path: Path) -> float | None:
        """Sure of a zip file with a pipeline.json at its top."""
        if not path.is_file() or not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            return 1.0 if "pipeline.json" in archive.namelist() else None

    @staticmethod
    def load(path: Path, *, dtype: Any, device: torch.device | str) -> Mapping[str, Any]:
        """Unpacked, and read as the folder it was. zipfile itself keeps names inside the folder."""
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
            pipe = ldmkit.Pipeline.from_pretrained(Path(folder), dtype=dtype, device=device)
        return {
            "autoencoder": pipe.autoencoder,
            "denoiser": pipe.denoiser,
            "conditioner": pipe.conditioner,
            "sampler": pipe.sampler,
            "schedule": pipe.schedule,
            "prediction": pipe.prediction,
            "defaults": pipe.defaults,
        }
