"""Attention on a CPU: the C++ kernel against torch's scaled_dot_product_attention, eager and through torch.compile.

This is the evidence behind the automatic choice (ldmkit/kernels/cross_attention/choice.json): for every shape the last column
tells whether that choice was right. It depends on the instruction set: ATEN_CPU_CAPABILITY=avx2 measures what a machine without
AVX-512 does (torch's matrix library goes on using it). `--threads 1` and `--threads 2` are two results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, ratio
from ldmkit.kernels import cross_attention
from ldmkit.kernels.backends import automatic

SHAPES = {
    "cross-attention, SD1.5": [(2, 8, 4096, 77, 40), (2, 8, 1024, 77, 80), (2, 8, 256, 77, 160), (2, 8, 64, 77, 160)],
    "cross-attention, SDXL": [(2, 10, 4096, 77, 64), (2, 20, 1024, 77, 64)],
    "self-attention, SD1.5": [(2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80), (2, 8, 256, 256, 160), (2, 8, 64, 64, 160)],
    "self-attention, SDXL": [(2, 10, 4096, 4096, 64), (2, 20, 1024, 1024, 64)],
    "decoder": [(1, 1, 1024, 1024, 512)],
    "small": [(1, 8, 1, 77, 64), (1, 1, 16, 16, 8), (1, 8, 256, 1, 64), (2, 8, 16, 77, 160), (2, 8, 77, 77, 64)],
}
"""(B, H, L, S, D) of a guided step (B = 2), and shapes where a call's own cost counts."""
QUICK_SHAPES = {"tiny": [(1, 2, 16, 77, 8), (1, 2, 16, 16, 8)]}
DTYPES = (torch.float32, torch.bfloat16)
DIRECTIONS = ("forward", "forward+backward")
OURS, REFERENCE, PEER, COMPILED = "cpu", "reference", "sdpa", "torch.compile"
"""`reference` is the same SDPA behind ldmkit's own checks: what the automatic choice may fall on."""


def inputs(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the incoming gradient, views of (B, L, H, D) as a network has them."""
    B, H, L, S, D = shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, rows, H, D, generator=generator).to(dtype).transpose(1, 2) for rows in (L, S, S, L)]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What torch.compile is given."""
    return F.scaled_dot_product_attention(q, k, v)


def calls(tensors: Sequence[Tensor], direction: str, *, compiled: bool) -> dict[str, Run]:
    """What is timed, by name; all on the same inputs."""
    ops: dict[str, Callable[..., Tensor]] = {
        OURS: lambda q, k, v: cross_attention(q, k, v, backend=OURS),
        REFERENCE: lambda q, k, v: cross_attention(q, k, v, backend=REFERENCE),
        PEER: plain,
    }
    if compiled:
        torch.compiler.reset()  # one specialised graph per shape, and no limit on how many
        ops[COMPILED] = torch.compile(plain, fullgraph=True, dynamic=False)
    make = _forward if direction == "forward" else _forward_and_backward
    return {name: make(op, *tensors) for name, op in ops.items()}


def _forward(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            op(q, k, v)

    return run


def _forward_and_backward(op: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> Run:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return lambda: torch.autograd.grad(op(*leaves), leaves, grad)


def choice_for(tensors: Sequence[Tensor], direction: str) -> str:
    """What runs where no backend is forced."""
    q, k, v = (t.detach().requires_grad_(direction != "forward") for t in tensors[:3])
    features = {"H": q.shape[1], "L": q.shape[2], "S": k.shape[2], "D": q.shape[3], "mask": 0}
    return automatic("cross_attention", (q, k, v, None, q.shape[-1] ** -0.5), features).backend


def measure(
    kind: str, shape: Sequence[int], dtype: torch.dtype, direction: str, *, compiled: bool, timing: dict[str, Any]
) -> dict[str, Any]:
    """One case, as it goes to the JSON."""
    tensors = inputs(shape, dtype)
    times = common.interleave(calls(tensors, direction, compiled=compiled), **timing)
    chosen, seconds = choice_for(tensors, direction), {name: Spread.of(samples) for name, samples in times.items()}
    B, H, L, S, D = shape
    products = 2 if direction == "forward" else 7  # of (L, D) by (D, S); the backward pass computes the scores again
    return {
        "case": {"kind": kind, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "direction": direction},
        "seconds": seconds,
        "ratios": {f"{name}/{OURS}": ratio(times, peer=name, ours=OURS) for name in times if name != OURS},
        "gflops": {name: 2e-9 * products * B * H * L * S * D / spread.median for name, spread in seconds.items()},
        "automatic": chosen,
        "choice": common.judge(times, chosen, (OURS, REFERENCE)),
    }


def summarise(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of attention, dtype and direction: geometric means and the least of the ratios, and how the choices fared."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in cases:
        key = case["case"]["kind"].split(",")[0], case["case"]["dtype"], case["case"]["direction"]
        groups.setdefault(key, []).append(case)
    return [
        {
            "kind": kind,
            "dtype": dtype,
            "direction": direction,
            "choices": [f"{case['automatic']}: {case['choice']}" for case in group],
            **common.over_cases(group),
        }
        for (kind, dtype, direction), group in groups.items()
    ]


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    """The table for people, and the means below it."""
    names, peers = list(cases[0]["seconds"]), list(cases[0]["ratios"])
    head = [
        "B x H x L x S x D",
        "dtype",
        "direction",
        *(f"{name}, ms" for name in names),
        "GFLOP/s",
        *peers,
        "automatic",
        "choice",
    ]
    rows = [
        [
            "x".join(map(str, case["case"]["shape"])),
            case["case"]["dtype"],
            case["case"]["direction"],
            *(case["seconds"][name].text(3, 1e3) for name in names),
            f"{case['gflops'][OURS]:.0f}",
            *(case["ratios"][peer].text() for peer in peers),
            case["automatic"],
            case["choice"],
        ]
        for case in cases
    ]
    common.print_table(record, head, rows)
    print()
    for group in summary:
        ratios = ", ".join(
            f"{peer} {mean:.2f} (least {group['least'][peer]:.2f})" for peer, mean in group["geometric_mean"].items()
        )
        print(
            f"{group['kind']} {group['dtype']} {group['direction']}, geometric means: {ratios} ({', '.join(group['choices'])})"
        )


def main() -> None:
    """Measure, print, write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    chosen, record = common.options(arguments), common.environment()
    left_out = "--without-compile was given" if arguments.without_compile else common.no_compiler()
    cases = [
        measure(kind, shape, dtype, direction, compiled=left_out is None, timing=chosen.timing_of_many)
        for kind, shapes in (QUICK_SHAPES if chosen.quick else SHAPES).items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]
    groups = summarise(cases)
    show(record, cases, groups)
    if left_out:
        print(f"without torch.compile: {left_out}")
    summary = {"without_torch_compile": left_out, "groups": groups}
    timing = chosen.timing_of_many
    common.report("cross_attention", __doc__ or "", chosen, record, cases=cases, summary=summary, timing=timing)


if __name__ == "__main__":
    main()
