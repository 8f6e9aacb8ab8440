"""The built-in samplers. Only the table of parts is here: a sampler is imported when it is built."""

from __future__ import annotations

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """ddpm, ddim, euler, euler-ancestral."""
    return [
        Component(
            kind="sampler",
            name="ddpm",
            target="ldmkit_samplers.ddpm:DDPMSampler",
            summary="Draws from the posterior of the diffusion (Ho et al. 2020); noisy, wants many steps.",
        ),
        Component(
            kind="sampler",
            name="ddim",
            target="ldmkit_samplers.ddim:DDIMSampler",
            summary="Deterministic at eta 0, like DDPM at eta 1 (Song et al. 2021); Stable Diffusion's first.",
        ),
        Component(
            kind="sampler",
            name="euler",
            target="ldmkit_samplers.euler:EulerSampler",
            summary="Euler steps along the probability flow (Karras et al. 2022); ends on the clean image.",
        ),
        Component(
            kind="sampler",
            name="euler-ancestral",
            target="ldmkit_samplers.euler_ancestral:EulerAncestralSampler",
            summary="Euler steps with fresh noise after each (k-diffusion); ends on the clean image.",
        ),
    ]
