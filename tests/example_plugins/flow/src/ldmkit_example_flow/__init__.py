"""A sampler for flow-matching models. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One sampler."""
    yield Component(
        kind="sampler",
        name="example-midpoint",
        target="ldmkit_example_flow.midpoint:FlowMidpoint",
        summary="Midpoint rule along the flow.",
    )
