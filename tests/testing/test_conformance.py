"""The conformance kit catches what it is for: good parts pass, and for each property a broken part does not."""

import importlib
import re

import pytest

import ldmkit
from ldmkit.errors import InputError, InputTypeError
from ldmkit.testing import conformance
from tests.testing import broken_networks, broken_samplers
from tests.testing.good_parts import (
    GoodAdaptive,
    GoodAutoencoder,
    GoodConditioner,
    GoodDenoiser,
    GoodInverse,
    GoodSampler,
)

GOOD = {
    "sampler": conformance.subject("sampler", GoodSampler),
    "denoiser": broken_networks.denoiser(GoodDenoiser),
    "autoencoder": conformance.subject("autoencoder", GoodAutoencoder),
    "conditioner": conformance.subject("conditioner", GoodConditioner),
}
BROKEN = {
    "sampler": broken_samplers.BROKEN,
    "denoiser": broken_networks.DENOISERS,
    "autoencoder": broken_networks.AUTOENCODERS,
    "conditioner": broken_networks.CONDITIONERS,
}
MUTANTS = [(kind, name, broken) for kind, mutants in BROKEN.items() for name, broken in mutants.items()]
MUTANTS += [("sampler", name, broken) for name, broken in broken_samplers.BROKEN_OTHERWISE]
ALSO_GOOD = {
    "inverse": conformance.subject("sampler", GoodInverse),
    "adaptive": conformance.subject("sampler", GoodAdaptive, measured_at={"halve": False}),
}


@pytest.mark.parametrize("subject", [*GOOD.values(), *ALSO_GOOD.values()], ids=str)
def test_a_good_part_passes(subject):
    report = conformance.check(subject)
    assert report.passed, report.table()
    assert {row.verdict for row in report} == {"passed"}


@pytest.mark.parametrize("kind", GOOD)
def test_every_property_has_a_broken_part(kind):
    assert set(BROKEN[kind]) == {prop.name for prop in conformance.PROPERTIES[kind]}


@pytest.mark.parametrize(("kind", "name", "broken"), MUTANTS, ids=[f"{kind}: {name}" for kind, name, _ in MUTANTS])
def test_a_broken_part_is_caught(kind, name, broken):
    subject = broken if isinstance(broken, conformance.Subject) else conformance.subject(kind, broken)
    (row,) = conformance.check(subject, only=[name])
    assert row.verdict == "failed"
    assert row.expected in row.message()
    assert f"written in: {row.source}" in row.message()
    assert row.case is not None


@pytest.mark.parametrize("prop", [prop for properties in conformance.PROPERTIES.values() for prop in properties], ids=str)
def test_a_property_names_where_it_is_written(prop):
    assert prop.expected.endswith(".")
    value = ldmkit
    for word in prop.source.split(".")[1:]:
        value = getattr(value, word)
    assert value.__doc__


@pytest.mark.parametrize(
    ("error", "told"), [(RuntimeError("stuck"), "RuntimeError: stuck"), (AssertionError(), "AssertionError: ")]
)
def test_what_a_part_raises_is_told_with_its_line(error, told):
    def stuck(*_):
        raise error

    broken = type("Stuck", (GoodConditioner,), {"forward": stuck})
    (row,) = conformance.check(conformance.subject("conditioner", broken), only=["shapes"])
    assert row.reason == f"{told}; raised at {__file__}, line {stuck.__code__.co_firstlineno + 1}, in stuck"


def test_a_suite_is_three_lines():
    class TestGood(conformance.Suite):
        subject = GOOD["sampler"]

    suite = TestGood()
    for prop in conformance.PROPERTIES["sampler"][:3]:
        suite.test_conforms(prop)

    class TestBad(conformance.Suite):
        subject = conformance.subject("sampler", broken_samplers.Lax)

    with pytest.raises(AssertionError, match=r"written in: ldmkit\.Config"):
        TestBad().test_conforms(conformance.PROPERTIES["sampler"][0])


def test_laws_of_an_adaptive_sampler_need_its_measured_at():
    laws = ["a Gaussian's variance is reached", "declared order"]
    report = conformance.check(conformance.subject("sampler", GoodAdaptive), only=laws)
    assert {(row.name, row.verdict) for row in report} == {(name, "not applicable") for name in laws}
    assert all("`measured_at` does not say" in row.reason for row in report)


def test_what_does_not_apply_to_a_kernel_says_why():
    kernel = conformance.kernel("geglu", backend="reference")
    assert str(kernel) == "kernel geglu, reference"
    rows = conformance.check(kernel, only=["CUDA graph replay", "another stream", "second device"]).rows
    assert len(rows) == 3
    assert all(row.reason for row in rows if row.verdict == "not applicable")


def test_wrong_subjects():
    with pytest.raises(InputError, match=r"'pipeline' is none of .*; for pipelines and kernels, use conformance\.pipeline"):
        conformance.subject("pipeline", "emoji")
    with pytest.raises(InputTypeError, match=r"is no sampler: it must derive from ldmkit\.Sampler"):
        conformance.subject("sampler", dict)
    assert importlib.import_module("ldmkit.testing.conformance").check is conformance.check


@pytest.mark.parametrize(
    ("inputs", "part", "told"),
    [
        (["a"], {}, "only one input is given, 'a': give two or more"),
        ([], {"null_input": 7}, "null_input is 7, so that inputs are no texts: give two or more"),
        ([], {"check": lambda self, inputs: refuse(inputs)}, r"it refuses the inputs \['a cat', .*: no 'a cat' here; give two"),
    ],
)
def test_inputs_are_asked_for_where_the_kit_has_none(inputs, part, told):
    subject = conformance.subject("conditioner", type("Odd", (GoodConditioner,), part), inputs=inputs)
    report = conformance.check(subject, only=["shapes", "unconditional", "wrong types"])
    assert re.match(told, report.failures[0].reason), report.failures[0].reason
    assert report.table().count("smallest case") == 1
    assert report.table().endswith("  the same reason: unconditional, wrong types")


def refuse(inputs):
    raise InputError(f"no {inputs[0]!r} here")


def test_a_report_is_plain_data():
    report = conformance.check(conformance.subject("sampler", broken_samplers.Lax), only=["config is strict"])
    assert not report.passed
    plain = report.as_dict()["rows"][0]
    assert plain["verdict"] == "failed"
    assert plain["case"]["config"] == {}
    assert "config is strict" in report.table()
