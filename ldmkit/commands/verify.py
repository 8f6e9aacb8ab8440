"""`ldmkit verify OP`: checks kernels on this machine against the contract's properties, and says what held and how exactly."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence

from ldmkit.errors import MissingDependencyError

ALL = "all"
EMULATED = "cuda-emulated"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("op", help=f"the op to verify, as `ldmkit kernels` names it, or {ALL!r}")
    parser.add_argument(
        "--backend",
        help=f"one implementation (a plugin's too); without, all that run here but {EMULATED!r}, which a checkout has",
    )
    parser.add_argument("--profile", choices=("ci", "thorough"), default="ci", help="seconds (default) or minutes a kernel")
    parser.add_argument("--only", type=int, action="append", metavar="LINE", help="only this line of the contract (repeatable)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Print a table for each op and backend. The exit code is 1 where a property failed."""
    if importlib.util.find_spec("hypothesis") is None:
        raise MissingDependencyError("`ldmkit verify` draws its cases with hypothesis; `pip install hypothesis`")
    interpret_without_gpu()
    from ldmkit.testing import contract

    ops = tuple(contract.OPS) if args.op == ALL else (args.op,)
    reports = []
    for op in ops:
        for backend in backends_of(op) if args.backend is None else (args.backend,):
            report = contract.check(op, backend=backend, profile=args.profile, only=args.only, progress=_progress(op, backend))
            reports.append(report)
            if not args.json:
                print(report.table(), end="\n\n", flush=True)
    passed = all(report.passed for report in reports)
    if args.json:
        print(json.dumps({"passed": passed, "reports": [report.as_dict() for report in reports]}, indent=2))
    return 0 if passed else 1


def interpret_without_gpu() -> None:
    """Has Triton interpret its kernels where there is no GPU; that is decided before Triton is imported."""
    import torch

    if not torch.cuda.is_available() and "triton" not in sys.modules:
        os.environ.setdefault("TRITON_INTERPRET", "1")


def backends_of(op: str) -> Sequence[str]:
    """Those that run here, the reference first.

    Raises:
        InputError: an unknown op.
    """
    from ldmkit.kernels import backends
    from ldmkit.testing import contract

    contract.properties(op)
    backends.names()  # finds those of plugins
    return ("reference", *(name for name, found in backends.implementations(op).items() if found.missing is None))


def _progress(op: str, backend: str) -> Callable[[str], None] | None:
    """Tells a terminal which property is being tried; "" takes the line away."""

    def tell(name: str) -> None:
        print("\r\033[K" + (f"{op}, {backend}: {name}" if name else ""), end="", file=sys.stderr, flush=True)

    return tell if sys.stderr.isatty() else None
