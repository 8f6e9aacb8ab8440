"""Watches what a part does besides computing: files written, network used, processes started, global random state spent."""

from __future__ import annotations

import contextlib
import functools
import os
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.")
_NETWORK = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.")
_PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")


class _Watching(threading.local):
    seen: list[str] | None = None


_watching = _Watching()


@contextlib.contextmanager
def deeds() -> Iterator[list[str]]:
    """A list that fills with what this thread does to the world outside, while the block runs.

    Seen are Python's own audit events (PEP 578), so that files written by compiled code escape it. Compiled bytecode of modules
    that are imported meanwhile does not count.
    """
    _install()
    before, _watching.seen = _watching.seen, []
    states = _random_states()
    try:
        yield _watching.seen
    finally:
        seen, _watching.seen = _watching.seen, before
        seen += [f"spends {name}" for name, state in _random_states().items() if state != states[name]]


@functools.cache
def _install() -> None:
    sys.addaudithook(_audit)  # there is no taking it away again; it does nothing while nobody watches


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    seen = _watching.seen
    if seen is None:
        return
    if event == "open":
        path, _, flags = arguments
        if isinstance(path, str | bytes) and flags & _WRITES and "__pycache__" not in os.fsdecode(path):
            seen.append(f"writes {os.fsdecode(path)}")
    elif event.startswith(_CHANGES) and "__pycache__" not in str(arguments):
        seen.append(f"changes files: {event}{arguments}")
    elif event.startswith(_NETWORK):
        seen.append(f"uses the network: {event}{arguments[1:]}")
    elif event.startswith(_PROCESSES):
        seen.append(f"starts a process: {event}")


def _random_states() -> dict[str, Any]:
    legacy = np.random.get_state()
    states = {
        "torch's global random numbers": torch.random.get_rng_state().numpy().tobytes(),
        "Python's global random numbers": random.getstate(),
        "numpy's global random numbers": (legacy[1].tobytes(), *legacy[2:]),  # type: ignore[index]
    }
    if torch.cuda.is_initialized():
        states["the GPU's global random numbers"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states
