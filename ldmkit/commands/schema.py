"""`ldmkit schema KIND NAME`: the JSON schema of a part's config."""

from __future__ import annotations

import argparse
import json

from ldmkit.errors import InputError
from ldmkit.plugin.registry import INTERFACES, part_class


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("kind", metavar="KIND", help=", ".join(INTERFACES))
    parser.add_argument("name", metavar="NAME", help="as `ldmkit plugins` lists it, or DISTRIBUTION:NAME")


def run(args: argparse.Namespace) -> int:
    """Print the schema. Raises: UnknownPartError, PartClashError, PluginError, InputError for kind "pipeline"."""
    if args.kind == "pipeline":
        raise InputError(f"a pipeline has no config of its own; its parts have: {', '.join(INTERFACES)}")
    print(json.dumps(part_class(args.kind, args.name).Config.model_json_schema(), indent=2))
    return 0
