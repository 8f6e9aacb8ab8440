"""Whether Triton's kernels can run here: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from ldmkit.kernels.backends import Implementation


def interpreting() -> bool:
    """Whether Triton interprets its kernels. It reads the variable when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def lacks() -> str | None:
    """Why Triton's kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux)"
    if interpreting() or torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs it slowly on the CPU, for checks)"


def implementation(op: str) -> Implementation:
    """The Triton kernel of an op; its module, ldmkit.kernels.<op>.triton, is imported with its first call."""
    return Implementation(
        forward=_late(op, "forward"),
        backward=_late(op, "backward"),
        device="cpu" if interpreting() else "cuda",
        missing=lacks(),
        refusal=_late(op, "refusal"),
    )


def _late(op: str, name: str) -> Callable[..., Any]:
    @functools.cache
    def load() -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(importlib.import_module(f"ldmkit.kernels.{op}.triton"), name)
        return function

    def call(*arguments: Any) -> Any:
        return load()(*arguments)

    return call
