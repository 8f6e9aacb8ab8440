"""GEGLU, alone and with its linear layer: ldmkit's kernels against plain torch and torch.compile, on a CPU or a GPU.

This is the evidence behind the automatic choice (choice.json of ldmkit/kernels/geglu and geglu_linear): for every shape
the last column tells whether that choice was right. It depends on the instruction set: ATEN_CPU_CAPABILITY=avx2 measures what a
machine without AVX-512 does.

The backward of `geglu_linear` has the layer's output kept, or computes it anew (RECOMPUTED of its op.py says which); the choice
that was not made runs beside it.

`geglu` also runs beside a copy of as many bytes as it has to move, `geglu_linear` beside its matrix product alone: the ratio
of that over ours is the share of the memory's, or the product's, measured speed. On a GPU the targets for an H200 are printed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from benchmarks import common
from benchmarks.common import Run, Spread, ratio
from benchmarks.gpu.timing import require_device
from ldmkit.kernels import geglu, geglu_linear
from ldmkit.kernels.backends import automatic, implementations
from ldmkit.kernels.geglu_linear.op import RECOMPUTED

Op = Callable[..., Tensor]

SHAPES = {
    "SD1.5, 512x512": [(2, 4096, 320), (2, 1024, 640), (2, 256, 1280), (2, 64, 1280)],
    "SDXL, 1024x1024": [(2, 4096, 640), (2, 1024, 1280)],
}
"""Inputs (B, tokens, C) of the feed-forwards in a guided step (B = 2), from the finest level to the coarsest; N = 4 C."""
QUICK_SHAPES = {"tiny": [(2, 16, 16), (2, 4, 32)]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("forward", "forward+backward")
COMPILED = "torch.compile"
H200_TARGETS = """Targets on an H200:
  geglu: forward at 0.93 of a copy's speed or more, backward at 0.90; SDXL's 2x4096x2560 outputs in bf16 in 32 us or less;
  geglu_linear: 0.80 of the matrix product's rate in bf16 or more; SDXL's 8192x640 -> 5120, gated, in 85 us or less."""


def plain_geglu(x: Tensor) -> Tensor:
    """What torch.compile is given."""
    value, gate = x.chunk(2, dim=-1)
    return value * gelu(gate)


def plain_geglu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What torch.compile is given."""
    return plain_geglu(linear(x, weight, bias))


OPS: dict[str, tuple[Op, Op]] = {"geglu": (geglu, plain_geglu), "geglu_linear": (geglu_linear, plain_geglu_linear)}


def inputs(op: str, shape: Sequence[int], dtype: torch.dtype, device: str) -> list[Tensor]:
    """The feed-forward's own: x, or x, weight and bias."""
    generator = torch.Generator().manual_seed(0)
    *lead, channels = shape
    sizes = [(*lead, 8 * channels)] if op == "geglu" else [tuple(shape), (8 * channels, channels), (8 * channels,)]
    return [(torch.randn(size, generator=generator) * channels ** (-0.5 * i)).to(device, dtype) for i, size in enumerate(sizes)]


def backends(op: str, device: str) -> list[str]:
    """What can run here: plain torch last."""
    found = [
        name
        for name, implementation in implementations(op).items()
        if implementation.device == device and implementation.missing is None
    ]
    return [*found, "reference"]


def calls(op: str, tensors: list[Tensor], direction: str, *, compiled: bool) -> dict[str, Run]:
    """What is timed, by name; all on the same inputs."""
    ours, plain = OPS[op]
    ops: dict[str, Op] = {
        name: lambda *tensors, name=name: ours(*tensors, backend=name) for name in backends(op, tensors[0].device.type)
    }
    ops["reference"] = plain
    if compiled:
        torch.compiler.reset()  # one specialised graph per shape, and no limit on how many
        ops[COMPILED] = torch.compile(plain, fullgraph=True, dynamic=False)
    make = _forward if direction == "forward" else _forward_and_backward
    return {name: make(function, tensors) for name, function in ops.items()}


def _forward(op: Op, tensors: list[Tensor]) -> Run:
    def run() -> None:
        with torch.no_grad():
            op(*tensors)

    return run


def _forward_and_backward(op: Op, tensors: list[Tensor]) -> Run:
    tensors = [t.detach().requires_grad_() for t in tensors]
    grad = torch.ones_like(op(*tensors))
    return lambda: torch.autograd.grad(op(*tensors), tensors, grad)


def other_way(op: str, tensors: list[Tensor], direction: str) -> dict[str, Run]:
    """The backward of `geglu_linear` that computes the layer's output anew where it would be kept, or keeps it otherwise."""
    x = tensors[0]
    names = backends(op, x.device.type)[:-1]
    if op != "geglu_linear" or direction == "forward":
        return {}
    kept = x.shape[-1] > RECOMPUTED[x.device.type]

    def turned(run: Run) -> Run:
        def turn() -> None:
            before = RECOMPUTED[x.device.type]
            RECOMPUTED[x.device.type] = x.shape[-1] if kept else 0
            try:
                run()
            finally:
                RECOMPUTED[x.device.type] = before

        return turn

    runs = calls(op, tensors, direction, compiled=False)
    return {f"{name}, {'computed anew' if kept else 'kept'}": turned(runs[name]) for name in names}


def least(op: str, tensors: list[Tensor], direction: str) -> dict[str, Run]:
    """What no implementation can do without: a copy that moves its bytes, or its matrix products."""
    x, *weights = tensors
    forward = direction == "forward"
    if op == "geglu":  # halves of x moved: value, gate and y; and gradient, value, gate and both their gradients
        halves = 3 if forward else 8
        target = torch.empty(halves * x.numel() // 4, dtype=x.dtype, device=x.device)
        source = torch.zeros_like(target)
        return {"copy": lambda: target.copy_(source)}
    x_RK, weight = x.flatten(0, -2), weights[0]
    hidden_RM = torch.zeros(x_RK.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)

    def products() -> None:
        torch.mm(x_RK, weight.T, out=hidden_RM)
        if not forward:
            hidden_RM @ weight
            hidden_RM.T @ x_RK

    return {"product": products}


def clock_of(device: str) -> Callable[[], float]:
    """One that waits until the device is done."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    return now


def measure(
    op: str,
    family: str,
    shape: Sequence[int],
    dtype: torch.dtype,
    direction: str,
    *,
    device: str,
    compiled: bool,
    timing: dict[str, Any],
) -> dict[str, Any]:
    """One case, as it goes to the JSON."""
    tensors = inputs(op, shape, dtype, device)
    runs = calls(op, tensors, direction, compiled=compiled)
    runs |= other_way(op, tensors, direction) | least(op, tensors, direction)
    times = common.interleave(runs, clock=clock_of(device), **timing)
    features = {"N": 4 * shape[-1]} | ({} if op == "geglu" else {"K": shape[-1]})
    arguments = tensors if op == "geglu" else [*tensors, False]
    choice, rivals = automatic(op, arguments, features).backend, backends(op, device)
    ours = rivals[0] if choice == "reference" else choice
    return {
        "case": {
            "op": op,
            "model": family,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "direction": direction,
            "device": device,
        },
        "seconds": {name: Spread.of(samples) for name, samples in times.items()},
        "ratios": {f"{name}/{ours}": ratio(times, peer=name, ours=ours) for name in times if name != ours},
        "automatic": choice,
        "choice": common.judge(times, choice, rivals),
    }


def summarise(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the shapes, per op, dtype and direction: geometric means and the least of the ratios, and how the choices fared."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for case in cases:
        key = case["case"]["op"], case["case"]["dtype"], case["case"]["direction"]
        groups.setdefault(key, []).append(case)
    return [
        {
            "op": op,
            "dtype": dtype,
            "direction": direction,
            "choices": [f"{case['automatic']}: {case['choice']}" for case in group],
            **common.over_cases(group),
        }
        for (op, dtype, direction), group in groups.items()
    ]


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    """A table for people, one line a case, and the means below it."""
    head = ["op", "shape", "dtype", "direction", "ms", "ratios", "automatic", "choice"]
    rows = [
        [
            case["case"]["op"],
            "x".join(map(str, case["case"]["shape"])),
            case["case"]["dtype"],
            case["case"]["direction"],
            ", ".join(f"{name} {spread.text(3, 1e3)}" for name, spread in case["seconds"].items()),
            ", ".join(f"{peer} {spread.median:.2f}" for peer, spread in case["ratios"].items()),
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
        print(f"{group['op']} {group['dtype']} {group['direction']}, geometric means: {ratios} ({', '.join(group['choices'])})")


def main() -> None:
    """Measure, print, write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    arguments = parser.parse_args()
    chosen, record, device = common.options(arguments), common.environment(), arguments.device
    if device == "cuda":
        require_device()
        record["cpu"] = torch.cuda.get_device_name()  # the file is named after what was measured
    left_out = "--without-compile was given" if arguments.without_compile else common.no_compiler(device)
    cases = [
        measure(op, family, shape, dtype, direction, device=device, compiled=left_out is None, timing=chosen.timing_of_many)
        for op in OPS
        for family, shapes in (QUICK_SHAPES if chosen.quick else SHAPES).items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
        if (op, dtype, device) != ("geglu_linear", torch.float16, "cpu") or direction == "forward"  # plain torch takes seconds
    ]
    groups = summarise(cases)
    show(record, cases, groups)
    if device == "cuda":
        print(H200_TARGETS)
    if left_out:
        print(f"without torch.compile: {left_out}")
    summary = {"without_torch_compile": left_out, "groups": groups}
    timing = chosen.timing_of_many
    common.report("geglu", __doc__ or "", chosen, record, cases=cases, summary=summary, timing=timing)


if __name__ == "__main__":
    main()
