"""Thousands of valid files with something changed: an error of ours that names the file, or what is really there."""

from __future__ import annotations

import contextlib
import io
import json
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from torch import Tensor

from ldmkit import Pipeline
from ldmkit.checkpoints.compvis import ldm_bert_map, unet_map, vae_map
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.inspecting import inspect
from ldmkit.checkpoints.lora import pairs_of
from ldmkit.checkpoints.lora_files import read_lora
from ldmkit.checkpoints.lora_names import Layers
from ldmkit.checkpoints.pickles import read_pickle
from ldmkit.checkpoints.recognise import VAE
from ldmkit.checkpoints.recognise_unet import UNET
from ldmkit.checkpoints.textual_inversion import read_textual_inversion
from ldmkit.checkpoints.weights import read_weights
from ldmkit.errors import LdmkitError
from tests.checkpoint_peers import stable_diffusion, write_tokenizer
from tests.checkpoints.test_lora import draw, kohya
from tests.checkpoints.test_single_file import CONFIG, compvis
from tests.conditions import tiny_pipeline
from tests.ldm_peers import BERT, named, super_resolution, text_to_image, write_bert_tokenizer
from tests.mutants import SPOILT, Spoilt, bytes_mutants, changed, changes, json_mutants, safetensors_mutants

TENSORS = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.arange(5),
    "b": torch.zeros(()),
    "c": torch.ones(2, 0),
    "d": torch.ones(7).half(),
}
WHOLE = save(TENSORS, metadata={"format": "pt"})

Test = Callable[..., None]
T = TypeVar("T")


def fuzzed(examples: int, thousands: int) -> Callable[[Test], Callable[[Any], None]]:
    """A property twice: with some examples always, and with many in `make test-all`."""

    def decorate(test: Test) -> Any:
        def run(self: Any, data: st.DataObject, files: Any) -> None:
            test(data, files)

        some = settings(max_examples=examples)(given(data=st.data())(run))
        many = pytest.mark.exhaustive(settings(max_examples=thousands)(given(data=st.data())(run)))
        return type(test.__name__, (), {"test_some": some, "test_thousands": many, "__module__": test.__module__})

    return decorate


def unless_refused(read: Callable[[Path], T], path: Path) -> T | None:
    """What is read, or None after an error of ours that names the file."""
    try:
        return read(path)
    except LdmkitError as error:
        named = str(error)
    assert str(path) in named
    return None


def survives(path: Path, content: bytes, read: Callable[[Path], dict[str, Tensor]]) -> None:
    """Either an error of ours, or tensors that are really in the file."""
    path.write_bytes(content)
    tensors = unless_refused(read, path) or {}
    assert sum(tensor.nbytes for tensor in tensors.values()) <= len(content)
    for tensor in tensors.values():
        tensor.clone()


TELLING = r"conv_in|conv_out|\.0\.0\.|out\.2|middle|label_emb|_emb|embed|qkv|^betas|^scale|quant|down\.\d\.block\.0"
"""Keys by which single files are recognised."""


def single_files(folder: Path) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Tensors under CompVis' names, and what shapes do not tell: Stable Diffusion, latent diffusion with BERT, faces."""
    write_bert_tokenizer(write_tokenizer(folder / "tokenizer"))
    sd, text, plain = stable_diffusion(folder / "tokens"), text_to_image(folder / "words"), super_resolution()
    unet, groups = unet_map(levels=2, layers_per_block=2, attention=(True, False)).prefixed(UNET), {"norm_num_groups": 8}
    faces = unet_map(levels=2, layers_per_block=2, attention=(False, True), plain_head_channels=[32, 32]).prefixed(UNET)
    vae = {levels: vae_map(levels=levels, layers_per_block=2).prefixed(VAE) for levels in (3, 4)}
    bert = (ldm_bert_map(layers=2).prefixed("cond_stage_model.transformer"), text.bert)
    told = {"unet": {**groups, "attention_head_dim": 2}, "vae": {"norm_num_groups": 4}}
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()
    return [
        ({**compvis(sd), "betas": betas}, CONFIG),
        (
            {**named((unet, text.unet), (vae[4], text.vqvae), bert), "scale_factor": torch.tensor(0.18)},
            {**told, "bert": {key: BERT[key] for key in ("encoder_attention_heads", "head_dim")}},
        ),
        ({**named((faces, plain.unet), (vae[3], plain.vqvae)), "betas": betas}, {"unet": groups, "vae": told["vae"]}),
    ]


class Files:
    """What is spoilt, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        torch.save({"state_dict": TENSORS, "step": 3}, folder / "whole.ckpt")
        self.archive = (folder / "whole.ckpt").read_bytes()
        self.shards = folder / "shards"
        self.shards.mkdir()
        parts = ({key: TENSORS[key] for key in ("a.weight", "a.bias")}, {key: TENSORS[key] for key in "bcd"})
        names = ("x-1.safetensors", "x-2.safetensors")
        for part, name in zip(parts, names, strict=True):
            save_file(part, self.shards / name)
        where = {key: name for part, name in zip(parts, names, strict=True) for key in part}
        self.index = {"metadata": {"total_size": 1}, "weight_map": where}
        (self.shards / "model.safetensors.index.json").write_text(json.dumps(self.index))
        self.sd = folder / "sd"
        stable_diffusion(folder / "tokenizer").save_pretrained(self.sd)
        self.own = tiny_pipeline(folder).save_pretrained(folder / "own")
        pipe = Pipeline.from_pretrained(self.sd)
        self.layers = Layers(pipe.denoiser, pipe.conditioner)
        pairs = draw(self.layers, lambda name: name.endswith((".to_q", "conv_in", "q_proj")))
        told = {"lora_adapter_metadata": json.dumps({"unet.r": 3, "unet.alpha_pattern": {"to_q": 2}})}
        self.lora = save(kohya(pairs), metadata=told)
        self.files = single_files(folder)
        self.words = save({"clip_l": torch.randn(2, 12), "clip_g": torch.randn(2, 20)})


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("fuzz"))


@fuzzed(120, 8000)
def TestSafetensors(data: st.DataObject, files: Files) -> None:
    content = data.draw(safetensors_mutants(WHOLE))
    survives(files.folder / "mutant.safetensors", content, lambda path: SafetensorsFile(path).tensors())


@fuzzed(80, 3000)
def TestArchives(data: st.DataObject, files: Files) -> None:
    survives(files.folder / "mutant.ckpt", data.draw(bytes_mutants(files.archive)), read_pickle)


@fuzzed(80, 4000)
def TestPickles(data: st.DataObject, files: Files) -> None:
    """The pickle alone is spoilt, inside an archive that is none the worse for it."""
    made = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(files.archive)) as before, zipfile.ZipFile(made, "w") as after:
        for member in before.infolist():
            content = before.read(member)
            after.writestr(member, data.draw(bytes_mutants(content)) if member.filename.endswith(".pkl") else content)
    survives(files.folder / "mutant.ckpt", made.getvalue(), read_pickle)


@fuzzed(60, 3000)
def TestIndices(data: st.DataObject, files: Files) -> None:
    """Of shards: none outside the folder is read."""
    path = files.shards / "model.safetensors.index.json"
    with Spoilt(path, data.draw(json_mutants(files.index, SPOILT | st.sampled_from([*files.index["weight_map"].values()])))):
        tensors = unless_refused(read_weights, files.shards)
    assert tensors is None or tensors.keys() <= TENSORS.keys()
    assert tensors is None or all(torch.equal(value, TENSORS[key]) for key, value in tensors.items())


@fuzzed(12, 1500)
def TestConfigs(data: st.DataObject, files: Files) -> None:
    """Every JSON file of a folder, ours and diffusers'; a number may say that there are a trillion layers."""
    root = data.draw(st.sampled_from([files.sd, files.own]))
    path = data.draw(st.sampled_from(sorted(root.rglob("*.json"))))
    with Spoilt(path, data.draw(json_mutants(json.loads(path.read_text())))), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.suppress(LdmkitError):
            Pipeline.from_pretrained(root)


@fuzzed(20, 500)
def TestSingleFiles(data: st.DataObject, files: Files) -> None:
    """Keys and shapes are what a single file is recognised by, also by `ldmkit inspect`."""
    path = files.folder / "mutant.safetensors"
    tensors, told = files.files[data.draw(st.integers(0, len(files.files) - 1))]
    save_file(changed(tensors, data.draw(changes(sorted(tensors), TELLING))), path)
    unless_refused(inspect, path)
    pipe = unless_refused(lambda path: Pipeline.from_single_file(path, told), path)
    for module in {} if pipe is None else pipe.modules.values():
        assert not any(parameter.is_meta for parameter in module.parameters())


@fuzzed(60, 3000)
def TestLora(data: st.DataObject, files: Files) -> None:
    path = files.folder / "mutant.safetensors"
    path.write_bytes(data.draw(safetensors_mutants(files.lora)))
    read = unless_refused(lambda path: pairs_of(read_lora(path), files.layers, model="toy")[0], path)
    for pair in (read or {}).values():
        assert torch.isfinite(pair.down).all()
        assert torch.isfinite(pair.up).all()


@fuzzed(30, 1000)
def TestWords(data: st.DataObject, files: Files) -> None:
    path = files.folder / "mutant.safetensors"
    path.write_bytes(data.draw(safetensors_mutants(files.words)))
    words = unless_refused(read_textual_inversion, path) or {}
    assert all(torch.isfinite(vectors).all() for each in words.values() for vectors in each.values())


@fuzzed(30, 1000)
def TestInspection(data: st.DataObject, files: Files) -> None:
    """`ldmkit inspect` says what a file is, or that it is nothing known."""
    path = files.folder / "mutant.safetensors"
    path.write_bytes(data.draw(safetensors_mutants(data.draw(st.sampled_from([files.lora, files.words, WHOLE])))))
    unless_refused(inspect, path)
