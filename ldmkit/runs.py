"""What is left of a run: where it stands, to go on from; and the way it took, for whoever learns from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldmkit.briefly import fields_briefly
from ldmkit.checkpoints.files import write_bytes
from ldmkit.errors import CheckpointError, ConfigError, InputError, InputTypeError
from ldmkit.interfaces import Denoise, Level, Levels, Sampler, SamplerState

KEY = "ldmkit.run"
"""Where the file's JSON is, in the metadata of the safetensors."""


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The way of a run, step by step, with the probability of each.

    Attributes:
        states: before the first step and after each, N + 1. `states[k + 1].drawn` is what step k drew, `states[k + 1].laws` the
            Gaussian laws it was drawn from; `states[k + 1].x` is where the run went on: blended, changed by a callback.
        sampler: whose steps they are.
        guided: makes the run's D(x, level) anew, from the denoiser's weights as they are now.
    """

    states: tuple[SamplerState, ...]
    sampler: Sampler
    guided: Callable[[], Denoise]

    __repr__ = fields_briefly

    @property
    def levels(self) -> Levels:
        """The noise levels gone through."""
        return self.states[-1].levels

    @property
    def latents_NBCHW(self) -> Tensor:
        """The latents at each level, (N + 1, B, C, H, W)."""
        return torch.stack([state.x for state in self.states])

    @property
    def means_NBCHW(self) -> Tensor:
        """The mean of each step's last draw, (N, B, C, H, W)."""
        return torch.stack([state.laws[-1].mean for state in self.states[1:]])

    @property
    def stds(self) -> list[float | Tensor]:
        """The standard deviation of each step's last draw; 0 where nothing is left to chance."""
        return [state.laws[-1].std for state in self.states[1:]]

    @property
    def log_probs_NB(self) -> Tensor:
        """log density of what each step drew when it was drawn, (N, B) nats; 0 for a deterministic step."""
        return torch.stack([_log_prob_B(state) for state in self.states[1:]])

    def log_prob_B(self, step: int, denoise: Denoise | None = None) -> Tensor:
        """The same for one step, (B,), by the weights as they are now and with their gradient: policy-gradient fine-tuning goes
        up `exp(log_prob_B(k) - log_probs_NB[k]) * advantage` (Black et al. 2024, arXiv:2305.13301, eq. 8).

        Args:
            denoise: the run's D where it has been made already (`guided()`, once for the steps of one backward pass).

        Raises:
            InputError: for a step that the trajectory does not have.
        """
        if step not in range(len(self.states) - 1):
            raise InputError(f"step = {step!r}: this trajectory has steps 0 to {len(self.states) - 2}")
        return self.sampler.log_prob_B(denoise or self.guided(), self.states[step], self.states[step + 1].drawn)


def _log_prob_B(after: SamplerState) -> Tensor:
    total = after.x.new_zeros(len(after.x))
    for law, y in zip(after.laws, after.drawn, strict=True):
        total = total + law.log_prob_B(y) if law.stochastic else total
    return total


@dataclasses.dataclass(frozen=True)
class RunState:
    """Where a run stands; `pipe(..., resume=it)` with the call's other arguments goes on to the bits of an unbroken run.

    Attributes:
        state: of the sampler.
        levels: those that the run was begun with (a sampler that chooses its steps puts others into its state).
        seed, first_image: of the keyed noise, as in the call; seed is None where noise came from a generator.
        sampler: class and config, as `describe` has them.
    """

    state: SamplerState
    levels: Levels
    seed: int | list[int] | None
    first_image: int
    sampler: dict[str, Any]

    __repr__ = fields_briefly

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, atomically, with everything that is no tensor as JSON in its metadata.

        Raises:
            InputError: for a run whose noise came from a torch.Generator, or a sampler whose history is not of tensors, numbers
                and tuples. OutputError: where it cannot be written.
        """
        _check_keyed(self.seed)
        tensors: dict[str, Tensor] = {}
        state = self.state
        about = {
            "begun": _numbers(self.levels),
            "levels": _numbers(state.levels),
            "initial_scale": self.levels.initial_scale,
            "rising": self.levels.rising,
            "step": state.step,
            "x": _pack(state.x, tensors),
            "denoised": _pack(state.denoised, tensors),
            "history": _pack(state.history, tensors),
            "seed": self.seed,
            "first_image": self.first_image,
            "sampler": self.sampler,
        }
        write_bytes(Path(path), safetensors.torch.save(tensors, metadata={KEY: json.dumps(about)}))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> RunState:
        """What `save` wrote. Raises: CheckpointError for a file that is missing, damaged or something else."""
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})[KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
        except KeyError:
            raise CheckpointError(f"{path} is a safetensors file, but not the state of a run") from None
        except (OSError, SafetensorError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read as the state of a run: {error}") from None
        try:
            scale, rising = about["initial_scale"], about["rising"]
            begun, levels = (
                Levels([Level(*numbers) for numbers in about[name]], initial_scale=scale, rising=rising)
                for name in ("begun", "levels")
            )
            x, denoised, history = (_unpack(about[name], tensors) for name in ("x", "denoised", "history"))
            state = SamplerState(x=x, levels=levels, step=about["step"], history=history, denoised=denoised)
            return cls(state, begun, about["seed"], about["first_image"], about["sampler"])
        except (ConfigError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} cannot be read as the state of a run: {type(error).__name__}: {error}") from None


def describe(sampler: Sampler) -> dict[str, Any]:
    """Class and config, as JSON."""
    kind = type(sampler)
    return {"class": f"{kind.__module__}:{kind.__qualname__}", "config": sampler.config.to_dict()}


def resumed(resume: Any, *, seed: Any, first_image: int, generator: Any, sampler: Sampler) -> RunState | None:
    """The state to go on from, after checking that the call is the one it was left by. Raises: InputError, InputTypeError."""
    if resume is None:
        return None
    run = RunState.load(resume) if isinstance(resume, str | Path) else resume
    if not isinstance(run, RunState):
        raise InputTypeError(f"resume must be a file or the `state` of an output, got {type(resume).__name__}")
    _check_keyed(run.seed)
    if generator is not None:
        raise InputError("generator was given with resume; a run that goes on has the keyed noise of its seed; leave it out")
    for name, given, had in (("seed", seed, run.seed), ("first_image", first_image or None, run.first_image)):
        if given is not None and given != had:
            raise InputError(f"{name} = {given} was given, but the run to resume has {name} = {had}; leave it out")
    if (now := describe(sampler)) != run.sampler:
        raise InputError(f"the run to resume is of the sampler {run.sampler}, this call's is {now}")
    if sampler.facts is not None and not sampler.facts.resume:
        raise InputError(f"{type(sampler).__name__} cannot resume a run; take it from its start, or take another sampler")
    if run.state.done:
        raise InputError(f"the run to resume has taken all its {run.state.levels.num_steps} steps")
    return run


def rejoin(run: RunState, fresh: SamplerState) -> SamplerState:
    """The saved state on the device of the call's own fresh one. Raises: InputError where levels, sizes or types differ."""
    state, x = run.state, fresh.x
    if run.levels != fresh.levels:
        raise InputError(
            f"the run to resume goes through {run.levels.num_steps} steps from sigma / alpha = {run.levels[0].ratio:g}, "
            f"this call through {fresh.levels.num_steps} from {fresh.levels[0].ratio:g}; give the arguments it was begun with"
        )
    if (state.x.shape, state.x.dtype) != (x.shape, x.dtype):
        raise InputError(
            f"the run to resume has latents {tuple(state.x.shape)} in {state.x.dtype}, this call {tuple(x.shape)} in {x.dtype}"
        )
    on = _to(state.history, x.device)
    denoised = None if state.denoised is None else state.denoised.to(x.device)
    levels = fresh.levels if state.levels == fresh.levels else fresh.levels.through(list(state.levels))
    return dataclasses.replace(fresh, x=state.x.to(x.device), levels=levels, step=state.step, history=on, denoised=denoised)


def _check_keyed(seed: Any) -> None:
    if seed is None:
        raise InputError(
            "this run drew its noise from a torch.Generator, whose next numbers are not in its state; "
            "use seed= to be able to resume"
        )


def _numbers(levels: Levels) -> list[list[float]]:
    return [[level.alpha, level.sigma, level.t] for level in levels]


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON for nested tuples; tensors go into `tensors`."""
    if isinstance(value, Tensor):
        name = f"tensor.{len(tensors)}"
        tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": name}
    if isinstance(value, tuple):
        return {"tuple": [_pack(item, tensors) for item in value]}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise InputError(f"a sampler's history can be saved if made of tensors, numbers and tuples; this one holds {value!r}")


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    return tensors[value["tensor"]] if "tensor" in value else tuple(_unpack(item, tensors) for item in value["tuple"])
