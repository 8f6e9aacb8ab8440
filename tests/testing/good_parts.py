"""One small part of each kind that keeps every promise; what is broken on purpose is made from it."""

import dataclasses
import math

import torch
from pydantic import Field
from torch import nn

import ldmkit
from ldmkit import (
    Autoencoder,
    Condition,
    Conditioner,
    Denoiser,
    Level,
    Levels,
    Posterior,
    Sampler,
    SamplerFacts,
    SamplerState,
    Transition,
)
from ldmkit.errors import InputError, InputTypeError


class GoodSampler(Sampler):
    """Euler's method along the probability flow, with fresh noise where asked for."""

    class Config(ldmkit.Config):
        """Attributes:
        eta: 0 takes no noise, 1 as much as the posterior has.
        """

        eta: float = Field(0.0, ge=0, le=1)

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="Song et al. 2021, arXiv:2010.02502")

    def levels(self, schedule, num_inference_steps):
        times = schedule.timesteps(num_inference_steps, integers=False)
        return Levels([*(schedule.level(t) for t in times), Level(1.0, 0.0, 0.0)], at=schedule.at)

    def levels_from_timesteps(self, schedule, timesteps):
        return Levels([*(schedule.level(t) for t in timesteps), Level(1.0, 0.0, 0.0)], at=schedule.at)

    def transition(self, denoise, state):
        level, to = state.level, state.next_level
        x0 = denoise(state.x, level)
        kept = min(1.0, to.sigma * level.alpha / (level.sigma * to.alpha))
        std = self.config.eta * to.sigma * math.sqrt(1 - kept**2)
        on_x = math.sqrt(to.sigma**2 - std**2) / level.sigma
        return Transition(on_x * state.x + (to.alpha - on_x * level.alpha) * x0, std, x0)


class GoodInverse(GoodSampler):
    """Euler's method from an image up to its noise."""

    facts = SamplerFacts(
        order=1, evaluations=1, stochastic=False, source="Song et al. 2021", from_noise=False, inpainting=False
    )

    class Config(ldmkit.Config):
        """Nothing to choose."""

    def levels(self, schedule, num_inference_steps):
        return super().levels(schedule, num_inference_steps).reversed()

    def levels_from_timesteps(self, schedule, timesteps):
        return super().levels_from_timesteps(schedule, timesteps).reversed()

    def init(self, noise, levels, *, start=None):
        return SamplerState(x=start, levels=levels)

    def transition(self, denoise, state):
        level, to = state.level, state.next_level
        x0 = denoise(state.x, to)  # at the level it goes to: an image shows no noise
        noise = (state.x - to.alpha * x0) / to.sigma
        return Transition(to.alpha / level.alpha * state.x + (to.sigma - to.alpha * level.ratio) * noise, 0.0, x0)


class GoodAdaptive(GoodSampler):
    """Euler's method, that takes two steps for each that it is told."""

    facts = SamplerFacts(order=1, evaluations=1, stochastic=False, source="Euler 1768", adaptive=True)

    class Config(GoodSampler.Config):
        """Attributes:
        eta: as before.
        halve: whether it takes two.
        """

        halve: bool = True

    def step(self, denoise, state, noise):
        return dataclasses.replace(super().step(denoise, state, noise), levels=self._halved(state).levels)

    def transition(self, denoise, state):
        halved = self._halved(state)
        return dataclasses.replace(super().transition(denoise, halved), history=() if halved is state else (1,))

    def _halved(self, state):
        if state.history or not self.config.halve or state.level.alpha == 0:
            return state
        levels, middle = list(state.levels), state.levels.between((state.level.ratio + state.next_level.ratio) / 2)
        levels.insert(state.step + 1, middle)
        return dataclasses.replace(state, levels=state.levels.through(levels))


class GoodDenoiser(Denoiser):
    """Two convolutions, moved by time and by what each pixel reads from the tokens."""

    class Config(ldmkit.Config):
        """Attributes:
        channels: of the latents.
        width: inside, and of a token.
        """

        channels: int = Field(4, ge=1)
        width: int = Field(16, ge=1)

    multiple_of = 2
    accepts = frozenset({"tokens_BLC"})
    requires = frozenset({"tokens_BLC"})

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.channels
        self.first = nn.Conv2d(config.channels, config.width, 3, padding=1)
        self.time = nn.Linear(2, config.width)
        self.keys = nn.Linear(config.width, config.width, bias=False)
        self.values = nn.Linear(config.width, config.width)
        self.last = nn.Conv2d(config.width, config.channels, 3, padding=1)
        self.direct = nn.Conv2d(config.channels, config.channels, 1)

    def forward(self, x_BCHW, t_B, condition):
        angles_B = t_B.to(x_BCHW.dtype) / 10
        time_BC = self.time(torch.stack([angles_B.sin(), angles_B.cos()], dim=1))
        h_BCHW = torch.tanh(self.first(x_BCHW) + time_BC[:, :, None, None])
        keys_BLC, values_BLC = condition.extra.get("good.kv") or self._keys_values(condition)
        scores_BPL = h_BCHW.flatten(2).mT @ keys_BLC.mT / self.config.width**0.5
        if condition.mask_BL is not None:
            scores_BPL = scores_BPL.masked_fill(~condition.mask_BL[:, None], -torch.inf)
        read_BPC = scores_BPL.softmax(dim=2) @ values_BLC
        return self.last(h_BCHW + read_BPC.mT.unflatten(2, h_BCHW.shape[2:])) + self.direct(x_BCHW)

    def prepare(self, condition):
        return dataclasses.replace(condition, extra={**condition.extra, "good.kv": self._keys_values(condition)})

    def _keys_values(self, condition):
        return self.keys(condition.tokens_BLC), self.values(condition.tokens_BLC)


class GoodPosterior(Posterior):
    """A Gaussian of standard deviation 1/10 before scaling."""

    def __init__(self, mean, scale, shift):
        self.mean, self.scale, self.shift = mean, scale, shift

    def mode(self):
        return (self.mean - self.shift) * self.scale

    def sample(self, noise_BCHW):
        return (self.mean + 0.1 * noise_BCHW - self.shift) * self.scale

    def loss_B(self):
        return 0.5 * (self.mean**2 + 0.01 - 1 - math.log(0.01)).flatten(1).sum(dim=1)


class GoodAutoencoder(Autoencoder):
    """Patches of 4 x 4 pixels, each to a latent and back."""

    class Config(ldmkit.Config):
        """Attributes:
        latent_channels: of the latents.
        scaling_factor, shift_factor: final latents are (z - shift) * scale.
        """

        latent_channels: int = Field(4, ge=1)
        scaling_factor: float = 1.5
        shift_factor: float = 0.1

    image_channels, downscale = 3, 4

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.latent_channels = config.latent_channels
        self.down = nn.Conv2d(3, config.latent_channels, 4, stride=4)
        self.up = nn.ConvTranspose2d(config.latent_channels, 3, 4, stride=4)

    def encode(self, x_BCHW):
        if x_BCHW.shape[2] % 4 or x_BCHW.shape[3] % 4:
            raise InputError(f"height and width must be multiples of 4, got {tuple(x_BCHW.shape[2:])}")
        return GoodPosterior(self.down(x_BCHW), self.config.scaling_factor, self.config.shift_factor)

    def decode(self, z_BCHW):
        return self.up(z_BCHW / self.config.scaling_factor + self.config.shift_factor)


class GoodConditioner(Conditioner):
    """A token for each byte, which knows its place, the bytes before it and where the picture was cut; a mask over what pads
    short texts.
    """

    class Config(ldmkit.Config):
        """Attributes:
        width: of a token.
        """

        width: int = Field(8, ge=1)

    provides = frozenset({"tokens_BLC"})
    null_input = ""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.bytes = nn.Embedding(257, config.width)  # 256 begins every text
        self.mix = nn.Linear(config.width, config.width)

    def check(self, inputs):
        for text in inputs:
            if not isinstance(text, str):
                raise InputTypeError(f"a prompt must be a string, got {text!r}")

    def forward(self, inputs, *, crops_coords_top_left=(0, 0)):
        self.check(inputs)
        ids = [[256, *text.encode()] for text in inputs]
        longest = max(map(len, ids))
        ids_BL = torch.tensor([[*row, *[0] * (longest - len(row))] for row in ids], device=self.bytes.weight.device)
        mask_BL = torch.tensor([[i < len(row) for i in range(longest)] for row in ids], device=ids_BL.device)
        before_BLC = self.bytes(ids_BL).cumsum(dim=1) / torch.arange(1, longest + 1, device=ids_BL.device)[:, None]
        corner = torch.as_tensor(crops_coords_top_left).to(before_BLC).reshape(-1, 2).sum(dim=1)[:, None, None] / 64
        return Condition(tokens_BLC=torch.tanh(self.mix(before_BLC + corner)), mask_BL=mask_BL)
