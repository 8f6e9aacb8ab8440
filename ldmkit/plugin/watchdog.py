"""Naming the plugin that hangs.

Nothing can stop foreign code in this process safely, so nothing is stopped: after a limit a warning says which plugin is being
loaded, for how long, at which line, and how to leave it out.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ldmkit.errors import InputError

LIMIT = "LDMKIT_SLOW_PLUGIN"
SECONDS = 10.0


def limit() -> float:
    """Seconds after which a plugin that is still loading is named. Raises: InputError for a value that is no time."""
    text = os.environ.get(LIMIT, "").strip()
    try:
        seconds = float(text or SECONDS)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InputError(f"{LIMIT} = {text!r}: must be a number of seconds above 0 (not set: {SECONDS:g})")
    return seconds


@dataclass(frozen=True, eq=False)
class _Watched:
    what: str
    since: float


class Watchdog:
    """Watches one thread load plugins, one after the other. One watching thread serves them all: starting one costs more than
    a plugin should.

    Args:
        tell: called with a sentence, from the watching thread, once for each thing that takes longer than `seconds`.
    """

    def __init__(self, seconds: float, tell: Callable[[str], None]) -> None:
        self._seconds, self._tell = seconds, tell
        self._loading_thread = threading.get_ident()
        self._current: _Watched | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ldmkit-plugin-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closed.set()
        self._thread.join()

    @contextmanager
    def watching(self, what: str) -> Iterator[None]:
        """While `what` is being loaded."""
        self._current = _Watched(what, time.monotonic())
        try:
            yield
        finally:
            self._current = None

    def _watch(self) -> None:
        told: _Watched | None = None
        while not self._closed.wait(self._seconds / 4):
            watched = self._current
            if watched is not None and watched is not told and time.monotonic() - watched.since >= self._seconds:
                told = watched
                self._tell(f"{watched.what} has been loading for {self._seconds:g} s and has not finished{self._place()}")

    def _place(self) -> str:
        frame = sys._current_frames().get(self._loading_thread)
        if frame is None:
            return ""
        innermost = traceback.extract_stack(frame)[-1]
        return f"; it is at {innermost.filename}, line {innermost.lineno}, in {innermost.name}"


def warn(category: type[Warning]) -> Callable[[str], None]:
    """A `tell` that warns."""
    return lambda text: warnings.warn(text, category, stacklevel=1)
