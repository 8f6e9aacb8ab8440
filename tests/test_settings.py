"""What is assigned to a pipeline is taken as the constructor takes it; diffusers' names lead to the ones here."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmkit import FlowSchedule, Pipeline, Prediction
from ldmkit.errors import ConfigError, InputError, InputTypeError
from tests.conditions import tiny_pipeline


@pytest.fixture
def pipe(tmp_path: Path) -> Pipeline:
    return tiny_pipeline(tmp_path)


def test_assigned_is_as_constructed(pipe: Pipeline, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "sampler": {"name": "ddim", "eta": 0.5},
        "schedule": {"kind": "flow", "shift": 3.0},
        "prediction": "flow",
        "defaults": {"height": 16, "width": 32, "num_inference_steps": 2},
    }
    parts = {"autoencoder": pipe.autoencoder, "denoiser": pipe.denoiser, "conditioner": pipe.conditioner}
    constructed = Pipeline(**parts, **options)
    for name, value in options.items():
        setattr(pipe, name, value)
    assert isinstance(pipe.schedule, FlowSchedule)
    wanted = constructed("a pear", seed=1, output_type="latent", progress=False).images
    assert wanted.shape == (1, 4, 8, 16)
    for same in (pipe, copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):
        assert torch.equal(same("a pear", seed=1, output_type="latent", progress=False).images, wanted)
    pipe.save_pretrained(tmp_path / "saved")
    assert Pipeline.from_pretrained(tmp_path / "saved").prediction.config == Prediction.Config(type="flow")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("schedule", {"beta_strat": 0.1}, ConfigError, "did you mean 'beta_start'"),
        ("prediction", "velocity", ConfigError, "type = 'velocity'"),
        ("prediction", 5, ConfigError, "expected a mapping of settings, got 5"),
        ("defaults", {"heigth": 8}, ConfigError, "did you mean 'height'"),
        ("sampler", None, InputTypeError, "sampler must be a Sampler, a name or a mapping"),
        ("scheduler", "euler", InputError, r"what diffusers calls so is here sampler \(steps\), schedule"),
        ("vae", None, InputError, "a Pipeline has no 'vae' to assign: .* autoencoder"),
    ],
)
def test_what_cannot_be_is_named_when_it_is_assigned(
    pipe: Pipeline, name: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        setattr(pipe, name, value)


def test_names_that_are_elsewhere(pipe: Pipeline) -> None:
    with pytest.raises(AttributeError, match="no attribute 'unet'; what diffusers calls so is here denoiser"):
        _ = pipe.unet  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"'Pipeline' object has no attribute 'unnet'$"):
        _ = pipe.unnet  # type: ignore[attr-defined]
    assert not hasattr(pipe, "scheduler")


def test_a_subclass_may_have_these_names() -> None:
    class Familiar(Pipeline):
        @property
        def scheduler(self) -> Any:
            return self.sampler

        @scheduler.setter
        def scheduler(self, value: Any) -> None:
            self.sampler = value

    denoiser = {"name": "unet", "in_channels": 3, "out_channels": 3, "cross_attention_dim": None, "block_out_channels": [8]}
    sizes = {"layers_per_block": 1, "transformer_layers_per_block": [0], "norm_num_groups": 4}
    pipe = Familiar(autoencoder={"name": "identity", "channels": 3}, denoiser={**denoiser, **sizes})
    pipe.scheduler = "euler"
    assert repr(pipe.scheduler) == "EulerSampler()"
