"""Finding plugins and hearing what each has to say, one by one: a broken plugin is kept as failed, and the rest goes on.

A plugin is an entry point in the group `ldmkit`. Two environment variables, comma-separated lists of distribution or
entry-point names, decide which are heard: LDMKIT_DISABLE_PLUGINS blocks some, LDMKIT_PLUGINS (if not empty) allows no others.
A blocked plugin is never imported. One that hangs is named after LDMKIT_SLOW_PLUGIN seconds (see `watchdog`).
"""

from __future__ import annotations

import inspect
import os
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from importlib import metadata
from typing import Any, Literal

import pluggy
from packaging.specifiers import InvalidSpecifier, SpecifierSet

from ldmkit.errors import PluginError
from ldmkit.plugin import requirements, spec, watchdog
from ldmkit.plugin.spec import API_VERSION, EXTENSIONS, Component, Extension, Kernel

Row = Component | Extension
GROUP = "ldmkit"
CORE = "ldmkit"
"""The distribution whose plugins are built in: a name of theirs is never taken over by another's."""
DISABLE, ALLOW = "LDMKIT_DISABLE_PLUGINS", "LDMKIT_PLUGINS"


class PluginWarning(UserWarning):
    """A plugin failed to load or hangs, an environment variable names one that is not installed, or a saved part comes from
    another major version of its plugin.
    """


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """What became of one entry point.

    Attributes:
        entry_point: its name.
        module: what it points to.
        distribution: the installed distribution that ships it ("" where unknown), and its `version`.
        state: "ok"; "failed" (see `error`, one line, and `traceback`); or "blocked" (see `error`).
        components: the parts it offers; none unless ok.
        kernels: the kernels it offers; none unless ok.
        extensions: what else it offers; none unless ok.
        api: the range of plugin API versions it declares ("" where it declares none, or was never asked).
        seconds: what loading it took.
        hooks: calls its hooks, each returning a list of at most one result; None unless ok.
    """

    entry_point: str
    module: str
    distribution: str = ""
    version: str = ""
    state: Literal["ok", "failed", "blocked"] = "ok"
    components: tuple[Component, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    extensions: tuple[Extension, ...] = ()
    error: str = ""
    traceback: str = ""
    api: str = ""
    seconds: float = field(default=0.0, compare=False)
    hooks: Any = field(default=None, repr=False, compare=False)

    def __str__(self) -> str:
        shipped_by = " ".join(filter(None, (self.distribution, self.version))) or "unknown distribution"
        return f"{shipped_by} (entry point {self.entry_point!r})"

    @property
    def builtin(self) -> bool:
        """Whether ldmkit itself ships it."""
        return canonical(self.distribution) == CORE

    @property
    def rows(self) -> tuple[Row, ...]:
        """All that it offers by kind and name: parts and extensions."""
        return (*self.components, *self.extensions)

    def called(self, name: str) -> bool:
        """Whether `name` is that of the distribution (however spelt: a-b, a_b, A.B) or of the entry point."""
        return canonical(name) in (canonical(self.distribution), canonical(self.entry_point))


def canonical(name: str) -> str:
    """A name as packaging compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def discover(entry_points: Iterable[metadata.EntryPoint] | None = None) -> tuple[Plugin, ...]:
    """Load every plugin that is not blocked, in the order of distribution and entry-point names. Never raises for a plugin.

    Args:
        entry_points: instead of all those installed in the group `ldmkit`.
    """
    if entry_points is None:
        entry_points = metadata.entry_points(group=GROUP)
    found = [(entry_point, _describe(entry_point)) for entry_point in entry_points]
    found.sort(key=lambda pair: (canonical(pair[1].distribution), pair[1].entry_point))
    blocked, allowed = names_in(os.environ.get(DISABLE, "")), names_in(os.environ.get(ALLOW, ""))
    plugins = []
    with watchdog.Watchdog(watchdog.limit(), watchdog.warn(PluginWarning)) as dog:
        for entry_point, plugin in found:
            if any(map(plugin.called, blocked)):
                plugins.append(replace(plugin, state="blocked", error=f"named in {DISABLE}"))
            elif allowed and not any(map(plugin.called, allowed)):
                plugins.append(replace(plugin, state="blocked", error=f"not named in {ALLOW}"))
            else:
                with dog.watching(f"plugin {plugin} ({DISABLE}={plugin.entry_point} leaves it out)"):
                    plugins.append(_load(entry_point, plugin))
    _warn_of_unknown(DISABLE, blocked, plugins)
    _warn_of_unknown(ALLOW, allowed, plugins)
    return tuple(plugins)


def names_in(text: str) -> list[str]:
    """The names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def warn_of_failures(plugins: Iterable[Plugin]) -> None:
    """One warning for each failed plugin."""
    for plugin in plugins:
        if plugin.state == "failed":
            warnings.warn(
                f"plugin {plugin} failed and is left out: {plugin.error}. `ldmkit plugins` shows where; "
                f"{DISABLE}={plugin.entry_point} blocks it and silences this.",
                PluginWarning,
                stacklevel=3,
            )


def _warn_of_unknown(variable: str, names: Sequence[str], plugins: Sequence[Plugin]) -> None:
    for name in names:
        if not any(plugin.called(name) for plugin in plugins):
            known = sorted({word for plugin in plugins for word in (plugin.distribution, plugin.entry_point) if word})
            warnings.warn(
                f"{variable} names {name!r}, but no installed plugin or its distribution is called so; "
                f"there are: {', '.join(known) or 'none'}",
                PluginWarning,
                stacklevel=4,
            )


def _describe(entry_point: metadata.EntryPoint) -> Plugin:
    about = entry_point.dist.metadata if entry_point.dist else None  # parsed once; damaged metadata lacks either
    name, version = (about[key] if about is not None and key in about else "" for key in ("Name", "Version"))
    return Plugin(entry_point=entry_point.name, module=entry_point.value, distribution=name, version=version)


def _load(entry_point: metadata.EntryPoint, plugin: Plugin) -> Plugin:
    start, api = time.perf_counter(), ""
    try:
        manager = _register(entry_point.load(), name=entry_point.name)
        api = _declared_api(manager.hook.ldmkit_api())
        _check_api(api)
        _check_names(manager)
        components = _components(manager.hook.ldmkit_components())
        kernels = _kernels(manager.hook.ldmkit_kernels())
        extensions = _extensions(manager)
    except (Exception, SystemExit) as error:  # whatever a stranger's code may do, the others go on
        text, seconds = _told(error, plugin), time.perf_counter() - start
        return replace(plugin, state="failed", error=text, traceback=traceback.format_exc(), api=api, seconds=seconds)
    seconds = time.perf_counter() - start
    plugin = replace(plugin, components=components, kernels=kernels, extensions=extensions)
    return replace(plugin, api=api, seconds=seconds, hooks=manager.hook)


def _told(error: BaseException, plugin: Plugin) -> str:
    """One line: what went wrong, and what to install where that is the way out."""
    message = " ".join(str(error).split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    advice = requirements.hint(error, plugin.distribution) if isinstance(error, ImportError) else ""
    return f"{text}; {advice}" if advice else text


def _register(plugin: object, *, name: str) -> pluggy.PluginManager:
    """A manager with this one plugin, so that its hooks are called by themselves."""
    manager = _empty_manager()
    manager.register(plugin, name=name)  # checks signatures
    for hook in hook_names():
        if inspect.isroutine(getattr(plugin, hook, None)) and not getattr(manager.hook, hook).get_hookimpls():
            raise PluginError(f"{hook} lacks its decorator: write @hookimpl (from ldmkit.plugin.spec) above it")
    if not manager.get_hookcallers(plugin):
        raise PluginError(f"it implements no hook (no function marked with @hookimpl); hooks: {', '.join(hook_names())}")
    return manager


def _empty_manager() -> pluggy.PluginManager:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(spec)
    return manager


def hook_names() -> tuple[str, ...]:
    """The names of all hooks a plugin may implement."""
    return tuple(sorted(vars(_empty_manager().hook)))


def _check_names(manager: pluggy.PluginManager) -> None:
    """Raise PluginError for an implementation of a hook that there is not."""
    try:
        manager.check_pending()
    except pluggy.PluginValidationError:
        unknown = {name: hook for name, hook in vars(manager.hook).items() if not hook.has_spec()}
        name = next(name for name, hook in unknown.items() if not all(each.optionalhook for each in hook.get_hookimpls()))
        close = get_close_matches(name, hook_names(), n=1)
        meant = f"did you mean {close[0]}?" if close else f"hooks: {', '.join(hook_names())}"
        raise PluginError(f"it implements {name}, which is no hook; {meant}") from None


def _declared_api(answers: list[Any]) -> str:
    """The range a plugin declares, "" where it declares none. Raises: PluginError."""
    for answer in answers:
        if not isinstance(answer, str):
            raise PluginError(f"ldmkit_api must return a version specifier like '>=1.0,<2', not {answer!r}")
        return answer
    return ""


def _check_api(declared: str) -> None:
    try:
        served = SpecifierSet(declared)
    except InvalidSpecifier:
        raise PluginError(
            f"ldmkit_api returned {declared!r}, which is no version specifier; write one like '>=1.0,<2'"
        ) from None
    version = ".".join(map(str, API_VERSION))
    if not served.contains(version):
        raise PluginError(f"it works with plugin API {declared}, and this ldmkit has {version}; upgrade it, or ldmkit")


def _components(answers: list[Any]) -> tuple[Component, ...]:
    components: tuple[Component, ...] = _all_of(Component, "ldmkit_components", answers)
    for component, count in Counter((c.kind, c.name) for c in components).items():
        if count > 1:
            raise PluginError(f"it offers the {component[0]} {component[1]!r} twice")
    return components


def _kernels(answers: list[Any]) -> tuple[Kernel, ...]:
    kernels: tuple[Kernel, ...] = _all_of(Kernel, "ldmkit_kernels", answers)
    for kernel, count in Counter((k.op, k.backend) for k in kernels).items():
        if count > 1:
            raise PluginError(f"it offers the backend {kernel[1]!r} of {kernel[0]} twice")
    return kernels


def _extensions(manager: pluggy.PluginManager) -> tuple[Extension, ...]:
    found: list[Extension] = []
    for hook, cls in EXTENSIONS.items():
        found += _all_of(cls, hook, getattr(manager.hook, hook)())
    for (kind, name), count in Counter((e.kind, e.name) for e in found).items():
        if count > 1:
            raise PluginError(f"it offers the {kind} {name!r} twice")
    return tuple(found)


def _all_of(kind: type[Any], hook: str, answers: list[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    for answer in answers:
        if not isinstance(answer, Iterable) or isinstance(answer, str | bytes):
            raise PluginError(f"{hook} must return an iterable of {kind.__name__}, not {answer!r}")
        found.extend(answer)
    for item in found:
        if not isinstance(item, kind):
            raise PluginError(f"{hook} must return {kind.__name__} objects only, and one is {item!r}")
    return tuple(found)
