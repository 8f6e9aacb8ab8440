"""Attention in the contract: its problems, and what is true of it alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import LIMIT, Case, Op, Problem, Property, Results, Subject, Trial, largest
from ldmkit.testing.contract.tensors import DTYPES, dtype_of, dtypes, layouts, low_dtypes, randn, seeds, strided

INF = float("inf")
PLAIN_CASE: Case = {
    "batch": 2, "heads": 2, "queries": 5, "keys": 7, "dim": 8, "dtype": "float32", "layout": "BLHD", "mask": None,
    "additive": False, "kept": 0.7, "scale": None, "spread": 1.0, "lse": True, "seed": 0,
}  # fmt: skip
MASKS = ("keys", "full", "heads", "queries", "one")
MODELS = {"SD1": (8, (40, 80, 160)), "SD2": (5, (64,)), "SDXL": (10, (64,)), "VAE": (1, (512,))}
"""Heads and head dimensions; SD2 and SDXL have more heads further down, of the same size."""


def cases(tiny: bool, least: int) -> st.SearchStrategy[dict[str, Any]]:
    """Few queries and keys, all kinds of masks."""
    most = 6 if tiny else 20
    return st.fixed_dictionaries(
        {
            "batch": st.integers(least, 2),
            "heads": st.integers(1, 2 if tiny else 3),
            "queries": st.integers(1, most) | st.just(17),
            "keys": st.integers(0, most) | st.sampled_from([17, 33]),
            "dim": st.sampled_from([8, 16, 40] if tiny else [8, 1, 3, 16, 32, 40, 64, 72, 80]),
            "dtype": dtypes,
            "layout": st.just("BLHD") | layouts,
            "mask": st.sampled_from([None, *MASKS]),
            "additive": st.booleans(),
            "kept": st.sampled_from([0.7, 0.2, 0.0]),
            "scale": st.sampled_from([None, 0.3]),
            "spread": st.sampled_from([1.0, 5.0]),
            "lse": st.booleans(),
            "seed": seeds,
        }
    )


def build(
    device: str,
    *,
    batch: int,
    heads: int,
    queries: int,
    keys: int,
    dim: int,
    dtype: str,
    layout: str,
    mask: str | None,
    additive: bool,
    kept: float,
    scale: float | None,
    spread: float,
    lse: bool,
    seed: int,
) -> Problem:
    """q of size `spread`; of the mask's entries a share of `kept` lets see. Gradients come back to all outputs asked for."""
    kind = dtype_of(dtype)
    shapes = {"q": (batch, heads, queries, dim), "k": (batch, heads, keys, dim), "v": (batch, heads, keys, dim)}
    tensors = {
        name: strided(randn(shape, seed + i, kind, device, scale=spread if name == "q" else 1.0), layout)
        for i, (name, shape) in enumerate(shapes.items())
    }
    options: dict[str, Any] = {"scale": scale, **({"return_lse": True} if lse else {})}
    if mask is not None:
        sizes = {"keys": (batch, keys), "full": (batch, heads, queries, keys), "heads": (1, heads, 1, keys)}
        sizes |= {"queries": (batch, 1, queries, keys), "one": (1, 1, 1, keys)}
        seen = torch.rand(sizes[mask], generator=torch.Generator().manual_seed(seed + 3)).to(device) < kept
        options["mask"] = randn(sizes[mask], seed + 4, kind, device).masked_fill(~seen, -INF) if additive else seen
    grads = [strided(randn(shapes["q"], seed + 5, kind, device), layout)]
    if lse:
        wide = torch.promote_types(kind, torch.float32)
        grads.append(randn(shapes["q"][:3], seed + 6, wide, device))
    return Problem(tensors, options, tuple(grads))


def corners(tiny: bool) -> list[Case]:
    """No keys, one, all residues of key counts; the models' heads and dimensions, and others; long rows of keys."""
    keys = [0, 1, 2, 15, 16, 17, 31, 32, 33, 77] if tiny else [*range(34), 63, 64, 65, 77, 127, 128, 129, 154, 160]
    some = [{"keys": s, "heads": 1, "batch": 1} for s in keys]
    dims = (40, 80, 160) if tiny else (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
    some += [{"dim": dim, "heads": 1, "batch": 1, "keys": 9 if tiny else 77} for dim in dims]
    if not tiny:
        some += [{"heads": heads, "dim": dim, "keys": 77, "queries": 64} for heads, all_ in MODELS.values() for dim in all_]
    some += [{"keys": 300 if tiny else 1100, "queries": 40 if tiny else 150, "heads": 1, "batch": 1, "dim": 40}]
    some += [{"batch": 0}, {"queries": 0}]
    every = [{**PLAIN_CASE, "dtype": DTYPES[i % 3], **case} for i, case in enumerate(some)]
    return [*every, *({**case, "mask": "keys"} for case in every[1::3]), *({**case, "mask": "full"} for case in every[2::4])]


def thorough_corners() -> list[Case]:
    """Every number of keys from 1 to 160, and every dimension with 4096 keys."""
    counts = [{"keys": s, "heads": 1, "batch": 1, "dim": (40, 64, 80)[s % 3]} for s in range(1, 161)]
    long = [{"keys": 4096, "queries": 33, "heads": 1, "batch": 1, "dim": dim} for dim in (40, 64, 80, 128)]
    return [{**PLAIN_CASE, "dtype": DTYPES[i % 3], **case} for i, case in enumerate([*counts, *long])]


def extremes() -> list[Case]:
    """Scores past the range of exp, to 1e37; subnormal ones."""
    numbers = {"float16": (1e3, 1e-7), "bfloat16": (1e3, 1e30, 1e-30), "float32": (1e3, 1e18, 1e36, 1e-39)}
    return [{**PLAIN_CASE, "dtype": dtype, "spread": spread} for dtype, all_ in numbers.items() for spread in all_]


def large(tiny: bool) -> list[Case]:
    """More queries and keys than one tile has, and keys that one pass holds."""
    sizes = [(20, 77), (20, 150)] if tiny else [(70, 77), (150, 600)]
    return [
        {**PLAIN_CASE, "heads": 1, "queries": queries, "keys": keys, "dim": 40, "mask": "keys", "dtype": dtype}
        for (queries, keys), dtype in zip(sizes, ("bfloat16", "float32"), strict=True)
    ]


def many() -> Case:
    return {**PLAIN_CASE, "batch": 8, "heads": 12, "queries": 4, "keys": 9, "dim": 16}


def poisoned(problem: Problem, value: float, seed: int) -> tuple[Problem, Mapping[str, Tensor]]:
    """One element of q may reach its own row and the keys of its head; one of k or v, its head."""
    name = ("q", "k", "v")[seed % 3]
    if not problem.tensors[name].numel():
        name = "q"
    hit = problem.tensors[name].clone()
    b, h, row = seed % hit.shape[0], seed % hit.shape[1], seed % hit.shape[2]
    hit[b, h, row, seed % hit.shape[3]] = value
    heads = torch.ones(hit.shape[:2], dtype=torch.bool, device=hit.device)
    heads[b, h] = False
    rows = heads[..., None].expand(*problem.tensors["q"].shape[:3]).clone()
    if name == "q":
        rows[b, h] = True
        rows[b, h, row] = False
    masks = {"out": rows[..., None], "lse": rows, "gradient of q": rows[..., None]}
    masks |= {f"gradient of {other}": heads[..., None, None] for other in "kv"}
    return replace(problem, tensors={**problem.tensors, name: hit}), masks


def mistakes(device: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
    q, k = torch.zeros(2, 3, 5, 8, device=device), torch.zeros(2, 3, 7, 8, device=device)
    yield "three dimensions", {"q": q[0], "k": k[0], "v": k[0]}
    yield "another head dimension", {"q": q, "k": k[..., :4], "v": k[..., :4]}
    yield "another batch", {"q": q, "k": k[:1], "v": k[:1]}
    yield "other values than keys", {"q": q, "k": k, "v": k[:, :, :6]}
    yield "another dtype", {"q": q, "k": k.double(), "v": k}
    yield "whole numbers", {"q": q.long(), "k": k.long(), "v": k.long()}
    yield "a mask of another length", {"q": q, "k": k, "v": k, "mask": torch.ones(2, 6, dtype=torch.bool, device=device)}
    yield "a mask of three dimensions", {"q": q, "k": k, "v": k, "mask": torch.ones(2, 5, 7, dtype=torch.bool, device=device)}
    yield "a mask of whole numbers", {"q": q, "k": k, "v": k, "mask": torch.ones(2, 7, dtype=torch.int64, device=device)}
    yield "a mask of another dtype", {"q": q, "k": k, "v": k, "mask": torch.ones(2, 7, dtype=torch.float64, device=device)}
    yield "keys elsewhere", {"q": q, "k": k.to("meta"), "v": k}


def raw(problem: Problem) -> tuple[Any, ...]:
    mask = problem.options.get("mask")
    mask = mask[:, None, None, :] if mask is not None and mask.dim() == 2 else mask
    scale = problem.options.get("scale")
    q = problem.tensors["q"]
    return (q, problem.tensors["k"], problem.tensors["v"], mask, q.shape[-1] ** -0.5 if scale is None else scale)


def sizes(problem: Problem, exact: Results) -> dict[str, tuple[float, float]]:
    """What is rounded on the way (Dao et al. 2022, arXiv:2205.14135, appendix B.4), beside the results themselves.

    Once, by up to half a rounding, to the inputs' dtype: the weights P, dScores, and the saved output, whose rowsum(dOut Out)
    is what dP has to cancel. Rounding of scores, in fp32, shows in all weights.
    """
    q, k, v = (problem.tensors[name].nan_to_num(0.0, 0.0, 0.0) for name in "qkv")
    scale = problem.options.get("scale")
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    mask = _full_mask(problem)
    hidden = ~(mask > -INF).any(dim=2)[..., None]
    k, v, grad = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0), problem.grads[0]
    scores = q @ k.mT * factor + mask
    weights = scores.softmax(dim=-1).nan_to_num(0.0)
    of_scores = (q.abs() @ k.abs().mT * factor + mask.where(mask > -INF, 0.0).abs()).where(weights > 0, 0.0)
    kappa = 1 + largest(of_scores)
    dp = grad @ v.mT
    delta = (weights * dp).sum(-1, keepdim=True)
    steps = weights * (grad.abs() @ v.abs().mT + delta.abs()) * factor
    half = 1 / (2 * LIMIT)
    ds = half * (weights * (dp - delta) * factor).abs()
    cancelling = weights * torch.maximum(delta.abs(), half * (grad * exact["out"]).abs().sum(-1, keepdim=True)) * factor
    rounded = {
        "out": (half * weights @ v.abs(),),
        "gradient of q": (cancelling @ k, ds @ k.abs()),
        "gradient of k": (cancelling.mT @ q.abs(), ds.mT @ q.abs()),
        "gradient of v": (half * weights.mT @ grad.abs(),),
    }
    summed = {
        "out": weights @ v.abs(),
        "gradient of q": steps @ k.abs(),
        "gradient of k": steps.mT @ q.abs(),
        "gradient of v": weights.mT @ grad.abs(),
    }
    of = {name: (max(largest(exact[name]), *map(largest, rounded[name])), kappa * largest(summed[name])) for name in rounded}
    return {**of, "lse": (0.0, kappa)}


OP = Op(
    name="cross_attention",
    outputs=("out", "lse"),
    batched=("q", "k", "v", "mask"),
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


def softmax_shift_invariance(t: Trial) -> None:
    """The same number added to all scores of a query changes nothing, but its log-sum-exp by that number."""
    mask = _full_mask(t.problem)
    seen = mask > -INF
    flat, moved = (_with_mask(t.problem, seen.to(mask.dtype).log() + shift) for shift in (0.0, 2.0))
    judge, got, want = t.judge(moved), t.results(moved), t.results(flat)
    if "lse" in want:
        want["lse"] = want["lse"] + 2.0
    judge.check_close(got, want, "with 2 added to all scores")


def keys_in_any_order(t: Trial) -> None:
    """Permuting keys, values and mask together changes nothing."""
    order = torch.arange(t.problem.tensors["k"].shape[2], device=t.subject.device).flip(0)
    tensors = {name: s if name == "q" else s[:, :, order] for name, s in t.problem.tensors.items()}
    problem = replace(t.problem, tensors=tensors)
    if (mask := t.problem.options.get("mask")) is not None:
        problem = _with_mask(problem, mask[..., order])
    got = {name: r[:, :, order] if name[-1] in "kv" else r for name, r in t.results(problem).items()}
    t.judge().check_close(got, t.results(), "with the keys in reverse")


def inside_the_hull(t: Trial) -> None:
    """Each number of the output lies between the least and the greatest of the values (or 0, without keys)."""
    v = t.problem.tensors["v"]
    if not v.numel():
        return
    (out, *_) = t.outputs()
    slack = LIMIT * t.judge().allowed("out")
    low, high = (bound.clamp(max=0) if low else bound.clamp(min=0) for low, bound in ((1, v.amin(2)), (0, v.amax(2))))
    outside = torch.maximum(low[:, :, None].double() - out.double(), out.double() - high[:, :, None].double())
    assert largest(outside.clamp(min=0)) <= slack, f"{largest(outside.clamp(min=0)):.3g} outside the hull of the values"


def merged_contexts(t: Trial) -> None:
    """Attention over two parts of the keys, merged by log-sum-exp, is attention over all."""
    problem = replace(t.problem, options={**t.problem.options, "return_lse": True})
    out, lse = t.outputs(problem)
    half = t.problem.tensors["k"].shape[2] // 2
    parts = []
    for part in (slice(0, half), slice(half, None)):
        tensors = {name: s if name == "q" else s[:, :, part] for name, s in problem.tensors.items()}
        cut = replace(problem, tensors=tensors)
        if (mask := problem.options.get("mask")) is not None:
            cut = _with_mask(cut, mask[..., part])
        parts.append(t.outputs(cut))
    total = torch.logaddexp(parts[0][1].double(), parts[1][1].double())
    shares = [(part_lse.double() - total).exp().nan_to_num()[..., None] for _, part_lse in parts]
    merged = sum((share * part_out.double() for share, (part_out, _) in zip(shares, parts, strict=True)), torch.zeros(()))
    judge = t.judge(replace(problem, grads=_grads(problem)))
    dead = lse == -INF
    assert torch.equal(dead, total == -INF), "lse: a query without keys has -inf, others have a number"
    got = {"out": out, "lse": lse.masked_fill(dead, 0.0)}
    judge.check_close(got, {"out": merged, "lse": total.masked_fill(dead, 0.0)}, "whole, against two parts merged")


def hidden_keys(t: Trial) -> None:
    """Keys that nobody may see change nothing, NaN in them too; finite keys that some may not see change nothing to those."""
    k = t.problem.tensors["k"]
    if k.shape[2] < 2:
        return
    nobody = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    nobody[:, ::2] = False
    additive = torch.zeros(nobody.shape, dtype=k.dtype, device=k.device).masked_fill(~nobody, -INF)
    for mask in (nobody, additive):
        problem = _with_mask(t.problem, mask)
        want = t.results(problem)
        for other in (3.0, float("nan"), INF):
            tensors = dict(t.problem.tensors)
            tensors |= {name: tensors[name].masked_fill(~nobody[:, None, :, None], other) for name in "kv"}
            t.check_same(t.results(replace(problem, tensors=tensors)), want, f"with {other} in keys that nobody sees")
    some = torch.ones(1, 1, t.problem.tensors["q"].shape[2], k.shape[2], dtype=torch.bool, device=k.device)
    some[:, :, ::2, ::2] = False
    problem = _with_mask(t.problem, some)
    changed = {n: s if n == "q" else s.clone() for n, s in t.problem.tensors.items()}
    for name in "kv":
        changed[name][:, :, ::2] = -7.0
    (out, *_), (same, *_) = t.outputs(problem), t.outputs(replace(problem, tensors=changed))
    t.check_same({"out": same[:, :, ::2]}, {"out": out[:, :, ::2]}, "with other keys that this query may not see")


def rows_without_keys(t: Trial) -> None:
    """A query that may see no key gives 0, and gets and gives gradient 0."""
    B, H, L, _ = t.problem.tensors["q"].shape
    S = t.problem.tensors["k"].shape[2]
    mask = torch.ones(B, 1, L, S, dtype=torch.bool, device=t.subject.device)
    mask[:, :, ::2] = False
    mask[-1] = False
    dead = ~mask.any(-1).expand(B, H, L)
    for kind in (mask, torch.zeros(mask.shape, dtype=t.problem.dtype, device=mask.device).masked_fill(~mask, -INF)):
        results = t.results(_with_mask(t.problem, kind))
        for name in ("out", "gradient of q"):
            assert not results[name][dead].any(), f"{name} of a query without keys is not 0"
        for name in ("gradient of k", "gradient of v"):
            assert not results[name][-1].any(), f"{name} of keys that nobody sees is not 0"
        if "lse" in results:
            assert (results["lse"][dead] == -INF).all(), "lse of a query without keys is not -inf"


def far_scores(t: Trial) -> None:
    """Scores past +-88, where exp leaves single precision, and rows in which one key outweighs the others."""
    for spread in (-30.0, 30.0, 100.0):
        problem = t.build(spread=spread, scale=None)
        t.check_bound(t.results(problem), problem)


def _full_mask(problem: Problem) -> Tensor:
    """The mask as an additive one of (B, H, L, S)."""
    q, k = problem.tensors["q"], problem.tensors["k"]
    mask = problem.options.get("mask")
    if mask is None:
        mask = torch.zeros((), dtype=q.dtype, device=q.device)
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(~mask, -INF)
    mask = mask[:, None, None, :] if mask.dim() == 2 else mask
    return mask.expand(*q.shape[:3], k.shape[2])


def _with_mask(problem: Problem, mask: Tensor) -> Problem:
    return replace(problem, options={**problem.options, "mask": mask})


def _grads(problem: Problem) -> tuple[Tensor, ...]:
    """Incoming gradients for both outputs."""
    q = problem.tensors["q"]
    zeros = torch.zeros(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    return (problem.grads[0], zeros)


def _seen(subject: Subject) -> st.SearchStrategy[dict[str, Any]]:
    """Cases in the lower dtypes."""
    changes = st.fixed_dictionaries({"dtype": low_dtypes, "spread": st.just(1.0)})
    return st.builds(lambda case, change: {**case, **change}, cases(subject.tiny, 1), changes)


PROPERTIES = (
    Property(18, "softmax shift invariance", softmax_shift_invariance, cases=_seen),
    Property(18, "keys in any order", keys_in_any_order, cases=_seen),
    Property(18, "inside the hull of the values", inside_the_hull, cases=_seen),
    Property(18, "contexts merge by log-sum-exp", merged_contexts, cases=_seen),
    Property(18, "scores past +-88", far_scores, cases=_seen),
    Property(18, "hidden keys change nothing", hidden_keys, cases=_seen),
    Property(18, "rows without keys are 0", rows_without_keys, cases=_seen),
)
