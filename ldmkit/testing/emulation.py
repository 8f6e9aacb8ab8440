"""The CUDA kernels on a machine without a GPU: compiles the same .cu files for the host and offers them as "cuda-emulated".

`csrc/emulation` holds the machine they run on, one fiber per CUDA thread. In the sanitized build (the default) every access to
memory is checked: out of bounds, misaligned, unordered with another thread's, or of what a cp.async has yet to bring, it ends
the call with a KernelError that names the thread and the line. `schedule`, or LDMKIT_EMULATION_SCHEDULE ("forward", "reverse",
"random:SEED"), picks the order in which threads run.

    from ldmkit.testing import emulation

    emulation.register()
    with emulation.schedule("random", seed=1):
        ldmkit.kernels.geglu(x, backend="cuda-emulated")
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from ldmkit.errors import InputError, KernelError
from ldmkit.kernels.backends import OPS, Implementation
from ldmkit.kernels.backends import register as register_backend
from ldmkit.testing.emulation_build import build, csrc_folder

BACKEND = "cuda-emulated"
SCHEDULES = ("forward", "reverse", "random")

ENVIRONMENT = "LDMKIT_EMULATION_SCHEDULE"

_device = threading.Lock()  # one emulated GPU for the process
_loaded: dict[Path, tuple[ModuleType, ctypes.CDLL]] = {}
_scoped: list[tuple[str, int]] = []  # by `schedule`, innermost last


def register(*, sanitize: bool = True) -> None:
    """Compiles the kernels (or finds them compiled) and adds the backend "cuda-emulated" to every op that has one in CUDA.

    Args:
        sanitize: check every access to memory. Without, kernels run about as fast as compiled C++ and values alone tell.

    Raises:
        KernelError: no checkout, no g++, or the kernels do not compile.
    """
    module = load(build(sanitize=sanitize))
    for op in OPS:
        if hasattr(module, f"{op}_forward_cuda"):
            register_backend(op, BACKEND, implementation(module, op))


def implementation(module: ModuleType, op: str) -> Implementation:
    """An op's emulated kernels, in a module that `load` gave."""
    forward, backward = (on_device(module, getattr(module, f"{op}_{way}_cuda")) for way in ("forward", "backward"))
    return Implementation(forward=forward, backward=backward, device="cpu")


def load(library: Path) -> ModuleType:
    """Imports what `build` made. Its functions take and give tensors in the host's memory."""
    if library not in _loaded:
        name = f"ldmkit_{library.stem}._emulated"  # pybind11 makes one module of a name, whatever the file
        loader = importlib.machinery.ExtensionFileLoader(name, str(library))
        spec = importlib.util.spec_from_file_location(name, library, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        _loaded[library] = module, ctypes.CDLL(str(library))
        _apply_schedule()
    return _loaded[library][0]


@contextlib.contextmanager
def schedule(name: str, seed: int = 0) -> Iterator[None]:
    """Inside a `with` block, picks which thread of a block goes on when one must wait, and the order of blocks.

    A result that depends on it is a race.

    Args:
        name: "forward" (the first that can), "reverse" (the last) or "random" (any).
        seed: of "random".

    Raises:
        InputError: an unknown name.
    """
    _check(name)
    _scoped.append((name, seed))
    _apply_schedule()
    try:
        yield
    finally:
        _scoped.pop()
        _apply_schedule()


def _apply_schedule() -> None:
    name, seed = _scoped[-1] if _scoped else _environment()
    for _, library in _loaded.values():
        library.ldmkit_emulation_schedule(SCHEDULES.index(name), ctypes.c_uint64(seed))


def _environment() -> tuple[str, int]:
    name, _, seed = os.environ.get(ENVIRONMENT, "forward").partition(":")
    _check(name)
    if not (seed.isdecimal() or seed == ""):
        raise InputError(f"{ENVIRONMENT}: the seed is {seed!r}; it must be a number, as in random:1")
    return name, int(seed or 0)


def _check(name: str) -> None:
    if name not in SCHEDULES:
        raise InputError(f"the schedule is {name!r}; it must be one of {', '.join(SCHEDULES)}")


def on_device(module: ModuleType, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its arguments in the emulated device's memory and its failures as KernelErrors."""
    assert module.__file__ is not None
    path = Path(module.__file__)
    library = _loaded[path][1]

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        with _device:
            for number, tensor in enumerate(a for a in arguments if isinstance(a, Tensor)):
                map_memory(library, tensor, f"tensor argument {number}")
            library.ldmkit_emulation_enter()
            try:
                return function(*arguments)
            except RuntimeError as error:
                raise KernelError(name_lines(str(error).partition("\nException raised from")[0], path)) from None
            finally:
                library.ldmkit_emulation_leave()

    return call


def map_memory(library: ctypes.CDLL, tensor: Tensor, name: str, *, writable: bool = False) -> None:
    """Lets kernels touch a tensor's storage until it is unmapped; `name` is how failures call it."""
    storage = tensor.untyped_storage()
    pointer, size = ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes())
    library.ldmkit_emulation_map(pointer, size, ctypes.c_bool(writable), name.encode())


def name_lines(message: str, library: str | Path) -> str:
    """Puts file and line for each "+0x1234", an offset in the library's code; as it stands where addr2line is missing."""
    offsets = sorted(set(re.findall(r"\+0x[0-9a-f]+", message)))
    for offset in offsets:
        lines = _source_lines(library, int(offset, 16) - 1)  # of the call, not of the instruction it returns to
        place = next((line for line in lines if re.search(r"\.cuh?:", line) and "common.cuh:" not in line), None)
        if place is not None:
            message = message.replace(offset, place)
    return message


def _source_lines(library: str | Path, offset: int) -> Sequence[str]:
    """The inlined places that an offset belongs to, innermost first."""
    try:
        command = ["addr2line", "--inlines", f"--exe={library}", hex(offset)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return []
    return [line.partition(" (")[0].removeprefix(f"{csrc_folder()}/") for line in done.stdout.splitlines()]
