"""The contract's lines 7 to 13 and 15: what may not change a result, and what a kernel must leave alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import Case, Problem, Property, Refused, Results, Subject, Trial
from ldmkit.testing.contract.guard import Guards
from ldmkit.testing.contract.tensors import far_apart, half_dtypes

LIBRARY_PRODUCTS = "the library's matrix products, whose rounding follows the number of rows"


def permuted_batch(t: Trial) -> None:
    """The same items in another order give the same results in that order."""
    problem = _dense(t.problem)
    size = len(problem.grads[0])
    order = torch.randperm(size, generator=torch.Generator().manual_seed(t.case["seed"])).to(t.subject.device)
    mixed = _items(problem, lambda x: torch.empty_like(x).copy_(x[order]), t)
    got, want = t.results(mixed), t.results(problem)
    own = _own(t, want)
    got, want = {name: got[name] for name in own}, {name: want[name][order] for name in own}
    if 8 in t.subject.exempt:
        t.judge().check_close(got, want, "with the batch permuted")
    else:
        t.check_same(got, want, "with the batch permuted")


def alone(t: Trial) -> None:
    """Each item alone gives the bits that it gives among others, and on one thread those of two."""
    together = t.results()
    for i in range(len(t.problem.grads[0])):
        own = t.results(_items(t.problem, lambda x, i=i: x[i : i + 1], t))
        names = _own(t, together)
        t.check_same({n: own[n] for n in names}, {n: together[n][i : i + 1] for n in names}, f"item {i} alone")
    with _threads(3 - min(2, torch.get_num_threads())):
        t.check_same(_made_here(t, t.results()), _made_here(t, together), "on another number of threads")


def again(t: Trial) -> None:
    """Run again, all results have the same bits."""
    first = t.results()
    for _ in range(1 if t.subject.tiny else 3):
        t.check_same(t.results(), first, "run again")


def schedules(t: Trial) -> None:
    """The threads of a block may run in any order: a result that depends on it is a race."""
    from ldmkit.testing import emulation

    want = t.results()
    for name, seed in (("reverse", 0), ("random", 1), ("random", 2)):
        with emulation.schedule(name, seed):
            t.check_same(t.results(), want, f"with threads in {name} order")


def strides(t: Trial) -> None:
    """Sliced, transposed, expanded, chunk-half and offset inputs give what dense copies of them give."""
    dense = replace(
        t.problem,
        tensors={name: x.contiguous().clone() for name, x in t.problem.tensors.items()},
        grads=tuple(g.contiguous() for g in t.problem.grads),
    )
    t.judge().check_close(t.results(), t.results(dense), f"with {t.case['layout']} inputs")


def nothing_modified(t: Trial) -> None:
    """Inputs, incoming gradients and saved tensors keep their numbers; a second backward gives the first one's gradients."""
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(x: Tensor) -> Tensor:
        saved.append((x, x.detach().clone()))
        return x

    leaves = {name: x.detach().requires_grad_() for name, x in t.problem.tensors.items()}
    given = [*t.problem.tensors.values(), *t.problem.grads]
    before = [x.clone() for x in given]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        outputs = t.subject(**leaves, **t.problem.options)
    values = [y.detach().clone() for y in outputs]
    gradients = []
    for keep in (True, False):
        found = torch.autograd.grad(outputs, list(leaves.values()), t.problem.grads, retain_graph=keep, allow_unused=True)
        gradients.append({name: g for name, g in zip(leaves, found, strict=True) if g is not None})
    for what, pairs in (
        ("an argument", zip(given, before, strict=True)),
        ("an output", zip(outputs, values, strict=True)),
        ("a saved tensor", saved),
    ):
        for now, then in pairs:
            t.check_same({what: now.detach()}, {what: then}, "modified")
    if 9 not in t.subject.exempt:
        t.check_same(gradients[1], gradients[0], "in a second backward")


def guarded(t: Trial) -> None:
    """Nothing is written round the outputs and the scratch space, and every element of the outputs is."""
    if t.subject.backend == "cuda-emulated":  # that machine stops at every access out of bounds, and hands out NaN
        t.check_bound(t.results())
        return
    t.results()  # whatever is set up once is set up now
    guards = Guards()
    with guards.in_force(t.subject.device):
        got = t.results()
    if not any(guards.covers(result) for result in got.values()) and any(result.numel() for result in got.values()):
        raise Refused("its outputs are allocated inside torch, where no bands can be put round them")
    guards.check()
    t.check_bound({name: result.clone() for name, result in got.items()})


def far_strides(t: Trial) -> None:
    """More than 2^31 elements between one item and the next."""
    far = _items(t.problem, far_apart, t)
    t.judge().check_close(t.results(far), t.results(), "with more than 2^31 elements between items")


def huge(t: Trial) -> None:
    """More than 2^31 elements, and grids longer than 65535: one item, over and over, gives the same over and over."""
    for case, times in HUGE[t.subject.op.name]:
        one = t.build(**case)
        copies = _items(one, lambda x, n=times: x.expand(n, *x.shape[1:]).contiguous(), t)
        (want, *_), (got, *_) = t.outputs(one), t.outputs(copies)
        for i in (0, times // 2, times - 1):
            t.judge(one).check_close({t.subject.op.outputs[0]: got[i : i + 1]}, {t.subject.op.outputs[0]: want}, f"item {i}")


HUGE: dict[str, list[tuple[Case, int]]] = {
    "geglu": [({"lead": (1,)}, 70000), ({"lead": (1,), "n": 1024}, 2**21 + 1)],
    "geglu_linear": [({"lead": (1,)}, 70000), ({"lead": (1,), "n": 1024}, 2**21 + 1)],
    "group_norm_silu": [({"batch": 1}, 70000), ({"batch": 1, "spatial": (1024, 1024), "groups": 32}, 33)],
    "cross_attention": [({"batch": 1}, 70000), ({"batch": 1, "queries": 4096, "heads": 8, "dim": 64}, 1025)],
}
"""One item, and how many of it: more than 65535, and with more than 2^31 elements (of x or of q) in all."""


# ------------------------------------------------------------------------------------------------------------------- helpers


def _dense(problem: Problem) -> Problem:
    """Dense inputs whose items can be reordered; channels-last stays so."""
    copy = {name: torch.empty_like(x).copy_(x) for name, x in problem.tensors.items()}
    return replace(problem, tensors=copy, grads=tuple(torch.empty_like(g).copy_(g) for g in problem.grads))


def _items(problem: Problem, change: Any, t: Trial) -> Problem:
    """The problem with its batched arguments changed."""

    def changed(name: str, value: Any) -> Any:
        batched = name in t.subject.op.batched and isinstance(value, Tensor)
        return change(value) if batched and len(value) == len(problem.grads[0]) else value

    return replace(
        problem,
        tensors={name: changed(name, x) for name, x in problem.tensors.items()},
        options={name: changed(name, value) for name, value in problem.options.items()},
        grads=tuple(change(g) for g in problem.grads),
    )


def _own(t: Trial, results: Results) -> list[str]:
    """The results that have one part for each item, and are made here."""
    batched = [f"gradient of {name}" for name in t.subject.op.batched]
    return [name for name in _made_here(t, results) if name in t.subject.op.outputs or name in batched]


def _made_here(t: Trial, results: Results) -> Results:
    return {name: result for name, result in results.items() if name not in t.subject.op.by_library}


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cases(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return subject.op.cases(subject.tiny, 1)


def _large(subject: Subject) -> list[Case]:
    return list(subject.op.large(subject.tiny))


def _strided(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return subject.op.cases(subject.tiny, 1).filter(lambda case: case["layout"] != "dense")


def _pairs(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    """Two dense items with something in them, in half precision: twice 4 GiB on a GPU."""
    rows = {"lead": (2,), "expanded_grad": False}
    two = {"layout": "dense", **(rows if "lead" in subject.op.many() else {"batch": 2})}
    changed = st.builds(lambda case, dtype: {**case, **two, "dtype": dtype}, subject.op.cases(subject.tiny, 2), half_dtypes)
    return changed.filter(lambda case: all(case.get(size) != 0 for size in ("n", "keys")) and 0 not in case.get("spatial", ()))


def _huge_case(subject: Subject) -> list[Case]:
    plain = {**subject.op.many(), "dtype": "bfloat16", "layout": "dense"}
    return [{**plain, "lse": False} if "lse" in plain else plain]


def _but_library(subject: Subject) -> str:
    left_out = subject.op.by_library
    return f"but for {', '.join(left_out)}: {LIBRARY_PRODUCTS}" if left_out and 8 not in subject.exempt else ""


def _exempt(number: int) -> Any:
    return lambda subject: subject.exempt.get(number)


def _not_emulated(subject: Subject) -> str | None:
    return None if subject.backend == "cuda-emulated" else "only the emulated machine lets a schedule be chosen"


def _needs_gpu(subject: Subject) -> str | None:
    return None if subject.device == "cuda" else "needs a GPU: tensors of more than 2^31 elements"


PROPERTIES = (
    Property(7, "permuting the batch permutes the results", permuted_batch, cases=_cases, but=_but_library),
    Property(
        8,
        "batch-invariant to the bit, on any threads",
        alone,
        cases=_cases,
        fixed=_large,
        absent=_exempt(8),
        but=_but_library,
    ),
    Property(9, "the same bits from run to run", again, cases=_cases, fixed=_large, absent=_exempt(9)),
    Property(9, "the same bits under any schedule of threads", schedules, cases=_cases, fixed=_large, absent=_not_emulated),
    Property(11, "any strides and offsets", strides, cases=_strided),
    Property(12, "nothing modified, backward twice", nothing_modified, cases=_cases, fixed=_large),
    Property(13, "guard bands, every element written", guarded, cases=_cases, fixed=_large),
    Property(15, "64-bit strides", far_strides, cases=_pairs),
    Property(15, "more than 2^31 elements, long grids", huge, fixed=_huge_case, absent=_needs_gpu),
)
