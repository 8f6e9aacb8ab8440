"""The built-in samplers. Only the table of parts is here: a sampler is imported when it is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ldmkit.plugin.spec import Component, Example, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """The family; `ldmkit plugins` lists it."""
    return [
        Component(kind="sampler", name=name, target=f"ldmkit_samplers.{target}", summary=summary)
        for name, target, summary in SAMPLERS
    ]


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """What checks cannot know by themselves."""
    return [Example(kind="sampler", name=name, **told) for name, told in EXAMPLES.items()]


SAMPLERS = (
    ("ddpm", "ddpm:DDPMSampler", "Draws from the posterior of the diffusion (Ho et al. 2020); noisy, wants many steps."),
    ("ddim", "ddim:DDIMSampler", "Deterministic at eta 0, like DDPM at eta 1 (Song et al. 2021); Stable Diffusion's first."),
    ("plms", "plms:PLMSSampler", "Linear multistep in time (Liu et al. 2022), fourth order; needs evenly spaced times."),
    ("pndm", "pndm:PNDMSampler", "plms after three steps of a Runge-Kutta method (Liu et al. 2022), four evaluations each."),
    ("ddim-inverse", "ddim_inverse:DDIMInverseSampler", "DDIM backwards: from an image to the noise that gives it again."),
    ("euler", "euler:EulerSampler", "Euler steps along the probability flow, with churn if asked; for flow matching too."),
    ("euler-ancestral", "euler_ancestral:EulerAncestralSampler", "Euler steps with fresh noise after each (k-diffusion)."),
    ("heun", "heun:HeunSampler", "Second order by two evaluations a step, with churn if asked (Karras et al. 2022)."),
    ("dpm-2", "dpm2:DPM2Sampler", "Second order by a midpoint in log sigma (k-diffusion); two evaluations a step."),
    ("dpm-2-ancestral", "dpm2_ancestral:DPM2AncestralSampler", "dpm-2 with fresh noise after each step (k-diffusion)."),
    ("lms", "lms:LMSSampler", "Linear multistep in sigma (k-diffusion), to fourth order; one evaluation a step."),
    ("dpm-singlestep", "dpm_singlestep:DPMSinglestepSampler", "DPM-Solver and DPM-Solver++ of orders 1 to 3 without memory."),
    ("dpm-adaptive", "dpm_adaptive:DPMAdaptiveSampler", "DPM-Solver-3 with steps as long as a tolerance allows (k-diffusion)."),
    ("dpm++-2m", "dpmpp_2m:DPMpp2MSampler", "Second-order multistep on x0 (Lu et al. 2022); good from 20 steps on."),
    ("dpm++-3m", "dpmpp_3m:DPMpp3MSampler", "dpm++-2m by three estimates instead of two (Lu et al. 2022)."),
    ("dpm++-2s-ancestral", "dpmpp_2s_ancestral:DPMpp2SAncestralSampler", "Second-order singlestep on x0, with fresh noise."),
    ("dpm++-sde", "dpmpp_sde:DPMppSDESampler", "Two evaluations and Brownian noise a step (k-diffusion)."),
    ("dpm++-2m-sde", "dpmpp_2m_sde:DPMpp2MSDESampler", "dpm++-2m of the stochastic equation, with Brownian noise."),
    ("dpm++-3m-sde", "dpmpp_3m_sde:DPMpp3MSDESampler", "dpm++-2m-sde by three estimates instead of two (k-diffusion)."),
    ("lcm", "lcm:LCMSampler", "For latent consistency models (Luo et al. 2023): 1 to 8 steps."),
    ("tcd", "tcd:TCDSampler", "For trajectory consistency models (Zheng et al. 2024): 2 to 20 steps, as much noise as asked."),
    ("consistency", "consistency:ConsistencySampler", "For consistency models (Song et al. 2023): few steps."),
    ("restart", "restart:RestartSampler", "Heun's method, thrown back into noise now and then (Xu et al. 2023)."),
    ("deis", "deis:DEISSampler", "Exponential multistep on the noise, to third order (Zhang and Chen 2023)."),
    ("unipc", "unipc:UniPCSampler", "Predictor and corrector, to third order (Zhao et al. 2023); good from 10 steps on."),
)
"""Name, target, summary."""

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "euler-ancestral": {"noiseless": {"eta": 0.0}},
    "dpm-2-ancestral": {"noiseless": {"eta": 0.0}},
    "dpm-adaptive": {"measured_at": {"icoeff": 0.0}},  # a controller that heeds no error: as many steps as it is told
    "dpm++-2s-ancestral": {"noiseless": {"eta": 0.0}},
    "dpm++-sde": {"noiseless": {"eta": 0.0}},
    "dpm++-2m-sde": {"noiseless": {"eta": 0.0}},
    "dpm++-3m-sde": {"noiseless": {"eta": 0.0}},
    "lcm": {"consistency": True},
    "tcd": {"measured_at": {"eta": 0.0}},  # else it wants a model that answers for jumps to before the next level
    "consistency": {"consistency": True},
    "restart": {"noiseless": {"intervals": []}},
}
"""By name, what checks are to know of a sampler: see `ldmkit.plugin.spec.Example`."""
