"""Every part that is installed keeps what its kind promises."""

import subprocess
import sys
from pathlib import Path

import pytest

from ldmkit import registry
from ldmkit.config import Config
from ldmkit.plugin.registry import INTERFACES
from ldmkit.plugin.spec import Component

BUILTIN = {"emoji", "samplers", "text", "unet", "vae"}
COMPONENTS = [c for plugin in registry().plugins if plugin.distribution == "ldmkit" for c in plugin.components]
PARTS = [c for c in COMPONENTS if c.kind in INTERFACES]


def named(component: Component) -> str:
    return f"{component.kind}-{component.name}"


def test_all_builtin_plugins_work():
    plugins = {plugin.entry_point: plugin for plugin in registry().plugins if plugin.distribution == "ldmkit"}
    assert set(plugins) == BUILTIN
    assert {name: plugin.traceback for name, plugin in plugins.items() if plugin.state != "ok"} == {}


def test_the_issues_parts_are_there():
    assert {(c.kind, c.name) for c in COMPONENTS} >= {
        ("autoencoder", "kl"),
        ("denoiser", "unet"),
        ("conditioner", "clip-text"),
        ("conditioner", "bert"),
        ("conditioner", "class-label"),
        ("sampler", "ddpm"),
        ("sampler", "ddim"),
        ("sampler", "euler"),
        ("sampler", "euler-ancestral"),
        ("pipeline", "emoji"),
    }


@pytest.mark.parametrize("component", PARTS, ids=named)
def test_a_part_loads_and_its_config_round_trips(component):
    cls = registry().load(component.kind, component.name)
    assert cls.Config.model_config["extra"] == "forbid"
    assert cls.Config.model_config["frozen"]
    assert cls.Config.model_json_schema()["type"] == "object"
    required = [name for name, field in cls.Config.model_fields.items() if field.is_required()]
    if not required:
        config = cls.Config()
        assert cls.Config.parse_json(config.to_json()) == config
        assert cls.Config.parse(config.to_dict()) == config


@pytest.mark.parametrize("component", PARTS, ids=named)
def test_a_part_documents_its_config(component):
    configs = [base for base in registry().load(component.kind, component.name).Config.__mro__ if base is not Config]
    assert [base for base in configs if issubclass(base, Config) and base.__annotations__ and not base.__doc__] == []
    assert component.summary


@pytest.mark.parametrize("component", [c for c in COMPONENTS if c.kind == "pipeline"], ids=named)
def test_a_pipeline_names_a_folder(component):
    assert (Path(registry().load(component.kind, component.name)()) / "pipeline.json").is_file()


@pytest.mark.parametrize("module", sorted(f"ldmkit_{name}" for name in BUILTIN))
def test_registering_is_light(module):
    code = f"import sys, {module}; print([m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
