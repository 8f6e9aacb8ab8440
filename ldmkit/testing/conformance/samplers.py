"""What samplers promise: runs over any schedule, from arguments alone, and steps of a known law."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ldmkit.continuous import make_schedule
from ldmkit.errors import InputError, LdmkitError, NumericalError
from ldmkit.interfaces import Denoise, Level, Levels, Noise, Sampler, SamplerState
from ldmkit.noise import KeyedNoise, StepNoise
from ldmkit.testing.conformance import laws
from ldmkit.testing.conformance.common import properties_of_all
from ldmkit.testing.conformance.core import Property, Refused, Subject, Trial, alike, apart, same_bits

SCHEDULES = ("ddpm", "trailing", "zero-snr", "flow", "edm")
"""What cases name: kinds of schedules."""
_VALUES: dict[str, dict[str, Any]] = {
    "trailing": {"timestep_spacing": "trailing"},
    "zero-snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "flow": {"kind": "flow"},
    "edm": {"kind": "edm"},
}
SPREAD = 0.5
CHANNELS, SIDE = 2, 3


def posterior_mean(x: Tensor, level: Level) -> Tensor:
    """D of data N(0, SPREAD^2)."""
    return level.alpha * SPREAD**2 / (level.alpha**2 * SPREAD**2 + level.sigma**2) * x


def levels_of(sampler: Sampler, t: Trial, steps: int | None = None) -> Levels:
    """The levels of the case's run. Raises: Refused where the sampler says that it does not serve them."""
    schedule = make_schedule(_VALUES.get(t.case["schedule"]))
    try:
        return sampler.levels(schedule, t.case["steps"] if steps is None else steps)
    except LdmkitError as error:
        raise Refused(str(error)) from error


def begun(sampler: Sampler, noise: Tensor, levels: Levels) -> SamplerState:
    """The first state: from noise; of a sampler that does not start from noise, from an image, SPREAD times that noise."""
    from_noise = sampler.facts is None or sampler.facts.from_noise
    return sampler.init(noise, levels, start=None if from_noise else SPREAD * noise)


def adaptive(sampler: Sampler) -> bool:
    """Whether it says that it chooses its own steps."""
    return sampler.facts is not None and sampler.facts.adaptive


def stepped(sampler: Sampler, denoise: Denoise, state: SamplerState, noise: Noise) -> SamplerState:
    """The state after a step, which is one step on, through the levels it was told; an adaptive sampler has its own.

    Raises:
        Refused: where an adaptive sampler says that no step is short enough for the case's config.
    """
    try:
        after = sampler.step(denoise, state, noise)
    except NumericalError as error:
        if adaptive(sampler):
            raise Refused(str(error)) from error
        raise
    assert after.step == state.step + 1, f"step {state.step} leads to step {after.step}"
    before, now, passed = list(state.levels), list(after.levels), state.step + 1 if adaptive(sampler) else None
    assert now[:passed] == before[:passed], f"step {state.step} changes the run's levels, and facts do not say adaptive"
    return after


def run(
    sampler: Sampler,
    t: Trial,
    *,
    images: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float64,
    denoise: Denoise = posterior_mean,
) -> list[SamplerState]:
    """All states of a run, the first one included. Image k has the same noise in any batch."""
    source = KeyedNoise(t.seed, range(t.batch) if images is None else images)
    levels, denoise = levels_of(sampler, t), laws.told(sampler, denoise)
    states = [begun(sampler, source((len(source.images), CHANNELS, SIDE, SIDE), step=-1, draw=0, dtype=dtype), levels)]
    while not states[-1].done:
        states.append(stepped(sampler, denoise, states[-1], StepNoise(source, states[-1].step, states[-1].x)))
    return states


def use(part: Any, t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A whole run."""
    return tuple(state.x for state in run(part, t, dtype=dtype))


def levels_fall(t: Trial) -> None:
    """`levels` gives as many steps as are asked for, in plain floats, falling in noise, or rising where runs start from images
    only; fewer than one is an InputError.
    """
    sampler, steps = t.build(), t.case["steps"]
    levels = levels_of(sampler, t)
    assert isinstance(levels, Levels), f"levels() gives {type(levels).__name__}"
    assert levels.num_steps == steps, f"{levels.num_steps} steps where {steps} were asked for"
    for level in levels:
        kinds = {type(number) for number in (level.alpha, level.sigma, level.t)}
        assert kinds == {float}, f"{level} is not made of Python floats"
    if levels.rising:
        known = sampler.facts
        assert known is not None and not known.from_noise, "levels rise, and facts do not say that no run starts from noise"
    for a, b in pairwise(levels.reversed() if levels.rising else levels):
        assert b.ratio <= a.ratio, f"sigma / alpha rises from {a.ratio:g} to {b.ratio:g}"
    for impossible in (0, -1):
        try:
            sampler.levels(make_schedule(_VALUES.get(t.case["schedule"])), impossible)
        except InputError:
            continue
        raise AssertionError(f"num_inference_steps = {impossible} is no InputError")


def own_levels(t: Trial) -> None:
    """Levels from a user's timesteps or sigmas are those asked for, falling (rising, where the sampler's levels do); or an
    InputError says that there are none.
    """
    sampler, schedule = t.build(), make_schedule(None)
    for name, asked in (("timesteps", [900.0, 500.0, 20.0]), ("sigmas", [10.0, 2.0, 0.1])):
        try:
            levels = getattr(sampler, f"levels_from_{name}")(schedule, asked)
        except InputError:
            continue
        rising = sampler.levels(schedule, len(asked)).rising
        assert levels.rising == rising, f"levels of {name} {'rise' if levels.rising else 'fall'}, others do not"
        falling = levels.reversed() if rising else levels
        got = [level.t if name == "timesteps" else level.ratio for level in falling][:3]
        assert all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(got, asked, strict=True)), f"{name} {asked} became {got}"
        try:
            getattr(sampler, f"levels_from_{name}")(schedule, asked[::-1])
        except LdmkitError:
            continue
        raise AssertionError(f"rising {name} are taken without an error")


def shapes(t: Trial) -> None:
    """A run keeps the latents' shape and dtype, and stays finite from its start on; its estimates of x0 have that shape."""
    sampler = t.build()
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for state in run(sampler, t, dtype=dtype):
            want = (t.batch, CHANNELS, SIDE, SIDE)
            assert state.x.shape == want and state.x.dtype == dtype, (
                f"latents {want} {dtype} become {tuple(state.x.shape)} {state.x.dtype} after step {state.step}"
            )
            if dtype in (torch.float64, torch.float32):
                assert state.x.isfinite().all(), f"not finite after step {state.step}, in {dtype}"
            if state.step:
                assert state.denoised is not None and state.denoised.shape == want, f"no estimate of x0 after step {state.step}"


def independent(t: Trial) -> None:
    """An image's run does not depend on its neighbours, nor on its place in the batch. An adaptive sampler has one length of
    step for all of them: there it does not depend on its place, nor on how many copies of it there are.
    """
    sampler = t.build()
    together = run(sampler, t)[-1].x
    order = list(range(t.batch))[::-1]
    turned = run(sampler, t, images=order)[-1].x
    assert alike(turned, together[order]), f"in another order: {apart(turned, together[order])}"
    alone = run(sampler, t, images=[1])[-1].x
    beside = run(sampler, t, images=[1] * t.batch)[-1].x[1:2] if adaptive(sampler) else together[1:2]
    assert alike(alone, beside), f"alone: {apart(alone, beside)}"


def stateless(t: Trial) -> None:
    """All that a step needs is in its arguments: a new sampler takes a run up from a copied state, to the same bits."""
    sampler = t.build()
    states = run(sampler, t)
    before = dict(vars(sampler))
    middle = states[len(states) // 2]
    copied = dataclasses.replace(middle, x=middle.x.clone(), history=_copied(middle.history))
    other, source = t.build(), KeyedNoise(t.seed, range(t.batch))
    while not copied.done:
        copied = stepped(other, laws.told(other, posterior_mean), copied, StepNoise(source, copied.step, copied.x))
    assert same_bits(copied.x, states[-1].x), f"taken up at step {middle.step}: {apart(copied.x, states[-1].x)}"
    changed = [name for name, value in vars(sampler).items() if before.get(name) is not value]
    assert not changed, f"a run leaves traces in the sampler: {', '.join(changed)}"


def _copied(value: Any) -> Any:
    """History: nested tuples of tensors and plain numbers."""
    if isinstance(value, tuple):
        return tuple(_copied(item) for item in value)
    assert value is None or isinstance(value, Tensor | float | int), f"the history holds {value!r}, no tensor, number or tuple"
    return value.clone() if isinstance(value, Tensor) else value


def threads(t: Trial) -> None:
    """One sampler serves any number of threads: the same bits as one after the other."""
    sampler = t.build()

    def one(seed: int) -> Tensor:
        with torch.no_grad():  # it is of this thread alone
            return run(sampler, Trial(t.subject, {**t.case, "seed": seed}), denoise=_yielding)[-1].x

    want = [one(seed) for seed in range(6)]
    with ThreadPoolExecutor(len(want)) as pool:
        got = list(pool.map(one, range(6)))
    for seed, (a, b) in enumerate(zip(got, want, strict=True)):
        assert same_bits(a, b), f"run {seed} of 6 at once: {apart(a, b)}"


def _yielding(x: Tensor, level: Level) -> Tensor:
    """Gives other threads their turn in the middle of a step."""
    laws.pause()
    return posterior_mean(x, level)


def inputs_kept(t: Trial) -> None:
    """A step changes nothing that it was given: the state's tensors keep their bits."""
    sampler, source = t.build(), KeyedNoise(t.seed, range(t.batch))
    noise = source((t.batch, CHANNELS, SIDE, SIDE), step=-1, draw=0, dtype=torch.float64)
    state = begun(sampler, noise, levels_of(sampler, t))
    while not state.done:
        x, history = state.x.clone(), _copied(state.history)
        after = stepped(sampler, laws.told(sampler, posterior_mean), state, StepNoise(source, state.step, state.x))
        for got, want in zip(_tensors((state.x, state.history)), _tensors((x, history)), strict=True):
            assert same_bits(got, want), f"step {state.step} writes into its state"
        state = after


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, tuple):
        return [found for item in value for found in _tensors(item)]
    return [value] if isinstance(value, Tensor) else []


def facts(t: Trial) -> None:
    """`facts` are so for the default config: the model's evaluations a step, whether a run draws noise, and whether it chooses
    its own steps.
    """
    sampler, known = t.build(), t.subject.part.facts  # type: ignore[attr-defined]
    levels = levels_of(sampler, t, 12)
    calls, draws, counts = [0], [0], []

    def counted(x: Tensor, level: Level) -> Tensor:
        calls[0] += 1
        return posterior_mean(x, level)

    state = begun(sampler, t.normal(1, 1, 1, 4), levels)
    while not state.done:
        before = calls[0]
        state = stepped(sampler, laws.told(sampler, counted), state, laws.Counting(state.x, draws))
        counts.append(calls[0] - before)
    usual = sorted(counts)[len(counts) // 2]
    assert usual == known.evaluations, f"facts.evaluations = {known.evaluations}, and most steps make {usual} ({counts})"
    assert bool(draws[0]) == known.stochastic, f"facts.stochastic = {known.stochastic}, and a run draws {draws[0]} times"
    assert (state.levels != levels) == known.adaptive, (
        f"facts.adaptive = {known.adaptive}, and of 12 steps {state.step} were taken"
    )
    assert known.source.strip(), "facts.source is empty"


def point_mass(t: Trial) -> None:
    """Where all data is one image x0, a run ends within the noise of its last model evaluation from x0; one that rises keeps to
    alpha x0 + sigma e, with the noise e that it began with, the better the more steps it has.
    """
    sampler = t.build()
    levels = levels_of(sampler, t, 20)
    x0, source = t.normal(1, 1, 4, 4, stream=5), KeyedNoise(t.seed, [0])
    noise = source(x0.shape, step=-1, draw=0, dtype=torch.float64)
    if levels.rising:
        errors = [laws.ray_error(sampler, n, x0, noise) for n in (60, 120)]
        assert errors[1] <= 0.7 * errors[0], f"{errors[0]:.3g} off after 60 steps, and {errors[1]:.3g} after 120"
        return
    state = begun(sampler, noise, levels)
    while not state.done:
        state = stepped(sampler, laws.told(sampler, lambda x, level: x0), state, StepNoise(source, state.step, state.x))
    end = levels[-1]
    off = float((state.x - end.alpha * x0).abs().max())
    limit = 4 * max(end.sigma, levels[-2].sigma * 2**-10)
    assert off <= limit, f"{off:.3g} off, more than {limit:.3g}"


def gaussian(t: Trial) -> None:
    """On Gaussian data, whose D is linear, the variance at the end of a run goes to the data's as steps grow in number."""
    sampler = t.build(**t.subject.measured_at)
    errors = [laws.variance_error(sampler, n, SPREAD, consistency=t.subject.consistency) for n in (60, 120)]
    assert errors[1] <= max(0.7 * errors[0], 1e-3), (
        f"the variance is off by {errors[0]:.3g} of itself after 60 steps, and by {errors[1]:.3g} after 120"
    )


def order(t: Trial) -> None:
    """The error of the probability flow, without the sampler's noise, falls with `facts.order` at least."""
    declared = t.subject.part.facts.order  # type: ignore[attr-defined]
    sampler: Any = t.subject.part.build(**t.subject.noiseless, **t.subject.measured_at)
    errors = [laws.flow_error(sampler, n) for n in (160, 320)]
    measured = math.log2(errors[0] / errors[1]) if min(errors) > 0 else math.inf
    assert measured >= declared - 0.25, (
        f"declared {declared}, measured {measured:.2f} (errors {errors[0]:.3g}, {errors[1]:.3g})"
    )


@torch.enable_grad()
def log_probability(t: Trial) -> None:
    """`log_prob_B` is the log density of what a step drew, and differentiable in `denoise`."""
    sampler, source, weight = t.build(), KeyedNoise(t.seed, range(t.batch)), torch.ones((), dtype=torch.float64)
    weight.requires_grad_()
    noise = source((t.batch, CHANNELS, SIDE, SIDE), step=-1, draw=0, dtype=torch.float64)
    state = begun(sampler, noise, levels_of(sampler, t))

    def weighted(x: Tensor, level: Level) -> Tensor:
        return weight * posterior_mean(x, level)

    denoise = laws.told(sampler, weighted)
    while not state.done:
        traced = laws.Traced(StepNoise(source, state.step, state.x))
        after = stepped(sampler, denoise, state, traced)
        want, drew = laws.density_B(after.drawn, traced.draws)
        got = sampler.log_prob_B(denoise, state, after.drawn)
        assert got.shape == (t.batch,), f"log_prob_B has shape {tuple(got.shape)}, not ({t.batch},)"
        assert alike(got.detach(), want), f"at step {state.step}: {apart(got.detach(), want)} from a change of variables"
        if drew and after.denoised is not None and after.denoised.requires_grad:
            assert got.requires_grad, f"log_prob_B at step {state.step} lets no gradient through to denoise"
        state = dataclasses.replace(after, x=after.x.detach(), history=laws.detached(after.history), drawn=())


def _no_facts(subject: Subject) -> str | None:
    return "it says nothing of itself (`facts` is None)" if subject.part.facts is None else None  # type: ignore[attr-defined]


def _no_given_steps(subject: Subject) -> str | None:
    known = subject.part.facts  # type: ignore[attr-defined]
    if known is None or not known.adaptive or subject.measured_at:
        return None
    return "it chooses its own steps, and `measured_at` does not say how it takes given ones"


def _no_order(subject: Subject) -> str | None:
    if reason := _no_facts(subject) or _no_given_steps(subject):
        return reason
    return "it declares no order" if subject.part.facts.order is None else None  # type: ignore[attr-defined]


PROPERTIES = (
    *properties_of_all(use, "ldmkit.Sampler"),
    Property("levels fall, as many as asked for", levels_fall, "ldmkit.Sampler.levels"),
    Property("a user's own levels", own_levels, "ldmkit.Sampler.levels_from_timesteps", once=True),
    Property("shapes and dtypes", shapes, "ldmkit.Sampler.step"),
    Property("images are independent", independent, "ldmkit.Sampler"),
    Property("stateless", stateless, "ldmkit.SamplerState"),
    Property("threads", threads, "ldmkit.Sampler"),
    Property("arguments are kept", inputs_kept, "ldmkit.SamplerState"),
    Property("facts", facts, "ldmkit.SamplerFacts", once=True, absent=_no_facts),
    Property("a point mass is reached", point_mass, "ldmkit.Sampler.transition", once=True),
    Property("a Gaussian's variance is reached", gaussian, "ldmkit.Sampler.transition", once=True, absent=_no_given_steps),
    Property("declared order", order, "ldmkit.SamplerFacts", once=True, absent=_no_order),
    Property("log-probability of steps", log_probability, "ldmkit.Sampler.log_prob_B"),
)
