"""Every kernel that can run here holds the contract; and the contract rejects every kernel that is wrong on purpose.

The thorough profile (`make test-all`) draws more cases. What takes a GPU is in `make gpu-check`.
"""

import importlib.util
import os

import pytest
import torch

from ldmkit.kernels import backends, triton_support
from ldmkit.testing import contract
from tests.kernels.mutants import BROKEN_BACKENDS, MUTANTS

PROFILE = "thorough" if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else "ci"
EVERYWHERE = ("reference", "cpu", "triton", "cuda-emulated")
BACKENDS = (*EVERYWHERE, "cuda") if torch.cuda.is_available() else EVERYWHERE
NOT_HERE = {
    "CUDA graph replay": "needs a GPU",
    "another stream": "needs a GPU",
    "second device": "needs a GPU",
    "more than 2^31 elements, long grids": "needs a GPU",
    "the same bits under any schedule of threads": "the races of tests/kernels/test_emulation.py need .cu files",
}
"""Properties that no mutant can be shown to break on this machine."""


def missing(op, backend, root):
    """Why a backend cannot run here; None where it can."""
    if backend == "cuda-emulated":
        return None if (root / "csrc" / f"{op}.cu").exists() else f"there is no csrc/{op}.cu"
    if backend == "triton" and importlib.util.find_spec(f"ldmkit.kernels.{op}.triton") is None:
        return f"there is no ldmkit.kernels.{op}.triton"
    return None if backend == "reference" else backends.implementations(op)[backend].missing


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", contract.OPS)
def test_the_contract_holds(op, backend, root):
    if reason := missing(op, backend, root):
        pytest.skip(reason)
    report = contract.check(op, backend=backend, profile=PROFILE)
    print(report.table())
    assert report.passed, report.table()
    assert sum(row.verdict == "passed" for row in report) >= 20


ENTRIES = [(op, name, mutant) for op in MUTANTS for name, mutants in MUTANTS[op].items() for mutant in mutants]
IDS = [f"{op}-{mutant.__name__}-{name}" for op, name, mutant in ENTRIES]


@pytest.mark.parametrize(("op", "name", "mutant"), ENTRIES, ids=IDS)
def test_a_wrong_kernel_is_rejected_by_the_property_meant_for_it(op, name, mutant):
    (row,) = contract.check(op, mutant, device="cpu", only=[name])
    assert row.verdict == "failed"
    assert "contract.replay(" in row.example


@pytest.mark.parametrize(("name", "implementation"), BROKEN_BACKENDS.items(), ids=list(BROKEN_BACKENDS))
def test_a_wrong_backend_is_rejected_by_the_property_meant_for_it(name, implementation, monkeypatch):
    monkeypatch.setitem(backends._implementations["geglu"], "broken", implementation)
    monkeypatch.setattr(backends, "names", lambda: ("broken",))
    (row,) = contract.check("geglu", backend="broken", only=[name])
    assert row.verdict == "failed"


def test_every_property_has_a_kernel_that_breaks_it():
    shared, seen = set.intersection(*({p.name for p in contract.properties(op)} for op in contract.OPS)), set()
    for op in contract.OPS:
        broken = set(MUTANTS[op])
        seen |= broken
        own = {p.name for p in contract.properties(op)} - shared
        assert own <= broken, f"{op}: {own - broken}"
    assert shared - seen - set(BROKEN_BACKENDS) == set(NOT_HERE)
    assert triton_support.interpreting() or torch.cuda.is_available()
