"""Text as bytes. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One conditioner."""
    yield Component(
        kind="conditioner",
        name="example-bytes",
        target="ldmkit_example_bytes.conditioner:ByteConditioner",
        summary="UTF-8 bytes as tokens.",
    )
