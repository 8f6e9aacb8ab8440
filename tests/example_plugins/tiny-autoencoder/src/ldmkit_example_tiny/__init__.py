"""A tiny autoencoder. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One autoencoder."""
    yield Component(
        kind="autoencoder",
        name="example-tiny",
        target="ldmkit_example_tiny.autoencoder:TinyAutoencoder",
        summary="Two strided convolutions each way.",
    )
