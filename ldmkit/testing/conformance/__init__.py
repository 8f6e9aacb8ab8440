"""The conformance kit: what every part of a kind promises, as properties that a plugin's tests try in three lines.

    from ldmkit.testing import conformance

    class TestMySampler(conformance.Suite):
        subject = conformance.subject("sampler", "my-sampler")

pytest then runs one test for each property. A failure says what was expected of the interface, where that is written, and the
smallest case that shows it. `check` gives the same as a report; `ldmkit plugin check` runs it from outside.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from ldmkit import interfaces
from ldmkit.errors import InputError, InputTypeError
from ldmkit.plugin.registry import INTERFACES, registry
from ldmkit.testing import contract
from ldmkit.testing.conformance import autoencoders, conditioners, denoisers, samplers
from ldmkit.testing.conformance.core import Property, Subject, Trial
from ldmkit.testing.conformance.kernels import Kernel, properties_of_kernel, try_kernel
from ldmkit.testing.conformance.report import FAILED, Report, Row
from ldmkit.testing.conformance.run import try_property

PROPERTIES: Mapping[str, tuple[Property, ...]] = {
    "sampler": samplers.PROPERTIES,
    "denoiser": denoisers.PROPERTIES,
    "autoencoder": autoencoders.PROPERTIES,
    "conditioner": conditioners.PROPERTIES,
}
"""The properties of each kind of part, in the order in which they are tried. Those of kernels are the contract's."""


def subject(kind: str, part: str | type[Any], **options: Any) -> Subject:
    """A part to test.

    Args:
        part: its registered name, or its class while it is not registered yet.
        options: what `Subject` describes: configs, inputs, condition, noiseless, consistency. What is not given is taken from
            the plugin's hook `ldmkit_examples`, for a part by name.

    Raises:
        InputError: a kind without a suite. UnknownPartError, PluginError: as `ldmkit.part_class`.
        InputTypeError: a class that is no part of that kind.
    """
    if kind not in PROPERTIES:
        raise InputError(f"there is no suite for kind {kind!r}; there are {', '.join(PROPERTIES)}, and `kernel`")
    if isinstance(part, str):
        return Subject(kind=kind, part=registry().load(kind, part), name=part, **{**_example(kind, part), **options})
    interface = getattr(interfaces, INTERFACES[kind])
    if not (isinstance(part, type) and issubclass(part, interface)):
        raise InputTypeError(f"{part!r} is no {kind}: it must derive from ldmkit.{INTERFACES[kind]}")
    return Subject(kind=kind, part=part, **options)


def _example(kind: str, name: str) -> dict[str, Any]:
    """What the plugin's own example of a part says."""
    owner, _, bare = name.rpartition(":")
    for plugin in registry().plugins:
        if plugin.hooks is None or (owner and not plugin.called(owner)):
            continue
        for example in itertools.chain(*plugin.hooks.ldmkit_examples()):
            if (example.kind, example.name) == (kind, bare):
                found = {key: value for key, value in vars(example).items() if key not in ("kind", "name")}
                return {key: value for key, value in found.items() if value}
    return {}


def kernel(op: str, *, backend: str | None = None, function: Callable[..., Any] | None = None, profile: str = "ci") -> Kernel:
    """A kernel to test: a plugin's backend by name, or any callable with the op's signature.

    Raises:
        InputError: an unknown op; a backend and a callable, or neither.
    """
    contract.properties(op)
    if (backend is None) == (function is None):
        raise InputError(f"{op}: give backend= or function=, not both or neither")
    return Kernel(op=op, backend=backend, function=function, profile=profile)


def properties(what: Subject | Kernel) -> Sequence[Property | contract.Property]:
    """The properties that are tried on a subject, in order."""
    return properties_of_kernel(what) if isinstance(what, Kernel) else PROPERTIES[what.kind]


def attempt(prop: Any, what: Subject | Kernel, *, examples: int = 5) -> Row:
    """One property, tried on a subject: a row of its report."""
    return try_kernel(prop, what) if isinstance(what, Kernel) else try_property(prop, what, examples=examples)


def check(
    what: Subject | Kernel,
    *,
    examples: int = 5,
    only: Sequence[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Tries every property.

    Args:
        examples: how many cases are drawn for a property, beside the subject's own configs.
        only: names of properties; None is all.
        progress: is told the name of each property as it comes.
    """
    rows = []
    for prop in properties(what):
        if only is None or prop.name in only:
            if progress is not None:
                progress(prop.name)
            rows.append(attempt(prop, what, examples=examples))
    name = what.name if isinstance(what, Kernel) else what.name or what.part.__name__
    return Report(what.kind, name, tuple(rows))


class Suite:
    """Base of a pytest class: set `subject`, and every property of its kind is a test.

    Attributes:
        subject: what `conformance.subject` or `conformance.kernel` gives.
        examples: how many cases are drawn for each property, beside the subject's own configs.
    """

    subject: ClassVar[Subject | Kernel]
    examples: ClassVar[int] = 5

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """One test for each property."""
        if "prop" in metafunc.fixturenames:
            found = properties(self.subject)
            metafunc.parametrize("prop", found, ids=[prop.name for prop in found])

    def test_conforms(self, prop: Any) -> None:
        """The property holds, or does not apply."""
        row = attempt(prop, self.subject, examples=self.examples)
        assert row.verdict != FAILED, row.message()


__all__ = [
    "PROPERTIES",
    "Kernel",
    "Property",
    "Report",
    "Row",
    "Subject",
    "Suite",
    "Trial",
    "attempt",
    "check",
    "kernel",
    "properties",
    "subject",
]
