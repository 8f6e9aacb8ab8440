"""`ldmkit kernels`: which implementations of each kernel this machine has, which is chosen, and why not the others."""

from __future__ import annotations

import argparse
import json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    from ldmkit.kernels import report  # loads torch

    print(json.dumps(report.describe(), indent=2) if args.json else report.table())
    return 0
