"""The compiled extension ldmkit._C, or why there is none, and the kernels in it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ldmkit.kernels.backends import Implementation

BUILD_COMMANDS = (
    "`pip install --no-build-isolation -e .` in a checkout,"
    " or `pip install --no-build-isolation --force-reinstall --no-deps ldmkit`"
)


def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec("ldmkit._C") is None:
        return None, f"the compiled kernels are absent: the build could not see torch; build them with {BUILD_COMMANDS}"
    try:
        extension = importlib.import_module("ldmkit._C")
    except ImportError as error:  # most often another torch than the one it was built with
        return None, f"the compiled kernels cannot be loaded ({error}); rebuild them with {BUILD_COMMANDS}"
    return extension, None


EXTENSION, ABSENT = _load()
"""The module and None, or None and the reason."""


@functools.cache
def build_info() -> dict[str, Any]:
    """How the extension was built: torch's version, the compiler, whether with CUDA; and `cpu`, the instruction set in use,
    which is "none" where there is no extension.
    """
    return (
        {"torch": None, "compiler": None, "cuda": False, "cpu": "none"} if EXTENSION is None else dict(EXTENSION.build_info())
    )


def lacks(device: str) -> str | None:
    """Why the extension cannot serve "cpu" or "cuda" tensors on this machine; None where it can."""
    if EXTENSION is None:
        return ABSENT
    if device == "cuda" and not build_info()["cuda"]:
        return f"this build is for the CPU only (torch without CUDA, or no nvcc); rebuild with {BUILD_COMMANDS}"
    if device == "cuda" and not torch.cuda.is_available():
        return "no CUDA device is visible"
    return None


def implementation(op: str, device: str) -> Implementation:
    """The extension's kernel of an op for "cpu" or "cuda"."""
    from ldmkit.kernels.backends import Implementation

    missing = lacks(device)
    if missing is None and not hasattr(EXTENSION, f"{op}_forward_{device}"):
        missing = f"the compiled kernels are older than this code; rebuild them with {BUILD_COMMANDS}"
    forward, backward = (getattr(EXTENSION, f"{op}_{way}_{device}", None) for way in ("forward", "backward"))
    return Implementation(forward=forward, backward=backward, device=device, missing=missing)
