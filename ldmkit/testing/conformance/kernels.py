"""What kernels promise: the contract of `ldmkit.testing.contract`, told as the other kinds' properties are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ldmkit.testing import contract
from ldmkit.testing.conformance.report import Row
from ldmkit.testing.contract.run import PROFILES
from ldmkit.testing.contract.run import try_property as try_line
from ldmkit.testing.verdicts import ABSENT, FAILED, NEEDS_GPU, PASSED


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel under test.

    Attributes:
        op: what it computes: geglu, geglu_linear, group_norm_silu or cross_attention.
        backend: its name, where a plugin offers it.
        function: or a callable with the signature of `ldmkit.kernels.<op>`, without `backend`.
        profile: "ci" (seconds) or "thorough" (minutes).
    """

    op: str
    backend: str | None = None
    function: Callable[..., Any] | None = None
    profile: str = "ci"

    kind = "kernel"

    def __str__(self) -> str:
        return f"kernel {self.name}"

    @property
    def name(self) -> str:
        """As reports show it."""
        return f"{self.op}, {self.backend or 'a callable'}"


def properties_of_kernel(kernel: Kernel) -> tuple[contract.Property, ...]:
    """The lines of the contract for its op. Raises: InputError for an unknown op."""
    return contract.properties(kernel.op)


def try_kernel(prop: contract.Property, kernel: Kernel) -> Row:
    """One row of the report."""
    subject = contract.subject_of(kernel.op, kernel.function, backend=kernel.backend, thorough=kernel.profile == "thorough")
    row = try_line(prop, subject, PROFILES[kernel.profile])
    reason = ": ".join(filter(None, (NEEDS_GPU, row.reason))) if row.verdict == NEEDS_GPU else row.reason
    return Row(
        name=row.name,
        expected=" ".join((prop.check.__doc__ or "").split()),
        source=f"ldmkit.testing.contract, line {row.number}",
        verdict=row.verdict if row.verdict in (PASSED, FAILED) else ABSENT,
        cases=row.cases,
        reason=reason + (f"\n  {row.example}" if row.example else ""),
    )
