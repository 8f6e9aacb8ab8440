"""The command line's own behaviour: what it prints, where, and its exit codes."""

import json
import os
import re
import subprocess
import sys
from types import ModuleType

import pytest

from ldmkit import __version__
from ldmkit.cli import COMMANDS, main
from ldmkit.errors import InputError


@pytest.fixture
def command(monkeypatch):
    """Replace a subcommand's module by one that does what a test wants."""

    def replace(run) -> None:
        module = ModuleType("ldmkit.commands.generate")
        module.add_arguments, module.run = lambda parser: parser.add_argument("words", nargs="*"), run
        monkeypatch.setitem(sys.modules, "ldmkit.commands.generate", module)

    return replace


def left(argv: list[str]) -> object:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    return caught.value.code


def test_help_documents_commands_exit_codes_and_environment(capsys):
    assert left(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert all(word in text for word in ("exit codes", "130", "LDMKIT_DISABLE_PLUGINS", "LDMKIT_PLUGINS", "LDMKIT_DEBUG"))


def test_version(capsys):
    assert left(["--version"]) == 0
    assert capsys.readouterr().out == f"ldmkit {__version__}\n"


@pytest.mark.parametrize(("argv", "told"), [([], "give a command: generate, train"), (["draw"], "invalid choice: 'draw'")])
def test_wrong_usage_exits_with_2(argv, told, capsys):
    assert left(argv) == 2
    assert told in capsys.readouterr().err


def test_every_command_has_its_module(capsys):
    for name in COMMANDS:
        assert left([name, "--help"]) == 0
        assert f"usage: ldmkit {name}" in capsys.readouterr().out


def test_the_commands_code_is_passed_on(command):
    command(lambda args: len(args.words))
    assert main(["generate", "one", "two", "three"]) == 3


def test_a_named_error_is_one_line_and_exit_2(command, capsys, monkeypatch):
    def run(args):
        raise InputError("strength = 2: must be in [0, 1]")

    command(run)
    monkeypatch.delenv("LDMKIT_DEBUG", raising=False)
    assert main(["generate"]) == 2
    assert capsys.readouterr() == ("", "error: strength = 2: must be in [0, 1]\n")
    monkeypatch.setenv("LDMKIT_DEBUG", "1")
    with pytest.raises(InputError, match="strength = 2"):
        main(["generate"])


def test_a_bug_keeps_its_traceback(command):
    command(lambda args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["generate"])


def test_ctrl_c_exits_with_130(command, capsys):
    def run(args):
        raise KeyboardInterrupt

    command(run)
    assert main(["generate"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_goes_away_leaves_no_traceback():
    code = "from ldmkit.cli import main; import sys; sys.exit(main(['plugins']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_plugins_as_table_and_json(capsys):
    assert main(["plugins", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    keys = {
        "distribution",
        "version",
        "entry_point",
        "module",
        "state",
        "error",
        "traceback",
        "components",
        "kernels",
        "extensions",
    }
    assert all(set(plugin) == keys for plugin in listed["plugins"])
    assert listed["clashes"] == []
    assert main(["plugins"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["DISTRIBUTION", "VERSION", "PLUGIN", "STATE", "KIND", "NAME", "SUMMARY"]
    for plugin in listed["plugins"]:
        assert any(
            line.split()[:4] == [plugin["distribution"], plugin["version"], plugin["entry_point"], plugin["state"]]
            for line in lines
        )
        for part in plugin["components"]:
            assert any(part["kind"] in line and f" {part['name']} " in line and part["summary"] in line for line in lines)


def test_plugins_shows_failures_blocks_and_clashes(capsys, monkeypatch, tmp_path):
    hook = (
        "from ldmkit.plugin.spec import Component, hookimpl\n"
        "@hookimpl\ndef ldmkit_components(): return [Component(kind='sampler', name='x', target='a:B')]"
    )
    for name, source in {"broken": "raise RuntimeError('no luck')", "one": hook, "two": hook, "off": hook}.items():
        (tmp_path / f"cli_{name}.py").write_text(source)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[ldmkit]\n{name} = cli_{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("LDMKIT_DISABLE_PLUGINS", "off,offf")
    assert main(["plugins"]) == 0
    out, err = capsys.readouterr()
    assert "warning: LDMKIT_DISABLE_PLUGINS names 'offf'" in err
    assert "clash: the sampler 'x' is offered by one 1.0 (entry point 'one') and by two 1.0 (entry point 'two')" in out
    assert "broken 1.0 (entry point 'broken') failed:\nTraceback" in out
    assert 'cli_broken.py", line 1' in out
    assert any(
        line.split() == ["off", "1.0", "off", "blocked", "named", "in", "LDMKIT_DISABLE_PLUGINS"] for line in out.splitlines()
    )


def test_samplers_as_table_and_json(capsys):
    assert main(["samplers"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^heun +2 +2 a step +- +Karras et al\. 2022", shown, flags=re.M)
    assert re.search(r"^ddpm +- +1 a step +yes +Ho et al\. 2020", shown, flags=re.M)
    assert re.search(r"^dpm-adaptive +3 +3 an attempt +- +Lu et al\. 2022", shown, flags=re.M)
    assert main(["samplers", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    told = {"order": 4, "evaluations": 1, "stochastic": False, "source": "k-diffusion"}
    can = dict.fromkeys(("from_noise", "image_to_image", "inpainting", "resume", "stages"), True)
    assert facts["lms"] == told | can | {"adaptive": False}


def test_schema(capsys):
    assert main(["schema", "sampler", "ddim"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["eta"]["type"] == "number"


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["sampler", "eulr"], "did you mean 'euler'"),
        (["smapler", "ddim"], "did you mean 'sampler'?"),
        (["pipeline", "emoji"], "a pipeline has no config of its own"),
    ],
)
def test_schema_of_what_is_not_there(argv, told, capsys):
    assert main(["schema", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert told in err


def test_kernels_as_table_and_json(capsys):
    assert main(["kernels", "--json"]) == 0
    json.loads(capsys.readouterr().out)
    assert main(["kernels"]) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in ("group_norm_silu", "cross_attention", "geglu"))
