"""Which implementation of an op runs: the table of implementations, the shipped automatic choice, and the ways to force one.

Each op's package registers its implementations here when it is imported. The automatic choice depends on device type and dtype
alone, never on the batch size or a timing, so the same call gives the same result everywhere on a machine.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ldmkit.errors import KernelError

OPS = ("group_norm_silu", "cross_attention", "geglu")
BACKENDS = ("reference", "cpu", "triton", "cuda")
ENVIRONMENT = "LDMKIT_KERNELS"


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of one op.

    Attributes:
        call: takes the op's checked arguments, by position.
        device: the device type it serves; None is any.
        dtypes: what it serves; empty is any floating-point dtype.
        automatic: the dtypes for which it is chosen unasked, because it was measured to be faster there.
        missing: why this machine cannot run it; None where it can.
    """

    call: Callable[..., Tensor]
    device: str | None = None
    dtypes: tuple[torch.dtype, ...] = ()
    automatic: tuple[torch.dtype, ...] = ()
    missing: str | None = None

    def refusal(self, device: str, dtype: torch.dtype) -> str | None:
        """Why it cannot serve a tensor of this device type and dtype here; None where it can."""
        if self.missing is not None:
            return self.missing
        if self.device not in (None, device):
            return f"serves {self.device} tensors only, this one is on {device}"
        if self.dtypes and dtype not in self.dtypes:
            return f"serves {', '.join(str(d).removeprefix('torch.') for d in self.dtypes)}, not {dtype}"
        return None


_implementations: dict[str, dict[str, Implementation]] = {op: {} for op in OPS}
_automatic: dict[str, dict[tuple[str, torch.dtype], str]] = {op: {} for op in OPS}
_scoped: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("ldmkit_kernels", default={})  # noqa: B039


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Adds one implementation to the table; later ones take precedence in the automatic choice."""
    _implementations[op][backend] = implementation
    if implementation.missing is None and implementation.device is not None:
        _automatic[op].update({(implementation.device, dtype): backend for dtype in implementation.automatic})


def implementations(op: str) -> Mapping[str, Implementation]:
    """All implementations of an op, by backend, those included that this machine cannot run."""
    return _implementations[op]


def automatic(op: str, device: str, dtype: torch.dtype) -> str:
    """The backend that is chosen where none is forced."""
    return _automatic[op].get((device, dtype), "reference")


def choose(op: str, x: Tensor, backend: str | None = None) -> Callable[..., Tensor]:
    """What runs `op` for a tensor like x: forced by the call, else by `use`, else by the environment, else automatic.

    Raises:
        KernelError: an unknown backend, or a forced one that cannot serve x.
    """
    forced = forced_backend(op) if backend is None else backend
    if forced is None or forced == "auto":
        return _implementations[op][automatic(op, x.device.type, x.dtype)].call
    return _forced_call(op, forced, x)


def _forced_call(op: str, backend: str, x: Tensor) -> Callable[..., Tensor]:
    if backend not in BACKENDS:
        raise KernelError(f"unknown kernel backend {backend!r}{_guess(backend, BACKENDS)}; there are {', '.join(BACKENDS)}")
    implementation = _implementations[op].get(backend)
    refusal = "not in this version" if implementation is None else implementation.refusal(x.device.type, x.dtype)
    if implementation is None or refusal is not None:
        raise KernelError(f"{op}: backend {backend!r} was forced but cannot serve this call: {refusal}")
    return implementation.call


@torch.compiler.assume_constant_result
def forced_backend(op: str) -> str | None:
    """The backend that `use` or the environment forces on an op, if any. A compiled graph keeps what it saw at tracing."""
    return _scoped.get().get(op) or _environment().get(op)


@contextlib.contextmanager
def use(spec: str) -> Iterator[None]:
    """Forces backends inside a `with` block, in this thread (or task) only.

    Args:
        spec: one backend for all ops ("reference"), or "op=backend" pairs ("geglu=cpu,cross_attention=reference"), which leave
            the other ops as they were. "auto" is the automatic choice.

    Raises:
        KernelError: an unknown op or backend. A backend that cannot serve a call is an error at that call.
    """
    token = _scoped.set({**_scoped.get(), **parse(spec, "use()")})
    try:
        yield
    finally:
        _scoped.reset(token)


@functools.cache
def _environment() -> Mapping[str, str]:
    return parse(os.environ.get(ENVIRONMENT, ""), ENVIRONMENT)


def parse(spec: str, source: str) -> dict[str, str]:
    """ "geglu=cpu,cross_attention=reference" or "reference" => {op: backend}. `source` names the culprit in errors."""
    forced: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in spec.split(","))):
        op, equals, backend = (word.strip() for word in item.partition("="))
        if not equals:
            op, backend = "", op
        if op and op not in OPS:
            raise KernelError(f"{source}: unknown op {op!r} in {spec!r}{_guess(op, OPS)}; there are {', '.join(OPS)}")
        if backend not in (*BACKENDS, "auto"):
            names = (*BACKENDS, "auto")
            raise KernelError(
                f"{source}: unknown backend {backend!r} in {spec!r}{_guess(backend, names)}; there are {', '.join(names)}"
            )
        forced.update(dict.fromkeys([op] if op else OPS, backend))
    return forced


def _guess(word: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
