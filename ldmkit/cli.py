"""The command `ldmkit`. Only the module of the subcommand that was asked for is imported."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from ldmkit import __version__
from ldmkit.errors import LdmkitError

COMMANDS = {
    "generate": "draw pictures from text",
    "train": "train an autoencoder or a diffusion model from a recipe",
    "plugins": "list the installed plugins, their parts, and what is wrong with those that failed",
    "plugin": "write a new plugin, or check one: `plugin new NAME --kind KIND`, `plugin check DIST|PATH`",
    "samplers": "list the samplers: order of convergence, evaluations a step, noise, source",
    "inspect": "say what a weights file or a model's folder is, without loading it",
    "schema": "print the JSON schema of a part's config",
    "kernels": "show which kernels this machine has and which are chosen",
    "verify": "check kernels on this machine against the contract: exact, deterministic, safe",
}
"""Name and summary of each subcommand; its module is `ldmkit.commands.<name>`."""

EPILOG = """\
exit codes:
  0    done
  1    an unexpected failure (with its traceback); from verify and plugin check: a property does not hold
  2    wrong usage or input: one line says what, and the way out
  130  interrupted

environment:
  LDMKIT_DISABLE_PLUGINS  plugins or distributions to leave out, separated by commas
  LDMKIT_PLUGINS          if not empty: the only ones to use
  LDMKIT_SLOW_PLUGIN      seconds after which a plugin that is still loading is named (default 10)
  LDMKIT_DEBUG            if 1: errors come with their traceback
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own arguments). Returns the exit code."""
    try:
        with _plain_warnings():
            code = _run(sys.argv[1:] if argv is None else list(argv))
            sys.stdout.flush()
        return code
    except LdmkitError as error:
        if os.environ.get("LDMKIT_DEBUG") == "1":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(argv: list[str]) -> int:
    parser, commands = _parsers()
    name = next((word for word in argv if not word.startswith("-")), None)
    if name not in commands:
        parser.parse_args(argv)  # leaves, for --help, --version and unknown commands
        parser.error(f"give a command: {', '.join(commands)}")
    module = import_module(f"ldmkit.commands.{name}")
    module.add_arguments(commands[name])
    code: int = module.run(parser.parse_args(argv))
    return code


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(
        prog="ldmkit",
        description="Latent diffusion from parts that anyone can write.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"ldmkit {__version__}")
    added = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    commands = {}
    for name, summary in COMMANDS.items():
        commands[name] = added.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    return parser, commands


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """ldmkit's own warnings are one line to the user, without a place in our source."""
    with warnings.catch_warnings():
        default = warnings.showwarning

        def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
            if category.__module__.startswith("ldmkit"):
                print(f"warning: {message}", file=sys.stderr)
            else:
                default(message, category, *place, **more)

        warnings.showwarning = show
        yield


if __name__ == "__main__":
    sys.exit(main())
