"""diffusers' `scheduler_config.json` <-> our sampler, schedule and prediction, as plain values. Nothing is guessed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldmkit.checkpoints.scheduler_classes import (
    BETAS,
    CLASSES,
    ONLY,
    PREDICTIONS,
    RULES,
    UNSERVED,
    WITHOUT_EFFECT,
    SchedulerClass,
)
from ldmkit.checkpoints.scheduler_samplers import Values
from ldmkit.errors import ConfigError

_BETA_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr")
_LEARNED = "learned_range"
_WAY_OUT = "Load with sampler=, schedule= and prediction= to replace it"


# ---------------------------------------------------------------------------------------------------------------------- reading


def read_scheduler(values: Mapping[str, Any]) -> dict[str, Values]:
    """The content of a `scheduler_config.json` => {"sampler": ..., "schedule": ..., "prediction": ...} for `Pipeline`.

    Raises:
        ConfigError: naming the class, or every setting, that cannot be served.
    """
    name = values.get("_class_name")
    known = CLASSES.get(name) if isinstance(name, str) else None
    if known is None:
        why = f" ({UNSERVED[name]})" if isinstance(name, str) and name in UNSERVED else ""
        raise ConfigError(f"the scheduler {name!r} is not supported{why}; known are {', '.join(CLASSES)}. {_WAY_OUT}")
    settings, problems = _settings(values, known)
    rules = [rule for key, rule in RULES.items() if settings.get(key)]
    if len(rules) > 1:
        problems.append(f"{' and '.join(rules)} at once")
    sampler: Values = {}
    if not problems:
        try:
            sampler = known.sampler(settings) | ({"sigma_schedule": rules[0]} if rules else {})
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"diffusers scheduler {name}: {'; '.join(problems)}. {_WAY_OUT}")
    return {"sampler": sampler, "schedule": _schedule(settings, known), "prediction": _prediction(settings, known)}


def _settings(values: Mapping[str, Any], known: SchedulerClass) -> tuple[Values, list[str]]:
    """What is in force for a class, and what of it cannot be served."""
    anywhere = frozenset().union(*(each.reads for each in CLASSES.values())) | WITHOUT_EFFECT
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    problems = [f"unknown key {key!r} (= {given[key]!r})" for key in sorted(given.keys() - anywhere)]
    common = BETAS if known.kind == "ddpm" else {}
    settings = {**common, **known.defaults, **{key: value for key, value in given.items() if key in known.reads}}
    problems += [
        f"{key} = {settings[key]!r} (only {' or '.join(map(repr, allowed))} can be served)"
        for key, allowed in {**ONLY, **known.only}.items()
        if allowed and key in settings and settings[key] not in allowed
    ]
    return settings, problems


def _schedule(settings: Values, known: SchedulerClass) -> Values:
    if known.kind == "flow":
        flow = {key: settings[key] for key in ("num_train_timesteps", "shift")}
        return {"kind": "flow", **flow, "timestep_spacing": "linspace"}
    if known.kind == "edm":
        return {"kind": "edm", **{key: settings[key] for key in ("sigma_min", "sigma_max", "rho")}}
    return {key: settings[key] for key in BETAS}


def _prediction(settings: Values, known: SchedulerClass) -> Values:
    if known.kind == "flow":
        return {"type": "flow"}
    if known.kind == "edm":
        return {"type": "edm", "sigma_data": settings["sigma_data"]}
    variance = {"variance": _LEARNED} if settings.get("variance_type") == _LEARNED else {}
    clip = {"clip": settings["clip_sample_range"]} if settings.get("clip_sample") else {}
    return {"type": settings.get("prediction_type", "epsilon"), **variance, **clip}


# ---------------------------------------------------------------------------------------------------------------------- writing


class _Counterpart(NamedTuple):
    """A class of diffusers, the settings that make it the sampler, and our settings' names there."""

    class_name: str
    fixed: Values
    names: Mapping[str, str]


def _as(class_name: str, *same: str, renamed: Mapping[str, str] | None = None, **fixed: Any) -> _Counterpart:
    return _Counterpart(class_name, fixed, {**{key: key for key in same}, **(renamed or {})})


_ENDING = ("solver_type", "final_sigmas_type")
_PLUS: Values = {"algorithm_type": "dpmsolver++", "solver_order": 2}
_STOCHASTIC: Values = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}
_ORDER = {"order": "solver_order"}
_WRITTEN: Mapping[str, _Counterpart] = {
    "ddpm": _as("DDPMScheduler", renamed={"variance": "variance_type"}, clip_sample=False),
    "ddim": _as("DDIMScheduler", clip_sample=False),
    "ddim-inverse": _as("DDIMInverseScheduler", clip_sample=False),
    "plms": _as("PNDMScheduler", skip_prk_steps=True),
    "pndm": _as("PNDMScheduler", skip_prk_steps=False),
    "euler": _as("EulerDiscreteScheduler"),
    "euler-ancestral": _as("EulerAncestralDiscreteScheduler"),
    "heun": _as("HeunDiscreteScheduler"),
    "dpm-2": _as("KDPM2DiscreteScheduler"),
    "dpm-2-ancestral": _as("KDPM2AncestralDiscreteScheduler"),
    "lms": _as("LMSDiscreteScheduler"),
    "dpm++-sde": _as("DPMSolverSDEScheduler"),
    "dpm-singlestep": _as("DPMSolverSinglestepScheduler", *_ENDING, "algorithm_type", renamed=_ORDER, lower_order_final=True),
    "dpm++-2m": _as("DPMSolverMultistepScheduler", *_ENDING, **_PLUS),
    "dpm++-3m": _as("DPMSolverMultistepScheduler", *_ENDING, **{**_PLUS, "solver_order": 3}),
    "dpm++-2m-sde": _as("DPMSolverMultistepScheduler", *_ENDING, **_STOCHASTIC),
    "deis": _as("DEISMultistepScheduler", renamed=_ORDER, algorithm_type="deis", solver_type="logrho"),
    "unipc": _as("UniPCMultistepScheduler", *_ENDING, renamed=_ORDER, predict_x0=True),
    "lcm": _as("LCMScheduler", "original_inference_steps", "timestep_scaling"),
    "tcd": _as("TCDScheduler", "original_inference_steps"),
}
_WRITTEN_EDM: Mapping[str, _Counterpart] = {
    "euler": _as("EDMEulerScheduler"),
    "dpm++-2m": _as("EDMDPMSolverMultistepScheduler", *_ENDING, **_PLUS),
    "dpm++-3m": _as("EDMDPMSolverMultistepScheduler", *_ENDING, **{**_PLUS, "solver_order": 3}),
    "dpm++-2m-sde": _as("EDMDPMSolverMultistepScheduler", *_ENDING, **_STOCHASTIC),
}


def read_betas(values: Mapping[str, Any]) -> Values:
    """The betas of a `scheduler_config.json`, of which nothing else is used: diffusers' `low_res_scheduler`.

    Raises:
        ConfigError: for betas that cannot be served.
    """
    betas = {key: values.get(key, BETAS[key]) for key in _BETA_KEYS}
    served = ONLY["beta_schedule"]
    if values.get("trained_betas") is not None or betas["beta_schedule"] not in served:
        raise ConfigError(
            f"diffusers scheduler {values.get('_class_name')}: beta_schedule = {betas['beta_schedule']!r}, trained_betas = "
            f"{values.get('trained_betas')!r} (only {', '.join(served)} and None can be served)"
        )
    return betas


def write_betas(schedule: Values) -> Values:
    """The `scheduler_config.json` of a scheduler that only adds noise."""
    return {"_class_name": "DDPMScheduler", **{key: schedule[key] for key in _BETA_KEYS}}


def write_scheduler(name: str, config: Values, defaults: Values, schedule: Values, prediction: Values) -> Values:
    """Our sampler's name, config and the config's defaults, schedule and prediction => a `scheduler_config.json`.

    Raises:
        ConfigError: naming what diffusers has no counterpart for.
    """
    kind = schedule.get("kind", "ddpm")
    if kind == "flow":
        raise ConfigError("diffusers' pipelines for U-Nets cannot run its flow-matching schedulers; save in our own format")
    known = _WRITTEN_EDM if kind == "edm" else _WRITTEN
    if name not in known:
        raise ConfigError(
            f"diffusers has no scheduler for the sampler {name!r} with a schedule of the kind {kind!r}; "
            f"assign one of {', '.join(known)} first"
        )
    counterpart = _counterpart(name, known, config)
    result: Values = {"_class_name": counterpart.class_name, **counterpart.fixed}
    if kind == "edm":
        result |= {key: schedule[key] for key in ("sigma_min", "sigma_max", "rho")}
        problems: list[str] = []
    else:
        problems = _write_betas(result, schedule, config)
    problems += _write_config(result, counterpart, config, defaults)
    problems += _write_prediction(result, prediction, kind)
    if problems:
        raise ConfigError(
            f"{counterpart.class_name} of diffusers cannot express, for the sampler {name!r}: {'; '.join(problems)}"
        )
    return result


def _counterpart(name: str, known: Mapping[str, _Counterpart], config: Values) -> _Counterpart:
    """Singlestep of order 1 is multistep as well, which has times of all spacings. Raises: ConfigError for what it refuses."""
    if name != "dpm-singlestep":
        return known[name]
    plus = config.get("algorithm_type") != "dpmsolver"
    if not plus and config.get("final_sigmas_type") != "sigma_min":
        raise ConfigError(
            "DPMSolverSinglestepScheduler of diffusers refuses algorithm_type 'dpmsolver' with final_sigmas_type 'zero'"
        )
    if config.get("order") != 1 or not plus:
        return known[name]
    return _as("DPMSolverMultistepScheduler", *_ENDING, "algorithm_type", renamed=_ORDER)


def _write_betas(result: Values, schedule: Values, config: Values) -> list[str]:
    """A table's settings; the sampler's own spacing goes before the schedule's."""
    known = CLASSES[result["_class_name"]]
    wanted = {**schedule, "timestep_spacing": config.get("timestep_spacing") or schedule["timestep_spacing"]}
    if wanted["timestep_spacing"] == "linspace":
        wanted["steps_offset"] = 0 if "steps_offset" not in known.reads else wanted["steps_offset"]  # without effect there
    problems = ["timestep_spacing 'quadratic'"] if wanted["timestep_spacing"] == "quadratic" else []
    for key, value in wanted.items():
        if key in known.reads:
            result[key] = value
        elif value != {**BETAS, **known.defaults}.get(key) and key != "set_alpha_to_one":
            problems.append(f"schedule {key} = {value!r}")
    return problems


def _write_config(result: Values, counterpart: _Counterpart, config: Values, defaults: Values) -> list[str]:
    """The sampler's settings."""
    problems, reads = [], CLASSES[counterpart.class_name].reads
    for key, value in config.items():
        if key in counterpart.names:
            result[counterpart.names[key]] = value
        elif key == "sigma_schedule":
            if "sigma_schedule" in reads and value in (None, "exponential"):
                result[key] = value or "karras"
                continue
            rule = next((switch for switch, rule in RULES.items() if rule == value), None)
            if value is not None and rule in reads:
                result[rule] = True
            elif value is not None:
                problems.append(f"sigma_schedule = {value!r}")
        elif value != defaults.get(key) and (key != "timestep_spacing" or "sigma_schedule" in reads):
            problems.append(f"{key} = {value!r}")
    return problems


def _write_prediction(result: Values, prediction: Values, kind: str) -> list[str]:
    problems = []
    learned = prediction.get("variance") == _LEARNED
    if learned != (result.get("variance_type") == _LEARNED):  # their other schedulers take no second half of channels
        problems.append(f"variance {prediction.get('variance')!r} of the prediction")
    clip = prediction.get("clip")
    if clip is not None and result["_class_name"] == "DDPMScheduler":  # DDIM there keeps the noise of the unclipped x0
        result |= {"clip_sample": True, "clip_sample_range": clip}
    elif clip is not None:
        problems.append(f"clip = {clip:g} of the prediction")
    if kind == "edm" and prediction.get("type") == "edm":
        result |= {"prediction_type": "epsilon", "sigma_data": prediction["sigma_data"]}
    elif kind != "edm" and prediction.get("type") in PREDICTIONS and prediction.get("x0_above_sigma") is None:
        result["prediction_type"] = prediction["type"]
    else:
        problems.append(f"prediction {prediction!r}")
    return problems
