"""The specification: every hook is documented by an example that runs, and names are well-formed."""

import doctest
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import PluginError
from ldmkit.plugin import spec
from ldmkit.plugin.manager import hook_names
from ldmkit.plugin.spec import Component
from ldmkit.plugin.targets import CALLED_AS_THEY_ARE, CALLED_WHEN_BUILT

GALLERY = Path(__file__).resolve().parent.parent / "example_plugins"
WORD = st.text("abcxyz0189", min_size=1, max_size=8)


@pytest.mark.parametrize("hook", hook_names())
def test_every_hook_has_an_example_that_runs(hook):
    function = getattr(spec, hook)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, hook, globs={})
    assert any(hook in example.source for example in test.examples)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted > 0
    assert results.failed == 0


@pytest.mark.parametrize("hook", hook_names())
def test_every_hook_is_implemented_in_the_gallery_whose_tests_run_it(hook):
    sources = [path.read_text() for path in GALLERY.glob("*/src/*/__init__.py")]
    assert any(f"@hookimpl\ndef {hook}()" in source for source in sources)


@pytest.mark.parametrize("hook", sorted(spec.EXTENSIONS))
def test_every_hook_says_what_its_targets_are(hook):
    assert re.search(r"The target is an? \w+ .*`", " ".join(getattr(spec, hook).__doc__.split()))


def test_every_kind_of_extension_has_its_hook_and_its_check():
    assert sorted([*CALLED_AS_THEY_ARE, *CALLED_WHEN_BUILT]) == sorted(spec.EXTENSION_KINDS)
    assert {"ldmkit_api", "ldmkit_components", "ldmkit_examples", "ldmkit_kernels", *spec.EXTENSIONS} == set(hook_names())


@pytest.mark.parametrize("extension", spec.EXTENSIONS.values())
def test_extensions_are_checked_data(extension):
    made = extension(name="my-own", target="a.b:c")
    assert made == extension(name="my-own", target="a.b:c")
    with pytest.raises(AttributeError):
        made.name = "y"
    with pytest.raises(PluginError, match=f"{extension.kind} 'My': use lower-case words"):
        extension(name="My", target="a.b:c")
    with pytest.raises(PluginError, match=r"is not of the form 'package\.module:object'"):
        extension(name="x", target="a.b")


def test_the_module_a_plugin_author_imports_is_light():
    code = (
        "import sys, ldmkit.plugin.spec; print([m for m in ('torch', 'transformers', 'pydantic', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"


@given(st.lists(WORD, min_size=1, max_size=3))
def test_names_are_words_joined_with_hyphens(words):
    name = "-".join(words)
    assert Component(kind="sampler", name=name, target="a.b:C").name == name


@pytest.mark.parametrize("name", ["", "Euler", "euler a", "euler_a", "-euler", "euler-", "a--b", "one:two"])
def test_other_names_are_refused(name):
    with pytest.raises(PluginError, match="use lower-case words joined with hyphens"):
        Component(kind="sampler", name=name, target="a.b:C")


@pytest.mark.parametrize("target", ["", "a.b", "a.b:", ":C"])
def test_other_targets_are_refused(target):
    with pytest.raises(PluginError, match=r"is not of the form 'package\.module:Class'"):
        Component(kind="sampler", name="x", target=target)


def test_components_are_frozen_data():
    component = Component(kind="sampler", name="x", target="a.b:C")
    with pytest.raises(AttributeError):
        component.name = "y"  # type: ignore[misc]
    assert component == Component(kind="sampler", name="x", target="a.b:C")
