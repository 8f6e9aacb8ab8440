"""The conformance kit: what every part of a kind promises, as properties that a plugin's tests try in three lines.

    from ldmkit.testing import conformance

    class TestMySampler(conformance.Suite):
        subject = conformance.subject("sampler", "my-sampler")

pytest then runs one test for each property. A failure says what was expected of the interface, where that is written, and the
smallest case that shows it. `check` gives the same as a report; `ldmkit plugin check` runs it from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ldmkit import interfaces
from ldmkit.errors import InputError, InputTypeError
from ldmkit.plugin.registry import INTERFACES, registry
from ldmkit.testing import contract
from ldmkit.testing.conformance import autoencoders, conditioners, denoisers, examples, pipelines, samplers
from ldmkit.testing.conformance.core import Property, Subject, Trial
from ldmkit.testing.conformance.kernels import Kernel, properties_of_kernel, try_kernel
from ldmkit.testing.conformance.pipelines import SavedPipeline, try_pipeline
from ldmkit.testing.conformance.report import Report, Row
from ldmkit.testing.conformance.run import try_property
from ldmkit.testing.verdicts import FAILED

PROPERTIES: Mapping[str, tuple[Property, ...]] = {
    "sampler": samplers.PROPERTIES,
    "denoiser": denoisers.PROPERTIES,
    "autoencoder": autoencoders.PROPERTIES,
    "conditioner": conditioners.PROPERTIES,
    "pipeline": pipelines.PROPERTIES,
}
"""The properties of each kind, in the order in which they are tried. Those of kernels are the contract's."""


def subject(kind: str, part: str | type[Any], **options: Any) -> Subject:
    """A part to test.

    Args:
        part: its registered name, or its class while it is not registered yet.
        options: what `Subject` describes: configs, inputs, condition, noiseless, consistency, measured_at. What is not given
            is taken from the plugin's hook `ldmkit_examples`, for a part by name.

    Raises:
        InputError: a kind without a suite. UnknownPartError, PluginError: as `ldmkit.part_class`, and where the hook fails.
        InputTypeError: a class that is no part of that kind.
    """
    if kind not in INTERFACES:
        raise InputError(
            f"{kind!r} is none of {', '.join(INTERFACES)}; for pipelines and kernels, use conformance.pipeline and .kernel"
        )
    if isinstance(part, str):
        return Subject(kind=kind, part=registry().load(kind, part), name=part, **{**examples.of(kind, part), **options})
    interface = getattr(interfaces, INTERFACES[kind])
    if not (isinstance(part, type) and issubclass(part, interface)):
        raise InputTypeError(f"{part!r} is no {kind}: it must derive from ldmkit.{INTERFACES[kind]}")
    return Subject(kind=kind, part=part, **options)


def pipeline(name: str, *, inputs: Sequence[Mapping[str, Any]] = ()) -> SavedPipeline:
    """A saved pipeline to test, by its registered name or folder.

    Args:
        inputs: arguments of two calls or more that mean different things; not given, as the plugin's hook `ldmkit_examples`
            says, or prompts or class labels, whichever its conditioner takes.

    Raises:
        UnknownPartError, PluginError: as `ldmkit.part_class`, and where the hook fails.
    """
    if not Path(name).is_dir():
        registry().load("pipeline", name)
        inputs = inputs or examples.of("pipeline", name).get("inputs", ())
    return SavedPipeline(name=name, inputs=inputs)


def kernel(op: str, *, backend: str | None = None, function: Callable[..., Any] | None = None, profile: str = "ci") -> Kernel:
    """A kernel to test: a plugin's backend by name, or any callable with the op's signature.

    Raises:
        InputError: an unknown op; a backend and a callable, or neither.
    """
    contract.properties(op)
    if (backend is None) == (function is None):
        raise InputError(f"{op}: give backend= or function=, not both or neither")
    return Kernel(op=op, backend=backend, function=function, profile=profile)


def properties(what: Subject | SavedPipeline | Kernel) -> Sequence[Property | contract.Property]:
    """The properties that are tried on a subject, in order."""
    return properties_of_kernel(what) if isinstance(what, Kernel) else PROPERTIES[what.kind]


def attempt(prop: Any, what: Subject | SavedPipeline | Kernel, *, examples: int = 5) -> Row:
    """One property, tried on a subject: a row of its report."""
    if isinstance(what, SavedPipeline):
        return try_pipeline(prop, what)
    return try_kernel(prop, what) if isinstance(what, Kernel) else try_property(prop, what, examples=examples)


def check(
    what: Subject | SavedPipeline | Kernel,
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
    name = what.name or what.part.__name__ if isinstance(what, Subject) else what.name
    return Report(what.kind, name, tuple(rows))


class Suite:
    """Base of a pytest class: set `subject`, and every property of its kind is a test.

    Attributes:
        subject: what `conformance.subject`, `conformance.pipeline` or `conformance.kernel` gives.
        examples: how many cases are drawn for each property, beside the subject's own configs.
    """

    subject: ClassVar[Subject | SavedPipeline | Kernel]
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
    "SavedPipeline",
    "Subject",
    "Suite",
    "Trial",
    "attempt",
    "check",
    "kernel",
    "pipeline",
    "properties",
    "subject",
]
