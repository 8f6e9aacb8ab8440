"""What checking a kernel against the contract gives: a row for each property, as a table for people and as plain data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ldmkit.testing.verdicts import FAILED, PASSED, Rows


@dataclass(frozen=True, kw_only=True)
class Row:
    """One property of the contract, tried.

    Attributes:
        number: its line in the contract.
        cases: how many were tried, refused ones not counted.
        worst: the largest error met, as a multiple of plain torch's own with one rounding; 2 is the most; None: not measured.
        verdict: "passed", "failed", "needs a GPU" or "not applicable".
        reason: why not applicable, or what a GPU is needed for, or what failed, or what a pass leaves out.
        example: Python that shows the smallest failure again.
        refused: how many cases the backend said it does not serve.
    """

    number: int
    name: str
    cases: int
    worst: float | None
    verdict: str
    reason: str = ""
    example: str | None = None
    refused: int = 0


@dataclass(frozen=True)
class Report(Rows[Row]):
    """All rows for one callable."""

    op: str
    backend: str | None
    device: str
    profile: str
    rows: tuple[Row, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """Text for the terminal; the smallest failing examples come last."""
        head = ("", "property", "cases", "worst / torch", "verdict")
        cells = [head, *(self._cells(row) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(4)]
        lines = ["  ".join([*map(str.ljust, line, widths), line[4]]).rstrip() for line in cells]
        title = f"{self.op}, {self.backend or 'a callable'}, on {self.device}, profile {self.profile}"
        failures = [f"\n{row.number} {row.name}: {row.reason}\n  {row.example}" for row in self.failures]
        return "\n".join([title, "", *lines, "", self.summary(), *failures])

    @staticmethod
    def _cells(row: Row) -> tuple[str, ...]:
        worst = "" if row.worst is None else f"{row.worst:.2f}"
        verdict = row.verdict + (f": {row.reason}" if row.reason and row.verdict != FAILED else "")
        verdict += f" ({row.refused} refused)" if row.refused and row.verdict in (PASSED, FAILED) else ""
        return str(row.number), row.name, str(row.cases or ""), worst, verdict
