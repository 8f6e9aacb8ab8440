"""Tries properties on a callable: fixed cases first, then drawn ones, and the smallest failing one is what is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ldmkit.testing.contract.core import Case, Property, Refused, Subject, Tally, Trial
from ldmkit.testing.contract.report import Row
from ldmkit.testing.trying import draw, reason_of
from ldmkit.testing.verdicts import ABSENT, FAILED, NEEDS_GPU, PASSED


@dataclass(frozen=True)
class Profile:
    """How many cases a property is tried on, and on how many where the kernel is interpreted or emulated."""

    examples: int
    tiny_examples: int
    derandomize: bool


PROFILES = {"ci": Profile(12, 2, True), "thorough": Profile(80, 12, False)}


def try_property(prop: Property, subject: Subject, profile: Profile) -> Row:
    """One row of the report."""
    if (reason := prop.absent(subject)) is not None:
        gpu = reason.startswith(NEEDS_GPU)
        reason = reason.removeprefix(NEEDS_GPU).removeprefix(": ") if gpu else reason
        verdict = NEEDS_GPU if gpu else ABSENT
        return Row(number=prop.number, name=prop.name, cases=0, worst=None, verdict=verdict, reason=reason)
    tally = Tally()
    failures: list[tuple[Case, BaseException]] = []

    def attempt(case: Case) -> None:
        try:
            prop.check(Trial(subject, tally, subject.op.build(subject.device, **case), case))
            tally.cases += 1
        except Refused as refusal:
            tally.refused.append(str(refusal))
        except Exception as error:
            tally.cases += 1
            failures.append((case, error))
            raise

    try:
        for case in prop.fixed(subject):
            attempt(case)
        if prop.cases is not None:
            examples = max(1, round(prop.share * (profile.tiny_examples if subject.tiny else profile.examples)))
            draw(prop.cases(subject), attempt, examples=examples, derandomize=profile.derandomize)
        elif not tally.cases and not tally.refused:
            attempt(subject.op.many())
    except Exception:
        if not failures:  # of our own
            raise
    return _row(prop, subject, tally, failures)


def _row(prop: Property, subject: Subject, tally: Tally, failures: list[tuple[Case, BaseException]]) -> Row:
    common: dict[str, Any] = {"number": prop.number, "name": prop.name, "worst": tally.worst, "refused": len(tally.refused)}
    if failures:
        case, error = failures[-1]
        example = replay_line(prop, subject, case)
        return Row(**common, cases=tally.cases, verdict=FAILED, reason=reason_of(error), example=example)
    if not tally.cases:
        return Row(**common, cases=0, verdict=ABSENT, reason=tally.refused[0])
    return Row(**common, cases=tally.cases, verdict=PASSED, reason=prop.but(subject))


def replay_line(prop: Property, subject: Subject, case: Case) -> str:
    """Python that runs one case again."""
    values = ", ".join(f"{name}={value!r}" for name, value in case.items())
    what = repr(subject.backend) if subject.backend is not None else "your_callable"
    return f"from ldmkit.testing import contract; contract.replay({subject.op.name!r}, {prop.name!r}, {what}, {values})"


def select(properties: Sequence[Property], only: Sequence[int | str] | None) -> list[Property]:
    """Those whose number or name is in `only`, in the contract's order."""
    chosen = [p for p in properties if only is None or p.number in only or p.name in only]
    return sorted(chosen, key=lambda p: p.number)
