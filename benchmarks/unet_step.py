"""One step of Stable Diffusion 1.5's U-Net, full size: ldmkit's network against diffusers', same weights.

A batch of 2 (the guided pair), 64 x 64 latents, 77 tokens, random weights, no gradients. Both networks share one copy of the
weights, so they take turns on the same memory. What ldmkit keeps between steps (keys and values of the prompt) is kept here,
as in a run; `without reuse` keeps nothing. Peak memory is that of a process of its own that builds one network and takes two
steps.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, ratio
from ldmkit import Condition, build
from ldmkit.kernels import record
from ldmkit_unet.diffusers_config import convert_diffusers_config

SD15 = {"cross_attention_dim": 768, "attention_head_dim": 8}
"""What differs from diffusers' defaults, which are otherwise those of SD 1.5."""
TINY = {
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SIDES = ("ldmkit", "ldmkit without reuse", "diffusers")


class Pair:
    """Both networks over one set of weights, and one input. `only` builds one of them."""

    def __init__(self, config: dict[str, Any], dtype: torch.dtype, *, size: int, only: str | None = None) -> None:
        torch.manual_seed(0)
        self.runs: dict[str, Run] = {}
        self.peer = diffusers.UNet2DConditionModel(**config).to(dtype).eval() if only != "ldmkit" else None
        self.x = torch.randn(2, 4, size, size).to(dtype)
        self.tokens = torch.randn(2, 77, config["cross_attention_dim"]).to(dtype)
        self.t = torch.full((2,), 500.0)
        if self.peer is not None:
            self.runs["diffusers"] = self.run_peer
        if only != "diffusers":
            self.ours = build("denoiser", "unet", **convert_diffusers_config(config)).to(dtype).eval()
            if self.peer is not None:
                self.ours.load_state_dict(self.peer.state_dict(), assign=True)
            with torch.no_grad():
                self.prepared = self.ours.prepare(Condition(tokens_BLC=self.tokens))
            self.runs |= {"ldmkit": self.run_ours, "ldmkit without reuse": self.run_plainly}

    @torch.no_grad()
    def run_ours(self) -> Tensor:
        """One step of a run."""
        out: Tensor = self.ours(self.x, self.t, self.prepared)
        return out

    @torch.no_grad()
    def run_plainly(self) -> Tensor:
        """One step that computes the prompt's keys and values anew."""
        out: Tensor = self.ours(self.x, self.t, Condition(tokens_BLC=self.tokens))
        return out

    @torch.no_grad()
    def run_peer(self) -> Tensor:
        """One step of diffusers."""
        assert self.peer is not None
        out: Tensor = self.peer(self.x, self.t, self.tokens, return_dict=False)[0]
        return out


def timing_of(chosen: common.Options) -> dict[str, Any]:
    """A step takes seconds."""
    return chosen.timing if chosen.quick else {"rounds": 5, "least_seconds": 0.0}


def measure(dtype_name: str, chosen: common.Options) -> dict[str, Any]:
    """One dtype, as it goes to the JSON."""
    config, size = (TINY, 16) if chosen.quick else (SD15, 64)
    pair = Pair(config, DTYPES[dtype_name], size=size)
    with record() as calls:
        ours = pair.run_ours()
    theirs = pair.run_peer()
    times = common.interleave({name: pair.runs[name] for name in SIDES}, **timing_of(chosen))
    return {
        "case": {"dtype": dtype_name, "latents": list(pair.x.shape)},
        "outputs_differ_by": float((ours - theirs).float().abs().max() / theirs.float().std()),
        "kernels": sorted({f"{call.op}: {call.backend}" for call in calls}),
        "seconds": {name: Spread.of(samples) for name, samples in times.items()},
        "ratios": {f"diffusers/{name}": ratio(times, peer="diffusers", ours=name) for name in SIDES[:2]},
        "peak_mib": {name: _peak_mib(name, dtype_name, chosen) for name in ("ldmkit", "diffusers")},
    }


def _peak_mib(side: str, dtype_name: str, chosen: common.Options) -> float:
    command = [sys.executable, "-m", "benchmarks.unet_step", "--child", side, dtype_name, "--threads", str(chosen.threads)]
    command += ["--quick"] if chosen.quick else []
    done = subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, text=True)
    mib: float = json.loads(done.stdout)
    return mib


def child(side: str, dtype_name: str, *, quick: bool) -> None:
    """Prints the most memory a process has held that builds one network and takes two steps, in MiB."""
    pair = Pair(TINY if quick else SD15, DTYPES[dtype_name], size=16 if quick else 64, only=side)
    for _ in range(2):
        pair.runs[side]()
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps(kib / (2**20 if sys.platform == "darwin" else 2**10)))


def show(environment: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    head = ["dtype", *(f"{name}, s" for name in SIDES), "diffusers/ldmkit", "diffusers/without reuse"]
    head += ["peak MiB, ldmkit", "peak MiB, diffusers", "outputs differ by"]
    rows = [
        [
            case["case"]["dtype"],
            *(case["seconds"][name].text(2) for name in SIDES),
            *(spread.text() for spread in case["ratios"].values()),
            *(f"{case['peak_mib'][name]:.0f}" for name in ("ldmkit", "diffusers")),
            f"{case['outputs_differ_by']:.1e} std",
        ]
        for case in cases
    ]
    common.print_table(environment, head, rows)


def main() -> None:
    """Measure, print, write."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "DTYPE"), help="measure one side's peak memory; used by itself")
    parser.add_argument("--dtype", choices=list(DTYPES), action="append", help="measure these only")
    arguments = parser.parse_args()
    chosen = common.options(arguments)
    if arguments.child:
        child(*arguments.child, quick=chosen.quick)
        return
    environment = common.environment(peers=["diffusers"])
    cases = [measure(name, chosen) for name in arguments.dtype or DTYPES]
    show(environment, cases)
    summary = {case["case"]["dtype"]: case["ratios"]["diffusers/ldmkit"].median for case in cases}
    common.report(
        "unet_step",
        __doc__ or "",
        chosen,
        environment,
        cases=cases,
        summary={"diffusers/ldmkit": summary},
        timing=timing_of(chosen),
    )


if __name__ == "__main__":
    main()
