"""What the documents say is so: examples run, links lead somewhere, commands and settings exist."""

import ast
import doctest
import importlib
import re
import tomllib
from pathlib import Path

import pytest

import ldmkit
from ldmkit.cli import COMMANDS, EPILOG

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "ldmkit").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")])
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "plugins").rglob("*.md"), *(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "docs").glob("*.md")]
)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced code blocks of a page in one of these languages."""
    return re.findall(rf"^```(?:{'|'.join(languages)})\n(.*?)^```", page.read_text(), flags=re.M | re.S)


@pytest.mark.parametrize("path", [p for p in SOURCES if ">>>" in p.read_text()], ids=relative)
def test_examples_in_docstrings_run(path):
    package = path.relative_to(ROOT / "plugins" if "plugins" in path.relative_to(ROOT).parts else ROOT)
    name = ".".join(package.with_suffix("").parts).removesuffix(".__init__")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_readme_runs(tmp_path, monkeypatch):
    """All Python blocks, in order and in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    snippets = blocks(ROOT / "README.md", "python")
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, snippet in enumerate(snippets, start=1):
        exec(compile(snippet, f"README.md, Python block {number}", "exec"), namespace)
    assert snippets


def test_the_readme_starts_with_the_two_commands_and_a_picture():
    start = (ROOT / "README.md").read_text().splitlines()[:40]
    assert any("make demo" in line for line in start)
    assert any("make test" in line for line in start)
    assert any(re.search(r"!\[.*\]\(.*\.png\)|<img ", line) for line in start)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_and_pictures_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)|<img [^>]*src=\"([^\"]+)\"", page.read_text())
    local = [
        target for pair in targets for target in pair if target and "://" not in target and not target.startswith("mailto:")
    ]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_that_pages_show_exist(page):
    shown = "\n".join(blocks(page, "bash", "sh", "shell", "console", ""))
    targets = set(re.findall(r"^(?:\$ )?make ([\w-]+)", shown, flags=re.M))
    assert targets <= set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"^(?:\$ )?ldmkit ([\w-]+)", shown, flags=re.M)) <= {*COMMANDS, "--help", "--version"}


def test_every_environment_variable_is_documented():
    texts = [p.read_text() for p in [*SOURCES, ROOT / "setup.py"]]
    used = {name for text in texts for name in re.findall(r"[\"'](LDMKIT_[A-Z_]+)[\"']", text)}
    documented = EPILOG + (ROOT / "README.md").read_text()
    assert used
    assert sorted(name for name in used if name not in documented) == []


def test_the_changelog_tells_of_this_version():
    assert re.search(rf"^## {re.escape(ldmkit.__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)


@pytest.mark.parametrize("name", [name for name in ldmkit.__all__ if isinstance(getattr(ldmkit, name, None), type)])
def test_public_classes_and_their_methods_are_documented(name):
    cls = getattr(ldmkit, name)
    methods = [key for key, value in vars(cls).items() if not key.startswith("_") and callable(value)]
    assert cls.__doc__
    assert [key for key in methods if not getattr(cls, key).__doc__] == []


def test_plugins_use_only_public_names_of_ldmkit():
    private = []
    for path in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and re.match(r"ldmkit(\.|$)", node.module or ""):
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                private += [
                    f"{relative(path)}: {node.module}" for name in names if name.startswith("_") and name != "__version__"
                ]
    assert private == []


def test_every_pin_fits_the_range_it_is_for():
    """constraints.txt pins every direct dependency, inside the range that pyproject.toml states."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"], *extras["train"], *extras["dev"]]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if "==" in line)
    assert [str(need) for need in map(Requirement, wanted) if pins.get(need.name.lower(), "0") not in need.specifier] == []
