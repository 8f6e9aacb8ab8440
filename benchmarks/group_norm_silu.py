"""GroupNorm with SiLU: the fused kernels against plain torch, torch.compile of it, and a copy of the same tensors.

On a CPU (the default), over the group norms of Stable Diffusion 1.5's and XL's U-Nets and of their decoder: the evidence
behind the automatic choice (ldmkit/kernels/group_norm_silu/choice.json). torch.compile, which takes seconds a graph, runs
beside every third shape. With --gpu, on a CUDA device: the backends `cuda` and `triton` inside a CUDA graph, and whether they
reach the lines drawn for an H200.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, ratio
from benchmarks.gpu.timing import require_device
from ldmkit.kernels import group_norm_silu

GROUPS = 32
UNET_SD15 = [
    *((c, 64) for c in (320, 640, 960)),
    *((c, 32) for c in (320, 640, 960, 1280, 1920)),
    *((c, 16) for c in (640, 1280, 1920, 2560)),
    *((c, 8) for c in (1280, 2560)),
]
UNET_SDXL = [
    *((c, 128) for c in (320, 640, 960)),
    *((c, 64) for c in (320, 640, 960, 1280, 1920)),
    *((c, 32) for c in (640, 1280, 1920, 2560)),
]
DECODER = [(512, 64), (512, 128), (512, 256), (256, 256), (256, 512), (128, 512)]
SHAPES = {
    "SD1.5 U-Net, 512x512": [(2, c, size, size) for c, size in UNET_SD15],
    "SDXL U-Net, 1024x1024": [(2, c, size, size) for c, size in UNET_SDXL],
    "decoder, 512x512": [(1, c, size, size) for c, size in DECODER],
}
"""Every distinct (N, C, H, W) that a norm followed by SiLU sees; a guided step has two images."""
QUICK_SHAPES = {"tiny": [(2, 64, 8, 8), (1, 32, 16, 16)]}
GPU_SHAPES = {
    "decoder, 1024x1024": [(1, 128, 1024, 1024), (1, 256, 1024, 1024), (1, 256, 512, 512), (1, 512, 256, 256)],
    "SDXL U-Net, 1024x1024": [(2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32)],
    "SD1.5 U-Net, 512x512": [(2, 320, 64, 64), (2, 1280, 16, 16), (2, 1280, 8, 8)],
}
DIRECTIONS = ("forward", "forward+backward")
COMPILED_EVERY = 3
"""torch.compile runs beside every so many shapes."""
COPY, PLAIN, COMPILED = "copy", "plain", "torch.compile"


def plain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What the kernels replace, and what torch.compile is given."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def operands(shape: Sequence[int], dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """x, weight, bias, and the incoming gradient."""
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, shape[1:2], shape[1:2], shape)
    return tuple(torch.randn(*size, generator=generator).to(device, dtype) for size in sizes)


def ops(backends: Sequence[str], *, compiled: bool) -> dict[str, Callable[..., Tensor]]:
    """What is timed, by name."""
    found: dict[str, Callable[..., Tensor]] = {
        name: lambda x, w, b, name=name: group_norm_silu(x, GROUPS, w, b, backend=name) for name in backends
    }
    found[PLAIN] = plain
    if compiled:
        torch.compiler.reset()  # one specialised graph per shape, and no limit on how many
        found[COMPILED] = torch.compile(plain, fullgraph=True, dynamic=False)
    return found


def runs(direction: str, inputs: tuple[Tensor, ...], found: Mapping[str, Callable[..., Tensor]]) -> dict[str, Run]:
    """The calls, on the same tensors, and a copy of x."""
    x, weight, bias, grad = inputs

    def forward(op: Callable[..., Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad():
                op(x, weight, bias)

        return run

    def forward_and_backward(op: Callable[..., Tensor]) -> Run:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        return lambda: torch.autograd.grad(op(*leaves), leaves, grad)

    make = forward if direction == "forward" else forward_and_backward
    target = torch.empty_like(x)
    return {**{name: make(op) for name, op in found.items()}, COPY: lambda: target.copy_(x)}


# ----------------------------------------------------------------------------------------------------------------------- CPU


def measure(
    model: str, shape: Sequence[int], dtype: torch.dtype, direction: str, *, compiled: bool, timing: dict[str, Any]
) -> dict[str, Any]:
    """One case, as it goes to the JSON."""
    inputs = operands(shape, dtype, "cpu")
    times = common.interleave(runs(direction, inputs, ops(["cpu"], compiled=compiled)), **timing)
    return {
        "case": {"model": model, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "direction": direction},
        "seconds": {name: Spread.of(samples) for name, samples in times.items()},
        "ratios": {f"{name}/cpu": ratio(times, peer=name, ours="cpu") for name in times if name != "cpu"},
    }


def summarise(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per dtype and direction, over all shapes: geometric means and the least of the ratios."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["case"]["dtype"], case["case"]["direction"]), []).append(case)
    return [
        {
            "dtype": dtype,
            "direction": direction,
            **common.over_cases(group),
        }
        for (dtype, direction), group in groups.items()
    ]


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    """The table for people, and the means below it."""
    names, peers = list(cases[0]["seconds"]), list(cases[0]["ratios"])
    head = ["model", "shape", "dtype", "direction", *(f"{name}, ms" for name in names), *peers]
    rows = [
        [
            case["case"]["model"],
            "x".join(map(str, case["case"]["shape"])),
            case["case"]["dtype"],
            case["case"]["direction"],
            *(case["seconds"][name].text(3, 1e3) if name in case["seconds"] else "" for name in names),
            *(case["ratios"][peer].text() if peer in case["ratios"] else "" for peer in peers),
        ]
        for case in cases
    ]
    common.print_table(record, head, rows)
    print()
    for group in summary:
        means = group["geometric_mean"].items()
        ratios = ", ".join(f"{peer} {mean:.2f} (least {group['least'][peer]:.2f})" for peer, mean in means)
        print(f"{group['dtype']} {group['direction']}, geometric means: {ratios}")


# ----------------------------------------------------------------------------------------------------------------------- GPU


def graph_seconds(run: Run, rounds: int, calls: int = 20) -> list[float]:
    """Seconds per call inside a CUDA graph of `calls`."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                run()
        times = []
        for _ in range(rounds + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
    return times[1:]


def launches(run: Run) -> int:
    """Kernels that one call starts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages())


def line_to_reach(shape: Sequence[int], direction: str, size: int) -> tuple[str, float, str] | None:
    """What an H200 is to do in bf16: (figure, bound, "least" or "most").

    Shares are of the bandwidth of a copy in the same run, counting the transfers that the direction needs at least where the
    tensor is too large for the chip (forward three, backward five), or fits on it (two).
    """
    if direction != "forward":
        return ("share of copy, 5 transfers", 0.88, "least") if size > 200e6 else None
    if tuple(shape[1:]) == (256, 1024, 1024):
        return "microseconds", 407.0, "most"
    if size > 200e6:
        return "share of copy, 3 transfers", 0.92, "least"
    if 10e6 < size <= 28e6:
        return "share of copy, 2 transfers", 0.80, "least"
    return ("microseconds", 6.0, "most") if size <= 10e6 else None


def measure_gpu(model: str, shape: Sequence[int], direction: str, rounds: int) -> dict[str, Any]:
    """One case in bf16. A backward is timed as forward+backward less forward."""
    inputs = operands(shape, torch.bfloat16, "cuda")
    found, refused = ops([], compiled=True), {}
    for backend in ("cuda", "triton"):
        op = ops([backend], compiled=False)[backend]
        try:
            op(*inputs[:3])
        except Exception as error:  # refused, or more than this device has
            refused[backend] = f"{type(error).__name__}: {error}"
        else:
            found[backend] = op
    forward = runs("forward", inputs, found)
    seconds = {name: graph_seconds(run, rounds) for name, run in forward.items()}
    if direction == "backward":
        both = {
            name: graph_seconds(run, rounds) for name, run in runs("forward+backward", inputs, found).items() if name != COPY
        }
        seconds = {
            name: samples if name == COPY else [b - a for a, b in zip(samples, both[name], strict=True)]
            for name, samples in seconds.items()
        }
    size, target = inputs[0].nbytes, line_to_reach(shape, direction, inputs[0].nbytes)
    reached = {}
    for backend in (name for name in ("cuda", "triton") if name in found):
        if target is not None:
            figure, bound, side = target
            median, copy = Spread.of(seconds[backend]).median, Spread.of(seconds[COPY]).median
            transfers = next((int(word) for word in figure.split() if word.isdigit()), 0)
            value = transfers * size / median / (2 * size / copy) if transfers else median * 1e6
            reached[backend] = {
                "figure": figure,
                "value": value,
                "line": bound,
                "reached": value >= bound if side == "least" else value <= bound,
                "launches": launches(forward[backend]) if direction == "forward" else None,
            }
    return {
        "case": {"model": model, "shape": list(shape), "dtype": "bfloat16", "direction": direction, "bytes": size},
        "seconds": {name: Spread.of(samples) for name, samples in seconds.items()},
        "refused": refused,
        "lines": reached,
    }


def main_gpu(chosen: common.Options) -> None:
    """Measure on a CUDA device, print, write."""
    rounds = 3 if chosen.quick else 15
    record = {**common.environment(), "gpu": torch.cuda.get_device_name()}
    cases = [
        measure_gpu(model, shape, direction, rounds)
        for model, shapes in (QUICK_SHAPES if chosen.quick else GPU_SHAPES).items()
        for shape in shapes
        for direction in ("forward", "backward")
    ]
    print(f"{record['gpu']}; microseconds inside a CUDA graph, median [quartiles]")
    for case in cases:
        print(f"{'x'.join(map(str, case['case']['shape']))} {case['case']['direction']}")
        for name, reason in case["refused"].items():
            print(f"  {name:14} {reason}")
        for name, spread in case["seconds"].items():
            line = case["lines"].get(name)
            said = "" if line is None else f"  {line['figure']}: {line['value']:.3g}, line {line['line']:g}, {line['reached']}"
            print(f"  {name:14} {spread.text(2, 1e6)}{said}")
    common.report("group_norm_silu-gpu", __doc__ or "", chosen, record, cases=cases, summary={})


def main() -> None:
    """Measure, print, write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--gpu", action="store_true", help="measure on a CUDA device instead")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], metavar="DTYPE")
    arguments = parser.parse_args()
    chosen = common.options(arguments)
    if arguments.gpu:
        require_device()
        main_gpu(chosen)
        return
    record = common.environment()
    left_out = "--without-compile was given" if arguments.without_compile else common.no_compiler()
    timing = chosen.timing_of_many
    cases = [
        measure(
            model,
            shape,
            getattr(torch, dtype),
            direction,
            compiled=left_out is None and number % COMPILED_EVERY == 0,
            timing=timing,
        )
        for model, shapes in (QUICK_SHAPES if chosen.quick else SHAPES).items()
        for number, shape in enumerate(shapes)
        for dtype in arguments.dtypes
        for direction in DIRECTIONS
    ]
    summary = summarise(cases)
    show(record, cases, summary)
    if left_out is not None:
        print(f"torch.compile was left out: {left_out}")
    common.report(
        "group_norm_silu",
        __doc__ or "",
        chosen,
        record,
        cases=cases,
        summary={"groups": summary, "torch.compile left out": left_out},
        timing=timing,
    )


if __name__ == "__main__":
    main()
