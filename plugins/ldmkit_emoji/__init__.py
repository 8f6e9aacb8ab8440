"""The embedded text-to-image model, `emoji`: its data maker, recipes, weights, evaluation and demo.

Commands: `python -m ldmkit_emoji.data`, `python -m ldmkit_emoji.evaluate`, `python -m ldmkit_emoji.demo`. See MODEL_CARD.md.
"""

from __future__ import annotations

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """The saved pipeline that comes with the package."""
    return [
        Component(
            kind="pipeline",
            name="emoji",
            target="ldmkit_emoji.bundle:folder",
            summary="64x64 emoji on named backgrounds from text; small enough to come with the package.",
        )
    ]
