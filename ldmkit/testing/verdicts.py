"""What the reports of both kits have in common: a row for each property that was tried, and its verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Generic, Protocol, TypeVar

PASSED, FAILED, NEEDS_GPU, ABSENT = "passed", "failed", "needs a GPU", "not applicable"


class Judged(Protocol):
    """A row."""

    @property
    def verdict(self) -> str: ...


R = TypeVar("R", bound=Judged)


class Rows(Generic[R]):
    """The rows of a report."""

    rows: tuple[R, ...]

    def __iter__(self) -> Iterator[R]:
        return iter(self.rows)

    @property
    def passed(self) -> bool:
        """Whether no property failed."""
        return not self.failures

    @property
    def failures(self) -> list[R]:
        """The rows of properties that failed."""
        return [row for row in self.rows if row.verdict == FAILED]

    def summary(self) -> str:
        """How many properties passed, failed, need a GPU, or are not applicable."""
        counts = Counter(row.verdict for row in self.rows)
        return ", ".join(f"{counts[verdict]} {verdict}" for verdict in (PASSED, FAILED, NEEDS_GPU, ABSENT) if counts[verdict])
