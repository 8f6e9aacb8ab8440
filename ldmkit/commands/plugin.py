"""`ldmkit plugin new` writes a plugin to begin from; `ldmkit plugin check` holds one to all that the interfaces promise."""

from __future__ import annotations

import argparse
from pathlib import Path

KINDS = ("sampler", "autoencoder", "denoiser", "conditioner", "kernel", "pipeline")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's two actions, and their options."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", title="actions", required=True)
    new = actions.add_parser("new", help="write a complete small plugin, with tests, to begin from")
    new.add_argument("name", metavar="NAME", help="of the distribution: lower-case words joined with hyphens, like ldmkit-mine")
    new.add_argument("--kind", required=True, choices=KINDS, help="what it offers")
    new.add_argument(
        "--into", type=Path, default=Path(), metavar="FOLDER", help="where the folder NAME is made (default: here)"
    )
    check = actions.add_parser("check", help="try every promise of the interfaces on a plugin's parts")
    whole = "an installed distribution, dist:name for one of its parts, or the folder of a plugin's source"
    check.add_argument("what", metavar="DIST|PATH", help=whole)
    check.add_argument("--examples", type=int, default=5, metavar="N", help="cases drawn for each property (default 5)")
    check.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Do what was asked. The exit code of a check is 1 where a property does not hold."""
    if args.action == "new":
        from ldmkit.commands.new_plugin import write_plugin

        folder = write_plugin(args.name, args.kind, into=args.into)
        print(f"{folder} is written; in it: `pip install --editable '.[test]'`, then `pytest`, then `ldmkit plugins`")
        return 0
    from ldmkit.commands.check_plugin import check

    return check(args.what, examples=args.examples, as_json=args.json)
