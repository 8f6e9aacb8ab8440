"""Text as bytes. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, Example, hookimpl


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


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """Prompts and a small config, for checks."""
    yield Example(
        kind="conditioner",
        name="example-bytes",
        configs=({"hidden_size": 8, "max_bytes": 40},),
        inputs=("a cat", "Schrödinger's cat", "fog"),
    )
