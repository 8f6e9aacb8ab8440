"""How both kits try a property on drawn cases, and what they say of a failure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

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
    """What a property says that does not hold; of other exceptions also which they are."""
    return str(error).strip() if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
