"""Single files of Stable Diffusion XL, base and refiner: two text encoders out of one file, every key accounted for."""

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldmkit import Pipeline, build
from ldmkit.checkpoints.assembling import prepare
from ldmkit.checkpoints.compvis import clip_map, open_clip_map, unet_map, vae_map
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.recognise import recognise
from ldmkit.checkpoints.single_file import source_of
from ldmkit.errors import ArchitectureMismatchError
from ldmkit_text.clip import PRESETS
from tests.checkpoint_peers import SD, write_tokenizer
from tests.checkpoints.test_keymap import on_meta, recorded
from tests.checkpoints.test_sdxl import drawn, stable_diffusion_xl
from tests.checkpoints.test_single_file import GROUPS

CONFIG = {
    "unet": {**GROUPS, "attention_head_dim": [2, 3, 4]},
    "vae": GROUPS,
    "text_encoder": {"num_attention_heads": 2},
    "text_encoder_2": {"num_attention_heads": 2},
}
"""What shapes do not tell, and toys have otherwise than full-size models."""
REFINER = {name: values for name, values in CONFIG.items() if name != "text_encoder"}


def stability(peer: Any) -> dict[str, Tensor]:
    """A pipeline of diffusers under the names of Stability's code, by the key maps' inverse."""
    attention = tuple("CrossAttn" in name for name in peer.unet.config.down_block_types)
    parts = {
        "unet": unet_map(levels=len(attention), layers_per_block=2, attention=attention).prefixed("model.diffusion_model"),
        "vae": vae_map(levels=2, layers_per_block=2).prefixed("first_stage_model"),
    }
    if peer.text_encoder is not None:
        parts["text_encoder"] = clip_map().prefixed("conditioner.embedders.0.transformer")
    place = f"conditioner.embedders.{int(peer.text_encoder is not None)}.model"
    parts["text_encoder_2"] = open_clip_map(layers=3).prefixed(place)
    tensors: dict[str, Tensor] = {f"{place}.logit_scale": torch.ones(())}
    for name, keymap in parts.items():
        state = getattr(peer, name).state_dict()
        tensors |= keymap.restore({key.removeprefix("text_model."): value for key, value in state.items()})
    return {key: value.contiguous().clone() for key, value in tensors.items()}


@pytest.fixture(scope="module", params=[False, True], ids=["base", "refiner"])
def refiner(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def peer(refiner: bool, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With the scheduler that the published model has."""
    made = stable_diffusion_xl(tmp_path_factory.mktemp("tokenizers"), refiner=refiner)
    made.scheduler = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", use_karras_sigmas=False)
    return made


@pytest.fixture(scope="module")
def file(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file, and one vocabulary beside it, whose own pad token is the first encoder's."""
    folder = tmp_path_factory.mktemp("single")
    write_tokenizer(folder / "tokenizer")
    save_file(stability(peer), folder / "xl.safetensors")
    return folder / "xl.safetensors"


def test_loaded_as_from_its_folder(file: Path, peer: Any, refiner: bool, tmp_path: Path) -> None:
    peer.save_pretrained(tmp_path / "xl")
    pipe = Pipeline.from_single_file(file, REFINER if refiner else CONFIG)
    folder = Pipeline.from_pretrained(tmp_path / "xl")
    assert torch.equal(drawn(pipe), drawn(folder))
    assert pipe.conditioner is not None
    assert pipe.conditioner.second.config.pad_token == "!"
    assert refiner or pipe.conditioner.first.config.pad_token == "<|endoftext|>"
    assert pipe.conditioner.config.zero_null is not refiner
    assert pipe.autoencoder.config.scaling_factor == 0.13025
    assert (pipe.prediction.config.type, pipe.defaults.height, type(pipe.sampler).__name__) == ("epsilon", 1024, "EulerSampler")
    ignored = {key for accounting in pipe.accounting.values() for key in accounting.ignored}
    mapped = {key for accounting in pipe.accounting.values() for key in accounting.mapped.values()}
    assert {key.rpartition(".")[2] for key in ignored} == {"logit_scale"}
    assert mapped | ignored == set(SafetensorsFile(file).entries)


@pytest.mark.parametrize("key", ["conditioner.embedders.7.net.weight", "conditioner.other.weight"])
def test_keys_of_no_encoder_are_named(file: Path, refiner: bool, tmp_path: Path, key: str) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    save_file({**SafetensorsFile(file).tensors(), key: torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(ArchitectureMismatchError, match=f"unexpected  {key}"):
        Pipeline.from_single_file(tmp_path / "more.safetensors", REFINER if refiner else CONFIG)


def full_size(shared: Path, vocabulary: Path) -> dict[str, Tensor]:
    """All of the base model, on meta: the U-Net as published, the rest as in the models that share it."""
    paths = {"vocab": str(vocabulary / "vocab.json"), "merges": str(vocabulary / "merges.txt")}
    with torch.device("meta"):
        bigg = build("conditioner", "clip-text", **{**PRESETS["open-clip-bigg"], "vocab_size": 49408, **paths}).state_dict()
    clip = on_meta(recorded(shared, "diffusers_keys_sd15_text"))
    clip_l = {key.removeprefix("text_model."): value for key, value in clip.items()}
    return {
        **on_meta(recorded(shared, "sgm_keys_sd_xl_base")),
        **vae_map(levels=4, layers_per_block=2)
        .prefixed("first_stage_model")
        .restore(on_meta(recorded(shared, "diffusers_keys_sd15_vae"))),
        **clip_map().prefixed("conditioner.embedders.0.transformer").restore(clip_l),
        **open_clip_map(layers=32).prefixed("conditioner.embedders.1.model").restore(bigg),
    }


def test_the_full_size_model_is_recognised_whole(shared: Path, tmp_path: Path) -> None:
    """Every key has its place in parts whose configs come from the shapes alone."""
    vocabulary = write_tokenizer(tmp_path / "tokenizer")
    tensors = full_size(shared, vocabulary)
    found = {component.name: component for component in recognise({key: tuple(t.shape) for key, t in tensors.items()})}
    assert found["unet"].config["transformer_layers_per_block"][1:] == [2, 10]
    assert found["unet"].config["attention_head_dim"] == [5, 10, 20]
    mapped: set[str] = set()
    for kind, names in (("denoiser", ["unet"]), ("autoencoder", ["vae"]), ("conditioner", ["text_encoder", "text_encoder_2"])):
        sources = {name: source_of(found[name], tensors, tmp_path / "xl") for name in names}
        _, _, accounting = prepare(kind, sources, {"tokenizer": vocabulary, "tokenizer_2": vocabulary})
        accounting.check()
        assert not accounting.ignored
        mapped |= set(accounting.mapped.values())
    assert mapped == set(tensors)
