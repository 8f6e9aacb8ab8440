"""`ldmkit plugin new`: what it writes is complete, clean, installs, passes its own tests and is used by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ldmkit
from ldmkit.cli import main
from ldmkit.commands.new_plugin import write_plugin
from ldmkit.commands.plugin import KINDS
from ldmkit.errors import InputError, OutputError

NAME = "ldmkit-a-strangers-own"
IN_CI = ("sampler", "conditioner")


def run(site: Path | str, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "MYPYPATH": ""}
    return subprocess.run([sys.executable, *command], cwd=cwd, env=env, check=False, capture_output=True, text=True)


def install(source: Path, site: Path) -> None:
    pip = ["-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([sys.executable, *pip, "--target", str(site), str(source)], check=True, capture_output=True, text=True)


def works(kind: str, folder: Path) -> Path:
    """Installed, listed, and tested by its own tests. Returns where it is installed."""
    source, site = write_plugin(NAME, kind, into=folder), folder / "site"
    install(source, site)
    listed = run(site, "-m", "ldmkit.cli", "plugins", "--json", cwd=folder)
    (ours,) = [plugin for plugin in json.loads(listed.stdout)["plugins"] if plugin["distribution"] == NAME]
    assert ours["state"] == "ok", ours["traceback"]
    tests = run(site, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(source / "tests"), cwd=source)
    assert tests.returncode == 0, tests.stdout + tests.stderr
    return site


@pytest.mark.parametrize("kind", IN_CI)
def test_a_new_plugin_works_as_it_is(kind, tmp_path):
    works(kind, tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in IN_CI])
def test_every_kind_of_new_plugin_works(kind, tmp_path):
    site = works(kind, tmp_path)
    checked = run(site, "-m", "ldmkit.cli", "plugin", "check", NAME, "--json", "--examples", "1", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert json.loads(checked.stdout)["passed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["z", "ldmkit-2x", "ldmkit-a-name-as-long-as-names-may-be-xx"])
def test_what_is_written_is_clean(kind, name, tmp_path):
    source = write_plugin(name, kind, into=tmp_path)
    for command in (("check", "."), ("format", "--check", ".")):
        done = run(source, "-m", "ruff", *command, "--no-cache", cwd=source)
        assert done.returncode == 0, done.stdout + done.stderr
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    package = name.replace("-", "_")
    assert files >= {"pyproject.toml", "README.md", "LICENSE", "ci.sh", f"src/{package}/py.typed", f"tests/test_{kind}.py"}
    assert not [name for name in files if "__pycache__" in name]
    text = "".join(path.read_text() for path in source.rglob("*") if path.suffix in (".py", ".toml", ".md", ".sh"))
    assert "${" not in text.replace("${PYTHON:-python3}", "")
    assert os.access(source / "ci.sh", os.X_OK)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_types(kind, tmp_path):
    source = write_plugin(NAME, kind, into=tmp_path)
    found_by_mypy = Path(ldmkit.__file__).parents[1]  # it does not ask an editable install's finder
    done = run(f"{source / 'src'}{os.pathsep}{found_by_mypy}", "-m", "mypy", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["", "Mine", "1st", "a--b", "-a", "a_b", "a.b", "../a", "ldmkit", "json", "torch", "class", "é", "a" * 41]
)
def test_impossible_names(name, tmp_path):
    with pytest.raises(InputError, match="plugin name"):
        write_plugin(name, "sampler", into=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "kind"), [("ldmkit-euler", "sampler"), ("unet", "denoiser"), ("ldmkit-triton", "kernel")])
def test_names_that_are_taken(name, kind, tmp_path):
    if name == "unet":
        assert write_plugin(name, "sampler", into=tmp_path).is_dir()
    with pytest.raises(InputError, match="already; choose another name"):
        write_plugin(name, kind, into=tmp_path / "more")


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "kept").write_text("mine")
    with pytest.raises(OutputError, match="exists; nothing is overwritten"):
        write_plugin(NAME, "sampler", into=tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == [NAME, "kept"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(package):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldmkit.commands.new_plugin._make_weights", fail)
    with pytest.raises(OutputError, match="No space left"):
        write_plugin(NAME, "pipeline", into=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    assert main(["plugin", "new", NAME, "--kind", "sampler", "--into", str(tmp_path)]) == 0
    assert "pip install --editable" in capsys.readouterr().out
    assert main(["plugin", "new", NAME, "--kind", "sampler", "--into", str(tmp_path)]) == 2
    assert "nothing is overwritten" in capsys.readouterr().err


def test_a_source_folder_is_checked_where_it_lies(tmp_path, capfd):
    source = write_plugin(NAME, "sampler", into=tmp_path)
    assert main(["plugin", "check", str(source), "--examples", "1"]) == 0
    assert "declared order" in capfd.readouterr().out
    part = source / "src" / NAME.replace("-", "_") / "sampler.py"
    part.write_text(part.read_text().replace("order=1,", "order=2,"))
    assert main(["plugin", "check", str(source), "--examples", "1"]) == 1
    told = capfd.readouterr().out
    assert "declared 2, measured 1.0" in told
    assert "written in: ldmkit.SamplerFacts" in told


def test_what_cannot_be_checked(tmp_path, capsys):
    assert main(["plugin", "check", "nobodys-plugin"]) == 2
    assert "no plugin or distribution is called 'nobodys-plugin'" in capsys.readouterr().err
    assert main(["plugin", "check", str(tmp_path)]) == 2
    assert "holds no plugin" in capsys.readouterr().err
    assert main(["plugin", "check", "unet:vnet"]) == 2
    assert "unet has no part or kernel backend 'vnet'; it has unet" in capsys.readouterr().err
    assert main(["plugin", "check", "unet", "--examples", "0"]) == 2
    assert "--examples 0: at least one case is drawn" in capsys.readouterr().err


def test_what_there_is_no_suite_for_is_told(root, capfd):
    assert main(["plugin", "check", str(root / "tests" / "example_plugins" / "extras")]) == 2
    told = "ldmkit-example-extras: there is a suite for nothing in it (it offers the task 'variations', the checkpoint-format"
    err = capfd.readouterr().err
    assert told in err
    assert "which can be loaded: its own tests hold them" in err


def test_a_plugin_of_the_gallery_passes_by_its_own_examples(root, capfd):
    assert main(["plugin", "check", str(root / "tests" / "example_plugins" / "bytes"), "--examples", "1", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert told["versions"] == {"ldmkit-example-bytes": "0.1.0", "ldmkit": ldmkit.__version__}
    (report,) = told["reports"]
    assert report["name"] == "ldmkit-example-bytes:example-bytes"
    assert [row["name"] for row in report["rows"] if row["verdict"] != "passed"] == ["each picture's own sizes"]
