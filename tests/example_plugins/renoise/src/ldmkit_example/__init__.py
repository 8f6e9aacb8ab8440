"""What the plugin offers. Light: the sampler's own module, and torch, are imported when it is built."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """One sampler."""
    yield Component(kind="sampler", name="renoise", target="ldmkit_example.sampler:Renoise", summary="Denoise, noise again.")
