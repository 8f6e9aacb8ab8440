"""Rules for the noise levels of a run in terms of sigma / alpha, for any schedule: n ratios, falling, before the last level.

`high` and `low` are the ratios of the first and last time that the schedule itself would visit; rules named after k-diffusion's
functions fill the range between them, the others pick times.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

from ldmkit.errors import InputError, MissingDependencyError
from ldmkit.schedule import NoiseSchedule, Schedule

SigmaSchedule = Literal[
    "karras", "exponential", "polyexponential", "vp", "simple", "sgm-uniform", "beta", "beta-sigmas", "ays-sd15", "ays-sdxl"
]
SIGMA_SCHEDULES: tuple[str, ...] = get_args(SigmaSchedule)

ALIGN_YOUR_STEPS = {
    "ays-sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
    "ays-sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
}
"""Ten steps, as the project page of Sabour et al. 2024, arXiv:2404.14507, gives them; other numbers interpolate."""


def spaced_ratios(
    name: SigmaSchedule, n: int, schedule: Schedule, *, high: float, low: float, rho: float | None = None
) -> list[float]:
    """n ratios, falling.

    Args:
        name: the rule.
        high, low: the range, finite and above 0; "simple", "sgm-uniform" and "beta" go by the schedule's times instead.
        rho: of "karras" (7 if not given; Karras et al. 2022, eq. 5) and "polyexponential" (1 if not given).

    Raises:
        InputError: an infinite range, rho for another rule, a rule that needs a schedule with whole times, or ratios that meet.
        MissingDependencyError: "beta" and "beta-sigmas" without scipy.
    """
    if rho is not None and name not in ("karras", "polyexponential"):
        raise InputError(f"rho = {rho:g} goes with 'karras' and 'polyexponential', not {name!r}")
    if not (0 < low <= high < math.inf):
        raise InputError(
            f"sigma_schedule {name!r} needs a finite range of sigma / alpha, and this run's is {low:g} to {high:g}; "
            "a schedule that starts at zero signal has none: leave out sigma_schedule, or give sigmas= of your own"
        )
    ramp = np.linspace(0, 1, n)
    if name == "karras":
        power = rho or 7.0
        ratios = (high ** (1 / power) + ramp * (low ** (1 / power) - high ** (1 / power))) ** power
    elif name == "exponential":
        ratios = np.exp(np.linspace(math.log(high), math.log(low), n))
    elif name == "polyexponential":
        ratios = np.exp(np.linspace(1, 0, n) ** (rho or 1.0) * math.log(high / low) + math.log(low))
    elif name == "beta-sigmas":  # diffusers' `use_beta_sigmas`: quantiles of the ratios, where "beta" has those of the times
        ratios = low + (high - low) * _beta_quantiles(1 - ramp)
    elif name == "vp":
        ratios = _vp(n)
    elif name in ALIGN_YOUR_STEPS:
        ratios = _interpolated(ALIGN_YOUR_STEPS[name], n + 1)[:-1]
    else:
        ratios = _by_times(name, n, schedule)
    if (np.diff(ratios) >= 0).any():
        raise InputError(f"num_inference_steps = {n}: the levels of {name!r} meet there; use fewer steps")
    return [float(ratio) for ratio in ratios]


def _vp(n: int, beta_d: float = 19.9, beta_min: float = 0.1, eps_s: float = 1e-3) -> np.ndarray:
    """The continuous VP process (Song et al. 2021, arXiv:2011.13456, app. C), as k-diffusion's `get_sigmas_vp`."""
    t = np.linspace(1, eps_s, n)
    ratios: np.ndarray = np.sqrt(np.expm1(beta_d * t**2 / 2 + beta_min * t))
    return ratios


def _interpolated(table: tuple[float, ...], n: int) -> np.ndarray:
    """n points of a table, log-linear between its entries, as its authors do."""
    ratios: np.ndarray = np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(table)), np.log(table)))
    return ratios


def _by_times(name: str, n: int, schedule: Schedule) -> np.ndarray:
    if not isinstance(schedule, NoiseSchedule):
        raise InputError(
            f"sigma_schedule {name!r} picks whole times, and the {type(schedule).__name__} has none; take 'karras'"
        )
    top = schedule.num_train_timesteps - 1
    if name == "simple":  # ComfyUI's `simple_scheduler`: every (T / n)-th level from the noisiest
        times = [float(top - int(i * (top + 1) / n)) for i in range(n)]
    elif name == "sgm-uniform":  # Stability's generative-models: evenly, leaving out the last
        times = [float(t) for t in np.linspace(top, 0, n + 1)[:-1]]
    else:  # Lee et al. 2024, arXiv:2407.12173, eq. 14, with its alpha = beta = 0.6
        times = [float(t) for t in np.rint(_beta_quantiles(1 - np.linspace(0, 1, n, endpoint=False)) * top)]
    return np.array([schedule.level(t).ratio for t in times])


def _beta_quantiles(q: np.ndarray) -> np.ndarray:
    try:
        from scipy.stats import beta
    except ImportError:
        raise MissingDependencyError("sigma_schedule 'beta' and 'beta-sigmas' need scipy: pip install scipy") from None
    quantiles: np.ndarray = beta.ppf(q, 0.6, 0.6)
    return quantiles
