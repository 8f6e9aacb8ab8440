"""GEGLU on a GPU, alone and with its linear layer: how near each kernel comes to what the device can do.

Alone it moves memory: its share of the bandwidth of a large copy, counting what must be read and written. With its linear layer
it multiplies matrices: its share of the rate of a large bf16 product. Both ceilings are measured in the same run. The lines to
reach are those of an H200: 93 % of the copy forward, 90 % backward, 32 us for 2 x 4096 x 2560 outputs; 80 % of the product,
85 us for 8192 x 640 -> 2 x 2560.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.gpu import timing
from ldmkit.kernels.backends import implementations

ALONE = [(2 * 4096, 1280), (2 * 1024, 2560), (2 * 256, 5120), (2 * 4096, 2560), (2 * 1024, 5120)]
"""(rows, N) of the feed-forwards of a guided step: SD1.5 at 512 x 512, SDXL at 1024 x 1024."""
LINEAR = [(2 * 4096, 320, 1280), (2 * 1024, 640, 2560), (2 * 256, 1280, 5120), (2 * 4096, 640, 2560), (2 * 1024, 1280, 5120)]
"""(rows, K, N) of the same."""
LINES = {
    "geglu": {"share": 0.93, "microseconds": {(8192, 2560): 32.0}},
    "geglu backward": {"share": 0.90, "microseconds": {}},
    "geglu_linear": {"share": 0.80, "microseconds": {(8192, 640, 2560): 85.0}},
}
OURS = ("triton", "cuda")


def plain(x: Tensor) -> Tensor:
    """GEGLU in plain torch."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def plain_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Its gradient, as autograd would have it."""
    value, gate = x.chunk(2, dim=-1)
    return torch.cat([grad * F.gelu(gate), torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)


def ours(op: str, arguments: Callable[..., tuple[Any, ...]] = lambda *t: t) -> dict[str, Callable[..., Any]]:
    """The raw op by every kernel of ours that runs here."""
    raw, table = getattr(torch.ops.ldmkit, op), implementations(op.removesuffix("_backward"))
    here = [name for name in OURS if table[name].missing is None]
    return {name: lambda *t, name=name: raw(*arguments(*t), name) for name in here}


def case(op: str, shape: Sequence[int], times: common.Times, work: float, ceiling: Spread) -> dict[str, Any]:
    """One case, as it goes to the JSON. `work` is in bytes or operations, the ceiling in those a second."""
    line = LINES[op]
    shares = {name: Spread.of([work / t / ceiling.median for t in samples]) for name, samples in times.items()}
    seconds = {name: Spread.of(samples) for name, samples in times.items()}
    limit = line["microseconds"].get(tuple(shape))
    best = min((name for name in times if name in OURS), key=lambda name: seconds[name].median, default=None)
    reached = best is not None and (
        seconds[best].median * 1e6 <= limit if limit is not None else shares[best].median >= line["share"]
    )
    return {
        "case": {"op": op, "shape": list(shape), "dtype": "bfloat16"},
        "seconds": seconds,
        "share_of_ceiling": shares,
        "line": f"{limit:g} us" if limit is not None else f"{line['share']:.0%}",
        "best": best,
        "reached": reached,
    }


def alone(rows: int, n: int, ceilings: timing.Ceilings, how: dict[str, Any]) -> list[dict[str, Any]]:
    """Forward and backward of one shape."""
    forward_bytes, backward_bytes = rows * n * 6, rows * n * 10
    forward = timing.measure({"plain": plain, **ours("geglu")}, lambda i: (timing.randn((rows, 2 * n), i),), forward_bytes, how)
    backward = timing.measure(
        {"plain": plain_backward, **ours("geglu_backward")},
        lambda i: (timing.randn((rows, n), i), timing.randn((rows, 2 * n), i + 100)),
        backward_bytes,
        how,
    )
    return [
        case("geglu", (rows, n), forward, forward_bytes, ceilings.copy),
        case("geglu backward", (rows, n), backward, backward_bytes, ceilings.copy),
    ]


def linear(rows: int, k: int, n: int, ceilings: timing.Ceilings, how: dict[str, Any]) -> dict[str, Any]:
    """The forward of one shape; beside it, the library's product with the elementwise op, and the product alone."""

    def make(i: int) -> tuple[Tensor, ...]:
        return timing.randn((rows, k), i), timing.randn((2 * n, k), i + 100, scale=k**-0.5), timing.randn((2 * n,), i + 200)

    unfused = {f"product, {name}": lambda *t, gate=gate: gate(F.linear(*t)) for name, gate in ours("geglu").items()}
    calls = {
        "product alone": F.linear,
        "plain": lambda *t: plain(F.linear(*t)),
        **unfused,
        **ours("geglu_linear", lambda x, weight, bias: (x, weight, bias, False)),
    }
    times = timing.measure(calls, make, 2 * (rows * k + 2 * n * k + rows * n), how)
    return case("geglu_linear", (rows, k, n), times, 4.0 * rows * k * n, ceilings.matrix)


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    timing.require_device()
    record = timing.environment()
    ceilings = timing.ceilings(quick=chosen.quick, timing=chosen.timing)
    cases = [c for rows, n in (ALONE[:1] if chosen.quick else ALONE) for c in alone(rows, n, ceilings, chosen.timing)]
    cases += [linear(*shape, ceilings, chosen.timing) for shape in (LINEAR[:1] if chosen.quick else LINEAR)]
    copy, product = ceilings.copy.text(2, 1e-12), ceilings.matrix.text(0, 1e-12)
    print(f"{record['gpu']['name']}: copy {copy} TB/s, bf16 product {product} TFLOP/s")
    rows = [
        [
            c["case"]["op"],
            "x".join(map(str, c["case"]["shape"])),
            name,
            spread.text(1, 1e6),
            c["share_of_ceiling"][name].text(2),
            c["line"],
        ]
        for c in cases
        for name, spread in c["seconds"].items()
    ]
    common.print_table(record, ["op", "shape", "by", "us", "share", "line"], rows)
    reached = sum(c["reached"] for c in cases)
    print(f"\n{reached} of {len(cases)} lines reached")
    timing.report("geglu", __doc__ or "", chosen, record, cases=cases, summary={"ceilings": ceilings, "reached": reached})


if __name__ == "__main__":
    main()
