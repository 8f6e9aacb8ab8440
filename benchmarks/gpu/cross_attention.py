"""Attention on a GPU: how near each kernel comes to what the device can do, and to SDPA's own backends.

Few keys: what counts is memory, so its share of the bandwidth of a large copy, counting q, k, v and the output once. Many
keys: what counts is arithmetic, so useful operations a second (no padding counted). The copy is of the same run. The lines to
reach are those of an H200: 75 % of the copy above 40 MB; SDXL's 4096 x 77 in 8 us; self-attention forward in TFLOP/s by head
dimension (64: 480 in CUDA, 400 in Triton; 40: 330; 80: 430; 160: 480), backward 400 at 64; and SDPA's best, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import common
from benchmarks.common import Spread
from benchmarks.gpu import timing
from ldmkit.kernels.backends import implementations

CROSS = [(2, 8, 4096, 77, 40), (2, 8, 1024, 77, 80), (2, 8, 256, 77, 160), (2, 10, 4096, 77, 64), (2, 20, 1024, 77, 64)]
CROSS += [(16, 8, 4096, 77, 40), (16, 10, 4096, 77, 64)]  # above 40 MB
SELF = [(2, 8, 4096, 4096, 40), (2, 10, 4096, 4096, 64), (2, 20, 1024, 1024, 64), (2, 8, 1024, 1024, 80), (2, 8, 256, 256, 160)]
SELF += [(1, 1, 4096, 4096, 512)]
"""(B, H, L, S, D) of guided steps of SD1.5 at 512 x 512 and SDXL at 1024 x 1024, and of a decoder's one wide head."""
LARGE_BYTES = 40e6
LARGE_SHARE = 0.75
MICROSECONDS = {(2, 10, 4096, 77, 64): 8.0}
TERAFLOPS = {64: {"cuda": 480.0, "triton": 400.0}, 40: 330.0, 80: 430.0, 160: 480.0}
BACKWARD_TERAFLOPS = {64: 400.0}
OURS = ("triton", "cuda")
PEERS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def peer(backend: SDPBackend) -> Callable[..., Tensor]:
    """SDPA by one of its backends."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    return call


def peers(shape: Sequence[int]) -> dict[str, Callable[..., Tensor]]:
    """SDPA's backends that serve this shape here."""
    served = {}
    for name, backend in PEERS.items():
        try:
            peer(backend)(*make(shape)(0))
        except RuntimeError:  # torch's word for a backend that does not serve
            continue
        served[name] = peer(backend)
    return served


def make(shape: Sequence[int]) -> Callable[[int], tuple[Tensor, ...]]:
    """Number of a set => q, k, v, views of (B, L, H, D) as a network has them."""
    B, H, L, S, D = shape
    return lambda i: tuple(timing.randn((B, rows, H, D), 3 * i + j).transpose(1, 2) for j, rows in enumerate((L, S, S)))


def here() -> list[str]:
    """Our kernels that run here."""
    table = implementations("cross_attention")
    return [name for name in OURS if name in table and table[name].missing is None]


def forward(shape: Sequence[int], how: dict[str, Any]) -> common.Times:
    """Seconds by name."""
    B, H, L, S, D = shape
    raw = torch.ops.ldmkit.cross_attention
    ours = {name: lambda q, k, v, name=name: raw(q, k, v, None, D**-0.5, name) for name in here()}
    return timing.measure({**peers(shape), **ours}, make(shape), 4 * B * H * (L + S) * D, how)


def backward(shape: Sequence[int], how: dict[str, Any]) -> common.Times:
    """Seconds of the gradients alone, by name: of ours, and of SDPA's flash kernel where it serves."""
    B, H, L, S, D = shape
    raw, raw_backward, scale = torch.ops.ldmkit.cross_attention, torch.ops.ldmkit.cross_attention_backward, D**-0.5
    first = here()[0]

    def saved(i: int) -> tuple[Tensor, ...]:
        q, k, v = make(shape)(i)
        out, lse = raw(q, k, v, None, scale, first)
        return timing.randn((B, L, H, D), i + 1000).transpose(1, 2), q, k, v, out, lse

    def by(name: str) -> Callable[..., Any]:
        return lambda g, q, k, v, out, lse: raw_backward(g, None, q, k, v, None, out, lse, scale, name)

    def flash(g: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
        arguments = (g, q, k, v, out, lse, None, None, L, S, 0.0, False, seed, seed)
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(*arguments, scale=scale)

    others = {"sdpa flash": flash} if D % 8 == 0 and D <= 256 else {}
    return timing.measure({**others, **{name: by(name) for name in here()}}, saved, 8 * B * H * (L + S) * D, how)


def line_of(shape: Sequence[int], way: str, name: str, bytes_: float) -> tuple[str, float] | None:
    """("us" | "share" | "TFLOP/s", the line) for a kernel of ours; None where only SDPA is the measure."""
    L, S, D = shape[2:]
    if L == S:
        line = TERAFLOPS.get(D) if way == "forward" else BACKWARD_TERAFLOPS.get(D)
        line = line[name] if isinstance(line, dict) else line
        return None if line is None else ("TFLOP/s", line)
    if tuple(shape) in MICROSECONDS:
        return "us", MICROSECONDS[tuple(shape)]
    return ("share", LARGE_SHARE) if bytes_ > LARGE_BYTES else None


def case(shape: Sequence[int], way: str, times: common.Times, copy: Spread) -> dict[str, Any]:
    """One case, as it goes to the JSON."""
    B, H, L, S, D = shape
    bytes_ = 2.0 * (2 if way == "forward" else 4) * B * H * (L + S) * D
    operations = 2.0 * (2 if way == "forward" else 5) * B * H * L * S * D
    seconds = {name: Spread.of(samples) for name, samples in times.items()}
    figures = {
        name: {"us": s.median * 1e6, "share": bytes_ / s.median / copy.median, "TFLOP/s": operations / s.median * 1e-12}
        for name, s in seconds.items()
    }
    lines = {name: line_of(shape, way, name, bytes_) for name in times if name in OURS}
    best_peer = min((s.median for name, s in seconds.items() if name not in OURS), default=float("inf"))
    reached = {}
    for name, line in lines.items():
        kept = line is None or (figures[name]["us"] <= line[1] if line[0] == "us" else figures[name][line[0]] >= line[1])
        reached[name] = kept and seconds[name].median <= best_peer
    return {
        "case": {"shape": list(shape), "way": way, "dtype": "bfloat16"},
        "seconds": seconds,
        "figures": figures,
        "lines": {name: None if line is None else f"{line[1]:g} {line[0]}" for name, line in lines.items()},
        "reached": reached,
    }


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    timing.require_device()
    record = timing.environment()
    ceilings = timing.ceilings(quick=chosen.quick, timing=chosen.timing)
    shapes = [CROSS[2], SELF[4]] if chosen.quick else [*CROSS, *SELF]
    ways = {"forward": forward, "backward": backward}
    cases = [case(s, way, run(s, chosen.timing), ceilings.copy) for s in shapes for way, run in ways.items()]
    print(f"{record['gpu']['name']}: copy {ceilings.copy.text(2, 1e-12)} TB/s")
    rows = [
        [
            "x".join(map(str, c["case"]["shape"])),
            c["case"]["way"],
            name,
            spread.text(1, 1e6),
            f"{c['figures'][name]['share']:.2f}",
            f"{c['figures'][name]['TFLOP/s']:.0f}",
            str(c["lines"].get(name) or ""),
            {True: "yes", False: "no", None: ""}[c["reached"].get(name)],
        ]
        for c in cases
        for name, spread in c["seconds"].items()
    ]
    common.print_table(record, ["B x H x L x S x D", "way", "by", "us", "of copy", "TFLOP/s", "line", "reached"], rows)
    reached = sum(any(c["reached"].values()) for c in cases)
    print(f"\n{reached} of {len(cases)} lines reached, each by one kernel at least and SDPA's best included")
    timing.report(
        "cross_attention", __doc__ or "", chosen, record, cases=cases, summary={"ceilings": ceilings, "reached": reached}
    )


if __name__ == "__main__":
    main()
