"""The kernel contract as properties that any callable with an op's signature can be checked against.

    from ldmkit.testing import contract

    report = contract.check("geglu", my_geglu)          # called as my_geglu(x=...)
    print(report.table())
    assert report.passed

Every property is judged against the op in float64, by the error that plain torch makes in the same dtype:

    error <= 2 x plain torch's error + 2 eps max|exact| c

in max norm, for the output and every gradient (c is 1 + the worst group's |mean| / standard deviation for GroupNorm, else 1).
`ldmkit verify OP --backend B` does the same for a backend of ldmkit's or of a plugin's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ldmkit import kernels
from ldmkit.errors import InputError, KernelError
from ldmkit.kernels import backends
from ldmkit.testing.contract import cross_attention, geglu, geglu_linear, group_norm_silu, integration, structure, values
from ldmkit.testing.contract.core import Op, Property, Subject, Tally, Trial
from ldmkit.testing.contract.report import Report, Row
from ldmkit.testing.contract.run import PROFILES, select, try_property

OPS: Mapping[str, Op] = {module.OP.name: module.OP for module in (geglu, geglu_linear, group_norm_silu, cross_attention)}

_OWN: Mapping[str, tuple[Property, ...]] = {
    module.OP.name: module.PROPERTIES for module in (geglu, geglu_linear, group_norm_silu, cross_attention)
}

EMULATED = "cuda-emulated"
PLAIN_TORCH = "plain torch's kernels split their work by batch and threads"


def properties(op: str) -> tuple[Property, ...]:
    """The properties of an op, in the contract's order.

    Raises:
        InputError: an unknown op.
    """
    _op(op)
    return tuple(select((*values.PROPERTIES, *structure.PROPERTIES, *_OWN[op], *integration.PROPERTIES), None))


def check(
    op: str,
    function: Callable[..., Any] | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    profile: str = "ci",
    only: Sequence[int | str] | None = None,
    exempt: Mapping[int, str] | None = None,
    tiny: bool | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Tries every property of the contract.

    Args:
        op: the name of the op.
        function: takes the arguments of `ldmkit.kernels.<op>` but `backend`, by keyword, with autograd. None: ldmkit's own,
            through `backend`.
        backend: one of ldmkit's or a plugin's, where no function is given.
        device: "cpu" or "cuda"; None is the one that the backend serves, or a GPU where there is one.
        profile: "ci" (seconds) or "thorough" (minutes).
        only: numbers (lines of the contract) or names of properties; None is all.
        exempt: numbers of properties that need not hold, each with the reason, which the report states.
        tiny: small problems only, few of them, for what is interpreted or emulated.
        progress: is told the name of each property as it comes, and "" at the end.

    Raises:
        InputError: an unknown op or profile.
        KernelError: a backend that cannot run here.
    """
    if profile not in PROFILES:
        raise InputError(f"unknown profile {profile!r}; there are {', '.join(PROFILES)}")
    subject = subject_of(op, function, backend=backend, device=device, exempt=exempt, tiny=tiny, thorough=profile == "thorough")
    rows = []
    for prop in select(properties(op), only):
        if progress is not None:
            progress(prop.name)
        rows.append(try_property(prop, subject, PROFILES[profile]))
    if progress is not None:
        progress("")
    return Report(op, subject.backend, subject.device, profile, tuple(rows))


def replay(op: str, name: str, what: str | Callable[..., Any], **case: Any) -> None:
    """Runs one case of one property again, as the smallest failing examples are told.

    Args:
        name: of the property.
        what: a backend's name, or a callable.

    Raises:
        AssertionError: the property does not hold.
    """
    (prop,) = (prop for prop in properties(op) if prop.name == name)
    subject = subject_of(op, backend=what) if isinstance(what, str) else subject_of(op, what)
    prop.check(Trial(subject, Tally(), subject.op.build(subject.device, **case), case))


def subject_of(
    op: str,
    function: Callable[..., Any] | None = None,
    *,
    backend: str | None = None,
    device: str | None = None,
    exempt: Mapping[int, str] | None = None,
    tiny: bool | None = None,
    thorough: bool = False,
) -> Subject:
    """What is checked; arguments as in `check`."""
    if (function is None) == (backend is None):
        raise InputError(f"{op}: give a callable or a backend to check, not both or neither")
    if function is not None:
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        return Subject(_op(op), function, None, device, bool(tiny), thorough, exempt or {})
    assert backend is not None
    where = device or _device_of(op, backend)
    slow = where == "cpu" and backend in ("triton", EMULATED) if tiny is None else tiny
    call = functools.partial(getattr(kernels, op), backend=backend)
    return Subject(_op(op), call, backend, where, slow, thorough, {**_exemptions(op, backend, where), **(exempt or {})})


def _op(op: str) -> Op:
    if op not in OPS:
        raise InputError(f"unknown op {op!r}; there are {', '.join(OPS)}")
    return OPS[op]


def _device_of(op: str, backend: str) -> str:
    if backend == "reference":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if backend == EMULATED:
        from ldmkit.testing import emulation  # compiles, in a checkout

        emulation.register()
    known = backends.names()
    if backend not in known:
        raise KernelError(f"unknown kernel backend {backend!r}; there are {', '.join(known)}")
    return backends.served(op, backend).device


def _exemptions(op: str, backend: str, device: str) -> dict[int, str]:
    """What the contract itself exempts."""
    if backend == "reference":
        return {8: PLAIN_TORCH, **({9: "plain torch's backward uses atomics on a GPU"} if device == "cuda" else {})}
    if op == "geglu_linear" and backend == "cpu":
        return {8: f"it uses {structure.LIBRARY_PRODUCTS}"}
    return {}


__all__ = ["OPS", "PROFILES", "Property", "Report", "Row", "check", "properties", "replay", "subject_of"]
