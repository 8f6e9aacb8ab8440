"""Our CUDA kernels with one mistake each, which the emulated GPU must notice. A mistake is a change of the real source."""

import re
import shutil
from dataclasses import dataclass

import pytest
import torch

from ldmkit.errors import KernelError
from ldmkit.testing import emulation, emulation_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")

VALUES = "wrong values"


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in csrc/`file`; then a call fails with a message like `caught`, or gives VALUES that are wrong."""

    name: str
    file: str
    old: str
    new: str
    caught: str
    call: str  # a function below


RACE = r"race: it (writes|reads) byte \d+ of .*, which thread .* (wrote|read) at .*, and nothing orders the two"
MUTANTS = [
    Mutant(
        "off-by-one bound",
        "geglu.cu",
        "; i < packs;",
        "; i <= packs;",
        r"thread \(42, 0, 0\): out of bounds: it reads 16 bytes, beginning 0 past the end of tensor argument 0",
        "geglu",
    ),
    Mutant(
        "a pointer's alignment not looked at",
        "geglu.cu",
        " && aligned(x)",
        "",
        "undefined behaviour: access to an address that is not aligned to 16 bytes",
        "geglu_offset",
    ),
    Mutant(
        "dropped barrier",
        "geglu_linear.cu",
        "    __syncthreads();  // slice",
        "    // slice",
        RACE,
        "geglu_linear",
    ),
    Mutant(
        "divergent barrier",
        "geglu_linear.cu",
        "    __syncthreads();  // slice",
        "    if (threadIdx.x < 64) __syncthreads();  // slice",
        f"divergent barrier: |{RACE}",
        "geglu_linear",
    ),
    Mutant(
        "a wait too few for cp.async",
        "geglu_linear.cu",
        "cp_async_wait<kStages - 2>",
        "cp_async_wait<kStages - 1>",
        "to which a cp.async is still under way",
        "geglu_linear",
    ),
    Mutant(
        "uninitialised shared memory",
        "geglu_linear.cu",
        "    cp_async<16>(stage + row * kPitch + piece * 16, source + column, inside);",
        "    if (inside) cp_async<16>(stage + row * kPitch + piece * 16, source + column);",
        VALUES,
        "geglu_linear",
    ),
    Mutant(
        "wrong mma fragment",
        "geglu_linear.cu",
        "{weight[j / 2][j % 2 * 2], weight[j / 2][j % 2 * 2 + 1]}",
        "{weight[j / 2][j % 2 * 2 + 1], weight[j / 2][j % 2 * 2]}",
        VALUES,
        "geglu_linear",
    ),
    Mutant(
        "wrong lane of an accumulator",
        "geglu_linear.cu",
        "8 * half + lane / 4)",
        "8 * half + lane % 4)",
        f"{RACE}|{VALUES}",
        "geglu_linear",
    ),
    Mutant(
        "one row of weight too many",
        "geglu_linear.cu",
        "inside = inside && output < task.n;",
        "inside = inside && output <= task.n;",
        "out of bounds: it reads 16 bytes",
        "geglu_linear",
    ),
]


def geglu(module):
    x_BN = torch.randn(7, 48, generator=torch.Generator().manual_seed(0))
    return emulation.implementation(module, "geglu").forward(x_BN), reference_geglu(x_BN)


def geglu_offset(module):
    x_BN = torch.randn(4 + 7 * 48, generator=torch.Generator().manual_seed(0))[1:337].view(7, 48)
    return emulation.implementation(module, "geglu").forward(x_BN), reference_geglu(x_BN)


def reference_geglu(hidden):
    value, gate = hidden.double().chunk(2, dim=-1)
    return value * torch.nn.functional.gelu(gate)


def geglu_linear(module):
    draw = torch.Generator().manual_seed(0)
    x_RK = torch.randn(20, 168, generator=draw).bfloat16()
    weight_NK = torch.randn(2 * 24, 168, generator=draw).bfloat16() / 8
    y, _ = emulation.implementation(module, "geglu_linear").forward(x_RK, weight_NK, None, False)
    return y, reference_geglu(x_RK.double() @ weight_NK.double().T)


def outcome(csrc, call):
    """ "" for the right values, else VALUES or the message of the failure."""
    module = emulation.load(emulation_build.build(csrc=csrc))
    try:
        got, wanted = globals()[call](module)
    except KernelError as error:
        return str(error)
    rounding = (wanted.to(got.dtype) - wanted).abs().max()
    return "" if (got - wanted).abs().max() <= 2 * rounding + 1e-6 * wanted.abs().max() else VALUES


@pytest.mark.parametrize("call", sorted({mutant.call for mutant in MUTANTS}))
def test_the_kernels_themselves_pass(call):
    assert outcome(None, call) == ""


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.file}: {mutant.name}")
def test_a_mutant_is_caught(tmp_path, mutant):
    csrc = shutil.copytree(emulation_build.csrc_folder(), tmp_path / "csrc")
    text = (csrc / mutant.file).read_text()
    assert mutant.old in text, f"{mutant.file} has changed: {mutant.old!r} is no longer in it; make the mistake another way"
    (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    message = outcome(csrc, mutant.call)
    assert re.search(mutant.caught, message), message or "not caught"
