"""GEGLU with its projection in the contract: its problems, and what is true of it alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import Case, Op, Problem, Property, Results, Subject, Trial, largest
from ldmkit.testing.contract.tensors import DTYPES, LOW, dtype_of, dtypes, layouts, randn, seeds, strided

PLAIN_CASE: Case = {
    "lead": (3,), "k": 8, "n": 5, "bias": True, "dtype": "float32", "layout": "dense", "weight_layout": "dense",
    "scale": 1.0, "expanded_grad": False, "seed": 0,
}  # fmt: skip


def cases(tiny: bool, least: int) -> st.SearchStrategy[dict[str, Any]]:
    """One or two leading dimensions, the first at least `least`."""
    most = 20 if tiny else 40
    rows = st.integers(least, 4 if tiny else 6)
    return st.fixed_dictionaries(
        {
            "lead": st.tuples(rows) | st.tuples(rows, st.integers(0 if not least else 1, 3)),
            "k": st.integers(1, most) | st.just(64),
            "n": st.integers(0, most) | st.just(64),
            "bias": st.booleans(),
            "dtype": dtypes,
            "layout": layouts,
            "weight_layout": st.sampled_from(["dense", "transposed", "offset-3", "sliced"]),
            "scale": st.sampled_from([1.0, 1e-3, 20.0]),
            "expanded_grad": st.booleans(),
            "seed": seeds,
        }
    )


def build(
    device: str,
    *,
    lead: Sequence[int],
    k: int,
    n: int,
    bias: bool,
    dtype: str,
    layout: str,
    weight_layout: str,
    scale: float,
    expanded_grad: bool,
    seed: int,
) -> Problem:
    """x of shape (*lead, k), weight (2 n, k); gates of size `scale`."""
    kind = dtype_of(dtype)
    x = strided(randn((*lead, k), seed, kind, device), layout)
    weight = strided(randn((2 * n, k), seed + 1, kind, device, scale=scale / max(k, 1) ** 0.5), weight_layout)
    tensors = {"x": x, "weight": weight}
    if bias:
        tensors["bias"] = randn((2 * n,), seed + 2, kind, device, scale=scale)
    grad = randn((*lead, 1 if expanded_grad else n), seed + 3, kind, device).expand(*lead, n)
    return Problem(tensors, {}, (grad,))


def corners(tiny: bool) -> list[Case]:
    """Nothing, one, odd sizes, sizes about a tile, a row block of the models' widths."""
    sizes: list[tuple[tuple[int, ...], int, int]] = [((1,), 1, 1), ((5,), 3, 7), ((17,), 33, 9), ((2, 65), 40, 48)]
    sizes += [((0,), 8, 4), ((2, 0), 8, 4), ((3,), 8, 0), ((3,), 0, 4), ((), 8, 4)]
    sizes += [] if tiny else [((130,), 320, 129), ((2, 64), 320, 1280), ((300,), 64, 70)]
    return [
        {**PLAIN_CASE, "lead": lead, "k": k, "n": n, "dtype": DTYPES[i % 3], "bias": i % 2 == 0}
        for i, (lead, k, n) in enumerate(sizes)
    ]


def extremes() -> list[Case]:
    """Gates far out on both sides, and hardly any."""
    return [
        {**PLAIN_CASE, "dtype": dtype, "scale": scale}
        for dtype in LOW
        for scale in ((1e2, 1e-7) if dtype == "float16" else (1e4, 1e15, 1e-20))
    ]


def large(tiny: bool) -> list[Case]:
    size = {"lead": (2, 70), "k": 40, "n": 72} if tiny else {"lead": (2, 130), "k": 320, "n": 160}
    return [{**PLAIN_CASE, **size, "dtype": dtype} for dtype in LOW[: 1 if tiny else 3]]


def many() -> Case:
    return {**PLAIN_CASE, "lead": (96,), "k": 32, "n": 40}


def poisoned(problem: Problem, value: float, seed: int) -> tuple[Problem, Mapping[str, Tensor]]:
    """One element of x: it may reach its own row, and all gradients that sum over rows."""
    x = problem.tensors["x"].clone()
    clean = torch.ones(x.shape[:1], dtype=torch.bool, device=x.device)
    row = seed % x.shape[0]
    x[row].view(-1)[seed % x[row].numel()] = value
    clean[row] = False
    rows = clean.reshape(-1, *(1,) * (x.dim() - 1))
    return replace(problem, tensors={**problem.tensors, "x": x}), {"y": rows, "gradient of x": rows}


def mistakes(device: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    x, weight = torch.zeros(3, 8, device=device), torch.zeros(10, 8, device=device)
    yield "an odd number of columns", {"x": x, "weight": weight[:9]}
    yield "another width", {"x": x[:, :7], "weight": weight}
    yield "a weight of one dimension", {"x": x, "weight": weight[0]}
    yield "no dimension", {"x": x[0, 0], "weight": weight}
    yield "a bias of another length", {"x": x, "weight": weight, "bias": torch.zeros(5, device=device)}
    yield "another dtype", {"x": x, "weight": weight.double()}
    yield "whole numbers", {"x": x.long(), "weight": weight.long()}
    yield "a weight elsewhere", {"x": x, "weight": weight.to("meta")}


def raw(problem: Problem) -> tuple[Any, ...]:
    return (problem.tensors["x"], problem.tensors["weight"], problem.tensors.get("bias"), True)


def sizes(problem: Problem, exact: Results) -> dict[str, tuple[float, float]]:
    """Sums of |x| |weight|, and what their rounding does behind the gate; sums of gradients with their signs away.

    The gradient of hidden is rounded to the dtype before it is summed. Its roundings are independent: squares add up.
    """
    weight = problem.tensors["weight"]
    x, grad = (t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (problem.tensors["x"], problem.grads[0].abs()))
    bias = problem.tensors.get("bias", weight.new_zeros(len(weight)))
    hidden, terms = x @ weight.T + bias, x.abs() @ weight.abs().T + bias.abs()
    (value, gate), (value_terms, gate_terms) = hidden.chunk(2, dim=-1), terms.chunk(2, dim=-1)
    # |GELU| <= |g|, |GELU'| <= 1.13 and |GELU''| <= 0.8
    summed = {"y": value_terms * gate.abs() + 1.13 * value.abs() * gate_terms}
    of_value, of_gate = gate.abs() + 1.13 * gate_terms, 1.13 * value_terms + 0.8 * value.abs() * gate_terms
    steps = torch.cat([grad * of_value, grad * of_gate], dim=-1)
    summed |= {"gradient of x": steps @ weight.abs(), "gradient of weight": steps.T @ x.abs(), "gradient of bias": steps.sum(0)}
    squares = torch.cat([grad * F.gelu(gate), 1.13 * grad * value], dim=-1).square()
    spread = {"gradient of x": squares @ weight.square(), "gradient of weight": squares.T @ x.square()}
    spread |= {"gradient of bias": squares.sum(0)}
    rounded = {name: largest(s) ** 0.5 for name, s in spread.items()}
    return {name: (max(largest(truth), rounded.get(name, 0.0)), largest(summed[name])) for name, truth in exact.items()}


OP = Op(
    name="geglu_linear",
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
    raw=raw,
    sizes=sizes,
    by_library=("gradient of x", "gradient of weight"),
)


def linear_in_value(t: Trial) -> None:
    """Twice the value half of weight and bias gives twice the result."""
    n = t.problem.tensors["weight"].shape[0] // 2
    doubled = {name: torch.cat([2 * s[:n], s[n:]]) for name, s in t.problem.tensors.items() if name != "x"}
    problem = replace(t.problem, tensors={**t.problem.tensors, **doubled})
    (y,), (twice,) = t.outputs(), t.outputs(problem)
    t.judge(problem).check_close({"y": twice}, {"y": 2 * y}, "with the value half doubled")


def bias_is_added(t: Trial) -> None:
    """A bias equals one more column of x that is 1; without one, a bias of 0."""
    x, weight = (t.problem.tensors[name] for name in ("x", "weight"))
    bias = t.problem.tensors.get("bias", torch.zeros_like(weight[:, 0]))
    longer = {"x": torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), "weight": torch.cat([weight, bias[:, None]], dim=1)}
    with_bias = replace(t.problem, tensors={"x": x, "weight": weight, "bias": bias})
    (y,), (same,) = t.outputs(with_bias), t.outputs(replace(t.problem, tensors=longer))
    t.judge(with_bias).check_close({"y": same}, {"y": y}, "with the bias as a column")
    zero = replace(t.problem, tensors={"x": x, "weight": weight, "bias": torch.zeros_like(bias)})
    none = replace(t.problem, tensors={"x": x, "weight": weight})
    (y,), (same,) = t.outputs(none), t.outputs(zero)
    t.judge(none).check_close({"y": same}, {"y": y}, "with bias 0")


def _cases(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    return cases(subject.tiny, 1)


PROPERTIES = (
    Property(17, "a bias is added to the projection", bias_is_added, cases=_cases),
    Property(19, "linear in the first half", linear_in_value, cases=_cases),
)
