"""How both kits try a property on drawn cases, and what they say of a failure."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ldmkit.plugin.places import package, place

Case = Mapping[str, Any]


def draw(cases: st.SearchStrategy[Case], attempt: Callable[[Case], None], *, examples: int, derandomize: bool = True) -> None:
    """Hypothesis draws cases, and shrinks a failing one: the last failure seen is the smallest.

    Raises:
        Exception: the one that `attempt` raised on it.
    """
    configured = settings(
        max_examples=examples,
        derandomize=derandomize,
        database=None,
        deadline=None,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    configured(given(cases)(attempt))()


def reason_of(error: BaseException) -> str:
    """What a property says that does not hold; of exceptions that the part raises, which they are and where."""
    where, steps = place(error), [package(frame.f_globals) for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, AssertionError) and (not where or steps[-1] == "ldmkit"):
        return str(error).strip()
    return f"{type(error).__name__}: {error}" + (f"; raised at {where}" if where else "")
