"""What checking a part against its interface gives: a row for each property, as a table for people and as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ldmkit.testing.verdicts import ABSENT, Rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One property, tried.

    Attributes:
        expected: what the interface expects; `source` is the public name whose documentation says so.
        verdict: "passed", "failed" or "not applicable".
        cases: how many were tried and served.
        reason: what failed, or why it is not applicable.
        case: the smallest failing one, as plain values.
        error: what was raised there.
    """

    name: str
    expected: str
    source: str
    verdict: str
    cases: int
    reason: str = ""
    case: Mapping[str, Any] | None = None
    error: Exception | None = None

    def message(self) -> str:
        """A failure in full."""
        lines = [f"{self.name}: {self.reason}", f"  expected: {self.expected}", f"  written in: {self.source}"]
        return "\n".join(lines + ([f"  smallest case: {dict(self.case)}"] if self.case is not None else []))

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        names = ("name", "verdict", "cases", "reason", "expected", "source")
        case = None if self.case is None else {key: value if _plain(value) else repr(value) for key, value in self.case.items()}
        return {**{name: getattr(self, name) for name in names}, "case": case}


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_plain, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, str | int | float | bool)


@dataclass(frozen=True)
class Report(Rows[Row]):
    """All rows for one part."""

    kind: str
    name: str
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"kind": self.kind, "name": self.name, "passed": self.passed, "rows": [row.as_dict() for row in self.rows]}

    def table(self) -> str:
        """Text for the terminal; failures in full come last."""
        width = max(len(row.name) for row in self.rows)
        lines = [
            f"{row.name.ljust(width)}  {str(row.cases or '').rjust(5)}  {row.verdict}"
            + (f": {row.reason}" if row.verdict == ABSENT else "")
            for row in self.rows
        ]
        return "\n".join([f"{self.kind} {self.name}", "", *lines, "", self.summary(), *self._told()])

    def _told(self) -> list[str]:
        """Failures in full; of those with one reason, the first."""
        alike: dict[str, list[Row]] = {}
        for row in self.failures:
            alike.setdefault(row.reason, []).append(row)
        others = {reason: ", ".join(row.name for row in rows[1:]) for reason, rows in alike.items()}
        return [
            f"\n{rows[0].message()}" + (f"\n  the same reason: {others[reason]}" if others[reason] else "")
            for reason, rows in alike.items()
        ]
