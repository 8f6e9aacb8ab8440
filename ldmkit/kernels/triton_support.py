"""Whether Triton's kernels can run here: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from packaging.version import Version

from ldmkit.kernels.backends import Implementation


def interpreting() -> bool:
    """Whether Triton interprets its kernels. It reads the variable when the kernels are first imported."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def lacks() -> str | None:
    """Why Triton's kernels cannot run here; None where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` (Linux)"
    if interpreting():
        return _interpreter_lacks(*(importlib.metadata.version(name) for name in ("triton", "numpy")))
    if torch.cuda.is_available():
        return None
    return "no CUDA device is visible (TRITON_INTERPRET=1, set before Python starts, runs it slowly on the CPU, for checks)"


def _interpreter_lacks(triton: str, numpy: str) -> str | None:
    """Triton before 3.7 makes a loop's bound of an array of one dimension, which numpy takes as a number up to 2.3 alone."""
    if Version(triton) >= Version("3.7") or Version(numpy) < Version("2.4"):
        return None
    return f"Triton {triton} cannot interpret loops with numpy {numpy}; `pip install 'triton>=3.7'` or 'numpy<2.4'"


def implementation(op: str) -> Implementation:
    """The Triton kernel of an op; its module, ldmkit.kernels.<op>.triton, is imported with its first call."""
    return Implementation(
        forward=_late(op, "forward"),
        backward=_late(op, "backward"),
        device="cpu" if interpreting() else "cuda",
        missing=lacks(),
        refusal=_late(op, "refusal"),
    )


@dataclass(frozen=True, kw_only=True)
class StaticCase:
    """A kernel as some call launches it, for the checks that compile it without a GPU. A module's `static_cases()` lists them.

    Attributes:
        kernel: what triton.jit made.
        label: which call it stands for: dtype, and what else tells it from the others.
        signature: Triton's type of every argument that is no constant: "*bf16", "i32", "fp32".
        constants: of all tl.constexpr arguments.
        aligned: arguments that are multiples of 16: pointers, in bytes; whole numbers.
        options: num_warps, num_stages.
        dot: it multiplies matrices, so tensor-core instructions are expected.
        vectors: False where rows start at any element, so that loads of one are what there is.
        dispatched: False where no call of ours launches it, so that spills are only reported.
        architectures: the compute capabilities it is for, times ten; empty is all.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    aligned: Sequence[str]
    options: Mapping[str, int] = field(default_factory=dict)
    dot: bool = False
    vectors: bool = True
    dispatched: bool = True
    architectures: Sequence[int] = ()


TRITON_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
"""As a StaticCase's signature names them."""


def _late(op: str, name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        _import(op)
        return getattr(_modules[op], name)(*arguments)

    return call


_modules: dict[str, ModuleType] = {}


@torch.compiler.assume_constant_result  # torch.compile cannot look into an import; what it gives it cannot take as a constant
def _import(op: str) -> bool:
    if op not in _modules:
        _modules[op] = importlib.import_module(f"ldmkit.kernels.{op}.triton")
    return True
