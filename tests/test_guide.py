"""docs/plugins.md: each command and snippet runs, its list of hooks is whole, what it says is public is recorded."""

import ast
import difflib
import inspect
import re
from importlib import metadata

import pytest

from ldmkit.errors import PluginError
from ldmkit.plugin import manager, spec
from tests import guide, public_api

STEPS, HOOKS, WRONG, PROMISE = (
    "From nothing to a published package",
    "Hooks",
    "When something is wrong",
    "What you can rely on",
)


def followed(told):
    """What the guide promises of its own example."""
    assert "checked, and not uploaded: ldmkit_ralston-0.1.0-py3-none-any.whl" in told
    assert re.search(r"declared order +\d+ +passed", told)
    assert re.search(r"^\d+ passed$", told, flags=re.M)


def test_the_guide_leads_from_nothing_to_a_wheel(tmp_path):
    followed(guide.follow(tmp_path, STEPS, WRONG, slow=False))
    made = {path.name for path in (tmp_path / "work" / "ldmkit-ralston").iterdir()}
    assert {"dist", "drawn", "saved"} <= made
    described = set(re.findall(r"^\| `([\w./]+)` \|", guide.section(STEPS), flags=re.M))
    assert [name for name in described if not (tmp_path / "work" / "ldmkit-ralston" / name).is_file()] == []


@pytest.mark.exhaustive
def test_the_guide_with_its_slow_commands(tmp_path):
    followed(guide.follow(tmp_path, STEPS, slow=True))


def test_every_block_is_run():
    assert re.findall(r"^```.+$", guide.section(PROMISE), flags=re.M) == []
    fences = sum(len(re.findall(r"^```.+$", guide.section(title), flags=re.M)) for title in (STEPS, HOOKS, WRONG))
    assert 2 * fences == guide.PAGE.read_text().count("```")
    assert fences == sum(len(list(guide.blocks(guide.section(title)))) for title in (STEPS, HOOKS, WRONG))


def test_every_hook_is_listed_with_its_exact_signature():
    listed = re.findall(r"^\| `(ldmkit_[^`]+)` \|", guide.section(HOOKS), flags=re.M)
    exact = {f"{name}{inspect.signature(getattr(spec, name))}".replace("'", "") for name in manager.hook_names()}
    assert sorted(listed) == sorted(exact)


def test_what_targets_must_be_is_what_the_specification_says():
    said = " ".join(" ".join(getattr(spec, name).__doc__ for name in manager.hook_names()).split())
    rows = [row for row in guide.section(HOOKS).splitlines() if row.startswith("| `ldmkit_")]
    signatures = [
        phrase.replace(r"\|", "|")
        for row in rows
        for phrase in re.findall(r"`([^`]*\(.*?\) -> [^`]+)`", row.split("` |", 1)[1])
    ]
    assert len(signatures) == 6
    assert [signature for signature in signatures if f"`{signature}`" not in said] == []


def test_the_example_of_every_hook_is_a_plugin(tmp_path, monkeypatch):
    ((_, _, code),) = guide.blocks(guide.section(HOOKS))
    assert sorted(re.findall(r"@hookimpl\ndef (\w+)\(\)", code)) == sorted(manager.hook_names())
    (tmp_path / "guide_hooks.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    (plugin,) = manager.discover([metadata.EntryPoint("guide", "guide_hooks", manager.GROUP)])
    assert plugin.state == "ok", plugin.traceback
    assert plugin.api == ">=1.0,<2"
    assert [example.name for example in plugin.hooks.ldmkit_examples()[0]] == [plugin.components[0].name]
    assert len(plugin.kernels) == 1
    assert {extension.kind for extension in plugin.extensions} == set(spec.EXTENSION_KINDS)


@pytest.mark.parametrize(("declared", "served"), [("", True), (">=1.0,<2", True), (">=1.1,<2", False), (">=2,<3", False)])
def test_the_api_range(declared, served, monkeypatch):
    """As the guide says: it must hold ldmkit's own version, whose minor versions only add."""
    monkeypatch.setattr(manager, "API_VERSION", (1, 0))
    if served:
        manager._check_api(declared)
    else:
        with pytest.raises(PluginError, match=r"this ldmkit has 1\.0; upgrade it, or ldmkit"):
            manager._check_api(declared)


def test_the_guide_names_what_is_public():
    section = guide.section(PROMISE).split("**The API range.**")[0]
    assert set(re.findall(r"`(ldmkit[\w.]*)`", section)) == set(public_api.MODULES)


def test_the_public_api_is_as_recorded():
    recorded, found = public_api.RECORD.read_text(encoding="utf-8").splitlines(), public_api.lines()
    changes = [line for line in difflib.ndiff(recorded, found) if line[0] in "+-"]
    assert not changes, (
        "the public API differs from tests/public_api.txt. What is gone or changed breaks plugins: deprecate it first "
        "(docs/plugins.md, 'What you can rely on'). Where the change is meant, `python -m tests.public_api` records it:\n"
        + "\n".join(changes)
    )


def test_the_record_knows_what_is_there():
    """Names, signatures, inherited members, properties and their setters, re-exports: one of each."""
    lines = public_api.lines()
    assert lines == sorted(set(lines))
    assert "ldmkit.build: (kind: str, name: str, /, **config: Any) -> Any" in lines
    assert "ldmkit.Sampler.build: @classmethod (cls, **values: Any) -> Self" in lines
    assert "ldmkit.Level.ratio: @property (self) -> float" in lines
    assert "ldmkit.Pipeline.sampler.setter: @sampler.setter (self, value: PartLike) -> None" in lines
    assert "ldmkit.kernels.geglu: (x: Tensor, *, backend: str | None=None) -> Tensor" in lines
    starts = {line.split(":")[0].split(" =")[0] for line in lines}
    for module in public_api.MODULES:
        assert [name for name in public_api.public(module) if f"{module}.{name}" not in starts] == []
    assert [name for name in manager.hook_names() if f"ldmkit.plugin.spec.{name}" not in starts] == []


def test_what_the_gallery_and_new_plugins_import_is_public(root):
    """A plugin needs nothing that is not promised."""
    homes = {f"{home}.{name}" for home, name in map(_home, {*_names(public_api.MODULES), *public_api.NAMES})}
    sources = [*root.glob("tests/example_plugins/*/src/*/*.py"), *root.glob("ldmkit/templates/plugin/*/*.py.tmpl")]
    imported = {
        f"{module}.{name.strip()}"
        for source in sources
        for module, names in re.findall(r"^from (ldmkit(?:\.[\w.]+)?) import ([^#\n]+)", source.read_text(), flags=re.M)
        for name in names.split(",")
    }
    assert imported
    assert [name for name in sorted(imported) if ".".join(_home(name)) not in homes | set(public_api.MODULES)] == []


def _names(modules):
    return {f"{module}.{name}" for module in modules for name in public_api.public(module)}


def _home(name):
    """Where a name is defined: its module, and the name there."""
    if public_api.source(name):
        return tuple(name.rsplit(".", 1))
    module, node = public_api.resolved(*name.rsplit(".", 1))
    return tuple(module.rsplit(".", 1)) if isinstance(node, ast.Pass) else (module, name.rsplit(".", 1)[1])
