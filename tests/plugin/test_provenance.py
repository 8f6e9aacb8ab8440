"""Saved parts know who made them: a pipeline saved with one version of a distribution, and read with another, or with none."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import invalidate_caches, metadata
from pathlib import Path

import pytest
import torch

import ldmkit
import ldmkit.plugin.registry as module
from ldmkit import CheckpointError, Pipeline, UnknownPartError
from ldmkit.plugin.manager import PluginWarning, discover
from ldmkit.plugin.registry import Registry
from tests.plugin.wheels import install, wheel

HOOKS = """
from ldmkit.plugin.spec import Component, hookimpl

@hookimpl
def ldmkit_components():
    return [
        Component(kind="denoiser", name="unet", target="prov_parts:Plain"),
        Component(kind="sampler", name="leap", target="prov_parts:Leap"),
    ]
"""
PARTS = """
import torch
from ldmkit import Condition, Config, Denoiser, Level, Levels, Sampler, Transition

class Plain(Denoiser):
    class Config(Config):
        channels: int = 3
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.in_channels = self.out_channels = config.channels
        self.multiple_of, self.accepts, self.requires = 1, frozenset(), frozenset()
        self.weight = torch.nn.Parameter(torch.randn(config.channels))
    def forward(self, x_BCHW, t_B, condition):
        return x_BCHW * self.weight[:, None, None]

class Leap(Sampler):
    class Config(Config):
        order: int = 1
    def levels(self, schedule, num_inference_steps):
        times = schedule.timesteps(num_inference_steps, spacing="trailing")
        return Levels([*(schedule.level(t) for t in times), Level(1.0, 0.0, 0.0)])
    def transition(self, denoise, state):
        x0 = denoise(state.x, state.level)
        return Transition(state.next_level.alpha * x0, 0.0, x0)
"""
OTHER = HOOKS.replace("prov_parts", "prov_other_parts")
UNNEEDED = HOOKS.replace('        Component(kind="denoiser", name="unet", target="prov_parts:Plain"),\n', "")

Installed = Callable[..., None]


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Places on the path with one distribution each: a folder that pip installed into, and wheels as they are."""
    folder = tmp_path_factory.mktemp("wheels")
    made = {}
    for key, name, version, hooks in (
        ("1.4.2", "prov-maker", "1.4.2", HOOKS),
        ("1.9", "prov-maker", "1.9", HOOKS),
        ("2.0", "prov-maker", "2.0", HOOKS),
        ("3.0", "prov-maker", "3.0", UNNEEDED),
        ("other", "prov-other", "1.4.2", OTHER),
    ):
        stem = name.replace("-", "_")
        files = {f"{stem}.py": hooks, ("prov_parts.py" if stem == "prov_maker" else "prov_other_parts.py"): PARTS}
        made[key] = wheel(folder, name, files, version=version, entry_points={stem: stem})
    made["1.4.2"] = install(tmp_path_factory.mktemp("site"), made["1.4.2"])
    return made


@pytest.fixture
def installed(sites, monkeypatch) -> Iterator[Installed]:
    """Makes exactly these of the distributions be installed."""

    def forget() -> None:
        for name in [name for name in sys.modules if name.startswith("prov_")]:
            del sys.modules[name]
        invalidate_caches()

    path = list(sys.path)

    def use(*keys: str) -> None:
        forget()
        monkeypatch.setattr(sys, "path", [*(str(sites[key]) for key in keys), *path])
        monkeypatch.setattr(module, "_registry", Registry(discover(metadata.entry_points(group="ldmkit"))))

    yield use
    forget()


@pytest.fixture
def saved(installed, tmp_path) -> tuple[Path, torch.Tensor]:
    """A pipeline whose denoiser and sampler are of prov-maker 1.4.2, and what it draws."""
    installed("1.4.2")
    pipe = Pipeline(
        autoencoder="identity",
        denoiser="prov-maker:unet",
        sampler="leap",
        defaults={"num_inference_steps": 2, "height": 4, "width": 4},
    )
    return pipe.save_pretrained(tmp_path / "pipe"), draw(pipe)


def draw(pipe: Pipeline) -> torch.Tensor:
    return pipe(seed=3, output_type="latent", progress=False).images


def test_what_is_written(saved):
    folder, _ = saved
    part, index = (json.loads((folder / name).read_text()) for name in ("denoiser/part.json", "pipeline.json"))
    assert (part["kind"], part["name"], part["distribution"], part["version"]) == ("denoiser", "unet", "prov-maker", "1.4.2")
    assert index["sampler"] == {"name": "leap", "order": 1}
    assert index["providers"] == {"sampler": {"distribution": "prov-maker", "version": "1.4.2"}}
    built_in = json.loads((folder / "autoencoder/part.json").read_text())
    assert (built_in["distribution"], built_in["version"]) == ("ldmkit", metadata.version("ldmkit"))


@pytest.mark.parametrize("version", ["1.4.2", "1.9"])
def test_the_same_major_version_loads_to_the_same_bits_though_a_built_in_has_the_name(saved, installed, version):
    folder, picture = saved
    installed(version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Pipeline.from_pretrained(folder)
    assert type(again.denoiser).__module__ == "prov_parts"
    assert torch.equal(draw(again), picture)


def test_another_major_version_is_warned_of_for_each_part(saved, installed):
    folder, picture = saved
    installed("2.0")
    with pytest.warns(PluginWarning) as caught:
        again = Pipeline.from_pretrained(folder)
    assert sorted(str(w.message).partition(": ")[2] for w in caught) == [
        f"the {part} was saved by prov-maker 1.4.2, and 2.0 is installed, another major version: it may behave otherwise. "
        "pip install prov-maker==1.4.2 brings back the one that saved it"
        for part in ("denoiser 'unet'", "sampler 'leap'")
    ]
    assert torch.equal(draw(again), picture)


def test_a_missing_distribution_is_refused_with_the_line_that_installs_it(saved, installed):
    folder, _ = saved
    installed()
    with pytest.raises(UnknownPartError) as caught:
        Pipeline.from_pretrained(folder)
    built_in = next(str(p) for p in module.registry().plugins if p.entry_point == "unet")
    assert str(caught.value).splitlines() == [
        f"{folder / 'denoiser' / 'part.json'}: the denoiser 'unet' was saved by prov-maker 1.4.2, which is not installed "
        f"(that of {built_in} is another one, and is not put in its place)",
        f"  {folder / 'pipeline.json'}: the sampler 'leap' was saved by prov-maker 1.4.2, which is not installed",
        "  pip install prov-maker==1.4.2",
    ]
    with pytest.raises(UnknownPartError, match=r"pip install prov-maker==1\.4\.2"):
        ldmkit.load_part(folder / "denoiser")


def test_replaced_parts_need_not_be_installed(saved, installed):
    folder, _ = saved
    installed()
    identity = {
        "name": "unet",
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [32],
        "transformer_layers_per_block": [0],
    }
    pipe = Pipeline.from_pretrained(folder, denoiser=identity, sampler="euler")
    assert type(pipe.sampler).__module__ == "ldmkit_samplers.euler"


def test_another_distribution_of_the_name_is_not_put_in_its_place(saved, installed):
    installed("other")
    with pytest.raises(
        UnknownPartError, match=r"which is not installed \(that of prov-other 1\.4\.2 .* is not put in its place"
    ):
        Pipeline.from_pretrained(saved[0])


def test_both_installed_the_recorded_one_is_taken(saved, installed):
    installed("other", "1.4.2")
    assert type(Pipeline.from_pretrained(saved[0]).sampler).__module__ == "prov_parts"


def test_a_distribution_that_no_longer_offers_the_part(saved, installed):
    installed("3.0")
    with pytest.raises(UnknownPartError, match=r"prov-maker 3\.0 .* no longer offers it: pip install prov-maker==1\.4\.2"):
        Pipeline.from_pretrained(saved[0], sampler="euler")


def test_a_blocked_distribution_is_said_to_be(saved, installed, monkeypatch):
    monkeypatch.setenv("LDMKIT_DISABLE_PLUGINS", "prov-maker")
    installed("1.4.2")
    with pytest.raises(UnknownPartError, match=r"cannot be used now: prov-maker .* is blocked: named in LDMKIT_DISABLE"):
        Pipeline.from_pretrained(saved[0])


def test_files_older_than_these_records_go_by_what_they_say(saved, installed):
    folder, picture = saved
    installed("2.0")
    for path, key in ((folder / "pipeline.json", "providers"), (folder / "denoiser/part.json", "version")):
        values = json.loads(path.read_text())
        del values[key]
        path.write_text(json.dumps(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = Pipeline.from_pretrained(folder)
    assert torch.equal(draw(again), picture)


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("denoiser/part.json", {"distribution": 7}, "distribution must be a string, and is 7"),
        ("denoiser/part.json", {"name": None}, "name must be a string, and is None"),
        ("pipeline.json", {"providers": []}, "sampler and providers must be mappings"),
        ("pipeline.json", {"sampler": "leap"}, "sampler and providers must be mappings"),
    ],
)
def test_a_damaged_record_is_an_error(saved, file, change, told):
    path = saved[0] / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=told):
        Pipeline.from_pretrained(saved[0])
