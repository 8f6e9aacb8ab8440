"""Tries properties on a part: its own configs first, then drawn cases; the smallest failing one is what is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st

from ldmkit.testing.conformance.core import Property, Refused, Subject, Trial
from ldmkit.testing.conformance.report import Row
from ldmkit.testing.conformance.samplers import SCHEDULES
from ldmkit.testing.trying import Case, draw, reason_of
from ldmkit.testing.verdicts import ABSENT, FAILED, PASSED


def try_property(prop: Property, subject: Subject, *, examples: int) -> Row:
    """One row of the report.

    Args:
        examples: how many cases are drawn, beside the subject's own configs.
    """
    if (reason := prop.absent(subject)) is not None:
        return _row(prop, ABSENT, 0, reason=reason)
    tried, refused = 0, ""
    failures: list[tuple[Case, Exception]] = []

    def attempt(case: Case) -> None:
        nonlocal tried, refused
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a part may warn of what random inputs make it do
                prop.check(Trial(subject, case))
            tried += 1
        except Refused as error:
            refused = str(error)
        except Exception as error:
            failures.append((case, error))
            raise

    try:
        for case in _fixed(prop, subject):
            attempt(case)
        if not (prop.once and tried):
            draw(_cases(subject), attempt, examples=1 if prop.once else examples)
    except Exception:
        if not failures:  # of our own
            raise
    if failures:
        case, error = failures[-1]
        return _row(prop, FAILED, tried, reason=reason_of(error), case=case, error=error)
    if not tried:
        return _row(prop, FAILED, 0, reason=f"no case was served: {refused}")
    return _row(prop, PASSED, tried)


def _row(prop: Property, verdict: str, cases: int, **more: Any) -> Row:
    return Row(name=prop.name, expected=prop.expected, source=prop.source, verdict=verdict, cases=cases, **more)


def _fixed(prop: Property, subject: Subject) -> Iterator[Case]:
    configs = () if isinstance(subject.inputs, st.SearchStrategy) else subject.fixed_configs()
    for config in configs[:1] if prop.once else configs:
        yield {"config": dict(config), "batch": 2, "seed": 0, **_plain(subject)}


def _plain(subject: Subject) -> Case:
    """What the cases of a kind have besides."""
    if subject.kind == "sampler":
        return {"steps": 5, "schedule": "ddpm"}
    return {"inputs": subject.fixed_inputs()} if subject.kind == "conditioner" else {"height": 1, "width": 2}


def _strategies(subject: Subject) -> dict[str, st.SearchStrategy[Any]]:
    if subject.kind == "sampler":
        return {"steps": st.integers(1, 8), "schedule": st.sampled_from(SCHEDULES)}
    if subject.kind == "conditioner":
        return {"inputs": subject.drawn_inputs()}
    return {"height": st.integers(1, 2), "width": st.integers(1, 2)}


def _cases(subject: Subject) -> st.SearchStrategy[Case]:
    return st.fixed_dictionaries(
        {
            "config": subject.drawn_configs(),
            "batch": st.integers(2, 3),
            "seed": st.integers(0, 99),
            **_strategies(subject),
        }
    )
