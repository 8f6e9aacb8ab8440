"""The scheduler classes of diffusers: what each reads from its `scheduler_config.json`, and which of our samplers it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ldmkit.errors import ConfigError

Values = dict[str, Any]

BETAS: Mapping[str, Any] = {  # keys that are a table's, with the defaults most classes have
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "rescale_betas_zero_snr": False,
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "set_alpha_to_one": True,
}
RULES: Mapping[str, str] = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta-sigmas",
}
PREDICTIONS = ("epsilon", "v_prediction", "sample")
ONLY: Mapping[str, tuple[Any, ...]] = {  # settings, and their values that can be served
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "clip_sample": (False,),
    "disable_corrector": ([],),
    "interpolation_type": ("linear",),
    "invert_sigmas": (False,),
    "lambda_min_clipped": (-math.inf, None),
    "lower_order_final": (True,),
    "noise_sampler_seed": (None,),
    "predict_x0": (True,),
    "prediction_type": PREDICTIONS,
    "scale_factors": (None,),
    "shift_terminal": (None,),
    "sigma_max": (None,),
    "sigma_min": (None,),
    "sigma_schedule": ("karras", "exponential"),
    "solver_p": (None,),
    "thresholding": (False,),
    "timestep_type": ("discrete",),
    "trained_betas": (None,),
    "use_dynamic_shifting": (False,),
    "use_flow_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "variance_type": (None, "fixed_small", "fixed_large", "learned_range"),
}
WITHOUT_EFFECT = frozenset(  # read only where a switch above is turned
    {
        *("clip_sample_range", "dynamic_thresholding_ratio", "sample_max_value", "flow_shift", "time_shift_type"),
        *("upscale_mode", "base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len"),
    }
)
FLOW_IN_FLOW = dict.fromkeys(RULES, (False,))
"""Flow matching applies these rules to sigma = s of a straight path, ours to sigma / alpha."""


@dataclass(frozen=True)
class SchedulerClass:
    """One scheduler class of diffusers.

    Attributes:
        sampler: the values of its sampler, from the settings. Raises ConfigError for a combination that ours does not have.
        reads: the settings it has; diffusers passes over others, which another class had left in the file.
        defaults: where they are not those of `BETAS`, and of switches.
        only: the values that can be served, where not those of `ONLY`; () is any.
        kind: of the schedule: a table of betas ("ddpm"), "flow" or "edm".
    """

    sampler: Callable[[Values], Values]
    reads: frozenset[str]
    defaults: Values = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    kind: Literal["ddpm", "flow", "edm"] = "ddpm"


# --------------------------------------------------------------------------------------------------------------------- samplers


def _plain(name: str, **renamed: str) -> Callable[[Values], Values]:
    def sampler(given: Values) -> Values:
        return {"name": name, **{ours: given[theirs] for ours, theirs in renamed.items()}}

    return sampler


def _ending_clean(make: Callable[[Values], Values]) -> Callable[[Values], Values]:
    def sampler(given: Values) -> Values:
        if given["final_sigmas_type"] != "zero":
            raise ConfigError(f"final_sigmas_type = {given['final_sigmas_type']!r} (only 'zero' can be served)")
        return make(given)

    return sampler


def _own(given: Values, key: str, known: tuple[str, ...], foreign: tuple[str, ...]) -> str:
    """A setting by which this class and others mean different things: what another had left becomes this one's first."""
    value = given[key]
    if value not in known + foreign:
        raise ConfigError(f"{key} = {value!r} (only {' or '.join(map(repr, known))} can be served)")
    return str(value if value in known else known[0])


def _pndm(given: Values) -> Values:
    return {"name": "plms" if given["skip_prk_steps"] else "pndm"}


def _multistep(given: Values) -> Values:
    """DPM-Solver++ of orders 1 to 3, and the stochastic one of order 2."""
    order, ending = given["solver_order"], {"final_sigmas_type": given["final_sigmas_type"]}
    algorithm = _own(given, "algorithm_type", ("dpmsolver++", "sde-dpmsolver++"), ("deis",))
    ending["solver_type"] = _own(given, "solver_type", ("midpoint", "heun"), ("logrho", "bh1", "bh2"))
    lowered = order == 1 or (order == 2 and given["final_sigmas_type"] == "zero")  # the last step's order is 1 in any case
    if not given["lower_order_final"] and not lowered:
        raise ConfigError("lower_order_final = False (only True can be served, with this order and ending)")
    if given["euler_at_final"] and not lowered:
        raise ConfigError("euler_at_final = True (only False can be served, with this order and ending)")
    if algorithm == "sde-dpmsolver++":
        if order != 2:
            raise ConfigError(f"solver_order = {order!r} of {algorithm} (only 2 can be served)")
        return {"name": "dpm++-2m-sde", **ending}
    if order not in (1, 2, 3):
        raise ConfigError(f"solver_order = {order!r} (only 1, 2 or 3 can be served)")
    if order == 1:
        return {"name": "dpm-singlestep", "order": 1, "final_sigmas_type": given["final_sigmas_type"]}
    return {"name": f"dpm++-{order}m", **ending}


def _singlestep(given: Values) -> Values:
    algorithm = _own(given, "algorithm_type", ("dpmsolver++", "dpmsolver"), ("deis",))
    solver = _own(given, "solver_type", ("midpoint", "heun"), ("logrho", "bh1", "bh2"))
    ending = given["final_sigmas_type"]
    if not given["lower_order_final"] and ending != "zero":  # with "zero" diffusers turns it on
        raise ConfigError("lower_order_final = False with final_sigmas_type 'sigma_min' (only True can be served)")
    return {
        "name": "dpm-singlestep",
        "order": given["solver_order"],
        "algorithm_type": algorithm,
        "solver_type": solver,
        "final_sigmas_type": ending,
    }


def _deis(given: Values) -> Values:
    _own(given, "algorithm_type", ("deis",), ("dpmsolver", "dpmsolver++"))
    _own(given, "solver_type", ("logrho",), ("midpoint", "heun", "bh1", "bh2"))
    return {"name": "deis", "order": given["solver_order"]}


def _unipc(given: Values) -> Values:
    solver = _own(given, "solver_type", ("bh2", "bh1"), ("midpoint", "heun", "logrho"))
    ending = given["final_sigmas_type"]
    return {"name": "unipc", "order": given["solver_order"], "solver_type": solver, "final_sigmas_type": ending}


def _flow_euler(given: Values) -> Values:
    return {"name": "consistency", "sigma_min": 0.0} if given["stochastic_sampling"] else {"name": "euler"}


def _edm(make: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """EDM's schedule is karras by itself."""

    def sampler(given: Values) -> Values:
        rule = {} if given["sigma_schedule"] == "karras" else {"sigma_schedule": given["sigma_schedule"]}
        return make(given) | rule

    return _ending_clean(sampler)


# ------------------------------------------------------------------------------------------------------------------------ table

_SPACED = frozenset({*BETAS, "trained_betas", "prediction_type"}) - {"set_alpha_to_one", "rescale_betas_zero_snr"}
_CLIPPED = frozenset({"clip_sample", "thresholding"})
_RULES = frozenset(RULES)
_SOLVER = frozenset({"solver_order", "solver_type", "thresholding", "lower_order_final", "algorithm_type"})
_FLOW_SIGMAS = frozenset({"use_flow_sigmas", "use_dynamic_shifting"})
_LEADING: Values = {"timestep_spacing": "leading"}
_SOLVES: Values = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero"}
_PLUS: Values = {**_SOLVES, "algorithm_type": "dpmsolver++", "solver_type": "midpoint", "euler_at_final": False}
_ANY: Mapping[str, tuple[Any, ...]] = {"lower_order_final": (True, False)}
_DENOISING: Values = {"beta_start": 0.00085, "beta_end": 0.012}
_DISTILLED = _SPACED | _CLIPPED | {"set_alpha_to_one", "rescale_betas_zero_snr", "original_inference_steps"}
_DISTILLS: Values = {**_LEADING, **_DENOISING, "beta_schedule": "scaled_linear", "original_inference_steps": 50}
_FLOW = frozenset({"num_train_timesteps", "shift", "use_dynamic_shifting", "invert_sigmas", "shift_terminal", *RULES})
_EDM = frozenset({"sigma_min", "sigma_max", "sigma_data", "rho", "sigma_schedule", "prediction_type", "final_sigmas_type"})
_EDM_DEFAULTS: Values = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "rho": 7.0,
    "sigma_schedule": "karras",
    "final_sigmas_type": "zero",
}

_DDPM = SchedulerClass(
    _plain("ddpm", variance="variance_type"),
    _SPACED | _CLIPPED | {"variance_type", "rescale_betas_zero_snr"},
    {**_LEADING, "clip_sample": True, "variance_type": "fixed_small"},
)
_DDIM = SchedulerClass(
    _plain("ddim"),
    _SPACED | _CLIPPED | {"set_alpha_to_one", "rescale_betas_zero_snr"},
    {**_LEADING, "clip_sample": True},
)
CLASSES: Mapping[str, SchedulerClass] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": SchedulerClass(
        _plain("ddim-inverse"), _DDIM.reads - {"thresholding"}, _DDIM.defaults, {"prediction_type": ("epsilon",)}
    ),
    "PNDMScheduler": SchedulerClass(
        _pndm,
        _SPACED | {"skip_prk_steps", "set_alpha_to_one"},
        {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        _ending_clean(_plain("euler")),
        _SPACED
        | _RULES
        | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "rescale_betas_zero_snr", "final_sigmas_type"},
        {"final_sigmas_type": "zero"},
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(_plain("euler-ancestral"), _SPACED | {"rescale_betas_zero_snr"}),
    "HeunDiscreteScheduler": SchedulerClass(_plain("heun"), _SPACED | _RULES | {"clip_sample"}, _DENOISING),
    "KDPM2DiscreteScheduler": SchedulerClass(_plain("dpm-2"), _SPACED | _RULES, _DENOISING),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(_plain("dpm-2-ancestral"), _SPACED | _RULES, _DENOISING),
    "LMSDiscreteScheduler": SchedulerClass(_plain("lms"), _SPACED | _RULES),
    "DPMSolverSDEScheduler": SchedulerClass(_plain("dpm++-sde"), _SPACED | _RULES | {"noise_sampler_seed"}, _DENOISING),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        _singlestep,
        (_SPACED - {"timestep_spacing", "steps_offset"})
        | _RULES
        | _SOLVER
        | _FLOW_SIGMAS
        | {"final_sigmas_type", "lambda_min_clipped", "variance_type"},
        {**_PLUS, "lower_order_final": False},
        _ANY,
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        _multistep,
        _SPACED
        | _RULES
        | _SOLVER
        | _FLOW_SIGMAS
        | {"final_sigmas_type", "euler_at_final", "use_lu_lambdas", "lambda_min_clipped", "variance_type"}
        | {"rescale_betas_zero_snr"},
        _PLUS,
        _ANY,
    ),
    "DEISMultistepScheduler": SchedulerClass(
        _deis, _SPACED | _RULES | _SOLVER | _FLOW_SIGMAS, {**_SOLVES, "algorithm_type": "deis", "solver_type": "logrho"}
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        _unipc,
        _SPACED
        | _RULES
        | (_SOLVER - {"algorithm_type"})
        | _FLOW_SIGMAS
        | {"final_sigmas_type", "predict_x0", "disable_corrector", "solver_p", "rescale_betas_zero_snr"}
        | {"sigma_min", "sigma_max", "shift_terminal"},
        {**_SOLVES, "solver_type": "bh2"},
    ),
    "LCMScheduler": SchedulerClass(
        _plain("lcm", original_inference_steps="original_inference_steps", timestep_scaling="timestep_scaling"),
        _DISTILLED | {"timestep_scaling"},
        {**_DISTILLS, "timestep_scaling": 10.0},
    ),
    "TCDScheduler": SchedulerClass(  # it has a timestep_scaling too, of which it makes no use
        _plain("tcd", original_inference_steps="original_inference_steps"), _DISTILLED, _DISTILLS
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        _flow_euler,
        _FLOW | {"stochastic_sampling"},
        {"num_train_timesteps": 1000, "shift": 1.0, "stochastic_sampling": False},
        FLOW_IN_FLOW,
        "flow",
    ),
    "FlowMatchLCMScheduler": SchedulerClass(
        lambda given: {"name": "consistency", "sigma_min": 0.0},
        _FLOW | {"scale_factors"},
        {"num_train_timesteps": 1000, "shift": 1.0},
        FLOW_IN_FLOW,
        "flow",
    ),
    "EDMEulerScheduler": SchedulerClass(  # its first sigma is sqrt(sigma_max^2 + 1); ours is the paper's, sigma_max
        _edm(_plain("euler")), _EDM, _EDM_DEFAULTS, {"prediction_type": ("epsilon",), "sigma_min": (), "sigma_max": ()}, "edm"
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        _edm(_multistep),
        _EDM | _SOLVER | {"euler_at_final"},
        {**_PLUS, **_EDM_DEFAULTS},
        {**_ANY, "prediction_type": ("epsilon",), "sigma_min": (), "sigma_max": ()},
        "edm",
    ),
}
"""The classes that can be served, by name."""

_NO_SAMPLER = "ldmkit has no sampler of its kind"
_TOKENS = "it is for tokens, not for latents"
_VIDEO = "it is for models of video"
UNSERVED: Mapping[str, str] = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "VQDiffusionScheduler": _TOKENS,
    "CogVideoXDDIMScheduler": _VIDEO,
    "CogVideoXDPMScheduler": _VIDEO,
    "HeliosDMDScheduler": _VIDEO,
    "HeliosScheduler": _VIDEO,
    "LTXEulerAncestralRFScheduler": _VIDEO,
    "MiniMaxH3Scheduler": _VIDEO,
    "RFD4ProteinaScheduler": "it is for models of proteins",
    "CMStochasticIterativeScheduler": "its boundary condition and times, 250 log(sigma), are not among the predictions here",
    "ConsistencyDecoderScheduler": "it is for a consistency decoder, which is no part of a pipeline here",
    "CosineDPMSolverMultistepScheduler": "its times, arctan(sigma), and its v-prediction are not among the predictions here",
    "DDPMWuerstchenScheduler": "its cosine schedule in continuous time is not among the schedules here",
    "DPMSolverMultistepInverseScheduler": "inversion is by ddim-inverse (DDIMInverseScheduler) here",
    "FlowMapEulerDiscreteScheduler": "flow maps are told two times, and denoisers here one",
    "FlowMatchHeunDiscreteScheduler": "it applies Heun's rule in sigma = s of a straight path, heun here in sigma / alpha",
    "IPNDMScheduler": _NO_SAMPLER,
    "KarrasVeScheduler": "its variance-exploding model without input scaling is not among the predictions here",
    "PiflowScheduler": _NO_SAMPLER,
    "RePaintScheduler": "it jumps back and forth in time; inpainting here works with every other sampler",
    "SASolverScheduler": _NO_SAMPLER,
    "SCMScheduler": "TrigFlow is not among the predictions here",
    "ScoreSdeVeScheduler": _NO_SAMPLER,
    "ScoreSdeVpScheduler": _NO_SAMPLER,
    "UnCLIPScheduler": "its variance, fixed_small_log, is not among ddpm's here",
}
"""Other classes of diffusers, and why they cannot be served."""
