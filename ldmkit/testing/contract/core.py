"""What the contract's properties are made of: an op's problems, a callable's results on them, and how those are judged.

    error <= 2 x plain torch's error + 2 eps max|exact| c + 2 eps' terms

in max norm, for the output and every gradient, where `exact` is the op in float64 and plain torch computes in the dtype of the
result. c is 1 + the worst group's |mean| / standard deviation for GroupNorm, else 1. The last part is the rounding of sums:
eps' is that of float32 (float64 for float64), in which kernels must add, and `terms` the size of what is added or cancels.
The figure of the tables is error / (plain torch's error + eps max|exact| c + eps' terms), which may be 2 at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.errors import KernelError
from ldmkit.testing.oracles import EXACT, PLAIN

LIMIT = 2.0
Case = Mapping[str, Any]
"""Plain values that a problem is built from; its repr is Python."""
Results = dict[str, Tensor]
"""By name: the outputs, then "gradient of x" and so on."""


class Refused(Exception):
    """The backend says that it does not serve such a problem."""


@dataclass(frozen=True)
class Problem:
    """The arguments of one call, and the gradients that come back to its outputs."""

    tensors: Mapping[str, Tensor]
    options: Mapping[str, Any]
    grads: tuple[Tensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.tensors.values())).dtype

    def to(self, dtype: torch.dtype) -> Problem:
        """The same numbers in another dtype, under dense strides."""
        convert = functools.partial(_convert, dtype=dtype)
        return replace(
            self,
            tensors={name: convert(t) for name, t in self.tensors.items()},
            options={name: convert(value) for name, value in self.options.items()},
            grads=tuple(convert(g) for g in self.grads),
        )


def _convert(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@dataclass(frozen=True)
class Op:
    """What the properties have to know of an op.

    Attributes:
        outputs: names of what it returns, in order.
        batched: arguments whose first dimension is that of independent items.
        cases: (tiny, least batch) -> cases of all kinds.
        build: (device, **case) -> a problem.
        corners: cases that are always tried, tiny or not.
        extremes: cases with numbers near the edges of the formats.
        large: (tiny) -> cases of two items that are large enough for a kernel to split one.
        many: a case with at least 64 items of independent rounding.
        poisoned: (problem, value, seed) -> the problem with NaN or infinity somewhere, and for each result which elements that
            must not reach.
        mistakes: (device) -> arguments that must be refused, each with what is wrong in it.
        raw: problem -> the arguments of the raw op but the backend.
        by_library: results that a library's matrix product makes whatever the backend: their rounding may follow the number of
            rows.
        sizes: (problem in float64, exact results) -> for results by name (size of what is rounded to the dtype,
            size of what is rounded in sums); others are (max|exact|, 0).
    """

    name: str
    outputs: tuple[str, ...]
    batched: tuple[str, ...]
    cases: Callable[[bool, int], st.SearchStrategy[dict[str, Any]]]
    build: Callable[..., Problem]
    corners: Callable[[bool], Sequence[Case]]
    extremes: Callable[[], Sequence[Case]]
    large: Callable[[bool], Sequence[Case]]
    many: Callable[[], Case]
    poisoned: Callable[[Problem, float, int], tuple[Problem, Mapping[str, Tensor]]]
    mistakes: Callable[[str], Iterable[tuple[str, Mapping[str, Any]]]]
    raw: Callable[[Problem], tuple[Any, ...]]
    sizes: Callable[[Problem, Results], Mapping[str, tuple[float, float]]]
    by_library: tuple[str, ...] = ()


@dataclass(frozen=True)
class Subject:
    """A callable with an op's public signature (without `backend`), under test.

    Attributes:
        backend: its name in ldmkit's table of backends, where it is there.
        device: where its tensors live.
        tiny: problems must be small: it is interpreted or emulated.
        thorough: minutes may be spent.
        exempt: properties it need not have, by number, with the reason.
    """

    op: Op
    call: Callable[..., Any]
    backend: str | None = None
    device: str = "cpu"
    tiny: bool = False
    thorough: bool = False
    exempt: Mapping[int, str] = field(default_factory=dict)

    def raw(self, problem: Problem) -> tuple[Any, ...]:
        """The arguments of ldmkit's raw op for a problem."""
        return (*self.op.raw(problem), self.backend)

    def __call__(self, **arguments: Any) -> tuple[Tensor, ...]:
        try:
            result = self.call(**arguments)
        except KernelError as error:
            if self.backend is not None and "cannot serve this call" in str(error):
                raise Refused(str(error)) from error
            raise
        return result if isinstance(result, tuple) else (result,)


@dataclass
class Tally:
    """What a property has seen: cases, and the worst error as a multiple of plain torch's."""

    cases: int = 0
    refused: list[str] = field(default_factory=list)
    worst: float | None = None

    def note(self, ratio: float) -> None:
        self.worst = ratio if self.worst is None else max(self.worst, ratio)


@dataclass(frozen=True)
class Trial:
    """One case of one property: what the checks speak to."""

    subject: Subject
    tally: Tally
    problem: Problem
    case: Case

    def build(self, **changes: Any) -> Problem:
        """The problem of the same case with some values changed."""
        return self.subject.op.build(self.subject.device, **{**self.case, **changes})

    def results(self, problem: Problem | None = None) -> Results:
        """The callable's outputs and gradients."""
        return evaluate(self.subject, self.problem if problem is None else problem, self.subject.op.outputs)

    def outputs(self, problem: Problem | None = None) -> tuple[Tensor, ...]:
        """The callable's outputs, without gradients."""
        problem = self.problem if problem is None else problem
        with torch.no_grad():
            return self.subject(**problem.tensors, **problem.options)

    def judge(self, problem: Problem | None = None) -> Judge:
        """What is right for a problem."""
        return Judge(self.subject.op, self.problem if problem is None else problem)

    def check_bound(self, got: Results, problem: Problem | None = None) -> None:
        """Asserts the bound on the problem (default: the trial's own)."""
        self.judge(problem).check(got, self.tally)

    def check_same(self, got: Results, want: Results, what: str) -> None:
        """Asserts the same bits."""
        for name in want:
            assert got[name].shape == want[name].shape, f"{name}: {what}: {shown(got[name])}, not {shown(want[name])}"
            assert got[name].dtype == want[name].dtype, f"{name}: {what}: {got[name].dtype}, not {want[name].dtype}"
            assert not _differing(got[name], want[name]).any(), f"{name}: {what}: {_difference(got[name], want[name])}"


def evaluate(call: Callable[..., Any], problem: Problem, names: Sequence[str], gradients: bool = True) -> Results:
    """Outputs and gradients of any callable on a problem. The problem's own tensors are never part of a graph."""
    leaves = {name: t.detach().requires_grad_(gradients) for name, t in problem.tensors.items()}
    outputs = call(**leaves, **problem.options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    results = dict(zip(names, (y.detach() for y in outputs), strict=False))
    if gradients:
        found = torch.autograd.grad(outputs, list(leaves.values()), list(problem.grads), allow_unused=True)
        for name, leaf, gradient in zip(leaves, leaves.values(), found, strict=True):
            results[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return results


class Judge:
    """The exact results of a problem, plain torch's, and the bound between them."""

    def __init__(self, op: Op, problem: Problem) -> None:
        self._op, self._problem = op, problem

    @functools.cached_property
    def exact(self) -> Results:
        """In float64, of the numbers as the dtype holds them."""
        return evaluate(EXACT[self._op.name], self._wide, self._op.outputs)

    @functools.cached_property
    def plain(self) -> Results:
        """Plain torch's, in the dtype."""
        return evaluate(PLAIN[self._op.name], self._problem, self._op.outputs)

    @functools.cached_property
    def _sizes(self) -> Mapping[str, tuple[float, float]]:
        return self._op.sizes(self._wide, self.exact)

    @functools.cached_property
    def _wide(self) -> Problem:
        return self._problem.to(torch.float64)

    def allowed(self, name: str) -> float:
        """Plain torch's largest error, plus one rounding: half of the bound."""
        exact, plain = self.exact[name], self.plain[name]
        limits = torch.finfo(plain.dtype)
        rounded, summed = self._sizes.get(name, (largest(exact), 0.0))
        return (
            largest((plain.double() - exact).where(exact.isfinite() & plain.isfinite(), 0.0))
            + limits.eps * rounded
            + torch.finfo(torch.promote_types(plain.dtype, torch.float32)).eps * summed
            + limits.smallest_normal * limits.eps  # the spacing of the numbers next to 0
        )

    def check(self, got: Results, tally: Tally) -> None:
        """Asserts the bound on every result."""
        for name in self.exact:
            self.check_one(name, got[name], tally)

    def check_one(self, name: str, got: Tensor, tally: Tally) -> None:
        """Asserts the bound on one result, and notes the ratio."""
        exact, plain = self.exact[name], self.plain[name]
        assert got.shape == exact.shape, f"{name} has shape {tuple(got.shape)}, not {tuple(exact.shape)}"
        assert got.dtype == plain.dtype, f"{name} is {got.dtype}, not {plain.dtype}"
        finite = exact.to(got.dtype).isfinite()
        for wrong in (finite & ~got.isfinite(), exact.isinf() & (got.double() != exact)):
            assert not wrong.any(), f"{name}: {_place(wrong, got, exact)}"
        error = (got.double() - exact).where(finite, 0.0).abs()
        if error.numel():
            allowed = self.allowed(name)
            ratio = float(error.max()) / allowed
            tally.note(ratio)
            assert ratio <= LIMIT, (
                f"{name}: error {float(error.max()):.3g} is {ratio:.3g} times plain torch's with one rounding ({allowed:.3g});"
                f" {LIMIT:g} is the most; {_place(error == error.max(), got, exact)}"
            )

    def check_close(self, got: Results, want: Results, what: str) -> None:
        """Asserts that two results are no further from each other than both may be from the exact one."""
        for name in want:
            assert got[name].shape == want[name].shape, f"{name}: {what}: {shown(got[name])}, not {shown(want[name])}"
            apart = (got[name].double() - want[name].double()).nan_to_num()
            limit = 2 * LIMIT * self.allowed(name)
            assert largest(apart) <= limit, f"{name}: {what}: {_difference(got[name], want[name])}, more than {limit:.3g}"


def largest(values: Tensor) -> float:
    """max|values| of the finite ones, 0 of none."""
    return float(values.where(values.isfinite(), 0.0).abs().max()) if values.numel() else 0.0


def shown(t: Tensor) -> str:
    """A tensor in a message."""
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"


def _differing(got: Tensor, want: Tensor) -> Tensor:
    return ~((got == want) | (got.isnan() & want.isnan()))


def _difference(got: Tensor, want: Tensor) -> str:
    wrong = _differing(got, want)
    apart = largest((got.double() - want.double()).nan_to_num())
    return f"{_place(wrong, got, want)}; {int(wrong.sum())} of {wrong.numel()} elements differ, by at most {apart:.3g}"


def _place(wrong: Tensor, got: Tensor, want: Tensor) -> str:
    index = tuple(wrong.nonzero()[0].tolist())
    return f"at {list(index)} {float(got[index]):.9g}, not {float(want[index]):.9g}"


@dataclass(frozen=True)
class Property:
    """One line of the contract (or a part of one).

    Attributes:
        number: its line in the contract.
        check: asserts it on a trial.
        cases: what it is tried on; None: it builds what it needs, once.
        fixed: cases that are always tried, first.
        share: of the profile's number of examples.
        absent: why it says nothing about a subject; None where it does. A reason that starts with "needs a GPU" is a verdict.
        but: what it leaves out of a subject that passes, for the table.
    """

    number: int
    name: str
    check: Callable[[Trial], None]
    cases: Callable[[Subject], st.SearchStrategy[dict[str, Any]]] | None = None
    fixed: Callable[[Subject], Iterable[Case]] = lambda subject: ()
    share: float = 1.0
    absent: Callable[[Subject], str | None] = lambda subject: None
    but: Callable[[Subject], str] = lambda subject: ""
