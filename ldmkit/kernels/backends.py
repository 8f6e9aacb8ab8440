"""Which implementation of an op runs: the table of implementations, the automatic choice, and the ways to force one.

Each op's package registers its implementations here when it is imported; third parties' come from the `ldmkit_kernels` hook
when one is first asked for. The automatic choice follows the rules in the op's `choice.json`, by device, dtype and the shape of
one image alone, never the batch size, the thread count or a timing, so the same call gives the same result everywhere on a
machine.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import KernelError
from ldmkit.kernels.rules import rules

OPS = ("group_norm_silu", "cross_attention", "geglu", "geglu_linear")
BACKENDS = ("reference", "cpu", "triton", "cuda")
"""The built-in ones. `reference` is plain torch, for any device and dtype."""
ENVIRONMENT = "LDMKIT_KERNELS"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, kw_only=True)
class Implementation:
    """One implementation of one op: raw functions that know nothing of autograd.

    Attributes:
        forward, backward: take the arguments of the op's raw torch ops without the last one; see `ldmkit/kernels/<op>/op.py`.
        device: the type of device it serves.
        dtypes: what it serves.
        missing: why it cannot run here at all; None where it can.
        refusal: takes forward's arguments; why it cannot serve them, None where it can.
    """

    forward: Callable[..., Any] | None
    backward: Callable[..., Any] | None
    device: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    missing: str | None = None
    refusal: Callable[..., str | None] | None = None

    def refuses(self, arguments: Sequence[Any]) -> str | None:
        """Why it cannot serve a call with these arguments, the first of which is a tensor; None where it can."""
        x = arguments[0]
        if self.missing is not None:
            return self.missing
        if x.device.type != self.device:
            return f"serves {self.device} tensors only, this one is on {x.device.type}"
        if x.dtype not in self.dtypes:
            return f"serves {', '.join(_short(d) for d in self.dtypes)}, not {_short(x.dtype)}"
        return self.refusal(*arguments) if self.refusal is not None else None


@dataclass(frozen=True)
class Choice:
    """What runs, and why."""

    backend: str
    reason: str


@dataclass(frozen=True)
class Call:
    """What ran. `shapes` are those of the tensors among the arguments, in order."""

    op: str
    backend: str
    reason: str
    device: str
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], ...]


_implementations: dict[str, dict[str, Implementation]] = {op: {} for op in OPS}
_scoped: contextvars.ContextVar[Mapping[str, str]] = contextvars.ContextVar("ldmkit_kernels", default={})  # noqa: B039
_recorders: contextvars.ContextVar[tuple[list[Call], ...]] = contextvars.ContextVar("ldmkit_kernel_calls", default=())
_reasons: dict[tuple[str, str], str] = {}


# ------------------------------------------------------------------------------------------------------------------- the table


def register(op: str, backend: str, implementation: Implementation) -> None:
    """Adds an implementation to the table, or replaces it.

    Raises:
        KernelError: an unknown op, or the name of the reference.
    """
    if op not in OPS:
        raise KernelError(f"unknown op {op!r}{_guess(op, OPS)}; there are {', '.join(OPS)}")
    if backend in ("reference", "auto"):
        raise KernelError(f"a backend cannot be called {backend!r}")
    _implementations[op][backend] = implementation


def implementations(op: str) -> Mapping[str, Implementation]:
    """The implementations of an op but the reference, by backend, those included that cannot run here."""
    return _implementations[op]


def names() -> tuple[str, ...]:
    """All backends, built in or registered; discovers third parties' first."""
    from ldmkit.kernels.third_party import discover

    discover()
    return tuple(dict.fromkeys([*BACKENDS, *(name for op in OPS for name in _implementations[op])]))


def served(op: str, backend: str) -> Implementation:
    """The implementation that the raw op runs.

    Raises:
        KernelError: there is none, or it cannot run here.
    """
    implementation = _implementations[op].get(backend)
    if implementation is None:
        raise KernelError(f"{op}: there is no backend {backend!r}")
    if implementation.missing is not None:
        raise KernelError(f"{op}: backend {backend!r} cannot run here: {implementation.missing}")
    return implementation


# ------------------------------------------------------------------------------------------------------------------ the choice


def choose(op: str, arguments: Sequence[Any], features: Mapping[str, int], backend: str | None = None) -> str:
    """The backend that serves a call: forced by the call, else by `use`, else by the environment, else automatic.

    Args:
        arguments: of the raw op, the first a tensor.
        features: what the rules may ask of the shape of one image; never the batch size.

    Raises:
        KernelError: an unknown backend, or a forced one that cannot serve the call.
    """
    forced = forced_backend(op) if backend is None else backend
    if forced is None or forced == "auto":
        choice = automatic(op, arguments, features)
    else:
        _check_forced(op, forced, arguments)
        choice = Choice(forced, "forced")
    if not torch.compiler.is_compiling():
        _reasons[op, choice.backend] = choice.reason
        if choice.backend == "reference":
            record_call(op, "reference", arguments)
    return choice.backend


def automatic(op: str, arguments: Sequence[Any], features: Mapping[str, int]) -> Choice:
    """The first rule that fits and whose backend can serve; the reference where there is none."""
    x = arguments[0]
    training = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    for number, rule in enumerate(rules(op), 1):
        if not rule.fits(x.device.type, x.dtype, training, features):
            continue
        if rule.backend == "reference":
            return Choice("reference", f"rule {number} of {op}/choice.json")
        implementation = _implementations[op].get(rule.backend)
        if implementation is not None and implementation.refuses(arguments) is None:
            return Choice(rule.backend, f"rule {number} of {op}/choice.json")
    return Choice("reference", f"no rule of {op}/choice.json fits")


def _check_forced(op: str, backend: str, arguments: Sequence[Any]) -> None:
    if backend == "reference":
        return
    implementation = _implementations[op].get(backend)
    if implementation is None:
        known = names()  # a third party's backend registers itself here
        if backend not in known:
            raise KernelError(f"unknown kernel backend {backend!r}{_guess(backend, known)}; there are {', '.join(known)}")
        implementation = _implementations[op].get(backend)
    refusal = "it has no such kernel" if implementation is None else implementation.refuses(arguments)
    if refusal is not None:
        raise KernelError(f"{op}: backend {backend!r} was forced but cannot serve this call: {refusal}")


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
            known = (*names(), "auto")
            if backend not in known:
                raise KernelError(
                    f"{source}: unknown backend {backend!r} in {spec!r}{_guess(backend, known)}; there are {', '.join(known)}"
                )
        forced.update(dict.fromkeys([op] if op else OPS, backend))
    return forced


def _guess(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -------------------------------------------------------------------------------------------------------------- what really ran


@contextlib.contextmanager
def record() -> Iterator[list[Call]]:
    """Lists the calls of kernels inside a `with` block, in this thread (or task), in order.

    Kernels inside a graph of torch.compile are listed as they run; the reference is compiled away there, and is not.
    """
    calls: list[Call] = []
    token = _recorders.set((*_recorders.get(), calls))
    try:
        yield calls
    finally:
        _recorders.reset(token)


def record_call(op: str, backend: str, arguments: Sequence[Any]) -> None:
    """Tells every recorder of a call."""
    recorders = _recorders.get()
    if recorders:
        tensors = [a for a in arguments if isinstance(a, Tensor)]
        reason = _reasons.get((op, backend), "chosen when the graph was compiled")
        shapes = tuple(tuple(map(int, t.shape)) for t in tensors)
        call = Call(op, backend, reason, tensors[0].device.type, tensors[0].dtype, shapes)
        for calls in recorders:
            calls.append(call)
