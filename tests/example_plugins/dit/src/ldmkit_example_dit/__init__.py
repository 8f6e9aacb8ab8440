"""A diffusion transformer. Light: the part's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, Example, hookimpl


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


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """Small ones: told by time alone, and by tokens too."""
    small = {"width": 16, "depth": 1}
    yield Example(
        kind="denoiser",
        name="example-dit",
        configs=(small, {**small, "condition_size": 6}),
        condition={"tokens_BLC": "condition_size"},
    )
