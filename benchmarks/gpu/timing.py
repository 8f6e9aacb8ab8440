"""What they share: calls in CUDA graphs over inputs that no cache holds; the device's two ceilings, measured beside them."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread

MOST_CALLS = 16
"""In a graph."""
FAILURES: list[str] = []
"""What could not be timed, and why. The others are; `report` then ends the script with 1."""


def require_device() -> None:
    """Ends the script where there is no CUDA device.

    Raises:
        SystemExit: with 2 and the reason.
    """
    if not torch.cuda.is_available():
        print("this benchmark needs a CUDA device, and torch sees none", file=sys.stderr)
        raise SystemExit(2)


def clock() -> float:
    """Seconds, once the device is done."""
    torch.cuda.synchronize()
    return time.perf_counter()


def copies(bytes_a_call: int, cache: int) -> int:
    """How many sets of inputs one graph goes through: together four times what the cache holds, at least 2."""
    return max(2, min(MOST_CALLS, -(-4 * cache // max(bytes_a_call, 1))))


def graph(call: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Run:
    """One replay calls it on every set of inputs; all have been tried before it is captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        for arguments in inputs:
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured), torch.no_grad():
        for arguments in inputs:
            call(*arguments)
    return captured.replay


def measure(
    calls: Mapping[str, Callable[..., Any]], make: Callable[[int], tuple[Any, ...]], bytes_a_call: int, timing: dict[str, Any]
) -> dict[str, list[float]]:
    """Seconds of one call, by name, side by side in every round. A call that fails is told and left out.

    Args:
        make: number of a set => arguments.
    """
    inputs = [make(i) for i in range(copies(bytes_a_call, torch.cuda.get_device_properties(0).L2_cache_size))]
    graphs = {}
    for name, call in calls.items():
        try:
            graphs[name] = graph(call, inputs)
        except Exception as error:  # a kernel that asks too much of this device is no reason not to time the others
            shapes = ", ".join("x".join(map(str, t.shape)) for t in inputs[0])
            FAILURES.append(f"{name} of {shapes}: {type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0])
            print(f"failed: {FAILURES[-1]}", flush=True)
    times = common.interleave(graphs, clock=clock, **timing)
    return {name: [seconds / len(inputs) for seconds in samples] for name, samples in times.items()}


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy, read and written; operations a second of a bf16 product."""

    copy: Spread
    matrix: Spread


def ceilings(*, quick: bool, timing: dict[str, Any]) -> Ceilings:
    """Of a copy of 1 GiB and a product of side 8192 (quick: 64 MiB, 1024), on random numbers."""
    elements, side = (2**25, 1024) if quick else (2**29, 8192)
    source, a, b = (randn(shape, i) for i, shape in enumerate([(elements,), (side, side), (side, side)]))
    to, product = torch.empty_like(source), torch.empty_like(a)
    runs = {"copy": lambda: to.copy_(source), "matrix": lambda: torch.mm(a, b, out=product)}
    times = common.interleave(runs, clock=clock, **timing)
    return Ceilings(
        copy=Spread.of([2 * source.nbytes / seconds for seconds in times["copy"]]),
        matrix=Spread.of([2 * side**3 / seconds for seconds in times["matrix"]]),
    )


def randn(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> Tensor:
    """Normal numbers, drawn on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def environment() -> dict[str, Any]:
    """The machine's record, with the device in it."""
    properties = torch.cuda.get_device_properties(0)
    gpu = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }
    return {**common.environment(("triton",)), "gpu": gpu}


def report(name: str, doc: str, chosen: common.Options, record: dict[str, Any], **results: Any) -> None:
    """Write the result, named after the device, to the folder `gpu` in that of the others.

    Raises:
        SystemExit: with 1, where something could not be timed.
    """
    folder = dataclasses.replace(chosen, folder=chosen.folder / "gpu")
    common.report(name, doc, folder, {**record, "cpu": record["gpu"]["name"], "failed": FAILURES}, **results)
    if FAILURES:
        print(f"{len(FAILURES)} could not be timed, the first: {FAILURES[0]}")
        raise SystemExit(1)
