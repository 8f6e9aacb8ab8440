"""Fake distributions: real metadata on a path of their own, found the way installed ones are."""

import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from importlib import invalidate_caches, metadata
from pathlib import Path

import pytest

from ldmkit.plugin.manager import Plugin, discover
from ldmkit.plugin.registry import Registry


class Site:
    """A folder on sys.path, to install fake distributions into."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, distribution: str, source: str, *, module: str = "", version: str = "1.0", entry_point: str = "") -> str:
        """Write a distribution with one module and one entry point. Returns the module's name."""
        module = module or f"fake_{distribution.replace('-', '_')}"
        (self.folder / f"{module}.py").write_text(textwrap.dedent(source))
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        entry_points = info / "entry_points.txt"
        text = entry_points.read_text() if entry_points.exists() else "[ldmkit]\n"
        entry_points.write_text(f"{text}{entry_point or module} = {module}\n")
        invalidate_caches()
        return module

    def entry_points(self) -> Sequence[metadata.EntryPoint]:
        """Of the fake distributions only."""
        found = [d.entry_points.select(group="ldmkit") for d in metadata.distributions(path=[str(self.folder)])]
        return [entry_point for selected in found for entry_point in selected]

    def plugins(self) -> tuple[Plugin, ...]:
        return discover(self.entry_points())

    def plugin(self) -> Plugin:
        """The only plugin there is."""
        (plugin,) = self.plugins()
        return plugin

    def registry(self) -> Registry:
        return Registry(self.plugins())


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("LDMKIT_DISABLE_PLUGINS", raising=False)
    monkeypatch.delenv("LDMKIT_PLUGINS", raising=False)
    before = set(sys.modules)
    yield Site(tmp_path)
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]


SAMPLER = """
from ldmkit.plugin.spec import Component, hookimpl

@hookimpl
def ldmkit_components():
    return [Component(kind="sampler", name="{name}", target="{target}", summary="A fake.")]
"""


@pytest.fixture
def offering() -> Callable[..., str]:
    """Source of a plugin that offers one sampler."""

    def source(name: str, target: str = "nowhere:Nothing") -> str:
        return SAMPLER.format(name=name, target=target)

    return source
