"""GEGLU on a CPU: the C++ kernel against plain torch (chunk, gelu, multiply) and torch.compile of it.

This is the evidence behind ldmkit.kernels' automatic choice of the backend `cpu` (the table `_FASTER` in
ldmkit/kernels/geglu/__init__.py): for every shape the last column tells whether that choice was right. The choice depends on
the instruction set; ATEN_CPU_CAPABILITY=avx2 measures what a machine without AVX-512 does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, Times, geometric_mean, ratio
from ldmkit.kernels import geglu
from ldmkit.kernels.backends import automatic

SHAPES = {
    "SD1.5, 512x512": [(2, 4096, 2560), (2, 1024, 5120), (2, 256, 10240), (2, 64, 10240)],
    "SDXL, 1024x1024": [(2, 4096, 5120), (2, 1024, 10240)],
}
"""Inputs (B, tokens, 2N) of the gates in a guided step (B = 2), from the finest level to the coarsest."""
QUICK_SHAPES = {"tiny": [(2, 16, 128), (2, 4, 256)]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("forward", "forward+backward")
BACKENDS = ("cpu", "reference")
COMPILED = "torch.compile"


def plain(x: Tensor) -> Tensor:
    """What torch.compile is given."""
    value, gate = x.chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def calls(x: Tensor, direction: str, *, compiled: bool) -> dict[str, Run]:
    """What is timed, by name; all on the same input."""
    ops: dict[str, Callable[[Tensor], Tensor]] = {
        "cpu": lambda x: geglu(x, backend="cpu"),
        "reference": lambda x: geglu(x, backend="reference"),
    }
    if compiled:
        torch.compiler.reset()  # one specialised graph per shape, and no limit on how many
        ops[COMPILED] = torch.compile(plain, fullgraph=True, dynamic=False)
    make = _forward if direction == "forward" else _forward_and_backward
    return {name: make(op, x) for name, op in ops.items()}


def _forward(op: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    def run() -> None:
        with torch.no_grad():
            op(x)

    return run


def _forward_and_backward(op: Callable[[Tensor], Tensor], x: Tensor) -> Run:
    x = x.detach().requires_grad_()
    grad = torch.randn(*x.shape[:-1], x.shape[-1] // 2, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return lambda: torch.autograd.grad(op(x), x, grad)


def judge(times: Times, chosen: str) -> str:
    """Was the automatic choice right? "right" or "wrong" where the quartiles of the pairs agree, "even" where they do not."""
    rivals = [ratio(times, peer=other, ours=chosen) for other in BACKENDS if other != chosen]
    if any(rival.high < 1 for rival in rivals):
        return "wrong"
    return "right" if all(rival.low >= 1 for rival in rivals) else "even"


def no_compiler() -> str | None:
    """Why torch.compile cannot serve here (it needs a C++ compiler); None where it can."""
    try:
        torch.compile(plain)(torch.zeros(2, 2))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def measure(
    family: str, shape: Sequence[int], dtype: torch.dtype, direction: str, *, compiled: bool, timing: dict[str, Any]
) -> dict[str, Any]:
    """One case, as it goes to the JSON."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = common.interleave(calls(x, direction, compiled=compiled), **timing)
    chosen = automatic("geglu", "cpu", dtype)
    return {
        "case": {"model": family, "shape": list(shape), "dtype": str(dtype).removeprefix("torch."), "direction": direction},
        "seconds": {name: Spread.of(samples) for name, samples in times.items()},
        "ratios": {f"{name}/cpu": ratio(times, peer=name, ours="cpu") for name in times if name != "cpu"},
        "automatic": chosen,
        "choice": judge(times, chosen),
    }


def summarise(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the shapes, per dtype and direction: geometric means and the least of the ratios, and how the choices fared."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in cases:
        groups.setdefault((case["case"]["dtype"], case["case"]["direction"]), []).append(case)
    return [
        {
            "dtype": dtype,
            "direction": direction,
            "automatic": group[0]["automatic"],
            "choices": [case["choice"] for case in group],
            "geometric_mean": {peer: geometric_mean(c["ratios"][peer].median for c in group) for peer in group[0]["ratios"]},
            "least": {peer: min(c["ratios"][peer].median for c in group) for peer in group[0]["ratios"]},
        }
        for (dtype, direction), group in groups.items()
    ]


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]], summary: Sequence[dict[str, Any]]) -> None:
    """The table for people, and the means below it."""
    names, peers = list(cases[0]["seconds"]), list(cases[0]["ratios"])
    head = ["model", "shape", "dtype", "direction", *(f"{name}, ms" for name in names), *peers, "automatic", "choice"]
    rows = [
        [
            case["case"]["model"],
            "x".join(map(str, case["case"]["shape"])),
            case["case"]["dtype"],
            case["case"]["direction"],
            *(case["seconds"][name].text(3, 1e3) for name in names),
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
        choices = ", ".join(group["choices"])
        print(f"{group['dtype']} {group['direction']}, geometric means: {ratios}; automatic: {group['automatic']} ({choices})")


def main() -> None:
    """Measure, print, write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--without-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    chosen, record = common.options(arguments), common.environment()
    left_out = "--without-compile was given" if arguments.without_compile else no_compiler()
    cases = [
        measure(family, shape, dtype, direction, compiled=left_out is None, timing=chosen.timing)
        for family, shapes in (QUICK_SHAPES if chosen.quick else SHAPES).items()
        for shape in shapes
        for dtype in DTYPES
        for direction in DIRECTIONS
    ]
    groups = summarise(cases)
    show(record, cases, groups)
    if left_out:
        print(f"without torch.compile: {left_out}")
    common.report(
        "geglu", __doc__ or "", chosen, record, cases=cases, summary={"without_torch_compile": left_out, "groups": groups}
    )


if __name__ == "__main__":
    main()
