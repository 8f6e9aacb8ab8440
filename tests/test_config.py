"""Configs: strict, frozen, round-tripping, and with errors one can act on."""

import json
import math
from typing import Literal

import pytest
from hypothesis import Phase, find, given, settings
from pydantic import Field, ValidationError, model_validator

from ldmkit import AssetPath, Config
from ldmkit.errors import ConfigError, LdmkitError
from ldmkit.testing.strategies import configs


class Inner(Config):
    width: int = Field(8, ge=1, multiple_of=4)
    mode: Literal["plain", "fancy"] = "plain"


class Outer(Config):
    channels: int = Field(4, ge=1, le=64)
    dropout: float = Field(0.0, ge=0, lt=1)
    bias: bool = True
    name: str = "x"
    note: str | None = None
    multipliers: tuple[int, ...] = (1, 2, 4)
    pair: tuple[int, float] = (1, 2.5)
    sizes: int | tuple[int, ...] = 3
    vocabulary: AssetPath | None = None
    merges: AssetPath = "merges.txt"
    inner: Inner = Inner()
    maybe: Inner | None = None
    blocks: tuple[Inner, ...] = ()
    many: tuple[Inner, ...] | None = None
    table: dict[str, int] = Field({})

    @model_validator(mode="after")
    def _fits(self) -> "Outer":
        if len(self.multipliers) > self.channels:
            raise ValueError(f"{len(self.multipliers)} multipliers for {self.channels} channels")
        return self


class Strict(Config):
    size: int
    rate: float = Field(gt=0)


@given(configs(Outer))
def test_json_round_trip(config: Outer) -> None:
    text = config.to_json()
    assert Outer.parse_json(text) == config
    assert Outer.parse(config.to_dict()) == config
    assert Outer.parse(json.loads(text)).to_json() == text
    assert config.replace() == config


@given(configs(Strict))
def test_the_strategy_finds_required_fields(config: Strict) -> None:
    assert config.rate > 0
    assert Strict.parse(config.to_dict()) == config


@pytest.mark.parametrize("field", sorted(Outer.model_fields))
def test_the_strategy_changes_every_field(field: str) -> None:
    """`find` raises NoSuchExample otherwise."""
    quick = settings(phases=[Phase.generate], max_examples=2000, database=None)
    config = find(configs(Outer), lambda config: getattr(config, field) != getattr(Outer(), field), settings=quick)
    assert config != Outer()


@pytest.mark.parametrize(
    ("values", "text"),
    [
        # types, as strict as JSON
        ({"channels": "4"}, "Outer: channels = '4': Input should be a valid integer"),
        ({"channels": True}, "channels = True: Input should be a valid integer"),
        ({"channels": 4.0}, r"channels = 4\.0: Input should be a valid integer"),
        ({"dropout": "0.1"}, r"dropout = '0\.1': Input should be a valid number"),
        ({"dropout": False}, "dropout = False: Input should be a valid number"),
        ({"bias": 1}, "bias = 1: Input should be a valid boolean"),
        ({"bias": "yes"}, "bias = 'yes': Input should be a valid boolean"),
        ({"name": 3}, "name = 3: Input should be a valid string"),
        ({"name": None}, "name = None: Input should be a valid string"),
        ({"multipliers": 3}, "multipliers = 3: Input should be a valid array"),
        ({"multipliers": [1, "2"]}, r"multipliers\.1 = '2': Input should be a valid integer"),
        ({"pair": [1]}, r"key 'pair\.1' is required"),
        # values
        ({"channels": 0}, "channels = 0: Input should be greater than or equal to 1"),
        ({"channels": 65}, "channels = 65: Input should be less than or equal to 64"),
        ({"dropout": 1.0}, r"dropout = 1\.0: Input should be less than 1"),
        ({"dropout": math.nan}, "dropout = nan: Input should be a finite number"),
        ({"dropout": math.inf}, "dropout = inf: Input should be a finite number"),
        ({"inner": {"mode": "grand"}}, r"inner\.mode = 'grand': Input should be 'plain' or 'fancy'"),
        ({"inner": {"width": 6}}, r"inner\.width = 6: Input should be a multiple of 4"),
        ({"channels": 2}, "Outer: .*3 multipliers for 2 channels"),
        ({"channels": object()}, "holds a value that is not JSON: <object object"),
        (5, "Outer: expected a mapping of settings, got 5"),
        # keys
        ({"chanels": 8}, r"unknown key 'chanels' \(= 8\); did you mean 'channels'\?"),
        ({"zzz": 8}, "unknown key 'zzz' .*known keys: bias, blocks, channels, dropout"),
        ({"inner": {"widht": 8}}, r"unknown key 'inner\.widht' \(= 8\); did you mean 'width'\?"),
        ({"maybe": {"widht": 8}}, r"unknown key 'maybe\.widht' \(= 8\); did you mean 'width'\?"),
        ({"blocks": [{}, {"widht": 8}]}, r"unknown key 'blocks\.1\.widht' \(= 8\); did you mean 'width'\?"),
        ({"many": [{"widht": 8}]}, r"unknown key 'many\.0\.widht' \(= 8\); did you mean 'width'\?"),
    ],
)
def test_what_is_wrong_is_named(values: dict, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Outer.parse(values)


def test_all_mistakes_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        Outer.parse({"channels": 0, "chanels": 1, "bias": 2}, owner="The thing")
    text = str(caught.value)
    assert text.startswith("The thing: ")
    for part in ("channels = 0", "'chanels'", "bias = 2"):
        assert part in text
    with pytest.raises(ConfigError, match="key 'size' is required; key 'rate' is required"):
        Strict.parse({})


def test_broken_json() -> None:
    with pytest.raises(ConfigError, match="Outer: Invalid JSON: EOF"):
        Outer.parse_json('{"channels": 4')
    with pytest.raises(ConfigError, match=r"Outer: .*should be an object"):
        Outer.parse_json("[1, 2]")


def test_configs_are_frozen_and_replaced() -> None:
    config = Outer()
    with pytest.raises(ValidationError, match="frozen"):
        config.channels = 8  # type: ignore[misc]
    assert config.replace(channels=8, inner={"width": 12}) == Outer(channels=8, inner=Inner(width=12))
    assert config.replace(inner=Inner(width=12)).inner.width == 12
    assert config == Outer()
    with pytest.raises(ConfigError, match="did you mean 'channels'"):
        config.replace(chanels=8)


def test_whole_numbers_serve_as_floats() -> None:
    config = Outer.parse({"dropout": 0, "pair": [1, 2]})
    assert isinstance(config.dropout, float)
    assert config == Outer(dropout=0.0, pair=(1, 2.0))
    assert Outer.parse_json(config.to_json()) == config


def test_asset_fields_are_found() -> None:
    assert Outer.asset_fields() == ("vocabulary", "merges")
    assert Inner.asset_fields() == ()


def test_the_error_is_both_ours_and_a_value_error() -> None:
    assert issubclass(ConfigError, LdmkitError)
    assert issubclass(ConfigError, ValueError)


def test_nested_configs_are_named_after_their_part() -> None:
    class Thing:
        class Config(Config):
            size: int = 1

    with pytest.raises(ConfigError, match=r"Thing: unknown key 'sise' \(= 1\); did you mean 'size'\?"):
        Thing.Config.parse({"sise": 1})
