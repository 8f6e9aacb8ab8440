"""Models by their name on the Hugging Face hub: fetched only when asked, at one commit."""

from __future__ import annotations

import re
from pathlib import Path

from ldmkit.errors import CheckpointError, InputError, MissingDependencyError

FILES = ["*.json", "*.safetensors", "*/*.json", "*/*.safetensors", "tokenizer*/*.txt"]
"""What is fetched: configs, vocabularies and safetensors; no code and no pickles."""


def is_hub_name(name: str) -> bool:
    """Whether it could be "owner/model" on the hub."""
    return re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) is not None


def fetch(name: str, *, revision: str | None, variant: str | None) -> Path:
    """The folder of a hub model at one commit, downloaded unless it is in the cache.

    Raises:
        InputError: unless `revision` is a full commit hash: branches and tags move.
        MissingDependencyError: without huggingface_hub. CheckpointError: where the hub cannot be reached or has no such model.
    """
    if revision is None or not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(
            f"revision = {revision!r}: give the full 40-digit commit hash, so that the same weights are loaded tomorrow; "
            f"it is on https://huggingface.co/{name}/commits/main"
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingDependencyError(f"{name!r} is on the Hugging Face hub: pip install huggingface_hub") from None
    skipped = None if variant else ["*.fp16.safetensors", "*.non_ema.safetensors", "*.fp16-*", "*.non_ema-*"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=skipped))
    except Exception as error:  # the library's errors and those of its transport
        raise CheckpointError(f"{name} at {revision} cannot be fetched: {type(error).__name__}: {error}") from error
