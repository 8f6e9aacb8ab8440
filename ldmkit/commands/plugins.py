"""`ldmkit plugins`: what is installed, what it offers, and what is wrong with what failed."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from typing import Any

from ldmkit.commands.table import table
from ldmkit.commands.why import why
from ldmkit.plugin.manager import Plugin, discover
from ldmkit.plugin.registry import Registry


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print JSON instead of a table")
    what.add_argument("--why", metavar="NAME", help="say why a plugin, a distribution or a part is in use, or is not")


def run(args: argparse.Namespace) -> int:
    """Print every plugin with its parts, then clashes, then the tracebacks of those that failed.

    Raises: UnknownPartError, where --why names nothing that there is.
    """
    with redirect_stdout(sys.stderr):  # a plugin that prints when it is imported is kept out of our output
        registry = Registry(discover())
    if args.why is not None:
        print(why(registry, args.why))
        return 0
    if args.json:
        print(json.dumps({"plugins": [_plain(plugin) for plugin in registry.plugins], "clashes": registry.clashes()}, indent=2))
        return 0
    rows = [row for plugin in registry.plugins for row in _rows(plugin)]
    print(table(("distribution", "version", "plugin", "state", "kind", "name", "summary"), rows))
    for clash in registry.clashes():
        print(f"\nclash: {clash}")
    for shadowed in registry.shadowed():
        print(f"\nshadowed: {shadowed}")
    for plugin in registry.plugins:
        if plugin.state == "failed":
            print(f"\n{plugin} failed:\n{plugin.traceback.rstrip()}")
    return 0


def _plain(plugin: Plugin) -> dict[str, Any]:
    names = ("distribution", "version", "entry_point", "module", "state", "error", "traceback")
    return {name: getattr(plugin, name) for name in names} | {
        "components": [asdict(c) for c in plugin.components],
        "kernels": [asdict(kernel) for kernel in plugin.kernels],
        "extensions": [{"kind": e.kind, **asdict(e)} for e in plugin.extensions],
    }


def _rows(plugin: Plugin) -> list[tuple[str, ...]]:
    """One row per part; what they share is written once."""
    head = (plugin.distribution, plugin.version, plugin.entry_point, plugin.state)
    parts = [(c.kind, c.name, c.summary) for c in plugin.rows]
    parts += [("kernel", kernel.backend, f"{kernel.op}: {kernel.summary}".rstrip(": ")) for kernel in plugin.kernels]
    parts = parts or [("", "", plugin.error or "offers nothing")]
    return [(*(head if i == 0 else ("",) * len(head)), *part) for i, part in enumerate(parts)]
