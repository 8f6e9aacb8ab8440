"""Checks of GPU kernels that need no GPU: both kinds are compiled for sm_80, sm_90 and sm_100, and the machine code is read.

For fp16 and bf16: no stack frame and no spills; tensor-core instructions where matrices are multiplied; where addresses are
declared aligned, more bytes in loads of several elements than in loads of one; nothing in float64. fp32 kernels that spill are
reported, and an error where some call launches them. Triton's kernels are those that `static_cases()` of
`ldmkit.kernels.<op>.triton` lists, compiled in another process, since in ours Triton may be interpreting; CUDA's are
`csrc/*.cu`, by nvcc, and of them it is told whether they have tensor-core instructions and loads of 16 bytes.

    python -m ldmkit.testing.static geglu --arch 90
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ldmkit.errors import KernelError
from ldmkit.kernels.triton_support import StaticCase

ARCHITECTURES = (80, 90, 100)
_TENSOR_CORES = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
_LOAD = re.compile(
    r"\bld\.global[\w.:]*?(?:\.v(?P<vector>\d))?\.[bfu](?P<bits>\d+)\b"
    r"|\bcp\.async\.ca[\w.:]*[^;]*?, (?P<size>0x[0-9a-f]+|\d+)[,;]"
    r"|\bcp\.async\.(?P<block>cg|bulk)"
)
_DOUBLE = re.compile(r"\.f64\b")
_DOUBLE_MACHINE = re.compile(r"\b(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA|F2F\.F64\.\w+|F2F\.\w+\.F64|I2F\.F64\S*)\b")
_TENSOR_CORES_MACHINE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA)\b")
_VECTOR_LOAD_MACHINE = re.compile(r"\bLDG(STS)?\.[\w.]*\b128\b")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """One kernel, compiled for one architecture.

    Attributes:
        dtype: "low" (fp16 or bf16), "fp32" or "fp64"; "wide" is one of the last two.
        stack: bytes of the stack frame, which holds what is spilled from registers.
        wrong: what breaks a rule.
        noted: what breaks none, and ought to be known.
        tensor_cores, vector_loads: a CUDA kernel has tensor-core instructions, and loads of 16 bytes from global memory.
    """

    kernel: str
    label: str
    architecture: int
    dtype: str
    registers: int
    stack: int
    wrong: tuple[str, ...] = ()
    noted: tuple[str, ...] = ()
    tensor_cores: bool | None = None
    vector_loads: bool | None = None

    def __str__(self) -> str:
        told = "; ".join((*self.wrong, *self.noted)) or "clean"
        return f"{self.kernel} [{self.label}] sm_{self.architecture}: {self.registers} registers, {told}"


# ---------------------------------------------------------------------------------------------------------------------- Triton


def check_triton(module: str, *, architectures: Sequence[int] = ARCHITECTURES, every: bool = True) -> list[Compiled]:
    """Compiles the kernels that a module's `static_cases()` lists, in another process.

    Args:
        module: "ldmkit.kernels.geglu.triton", say.
        every: all cases; otherwise one in half precision for each kernel and mode.

    Raises:
        KernelError: a kernel does not compile.
    """
    command = [sys.executable, "-m", "ldmkit.testing.static", module, *(["--every"] if every else [])]
    command += ["--arch", *map(str, architectures)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise KernelError(f"{module} does not compile:\n{done.stderr[-4000:]}")
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    return [Compiled(**{**row, "wrong": tuple(row["wrong"]), "noted": tuple(row["noted"])}) for row in rows]


def representative(cases: Iterable[StaticCase], architecture: int) -> Iterator[StaticCase]:
    """The first case in half precision of each kernel in each of its modes, for one architecture."""
    seen = set()
    for case in cases:
        here = not case.architectures or architecture in case.architectures
        which = (case.kernel, case.constants.get("MODE"))
        if here and which not in seen and _dtype(case) == "low":
            seen.add(which)
            yield case


def compile_case(case: StaticCase, architecture: int) -> Compiled:
    """Compiles one kernel, in a process where Triton does not interpret, and reads what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constants else case.signature[name] for name in names}
    alignment: Any = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(case.kernel, signature, dict(case.constants), alignment)
    built = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=dict(case.options))
    registers, stack = _resources(built.asm["cubin"])
    wrong, noted = _rules(case, built.asm["ptx"], stack)
    name = case.kernel.fn.__name__
    return Compiled(
        kernel=name, label=case.label, architecture=architecture, dtype=_dtype(case), registers=registers, stack=stack,
        wrong=tuple(wrong), noted=tuple(noted),
    )  # fmt: skip


def _dtype(case: StaticCase) -> str:
    types = set(case.signature.values())
    return "fp64" if "*fp64" in types else "low" if types & {"*fp16", "*bf16"} else "fp32"


def _rules(case: StaticCase, ptx: str, stack: int) -> tuple[list[str], list[str]]:
    """(what is wrong, what is only noted) with the code of a kernel."""
    dtype = _dtype(case)
    spilled = [f"a stack frame of {stack} bytes"] if stack else []
    excused = dtype == "fp64" or not case.dispatched
    wrong, noted = ([], spilled) if excused else (spilled, [])
    if dtype != "fp64" and _DOUBLE.search(ptx):
        wrong.append("float64 instructions")
    if dtype == "low" and case.dot and not _TENSOR_CORES.search(ptx):
        wrong.append("no tensor-core instructions")
    narrow, wide = _loaded(ptx)
    if dtype == "low" and case.aligned and case.vectors and narrow > wide:
        wrong.append(f"{narrow} bytes are loaded one element at a time, {wide} in wider loads")
    return wrong, noted


def _loaded(ptx: str) -> tuple[int, int]:
    """Bytes that a thread's load instructions name: (one or two at a time, more at a time)."""
    narrow = wide = 0
    for load in _LOAD.finditer(ptx):
        if load["bits"]:
            loaded = int(load["vector"] or 1) * int(load["bits"]) // 8
        else:
            loaded = int(load["size"], 0) if load["size"] else 16
        narrow, wide = (narrow + loaded, wide) if loaded <= 2 else (narrow, wide + loaded)
    return narrow, wide


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    if found is None:
        raise KernelError(f"cuobjdump says nothing of registers: {shown}")
    return int(found[1]), int(found[2])


def _cuobjdump() -> Path:
    """The one in Triton's wheel: CUDA's own is not on every PATH that has nvcc."""
    from triton.backends import nvidia

    return Path(nvidia.__file__).parent / "bin" / "cuobjdump"


# ------------------------------------------------------------------------------------------------------------------------ CUDA


def nvcc_lacks() -> str | None:
    """Why CUDA sources cannot be compiled here; None where they can."""
    return None if shutil.which("nvcc") else "nvcc is not on PATH; install CUDA's toolkit"


def check_cuda(source: Path, architecture: int) -> list[Compiled]:
    """Compiles one .cu file with bare nvcc and reads each of its kernels.

    Raises:
        KernelError: it includes torch, or does not compile.
    """
    if re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()):
        raise KernelError(f"{source.name} includes torch; kernels include CUDA's headers only")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        flags = ["-std=c++17", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
        done = subprocess.run(["nvcc", *flags, source, "-o", cubin], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise KernelError(f"{source.name} does not compile for sm_{architecture}:\n{done.stderr[-4000:]}")
        code = subprocess.run([_cuobjdump(), "-sass", cubin], capture_output=True, text=True, check=True).stdout
    instructions = dict(re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", code, flags=re.S))
    told = r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores.*?Used (\d+) registers"
    return [
        _cuda_kernel(source.name, architecture, name, (stack, spilled), registers, instructions[name])
        for name, stack, spilled, registers in re.findall(told, done.stderr, flags=re.S)
    ]


def _cuda_kernel(file: str, architecture: int, name: str, memory: tuple[str, str], registers: str, code: str) -> Compiled:
    low = "6__half" in name or "__nv_bfloat16" in name
    used = zip(("a stack frame", "spills"), memory, strict=True)
    wrong = [f"{what} of {size} bytes" for what, size in used if size != "0"]
    wrong += ["float64 instructions"] if low and _DOUBLE_MACHINE.search(code) else []
    return Compiled(
        kernel=name, label=file, architecture=architecture, dtype="low" if low else "wide", registers=int(registers),
        stack=int(memory[0]), wrong=tuple(wrong), tensor_cores=bool(_TENSOR_CORES_MACHINE.search(code)),
        vector_loads=bool(_VECTOR_LOAD_MACHINE.search(code)),
    )  # fmt: skip


def main() -> None:
    """Compiles a module's cases here, one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module", help="a module with static_cases(), or the name of an op")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--every", action="store_true", help="all cases, not one for each kernel and mode")
    args = parser.parse_args()
    module = importlib.import_module(args.module if "." in args.module else f"ldmkit.kernels.{args.module}.triton")
    for architecture in args.arch:
        for case in module.static_cases() if args.every else representative(module.static_cases(), architecture):
            if not case.architectures or architecture in case.architectures:
                print(json.dumps(asdict(compile_case(case, architecture))), flush=True)


if __name__ == "__main__":
    main()
