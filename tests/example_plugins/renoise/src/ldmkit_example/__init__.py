"""What the plugin offers. Light: the sampler's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, Example, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One sampler."""
    yield Component(kind="sampler", name="renoise", target="ldmkit_example.sampler:Renoise", summary="Denoise, noise again.")


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """It is for consistency models, and exact where all the noise is fresh."""
    yield Example(kind="sampler", name="renoise", configs=({},), consistency=True)
