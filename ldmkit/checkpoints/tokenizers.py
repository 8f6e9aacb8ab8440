"""Where the vocabulary of a single file's text encoder may lie on this machine: nothing is fetched."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

from ldmkit.errors import CheckpointError, InputError

PACKED = "bpe_simple_vocab_16e6.txt.gz"
"""CLIP's vocabulary as OpenAI and open_clip ship it: the merges, from which the pieces follow."""


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary that many models share.

    Attributes:
        files: sets of files, any of which holds it; the first ones are told to the user.
        repositories: on the Hugging Face hub, that have it, in their root or in `tokenizer`.
        package, distribution: an installed package that brings it, and how it is installed.
        example: where a user may have it from.
    """

    files: tuple[tuple[str, ...], ...]
    repositories: tuple[str, ...]
    example: str
    package: str | None = None
    distribution: str | None = None

    def lies_in(self, folder: Path) -> bool:
        """Whether a folder has it, in one of its forms."""
        return any(all((folder / name).is_file() for name in names) for names in self.files)

    @property
    def told(self) -> str:
        """The files, in words."""
        return " or ".join(" and ".join(names) for names in self.files[:2])


CLIP = Vocabulary(
    files=(("vocab.json", "merges.txt"), ("tokenizer.json",), (PACKED,)),
    repositories=(
        "openai/clip-vit-large-patch14",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    ),
    example="any Stable Diffusion model",
    package="open_clip",
    distribution="open_clip_torch",
)
BERT = Vocabulary(
    files=(("vocab.txt",), ("tokenizer.json",)),
    repositories=("google-bert/bert-base-uncased", "bert-base-uncased", "CompVis/ldm-text2im-large-256"),
    example="bert-base-uncased",
)


def find_tokenizer(file: Path, given: str | Path | None, vocabulary: Vocabulary = CLIP) -> Path:
    """The folder of a vocabulary: the given one, else beside the file, in the Hugging Face cache, or in a package.

    Raises:
        InputError: for a given folder without one. CheckpointError: where there is none, listing what would help.
    """
    if given is not None:
        folder = Path(given)
        folder = folder if folder.is_dir() else folder.parent
        if not vocabulary.lies_in(folder):
            raise InputError(f"tokenizer = {str(given)!r} does not hold {vocabulary.told}")
        return folder
    beside = [file.parent / "tokenizer", file.with_suffix(""), file.parent]
    for folder in (*beside, *_cached(vocabulary), *_installed(vocabulary)):
        if vocabulary.lies_in(folder):
            return folder
    brought = "" if vocabulary.package is None else f"; pip install {vocabulary.distribution}, which brings the vocabulary"
    raise CheckpointError(
        f"{file} holds no tokenizer, as single files do, and none was found. Ways out: tokenizer=FOLDER with {vocabulary.told}"
        f"; a folder {file.parent / 'tokenizer'} with these; {vocabulary.example} in the Hugging Face cache ({_cache()})"
        f"{brought}; or conditioner=..."
    )


def _cache() -> Path:
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", home / "hub"))


def _cached(vocabulary: Vocabulary) -> list[Path]:
    snapshots = [
        snapshot
        for repository in vocabulary.repositories
        for snapshot in sorted((_cache() / f"models--{repository.replace('/', '--')}" / "snapshots").glob("*"))
    ]
    return [folder for snapshot in snapshots for folder in (snapshot / "tokenizer", snapshot)]


def _installed(vocabulary: Vocabulary) -> list[Path]:
    """The installed package's folder; it is not imported."""
    found = None if vocabulary.package is None else importlib.util.find_spec(vocabulary.package)
    return [] if found is None or found.origin is None else [Path(found.origin).parent]
