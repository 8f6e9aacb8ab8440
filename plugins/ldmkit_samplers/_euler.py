"""The levels of the Euler family: fractional times, ending on the clean image."""

from __future__ import annotations

from ldmkit.interfaces import Level
from ldmkit.schedule import Schedule
from ldmkit_samplers._base import SpacedSampler


class EulerFamily(SpacedSampler):
    """Methods in sigma / alpha (Karras et al. 2022, arXiv:2206.00364), with the levels of Stable Diffusion's hosts."""

    def initial_scale(self, schedule: Schedule, first: Level) -> float:
        """In the origin's coordinates sqrt(ratio^2 + 1) for leading spacing; for the others ratio, leaving out the data."""
        return 1.0 if self.spacing(schedule) == "leading" else first.sigma
