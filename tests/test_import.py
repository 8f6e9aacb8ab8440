"""`import ldmkit` is light, and every public name is there."""

import ast
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import ldmkit

HEAVY = ("torch", "transformers", "triton", "diffusers", "numpy", "PIL", "pydantic", "pluggy")


def loaded_by(*args: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after running with these arguments."""
    script = "import atexit, json, runpy, sys\n"
    script += f"atexit.register(lambda: print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]), file=sys.stderr))\n"
    script += "sys.argv = sys.argv[1:]\n"
    script += "runpy.run_module('ldmkit.cli', run_name='__main__') if len(sys.argv) > 1 else __import__('ldmkit')\n"
    done = subprocess.run([sys.executable, "-c", script, "ldmkit", *args], check=True, capture_output=True, text=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_import_loads_nothing_heavy():
    assert loaded_by() == set()


@pytest.mark.parametrize("args", [["--help"], ["--version"]], ids=" ".join)
def test_the_command_line_alone_loads_nothing_heavy(args):
    assert loaded_by(*args) == set()


@pytest.mark.parametrize("command", ["generate", "train", "plugins", "schema", "kernels"])
def test_the_help_of_a_command_loads_no_torch(command):
    assert loaded_by(command, "--help") <= {"pydantic", "pluggy", "numpy"}


def test_listing_plugins_loads_no_torch():
    assert loaded_by("plugins") <= {"pluggy"}


@pytest.mark.parametrize("name", ldmkit.__all__)
def test_public_names_resolve(name):
    assert getattr(ldmkit, name) is getattr(ldmkit, name)
    assert name in dir(ldmkit)


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="module 'ldmkit' has no attribute 'Pipelin'"):
        _ = ldmkit.Pipelin


def test_type_checkers_and_the_table_see_the_same_names():
    tree = ast.parse(Path(ldmkit.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == ldmkit._HOME_OF


def test_one_version():
    assert ldmkit.__version__ == version("ldmkit")
