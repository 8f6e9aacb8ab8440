"""The scheduler classes of diffusers: what each reads from its `scheduler_config.json`, and which of our samplers it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ldmkit.checkpoints.scheduler_samplers import (
    Values,
    deis,
    edm,
    ending_clean,
    flow_euler,
    multistep,
    plain,
    pndm,
    singlestep,
    unipc,
)

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
    plain("ddpm", variance="variance_type"),
    _SPACED | _CLIPPED | {"clip_sample_range", "variance_type", "rescale_betas_zero_snr"},
    {**_LEADING, "clip_sample": True, "clip_sample_range": 1.0, "variance_type": "fixed_small"},
    {"clip_sample": (True, False)},
)
_DDIM = SchedulerClass(
    plain("ddim"),
    _SPACED | _CLIPPED | {"set_alpha_to_one", "rescale_betas_zero_snr"},
    {**_LEADING, "clip_sample": True},
)
CLASSES: Mapping[str, SchedulerClass] = {
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "DDIMScheduler": _DDIM,
    "DDIMParallelScheduler": _DDIM,
    "DDIMInverseScheduler": SchedulerClass(
        plain("ddim-inverse"), _DDIM.reads - {"thresholding"}, _DDIM.defaults, {"prediction_type": ("epsilon",)}
    ),
    "PNDMScheduler": SchedulerClass(
        pndm,
        _SPACED | {"skip_prk_steps", "set_alpha_to_one"},
        {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    ),
    "EulerDiscreteScheduler": SchedulerClass(
        ending_clean(plain("euler")),
        _SPACED
        | _RULES
        | {"interpolation_type", "sigma_min", "sigma_max", "timestep_type", "rescale_betas_zero_snr", "final_sigmas_type"},
        {"final_sigmas_type": "zero"},
    ),
    "EulerAncestralDiscreteScheduler": SchedulerClass(plain("euler-ancestral"), _SPACED | {"rescale_betas_zero_snr"}),
    "HeunDiscreteScheduler": SchedulerClass(plain("heun"), _SPACED | _RULES | {"clip_sample"}, _DENOISING),
    "KDPM2DiscreteScheduler": SchedulerClass(plain("dpm-2"), _SPACED | _RULES, _DENOISING),
    "KDPM2AncestralDiscreteScheduler": SchedulerClass(plain("dpm-2-ancestral"), _SPACED | _RULES, _DENOISING),
    "LMSDiscreteScheduler": SchedulerClass(plain("lms"), _SPACED | _RULES),
    "DPMSolverSDEScheduler": SchedulerClass(plain("dpm++-sde"), _SPACED | _RULES | {"noise_sampler_seed"}, _DENOISING),
    "DPMSolverSinglestepScheduler": SchedulerClass(
        singlestep,
        (_SPACED - {"timestep_spacing", "steps_offset"})
        | _RULES
        | _SOLVER
        | _FLOW_SIGMAS
        | {"final_sigmas_type", "lambda_min_clipped", "variance_type"},
        {**_PLUS, "lower_order_final": False},
        _ANY,
    ),
    "DPMSolverMultistepScheduler": SchedulerClass(
        multistep,
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
        deis, _SPACED | _RULES | _SOLVER | _FLOW_SIGMAS, {**_SOLVES, "algorithm_type": "deis", "solver_type": "logrho"}
    ),
    "UniPCMultistepScheduler": SchedulerClass(
        unipc,
        _SPACED
        | _RULES
        | (_SOLVER - {"algorithm_type"})
        | _FLOW_SIGMAS
        | {"final_sigmas_type", "predict_x0", "disable_corrector", "solver_p", "rescale_betas_zero_snr"}
        | {"sigma_min", "sigma_max", "shift_terminal"},
        {**_SOLVES, "solver_type": "bh2"},
    ),
    "LCMScheduler": SchedulerClass(
        plain("lcm", original_inference_steps="original_inference_steps", timestep_scaling="timestep_scaling"),
        _DISTILLED | {"timestep_scaling"},
        {**_DISTILLS, "timestep_scaling": 10.0},
    ),
    "TCDScheduler": SchedulerClass(  # it has a timestep_scaling too, of which it makes no use
        plain("tcd", original_inference_steps="original_inference_steps"), _DISTILLED, _DISTILLS
    ),
    "FlowMatchEulerDiscreteScheduler": SchedulerClass(
        flow_euler,
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
        edm(plain("euler")), _EDM, _EDM_DEFAULTS, {"prediction_type": ("epsilon",), "sigma_min": (), "sigma_max": ()}, "edm"
    ),
    "EDMDPMSolverMultistepScheduler": SchedulerClass(
        edm(multistep),
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
