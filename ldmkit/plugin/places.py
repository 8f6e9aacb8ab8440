"""Where in a stranger's code something went wrong."""

from __future__ import annotations

import traceback

OTHERS = frozenset({"ldmkit", "torch", "hypothesis", "importlib", "pluggy", "pydantic"})
"""Packages whose lines tell an author nothing."""


def place(error: BaseException) -> str:
    """ "FILE, line N, in FUNCTION" of the innermost call outside `OTHERS`; "" where there is none."""
    steps = [step for step in traceback.walk_tb(error.__traceback__) if package(step[0].f_globals) not in OTHERS]
    if not steps:
        return ""
    frame, line = steps[-1]
    return f"{frame.f_code.co_filename}, line {line}, in {frame.f_code.co_name}"


def package(names: dict[str, object]) -> str:
    """The top-level package of a module with these globals."""
    return str(names.get("__name__", "")).partition(".")[0]
