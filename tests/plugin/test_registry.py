"""Parts by name: lazy targets, clashes, close names, and what each kind demands of a class."""

import sys
import threading
import time

import pytest

import ldmkit.plugin.registry as module
from ldmkit.errors import (
    ConfigError,
    InputError,
    InputTypeError,
    MissingDependencyError,
    PartClashError,
    PluginError,
    UnknownPartError,
)
from ldmkit.plugin.manager import Plugin
from ldmkit.plugin.registry import Registry
from ldmkit.plugin.spec import KINDS

GOOD = """
from ldmkit import Config, Sampler

class Slow(Sampler):
    class Config(Config):
        order: int = 1
    def __init__(self, config):
        self.config = config
    def levels(self, *args, **kwargs): ...
    def transition(self, *args, **kwargs): ...

class Halfway(Sampler):
    class Config(Config): ...

class Bare(Slow):
    Config = None

def function(): ...
number = 3
"""


@pytest.fixture
def part(site, offering):
    """Install one plugin with one sampler, its target given; returns the registry."""

    def make(target: str, source: str = GOOD) -> Registry:
        (site.folder / "fake_target.py").write_text(source)
        site.install("mine", offering("slow", target))
        return site.registry()

    return make


def test_nothing_is_imported_until_a_part_is_loaded(part):
    registry = part("fake_target:Slow")
    assert registry.find("sampler", "slow").summary == "A fake."
    assert "fake_target" not in sys.modules
    assert registry.load("sampler", "slow").__name__ == "Slow"
    assert "fake_target" in sys.modules


def test_build_validates_the_config(part):
    registry = part("fake_target:Slow")
    assert registry.build("sampler", "slow", order=3).config.order == 3
    with pytest.raises(ConfigError, match=r"Slow: unknown key 'ordr' \(= 3\); did you mean 'order'\?"):
        registry.build("sampler", "slow", ordr=3)


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("fake_target:Slwo", "cannot be imported from 'fake_target:Slwo': AttributeError"),
        ("fake_target.sub:Slow", "its target 'fake_target.sub:Slow' is wrong"),
        ("fake_target:function", "must be a class derived from ldmkit.Sampler"),
        ("ldmkit.config:Config", "must be a class derived from ldmkit.Sampler"),
        ("fake_target:Halfway", "leaves abstract: "),
        ("fake_target:Bare", "needs a nested `class Config"),
    ],
)
def test_a_target_that_breaks_its_promise(part, target, told):
    with pytest.raises(PluginError, match=r"the sampler 'slow' of mine 1\.0") as caught:
        part(target).load("sampler", "slow")
    assert told in str(caught.value)


def test_a_target_whose_dependency_is_missing_names_it_and_keeps_the_cause(part):
    registry = part("fake_target:Slow", "import a_package_nobody_has.core")
    with pytest.raises(PluginError, match="is 'a_package_nobody_has' installed") as caught:
        registry.load("sampler", "slow")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_target_that_raises_keeps_the_cause(part):
    with pytest.raises(
        PluginError, match=r"ZeroDivisionError: .*; raised at .*fake_target\.py, line \d+, in <module>"
    ) as caught:
        part("fake_target:Slow", "1 / 0").load("sampler", "slow")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_targets_own_named_error_passes_through(part):
    source = "from ldmkit.errors import MissingDependencyError\nraise MissingDependencyError('pip install x')"
    with pytest.raises(MissingDependencyError, match=r"^pip install x$"):
        part("fake_target:Slow", source).load("sampler", "slow")


def test_an_unknown_name_gets_close_matches_and_what_might_have_held_it(site, offering, monkeypatch):
    site.install("a-sound", offering("euler-ancestral"))
    site.install("b-broken", "raise RuntimeError('no luck')", version="2.1")
    site.install("c-blocked", offering("euler-x"))
    monkeypatch.setenv("LDMKIT_DISABLE_PLUGINS", "c-blocked")
    with pytest.raises(UnknownPartError) as caught:
        site.registry().load("sampler", "euler-ancestrl")
    assert str(caught.value).splitlines() == [
        "no sampler is called 'euler-ancestrl'; did you mean 'euler-ancestral'?",
        "  sampler parts there are: euler-ancestral",
        "  plugin b-broken 2.1 (entry point 'fake_b_broken') failed, and might have held it: RuntimeError: no luck",
        "  plugin c-blocked 1.0 (entry point 'fake_c_blocked') is blocked, and might hold it: named in LDMKIT_DISABLE_PLUGINS",
        "  `ldmkit plugins` shows the tracebacks",
    ]


def test_a_name_of_another_kind_is_pointed_out(part):
    with pytest.raises(UnknownPartError, match="there is a sampler of that name"):
        part("fake_target:Slow").find("denoiser", "slow")


@pytest.mark.parametrize("method", ["find", "load", "build"])
def test_unknown_kind(method):
    with pytest.raises(UnknownPartError, match=r"no kind of part is called 'smapler'; did you mean 'sampler'\?"):
        getattr(Registry([]), method)("smapler", "euler")


def test_a_name_must_be_a_string():
    with pytest.raises(InputTypeError, match="must be a string, got 7 of type int"):
        Registry([]).load("sampler", 7)


def test_a_clash_names_both_and_how_to_pick_or_block(site, offering):
    site.install("one", offering("slow", "fake_one:A"), version="1.5")
    site.install("two", offering("slow", "fake_two:B"), version="2.0")
    registry = site.registry()
    with pytest.raises(PartClashError) as caught:
        registry.find("sampler", "slow")
    assert str(caught.value) == (
        "the sampler 'slow' is offered by one 1.5 (entry point 'fake_one') and by two 2.0 (entry point 'fake_two'); "
        "pick one by writing 'one:slow' or 'two:slow', or block one with LDMKIT_DISABLE_PLUGINS=two"
    )
    assert registry.clashes() == (str(caught.value),)
    assert registry.available("sampler") == ("one:slow", "two:slow")
    assert registry.find("sampler", "one:slow").target == "fake_one:A"
    assert registry.find("sampler", "two:slow").target == "fake_two:B"
    assert registry.find("sampler", "fake_two:slow").target == "fake_two:B"


def test_the_way_out_of_a_clash_works(site, offering, monkeypatch):
    site.install("one", offering("slow", "fake_one:A"))
    site.install("two", offering("slow", "fake_two:B"))
    monkeypatch.setenv("LDMKIT_DISABLE_PLUGINS", "two")
    assert site.registry().find("sampler", "slow").target == "fake_one:A"


def test_two_entry_points_of_one_distribution_are_told_apart(site, offering):
    site.install("one", offering("slow", "a:A"), module="fake_first", entry_point="first")
    site.install("one", offering("slow", "b:B"), module="fake_second", entry_point="second")
    registry = site.registry()
    assert registry.available("sampler") == ("first:slow", "second:slow")
    assert registry.find("sampler", "second:slow").target == "b:B"
    with pytest.raises(PartClashError, match="'first:slow' or 'second:slow'"):
        registry.find("sampler", "one:slow")


def test_a_pipeline_is_a_function_and_is_not_built(site):
    source = "\n".join(
        [
            "from ldmkit.plugin.spec import Component, hookimpl",
            "@hookimpl",
            "def ldmkit_components():",
            "    return [Component(kind='pipeline', name=n, target=f'fake_mine:{n}') for n in ('folder', 'number')]",
            "def folder(): return 'somewhere'",
            "number = 3",
        ]
    )
    site.install("mine", source)
    registry = site.registry()
    assert registry.load("pipeline", "folder")() == "somewhere"
    with pytest.raises(PluginError, match="must be a function that returns a folder, and is 3"):
        registry.load("pipeline", "number")
    with pytest.raises(InputError, match=r"Pipeline.from_pretrained\('folder'\)"):
        registry.build("pipeline", "folder")


def test_components_are_sorted_by_kind_and_name():
    components = module.registry().components()
    assert list(components) == sorted(components, key=lambda c: (KINDS.index(c.kind), c.name))
    assert {c for kind in KINDS for c in module.registry().components(kind)} == set(components)


def test_threads_build_one_registry(monkeypatch):
    calls = []

    def slowly() -> tuple[Plugin, ...]:
        calls.append(threading.get_ident())
        time.sleep(0.05)
        return ()

    monkeypatch.setattr(module, "_registry", None)
    monkeypatch.setattr(module, "discover", slowly)
    found = []
    threads = [threading.Thread(target=lambda: found.append(module.registry())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert len({id(registry) for registry in found}) == 1


def test_a_plugin_that_asks_for_parts_on_import_is_told_not_to(site, monkeypatch):
    site.install("eager", "import ldmkit\nldmkit.available('sampler')")
    monkeypatch.setattr(module, "_registry", None)
    monkeypatch.setattr(module, "discover", site.plugins)
    with pytest.warns(UserWarning, match="do so in a part's target, not on import"):
        (plugin,) = module.registry().plugins
    assert plugin.state == "failed"


def test_the_line_that_registers_a_class_is_found_again(part):
    registry = part("fake_target:Slow")
    slow = registry.load("sampler", "slow")
    plugin, component = registry.offer_of(slow)
    assert (component, plugin.distribution) == (registry.find("sampler", "slow"), "mine")
    with pytest.raises(PluginError, match=r"fake_target\.Halfway is not registered"):
        registry.offer_of(sys.modules["fake_target"].Halfway)


def test_a_class_is_found_by_the_package_that_offers_it(site, offering):
    (site.folder / "fake_inner.py").write_text(GOOD)
    (site.folder / "fake_outer.py").write_text("from fake_inner import Slow")
    site.install("mine", offering("slow", "fake_outer:Slow"))
    registry = site.registry()
    slow = registry.load("sampler", "slow")
    assert slow.__module__ == "fake_inner"
    plugin, component = registry.offer_of(slow)
    assert (component, plugin.distribution) == (registry.find("sampler", "slow"), "mine")
