"""`ldmkit samplers`: the installed samplers, their orders, costs and sources."""

from __future__ import annotations

import argparse
import dataclasses
import json

from ldmkit.commands.table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the family. Loads every sampler's class."""
    from ldmkit.plugin.registry import registry

    parts = registry()
    facts = {name: parts.load("sampler", name).facts for name in parts.available("sampler")}
    if args.json:
        print(json.dumps({name: known and dataclasses.asdict(known) for name, known in facts.items()}, indent=2))
        return 0
    rows: list[tuple[str, ...]] = []
    for name, known in facts.items():
        if known is None:
            rows.append((name, "?", "?", "?", "says nothing of itself"))
        else:
            order = "-" if known.order is None else str(known.order)
            evaluations = f"{known.evaluations} {'an attempt' if known.adaptive else 'a step'}"
            rows.append((name, order, evaluations, "yes" if known.stochastic else "-", known.source))
    print(table(("sampler", "order", "evaluations", "noise", "source"), rows))
    return 0
