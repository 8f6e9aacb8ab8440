"""Compiles csrc/ and csrc/emulation into one Python extension, or into a library of a test's own kernels."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

import ldmkit
from ldmkit.errors import KernelError

# UBSan's checks, and AddressSanitizer's call before every access to memory; csrc/emulation/sanitizers.cpp answers both.
UNDEFINED = "alignment,null,bounds,shift,signed-integer-overflow,integer-divide-by-zero,unreachable,return"
SANITIZE = [
    *("-O1", "-g1", f"-fsanitize={UNDEFINED}", "-fsanitize=kernel-address", "-fsanitize-recover=all"),
    *("--param", "asan-stack=0", "--param", "asan-globals=0", "--param", "asan-instrumentation-with-call-threshold=0"),
]
COMMON = ["-fPIC", "-fvisibility=hidden", "-DLDMKIT_EMULATION", "-Wall", "-Wextra"]
KERNEL = ["-std=c++17", "-Wno-unknown-pragmas", "-fno-strict-aliasing", "-x", "c++"]  # CUDA lets kernels pun types
MACHINE = ["-std=c++17", "-O2"]
BINDING = ["-std=c++20", "-O0", "-w"]


def build(*, sanitize: bool = True, replace: Mapping[str, Path] | None = None) -> Path:
    """Compiles every kernel and its binding; what was compiled before from the same text is taken from build/emulation.

    Args:
        sanitize: check every access to memory.
        replace: another file in the place of some of csrc's, by name ({"geglu.cu": Path(...)}).

    Returns:
        the extension, for `ldmkit.testing.emulation.load`.

    Raises:
        KernelError: no checkout, no g++, or a file does not compile.
    """
    csrc = csrc_folder()
    bindings = [*sorted(csrc.glob("*binding.cpp")), csrc / "emulation" / "device_memory.cpp"]
    paths = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
    flags = [*BINDING, *paths, "-DTORCH_EXTENSION_NAME=_emulated"]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = [f"-L{torch_libraries}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    kernels = [(replace or {}).get(source.name, source) for source in sorted(csrc.glob("*.cu"))]
    with _cache(csrc) as cache:
        objects = [cache.compile(source, flags, torch.__version__) for source in bindings]
        return cache.link([*objects, *_kernels(cache, kernels, sanitize)], link)


def build_library(kernels: Sequence[Path], *, sanitize: bool = True, flags: Sequence[str] = ()) -> Path:
    """Compiles .cu files that are no op of ours into a library without Python or torch, for ctypes.

    Args:
        flags: more of them, for the machine too.
    """
    with _cache(csrc_folder()) as cache:
        return cache.link(_kernels(cache, kernels, sanitize, flags), ["-Wl,-z,defs"])


def csrc_folder() -> Path:
    """The kernels' sources.

    Raises:
        KernelError: ldmkit was not installed from a checkout.
    """
    folder = Path(ldmkit.__file__).resolve().parent.parent / "csrc"
    if not (folder / "emulation").is_dir():
        raise KernelError(f"the emulation compiles CUDA sources, and there is no {folder}: run it in a checkout of ldmkit")
    return folder


def _kernels(cache: _Cache, kernels: Sequence[Path], sanitize: bool, extra: Sequence[str] = ()) -> list[Path]:
    machine = [*MACHINE, *extra, *(["-DLDMKIT_SANITIZED"] if sanitize else [])]
    include = [f"-I{cache.csrc / 'emulation'}", f"-I{cache.csrc}"]
    kernel = [*KERNEL, *extra, *(SANITIZE if sanitize else ["-O2"]), *include]
    sources = (s for s in sorted((cache.csrc / "emulation").glob("*.cpp")) if s.name != "device_memory.cpp")
    return [*(cache.compile(source, machine) for source in sources), *(cache.compile(source, kernel) for source in kernels)]


@contextlib.contextmanager
def _cache(csrc: Path) -> Iterator[_Cache]:
    """One process compiles at a time, so that others find what it made."""
    folder = csrc.parent / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Cache(folder, csrc)


class _Cache:
    """Object files and libraries, named by the hash of all they were made from."""

    def __init__(self, folder: Path, csrc: Path) -> None:
        self.folder, self.csrc = folder, csrc
        self.compiler = os.environ.get("CXX", "g++")
        if shutil.which(self.compiler) is None:
            raise KernelError(
                f"the emulation needs a C++ compiler, and {self.compiler!r} is not on PATH: install g++, or set CXX"
            )
        version = subprocess.run([self.compiler, "--version"], capture_output=True, text=True, check=False).stdout
        headers = [*csrc.glob("*.h"), *csrc.glob("*.cuh"), *(csrc / "emulation").glob("*.h")]
        self.common = [version, *(header.read_text() for header in sorted(headers))]

    def compile(self, source: Path, flags: Sequence[str], version: str = "") -> Path:
        """One object file; `version` is that of anything else that is included."""
        command = [self.compiler, *COMMON, *flags, "-c", str(source)]
        return self._make([*command, version, source.read_text(), *self.common], ".o", command)

    def link(self, objects: Sequence[Path], flags: Sequence[str]) -> Path:
        """One shared library."""
        command = [self.compiler, "-shared", *map(str, objects), *flags]
        return self._make(command, ".so", command)

    def _make(self, ingredients: Sequence[str], suffix: str, command: Sequence[str]) -> Path:
        name = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()[:24] + suffix
        made = self.folder / name
        if made.exists():
            return made
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            out = Path(scratch) / name
            done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise KernelError(f"the emulated CUDA kernels do not compile:\n{' '.join(command)}\n{done.stderr}")
            out.replace(made)
        return made
