"""Where the vocabulary of a single file's text encoder may lie on this machine: nothing is fetched."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from ldmkit.errors import CheckpointError, InputError

CACHED = (
    "openai/clip-vit-large-patch14",
    "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-v1-5",
    "CompVis/stable-diffusion-v1-4",
    "stabilityai/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
)
"""Repositories that have CLIP's vocabulary, which is the same for all."""
PACKED = "bpe_simple_vocab_16e6.txt.gz"
"""The vocabulary as OpenAI and open_clip ship it: the merges, from which the pieces follow."""


def is_tokenizer(folder: Path) -> bool:
    """Whether CLIP's vocabulary lies in a folder, in one of its forms."""
    both = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    return both or (folder / "tokenizer.json").is_file() or (folder / PACKED).is_file()


def find_tokenizer(file: Path, given: str | Path | None) -> Path:
    """The folder of CLIP's vocabulary: the given one, else beside the file, in the Hugging Face cache, or in open_clip.

    Raises:
        InputError: for a given folder without one. CheckpointError: where there is none, listing what would help.
    """
    if given is not None:
        folder = Path(given)
        folder = folder if folder.is_dir() else folder.parent
        if not is_tokenizer(folder):
            raise InputError(f"tokenizer = {str(given)!r} holds neither vocab.json and merges.txt nor tokenizer.json")
        return folder
    beside = [file.parent / "tokenizer", file.with_suffix(""), file.parent]
    for folder in (*beside, *_cached(), *_open_clip()):
        if is_tokenizer(folder):
            return folder
    raise CheckpointError(
        f"{file} holds no tokenizer, as single files do, and none was found. Ways out: tokenizer=FOLDER with vocab.json and "
        f"merges.txt (or tokenizer.json); a folder {file.parent / 'tokenizer'} with these; any Stable Diffusion model in "
        f"the Hugging Face cache ({_cache()}); pip install open_clip_torch, which brings the vocabulary; or conditioner=..."
    )


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _cached() -> list[Path]:
    snapshots = [
        snapshot
        for repository in CACHED
        for snapshot in sorted((_cache() / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*"))
    ]
    return [folder for snapshot in snapshots for folder in (snapshot / "tokenizer", snapshot)]


def _open_clip() -> list[Path]:
    """The installed package's folder; it is not imported."""
    found = importlib.util.find_spec("open_clip")
    return [] if found is None or found.origin is None else [Path(found.origin).parent]
