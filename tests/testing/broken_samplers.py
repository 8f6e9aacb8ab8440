"""A sampler for every property, broken so that the property does not hold."""

import dataclasses
import time

import pydantic
import torch
from pydantic import Field

import ldmkit
from ldmkit import Level, Levels, SamplerFacts
from ldmkit.config import Config as BaseConfig
from ldmkit.testing import conformance
from tests.testing.good_parts import GoodAdaptive, GoodInverse, GoodSampler


class Lax(GoodSampler):
    """Takes any key."""

    class Config(GoodSampler.Config):
        """Takes any key; eta: as before."""

        model_config = pydantic.ConfigDict(extra="ignore")


class Forgetful(GoodSampler):
    """Keeps another config than it was given."""

    def __init__(self, config):
        super().__init__(config.replace(eta=0.5))


class Wordless(GoodSampler):
    """Says nothing of a field."""

    class Config(BaseConfig):
        """Nothing."""

        eta: float = Field(0.0, ge=0, le=1)
        mystery: float = 1.0


class Moody(GoodSampler):
    """Counts its steps, and goes by the count."""

    def __init__(self, config):
        super().__init__(config)
        self.calls = [0]

    def transition(self, denoise, state):
        self.calls[0] += 1
        return super().transition(lambda x, level: denoise(x, level) * (1 + 1e-3 * self.calls[0]), state)


class Unseeded(GoodSampler):
    """Draws from the global generator."""

    def transition(self, denoise, state):
        return super().transition(lambda x, level: denoise(x, level) + torch.rand(()), state)


class Lossy(GoodSampler):
    """Is not the same when it is built from its saved config."""

    class Config(GoodSampler.Config):
        """Attributes:
        eta: as before; rounded when it is written.
        """

        @pydantic.field_serializer("eta")
        def _rounded(self, eta: float) -> float:
            return round(eta)


class OneTooMany(GoodSampler):
    """Takes a step more than it is asked for."""

    def levels(self, schedule, num_inference_steps):
        return super().levels(schedule, num_inference_steps + 1)


class Deaf(GoodSampler):
    """Has its own times whatever a user says."""

    def levels_from_timesteps(self, schedule, timesteps):
        return self.levels(schedule, len(timesteps))


class Doubling(GoodSampler):
    """Computes in double precision, and stays there."""

    def step(self, denoise, state, noise):
        after = super().step(denoise, state, noise)
        return state.advance(after.x.double(), denoised=after.denoised)


class Crowded(GoodSampler):
    """Takes the batch's mean for the image."""

    def transition(self, denoise, state):
        return super().transition(lambda x, level: denoise(x, level) + 0.01 * x.mean(), state)


class Remembering(GoodSampler):
    """A multistep method whose memory is in itself, not in the state."""

    def transition(self, denoise, state):
        law = super().transition(lambda x, level: denoise(x, level) + 0.1 * getattr(self, "last", 0.0), state)
        self.last = law.denoised
        return law


class Shared(GoodSampler):
    """Keeps the current latents in itself while the model runs."""

    def transition(self, denoise, state):
        self.x = state.x
        time.sleep(0.002)
        denoise(state.x, state.level)
        return super().transition(lambda x, level: denoise(self.x, level), state)


class InPlace(GoodSampler):
    """Writes into the latents it was given."""

    def transition(self, denoise, state):
        law = super().transition(denoise, state)
        state.x.mul_(0.5)
        return law


class Boasting(GoodSampler):
    """Says that it makes two evaluations."""

    facts = SamplerFacts(order=1, evaluations=2, stochastic=False, source="nowhere")


class Short(GoodSampler):
    """Goes nine tenths of the way."""

    def transition(self, denoise, state):
        return super().transition(lambda x, level: 0.9 * denoise(x, level), state)


class TooQuiet(GoodSampler):
    """Adds half of the noise that it makes room for."""

    facts = SamplerFacts(order=None, evaluations=1, stochastic=True, source="nowhere")

    class Config(BaseConfig):
        """eta: as before."""

        eta: float = Field(1.0, ge=0, le=1)

    def transition(self, denoise, state):
        law = super().transition(denoise, state)
        return ldmkit.Transition(law.mean, 0.5 * law.std, law.denoised)


class Optimistic(GoodSampler):
    """Says that it is of second order."""

    facts = SamplerFacts(order=2, evaluations=1, stochastic=False, source="nowhere")


class Unlikely(GoodSampler):
    """Forgets how likely its noise was."""

    class Config(BaseConfig):
        """eta: as before."""

        eta: float = Field(1.0, ge=0, le=1)

    def log_prob_B(self, denoise, state, drawn):
        return super().log_prob_B(denoise, state, drawn) * 0.5


class Rising(GoodSampler):
    """Takes any timesteps, in its own order."""

    def levels_from_timesteps(self, schedule, timesteps):
        levels = super().levels_from_timesteps(schedule, sorted(timesteps, reverse=True))
        return Levels(list(levels), at=schedule.at)


class Upwards(GoodSampler):
    """Goes up in noise from pure noise."""

    def levels(self, schedule, num_inference_steps):
        return super().levels(schedule, num_inference_steps).reversed()


class Jumbled(GoodInverse):
    """Has a user's timesteps the other way round."""

    def levels_from_timesteps(self, schedule, timesteps):
        return super().levels_from_timesteps(schedule, timesteps).reversed()


class Wandering(GoodAdaptive):
    """Takes other steps than it is told, and does not say so."""

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="nowhere")


class Rewriting(GoodAdaptive):
    """Changes the levels that it has passed."""

    def step(self, denoise, state, noise):
        after = super().step(denoise, state, noise)
        first = Level(after.levels[0].alpha, after.levels[0].sigma, after.levels[0].t + 1)
        return dataclasses.replace(after, levels=after.levels.through([first, *list(after.levels)[1:]]))


class Obedient(GoodSampler):
    """Says that it chooses its steps, and takes those that it is told."""

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="nowhere", adaptive=True)


class Led(GoodAdaptive):
    """Adapts to the first image of the batch."""

    def transition(self, denoise, state):
        return super().transition(lambda x, level: denoise(x, level) + 0.01 * x[:1].mean(), state)


class Astray(GoodInverse):
    """Goes too far up."""

    def transition(self, denoise, state):
        return super().transition(lambda x, level: 0.9 * denoise(x, level), state)


class OptimisticInverse(GoodInverse):
    """Says that it is of second order."""

    facts = dataclasses.replace(GoodInverse.facts, order=2)


BROKEN = {
    "config is strict": Lax,
    "config round-trips": Forgetful,
    "documented": Wordless,
    "same bits again": Moody,
    "no files, network, global random numbers": Unseeded,
    "saved and loaded, bit for bit": conformance.subject("sampler", Lossy, configs=[{"eta": 0.5}]),
    "levels fall, as many as asked for": OneTooMany,
    "a user's own levels": Rising,
    "shapes and dtypes": Doubling,
    "images are independent": Crowded,
    "stateless": Remembering,
    "threads": Shared,
    "arguments are kept": InPlace,
    "facts": Boasting,
    "a point mass is reached": Short,
    "a Gaussian's variance is reached": TooQuiet,
    "declared order": Optimistic,
    "log-probability of steps": Unlikely,
}
"""By the property that sees it."""

BROKEN_OTHERWISE = [
    ("levels fall, as many as asked for", Upwards),
    ("a user's own levels", Jumbled),
    ("shapes and dtypes", Wandering),
    ("stateless", Rewriting),
    ("facts", Obedient),
    ("images are independent", Led),
    ("a point mass is reached", Astray),
    ("a Gaussian's variance is reached", Astray),
    ("declared order", OptimisticInverse),
]
"""The same for samplers that go up, or choose their steps."""
