"""GEGLU in the contract: its problems, and what is true of it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import Case, Op, Problem, Property, Trial
from ldmkit.testing.contract.tensors import DTYPES, LOW, dtype_of, dtypes, layouts, randn, seeds, strided

PLAIN_CASE: Case = {
    "lead": (3,), "n": 5, "dtype": "float32", "layout": "dense", "scale": 1.0, "expanded_grad": False, "seed": 0
}  # fmt: skip


def cases(tiny: bool, least: int) -> st.SearchStrategy[dict[str, Any]]:
    """Up to three leading dimensions, the first at least `least`."""
    most = 3 if tiny else 5
    first, inner = st.integers(least, most), st.integers(0, most)
    lead = st.tuples(first) | st.tuples(first, inner) | st.tuples(first, inner, st.integers(1, 2))
    return st.fixed_dictionaries(
        {
            "lead": lead if least else lead | st.just(()),
            "n": st.integers(0, 20 if tiny else 70) | st.sampled_from([64, 257]),
            "dtype": dtypes,
            "layout": layouts,
            "scale": st.sampled_from([1.0, 1e-3, 5.0, 100.0]),
            "expanded_grad": st.booleans(),
            "seed": seeds,
        }
    )


def build(
    device: str, *, lead: Sequence[int], n: int, dtype: str, layout: str, scale: float, expanded_grad: bool, seed: int
) -> Problem:
    """x of shape (*lead, 2 n)."""
    x = strided(randn((*lead, 2 * n), seed, dtype_of(dtype), device, scale=scale), layout)
    grad = randn((*lead, 1 if expanded_grad else n), seed + 1, dtype_of(dtype), device).expand(*lead, n)
    return Problem({"x": x}, {}, (grad,))


def corners(tiny: bool) -> list[Case]:
    """Nothing, one, odd widths, widths about a block, widths of the models."""
    widths = [0, 1, 3, 7, 8, 9, 127, 1280] if tiny else [0, 1, 3, 7, 8, 9, 127, 1023, 1025, 1280, 2560, 5120, 8200]
    wide = [{**PLAIN_CASE, "n": n, "dtype": DTYPES[i % 3], "scale": 3.0} for i, n in enumerate(widths)]
    return [*wide, {**PLAIN_CASE, "lead": (0,)}, {**PLAIN_CASE, "lead": (2, 0, 3)}, {**PLAIN_CASE, "lead": ()}]


def extremes() -> list[Case]:
    """Gates far out on both sides, products to 1e36, subnormal numbers."""
    return [
        {**PLAIN_CASE, "n": 33, "dtype": dtype, "scale": scale}
        for dtype in LOW
        for scale in ((1e4, 1e-7) if dtype == "float16" else (1e4, 1e18, 1e-20, 1e-39))
    ]


def large(tiny: bool) -> list[Case]:
    return [{**PLAIN_CASE, "lead": (2, 3), "n": 1280 if tiny else 8200}]


def many() -> Case:
    return {**PLAIN_CASE, "lead": (96,), "n": 64}


def poisoned(problem: Problem, value: float, seed: int) -> tuple[Problem, Mapping[str, Tensor]]:
    """One element of x: it may reach its own row."""
    x = problem.tensors["x"].clone()
    clean = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    row = seed % x.shape[0]
    x[row].view(-1)[seed % x[row].numel()] = value
    clean[row] = False
    rows = clean.reshape(-1, *(1,) * (x.dim() - 1))
    return replace(problem, tensors={"x": x}), {"y": rows, "gradient of x": rows}


def mistakes(device: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    yield "an odd last dimension", {"x": torch.zeros(3, 5, device=device)}
    yield "no dimension", {"x": torch.zeros((), device=device)}
    yield "whole numbers", {"x": torch.zeros(3, 4, dtype=torch.int64, device=device)}


OP = Op(
    name="geglu",
    outputs=("y",),
    batched=("x",),
    cases=cases,
    build=build,
    corners=corners,
    extremes=extremes,
    large=large,
    many=many,
    poisoned=poisoned,
    mistakes=mistakes,
    raw=lambda problem: (problem.tensors["x"],),
    sizes=lambda problem, exact: {},
)


def exact_gelu(t: Trial) -> None:
    """First half times erf-GELU of the second, as exact in each stretch of gates as plain torch is: tanh-GELU is not."""
    for dtype in ("float32", "bfloat16", "float16"):
        for start in (-13, -9, -6, -4, -2, -0.01, 0, 2, 5):
            gate = start + torch.linspace(0, 2 if start != -0.01 else 0.02, 65, dtype=torch.float64)
            x = torch.stack([torch.full_like(gate, 2.0), gate], dim=-1).to(dtype_of(dtype)).to(t.subject.device)
            problem = Problem({"x": x}, {}, (torch.ones_like(x[:, :1]),))
            t.check_bound(t.results(problem), problem)


def linear_in_value(t: Trial) -> None:
    """Twice the first half gives twice the result, to the bit."""
    x = t.problem.tensors["x"]
    n = x.shape[-1] // 2
    doubled = replace(t.problem, tensors={"x": torch.cat([2 * x[..., :n], x[..., n:]], dim=-1)})
    dense = replace(t.problem, tensors={"x": x.contiguous()})
    (y,), (twice,) = t.outputs(dense), t.outputs(doubled)
    normal = (y.abs() > torch.finfo(y.dtype).smallest_normal) & (twice.isfinite())
    t.check_same({"y": twice[normal]}, {"y": (2 * y)[normal]}, "with the first half doubled")


PROPERTIES = (
    Property(19, "GELU is the exact one", exact_gelu),
    Property(19, "linear in the first half", linear_in_value, cases=lambda subject: cases(subject.tiny, 0)),
)
