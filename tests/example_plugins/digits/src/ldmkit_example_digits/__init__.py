"""A pipeline. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One pipeline."""
    yield Component(
        kind="pipeline",
        name="example-digits",
        target="ldmkit_example_digits.bundle:folder",
        summary="Digits of other plugins' parts (untrained).",
    )
