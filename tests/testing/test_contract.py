"""The contract as a stranger uses it: their own callable, the report, the replay line, the command."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from ldmkit.errors import InputError, KernelError
from ldmkit.testing import contract
from ldmkit.testing.contract.core import Problem
from ldmkit.testing.contract.guard import Guards

BOUND = "the bound, over shapes, dtypes, layouts, sizes"


def plain_geglu(x):
    if x.dim() < 1 or x.shape[-1] % 2 or not x.is_floating_point():
        raise ValueError(f"{tuple(x.shape)} {x.dtype}")
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def off_beyond_three_columns(x):
    y = plain_geglu(x)
    return y if y.shape[-1] <= 3 else y + 0.1


def test_a_callable_of_a_stranger():
    report = contract.check("geglu", plain_geglu, device="cpu", exempt={8: "mine is plain torch"})
    assert report.passed, report.table()
    (row,) = (row for row in report if row.number == 8)
    assert (row.verdict, row.reason) == ("not applicable", "mine is plain torch")
    assert {row.verdict for row in report if row.number == 22} == {"needs a GPU"} or torch.cuda.is_available()


def test_the_smallest_failing_example_can_be_pasted():
    report = contract.check("geglu", off_beyond_three_columns, device="cpu", only=[BOUND])
    (row,) = report.failures
    assert "n=4" in row.example  # nothing smaller fails
    assert "from ldmkit.testing import contract; " in row.example
    replay = row.example.partition("; ")[2]
    with pytest.raises(AssertionError, match="times plain torch's"):
        exec(replay, {"contract": contract, "your_callable": off_beyond_three_columns})
    exec(replay, {"contract": contract, "your_callable": plain_geglu})
    assert f"1 {BOUND}" in report.table()
    assert row.example in report.table()


def test_an_exception_in_the_kernel_is_a_failure_with_its_name():
    def broken(x):
        raise ZeroDivisionError("oh")

    (row,) = contract.check("geglu", broken, device="cpu", only=[BOUND])
    assert row.verdict == "failed"
    where = f"{__file__}, line {broken.__code__.co_firstlineno + 1}, in broken"
    assert row.reason == f"ZeroDivisionError: oh; raised at {where}"


def test_a_backend_may_refuse(monkeypatch):
    from ldmkit.kernels import backends
    from ldmkit.kernels.geglu import reference

    picky = backends.Implementation(
        forward=reference.geglu, backward=None, device="cpu", refusal=lambda x: "N is even" if x.shape[-1] % 4 == 0 else None
    )
    monkeypatch.setitem(backends._implementations["geglu"], "picky", picky)
    monkeypatch.setattr(backends, "names", lambda: ("picky",))
    (row,) = contract.check("geglu", backend="picky", only=["autocast"])
    assert (row.verdict, row.cases, row.refused) == ("passed", 1, 0)
    picky = backends.Implementation(forward=reference.geglu, backward=None, device="cpu", refusal=lambda x: "never")
    monkeypatch.setitem(backends._implementations["geglu"], "picky", picky)
    (row,) = contract.check("geglu", backend="picky", only=["autocast"])
    assert row.verdict == "not applicable"
    assert "never" in row.reason


def test_unknown_names():
    with pytest.raises(InputError, match="unknown op 'gegl'"):
        contract.check("gegl", plain_geglu)
    with pytest.raises(InputError, match="unknown profile"):
        contract.check("geglu", plain_geglu, profile="quick")
    with pytest.raises(InputError, match="a callable or a backend"):
        contract.check("geglu")
    with pytest.raises(KernelError, match="unknown kernel backend 'cup'"):
        contract.check("geglu", backend="cup")


def test_every_line_of_the_contract_has_a_property():
    lines = {prop.number for op in contract.OPS for prop in contract.properties(op)}
    assert lines == set(range(1, 24))


@pytest.mark.parametrize("op", contract.OPS)
def test_names_are_unique_and_cases_are_data(op):
    names = [prop.name for prop in contract.properties(op)]
    assert len(set(names)) == len(names)
    for case in (*contract.OPS[op].corners(True), *contract.OPS[op].extremes(), contract.OPS[op].many()):
        assert eval(repr(dict(case))) == case
        assert isinstance(contract.OPS[op].build("cpu", **case), Problem)


def test_guards_see_a_write_beside_a_block_and_leave_torch_as_it_was():
    guards = Guards()
    with guards.in_force("cpu"):
        inside = torch.empty(3, 5)
        assert guards.covers(inside)
        assert inside.isnan().all()
    guards.check()
    assert not guards.covers(torch.empty(3, 5))
    inside.as_strided((1,), (1,), inside.storage_offset() - 1).zero_()
    with pytest.raises(AssertionError, match="4 bytes were written before a block of 60 bytes"):
        guards.check()


def verify(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ldmkit.cli", "verify", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_json():
    done = verify("geglu", "--backend", "triton", "--only", "19", "--json")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["passed"]
    (report,) = answer["reports"]
    assert [row["number"] for row in report["rows"]] == [19, 19]
    assert all(row["verdict"] == "passed" for row in report["rows"])


def test_the_command_fails_with_the_smallest_example(capsys, monkeypatch):
    from ldmkit import cli, kernels

    monkeypatch.setattr(kernels, "geglu", lambda x, backend: off_beyond_three_columns(x))
    assert cli.main(["verify", "geglu", "--backend", "reference", "--only", "1"]) == 1
    assert "n=4" in capsys.readouterr().out.splitlines()[-2]


def test_the_command_names_mistakes(capsys):
    from ldmkit import cli

    for arguments, told in ((("gegl",), "unknown op"), (("geglu", "--backend", "cup"), "unknown kernel backend")):
        assert cli.main(["verify", *arguments]) == 2
        assert told in capsys.readouterr().err
