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
