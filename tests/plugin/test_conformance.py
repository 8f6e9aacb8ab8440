"""The built-in parts pass the suites that a stranger's parts are held to."""

import pytest

from ldmkit import available
from ldmkit.testing import conformance

NOISELESS = {
    "euler-ancestral": {"eta": 0.0},
    "dpm-2-ancestral": {"eta": 0.0},
    "dpm++-2s-ancestral": {"eta": 0.0},
    "dpm++-sde": {"eta": 0.0},
    "dpm++-2m-sde": {"eta": 0.0},
    "dpm++-3m-sde": {"eta": 0.0},
    "restart": {"intervals": []},
}
CONSISTENCY = ("consistency", "lcm")


@pytest.mark.parametrize("name", available("sampler"))
def test_samplers(name):
    subject = conformance.subject("sampler", name, noiseless=NOISELESS.get(name, {}), consistency=name in CONSISTENCY)
    report = conformance.check(subject, examples=3)
    assert report.passed, report.table()
    absent = {"declared order"} if subject.part.facts.order is None else set()
    assert {row.name for row in report if row.verdict == "not applicable"} == absent
