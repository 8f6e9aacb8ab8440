"""What a plugin itself says of how its parts are tried: its hook `ldmkit_examples`."""

from __future__ import annotations

import itertools
from typing import Any

from ldmkit.errors import PluginError
from ldmkit.plugin.manager import Plugin
from ldmkit.plugin.registry import registry
from ldmkit.plugin.spec import Example


def of(kind: str, name: str) -> dict[str, Any]:
    """What the example of a part says; nothing where its plugin has none.

    Raises:
        PluginError: as `all_of`.
    """
    part = registry().find(kind, name)
    (plugin,) = (plugin for plugin, row in registry().offers(kind, name) if row is part)
    for example in all_of(plugin):
        if (example.kind, example.name) == (kind, part.name):
            found = {key: value for key, value in vars(example).items() if key not in ("kind", "name")}
            return {key: value for key, value in found.items() if value}
    return {}


def all_of(plugin: Plugin) -> tuple[Example, ...]:
    """Every example of a plugin that works.

    Raises:
        PluginError: the hook raises, gives something else than examples, or two of one part, or one of a part that the plugin
            does not offer.
    """
    try:
        found = tuple(itertools.chain(*plugin.hooks.ldmkit_examples()))
    except Exception as error:
        raise PluginError(f"{plugin}: its ldmkit_examples failed: {type(error).__name__}: {error}") from error
    seen = set()
    for example in found:
        if not isinstance(example, Example):
            raise PluginError(f"{plugin}: ldmkit_examples must return Example objects only, and one is {example!r}")
        key, what = (example.kind, example.name), f"{plugin}: the {example.kind} {example.name!r} of its ldmkit_examples"
        if key in seen:
            raise PluginError(f"{what} is there twice; give all its configs in one example")
        if key not in {(part.kind, part.name) for part in plugin.components}:
            raise PluginError(f"{what} is not among its ldmkit_components")
        seen.add(key)
    return found
