"""diffusers as an oracle: its schedulers without their float32 roundings, and its three loops, written out.

diffusers rounds its tables and, in Euler's steps, the latents to float32. Inside `in_float64` the schedulers' modules see a
`torch` and a `numpy` whose float32 is float64, so the same code computes in float64 throughout.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_lms_discrete
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ldmkit.schedule import NoiseSchedule

SCHEDULERS: dict[str, type] = {
    "ddpm": diffusers.DDPMScheduler,
    "ddim": diffusers.DDIMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler-ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "plms": diffusers.PNDMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "ddim-inverse": diffusers.DDIMInverseScheduler,
    "dpm-singlestep": diffusers.DPMSolverSinglestepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpm-2": diffusers.KDPM2DiscreteScheduler,
    "dpm-2-ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "lms": diffusers.LMSDiscreteScheduler,
    "dpm++-2m": diffusers.DPMSolverMultistepScheduler,
    "dpm++-2m-sde": diffusers.DPMSolverMultistepScheduler,
    "dpm++-3m": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "tcd": diffusers.TCDScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}

Network = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x, t, c) => raw prediction; c is (B, 1), the condition."""


class _Widened:
    """A module whose float32 is its float64."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


@contextmanager
def in_float64(*more: type) -> Iterator[None]:
    """diffusers' schedulers (and `more` classes of it) made, set and stepped inside compute in float64.

    DDPM's floor of 1e-20 under the variance, which adds 1e-10 of noise to the finished image, is taken away as well, and LMS
    integrates to 1e-12 instead of 1e-4.
    """
    variance = diffusers.DDPMScheduler._get_variance

    def without_floor(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = variance(self, *args, **kwargs)
        return torch.where(value == 1e-20, 0.0, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.DDPMScheduler, "_get_variance", without_floor)
        quad = functools.partial(scheduling_lms_discrete.integrate.quad, epsabs=1e-13)
        patch.setattr(scheduling_lms_discrete.integrate, "quad", lambda *a, epsrel: quad(*a, epsrel=1e-12))
        for name in {each.__module__ for each in (*SCHEDULERS.values(), diffusers.FlowMatchEulerDiscreteScheduler, *more)}:
            module = sys.modules[name]
            for library in {"torch", "np"} & vars(module).keys():
                patch.setattr(module, library, _Widened(getattr(module, library)))
        yield


def scheduler(name: str, schedule: NoiseSchedule.Config, prediction_type: str, **options: Any) -> Any:
    """diffusers' scheduler for our schedule."""
    values: dict[str, Any] = {**schedule.to_dict(), "prediction_type": prediction_type, **options}
    if name in ("ddpm", "ddim", "ddim-inverse", "lcm"):
        values["clip_sample"] = False
    if name in ("plms", "pndm"):
        values["skip_prk_steps"] = name == "plms"
    if name == "dpm-singlestep":  # steps would end inside a block
        values["lower_order_final"] = True
    known = signature(SCHEDULERS[name].__init__).parameters
    return SCHEDULERS[name](**{key: value for key, value in values.items() if key in known or key in options})


@dataclass(frozen=True)
class Job:
    """One run of a pipeline, as diffusers' pipelines understand it.

    Attributes:
        shape: of the latents.
        start: x0 to start from (image-to-image, inpainting).
        mask: 1 where inpainting paints.
    """

    shape: tuple[int, ...]
    steps: int
    guidance_scale: float
    condition: float = 0.7
    negative: float = -0.4
    start: Tensor | None = None
    strength: float = 1.0
    mask: Tensor | None = None

    @property
    def first_step(self) -> int:
        """`get_timesteps(strength)` of StableDiffusionImg2ImgPipeline."""
        return max(self.steps - min(int(self.steps * self.strength), self.steps), 0)


def run(
    peer: Any, network: Network, job: Job, generator: torch.Generator, *, dtype: torch.dtype, eta: float | None = None
) -> Tensor:
    """The final latents of StableDiffusionPipeline, -Img2ImgPipeline or -InpaintPipeline, in their order of calls and draws."""
    peer.set_timesteps(job.steps)
    timesteps = peer.timesteps[job.first_step :]
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(job.first_step)
    noise = randn_tensor(job.shape, generator=generator, dtype=dtype)
    if job.start is None or (job.mask is not None and job.strength == 1):
        x = noise * peer.init_noise_sigma
    else:
        x = peer.add_noise(job.start, noise, timesteps[:1])
    c = torch.tensor([[job.negative]] * len(x) + [[job.condition]] * len(x), dtype=dtype)
    options = {"generator": generator} if eta is None else {"generator": generator, "eta": eta}
    if isinstance(peer, diffusers.EulerDiscreteScheduler):
        del options["generator"]
    for i, t in enumerate(timesteps):
        both = peer.scale_model_input(torch.cat([x, x]), t)
        without, with_ = network(both, t.to(dtype).expand(len(both)), c).chunk(2)
        (without, _), (with_, *variance) = (part.tensor_split((x.shape[1],), dim=1) for part in (without, with_))
        output = torch.cat([without + job.guidance_scale * (with_ - without), *variance], dim=1)  # as IFPipeline has it
        x = peer.step(output, t, x, **options).prev_sample
        if job.mask is not None:
            kept = job.start
            if i + 1 < len(timesteps):
                kept = peer.add_noise(kept, noise, timesteps[i + 1 : i + 2])
            x = (1 - job.mask) * kept + job.mask * x
    return x
