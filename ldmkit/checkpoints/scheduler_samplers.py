"""What makes a sampler of ours of the settings of one of diffusers' scheduler classes, as `scheduler_classes` has them.

Each gives the sampler's name and the values of its config, and raises ConfigError for a combination that ours does not have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ldmkit.errors import ConfigError

Values = dict[str, Any]


def plain(name: str, **renamed: str) -> Callable[[Values], Values]:
    """A sampler of that name, with the settings that it has under other names, ours=theirs."""

    def sampler(given: Values) -> Values:
        return {"name": name, **{ours: given[theirs] for ours, theirs in renamed.items()}}

    return sampler


def ending_clean(make: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """The sampler that `make` makes, which always ends on the clean image."""

    def sampler(given: Values) -> Values:
        if given["final_sigmas_type"] != "zero":
            raise ConfigError(f"final_sigmas_type = {given['final_sigmas_type']!r} (only 'zero' can be served)")
        return make(given)

    return sampler


def pndm(given: Values) -> Values:
    """With or without the Runge-Kutta steps at the start."""
    return {"name": "plms" if given["skip_prk_steps"] else "pndm"}


def multistep(given: Values) -> Values:
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


def singlestep(given: Values) -> Values:
    """DPM-Solver and DPM-Solver++ without memory, of orders 1 to 3."""
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


def deis(given: Values) -> Values:
    """DEIS with its polynomial in log rho."""
    _own(given, "algorithm_type", ("deis",), ("dpmsolver", "dpmsolver++"))
    _own(given, "solver_type", ("logrho",), ("midpoint", "heun", "bh1", "bh2"))
    return {"name": "deis", "order": given["solver_order"]}


def unipc(given: Values) -> Values:
    """UniPC with either B(h)."""
    solver = _own(given, "solver_type", ("bh2", "bh1"), ("midpoint", "heun", "logrho"))
    ending = given["final_sigmas_type"]
    return {"name": "unipc", "order": given["solver_order"], "solver_type": solver, "final_sigmas_type": ending}


def flow_euler(given: Values) -> Values:
    """Euler's steps, or a consistency model's: to x0, and back by new noise."""
    return {"name": "consistency", "sigma_min": 0.0} if given["stochastic_sampling"] else {"name": "euler"}


def edm(make: Callable[[Values], Values]) -> Callable[[Values], Values]:
    """EDM's schedule is karras by itself."""

    def sampler(given: Values) -> Values:
        rule = {} if given["sigma_schedule"] == "karras" else {"sigma_schedule": given["sigma_schedule"]}
        return make(given) | rule

    return ending_clean(sampler)


def _own(given: Values, key: str, known: tuple[str, ...], foreign: tuple[str, ...]) -> str:
    """A setting by which this class and others mean different things: what another had left becomes this one's first."""
    value = given[key]
    if value not in known + foreign:
        raise ConfigError(f"{key} = {value!r} (only {' or '.join(map(repr, known))} can be served)")
    return str(value if value in known else known[0])
