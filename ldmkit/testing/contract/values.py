"""The contract's lines 1 to 6 and 20: the numbers of any op."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import kernels
from ldmkit.testing.contract.core import LIMIT, Case, Property, Subject, Trial, evaluate, largest
from ldmkit.testing.contract.tensors import LOW, seeds


def bound(t: Trial) -> None:
    """Output and every gradient: error at most 2 x plain torch's + 2 eps max|exact| c."""
    t.check_bound(t.results())


def no_bias(t: Trial) -> None:
    """Signed errors away from 0 average to about zero: over all, as where rounding goes to the nearest; and within each item.

    Over all: the spread of the items' mean errors says how near to zero their mean must be, beside twice plain torch's own mean
    and an eighth of a rounding (half of one in float32, whose exp and erf are approximations). Within items of an output: the
    root mean square of their mean errors is at most twice plain torch's and a sixteenth of a rounding; it is more where
    statistics of items are kept in the input's dtype.
    """
    got, judge = t.results(), t.judge()
    for name in ("y", "out", "gradient of x", "gradient of q"):
        if name not in got:
            continue
        mine, theirs = (_means(r[name], judge.exact[name]) for r in (got, judge.plain))
        eps = torch.finfo(got[name].dtype).eps
        spread = 5 * float(mine.std()) / math.sqrt(mine.numel())
        limit = 2 * abs(float(theirs.mean())) + spread + eps * (0.5 if got[name].dtype == torch.float32 else 0.125)
        bias = float(mine.mean())
        assert abs(bias) <= limit, f"{name}: mean error {bias / eps:.3g} eps away from 0, more than {limit / eps:.3g} eps"
        if not name.startswith("gradient"):
            off, limit = _root_mean_square(mine), 2 * _root_mean_square(theirs) + eps / 16
            assert off <= limit, f"{name}: items are off by {off / eps:.3g} eps as a whole, more than {limit / eps:.3g} eps"


def _root_mean_square(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def _means(got: Tensor, exact: Tensor) -> Tensor:
    """Mean of the error in the direction away from 0, as a part of the mean size, for each of at least 64 items."""
    first = 1 if got.shape[0] >= 64 else 2
    error = ((got.double() - exact) * exact.sign()).flatten(0, first - 1).flatten(1)
    return error.mean(1) / exact.abs().mean()


def gradcheck(t: Trial) -> None:
    """Gradients in float64 are those of finite differences."""
    names = list(t.problem.tensors)

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = t.subject(**dict(zip(names, tensors, strict=True)), **t.problem.options)
        return tuple(y.masked_fill(y.isinf(), 0.0) for y in outputs)  # the log-sum-exp of no keys

    leaves = [t.problem.tensors[name].clone().requires_grad_() for name in names]
    fast = t.subject.tiny or sum(leaf.numel() for leaf in leaves) > 200
    torch.autograd.gradcheck(call, leaves, fast_mode=fast, nondet_tol=0.0 if 9 not in t.subject.exempt else 1e-9)


def agrees_with_reference(t: Trial) -> None:
    """No further from the reference than both may be from the exact results."""
    reference = getattr(kernels, t.subject.op.name)
    want = evaluate(lambda **arguments: reference(**arguments, backend="reference"), t.problem, t.subject.op.outputs)
    t.judge().check_close(t.results(), want, "against the reference")


def extremes(t: Trial) -> None:
    """Finite wherever the exact result, cast to the dtype, is; and within the bound where no number is subnormal."""
    exact, got = t.judge().exact, t.results()
    for name, truth in exact.items():
        ought = truth.to(got[name].dtype).isfinite()
        missing = got[name].isfinite() < ought
        assert not missing.any(), f"{name}: {int(missing.sum())} elements are not finite where the exact result is"
    plain = t.judge().plain
    finite = all(r.isfinite().all() for r in (*got.values(), *plain.values(), *exact.values()))
    smallest = torch.finfo(t.problem.dtype).smallest_normal
    if finite and not any(0 < largest(x) < smallest for x in (*t.problem.tensors.values(), *exact.values())):
        t.check_bound(got)


def poison(t: Trial) -> None:
    """NaN or infinity in one element stays in its own group or row: all other results keep their bits."""
    clean = t.results()
    for value in (math.nan, math.inf, -math.inf):
        problem, untouched = t.subject.op.poisoned(t.problem, value, t.case["seed"])
        got = t.results(problem)
        for name, mask in untouched.items():
            if name in got:
                keep = mask.expand_as(got[name])
                t.check_same({name: got[name][keep]}, {name: clean[name][keep]}, f"with {value} elsewhere")


def poison_shows(t: Trial) -> None:
    """What ought to be NaN is not a number that looks right."""
    for value in (math.nan, math.inf, -math.inf):
        problem, _ = t.subject.op.poisoned(t.problem, value, t.case["seed"])
        got = t.results(problem)
        for name, truth in t.judge(problem).exact.items():
            hidden = truth.isnan() & got[name].isfinite()
            assert not hidden.any(), f"{name}: {value} is hidden: {int(hidden.sum())} elements are finite that ought to be NaN"


def linear_backward(t: Trial) -> None:
    """The gradients of 2 g - h are twice those of g less those of h. All three are exact in any dtype."""
    first = tuple((g * 4).round().clamp(-16, 16) / 4 for g in t.problem.grads)
    second = tuple(g.flip(-1) for g in first)
    together = tuple(2 * g - h for g, h in zip(first, second, strict=True))
    problems = [replace(t.problem, grads=grads) for grads in (first, second, together)]
    of_first, of_second, got = (t.results(problem) for problem in problems)
    judges = [t.judge(problem) for problem in problems]
    for name in got:
        if name.startswith("gradient"):
            want = 2 * of_first[name].double() - of_second[name].double()
            limit = LIMIT * sum(factor * judge.allowed(name) for factor, judge in zip((2, 1, 1), judges, strict=True))
            error = largest(got[name].double() - want)
            assert error <= limit, f"{name}: not linear in the incoming gradient: {error:.3g} off, more than {limit:.3g}"


def _all(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return subject.op.cases(subject.tiny, 0)


def _some(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return _with(subject.op.cases(subject.tiny, 1), dtype=st.sampled_from(LOW))


def _double(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return _with(subject.op.cases(True, 1), dtype=st.just("float64"), layout=st.just("dense"))


def _with(cases: st.SearchStrategy[dict[str, Any]], **changes: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda case, changed: {**case, **changed}, cases, st.fixed_dictionaries(changes))


def _many(subject: Subject) -> Iterable[Case]:
    return [{**subject.op.many(), "dtype": dtype} for dtype in (LOW[2:] if subject.tiny else LOW)]


def _filled(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    """Cases with something in them."""
    return _with(st.just(dict(subject.op.many())), dtype=st.sampled_from(LOW), seed=seeds).map(_smaller)


def _smaller(case: dict[str, Any]) -> dict[str, Any]:
    few = {"lead": (4,), "batch": 2, "groups": 3, "heads": 3}
    return {**case, **{name: size for name, size in few.items() if name in case}}


def _reference_itself(subject: Subject) -> str | None:
    return "it is the reference" if subject.backend == "reference" else None


def _torch_hides(subject: Subject) -> str | None:
    fused = subject.op.name == "cross_attention" and subject.backend == "reference"
    return "torch's fused attention takes a row of NaN scores for one without keys, on a CPU" if fused else None


PROPERTIES = (
    Property(1, "the bound, over shapes, dtypes, layouts, sizes", bound, cases=_all, share=3.0),
    Property(2, "no bias", no_bias, fixed=_many),
    Property(3, "gradcheck in float64", gradcheck, cases=_double),
    Property(4, "agrees with the reference", agrees_with_reference, cases=_some, absent=_reference_itself),
    Property(5, "finite at extremes", extremes, fixed=lambda subject: subject.op.extremes()),
    Property(6, "NaN and Inf stay in their group or row", poison, cases=_filled),
    Property(6, "NaN and Inf are not hidden", poison_shows, cases=_filled, absent=_torch_hides),
    Property(14, "named sizes: none, one, odd, the models'", bound, fixed=lambda subject: subject.op.corners(subject.tiny)),
    Property(20, "backward is linear in the incoming gradient", linear_backward, cases=_some),
)
