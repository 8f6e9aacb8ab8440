"""Parts by kind and name. Targets are imported when a part is loaded, never before.

A name may say whose part is meant, as "distribution:name" or "entry-point:name". Without that, a built-in part keeps its name
whatever else is installed; any other name that two plugins offer is an error.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from ldmkit.errors import InputError, InputTypeError, PartClashError, PluginError, UnknownPartError
from ldmkit.plugin.manager import DISABLE, Plugin, Row, discover, warn_of_failures
from ldmkit.plugin.spec import EXTENSION_KINDS, KINDS, Component
from ldmkit.plugin.targets import CALLED_AS_THEY_ARE, load_target
from ldmkit.plugin.targets import INTERFACES as INTERFACES  # noqa: PLC0414  (where callers look for it)

Offer = tuple[Plugin, Row]
"""A line of the table, and whose it is."""


class Registry:
    """What a set of plugins offers. Immutable; threads may share it."""

    def __init__(self, plugins: Iterable[Plugin]) -> None:
        self._plugins = tuple(plugins)
        self._table: dict[tuple[str, str], list[Offer]] = {}
        for plugin in self._plugins:
            for row in plugin.rows:
                self._table.setdefault((row.kind, row.name), []).append((plugin, row))

    @property
    def plugins(self) -> tuple[Plugin, ...]:
        """All plugins found, the failed and the blocked too."""
        return self._plugins

    def components(self, kind: str | None = None) -> tuple[Component, ...]:
        """Every line of the table, sorted by kind and name. Raises: UnknownPartError for an unknown kind."""
        kinds = KINDS if kind is None else (_known_kind(kind, KINDS),)
        found = [c for plugin in self._plugins for c in plugin.components if c.kind in kinds]
        return tuple(sorted(found, key=lambda c: (KINDS.index(c.kind), c.name)))

    def available(self, kind: str) -> tuple[str, ...]:
        """The names of a kind, sorted; where plugins clash, all in full ("distribution:name"), and so what a built-in shadows.

        Raises:
            UnknownPartError: for an unknown kind.
        """
        _known_kind(kind)
        names: list[str] = []
        for name in sorted(name for its_kind, name in self._table if its_kind == kind):
            offers = self.offers(kind, name)
            chosen = _chosen(offers)
            names += [name] if chosen else []
            names += [f"{_qualifier(offer[0], offers)}:{name}" for offer in offers if offer is not chosen]
        return tuple(names)

    def clashes(self) -> tuple[str, ...]:
        """A message for every part that more than one plugin offers, none of them built in."""
        return tuple(_clash(*key, offers) for key, offers in self._table.items() if not _chosen(offers))

    def shadowed(self) -> tuple[str, ...]:
        """A message for every part that has the name of a built-in one."""
        return tuple(
            f"the {kind} {name!r} of {plugin} has the name of a built-in one, which keeps it; "
            f"write {f'{_qualifier(plugin, offers)}:{name}'!r} to use it"
            for (kind, name), offers in self._table.items()
            if (chosen := _chosen(offers))
            for plugin, component in offers
            if component is not chosen[1]
        )

    def offers(self, kind: str, name: str) -> Sequence[Offer]:
        """Everyone's parts of that kind and name, which may be qualified, in the order of distributions."""
        owner, _, bare = name.rpartition(":")
        return [offer for offer in self._table.get((kind, bare), ()) if not owner or offer[0].called(owner)]

    def find(self, kind: str, name: str) -> Row:
        """One line of the table, without importing its target.

        Raises:
            UnknownPartError: naming close matches, and the failed plugins that might have held the part.
            PartClashError: when two plugins offer it.
        """
        return self._find(kind, name)[1]

    def load(self, kind: str, name: str) -> Any:
        """Import a part's class (for kind "pipeline", its function).

        Raises:
            UnknownPartError, PartClashError: as `find`.
            PluginError: the target cannot be imported, or is not what its kind demands.
        """
        plugin, component = self._find(kind, name)
        return load_target(plugin, component)

    def build(self, kind: str, name: str, /, **config: Any) -> Any:
        """An instance of a part.

        Raises:
            ConfigError: unknown keys or ill-typed values.
            UnknownPartError, PartClashError, PluginError: as `load`.
        """
        if kind == "pipeline":
            raise InputError(f"a pipeline is loaded, not built: ldmkit.Pipeline.from_pretrained({name!r})")
        target = self.load(kind, name)
        if kind in EXTENSION_KINDS:
            if kind in CALLED_AS_THEY_ARE:
                raise InputError(f"a {kind} is loaded, not built: it has no config")
            return target(target.Config.parse(config, owner=f"{kind} {name!r}"))
        return target.build(**config)

    def offer_of(self, part: type) -> tuple[Plugin, Component]:
        """The line that registers a part's class, and the plugin it comes from (what a saved part is named by).

        Raises:
            PluginError: when no plugin registers the class.
        """
        own = f"{part.__module__}:{part.__qualname__}"
        for plugin in self._plugins:
            for component in plugin.components:
                if component.target == own or _is_target(part, component.target):
                    return plugin, component
        raise PluginError(
            f"{part.__module__}.{part.__qualname__} is not registered, so a saved copy could not be found again: list it in a "
            f"plugin's ldmkit_components with target '{own}'"
        )

    def _find(self, kind: str, name: str) -> Offer:
        _known_kind(kind)
        if not isinstance(name, str):
            raise InputTypeError(f"the name of a {kind} must be a string, got {name!r} of type {type(name).__name__}")
        offers = self.offers(kind, name)
        if not offers:
            raise UnknownPartError(self._unknown(kind, name))
        chosen = _chosen(offers)
        if chosen is None:
            raise PartClashError(_clash(kind, name, offers))
        return chosen

    def _unknown(self, kind: str, name: str) -> str:
        names = self.available(kind)
        close = get_close_matches(name, names, n=3, cutoff=0.6)
        lines = [f"no {kind} is called {name!r}" + (f"; did you mean {' or '.join(map(repr, close))}?" if close else "")]
        elsewhere = [its_kind for its_kind, its_name in self._table if its_name == name]
        lines += [f"  there is {_a(other)} {other} of that name" for other in elsewhere]
        lines.append(f"  {kind}{' parts' if kind in KINDS else 's'} there are: {', '.join(names) or 'none'}")
        for state, word in (("failed", "failed, and might have held it"), ("blocked", "is blocked, and might hold it")):
            lines += [f"  plugin {p} {word}: {p.error}" for p in self._plugins if p.state == state]
        if any(plugin.state == "failed" for plugin in self._plugins):
            lines.append("  `ldmkit plugins` shows the tracebacks")
        return "\n".join(lines)


def _known_kind(kind: str, kinds: tuple[str, ...] = (*KINDS, *EXTENSION_KINDS)) -> str:
    if kind not in kinds:
        close = get_close_matches(str(kind), kinds, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise UnknownPartError(f"no kind of part is called {kind!r}{hint} (kinds: {', '.join(kinds)})")
    return kind


def _a(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _chosen(offers: Sequence[Offer]) -> Offer | None:
    """Whom the plain name means: the only one, or the only built-in one."""
    candidates = [offer for offer in offers if offer[0].builtin] if len(offers) > 1 else offers
    return candidates[0] if len(candidates) == 1 else None


def _qualifier(plugin: Plugin, offers: Sequence[Offer]) -> str:
    """What tells this plugin's offer from the others': its distribution, or its entry point where that is shared."""
    shared = sum(bool(plugin.distribution) and other.called(plugin.distribution) for other, _ in offers) != 1
    return plugin.entry_point if shared else plugin.distribution


def _clash(kind: str, name: str, offers: Sequence[Offer]) -> str:
    bare = name.rpartition(":")[2]
    picks = " or ".join(repr(f"{_qualifier(plugin, offers)}:{bare}") for plugin, _ in offers)
    return (
        f"the {kind} {name!r} is offered by {' and by '.join(str(plugin) for plugin, _ in offers)}; "
        f"pick one by writing {picks}, or block one with {DISABLE}={_qualifier(offers[-1][0], offers)}"
    )


def _is_target(part: type, target: str) -> bool:
    """Whether a target names a class by another module than the one that defines it, such as its package."""
    module, _, attribute = target.partition(":")
    value: Any = sys.modules.get(module)
    for word in attribute.split("."):
        value = getattr(value, word, None)
    return value is part


_lock = threading.RLock()
_registry: Registry | None = None
_building = False


def registry() -> Registry:
    """The registry of everything installed, built on first use.

    Raises:
        PluginError: when a plugin asks for it while plugins are being found.
    """
    global _registry, _building  # noqa: PLW0603  (one lazily built value, under a lock)
    if _registry is None:
        with _lock:
            if _building:
                raise PluginError("parts were asked for while plugins are being found; do so in a part's target, not on import")
            if _registry is None:
                _building = True
                try:
                    _registry = Registry(discover())
                finally:
                    _building = False
                warn_of_failures(_registry.plugins)
    return _registry


def available(kind: str) -> tuple[str, ...]:
    """The names of all parts of a kind. Raises: UnknownPartError for an unknown kind."""
    return registry().available(kind)


def part_class(kind: str, name: str) -> Any:
    """The class of a part, by name. Raises: UnknownPartError, PartClashError, PluginError."""
    return registry().load(kind, name)


def build(kind: str, name: str, /, **config: Any) -> Any:
    """An instance of a part, by name: `build("sampler", "ddim", eta=1.0)`.

    Raises: ConfigError, UnknownPartError, PartClashError, PluginError.
    """
    return registry().build(kind, name, **config)
