"""GroupNorm then SiLU in the contract: its problems, and what is true of it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import LIMIT, Case, Op, Problem, Property, Results, Subject, Trial, largest
from ldmkit.testing.contract.tensors import DTYPES, LOW, dtype_of, dtypes, layouts, low_dtypes, randn, seeds, strided

PLAIN_CASE: Case = {
    "batch": 2, "groups": 2, "per_group": 3, "spatial": (3, 5), "dtype": "float32", "layout": "dense", "mean": 0.0,
    "scale": 1.0, "eps": 1e-5, "affine": True, "silu": True, "shift": False, "residual": False, "seed": 0,
}  # fmt: skip
INPUTS = ("x", "residual")


def cases(tiny: bool, least: int) -> st.SearchStrategy[dict[str, Any]]:
    """Channels per group that are odd, spatial sizes of 0 to 3 dimensions, means up to 100 standard deviations."""
    side = st.integers(1, 3 if tiny else 5)
    return st.fixed_dictionaries(
        {
            "batch": st.integers(least, 3),
            "groups": st.integers(1, 3 if tiny else 4),
            "per_group": st.sampled_from([1, 2, 3, 4, 10]),
            "spatial": st.lists(side, max_size=3).map(tuple) | st.sampled_from([(0,), (4, 8), (33,)]),
            "dtype": dtypes,
            "layout": layouts | st.just("channels-last"),
            "mean": st.sampled_from([0.0, 1.0, 100.0]),
            "scale": st.sampled_from([1.0, 1e-2, 30.0]),
            "eps": st.sampled_from([1e-5, 1e-6]),
            "affine": st.booleans(),
            "silu": st.booleans(),
            "shift": st.booleans(),
            "residual": st.booleans(),
            "seed": seeds,
        }
    )


def build(device: str, *, batch: int, groups: int, per_group: int, spatial: Sequence[int], seed: int, **rest: Any) -> Problem:
    """x of shape (batch, groups per_group, *spatial)."""
    shape = (batch, groups * per_group, *spatial)
    dtype = dtype_of(rest["dtype"])

    def draw(of: Sequence[int], number: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return randn(of, seed + number, dtype, device, scale=scale, mean=mean)

    tensors = {"x": strided(draw(shape, 0, rest["scale"], rest["mean"]), rest["layout"])}
    if rest["affine"]:
        tensors |= {"weight": draw(shape[1:2], 1, mean=1.0), "bias": draw(shape[1:2], 2)}
    if rest["shift"]:
        tensors["shift"] = draw(shape[:2], 3, rest["scale"])
    if rest["residual"]:
        tensors["residual"] = strided(draw(shape, 4, rest["scale"]), rest["layout"])
    grad = strided(draw(shape, 5), rest["layout"])
    return Problem(tensors, {"num_groups": groups, "eps": rest["eps"], "silu": rest["silu"]}, (grad,))


def corners(tiny: bool) -> list[Case]:
    """Nothing, one pixel, the models' channels per group, groups long enough to be split, many short ones."""
    dtype = (DTYPES[i % 3] for i in range(100))
    small: list[Case] = [{"spatial": spatial} for spatial in ((), (0, 3), (1, 1), (2, 3, 2))]
    small += [{"batch": 0}, {"groups": 1, "per_group": 1, "spatial": (1,)}]
    odd: list[Case] = [{"per_group": channels, "groups": 2, "spatial": (3, 3)} for channels in (3, 10, 30, 42, 70)]
    large: list[Case] = [{"groups": 1, "per_group": 4, "batch": 1, "spatial": (16, 18)}]
    if not tiny:
        large = [{"groups": 32, "per_group": channels, "spatial": (8, 8)} for channels in (10, 40)]
        large += [{"groups": 32, "per_group": 4, "batch": 1, "spatial": (64, 64)}]
        large += [{"groups": 1, "per_group": 2, "batch": 1, "spatial": (256, 257)}]
    both: list[Case] = [{**case, "layout": layout} for case in large for layout in ("dense", "channels-last")]
    every = [{**PLAIN_CASE, **case, "dtype": next(dtype)} for case in [*small, *odd, *both]]
    return [*every, *({**case, "shift": True, "residual": True, "mean": 3.0} for case in every[::3])]


def extremes() -> list[Case]:
    """Means of 1e4 standard deviations, constant groups, numbers to 1e18 and subnormal ones."""
    numbers = {"mean/std 1e4": (1e4, 1.0), "constant": (0.1, 0.0), "large": (0.0, 1e18), "subnormal": (0.0, 1e-39)}
    narrow = {**numbers, "large": (0.0, 1e4), "subnormal": (0.0, 1e-7)}
    return [
        {**PLAIN_CASE, "spatial": (6, 6), "dtype": dtype, "mean": mean, "scale": scale, "layout": layout}
        for dtype in LOW
        for mean, scale in (narrow if dtype == "float16" else numbers).values()
        for layout in ("dense", "channels-last")
    ]


def large(tiny: bool) -> list[Case]:
    """Groups that are long enough to be split, in both memory formats."""
    size: Case = {"groups": 1, "per_group": 4, "spatial": (16, 18) if tiny else (128, 132), "shift": True, "residual": True}
    return [{**PLAIN_CASE, **size, "layout": layout} for layout in ("dense", "channels-last")]


def many() -> Case:
    return {**PLAIN_CASE, "batch": 12, "groups": 8, "per_group": 2, "spatial": (10, 10)}


def poisoned(problem: Problem, value: float, seed: int) -> tuple[Problem, Mapping[str, Tensor]]:
    """One element of x: it may reach its own group, and the weights of that group's channels."""
    x = problem.tensors["x"].clone()
    n, channel = seed % x.shape[0], seed % x.shape[1]
    x[n, channel].view(-1)[seed % max(1, x[n, channel].numel())] = value
    per_group = x.shape[1] // problem.options["num_groups"]
    first = channel // per_group * per_group
    clean_NC = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    clean_NC[n, first : first + per_group] = False
    clean = clean_NC.reshape(*clean_NC.shape, *(1,) * (x.dim() - 2))
    masks = {"y": clean, "gradient of shift": clean_NC, **{f"gradient of {name}": clean for name in INPUTS}}
    masks |= {f"gradient of {name}": clean_NC[n] for name in ("weight", "bias")}
    return replace(problem, tensors={**problem.tensors, "x": x}), masks


def mistakes(device: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    x = torch.zeros(2, 4, 3, device=device)
    yield "no channels", {"x": x[0, 0], "num_groups": 1}
    yield "4 channels in 3 groups", {"x": x, "num_groups": 3}
    yield "0 groups", {"x": x, "num_groups": 0}
    yield "whole numbers", {"x": x.long(), "num_groups": 2}
    yield "a weight of another length", {"x": x, "num_groups": 2, "weight": torch.ones(3, device=device)}
    yield "a bias of another dtype", {"x": x, "num_groups": 2, "bias": torch.ones(4, device=device).double()}
    yield "a shift of another shape", {"x": x, "num_groups": 2, "shift": torch.ones(2, 3, device=device)}
    yield "a shift of another dtype", {"x": x, "num_groups": 2, "shift": torch.ones(2, 4, device=device).double()}
    yield "a residual of another shape", {"x": x, "num_groups": 2, "residual": torch.ones(2, 4, 2, device=device)}
    yield "a weight elsewhere", {"x": x, "num_groups": 2, "weight": torch.ones(4, device="meta")}


def raw(problem: Problem) -> tuple[Any, ...]:
    get, options = problem.tensors.get, problem.options
    head = (problem.tensors["x"], options["num_groups"], get("weight"), get("bias"))
    return (*head, options["eps"], options["silu"], get("shift"), get("residual"))


def sizes(problem: Problem, exact: Results) -> dict[str, tuple[float, float]]:
    """max|exact| c, where c is 1 + the worst group's |mean| / standard deviation; and the sums of the backward, signs away."""
    tensors, options, (grad,) = problem.tensors, problem.options, problem.grads
    shape, pixels = tensors["x"].shape, (1,) * (tensors["x"].dim() - 2)
    if not tensors["x"].numel():
        return {}
    ones = tensors["x"].new_ones(shape[1])
    weight, bias = tensors.get("weight", ones), tensors.get("bias", 0 * ones)
    h = tensors["x"] + tensors.get("shift", tensors["x"].new_zeros(shape[:2])).reshape(*shape[:2], *pixels)
    h_NG = (h + tensors.get("residual", 0 * h)).reshape(shape[0], options["num_groups"], -1)
    centred_NG = h_NG - h_NG.mean(2, keepdim=True)
    rstd_NG = (centred_NG.square().mean(2, keepdim=True) + options["eps"]).rsqrt()
    c = 1 + largest(h_NG.mean(2, keepdim=True) * rstd_NG)
    normal = (centred_NG * rstd_NG).reshape(shape)
    step = grad.abs() * (1.1 if options["silu"] else 1.0)  # |SiLU'| <= 1.1
    step_NG = (step * weight.abs().reshape(-1, *pixels)).reshape(h_NG.shape)
    size_NG = normal.abs().reshape(h_NG.shape)
    back_NG = rstd_NG * (step_NG + step_NG.mean(2, keepdim=True) + size_NG * (step_NG * size_NG).mean(2, keepdim=True))
    back, dims = back_NG.reshape(shape), [0, *range(2, len(shape))]
    terms = {"y": (normal * weight.reshape(-1, *pixels)).abs() + bias.abs().reshape(-1, *pixels)}
    terms |= {"gradient of x": back, "gradient of residual": back, "gradient of shift": back.reshape(*shape[:2], -1).sum(2)}
    terms |= {"gradient of weight": (step * normal.abs()).sum(dims), "gradient of bias": step.sum(dims)}
    return {name: (largest(truth) * c, largest(terms[name]) * c) for name, truth in exact.items()}


OP = Op(
    name="group_norm_silu",
    outputs=("y",),
    batched=("x", "shift", "residual"),
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
)


def shift_invariance(t: Trial) -> None:
    """A constant added to a group changes nothing. The numbers are such that adding is exact."""
    problem = _on_a_grid(t.problem)
    constant = {torch.bfloat16: 16, torch.float16: 128}.get(problem.dtype, 4096)
    moved = _with(problem, x=problem.tensors["x"] + constant)
    t.judge(moved).check_close(t.results(moved), t.results(problem), f"with {constant} added to all of x")


def scale_invariance(t: Trial) -> None:
    """s x with eps s^2 gives the same y."""
    scaled = {name: t.problem.tensors[name] / 16 for name in ("x", "shift", "residual") if name in t.problem.tensors}
    problem = replace(_with(t.problem, **scaled), options={**t.problem.options, "eps": t.problem.options["eps"] / 256})
    (y,), (same,) = t.outputs(), t.outputs(problem)
    t.judge().check_close({"y": same}, {"y": y}, "with x / 16 and eps / 256")


def layer_and_instance_norm(t: Trial) -> None:
    """One group is LayerNorm over (C, HW); as many groups as channels is InstanceNorm."""
    x = t.problem.tensors["x"]
    for groups in (1, x.shape[1]):
        options = {"num_groups": groups, "eps": 1e-5, "silu": False}
        problem = Problem({"x": x}, options, t.problem.grads)
        dims = x.shape[1:] if groups == 1 else x.shape[2:]
        (y,) = t.outputs(problem)
        error = largest(y.double() - F.layer_norm(x.double(), dims))
        allowed = t.judge(problem).allowed("y")
        assert error <= LIMIT * allowed, f"{groups} groups: {error:.3g} from its norm, more than {LIMIT:g} times {allowed:.3g}"


def channels_in_any_order(t: Trial) -> None:
    """Permuting the channels of each group permutes y."""
    x, groups = t.problem.tensors["x"], t.problem.options["num_groups"]
    order = torch.arange(x.shape[1], device=x.device).reshape(groups, -1).flip(1).flatten()
    flipped = {name: s[order] if s.dim() == 1 else s[:, order] for name, s in t.problem.tensors.items()}
    problem = replace(t.problem, tensors=flipped, grads=(t.problem.grads[0][:, order],))
    got = {name: r[order] if r.dim() == 1 else r[:, order] for name, r in t.results(problem).items()}
    t.judge().check_close(got, t.results(), "with the channels of each group in reverse")


def gradient_sums_to_zero(t: Trial) -> None:
    """Without SiLU, weight and bias, y does not change with a group's mean: its gradient sums to 0."""
    x, groups = t.problem.tensors["x"], t.problem.options["num_groups"]
    problem = Problem({"x": x}, {"num_groups": groups, "eps": 1e-5, "silu": False}, t.problem.grads)
    gradient = t.results(problem)["gradient of x"].double().reshape(x.shape[0], groups, -1)
    limit = LIMIT * t.judge(problem).allowed("gradient of x") * gradient.shape[2]
    assert largest(gradient.sum(2)) <= limit, f"the gradient of a group sums to {largest(gradient.sum(2)):.3g} > {limit:.3g}"


def fusions(t: Trial) -> None:
    """Shift and residual equal adding first, SiLU equals SiLU after, weight 1 and bias 0 equal none."""
    shape = t.problem.tensors["x"].shape
    dtype, device = t.problem.dtype, t.subject.device
    both = {"shift": randn(shape[:2], 7, dtype, device), "residual": randn(shape, 8, dtype, device)}
    problem = _on_a_grid(_with(t.problem, **both))
    added = problem.tensors["x"] + problem.tensors["shift"].reshape(*shape[:2], *(1,) * (len(shape) - 2))
    affine = {name: s for name, s in problem.tensors.items() if name in ("weight", "bias")}
    before = Problem({"x": added + problem.tensors["residual"], **affine}, problem.options, problem.grads)
    fused, apart = t.results(problem), t.results(before)
    t.judge(before).check_close({name: fused[name] for name in apart}, apart, "with shift and residual added by the kernel")

    (y,) = t.outputs(replace(problem, options={**problem.options, "silu": False}))
    (z,) = t.outputs(replace(problem, options={**problem.options, "silu": True}))
    judge = t.judge(replace(problem, options={**problem.options, "silu": False}))
    judge.check_close({"y": z}, {"y": F.silu(y.double())}, "with SiLU in the kernel and after it")

    ones = {"weight": torch.ones_like(added[0, :, ...].reshape(shape[1], -1)[:, 0]), "bias": added.new_zeros(shape[1])}
    plain, one = (Problem({"x": added, **extra}, problem.options, problem.grads) for extra in ({}, ones))
    t.judge(one).check_close(t.results(one), t.results(plain), "with weight 1 and bias 0")


def memory_formats(t: Trial) -> None:
    """Channels-last and contiguous agree, and each stays what it was, backward too."""
    dense = replace(t.problem, tensors={name: s.contiguous() for name, s in t.problem.tensors.items()})
    inputs = {name: strided(s, "channels-last") for name, s in dense.tensors.items() if name in INPUTS}
    last = _with(dense, **inputs)
    got, want = t.results(last), t.results(dense)
    t.judge(dense).check_close(got, want, "channels last")
    for results, problem in ((got, last), (want, dense)):
        strides = problem.tensors["x"].stride()
        for name in ("y", *(f"gradient of {name}" for name in inputs)):
            have = results[name].stride()
            assert have == strides, f"{name} has strides {have}, x has {strides}"


def _with(problem: Problem, **changes: Tensor) -> Problem:
    return Problem({**problem.tensors, **changes}, problem.options, problem.grads)


def _on_a_grid(problem: Problem) -> Problem:
    """Quarters up to 8, whose sums are exact in all dtypes."""
    names = ("x", "shift", "residual")
    return _with(problem, **{name: (s * 4).round().clamp(-32, 32) / 4 for name, s in problem.tensors.items() if name in names})


def _mild(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    """Cases with pixels and without large means."""
    spatial = st.sampled_from([(2, 3), (5,), (3, 2, 2), (4, 4)])
    changes = st.fixed_dictionaries({"spatial": spatial, "mean": st.just(0.0), "scale": st.just(1.0), "dtype": low_dtypes})
    return st.builds(lambda case, change: {**case, **change}, cases(subject.tiny, 1), changes)


PROPERTIES = (
    Property(10, "memory formats agree and are kept", memory_formats, cases=_mild),
    Property(16, "shift invariance", shift_invariance, cases=_mild),
    Property(16, "scale invariance", scale_invariance, cases=_mild),
    Property(16, "LayerNorm and InstanceNorm", layer_and_instance_norm, cases=_mild),
    Property(16, "channels in any order", channels_in_any_order, cases=_mild),
    Property(16, "a group's gradient sums to 0", gradient_sums_to_zero, cases=_mild),
    Property(17, "fusions equal their composition", fusions, cases=_mild),
)
