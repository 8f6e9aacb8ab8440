"""The four abstract parts and what flows between them.

Shape letters, used as name suffixes everywhere (`x_BCHW`, `tokens_BLC`):
    B batch, C channels, H height, W width, L tokens, N steps. Hidden widths are C as well.

Images are float tensors, RGB in [-1, 1] ("raw pixels"). Latents are "final": already shifted and scaled to about unit
standard deviation by the autoencoder, so that nothing outside it ever sees a scale factor.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, overload

import torch
from torch import Tensor, nn

import ldmkit.config
from ldmkit.briefly import config_briefly, fields_briefly
from ldmkit.errors import ConfigError, InputError

if TYPE_CHECKING:
    from ldmkit.schedule import Schedule


class Part(ABC):
    """What the four kinds share: a nested strict `Config`, and construction from it.

    A concrete part declares `class Config(ldmkit.Config)` with a default for every field where a sensible one exists, and takes
    exactly one constructor argument: that config.
    """

    Config: ClassVar[type[ldmkit.config.Config]]
    config: ldmkit.config.Config

    @classmethod
    def build(cls, **values: Any) -> Self:
        """Build from plain keyword values. Raises: ConfigError on unknown keys or wrong types."""
        return cls(cls.Config.parse(values, owner=cls.__name__))  # type: ignore[call-arg]


# --------------------------------------------------------------------------------------------------------------- autoencoder


class Posterior(ABC):
    """q(z | x) over final latents, as an encoder returns it."""

    @abstractmethod
    def mode(self) -> Tensor:
        """The most likely latents, (B, C, H, W)."""

    @abstractmethod
    def sample(self, noise_BCHW: Tensor) -> Tensor:
        """Latents drawn with the given standard normal noise, (B, C, H, W)."""

    @abstractmethod
    def loss_B(self) -> Tensor:
        """The regulariser of stage one per image, (B,): KL to a standard normal (nats), or the commitment loss."""


class Autoencoder(Part, nn.Module):
    """Raw pixels in [-1, 1] <=> final latents.

    Attributes:
        image_channels, latent_channels: of pictures, and of final latents.
        downscale: pixels per latent along each side; heights and widths must be multiples of it.
    """

    image_channels: int
    latent_channels: int
    downscale: int

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @abstractmethod
    def encode(self, x_BCHW: Tensor) -> Posterior:
        """Raw pixels in [-1, 1] => posterior over final latents (B, latent_channels, H/downscale, W/downscale).

        Raises:
            InputError: for heights and widths that are no multiples of `downscale`.
        """

    @abstractmethod
    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Final latents => raw pixels, nominally in [-1, 1] (not clamped)."""


# ----------------------------------------------------------------------------------------------------------------- condition


@dataclasses.dataclass(frozen=True)
class Condition:
    """What a denoiser is told beside the noisy latents and the time. Every field may be None.

    Attributes:
        tokens_BLC: a sequence for cross-attention.
        mask_BL: bool, True = attend; None = attend to all of `tokens_BLC`.
        vector_BC: a vector added to the time embedding (SDXL's pooled text and sizes).
        labels_B: int64 class labels.
        guidance_B: the guidance scale (1 = none), for models distilled with it as an input.
        spatial_BCHW: channels concatenated to the latents (mask, masked image, semantic map, low-resolution image).
        extra: anything a plugin adds; tensors in it must have the batch first. `denoiser.prepare` keeps keys and values here.
    """

    tokens_BLC: Tensor | None = None
    mask_BL: Tensor | None = None
    vector_BC: Tensor | None = None
    labels_B: Tensor | None = None
    guidance_B: Tensor | None = None
    spatial_BCHW: Tensor | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    FIELDS: ClassVar[tuple[str, ...]] = ("tokens_BLC", "mask_BL", "vector_BC", "labels_B", "guidance_B", "spatial_BCHW")

    __repr__ = fields_briefly

    def given(self) -> frozenset[str]:
        """Names of the tensor fields that are set."""
        return frozenset(name for name in self.FIELDS if getattr(self, name) is not None)

    @property
    def batch_size(self) -> int | None:
        """B, or None for an empty condition."""
        return next((len(getattr(self, name)) for name in self.FIELDS if getattr(self, name) is not None), None)

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """A condition with `function` applied to every tensor, those in `extra` (nested dicts, tuples, lists) included."""
        fields = {name: function(value) for name in self.FIELDS if (value := getattr(self, name)) is not None}
        return dataclasses.replace(self, **fields, extra=_map_nested(self.extra, function))

    def to(self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Condition:
        """Move all tensors; only floating-point tensors change dtype."""
        return self.map(lambda t: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def repeat(self, n: int) -> Condition:
        """Each entry n times in a row (a, a, b, b, ...): several images per prompt."""
        return self.map(lambda t: t.repeat_interleave(n, dim=0))

    def __getitem__(self, index: slice) -> Condition:
        """A slice of the batch."""
        return self.map(lambda t: t[index])

    def merge(self, other: Condition) -> Condition:
        """Both conditions at once. A field that only one has is taken over; vectors, spatial maps and `extra` are joined.

        Tokens are joined along channels when their lengths agree and channels differ (SDXL's two text encoders are merged by a
        conditioner that pads both to 77); anything ambiguous raises.

        Raises:
            InputError: when both set a field that cannot be joined.
        """
        joined: dict[str, Any] = {}
        for name in self.FIELDS:
            a, b = getattr(self, name), getattr(other, name)
            if a is None or b is None:
                joined[name] = b if a is None else a
            elif name in ("vector_BC", "spatial_BCHW"):
                joined[name] = torch.cat([a, b], dim=1)
            elif name == "tokens_BLC" and a.shape[1] == b.shape[1]:
                joined[name] = torch.cat([a, b], dim=2)
            else:
                raise InputError(
                    f"two conditions both set {name} (shapes {tuple(a.shape)} and {tuple(b.shape)}) and there is no one way to "
                    "join them; set it in one of them only, or join them yourself with dataclasses.replace"
                )
        clash = sorted(set(self.extra) & set(other.extra))
        if clash:
            raise InputError(f"two conditions both set extra[{clash[0]!r}]; rename one")
        return Condition(**joined, extra={**self.extra, **other.extra})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Join along the batch, in order. Tokens of different length are padded with zeros, and masked.

        Raises:
            InputError: when the conditions do not set the same fields, or differ in their channels or sizes.
        """
        given = conditions[0].given() - {"mask_BL"}
        for other in conditions[1:]:
            if other.given() - {"mask_BL"} != given:
                raise InputError(
                    f"conditions of one batch must set the same fields; one sets {sorted(given)}, "
                    f"another {sorted(other.given() - {'mask_BL'})}"
                )
        if "tokens_BLC" in given:
            conditions = _pad_tokens(conditions)
        for name in given:
            shapes = [tuple(getattr(c, name).shape) for c in conditions]
            if len({shape[1:] for shape in shapes}) > 1:
                raise InputError(
                    f"conditions of one batch must fit, but their {name} have shapes {' and '.join(map(str, shapes))}"
                )
        fields = {
            name: torch.cat([getattr(c, name) for c in conditions])
            for name in Condition.FIELDS
            if all(getattr(c, name) is not None for c in conditions)
        }
        return Condition(**fields, extra=_cat_nested([c.extra for c in conditions]))


def _pad_tokens(conditions: Sequence[Condition]) -> Sequence[Condition]:
    lengths = {c.tokens_BLC.shape[1] for c in conditions if c.tokens_BLC is not None}
    if len(lengths) == 1 and len({c.mask_BL is None for c in conditions}) == 1:
        return conditions
    length, padded = max(lengths), []
    for c in conditions:
        tokens_BLC = c.tokens_BLC
        assert tokens_BLC is not None
        mask_BL = c.mask_BL if c.mask_BL is not None else tokens_BLC.new_ones(tokens_BLC.shape[:2], dtype=torch.bool)
        missing = length - tokens_BLC.shape[1]
        padded.append(
            dataclasses.replace(
                c,
                tokens_BLC=nn.functional.pad(tokens_BLC, (0, 0, 0, missing)),
                mask_BL=nn.functional.pad(mask_BL, (0, missing)),
            )
        )
    return padded


def _map_nested(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _map_nested(item, function) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_map_nested(item, function) for item in value)
    return value


def _cat_nested(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if isinstance(first, Mapping):
        if any(set(v) != set(first) for v in values):
            raise InputError(f"conditions of one batch must set the same `extra` keys: {[sorted(v) for v in values]}")
        return {key: _cat_nested([v[key] for v in values]) for key in first}
    if isinstance(first, tuple | list):
        return type(first)(_cat_nested(items) for items in zip(*values, strict=True))
    return first


class Conditioner(Part, nn.Module):
    """Turns what a user gives into a `Condition`. An input is what a call has for one picture: a string of its `prompt`, or
    whatever an entry of its `class_labels` is.

    Attributes:
        provides: names of the `Condition` fields it sets (its config may decide). `mask_BL` may come with tokens unnamed.
        null_input: the input that means "nothing asked" ("" for text): the other half of guidance, and guidance dropout.
    """

    provides: frozenset[str]
    null_input: Any

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @abstractmethod
    def forward(self, inputs: Sequence[Any]) -> Condition:
        """One input per image => a condition with batch size len(inputs).

        May take options, keyword arguments with defaults: those that `ldmkit.Pipeline` has by the same name are passed on
        (prompt_2, clip_skip, ...), and `image_size`, (height, width) of what is drawn in pixels, is told wherever it is asked
        for. In training on pictures, so are `original_size`, `crops_coords_top_left` and `target_size`: int64 tensors (B, 2),
        a row for each picture (SDXL, arXiv:2307.01952, sec. 2.2); those who take them take these as well as one pair for all.

        Raises:
            InputTypeError: for an input of the wrong type.
        """

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise a named error for inputs `forward` would refuse, before any work is done. May take `forward`'s options."""

    def add_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Learn new words, all of them or none: word => text encoder ("clip_l", "clip_g", "" = the only one) => vectors (n, C).

        Raises:
            InputError: where there is no vocabulary that could be extended, or a word is in it already.
        """
        raise InputError(f"the conditioner {type(self).__name__} has no vocabulary that textual inversion could extend")


# ------------------------------------------------------------------------------------------------------------------ denoiser

PERTURBED = "perturbed_attention"
"""Key of `Condition.extra` for perturbed-attention guidance: {self-attention layer: which_B}. Where True, the layer's attention
map is the identity: each place keeps its own value. which_B (bool) has one entry per image, or per equal part of the batch."""


class Denoiser(Part, nn.Module):
    """The network: noisy latents, time and condition => a raw prediction (epsilon, v, ...) whose meaning `Prediction` knows.

    Attributes:
        in_channels: channels it takes in all: latents, plus those of `spatial_BCHW`.
        out_channels: channels of its prediction.
        multiple_of: latent heights and widths must be multiples of it.
        accepts: names of the `Condition` fields it uses; anything else given is an error. `mask_BL` goes with `tokens_BLC`.
        requires: those of `accepts` without which it cannot run.
        self_attentions: names of the self-attention layers that heed `PERTURBED`; none = no perturbed-attention guidance.
    """

    in_channels: int
    out_channels: int
    multiple_of: int
    accepts: frozenset[str]
    requires: frozenset[str]
    self_attentions: tuple[str, ...] = ()

    def __init__(self) -> None:
        nn.Module.__init__(self)

    @abstractmethod
    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """Predict.

        Args:
            x_BCHW: noisy latents of about unit variance (x / sqrt(alpha^2 + sigma^2)).
            t_B: times in the units of the training schedule (0 to num_train_timesteps - 1 for DDPM), any float or int dtype.
            condition: what `accepts` allows.

        Returns:
            The raw prediction, (B, out_channels, H, W).
        """

    def prepare(self, condition: Condition) -> Condition:
        """Compute what does not depend on the step (cross-attention's keys and values) once, into `condition.extra`."""
        return condition

    def check(self, condition: Condition) -> None:
        """Raise InputError where the condition sets a field that the network ignores, or lacks one that it needs."""
        self.check_fields(condition.given())

    def check_fields(self, given: frozenset[str]) -> None:
        """`check`, from the names of the fields that will be set."""
        given = given - {"mask_BL"}
        ignored, lacking = sorted(given - self.accepts), sorted(self.requires - given)
        if ignored:
            raise InputError(
                f"{type(self).__name__} would ignore {', '.join(ignored)}: it accepts {sorted(self.accepts) or 'no condition'};"
                " use a conditioner that fits, or a denoiser configured to use it"
            )
        if lacking:
            raise InputError(
                f"{type(self).__name__} needs {', '.join(lacking)}, which the condition (with {sorted(given)}) does not set"
            )


# ------------------------------------------------------------------------------------------------------------------- sampler


@dataclasses.dataclass(frozen=True)
class Level:
    """One noise level: x = alpha * x0 + sigma * noise.

    VP has alpha^2 + sigma^2 = 1, VE has alpha = 1, flow matching has alpha = 1 - sigma. `t` is what the network is told.
    Plain Python floats (float64), so that no coefficient ever waits for a device.
    """

    alpha: float
    sigma: float
    t: float

    @property
    def scale(self) -> float:
        """sqrt(alpha^2 + sigma^2): x / scale has unit variance for unit-variance data."""
        return math.hypot(self.alpha, self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the noise level of variance-exploding samplers (Karras et al. 2022); inf at alpha = 0."""
        return self.sigma / self.alpha if self.alpha else math.inf


class Levels(Sequence[Level]):
    """N + 1 noise levels, from the noisiest to the cleanest; or, `rising`, the other way round, for inversion.

    `initial_scale` is what pure noise is multiplied by to start at the first level. It is the level's own scale unless the
    method's origin has another (Euler with trailing spacing starts at sigma * noise, leaving out the data's own variance).
    `at` gives the level of any ratio sigma / alpha, `at_time` that of any time, for methods that evaluate the model between the
    levels of a run; without them, `between` and `between_times` raise.

    Raises:
        ConfigError: with fewer than two levels, or when the noise rises from one to the next (falls, where it is to rise). It
            may stay: Stable Diffusion's DDIM takes its last step in place when the last time is 0.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        initial_scale: float | None = None,
        at: Callable[[float], Level] | None = None,
        at_time: Callable[[float], Level] | None = None,
        rising: bool = False,
    ) -> None:
        self._levels = tuple(levels)
        self._at, self._at_time = at, at_time
        self.rising = rising
        if len(self._levels) < 2:
            raise ConfigError(f"a sampler needs at least 2 noise levels (1 step), got {len(self._levels)}")
        ratios = [level.ratio for level in self._levels]
        for i, (a, b) in enumerate(pairwise(ratios)):
            high, low = (b, a) if rising else (a, b)
            if not low <= high or low == math.inf:
                way = "rise" if rising else "fall"
                raise ConfigError(f"noise levels must {way}: sigma / alpha is {a:g} at level {i} and {b:g} at level {i + 1}")
        self.initial_scale = self._levels[0].scale if initial_scale is None else initial_scale

    @overload
    def __getitem__(self, index: int) -> Level: ...
    @overload
    def __getitem__(self, index: slice) -> Levels: ...
    def __getitem__(self, index: int | slice) -> Level | Levels:
        """One level, or part of a run. A part from the first level on keeps `initial_scale`."""
        if isinstance(index, int):
            return self._levels[index]
        return self.through(self._levels[index])

    def through(self, levels: Sequence[Level]) -> Levels:
        """Another run of the same schedule. One that starts at the same level keeps `initial_scale`."""
        scale = self.initial_scale if tuple(levels)[:1] == self._levels[:1] else None
        return Levels(levels, initial_scale=scale, at=self._at, at_time=self._at_time, rising=self.rising)

    def reversed(self) -> Levels:
        """The same levels the other way round: from an image up to its noise, or back down."""
        return Levels(self._levels[::-1], at=self._at, at_time=self._at_time, rising=not self.rising)

    def between(self, ratio: float) -> Level:
        """The level whose sigma / alpha is `ratio`, told at the time that the schedule has for it. Raises: InputError."""
        if self._at is None:
            raise InputError(f"these levels say nothing of sigma / alpha = {ratio:g} between them; give them `at=`")
        return self._at(ratio)

    def between_times(self, t: float) -> Level:
        """The level of time t. Raises: InputError."""
        if self._at_time is None:
            raise InputError(f"these levels say nothing of the time {t:g} between them; give them `at_time=`")
        return self._at_time(t)

    def __len__(self) -> int:
        return len(self._levels)

    def __iter__(self) -> Iterator[Level]:
        return iter(self._levels)

    def __repr__(self) -> str:
        return f"Levels({list(self._levels)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Levels) and self._levels == other._levels and self.initial_scale == other.initial_scale

    def __hash__(self) -> int:
        return hash(self._levels)

    @property
    def num_steps(self) -> int:
        """N, the number of steps between the levels."""
        return len(self._levels) - 1


Denoise = Callable[[Tensor, Level], Tensor]
"""D(x, level) -> x0: the model as samplers see it, condition and guidance inside. x is (B, C, H, W) at that level. A sampler
that `takes_variance` is given a `Denoised`."""


class Noise(Protocol):
    """Standard normal noise of the latents' shape."""

    def __call__(self) -> Tensor:
        """A new draw, keyed to the current step."""

    def between(self, high: float, low: float) -> Tensor:
        """The increment of one Brownian motion over [low, high] in sigma / alpha, divided by sqrt(high - low), so that it is
        standard normal: the same motion at every step, so that runs with more or fewer steps see the same noise.
        """


@dataclasses.dataclass(frozen=True)
class Transition:
    """The law of one step: x' ~ N(mean, std^2); or of its first draw, where a step takes several.

    Attributes:
        mean: (B, C, H, W).
        std: a number, or one for each element; 0 is a deterministic step.
        denoised: the estimate of x0 the step is taken by; None in all draws but the last.
        history: what a multistep method carries on.
        draws: whether the step takes noise, even where std is 0; None is where std is not the number 0.
        interval: the ratios (high, low) over which a method of a stochastic differential equation takes the motion's increment;
            None takes a new draw.
        then: from what was drawn to the law of the next draw of the same step; None after the last, which is the next x.
    """

    mean: Tensor
    std: float | Tensor
    denoised: Tensor | None = None
    history: tuple[Any, ...] = ()
    draws: bool | None = None
    interval: tuple[float, float] | None = None
    then: Callable[[Tensor], Transition] | None = None

    __repr__ = fields_briefly

    @property
    def stochastic(self) -> bool:
        """Whether anything is left to chance."""
        return not (isinstance(self.std, float | int) and self.std == 0)

    def sample(self, noise: Noise) -> Tensor:
        """One draw, (B, C, H, W)."""
        if not (self.stochastic if self.draws is None else self.draws):
            return self.mean
        return self.mean + self.std * (noise() if self.interval is None else noise.between(*self.interval))

    def log_prob_B(self, x_BCHW: Tensor) -> Tensor:
        """log density of what was drawn, summed over the elements of each image, (B,) nats.

        Raises:
            InputError: where the step is deterministic.
        """
        std = torch.as_tensor(self.std, dtype=self.mean.dtype, device=self.mean.device)
        if not bool((std > 0).all()):
            raise InputError("this step is deterministic (std = 0), so the next x has no density")
        z = (x_BCHW - self.mean) / std
        return (-0.5 * (z * z + math.log(2 * math.pi)) - torch.log(std)).flatten(1).sum(dim=1)


@dataclasses.dataclass(frozen=True)
class SamplerState:
    """Where a run stands: everything a step needs beside the model and the noise.

    Attributes:
        x: the latents at `levels[step]`, (B, C, H, W).
        levels: the whole schedule of the run.
        step: steps done.
        history: whatever a multistep method carries on; nested tuples of tensors and floats.
        denoised: the latest x0 estimate (for previews and callbacks), None before the first step.
        drawn: what the last step drew, in order; x itself is the last entry (before any blending). See `Sampler.log_prob_B`.
        laws: what each of these was drawn from.
    """

    x: Tensor
    levels: Levels
    step: int = 0
    history: tuple[Any, ...] = ()
    denoised: Tensor | None = None
    drawn: tuple[Tensor, ...] = ()
    laws: tuple[Transition, ...] = ()

    __repr__ = fields_briefly

    @property
    def done(self) -> bool:
        """Whether the last level has been reached."""
        return self.step >= self.levels.num_steps

    @property
    def level(self) -> Level:
        """The level `x` is at."""
        return self.levels[self.step]

    @property
    def next_level(self) -> Level:
        """The level the next step goes to."""
        return self.levels[self.step + 1]

    def advance(
        self,
        x: Tensor,
        *,
        denoised: Tensor | None,
        history: tuple[Any, ...] = (),
        drawn: tuple[Tensor, ...] = (),
        laws: tuple[Transition, ...] = (),
    ) -> SamplerState:
        """The state after one step."""
        step, drawn = self.step + 1, drawn or (x,)
        return dataclasses.replace(self, x=x, step=step, denoised=denoised, history=history, drawn=drawn, laws=laws)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerFacts:
    """What is known of a sampler, for listings and checks.

    Attributes:
        order: of convergence towards the probability flow (with the default config; without its noise), None where it is of
            none; what a run's middle has, since first and last steps may be of lower order.
        evaluations: of the model a step.
        stochastic: whether the default config draws noise in the course of a run.
        source: paper, or the code it is known from.
        from_noise: whether a run can start from pure noise, as text-to-image does.
        image_to_image: whether it can start from an image.
        inpainting: whether the kept part of an image can be blended in after each step.
        resume: whether a run can go on from a saved state.
        stages: whether a run can be handed over to another model after any of its steps, which goes on without a history.
        adaptive: whether a run chooses its own steps: its levels say where it begins and ends, and guess how many steps there
            are; one length of step serves the whole batch.
    """

    order: int | None
    evaluations: int
    stochastic: bool
    source: str
    from_noise: bool = True
    image_to_image: bool = True
    inpainting: bool = True
    resume: bool = True
    stages: bool = True
    adaptive: bool = False


class Sampler(Part):
    """Decides the noise levels and takes the steps. Stateless: one instance serves any number of threads and runs."""

    facts: ClassVar[SamplerFacts | None] = None

    __repr__ = config_briefly

    @property
    def takes_variance(self) -> bool:
        """Whether its steps take the variance that the model predicts beside x0, so that D must give `Denoised`."""
        return False

    def __init__(self, config: ldmkit.config.Config) -> None:
        self.config = config

    @abstractmethod
    def levels(self, schedule: Schedule, num_inference_steps: int) -> Levels:
        """The run's noise levels from the model's `Schedule`.

        Raises:
            InputError: steps below 1 or above what the schedule has.
        """

    def levels_from_timesteps(self, schedule: Schedule, timesteps: Sequence[float]) -> Levels:
        """Levels at the user's own timesteps, falling; the last level is the method's own."""
        raise InputError(f"{type(self).__name__} does not take timesteps=; give num_inference_steps")

    def levels_from_sigmas(self, schedule: Schedule, sigmas: Sequence[float]) -> Levels:
        """Levels at the user's own sigma / alpha ratios, falling; the last one is included as given."""
        raise InputError(f"{type(self).__name__} does not take sigmas=; give num_inference_steps")

    def init(self, noise: Tensor, levels: Levels, *, start: Tensor | None = None) -> SamplerState:
        """The state before the first step.

        Args:
            noise: standard normal, (B, C, H, W).
            start: final latents x0 to begin from (image-to-image): x = alpha x0 + sigma noise at the first level. Without it,
                x is the noise times `levels.initial_scale`.
        """
        first = levels[0]
        x = noise * levels.initial_scale if start is None else first.alpha * start + first.sigma * noise
        return SamplerState(x=x, levels=levels)

    @abstractmethod
    def transition(self, denoise: Denoise, state: SamplerState) -> Transition:
        """The law of the next x given this one, from `state.level` to `state.next_level`. Differentiable where `denoise` is."""

    def step(self, denoise: Denoise, state: SamplerState, noise: Noise) -> SamplerState:
        """One step: a draw from the transition, or several in a row."""
        laws, drawn = [self.transition(denoise, state)], []
        while True:
            drawn.append(laws[-1].sample(noise))
            if laws[-1].then is None:
                break
            laws.append(laws[-1].then(drawn[-1]))
        last = laws[-1]
        return state.advance(drawn[-1], denoised=last.denoised, history=last.history, drawn=tuple(drawn), laws=tuple(laws))

    def log_prob_B(self, denoise: Denoise, state: SamplerState, drawn: Sequence[Tensor]) -> Tensor:
        """log density of what a step from `state` drew (`SamplerState.drawn` after it), (B,) nats; 0 for what it does not draw.

        Differentiable where `denoise` is: the likelihood that policy-gradient fine-tuning needs (Black et al. 2024,
        arXiv:2305.13301, eq. 8).

        Raises:
            InputError: another number of draws than the step has.
        """
        total, law = state.x.new_zeros(len(state.x)), self.transition(denoise, state)
        for i, y in enumerate(drawn):
            total = total + law.log_prob_B(y) if law.stochastic else total
            if (law.then is None) != (i == len(drawn) - 1):
                raise InputError(f"this step of {type(self).__name__} does not make {len(drawn)} draws")
            law = law if law.then is None else law.then(y)
        return total
