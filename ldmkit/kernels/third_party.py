"""Kernels that plugins offer through the hook `ldmkit_kernels`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ldmkit.kernels.backends import Implementation, implementations, register
from ldmkit.plugin.manager import Plugin
from ldmkit.plugin.manager import discover as discover_plugins
from ldmkit.plugin.spec import Kernel


@functools.cache
def discover() -> None:
    """Registers every plugin's kernels, once. A clash, or a module that cannot be imported, makes a backend that says so when
    it is asked for.
    """
    providers: dict[tuple[str, str], Plugin] = {}
    for plugin in discover_plugins():
        for kernel in plugin.kernels:
            key = (kernel.op, kernel.backend)
            if key in providers:
                missing = f"two plugins offer it, {providers[key]} and {plugin}; block one with LDMKIT_DISABLE_PLUGINS"
                register(*key, Implementation(forward=None, backward=None, device=kernel.device, missing=missing))
            elif kernel.backend not in implementations(kernel.op):
                providers[key] = plugin
                register(*key, implementation(kernel, plugin))


def implementation(kernel: Kernel, plugin: Plugin) -> Implementation:
    """A plugin's kernel; its target is imported now."""
    dtypes = tuple(getattr(torch, name) for name in kernel.dtypes)
    module, _, attribute = kernel.target.partition(":")
    try:
        target = getattr(import_module(module), attribute)
        missing = target.missing() if hasattr(target, "missing") else None
        forward, backward = target.forward, target.backward
        refusal: Callable[..., Any] | None = getattr(target, "refusal", None)
    except (Exception, SystemExit) as error:  # a stranger's code
        missing = f"{kernel.target} of plugin {plugin} failed: {type(error).__name__}: {error}"
        forward, backward, refusal = None, None, None
    return Implementation(
        forward=forward, backward=backward, device=kernel.device, dtypes=dtypes, missing=missing, refusal=refusal
    )
