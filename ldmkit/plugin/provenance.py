"""Where saved parts come from: each is written with its distribution and version, and read with that distribution again.

A part is never read with another distribution's class of the same name; another major version of the right one is warned of.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from packaging.version import InvalidVersion, Version

from ldmkit.errors import CheckpointError, UnknownPartError
from ldmkit.plugin.manager import Plugin, PluginWarning
from ldmkit.plugin.registry import Registry
from ldmkit.plugin.requirements import install_line


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What was recorded of a part when it was saved.

    Attributes:
        kind, name: of the part; the name as its plugin registers it.
        distribution, version: what provided it; "" in files older than these records.
        where: the file that says so, for messages.
    """

    kind: str
    name: str
    distribution: str = ""
    version: str = ""
    where: str

    @classmethod
    def read(cls, kind: Any, description: Any, where: str) -> Saved:
        """From JSON with "name" and, in files not older than these records, "distribution" and "version".

        Raises:
            CheckpointError: for anything else.
        """
        if not isinstance(description, dict):
            raise CheckpointError(f"{where} must hold a mapping with kind, name and config")
        provider = {key: description.get(key, "") for key in ("distribution", "version")}
        for key, value in {"kind": kind, "name": description.get("name"), **provider}.items():
            if not isinstance(value, str):
                raise CheckpointError(f"{where}: {key} must be a string, and is {value!r}")
        return cls(kind=kind, name=description["name"], where=where, **provider)

    @property
    def pinned(self) -> str:
        """What pip is told to install: "distribution==version"."""
        return f"{self.distribution}=={self.version}" if self.version else self.distribution


def check_installed(registry: Registry, parts: Sequence[Saved]) -> None:
    """Raise UnknownPartError for all parts at once whose distribution cannot provide them, with the line that installs them."""
    missing = [part for part in parts if part.distribution and _provider(registry, part) is None]
    if not missing:
        return
    lines = [_missing(registry, part) for part in missing]
    absent = dict.fromkeys(part.pinned for part in missing if not _plugins_of(registry, part))
    if absent:
        lines.append(install_line(*absent))
    raise UnknownPartError("\n  ".join(lines))


def name_to_load(registry: Registry, part: Saved) -> str:
    """The name under which the registry gives the very part that was saved.

    Warns: PluginWarning, where its distribution now has another major version.

    Raises:
        UnknownPartError: where its distribution cannot provide it: not installed, blocked, failed, or without it.
    """
    if not part.distribution:
        return part.name
    check_installed(registry, [part])
    plugin = _provider(registry, part)
    assert plugin is not None
    if part.version and _major(plugin.version) != _major(part.version):
        warnings.warn(
            f"{part.where}: the {part.kind} {part.name!r} was saved by {part.distribution} {part.version}, and "
            f"{plugin.version} is installed, another major version: it may behave otherwise. "
            f"{install_line(part.pinned)} brings back the one that saved it",
            PluginWarning,
            stacklevel=2,
        )
    return f"{part.distribution}:{part.name}"


def _plugins_of(registry: Registry, part: Saved) -> list[Plugin]:
    return [plugin for plugin in registry.plugins if plugin.called(part.distribution)]


def _provider(registry: Registry, part: Saved) -> Plugin | None:
    return next((plugin for plugin, _ in registry.offers(part.kind, f"{part.distribution}:{part.name}")), None)


def _missing(registry: Registry, part: Saved) -> str:
    what = f"{part.where}: the {part.kind} {part.name!r} was saved by {part.distribution} {part.version}".rstrip()
    installed = _plugins_of(registry, part)
    if not installed:
        others = [str(plugin) for plugin, _ in registry.offers(part.kind, part.name)]
        used = f" (that of {', '.join(others)} is another one, and is not put in its place)" if others else ""
        return f"{what}, which is not installed{used}"
    broken = [f"{plugin} {'is blocked' if plugin.state == 'blocked' else 'failed'}: {plugin.error}" for plugin in installed
              if plugin.state != "ok"]  # fmt: skip
    if broken:
        return f"{what}, which cannot be used now: {'; '.join(broken)}"
    return f"{what}, and {installed[0]} no longer offers it: {install_line(part.pinned)}"


def _major(version: str) -> int | None:
    """The first number of a version; None where there is none, so that unknown equals unknown."""
    try:
        return Version(version).major
    except InvalidVersion:
        return None
