"""Configs of every registered part, ours and a stranger's alike."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import Prediction, part_class
from ldmkit.config import Config
from ldmkit.errors import ConfigError
from ldmkit.plugin.registry import registry
from ldmkit.schedule import NoiseSchedule
from ldmkit.testing.strategies import configs
from ldmkit.upscaling import Upscaling


def config_classes() -> dict[str, type[Config]]:
    """The config of each part, and the core's own."""
    parts = [(entry.kind, entry.name) for entry in registry().components() if entry.kind != "pipeline"]
    return {
        **{f"{kind}:{name}": part_class(kind, name).Config for kind, name in parts},
        "schedule": NoiseSchedule.Config,
        "prediction": Prediction.Config,
        "upscaling": Upscaling,
    }


CLASSES = config_classes()


def test_all_built_in_kinds_are_here() -> None:
    assert {name.split(":")[0] for name in CLASSES} >= {"autoencoder", "denoiser", "conditioner", "sampler"}


@pytest.mark.parametrize("name", CLASSES)
@given(data=st.data())
def test_config_to_json_and_back_is_the_identity(name: str, data: st.DataObject) -> None:
    cls = CLASSES[name]
    config = data.draw(configs(cls))
    assert cls.parse_json(config.to_json()) == config
    assert cls.parse(config.to_dict()) == config
    assert cls.parse(json.loads(json.dumps(config.to_dict()))).to_json() == config.to_json()
    assert config.replace() == config
    assert hash(cls.parse_json(config.to_json())) == hash(config)


@pytest.mark.parametrize("name", CLASSES)
def test_unknown_keys_are_errors_and_the_schema_says_so(name: str) -> None:
    cls = CLASSES[name]
    with pytest.raises(ConfigError, match="unknown key 'no_such_key' "):
        cls.parse({"no_such_key": 1})
    schema = cls.model_json_schema()
    assert schema["additionalProperties"] is False
    assert set(schema.get("properties", {})) == set(cls.model_fields)
