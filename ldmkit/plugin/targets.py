"""Targets: what a line of the table names, imported on first use and held to what its kind demands."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from ldmkit.errors import LdmkitError, PluginError
from ldmkit.plugin import requirements
from ldmkit.plugin.manager import Plugin, Row
from ldmkit.plugin.places import place
from ldmkit.plugin.spec import EXTENSION_KINDS

INTERFACES = {
    "autoencoder": "Autoencoder",
    "denoiser": "Denoiser",
    "conditioner": "Conditioner",
    "sampler": "Sampler",
}
"""The class in `ldmkit.interfaces` that a part of each kind must derive from."""
CALLED_AS_THEY_ARE = {"task": ("__call__",), "checkpoint-format": ("detect", "load")}
"""Functions that targets of these kinds must have. The other kinds of extensions are classes, built from a config."""
CALLED_WHEN_BUILT = {"training-loss": "__call__", "data-source": "open", "guidance-method": "__call__"}
"""The function that instances of these kinds must have."""


def load_target(plugin: Plugin, row: Row) -> Any:
    """Import what a plugin's line names.

    Raises:
        PluginError: it cannot be imported (with what to install, where that is the way out), or is not what its kind demands.
    """
    target = _imported(plugin, row)
    _check_target(plugin, row, target)
    return target


def _imported(plugin: Plugin, component: Row) -> Any:
    module, _, attribute = component.target.partition(":")
    what = f"the {component.kind} {component.name!r} of {plugin}"
    try:
        value = import_module(module)
        for word in attribute.split("."):
            value = getattr(value, word)
    except LdmkitError:
        raise  # already says what is wrong and the way out
    except ImportError as error:
        own = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.partition(".")[0]
        hint = f"its target {component.target!r} is wrong, or its install incomplete" if own else ""
        hint = hint or requirements.hint(error, plugin.distribution)
        raise PluginError(f"{what} cannot be imported: {error}" + (f"; {hint}" if hint else "")) from error
    except (Exception, SystemExit) as error:
        told, where = f"{type(error).__name__}: {error}", place(error)
        told = f"{told}; raised at {where}" if where else told
        raise PluginError(f"{what} cannot be imported from {component.target!r}: {told}") from error
    return value


def _check_target(plugin: Plugin, component: Row, target: Any) -> None:
    what = f"the {component.kind} {component.name!r} of {plugin}: its target {component.target!r}"
    if component.kind == "pipeline":
        if not callable(target):
            raise PluginError(f"{what} must be a function that returns a folder, and is {target!r}")
        return
    config = import_module("ldmkit.config").Config
    if component.kind in EXTENSION_KINDS:
        _check_extension(what, component.kind, target)
        return
    interface = getattr(import_module("ldmkit.interfaces"), INTERFACES[component.kind])
    if not (isinstance(target, type) and issubclass(target, interface)):
        raise PluginError(f"{what} must be a class derived from ldmkit.{interface.__name__}, and is {target!r}")
    if inspect.isabstract(target):
        missing = sorted(target.__abstractmethods__)  # type: ignore[attr-defined]
        raise PluginError(f"{what} leaves abstract: {', '.join(missing)}")
    own = getattr(target, "Config", None)
    if not (isinstance(own, type) and issubclass(own, config)):
        raise PluginError(f"{what} needs a nested `class Config(ldmkit.Config)`, and has {own!r}")


def _check_extension(what: str, kind: str, target: Any) -> None:
    if kind in CALLED_AS_THEY_ARE:
        missing = [name for name in CALLED_AS_THEY_ARE[kind] if not callable(getattr(target, name, None))]
        if missing:
            raise PluginError(f"{what} lacks {' and '.join(missing)}, which a {kind} must have")
        return
    function, own = CALLED_WHEN_BUILT[kind], getattr(target, "Config", None)
    called = isinstance(target, type) and any(function in vars(base) for base in target.__mro__)
    if not (called and isinstance(own, type) and issubclass(own, import_module("ldmkit.config").Config)):
        raise PluginError(f"{what} must be a class with {function} and a nested class Config(ldmkit.Config), and is {target!r}")
