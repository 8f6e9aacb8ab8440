"""Compiles csrc/ for the emulated GPU: one Python extension of all ops, or a library of a test's own kernels."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

import ldmkit
from ldmkit.errors import KernelError

# UBSan's checks, and ThreadSanitizer's call before every access to memory; csrc/emulation/sanitizers.cpp answers both.
UNDEFINED = "alignment,null,bounds,shift,signed-integer-overflow,integer-divide-by-zero,unreachable,return"
SANITIZE = (
    *("-O1", f"-fsanitize={UNDEFINED}", "-fsanitize=thread", "-fsanitize-recover=all"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
)
COMMON = ("-g1", "-fPIC", "-fvisibility=hidden", "-DLDMKIT_EMULATION", "-Wall", "-Wextra")
# CUDA lets types pun, hence no strict aliasing; who called is asked, hence no tail calls.
KERNEL = (
    *("-std=c++17", "-Iemulation", "-I.", "-x", "c++"),
    *("-Wno-unknown-pragmas", "-fno-strict-aliasing", "-fno-optimize-sibling-calls"),
)
MACHINE = ("-std=c++17", "-O2")
BINDING = ("-std=c++20", "-O0", "-g0", "-w")
DEVICE_MEMORY = "emulation/device_memory.cpp"  # the one file of the machine that includes torch


def build(*, sanitize: bool = True, csrc: Path | None = None) -> Path:
    """Compiles every kernel and its binding. What was compiled before from the same text is found in build/emulation.

    Args:
        sanitize: check every access to memory.
        csrc: a changed copy of the sources, in place of the checkout's own.

    Returns:
        the extension, for `ldmkit.testing.emulation.load`.

    Raises:
        KernelError: no checkout, no g++, or a file does not compile.
    """
    with _compiler(csrc or csrc_folder()) as compiler:
        paths = [f"-isystem{path}" for path in (*include_paths(), sysconfig.get_path("include"))]
        flags = [*BINDING, *paths, "-DTORCH_EXTENSION_NAME=_emulated"]
        bindings = dict.fromkeys((*compiler.sources("*binding.cpp"), DEVICE_MEMORY), flags)
        objects = compiler.compile({**bindings, **compiler.kernels(compiler.sources("*.cu"), sanitize)})
        folder = Path(torch.__file__).parent / "lib"
        return compiler.link(objects, [f"-L{folder}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"])


def build_library(source: Path, *, sanitize: bool = True, flags: Sequence[str] = ()) -> Path:
    """Compiles a .cu file that is no op of ours into a library without Python or torch, for ctypes.

    Args:
        flags: more of them, for the emulated machine too.
    """
    with _compiler(csrc_folder()) as compiler:
        return compiler.link(compiler.compile(compiler.kernels([str(source)], sanitize, flags)), ["-Wl,-z,defs"])


def csrc_folder() -> Path:
    """The kernels' sources.

    Raises:
        KernelError: ldmkit was not installed from a checkout.
    """
    folder = Path(ldmkit.__file__).resolve().parent.parent / "csrc"
    if not (folder / "emulation").is_dir():
        raise KernelError(f"the emulation compiles CUDA sources, and there is no {folder}: run it in a checkout of ldmkit")
    return folder


@contextlib.contextmanager
def _compiler(csrc: Path) -> Iterator[_Compiler]:
    """One process compiles at a time, so that the others find what it made."""
    folder = csrc_folder().parent / "build" / "emulation"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _Compiler(folder, csrc)


class _Compiler:
    """Makes object files and libraries in `folder`, each named by the hash of all that it was made from."""

    def __init__(self, folder: Path, csrc: Path) -> None:
        self.folder, self.csrc = folder, csrc
        self.program = os.environ.get("CXX", "g++")
        if shutil.which(self.program) is None:
            raise KernelError(f"the emulation needs a C++ compiler, and {self.program!r} is absent: install g++, or set CXX")
        self.version = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False).stdout

    def sources(self, pattern: str) -> list[str]:
        return sorted(str(path.relative_to(self.csrc)) for path in self.csrc.glob(pattern))

    def kernels(self, sources: Sequence[str], sanitize: bool, extra: Sequence[str] = ()) -> dict[str, Sequence[str]]:
        """The flags for some .cu files, and for the machine they run on."""
        machine = [*MACHINE, *extra, *(["-DLDMKIT_SANITIZED"] if sanitize else [])]
        kernel = [*KERNEL, *extra, *(SANITIZE if sanitize else ["-O2"])]
        files = [source for source in self.sources("emulation/*.cpp") if source != DEVICE_MEMORY]
        return {**dict.fromkeys(files, machine), **dict.fromkeys(sources, kernel)}

    def compile(self, sources: Mapping[str, Sequence[str]]) -> list[Path]:
        """The object files of sources, given with their flags."""

        def one(source: str) -> Path:
            texts = [path.read_text() for path in self._included(self.csrc / source)]
            return self._make([*COMMON, *sources[source], "-c", source], ".o", [torch.__version__, *texts])

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
            return list(pool.map(one, sources))

    def link(self, objects: Sequence[Path], flags: Sequence[str]) -> Path:
        return self._make(["-shared", *map(str, objects), *flags], ".so", [])

    def _included(self, source: Path) -> list[Path]:
        """A file and all of csrc that it includes, however deep."""
        found, left = [], [source]
        while left:
            file = left.pop()
            found.append(file)
            for name in re.findall(r'#include ["<](.+)[">]', file.read_text()):
                near = (folder / name for folder in (file.parent, self.csrc, self.csrc / "emulation"))
                path = next((p.resolve() for p in near if p.is_file()), None)
                if path is not None and path not in found + left:
                    left.append(path)
        return found

    def _make(self, arguments: Sequence[str], suffix: str, ingredients: Sequence[str]) -> Path:
        command = [self.program, *arguments]
        name = hashlib.sha256("\0".join([self.version, *command, *ingredients]).encode()).hexdigest()[:24] + suffix
        made = self.folder / name
        if made.exists():
            return made
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            out = Path(scratch) / name
            done = subprocess.run([*command, "-o", str(out)], cwd=self.csrc, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise KernelError(f"the emulated CUDA kernels do not compile:\n{' '.join(command)}\n{done.stderr}")
            out.replace(made)
        return made
