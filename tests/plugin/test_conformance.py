"""The built-in parts pass the suites that a stranger's parts are held to, by the examples that they ship."""

import json

import pytest

import ldmkit.plugin.registry as module
from ldmkit import InputError, PluginError, registry
from ldmkit.cli import main
from ldmkit.testing import conformance
from ldmkit.testing.conformance import denoisers

BUILT_IN = [(part.kind, part.name) for plugin in registry().plugins if plugin.builtin for part in plugin.components]
SILENT = {
    ("autoencoder", "identity"): {"scale and shift"},
    ("autoencoder", "taesd"): {"scale and shift"},
}
"""What says nothing about a part, beside the order of a sampler that declares none."""


@pytest.mark.parametrize(("kind", "name"), BUILT_IN)
def test_a_built_in_part_passes_its_suite(kind, name):
    named = f"ldmkit:{name}"
    subject = conformance.pipeline(named) if kind == "pipeline" else conformance.subject(kind, named)
    report = conformance.check(subject, examples=3 if kind == "sampler" else 2)
    assert report.passed, report.table()
    silent = SILENT.get((kind, name), set())
    if kind == "conditioner" and name != "sdxl-text":
        silent = {"each picture's own sizes"}
    if kind == "sampler" and subject.part.facts.order is None:
        silent = {"declared order"}
    assert {row.name for row in report if row.verdict == "not applicable"} == silent


def test_no_built_in_part_is_left_out():
    assert {kind for kind, _ in BUILT_IN} == {*conformance.PROPERTIES}
    lacking = [
        (kind, name)
        for kind, name in BUILT_IN
        if kind != "pipeline" and not conformance.subject(kind, f"ldmkit:{name}").fixed_configs()
    ]
    assert lacking == [], "parts that are not built without a config need an example in their plugin's ldmkit_examples"


def test_the_command_line_takes_all_of_them(monkeypatch, capsys):
    """Each by the suite above, which need not run twice."""
    whole = conformance.check
    monkeypatch.setattr(
        conformance, "check", lambda subject, **_: whole(subject, only=["documented", "a folder without pickles"])
    )
    assert main(["plugin", "check", "ldmkit", "--json"]) == 0
    told = capsys.readouterr()
    reports = json.loads(told.out)["reports"]
    assert {(report["kind"], report["name"]) for report in reports} == {(kind, f"ldmkit:{name}") for kind, name in BUILT_IN}
    assert f"{len(reports)} of {len(reports)}: " in told.err
    assert main(["plugin", "check", "ldmkit"]) == 0
    _, closing = capsys.readouterr().out.split("KIND")
    assert all(f"ldmkit:{name} " in closing for _, name in BUILT_IN)
    assert closing.count("1 passed") == len(BUILT_IN)
    assert closing.endswith("\nIts kernels are tried by `ldmkit verify all`.\n")
    assert main(["plugin", "check", "ldmkit:ddim"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("sampler ldmkit:ddim\n")
    assert out.endswith("\n1 passed\n\n")


def test_a_plugin_that_fails_is_told_with_its_line(site, monkeypatch, capsys):
    site.install("ex-broken", "\n\nraise OSError('no luck')")
    monkeypatch.setattr(module, "_registry", site.registry())
    assert main(["plugin", "check", "ex-broken"]) == 2
    told = capsys.readouterr().err
    assert "(entry point 'fake_ex_broken') failed: OSError: no luck\nTraceback" in told
    assert 'fake_ex_broken.py", line 3, in <module>' in told


def test_what_there_is_no_suite_for_is_loaded(site, monkeypatch, capsys):
    head = "from ldmkit.plugin.spec import DataSource, hookimpl\n@hookimpl\ndef ldmkit_data_sources():"
    site.install("ex-data", f"{head} return [DataSource(name='mine', target='fake_ex_data:Sourse')]")
    monkeypatch.setattr(module, "_registry", site.registry())
    assert main(["plugin", "check", "ex-data"]) == 2
    assert "the data-source 'mine' of ex-data 1.0 (entry point 'fake_ex_data') cannot be imported" in capsys.readouterr().err


PART = """
import ldmkit
from ldmkit.plugin.spec import Component, Example, hookimpl

class Part(ldmkit.Denoiser):
    class Config(ldmkit.Config):
        "Attributes: width."
        width: int = 4

    def forward(self, x_BCHW, t_B, condition): ...

@hookimpl
def ldmkit_components():
    return [Component(kind="denoiser", name="unet", target="{module}:Part")]

@hookimpl
def ldmkit_examples():
    {examples}
"""


@pytest.fixture
def subject_of(site, monkeypatch):
    """The subject that a plugin with these examples makes of its denoiser."""

    def made(examples, name="ex-plugin"):
        site.install(name, PART.format(module=f"fake_{name.replace('-', '_')}", examples=examples))
        monkeypatch.setattr(module, "_registry", site.registry())
        return conformance.subject("denoiser", f"{name}:unet")

    return made


def test_a_part_is_tried_by_the_examples_of_its_own_plugin(subject_of):
    subject = subject_of("return [Example(kind='denoiser', name='unet', configs=({'width': 2},), condition={'labels_B': 3})]")
    assert subject.fixed_configs() == ({"width": 2},)
    assert denoisers.told(subject, subject.part.Config()) == {"labels_B": 3}
    assert subject_of("return []", "ex-other").fixed_configs() == ({},)


def test_a_condition_may_name_a_config_field(subject_of):
    subject = subject_of("return [Example(kind='denoiser', name='unet', condition={'tokens_BLC': 'width', 'labels_B': 5})]")
    assert denoisers.told(subject, subject.part.Config(width=7)) == {"tokens_BLC": 7, "labels_B": 5}
    assert denoisers.told(subject, subject.part.Config(width=0)) == {"labels_B": 5}
    subject = subject_of("return [Example(kind='denoiser', name='unet', condition={'tokens_BLC': 'depth'})]", "ex-other")
    with pytest.raises(InputError, match=r"condition = \{'tokens_BLC': 'depth'\}: the config has no field depth"):
        denoisers.told(subject, subject.part.Config())


@pytest.mark.parametrize(
    ("examples", "told"),
    [
        ("raise OSError('no such vocabulary')", "its ldmkit_examples failed: OSError: no such vocabulary"),
        ("return 7", "its ldmkit_examples failed: TypeError"),
        ("return [{'kind': 'denoiser'}]", "must return Example objects only, and one is {'kind'"),
        ("return 2 * [Example(kind='denoiser', name='unet')]", "the denoiser 'unet' of its ldmkit_examples is there twice"),
        (
            "return [Example(kind='denoiser', name='u-net')]",
            "the denoiser 'u-net' of its .* is not among its .*_components",
        ),
    ],
)
def test_examples_that_cannot_be_used_are_told(subject_of, examples, told):
    with pytest.raises(PluginError, match=f"^ex-plugin 1.0 .*{told}"):
        subject_of(examples)
