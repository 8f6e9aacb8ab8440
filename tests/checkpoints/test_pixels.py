"""Models of pixels, in diffusers' folders of DDPM and DDIM: no autoencoder, and x0 held within [-1, 1]."""

import importlib
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from ldmkit import NoiseSchedule, Pipeline, build
from ldmkit.checkpoints.schedulers import read_scheduler, write_scheduler
from ldmkit.errors import ConfigError, InputError
from ldmkit.testing.accuracy import assert_as_accurate
from tests.ldm_peers import PLAIN, quiet
from tests.network_peers import randomise
from tests.peers import in_float64

DDPM = {**PLAIN, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "attention_head_dim": None}
"""Of the published ones, in small."""
SHAPE = (2, 3, 16, 16)


def peer(scheduler: str, **settings: Any) -> Any:
    unet = diffusers.UNet2DModel(**DDPM, in_channels=3, out_channels=3, sample_size=16).eval()
    randomise(unet, 1)
    pipeline = getattr(diffusers, scheduler.replace("Scheduler", "Pipeline"))
    return quiet(pipeline(unet=unet, scheduler=getattr(diffusers, scheduler)(**settings)))


def theirs(pipe: Any, dtype: torch.dtype, steps: int) -> Tensor:
    """Their pictures as raw pixels in [-1, 1], with noise drawn in float32 whatever the dtype."""
    generator = torch.Generator().manual_seed(5)

    def draw(shape: Any, **options: Any) -> Tensor:
        return torch.randn(tuple(shape), generator=generator).to(options.get("dtype") or dtype)

    with pytest.MonkeyPatch.context() as patch:
        for module in (type(pipe).__module__, type(pipe.scheduler).__module__):
            patch.setattr(importlib.import_module(module), "randn_tensor", lambda shape, *_, **options: draw(shape, **options))
        return torch.from_numpy(pipe(batch_size=2, num_inference_steps=steps, output_type="np").images).movedim(-1, 1)


def ours(pipe: Pipeline, steps: int) -> Tensor:
    call = {"num_images_per_prompt": 2, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    return pipe(num_inference_steps=steps, progress=False, **call).images


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        ("DDPMScheduler", {"variance_type": "fixed_large", "clip_sample": True}),
        ("DDPMScheduler", {"clip_sample": True, "clip_sample_range": 0.5}),
        ("DDIMScheduler", {"clip_sample": False}),
    ],
)
def test_a_folder_of_pixels(scheduler: str, settings: dict[str, Any], tmp_path: Path) -> None:
    pipe = peer(scheduler, **settings)
    pipe.save_pretrained(tmp_path / "theirs")
    wide = quiet(type(pipe).from_pretrained(tmp_path / "theirs", torch_dtype=torch.float64))
    with in_float64():
        oracle = theirs(wide, torch.float64, 5)
    read = Pipeline.from_pretrained(tmp_path / "theirs")
    assert_as_accurate(ours(read, 5), theirs(pipe, torch.float32, 5), oracle)
    assert read.defaults.to_dict() | {"height": 16, "width": 16, "guidance_scale": 1.0} == read.defaults.to_dict()
    assert read.defaults.num_inference_steps == (1000 if scheduler == "DDPMScheduler" else 50)
    written = read.save_pretrained(tmp_path / "ours", format="diffusers")
    again = quiet(diffusers.DiffusionPipeline.from_pretrained(written))
    assert type(again) is type(pipe)
    assert_as_accurate(theirs(again, torch.float32, 5), theirs(pipe, torch.float32, 5), oracle)
    own = Pipeline.from_pretrained(read.save_pretrained(tmp_path / "own"))
    assert torch.equal(ours(own, 5), ours(read, 5))


def test_what_is_clipped_stays_within(tmp_path: Path) -> None:
    peer("DDPMScheduler").save_pretrained(tmp_path / "ddpm")
    index = json.loads((tmp_path / "ddpm" / "scheduler" / "scheduler_config.json").read_text())
    assert index["clip_sample"] is True
    pipe = Pipeline.from_pretrained(tmp_path / "ddpm", sampler="ddim")
    seen: list[Tensor] = []
    pipe(num_inference_steps=3, progress=False, callback_on_step_end=lambda *now: seen.append(now[-1]["denoised"]))
    assert max(float(x0.abs().max()) for x0 in seen) == 1.0
    with pytest.raises(ConfigError, match=r"DDIMScheduler .* clip = 1 of the prediction"):
        pipe.save_pretrained(tmp_path / "ddim", format="diffusers")
    pipe.sampler, pipe.conditioner = "ddpm", build("conditioner", "class-label", num_classes=2, mode="labels")
    with pytest.raises(ConfigError, match="ClassLabelConditioner has no counterpart in diffusers"):
        pipe.save_pretrained(tmp_path / "classes", format="diffusers")
    pipe.sampler, pipe.conditioner = "euler", None
    pipe.prediction.config = pipe.prediction.config.replace(clip=None)
    with pytest.raises(InputError, match=r"no pipeline for pixels .* EulerDiscreteScheduler"):
        pipe.save_pretrained(tmp_path / "euler", format="diffusers")


def test_clipping_is_read_and_written() -> None:
    values = {"_class_name": "DDPMScheduler", "clip_sample": True, "clip_sample_range": 2.5}
    read = read_scheduler(values)
    assert read["prediction"] == {"type": "epsilon", "clip": 2.5}
    assert "clip" not in read_scheduler({**values, "clip_sample": False})["prediction"]
    schedule = NoiseSchedule.Config.parse(read["schedule"]).to_dict()
    name, config = "ddpm", {key: value for key, value in read["sampler"].items() if key != "name"}
    written = write_scheduler(name, config, {}, schedule, read["prediction"])
    assert {key: written[key] for key in values} == values
