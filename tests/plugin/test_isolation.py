"""Broken plugins, for real: wheels that pip installed, and the command line of a process that finds them."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugin.wheels import install, wheel

HEAD = "from ldmkit.plugin.spec import Component, Kernel, hookimpl\n"


def sampler(name: str, target: str = "nowhere:Nothing") -> str:
    return HEAD + f"@hookimpl\ndef ldmkit_components(): return [Component(kind='sampler', name='{name}', target='{target}')]\n"


def kernels(*backends: str) -> str:
    made = [f"Kernel(op='geglu', backend='{name}', target='fast:{name.upper()}', device='cpu')" for name in backends]
    return HEAD + f"@hookimpl\ndef ldmkit_kernels(): return [{', '.join(made)}]\n"


SOURCES = {
    "iso-sound": sampler("sound"),
    "iso-raises": "raise RuntimeError('no luck')",
    "iso-exits": "import sys; sys.exit('goodbye')",
    "iso-interrupts-hook": HEAD + "@hookimpl\ndef ldmkit_components(): raise SystemExit(0)",
    "iso-hangs": "import time\ntime.sleep(3600)",
    "iso-signature": HEAD + "@hookimpl\ndef ldmkit_components(config): return []",
    "iso-future": HEAD + "@hookimpl\ndef ldmkit_api(): return '>=2,<3'",
    "iso-lacks": "import a_package_nobody_has",
    "iso-lacks-untold": "import another_package_nobody_has",
    "iso-lacks-later": sampler("lazy", "iso_lacks_later_part:Lazy"),
    "iso-one": sampler("twins", "iso_one:One"),
    "iso-two": sampler("twins", "iso_two:Two"),
    "iso-shadows": sampler("euler", "iso_shadows:Euler"),
    "iso-prints": sampler("loud") + "print('hello from a plugin')",
    "iso-kernel": kernels("wide", "both"),
    "iso-kernel-too": kernels("both"),
    "iso-no-op": HEAD + "@hookimpl\ndef ldmkit_kernels(): return [Kernel(op='nop', backend='x', target='a:b', device='cpu')]",
}
REQUIRES = {"iso-lacks": ["a-package-nobody-has>=2", "pluggy"], "iso-lacks-later": ["pluggy>=99; python_version>'3'"]}
PARTS = {"iso-lacks-later": {"iso_lacks_later_part.py": "from pluggy import what_only_99_has"}}


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed all of them into; LDMKIT_PLUGINS picks who is heard."""
    wheels = tmp_path_factory.mktemp("wheels")
    made = [
        wheel(
            wheels,
            name,
            {f"{name.replace('-', '_')}.py": source, **PARTS.get(name, {})},
            version="1.4.2",
            entry_points={name.removeprefix("iso-"): name.replace("-", "_")},
            requires=REQUIRES.get(name, []),
        )
        for name, source in SOURCES.items()
    ]
    return install(tmp_path_factory.mktemp("site"), *made)


def environment(site: Path, **variables: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path} | variables


def ldmkit(site: Path, *args: str, code: int = 0, **variables: str) -> tuple[str, str]:
    """What the command prints, on both streams."""
    command = [sys.executable, "-m", "ldmkit.cli", *args]
    done = subprocess.run(command, env=environment(site, **variables), capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout, done.stderr


@pytest.fixture(scope="session")
def listing(site) -> dict:
    """`ldmkit plugins --json` with everything installed but what hangs."""
    return json.loads(ldmkit(site, "plugins", "--json", LDMKIT_DISABLE_PLUGINS="iso-hangs")[0])


@pytest.fixture(scope="session")
def listed(listing) -> dict[str, dict]:
    return {plugin["distribution"]: plugin for plugin in listing["plugins"]}


BROKEN = {
    "iso-raises": "RuntimeError: no luck",
    "iso-exits": "SystemExit: goodbye",
    "iso-interrupts-hook": "SystemExit: 0",
    "iso-signature": "Argument(s) {'config'} are declared in the hookimpl but can not be found in the hookspec",
    "iso-future": "PluginError: it works with plugin API >=2,<3, and this ldmkit has 1.0; upgrade it, or ldmkit",
    "iso-lacks": "No module named 'a_package_nobody_has'; iso-lacks requires a-package-nobody-has>=2 (not installed): "
    "pip install 'a-package-nobody-has>=2'",
    "iso-lacks-untold": "is 'another_package_nobody_has' installed? iso-lacks-untold does not say that it needs it: "
    "pip install another_package_nobody_has",
    "iso-no-op": "kernel 'x': op 'nop' is none of group_norm_silu, cross_attention, geglu, geglu_linear",
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plugin_is_kept_apart_and_told(listed, name):
    assert listed[name]["state"] == "failed"
    assert BROKEN[name] in listed[name]["error"]
    assert listed[name]["version"] == "1.4.2"
    assert "Traceback" in listed[name]["traceback"]


def test_the_others_work_all_the_same(listed, listing):
    sound = {name for name in SOURCES if name not in BROKEN and name != "iso-hangs"}
    assert {name for name in sound if listed[name]["state"] == "ok"} == sound
    assert sum(plugin["distribution"] == "ldmkit" and plugin["state"] == "ok" for plugin in listing["plugins"]) == 5


def test_what_a_plugin_prints_stays_out_of_the_output(site):
    out, err = ldmkit(site, "plugins", "--json", LDMKIT_PLUGINS="iso-prints")
    assert json.loads(out)["plugins"]
    assert err == "hello from a plugin\n"


def test_a_hang_is_named_with_its_line_and_can_be_interrupted(site):
    variables = environment(site, LDMKIT_PLUGINS="iso-hangs,ldmkit", LDMKIT_SLOW_PLUGIN="0.2")
    # What a shell runs in the background ignores SIGINT, and so would its children.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    listed = "import runpy, sys; sys.argv = ['ldmkit', 'plugins']; runpy.run_module('ldmkit.cli', run_name='__main__')"
    command = [sys.executable, "-c", f"{heard}; {listed}"]
    with subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as process:
        try:
            told = process.stderr.readline()  # waits for the watchdog
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
        finally:
            process.kill()
    assert told.startswith(
        "warning: plugin iso-hangs 1.4.2 (entry point 'hangs') (LDMKIT_DISABLE_PLUGINS=hangs leaves it out) "
    )
    assert re.search(r"has been loading for 0\.2 s and has not finished; it is at \S*iso_hangs\.py, line 2, in <module>", told)


def test_blocking_gets_round_a_hang(site):
    out, err = ldmkit(site, "plugins", LDMKIT_PLUGINS="iso-hangs,ldmkit", LDMKIT_DISABLE_PLUGINS="hangs")
    assert " ddim " in out
    assert err == ""


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_no_time_is_refused(site, text):
    _, err = ldmkit(site, "plugins", LDMKIT_PLUGINS="ldmkit", LDMKIT_SLOW_PLUGIN=text, code=2)
    assert err.startswith(f"error: LDMKIT_SLOW_PLUGIN = '{text}': must be a number of seconds above 0")


def test_a_dependency_of_the_wrong_version_is_told_when_the_part_is_asked_for(site):
    _, err = ldmkit(site, "schema", "sampler", "lazy", LDMKIT_PLUGINS="iso-lacks-later", code=2)
    assert "cannot be imported: cannot import name 'what_only_99_has'" in err
    assert re.search(r"; iso-lacks-later requires pluggy>=99 \(1\.\S+ is installed\): pip install 'pluggy>=99'$", err.strip())


def test_a_clash_names_both_and_either_can_be_had(site, listing):
    (clash,) = listing["clashes"]
    told = (
        "the sampler 'twins' is offered by iso-one 1.4.2 (entry point 'one') and by iso-two 1.4.2 (entry point 'two'); "
        "pick one by writing 'iso-one:twins' or 'iso-two:twins', or block one with LDMKIT_DISABLE_PLUGINS=iso-two"
    )
    assert clash == told
    _, err = ldmkit(site, "schema", "sampler", "twins", LDMKIT_PLUGINS="iso-one,iso-two", code=2)
    assert err == f"error: {told}\n"
    _, err = ldmkit(site, "schema", "sampler", "iso-two:twins", LDMKIT_PLUGINS="iso-one,iso-two", code=2)
    assert "iso_two:Two" in err


def test_a_built_in_part_keeps_its_name(site):
    heard = {"LDMKIT_PLUGINS": "iso-shadows,ldmkit"}
    find = "import ldmkit; print([ldmkit.registry().find('sampler', n).target for n in ('euler', 'iso-shadows:euler')])"
    command = [sys.executable, "-W", "error", "-c", find]
    found = subprocess.run(command, env=environment(site, **heard), capture_output=True, text=True, check=True)
    assert found.stdout == "['ldmkit_samplers.euler:EulerSampler', 'iso_shadows:Euler']\n"
    out, _ = ldmkit(site, "plugins", **heard)
    assert (
        "shadowed: the sampler 'euler' of iso-shadows 1.4.2 (entry point 'shadows') has the name of a built-in one, "
        "which keeps it; write 'iso-shadows:euler' to use it" in out
    )
    assert "clash" not in out


WHY = {
    "iso-raises": ["plugin iso-raises 1.4.2 (entry point 'raises'), module iso_raises, in ",
                   "state: failed: RuntimeError: no luck", "Traceback", "line 1, in <module>"],
    "hangs": ["iso-hangs 1.4.2", "state: blocked: named in LDMKIT_DISABLE_PLUGINS"],
    "iso-future": ["works with plugin API >=2,<3; this ldmkit has 1.0"],
    "iso-lacks-later": ["state: ok", "lacks what it requires: pip install 'pluggy>=99'",
                        "offers the sampler 'lazy' (iso_lacks_later_part:Lazy)"],
    "twins": ["the sampler 'twins' is offered by iso-one 1.4.2"],
    "iso-one:twins": ["the sampler 'iso-one:twins' is iso_one:One of iso-one 1.4.2 (entry point 'one'): no other plugin"],
    "wide": ["the kernel 'wide' of geglu is fast:WIDE of iso-kernel 1.4.2 (entry point 'kernel'): it runs where it is named"],
    "both": ["the kernel 'both' of geglu is offered by iso-kernel 1.4.2 (entry point 'kernel') and by iso-kernel-too 1.4.2 "
             "(entry point 'kernel-too'); block one with LDMKIT_DISABLE_PLUGINS"],
    "euler": ["the sampler 'euler' is ldmkit_samplers.euler:EulerSampler of ldmkit",
              "it is built in, and a built-in part keeps its name",
              "write 'iso-shadows:euler' to use it"],
}  # fmt: skip


@pytest.mark.parametrize("name", WHY)
def test_why(site, name):
    out, _ = ldmkit(site, "plugins", "--why", name, LDMKIT_DISABLE_PLUGINS="iso-hangs")
    for words in WHY[name]:
        assert words in out
    assert ("Traceback" in out) == ("Traceback" in WHY[name] or name == "iso-future")


def test_why_of_a_name_nobody_has(site):
    _, err = ldmkit(site, "plugins", "--why", "iso-sond", LDMKIT_PLUGINS="iso-sound", code=2)
    told = "no installed plugin, distribution or part is called 'iso-sond'"
    assert err == f"error: {told}; did you mean 'iso-sound' or 'iso-one' or 'iso-two'?\n"
