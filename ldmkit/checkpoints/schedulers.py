"""diffusers' `scheduler_config.json` <-> our sampler, schedule and prediction, as plain values. Nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ldmkit.errors import ConfigError

Values = dict[str, Any]

_SCHEDULE = {  # keys that are the schedule's, with the defaults most classes of diffusers have
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
_BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
_SIGMAS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential", "use_beta_sigmas": "beta"}
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v_prediction", "sample": "sample"}
_ONLY: Mapping[str, tuple[Any, ...]] = {  # switches, and the values that can be served
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++", "deis"),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "euler_at_final": (False,),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, None),
    "lower_order_final": (True,),
    "predict_x0": (True,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "skip_prk_steps": (True,),
    "solver_p": (None,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_large", "learned_range"),
}
_WITHOUT_EFFECT = frozenset(  # read only where a switch above is turned
    {"clip_sample_range", "dynamic_thresholding_ratio", "flow_shift", "sample_max_value", "time_shift_type"}
)
_SPACED = frozenset({*_SCHEDULE, "trained_betas", "prediction_type"}) - {"set_alpha_to_one", "rescale_betas_zero_snr"}
_CLIPPED = frozenset({"clip_sample", "thresholding"})
_SOLVER = frozenset({"thresholding", "lower_order_final", "use_flow_sigmas", "use_dynamic_shifting", "algorithm_type"})


@dataclass(frozen=True)
class _Class:
    """One scheduler class of diffusers.

    Attributes:
        sampler: the values of its sampler, from the settings; None for a setting that ours does not have.
        reads: the settings it has; diffusers passes over others, which another class had left in the file.
        defaults: where they are not those of `_SCHEDULE`, and of switches.
    """

    sampler: Callable[[Values], Values]
    reads: frozenset[str]
    defaults: Values = field(default_factory=dict)


def _plain(name: str, **renamed: str) -> Callable[[Values], Values]:
    def sampler(given: Values) -> Values:
        return {"name": name, **{ours: given[theirs] for ours, theirs in renamed.items() if theirs in given}}

    return sampler


def _dpm(given: Values) -> Values:
    stochastic = given["algorithm_type"] == "sde-dpmsolver++"
    if given["solver_order"] != 2:
        raise ConfigError(f"solver_order = {given['solver_order']} (only 2 can be served)")
    if given["algorithm_type"] == "deis":
        raise ConfigError("algorithm_type = 'deis' belongs to DEISMultistepScheduler")
    name = "dpm++-2m-sde" if stochastic else "dpm++-2m"
    return {"name": name, "solver_type": given["solver_type"], "final_sigmas_type": given["final_sigmas_type"]}


def _deis(given: Values) -> Values:
    if given["solver_type"] != "logrho" or given["algorithm_type"] != "deis":
        raise ConfigError(f"solver_type = {given['solver_type']!r}, algorithm_type = {given['algorithm_type']!r}")
    return {"name": "deis", "order": given["solver_order"]}


def _ending_clean(make: Callable[[Values], Values]) -> Callable[[Values], Values]:
    def sampler(given: Values) -> Values:
        if given.get("final_sigmas_type", "zero") != "zero":
            raise ConfigError(f"final_sigmas_type = {given['final_sigmas_type']!r} (only 'zero' can be served)")
        return make(given)

    return sampler


_LEADING: Values = {"timestep_spacing": "leading"}
_SOLVER_DEFAULTS: Values = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_DENOISING: Values = {"beta_start": 0.00085, "beta_end": 0.012}
_KARRAS = frozenset(_SIGMAS)
CLASSES: Mapping[str, _Class] = {
    "DDPMScheduler": _Class(
        _plain("ddpm", variance="variance_type"),
        _SPACED | _CLIPPED | {"variance_type", "rescale_betas_zero_snr"},
        {**_LEADING, "clip_sample": True, "variance_type": "fixed_small"},
    ),
    "DDIMScheduler": _Class(
        _plain("ddim"),
        _SPACED | _CLIPPED | {"set_alpha_to_one", "rescale_betas_zero_snr"},
        {**_LEADING, "clip_sample": True},
    ),
    "PNDMScheduler": _Class(
        _plain("plms"),
        _SPACED | {"skip_prk_steps", "set_alpha_to_one"},
        {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "EulerDiscreteScheduler": _Class(
        _ending_clean(_plain("euler")),
        _SPACED
        | _KARRAS
        | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "rescale_betas_zero_snr", "final_sigmas_type"},
    ),
    "EulerAncestralDiscreteScheduler": _Class(_plain("euler-ancestral"), _SPACED | {"rescale_betas_zero_snr"}),
    "HeunDiscreteScheduler": _Class(_plain("heun"), _SPACED | _KARRAS | {"clip_sample"}, _DENOISING),
    "KDPM2DiscreteScheduler": _Class(_plain("dpm-2"), _SPACED | _KARRAS, _DENOISING),
    "KDPM2AncestralDiscreteScheduler": _Class(_plain("dpm-2-ancestral"), _SPACED | _KARRAS, _DENOISING),
    "LMSDiscreteScheduler": _Class(_plain("lms"), _SPACED | _KARRAS),
    "DPMSolverMultistepScheduler": _Class(
        _dpm,
        _SPACED
        | _KARRAS
        | _SOLVER
        | {
            "solver_order",
            "solver_type",
            "final_sigmas_type",
            "euler_at_final",
            "use_lu_lambdas",
            "lambda_min_clipped",
            "variance_type",
            "rescale_betas_zero_snr",
        },
        {**_SOLVER_DEFAULTS, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"},
    ),
    "LCMScheduler": _Class(
        _plain("lcm", original_inference_steps="original_inference_steps", timestep_scaling="timestep_scaling"),
        _SPACED | _CLIPPED | {"set_alpha_to_one", "rescale_betas_zero_snr", "original_inference_steps", "timestep_scaling"},
        {**_LEADING, **_DENOISING, "beta_schedule": "scaled_linear", "original_inference_steps": 50, "timestep_scaling": 10.0},
    ),
    "DEISMultistepScheduler": _Class(
        _deis,
        _SPACED | _KARRAS | _SOLVER | {"solver_order", "solver_type"},
        {**_SOLVER_DEFAULTS, "algorithm_type": "deis", "solver_type": "logrho"},
    ),
    "UniPCMultistepScheduler": _Class(
        _plain("unipc", order="solver_order", solver_type="solver_type", final_sigmas_type="final_sigmas_type"),
        _SPACED
        | _KARRAS
        | (_SOLVER - {"algorithm_type"})
        | {
            "solver_order",
            "solver_type",
            "final_sigmas_type",
            "predict_x0",
            "disable_corrector",
            "solver_p",
            "rescale_betas_zero_snr",
            "sigma_min",
            "sigma_max",
            "shift_terminal",
        },
        {**_SOLVER_DEFAULTS, "solver_type": "bh2"},
    ),
}
"""The classes that can be served, by name."""


def read_scheduler(values: Mapping[str, Any]) -> dict[str, Values]:
    """The content of a `scheduler_config.json` => {"sampler": ..., "schedule": ..., "prediction": ...} for `Pipeline`.

    Raises:
        ConfigError: naming the class, or every setting, that cannot be served.
    """
    name = values.get("_class_name")
    if not isinstance(name, str) or name not in CLASSES:
        raise ConfigError(f"the scheduler {name!r} is not supported; known are {', '.join(CLASSES)}. {_WAY_OUT}")
    known = CLASSES[name]
    elsewhere = frozenset().union(*(other.reads for other in CLASSES.values())) | _WITHOUT_EFFECT
    given = {key: value for key, value in values.items() if not key.startswith("_")}
    problems = [f"unknown key {key!r} (= {given[key]!r})" for key in sorted(given.keys() - elsewhere)]
    settings = {**_SCHEDULE, **known.defaults, **{key: value for key, value in given.items() if key in known.reads}}
    problems += [
        f"{key} = {settings[key]!r} (only {' or '.join(map(repr, allowed))} can be served)"
        for key, allowed in _ONLY.items()
        if key in settings and settings[key] not in allowed
    ]
    if settings["beta_schedule"] not in _BETAS:
        problems.append(f"beta_schedule = {settings['beta_schedule']!r} (only {', '.join(_BETAS)} can be served)")
    prediction = settings.get("prediction_type", "epsilon")
    if prediction not in tuple(_PREDICTIONS):  # which, unlike a dict, can be asked for anything
        problems.append(f"prediction_type = {prediction!r} (only {', '.join(_PREDICTIONS)} can be served)")
    rules = [rule for key, rule in _SIGMAS.items() if settings.get(key)]
    if len(rules) > 1:
        problems.append(f"{' and '.join(rules)} sigmas at once")
    sampler: Values = {}
    if not problems:
        try:
            sampler = known.sampler(settings)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError(f"diffusers scheduler {name}: {'; '.join(problems)}. {_WAY_OUT}")
    return {
        "sampler": sampler | ({"sigma_schedule": rules[0]} if rules else {}),
        "schedule": {key: settings[key] for key in _SCHEDULE},
        "prediction": {"type": _PREDICTIONS[prediction], **_variance(settings)},
    }


def _variance(settings: Values) -> Values:
    return {"variance": _LEARNED} if settings.get("variance_type") == _LEARNED else {}


_LEARNED = "learned_range"
_WAY_OUT = "Load with sampler=, schedule= and prediction= to replace it"

_WRITTEN: Mapping[str, tuple[str, Values]] = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False}),
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm-2": ("KDPM2DiscreteScheduler", {}),
    "dpm-2-ancestral": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpm++-2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++-2m-sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "lcm": ("LCMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho"}),
    "unipc": ("UniPCMultistepScheduler", {"predict_x0": True}),
}
_THEIR_NAMES = {
    ("ddpm", "variance"): "variance_type",
    ("deis", "order"): "solver_order",
    ("unipc", "order"): "solver_order",
    **{(name, key): key for name in ("dpm++-2m", "dpm++-2m-sde", "unipc") for key in ("solver_type", "final_sigmas_type")},
    **{("lcm", key): key for key in ("original_inference_steps", "timestep_scaling")},
}


def write_scheduler(name: str, config: Values, defaults: Values, schedule: Values, prediction: Values) -> Values:
    """Our sampler's name, config and the config's defaults, schedule and prediction => a `scheduler_config.json`.

    Raises:
        ConfigError: naming what diffusers has no counterpart for.
    """
    if name not in _WRITTEN:
        raise ConfigError(f"diffusers has no scheduler for the sampler {name!r}; assign one of {', '.join(_WRITTEN)} first")
    class_name, fixed = _WRITTEN[name]
    result: Values = {"_class_name": class_name, **fixed}
    problems = []
    reads = CLASSES[class_name].reads
    for key, value in schedule.items():
        if key in reads:
            result[key] = value
        elif value != {**_SCHEDULE, **CLASSES[class_name].defaults}.get(key) and key != "set_alpha_to_one":
            problems.append(f"schedule {key} = {value!r}")
    if "beta_start" not in schedule:
        problems.append("a schedule that has no betas")
    if schedule.get("timestep_spacing") == "quadratic":
        problems.append("timestep_spacing 'quadratic'")
    for key, value in config.items():
        theirs = _THEIR_NAMES.get((name, key))
        if theirs is not None:
            result[theirs] = value
        elif key == "sigma_schedule":
            rule = next((switch for switch, rule in _SIGMAS.items() if rule == value), None)
            if value is not None and rule in reads:
                result[rule] = True
            elif value is not None:
                problems.append(f"sigma_schedule = {value!r}")
        elif key == "timestep_spacing":
            result[key] = value or schedule.get(key)
        elif value != defaults.get(key):
            problems.append(f"{key} = {value!r}")
    learned = prediction.get("variance") == _LEARNED
    if learned != (result.get("variance_type") == _LEARNED):  # their other schedulers take no second half of channels
        problems.append(f"variance {prediction.get('variance')!r} of the prediction")
    if prediction.get("type") not in _PREDICTIONS or prediction.get("x0_above_sigma") is not None:
        problems.append(f"prediction {prediction!r}")
    if problems:
        raise ConfigError(f"{class_name} of diffusers cannot express, for the sampler {name!r}: {'; '.join(problems)}")
    return result | {"prediction_type": prediction["type"]}
