"""A diffusion transformer. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One denoiser."""
    yield Component(
        kind="denoiser",
        name="example-dit",
        target="ldmkit_example_dit.dit:DiT",
        summary="Transformer over patches, told by adaLN-zero and tokens.",
    )
