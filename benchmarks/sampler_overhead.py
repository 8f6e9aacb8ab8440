"""What a sampler costs beside its network: under 1% of a step of Stable Diffusion 1.5, and no more than diffusers' scheduler.

Whole runs over latents of two pictures (2 x 4 x 64 x 64, float32) with a network that answers at once, so that the time is the
sampler's own: ours by `Sampler.step`, diffusers' by `scale_model_input` and `step`. Both are given the same answer and
the same noise, made before; a step's share is of a step of the full U-Net with random weights, run in the same process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest import mock

import diffusers
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, geometric_mean, ratio
from benchmarks.unet_step import SD15, TINY
from ldmkit import Condition, NoiseSchedule, Prediction, Sampler, available, build
from ldmkit_unet.diffusers_config import convert_diffusers_config

SCHEDULERS: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler-ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "dpm-2": (diffusers.KDPM2DiscreteScheduler, {}),
    "dpm-2-ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}),
    "lms": (diffusers.LMSDiscreteScheduler, {}),
    "dpm-singlestep": (diffusers.DPMSolverSinglestepScheduler, {"lower_order_final": True}),
    "dpm++-2m": (diffusers.DPMSolverMultistepScheduler, {}),
    "dpm++-2m-sde": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "deis": (diffusers.DEISMultistepScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}),
}
"""diffusers' scheduler for each of ours that has one, and its options."""
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = 20


class Given:
    """Noise that is there already."""

    def __init__(self, noise: Tensor) -> None:
        self.noise = noise

    def __call__(self) -> Tensor:
        """A draw."""
        return self.noise

    def between(self, high: float, low: float) -> Tensor:
        """The motion's increment."""
        return self.noise


def ours(sampler: Sampler, x: Tensor, answer: Tensor, noise: Tensor) -> Run:
    """A whole run of our sampler, from its levels on; reading the network's noise as x0 is part of it."""
    schedule, prediction, given = NoiseSchedule(), Prediction(), Given(noise)

    def run() -> Tensor:
        levels = sampler.levels(schedule, STEPS)
        start = None if sampler.facts is None or sampler.facts.from_noise else x
        state = sampler.init(x, levels, start=start)
        while not state.done:
            state = sampler.step(lambda x, level: prediction.to_x0(answer, x, level), state, given)
        return state.x

    return run


def theirs(name: str, x: Tensor, answer: Tensor, noise: Tensor) -> Run:
    """A whole run of diffusers' scheduler, from its times on."""
    cls, options = SCHEDULERS[name]
    peer: Any = cls(**BETAS, **options)
    module: Any = peer.step.__func__.__globals__

    def run() -> Tensor:
        peer.set_timesteps(STEPS)
        y = x * peer.init_noise_sigma
        with mock.patch.dict(module, randn_tensor=lambda *_, **__: noise):
            for t in peer.timesteps:
                peer.scale_model_input(y, t)
                y = peer.step(answer, t, y, return_dict=False)[0]
        return y

    return run


def network(config: dict[str, Any], size: int) -> Run:
    """A guided step of the U-Net, float32, random weights."""
    torch.manual_seed(0)
    unet = build("denoiser", "unet", **convert_diffusers_config(config)).eval()
    condition = unet.prepare(Condition(tokens_BLC=torch.randn(2, 77, config["cross_attention_dim"])))
    x, t = torch.randn(2, 4, size, size), torch.full((2,), 500.0)
    return lambda: unet(x, t, condition)


def measure(name: str, whole: Spread, size: int, timing: dict[str, Any]) -> dict[str, Any]:
    """One sampler, as it goes to the JSON; times are per step of the run, whatever its evaluations."""
    sampler = build("sampler", name)
    x, answer, noise = torch.randn(3, 2, 4, size, size).unbind()
    runs: dict[str, Run] = {"ldmkit": ours(sampler, x, answer, noise)}
    if name in SCHEDULERS:
        runs["diffusers"] = theirs(name, x, answer, noise)
    times = common.interleave(runs, **timing)
    times = {side: [seconds / STEPS for seconds in samples] for side, samples in times.items()}
    seconds = {side: Spread.of(samples) for side, samples in times.items()}
    ratios = {"diffusers/ldmkit": ratio(times, peer="diffusers", ours="ldmkit")} if name in SCHEDULERS else {}
    evaluations = 1 if sampler.facts is None else sampler.facts.evaluations
    return {
        "case": {"sampler": name, "latents": list(x.shape), "steps": STEPS},
        "seconds": seconds,
        "ratios": ratios,
        "percent_of_network": 100 * seconds["ldmkit"].median / (evaluations * whole.median),
    }


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]], whole: Spread) -> None:
    """The table for people."""
    rows = [
        [
            case["case"]["sampler"],
            *(case["seconds"][side].text(1, 1e6) if side in case["seconds"] else "-" for side in ("ldmkit", "diffusers")),
            case["ratios"]["diffusers/ldmkit"].text() if case["ratios"] else "-",
            f"{case['percent_of_network']:.4f}",
        ]
        for case in cases
    ]
    common.print_table(record, ["sampler", "ldmkit, us/step", "diffusers, us/step", "diffusers/ldmkit", "% of network"], rows)
    print(f"\nnetwork: {whole.text(3)} s an evaluation")


def main() -> None:
    """Measure, print, write."""
    chosen, record = common.options(common.parser(__doc__ or "").parse_args()), common.environment(peers=["diffusers"])
    config, size = (TINY, 16) if chosen.quick else (SD15, 64)
    names = ["euler", "dpm++-2m"] if chosen.quick else available("sampler")
    with torch.no_grad():
        rounds = {"rounds": chosen.timing["rounds"] if chosen.quick else 5}
        whole = Spread.of(common.interleave({"network": network(config, size)}, **rounds)["network"])
        cases = [measure(name, whole, size, chosen.timing) for name in names]
    show(record, cases, whole)
    summary = {
        "network_seconds": whole,
        "diffusers/ldmkit": geometric_mean(case["ratios"]["diffusers/ldmkit"].median for case in cases if case["ratios"]),
        "most_percent_of_network": max(case["percent_of_network"] for case in cases),
    }
    common.report("sampler_overhead", __doc__ or "", chosen, record, cases=cases, summary=summary)


if __name__ == "__main__":
    main()
