"""What all kinds of parts promise: strict configs that round-trip, files that give the same part back, no deeds aside."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ldmkit.checkpoints.parts import load_part, save_part
from ldmkit.checkpoints.weights import load_weights, read_weights, write_weights
from ldmkit.config import Config
from ldmkit.errors import ConfigError
from ldmkit.testing.conformance import watch
from ldmkit.testing.conformance.core import Property, Trial, apart, same_bits


class Use(Protocol):
    """Has a part do what its kind does, on numbers of a dtype that follow from the case; all that comes out."""

    def __call__(self, part: Any, t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]: ...


UNKNOWN = "no_part_has_a_field_of_this_name"


def strict(t: Trial) -> None:
    """The nested `Config` derives from ldmkit.Config; unknown keys are a ConfigError that names them; a config is frozen."""
    cls = t.subject.part
    assert issubclass(getattr(cls, "Config", type(None)), Config), f"{cls.__name__}.Config is no ldmkit.Config"
    try:
        cls.build(**{**t.values, UNKNOWN: 1})
    except ConfigError as error:
        assert UNKNOWN in str(error), f"the error does not name the unknown key: {error}"
    else:
        raise AssertionError(f"build(..., {UNKNOWN}=1) is taken without an error")
    config = cls.Config.parse(t.values)
    for name in cls.Config.model_fields:
        try:
            setattr(config, name, getattr(config, name))
        except ValidationError:
            continue
        raise AssertionError(f"config.{name} can be assigned")


def round_trip(t: Trial) -> None:
    """A config is JSON: config -> JSON -> config is the identity, and a part keeps the config it was built from."""
    cls = t.subject.part
    config = cls.Config.parse(t.values)
    for what, again in (
        ("JSON text", cls.Config.parse_json(config.to_json())),
        ("plain values", cls.Config.parse(config.to_dict())),
    ):
        assert again == config, f"through {what}: {again!r}, not {config!r}"
    kept = t.build().config
    assert kept == config, f"the part's config is {kept!r}, built from {config!r}"


def documented(t: Trial) -> None:
    """The class says in a docstring what it is, and its config what each field means."""
    cls = t.subject.part
    assert (cls.__doc__ or "").strip(), f"{cls.__name__} has no docstring"
    own = cls.Config.__doc__ or ""
    for base in cls.Config.__mro__:
        own += (base.__doc__ or "") if base is not Config and issubclass(base, Config) else ""
    lacking = [name for name in cls.Config.model_fields if name not in own]
    assert not lacking, f"the docstring of {cls.__name__}.Config does not mention {', '.join(lacking)}"


def properties_of_all(use: Use, kind: str) -> tuple[Property, ...]:
    """The properties that every kind has, given how a part of it is used, and the public name of its interface."""

    def deterministic(t: Trial) -> None:
        """The same arguments give the same bits, whatever was computed before."""
        part = t.network(torch.float32)
        first, again = use(part, t), use(part, t)
        for got, want in zip(again, first, strict=True):
            assert same_bits(got, want), f"a second call gives other numbers: {apart(got, want)}"

    def no_deeds(t: Trial) -> None:
        """Using a part writes no files, opens no connections, starts no processes and spends no global random numbers."""
        part = t.network(torch.float32)
        with watch.deeds() as seen:
            use(part, t)
        assert not seen, f"it {'; it '.join(seen[:3])}"

    def saved(t: Trial) -> None:
        """`save_part` and `load_part` give a part back that computes the same bits, from JSON and safetensors, no pickles."""
        part = t.network(torch.float32)
        want = use(part, t)
        with tempfile.TemporaryDirectory() as folder:
            loaded = _through_files(part, t, Path(folder) / "part")
        for got, wanted in zip(use(loaded, t), want, strict=True):
            assert same_bits(got, wanted), f"what was loaded computes other numbers: {apart(got, wanted)}"

    return (
        Property("config is strict", strict, "ldmkit.Config"),
        Property("config round-trips", round_trip, "ldmkit.Config"),
        Property("documented", documented, "ldmkit.Part", once=True),
        Property("same bits again", deterministic, kind),
        Property("no files, network, global random numbers", no_deeds, kind),
        Property("saved and loaded, bit for bit", saved, "ldmkit.save_part"),
    )


def _through_files(part: Any, t: Trial, folder: Path) -> Any:
    if t.subject.name is not None:
        save_part(part, folder)
        pickles = [p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pkl", ".pt", ".pth")]
        assert not pickles, f"it is saved as {', '.join(pickles)}"
        return load_part(folder, kind=t.subject.kind)
    loaded = type(part)(type(part).Config.parse_json(part.config.to_json()))
    if isinstance(part, nn.Module):
        folder.mkdir()
        write_weights(folder, part.state_dict())
        load_weights(loaded, read_weights(folder), source="its own weights")
        loaded.eval()
    return loaded
