"""Folders in the diffusers layout, as they are in the wild: loaded, run beside diffusers, saved, and loaded there again."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmkit import Pipeline
from ldmkit.checkpoints.assembling import UnexpectedKeysWarning
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, InputError, UnknownPartError
from ldmkit.testing.accuracy import assert_as_accurate
from tests.checkpoint_peers import latents, stable_diffusion
from tests.peers import in_float64


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def saved(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "sd"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def exact(peer: Any) -> torch.Tensor:
    """diffusers' latents in float64, its scheduler's tables too."""
    with in_float64():
        wide = copy.deepcopy(peer).to(torch.float64)
        wide.scheduler = type(peer.scheduler).from_config(peer.scheduler.config)
        return latents(wide, dtype=torch.float64)


@pytest.fixture(scope="module")
def reference(peer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What diffusers draws, in float32 and in float64."""
    return latents(peer), exact(peer)


def test_drawn_as_by_diffusers_and_back(folder: Path, tmp_path: Path, reference: Any) -> None:
    theirs, oracle = reference
    pipe = Pipeline.from_pretrained(folder)
    assert_as_accurate(latents(pipe), theirs, oracle)
    assert pipe.defaults.height == pipe.defaults.width == 16
    assert [len(accounting.mapped) for accounting in pipe.accounting.values()] == [
        len(module.state_dict()) for module in (pipe.denoiser, pipe.autoencoder, pipe.conditioner)
    ]
    written = pipe.save_pretrained(tmp_path / "written", format="diffusers")
    again = diffusers.StableDiffusionPipeline.from_pretrained(written)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(latents(again), theirs)
    assert torch.equal(latents(Pipeline.from_pretrained(written)), latents(pipe))
    ours = pipe.save_pretrained(tmp_path / "ours")
    assert torch.equal(latents(Pipeline.from_pretrained(ours)), latents(pipe))


@pytest.mark.parametrize("unet", ["sd2", "inpainting"])
def test_other_architectures(tmp_path: Path, unet: str) -> None:
    peer = stable_diffusion(tmp_path / "tokenizer", unet, prediction_type="v_prediction")
    peer.save_pretrained(tmp_path / "theirs")
    pipe = Pipeline.from_pretrained(tmp_path / "theirs")
    again = type(peer).from_pretrained(pipe.save_pretrained(tmp_path / "ours", format="diffusers"))
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(peer, name).state_dict(), getattr(again, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.scheduler.config.prediction_type == pipe.prediction.config.type == "v_prediction"
    if unet == "sd2":
        assert_as_accurate(latents(pipe), latents(peer), exact(peer))


def with_legacy_attention(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = load_file(path)
    for new, name in old.items():
        tensors = {key.replace(f".0.{new}.", f".0.{name}."): value for key, value in tensors.items()}
    assert any(".proj_attn." in key for key in tensors)
    save_file(tensors, path)


def with_shards(folder: Path) -> None:
    for name in ("unet", "vae"):
        cls = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}[name]
        module = cls.from_pretrained(folder / name)
        (folder / name / "diffusion_pytorch_model.safetensors").unlink()
        module.save_pretrained(folder / name, max_shard_size="30KB")
        assert len(list((folder / name).glob("*-of-*.safetensors"))) > 2


def renamed_text(folder: Path, prefix: str) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    tensors = {prefix + key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    save_file({**tensors, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, path)


def with_one_tokenizer_file(folder: Path) -> None:
    assert (folder / "tokenizer" / "tokenizer.json").exists()
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def with_safety_checker(folder: Path) -> None:
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    edit(folder / "model_index.json", feature_extractor=["transformers", "CLIPFeatureExtractor"])


@pytest.mark.parametrize(
    "change",
    [
        with_legacy_attention,
        with_shards,
        lambda folder: renamed_text(folder, ""),
        lambda folder: renamed_text(folder, "text_model."),
        with_one_tokenizer_file,
        with_safety_checker,
    ],
    ids=["legacy attention", "shards", "without text_model", "with text_model", "tokenizer.json", "safety checker"],
)
def test_the_wild(folder: Path, change: Any, saved: Path) -> None:
    change(folder)
    assert torch.equal(latents(Pipeline.from_pretrained(folder)), latents(Pipeline.from_pretrained(saved)))


@pytest.mark.parametrize("shards", [False, True])
def test_variants(saved: Path, peer: Any, tmp_path: Path, shards: bool) -> None:
    half = copy.deepcopy(peer).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16", **({"max_shard_size": "20KB"} if shards else {}))
    with pytest.raises(CheckpointError, match="is missing; there is variant = 'fp16'"):
        Pipeline.from_pretrained(tmp_path / "half")
    pipe = Pipeline.from_pretrained(tmp_path / "half", variant="fp16", dtype="auto")
    assert pipe.dtype == torch.float16
    assert all(torch.equal(value, pipe.denoiser.state_dict()[key]) for key, value in half.unet.state_dict().items())


def test_replaced_parts_are_not_read(folder: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    (folder / "scheduler" / "scheduler_config.json").write_text("{}")
    own = {"sampler": "euler", "schedule": {"timestep_spacing": "trailing"}, "prediction": "v_prediction"}
    pipe = Pipeline.from_pretrained(folder, conditioner=None, **own, safety_checker=None)
    assert pipe.conditioner is None
    assert pipe.prediction.config.type == "v_prediction"


def test_keys_too_many_are_an_error_unless_allowed(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "loss.logvar": torch.zeros(1)}, path)
    with pytest.raises(ArchitectureMismatchError, match=r"unexpected  loss.logvar \(1,\)"):
        Pipeline.from_pretrained(folder)
    with pytest.warns(UnexpectedKeysWarning, match=r"loss\.logvar"):
        pipe = Pipeline.from_pretrained(folder, strict=False)
    report = pipe.accounting["autoencoder"].report()
    assert "1 ignored" in report
    assert "loss.logvar  (not known to the model, and strict=False)" in report


@pytest.mark.parametrize(
    ("file", "changes", "error", "message"),
    [
        ("model_index.json", {"controlnet": ["diffusers", "ControlNetModel"]}, ConfigError, "controlnet=None"),
        ("model_index.json", {"unet": ["diffusers", 3]}, CheckpointError, "must be the names of a library and a class"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderDC"]}, UnknownPartError, "no autoencoder reads AutoencoderDC"),
        ("unet/config.json", {"act_fn": "mish"}, ConfigError, "act_fn = 'mish'"),
        ("unet/config.json", {"block_out_channels": 3}, ConfigError, "a value of a wrong type or length"),
        ("vae/config.json", {"latent_channels": "four"}, ConfigError, "latent_channels = 'four'"),
        ("vae/config.json", {"layers_per_block": 3}, ArchitectureMismatchError, "missing .*resnets"),
        ("scheduler/scheduler_config.json", {"_class_name": "Flow"}, ConfigError, "the scheduler 'Flow' is not supported"),
        ("text_encoder/config.json", {"model_type": "t5"}, ConfigError, "model_type = 't5'"),
    ],
)
def test_what_cannot_be_served_is_named(folder: Path, file: str, changes: Any, error: type, message: str) -> None:
    edit(folder / file, **changes)
    with pytest.raises(error, match=message):
        Pipeline.from_pretrained(folder)


def test_pickles_are_not_read(folder: Path) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(CheckpointError, match=r"only diffusion_pytorch_model.bin; pickles can run code"):
        Pipeline.from_pretrained(folder)


def test_what_diffusers_cannot_hold_is_said_before_writing(saved: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(saved)
    pipe.sampler = "restart"
    with pytest.raises(ConfigError, match="no scheduler for the sampler 'restart'"):
        pipe.save_pretrained(tmp_path / "x", format="diffusers")
    pipe.sampler, pipe.conditioner = "euler", None
    with pytest.raises(InputError, match="diffusers has no pipeline for the encoders"):
        pipe.save_pretrained(tmp_path / "x", format="diffusers")
    with pytest.raises(InputError, match="format = 'onnx'"):
        pipe.save_pretrained(tmp_path / "x", format="onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


def test_nothing_is_drawn_at_random(saved: Path) -> None:
    """Weights are made without memory and without the caller's random numbers."""
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pipeline.from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is no pipeline: it has neither pipeline\.json.* as diffusers$"):
        Pipeline.from_pretrained(tmp_path)
    (tmp_path / "v1-5.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"v1-5\.safetensors in it: from_single_file reads such"):
        Pipeline.from_pretrained(tmp_path)
