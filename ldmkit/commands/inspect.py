"""`ldmkit inspect PATH`: what a weights file or a folder is, from its headers and configs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ldmkit.checkpoints.accounting import grouped
from ldmkit.checkpoints.inspecting import Inspection, inspect
from ldmkit.commands.table import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("path", type=Path, help="a .safetensors or .ckpt file, or a folder in the diffusers or ldmkit layout")
    parser.add_argument("--allow-pickle", action="store_true", help="look into a .ckpt, by torch's unpickler for tensors alone")
    parser.add_argument("--variant", help="of a diffusers folder: 'fp16' looks at *.fp16.safetensors")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Print what was found."""
    found = inspect(args.path, allow_pickle=args.allow_pickle, variant=args.variant)
    print(json.dumps(asdict(found), indent=2) if args.json else _text(found))
    return 0


def _text(found: Inspection) -> str:
    lines = [f"{found.path}: {found.layout}", f"architecture  {found.architecture}", f"predicts      {found.prediction}", ""]
    rows = [(c.name, c.class_name, f"{c.keys:,}", f"{c.parameters:,}", " ".join(c.dtypes)) for c in found.components]
    lines.append(table(("component", "class", "keys", "parameters", "dtype"), rows))
    for reason in dict.fromkeys(found.ignored.values()):
        keys = [key for key, why in found.ignored.items() if why == reason]
        lines += ["", f"left out: {reason}", *(f"  {line}" for line in grouped(keys, listed=4))]
    lines += ["", "keys not understood: " + ("none" if not found.unknown else str(len(found.unknown)))]
    lines += [f"  {line}" for line in grouped(found.unknown, listed=20)]
    lines += [f"cannot be loaded as it is: {problem}" for problem in found.problems]
    return "\n".join(lines)
