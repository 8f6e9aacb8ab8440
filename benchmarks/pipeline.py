"""The whole sampling loop: ldmkit.Pipeline against diffusers' StableDiffusionPipeline, same weights, same latents out.

Text to image in float32 with guidance, from ready-made prompt embeddings to final latents, so neither text encoder nor decoder
is in it. The tiny network shows what the loop itself costs, the middling one what is left of that beside real work. Overhead is
the time of a step less that of the pipeline's own network, run alone on the same inputs; a call's fixed costs are in it, spread
over its steps. What our network keeps between steps (keys and values of the prompt) is kept in its run alone, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.common import Run, Spread, difference, geometric_mean, ratio
from ldmkit import Condition, Pipeline, build
from ldmkit.schedule import NoiseSchedule
from ldmkit_unet.diffusers_config import convert_diffusers_config

TWO_LEVELS = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
}
NETWORKS: dict[str, tuple[dict[str, Any], int]] = {
    "tiny": ({**TWO_LEVELS, "block_out_channels": (16, 32), "norm_num_groups": 8, "cross_attention_dim": 16}, 8),
    "middling": ({**TWO_LEVELS, "block_out_channels": (64, 128), "cross_attention_dim": 64}, 32),
}
"""diffusers' config of the U-Net, and the height and width of the latents."""
SCHEDULERS = {"ddim": diffusers.DDIMScheduler, "euler": diffusers.EulerDiscreteScheduler}
TOKENS, GUIDANCE_SCALE = 77, 7.5


class Pair:
    """Both pipelines over one set of weights, and the inputs both are given."""

    def __init__(self, network: str, sampler: str, steps: int) -> None:
        config, size = NETWORKS[network]
        torch.manual_seed(0)
        self.peer_unet = diffusers.UNet2DConditionModel(**config).eval()
        self.unet = build("denoiser", "unet", **convert_diffusers_config(config))
        self.unet.load_state_dict(self.peer_unet.state_dict())
        self.ours = Pipeline(autoencoder={"name": "identity", "channels": 4}, denoiser=self.unet, sampler=sampler)
        self.peer = diffusers.StableDiffusionPipeline(
            vae=None,
            unet=self.peer_unet,
            scheduler=_scheduler(sampler, self.ours.schedule.config),
            text_encoder=None,
            tokenizer=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        for pipeline in (self.ours, self.peer):
            pipeline.set_progress_bar_config(disable=True)
        self.latents = torch.randn(1, 4, size, size)
        self.tokens, self.negative = torch.randn(2, 1, TOKENS, config["cross_attention_dim"]).split(1)
        self.arguments = {
            "latents": self.latents,
            "prompt_embeds": self.tokens[0],
            "negative_prompt_embeds": self.negative[0],
            "guidance_scale": GUIDANCE_SCALE,
            "num_inference_steps": steps,
            "output_type": "latent",
        }

    def run_ours(self) -> Tensor:
        """Final latents of ldmkit. Its autoencoder is the identity, so height and width are the latents' own."""
        height, width = self.latents.shape[2:]
        out: Tensor = self.ours(height=height, width=width, **self.arguments).images
        return out

    def run_peer(self) -> Tensor:
        """Final latents of diffusers, which takes pixels to be 8 times finer where it has no autoencoder."""
        height, width = (8 * n for n in self.latents.shape[2:])
        out: Tensor = self.peer(height=height, width=width, **self.arguments).images
        return out

    def networks(self) -> dict[str, Run]:
        """The two networks alone, on the guided batch."""
        x, t = torch.cat([self.latents] * 2), torch.full((2,), 500.0)
        tokens = torch.cat([self.negative[0], self.tokens[0]])
        with torch.no_grad():
            condition = self.unet.prepare(Condition(tokens_BLC=tokens))
        return {
            "ldmkit network": _without_gradients(lambda: self.unet(x, t, condition)),
            "diffusers network": _without_gradients(lambda: self.peer_unet(x, t, tokens, return_dict=False)),
        }


def _scheduler(name: str, schedule: NoiseSchedule.Config) -> Any:
    values = schedule.to_dict()
    if name == "ddim":
        return SCHEDULERS[name](**values, clip_sample=False)
    del values["set_alpha_to_one"]
    return SCHEDULERS[name](**values)


def _without_gradients(run: Callable[[], object]) -> Run:
    def guarded() -> None:
        with torch.no_grad():
            run()

    return guarded


def measure(network: str, sampler: str, steps: int, timing: dict[str, Any]) -> dict[str, Any]:
    """One case, as it goes to the JSON; times are per step."""
    pair = Pair(network, sampler, steps)
    ours, theirs = pair.run_ours(), pair.run_peer()
    times = common.interleave({"ldmkit": pair.run_ours, "diffusers": pair.run_peer, **pair.networks()}, **timing)
    for name in ("ldmkit", "diffusers"):
        times[name] = [seconds / steps for seconds in times[name]]
    return {
        "case": {"network": network, "sampler": sampler, "latents": list(pair.latents.shape), "steps": steps},
        "latents_differ_by": float((ours - theirs).abs().max() / theirs.std()),
        "seconds": {name: Spread.of(samples) for name, samples in times.items()},
        "ratios": {
            "diffusers/ldmkit": ratio(times, peer="diffusers", ours="ldmkit"),
            "diffusers/ldmkit network": ratio(times, peer="diffusers network", ours="ldmkit network"),
        },
        "overhead": {name: difference(times, name, f"{name} network") for name in ("ldmkit", "diffusers")},
    }


def show(record: dict[str, Any], cases: Sequence[dict[str, Any]]) -> None:
    """The table for people."""
    head = ["network", "sampler", "ldmkit, ms/step", "diffusers, ms/step", "diffusers/ldmkit", "network alone"]
    head += ["ldmkit overhead, ms/step", "diffusers overhead, ms/step", "latents differ by"]
    rows = [
        [
            case["case"]["network"],
            case["case"]["sampler"],
            *(case["seconds"][name].text(3, 1e3) for name in ("ldmkit", "diffusers")),
            *(spread.text() for spread in case["ratios"].values()),
            *(spread.text(3, 1e3) for spread in case["overhead"].values()),
            f"{case['latents_differ_by']:.1e} std",
        ]
        for case in cases
    ]
    common.print_table(record, head, rows)


def main() -> None:
    """Measure, print, write."""
    arguments = common.parser(__doc__ or "").parse_args()
    chosen, record = common.options(arguments), common.environment(peers=["diffusers"])
    networks, steps = (["tiny"], 2) if chosen.quick else (list(NETWORKS), 20)
    cases = [measure(network, sampler, steps, chosen.timing) for network in networks for sampler in SCHEDULERS]
    show(record, cases)
    summary = {
        "diffusers/ldmkit": {
            network: geometric_mean(
                case["ratios"]["diffusers/ldmkit"].median for case in cases if case["case"]["network"] == network
            )
            for network in networks
        }
    }
    common.report("pipeline", __doc__ or "", chosen, record, cases=cases, summary=summary)


if __name__ == "__main__":
    main()
