"""Discovery: every way a plugin can be broken leaves the others working, and is told."""

import sys
import warnings

import pytest

from ldmkit.plugin.manager import PluginWarning, discover, warn_of_failures
from ldmkit.plugin.registry import Registry

HEAD = "from ldmkit.plugin.spec import Component, hookimpl\n"

BROKEN = {
    "syntax error": ("def (", "SyntaxError"),
    "import error": ("import a_package_nobody_has", "ModuleNotFoundError: No module named 'a_package_nobody_has'"),
    "raises on import": ("raise RuntimeError('no luck\\ntoday')", "RuntimeError: no luck today"),
    "exits on import": ("import sys; sys.exit(3)", "SystemExit: 3"),
    "no hooks": ("x = 1", "implements no hook"),
    "hook unmarked": ("def ldmkit_components(): return []", "lacks its decorator"),
    "hook misspelt": (
        HEAD + "@hookimpl\ndef ldmkit_componets(): return []",
        "implements ldmkit_componets, which is no hook; did you mean ldmkit_components?",
    ),
    "hook unheard of": (HEAD + "@hookimpl\ndef zebra(): return []", "implements zebra, which is no hook; hooks: ldmkit_api, "),
    "wrong signature": (HEAD + "@hookimpl\ndef ldmkit_components(kind): return []", "PluginValidationError"),
    "hook raises": (HEAD + "@hookimpl\ndef ldmkit_components(): return 1 / 0", "ZeroDivisionError"),
    "generator raises": (HEAD + "@hookimpl\ndef ldmkit_components(): yield 1 / 0", "ZeroDivisionError"),
    "not iterable": (HEAD + "@hookimpl\ndef ldmkit_components(): return 7", "must return an iterable of Component, not 7"),
    "not a component": (HEAD + "@hookimpl\ndef ldmkit_components(): return ['euler']", "one is 'euler'"),
    "unknown kind": (
        HEAD + "@hookimpl\ndef ldmkit_components(): return [Component(kind='sampelr', name='x', target='a:B')]",
        "kind 'sampelr' is none of",
    ),
    "bad name": (
        HEAD + "@hookimpl\ndef ldmkit_components(): return [Component(kind='sampler', name='My Sampler', target='a:B')]",
        "lower-case words",
    ),
    "bad target": (
        HEAD + "@hookimpl\ndef ldmkit_components(): return [Component(kind='sampler', name='x', target='a.B')]",
        "not of the form 'package.module:Class'",
    ),
    "offered twice": (
        HEAD + "@hookimpl\ndef ldmkit_components(): return [Component(kind='sampler', name='x', target='a:B')] * 2",
        "offers the sampler 'x' twice",
    ),
    "future interface": (HEAD + "@hookimpl\ndef ldmkit_api(): return '>=2,<3'", "plugin API >=2,<3, and this ldmkit has 1.0"),
    "no specifier": (HEAD + "@hookimpl\ndef ldmkit_api(): return 'one'", "no version specifier"),
    "specifier of wrong type": (HEAD + "@hookimpl\ndef ldmkit_api(): return 1.0", "must return a version specifier"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_kept_as_failed_and_the_rest_works(site, offering, case):
    source, told = BROKEN[case]
    site.install("a-broken", source, version="0.3")
    site.install("b-sound", offering("slow"))
    broken, sound = site.plugins()
    assert (broken.state, broken.distribution, broken.version, broken.components) == ("failed", "a-broken", "0.3", ())
    assert told in broken.error
    assert "\n" not in broken.error
    assert "Traceback" in broken.traceback
    assert sound.state == "ok"
    assert Registry([broken, sound]).available("sampler") == ("slow",)


def test_damaged_metadata_hides_no_plugin(site, offering):
    site.install("damaged", offering("slow"))
    (site.folder / "damaged-1.0.dist-info" / "METADATA").write_text("")
    plugin = site.plugin()
    assert (plugin.distribution, plugin.version, plugin.state) == ("", "", "ok")
    assert str(plugin) == "unknown distribution (entry point 'fake_damaged')"


def test_a_failure_is_warned_of_once_by_name(site, offering):
    site.install("broken", "1 / 0")
    site.install("sound", offering("slow"))
    with pytest.warns(PluginWarning, match=r"broken 1\.0 \(entry point 'fake_broken'\) failed.*ZeroDivisionError") as caught:
        warn_of_failures(site.plugins())
    assert len(caught) == 1


@pytest.mark.parametrize("answer", ["'>=1.0,<2'", "'==1.*'", "''"])
def test_an_interface_range_that_fits(site, answer):
    site.install("fits", HEAD + f"@hookimpl\ndef ldmkit_api(): return {answer}")
    assert site.plugin().state == "ok"


def test_entry_points_may_name_an_object(site):
    site.install(
        "objects",
        HEAD + "class P:\n @hookimpl\n def ldmkit_components(self):\n"
        "  return [Component(kind='sampler', name='x', target='a:B')]\np = P()",
    )
    (site.folder / "objects-1.0.dist-info" / "entry_points.txt").write_text("[ldmkit]\nobj = fake_objects:p\n")
    assert [c.name for c in site.plugin().components] == ["x"]


@pytest.mark.parametrize("spelling", ["my-dist", "My_Dist", "my.dist", "short"])
def test_blocked_by_distribution_or_entry_point_and_never_imported(site, offering, monkeypatch, spelling):
    module = site.install("my-dist", offering("slow"), entry_point="short")
    monkeypatch.setenv("LDMKIT_DISABLE_PLUGINS", f" other-plugin-not-there, {spelling} ")
    with pytest.warns(PluginWarning, match="LDMKIT_DISABLE_PLUGINS names 'other-plugin-not-there'.*there are: my-dist, short"):
        plugin = site.plugin()
    assert (plugin.state, plugin.error) == ("blocked", "named in LDMKIT_DISABLE_PLUGINS")
    assert module not in sys.modules


def test_an_allow_list_blocks_all_others(site, offering, monkeypatch):
    site.install("one", offering("first"))
    site.install("two", offering("second"))
    monkeypatch.setenv("LDMKIT_PLUGINS", "two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one, two = site.plugins()
    assert (one.state, one.error) == ("blocked", "not named in LDMKIT_PLUGINS")
    assert two.state == "ok"


def test_an_empty_allow_list_is_none_at_all(site, offering, monkeypatch):
    site.install("one", offering("first"))
    monkeypatch.setenv("LDMKIT_PLUGINS", " ")
    assert site.plugin().state == "ok"


def test_an_unknown_name_in_the_allow_list_is_said_aloud(site, offering, monkeypatch):
    site.install("one", offering("first"))
    monkeypatch.setenv("LDMKIT_PLUGINS", "won")
    with pytest.warns(PluginWarning, match="LDMKIT_PLUGINS names 'won'"):
        assert site.plugin().state == "blocked"


def test_all_installed_entry_points_are_found_by_default(site, offering):
    site.install("one", offering("first"))
    distributions = {plugin.distribution for plugin in discover()}
    assert {"one", "ldmkit"} <= distributions


def test_finding_plugins_costs_as_much_for_each_however_many_there_are(site, offering):
    """Counted in calls of Python functions, which no busy machine changes; benchmarks/plugins_startup.py has seconds."""
    counts = {}
    for n in (20, 40, 80):
        for i in range(len(list(site.folder.glob("*.dist-info"))), n):
            site.install(f"dist-{i}", offering(f"slow-{i}"))
        entry_points = site.entry_points()
        discover(entry_points)  # imports are not counted
        counts[n] = count_calls(lambda: Registry(discover(entry_points)).available("sampler"))  # noqa: B023
    assert counts[80] - counts[40] <= 2.1 * (counts[40] - counts[20])


def count_calls(run) -> int:
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls
