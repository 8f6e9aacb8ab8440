"""Builds ldmkit._C, the compiled kernels, when torch can be seen from here; everything else is in pyproject.toml.

LDMKIT_BUILD decides what is compiled: "auto" (for the CPU if torch is importable, for CUDA too if that torch has it
and nvcc is there), "python" (nothing; ldmkit works without), "cpu", or "cuda". pip hides torch from a build unless told
--no-build-isolation, which is how a build from a checkout should run:

    pip install --no-build-isolation -e .
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

CHOICES = ("auto", "python", "cpu", "cuda")
LEAST_CAPABILITY = 8.0
ANY_DEVICE = "8.0;9.0+PTX"
"""What is compiled for where no device says, as in a container's build: code for these, and for later ones to translate."""


def decide(choice: str) -> tuple[str, str]:
    """What LDMKIT_BUILD = `choice` means on this machine: ("python" | "cpu" | "cuda", why).

    Raises:
        SystemExit: an unknown choice, or one that cannot be met here.
    """
    if choice not in CHOICES:
        raise SystemExit(f"ldmkit: LDMKIT_BUILD is {choice!r}; it must be one of {', '.join(CHOICES)}")
    if choice == "python":
        return "python", "LDMKIT_BUILD=python asks for none"
    if not torch_is_here():
        why = "torch cannot be imported from this build; install torch first, then build with --no-build-isolation"
        if choice != "auto":
            raise SystemExit(f"ldmkit: LDMKIT_BUILD={choice}, but {why}")
        return "python", why
    lacking = cuda_lacks()
    if choice == "cuda" and lacking:
        raise SystemExit(f"ldmkit: LDMKIT_BUILD=cuda, but {lacking}")
    if choice == "cpu" or lacking:
        return "cpu", lacking or "LDMKIT_BUILD=cpu asks for the CPU only"
    return "cuda", "torch has CUDA and nvcc is here"


def torch_is_here() -> bool:
    """Whether torch can be imported from this build."""
    try:
        return importlib.util.find_spec("torch") is not None
    except ValueError:  # what find_spec says of a module that is hidden
        return False


def cuda_lacks() -> str | None:
    """Why CUDA kernels cannot be built here; None where they can."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or (release := nvcc_release(CUDA_HOME)) is None:
        return "nvcc was not found: put it on PATH or set CUDA_HOME"
    if release.partition(".")[0] != torch.version.cuda.partition(".")[0]:  # which torch's own build refuses, later
        return f"torch {torch.__version__} is of CUDA {torch.version.cuda}, and the nvcc in {CUDA_HOME} of CUDA {release}"
    for number in () if "TORCH_CUDA_ARCH_LIST" in os.environ else range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(number)
        if major < LEAST_CAPABILITY:
            name = torch.cuda.get_device_name(number)
            return f"{name} is of compute capability {major}.{minor}, and the kernels need {LEAST_CAPABILITY}"
    return None


def nvcc_release(home: str) -> str | None:
    """The CUDA release of the compiler in this folder, as in "13.0"; None where there is none."""
    try:
        done = subprocess.run([str(Path(home, "bin", "nvcc")), "--version"], capture_output=True, text=True, check=False)
    except OSError:  # a folder of libraries alone
        return None
    found = re.search(r"release (\d+\.\d+)", done.stdout)
    return found[1] if found else None


def extension(kind: str) -> dict[str, Any]:
    """The setup() arguments that build ldmkit._C for "cpu" or "cuda"."""
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class Build(BuildExtension):  # type: ignore[misc]
        """Objects of geglu.cpp and geglu.cu are two: geglu.o and geglu.cu.o. torch would have both be geglu.o."""

        def build_extensions(self) -> None:
            plain = self.compiler.object_filenames

            def object_filenames(sources: list[str], *rest: Any, **options: Any) -> list[str]:
                pairs = zip(sources, map(Path, plain(sources, *rest, **options)), strict=True)
                return [str(path.with_suffix(f".cu{path.suffix}") if name.endswith(".cu") else path) for name, path in pairs]

            self.compiler.object_filenames = object_filenames
            super().build_extensions()

    # The kernels rely on vectors that never cross a call (-Wno-psabi) and on no flag that reorders floating-point arithmetic.
    cxx = ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-fvisibility=hidden", "-Wno-psabi"]
    link = []
    if sys.platform == "linux":  # at::parallel_for runs serially without
        cxx.append("-fopenmp")
        link.append("-fopenmp")
    sources, depends = sorted(glob.glob("csrc/*.cpp")), sorted(glob.glob("csrc/*.h") + glob.glob("csrc/*.cuh"))
    if kind == "cuda":
        if torch.cuda.device_count() == 0:  # torch asks the devices, and fails where there is none
            os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ANY_DEVICE)
        module = CUDAExtension(
            "ldmkit._C",
            [*sources, *sorted(glob.glob("csrc/*.cu"))],
            depends=depends,
            define_macros=[("WITH_CUDA", None)],
            extra_compile_args={"cxx": cxx, "nvcc": ["-O3"]},
            extra_link_args=link,
        )
    else:
        module = CppExtension("ldmkit._C", sources, depends=depends, extra_compile_args=cxx, extra_link_args=link)
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def main() -> None:
    """Decides, says so, and hands over to setuptools."""
    kind, why = decide(os.environ.get("LDMKIT_BUILD", "auto"))
    compiled = {
        "python": "no compiled kernels",
        "cpu": "compiled kernels for the CPU",
        "cuda": "compiled kernels for CPU and CUDA",
    }
    print(f"ldmkit: building with {compiled[kind]} ({why})", file=sys.stderr)
    setup(**({} if kind == "python" else extension(kind)))


if __name__ == "__main__":
    main()
