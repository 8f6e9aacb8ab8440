"""DDIM inversion: the probability flow from an image up to its noise (Song et al. 2021, arXiv:2010.02502, eq. 14), which
`ddim` leads back down to the image, up to a difference of first order in the steps.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ldmkit.errors import InputError
from ldmkit.interfaces import Denoise, Levels, Sampler, SamplerFacts, SamplerState, Transition
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SamplerConfig
from ldmkit_samplers._multistep import noise_in
from ldmkit_samplers.ddim import DDIMSampler


class DDIMInverseSampler(Sampler):
    """DDIM's levels the other way round. Each step asks the model for the noise at the level that it goes to, since the first
    level, the image, shows none.

    An image goes in as it does for image-to-image, and no noise is added to it:

        >>> pipe = Pipeline.from_pretrained("emoji", sampler="ddim-inverse")                             # doctest: +SKIP
        >>> noise = pipe("", image=photo, guidance_scale=1, output_type="latent").images                 # doctest: +SKIP
        >>> pipe.sampler = "ddim"                                                                        # doctest: +SKIP
        >>> again = pipe("", latents=noise, guidance_scale=1).images                                     # doctest: +SKIP
    """

    class Config(SamplerConfig):
        """Attributes:
        timestep_spacing, sigma_schedule, rho: which levels a run visits; see `SamplerConfig`, and give `ddim` the same.
        """

    facts = SamplerFacts(
        order=1,
        evaluations=1,
        stochastic=False,
        source="Song et al. 2021, arXiv:2010.02502",
        from_noise=False,
        inpainting=False,
    )

    def __init__(self, config: DDIMInverseSampler.Config) -> None:
        super().__init__(config)
        self._forward = DDIMSampler(DDIMSampler.Config.parse(config.to_dict()))

    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """DDIM's, rising. Raises: InputError, as `Schedule.timesteps`."""
        return self._forward.levels(schedule, num_inference_steps).reversed()

    def levels_from_timesteps(self, schedule: Schedule, timesteps: Sequence[float]) -> Levels:
        """The levels that DDIM would visit with these (falling) times, rising. Raises: InputError."""
        return self._forward.levels_from_timesteps(schedule, timesteps).reversed()

    def levels_from_sigmas(self, schedule: Schedule, sigmas: Sequence[float]) -> Levels:
        """The levels that DDIM would visit with these (falling) ratios, rising. Raises: InputError."""
        return self._forward.levels_from_sigmas(schedule, sigmas).reversed()

    def init(self, noise: Tensor, levels: Levels, *, start: Tensor | None = None) -> SamplerState:
        """The image's latents as they are. Raises: InputError without them."""
        if start is None:
            raise InputError("ddim-inverse leads an image up to its noise: give it the image")
        return SamplerState(x=start, levels=levels)

    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The deterministic step up."""
        x, level, to = state.x, state.level, state.next_level
        denoised = denoise(x, to)
        noise = noise_in(x, denoised, to)
        return Transition((to.alpha / level.alpha) * x + (to.sigma - to.alpha * level.ratio) * noise, 0.0, denoised)
