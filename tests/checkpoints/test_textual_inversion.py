"""Textual inversion: every format, beside diffusers, saved and read again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ldmkit import Pipeline
from ldmkit.checkpoints.inspecting import inspect
from ldmkit.checkpoints.textual_inversion import read_textual_inversion
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, InputError, InputTypeError
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_text.added_tokens import expand
from tests.checkpoint_peers import stable_diffusion
from tests.checkpoints.test_sdxl import stable_diffusion_xl

PROMPT = "a cat like <Cat>, on <dog><cat>"


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def folder(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "sd"
    peer.save_pretrained(folder)
    return folder


@pytest.fixture
def pipe(folder: Path) -> Pipeline:
    return Pipeline.from_pretrained(folder)


def vectors(count: int, seed: int, width: int = 12) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


CAT, DOG = vectors(3, 1), vectors(1, 2)


def webui(path: Path) -> Path:
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": CAT}, "name": "<cat>", "step": 10, "sd_checkpoint": None}
    torch.save(content, path / "any.pt")
    return path / "any.pt"


def learned_bin(path: Path) -> Path:
    torch.save({"<cat>": CAT}, path / "learned_embeds.bin")
    return path / "learned_embeds.bin"


def stored(path: Path, name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path / name, metadata=metadata)
    return path / name


FORMATS: dict[str, Callable[[Path], Path]] = {
    "web UI, pickled": webui,
    "diffusers, pickled": learned_bin,
    "diffusers": lambda path: stored(path, "learned_embeds.safetensors", {"<cat>": CAT}),
    "web UI": lambda path: stored(path, "<cat>.safetensors", {"emb_params": CAT}),
    "cloneofsimo": lambda path: stored(path, "a.safetensors", {"unet:0:up": DOG, "<cat>": CAT}, {"<cat>": "<embed>"}),
    "kohya": lambda path: stored(path, "a.safetensors", {"lora_unet_x.alpha": DOG, "bundle_emb.<cat>.string_to_param.*": CAT}),
}


@pytest.mark.parametrize("style", FORMATS)
def test_formats(tmp_path: Path, style: str) -> None:
    file = FORMATS[style](tmp_path)
    words = read_textual_inversion(file, allow_pickle=True)
    assert [(word, list(each)) for word, each in words.items()] == [("<cat>", [""])]
    assert torch.equal(words["<cat>"][""], CAT)
    assert list(read_textual_inversion(file, "<other>", allow_pickle=True)) == ["<other>"]
    if "pickled" in style:
        with pytest.raises(CheckpointError, match="allow_pickle"):
            read_textual_inversion(file)


def test_sdxl(tmp_path: Path) -> None:
    file = stored(tmp_path, "style.safetensors", {"clip_l": vectors(2, 3, 12), "clip_g": vectors(2, 4, 20)})
    words = read_textual_inversion(file)
    assert {name: tuple(each.shape) for name, each in words["style"].items()} == {"clip_l": (2, 12), "clip_g": (2, 20)}


def test_inspected(tmp_path: Path) -> None:
    found = inspect(stored(tmp_path, "style.safetensors", {"clip_l": vectors(2, 3), "clip_g": vectors(2, 4, 20)}))
    assert (found.architecture, found.layout) == ("textual inversion", "embeddings of words")
    assert [(part.name, part.class_name) for part in found.components] == [("style", "clip_l 2 x 12, clip_g 2 x 20")]
    found = inspect(FORMATS["diffusers, pickled"](tmp_path), allow_pickle=True)
    assert [(part.name, part.class_name) for part in found.components] == [("<cat>", "3 x 12")]


def test_the_encoder_takes_what_fits_its_width(pipe: Pipeline) -> None:
    pipe.load_textual_inversion({"clip_l": CAT, "clip_g": vectors(3, 4, 20)}, "<cat>")
    table = pipe.conditioner.embeddings.token_embedding.weight  # type: ignore[union-attr]
    assert torch.equal(table[-3:], CAT)


def encoded(pipe: Any, prompt: str = PROMPT) -> Tensor:
    with torch.no_grad():
        if isinstance(pipe, Pipeline):
            assert pipe.conditioner is not None
            tokens_BLC = pipe.conditioner([prompt]).tokens_BLC
        else:
            tokens_BLC = pipe.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0]
    assert tokens_BLC is not None
    return tokens_BLC


def test_as_by_diffusers_and_back(peer: Any, pipe: Pipeline, tmp_path: Path) -> None:
    theirs = copy.deepcopy(peer)
    plain, before = encoded(pipe, "a cat"), encoded(pipe)
    for target in (theirs, pipe):
        target.load_textual_inversion({"<cat>": CAT})
        target.load_textual_inversion({"any": DOG[0]}, token="<dog>")
    prompt = PROMPT.lower()  # theirs replaces words of several vectors in the case they were given in
    wide = copy.deepcopy(theirs).to(torch.float64)
    assert_as_accurate(encoded(pipe, prompt), encoded(theirs, prompt), encoded(wide, prompt))
    assert torch.equal(encoded(pipe, "a cat"), plain)
    assert not torch.allclose(encoded(pipe), before)
    assert torch.equal(encoded(pipe), encoded(pipe, prompt))

    ours = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "ours"))
    assert torch.equal(encoded(ours), encoded(pipe))
    written = pipe.save_pretrained(tmp_path / "theirs", format="diffusers")
    again = diffusers.StableDiffusionPipeline.from_pretrained(written)
    assert torch.equal(encoded(again, prompt), encoded(theirs, prompt))
    assert torch.equal(encoded(Pipeline.from_pretrained(written)), encoded(pipe))
    theirs.save_pretrained(tmp_path / "saved by them")
    assert torch.equal(encoded(Pipeline.from_pretrained(tmp_path / "saved by them")), encoded(pipe))
    with pytest.raises(InputError, match="'<cat>', '<cat>_1', '<cat>_2' is in the vocabulary"):
        ours.load_textual_inversion({"<cat>": CAT})


def test_both_encoders_of_xl(tmp_path: Path) -> None:
    peer = stable_diffusion_xl(tmp_path / "tokenizer")
    peer.save_pretrained(tmp_path / "xl")
    pipe = Pipeline.from_pretrained(tmp_path / "xl")
    conditioner: Any = pipe.conditioner
    with pytest.raises(ArchitectureMismatchError, match="have 14"):
        pipe.load_textual_inversion({"clip_l": CAT}, "<cat>")
    both = {"clip_l": CAT, "clip_g": vectors(3, 4, 14)}
    pipe.load_textual_inversion(both, "<cat>")
    assert torch.equal(conditioner.first.embeddings.token_embedding.weight[-3:], CAT)
    peer.load_textual_inversion({"<cat>": CAT}, text_encoder=peer.text_encoder, tokenizer=peer.tokenizer)
    peer.load_textual_inversion({"<cat>": both["clip_g"]}, text_encoder=peer.text_encoder_2, tokenizer=peer.tokenizer_2)

    def theirs(pipe: Any) -> Tensor:
        with torch.no_grad():
            return pipe.encode_prompt("a <cat> dog", device="cpu", do_classifier_free_guidance=False)[0]

    def ours(pipe: Pipeline) -> Tensor:
        with torch.no_grad():
            tokens_BLC = pipe.conditioner(["a <cat> dog"], image_size=(8, 8)).tokens_BLC  # type: ignore[misc, call-arg]
        assert tokens_BLC is not None
        return tokens_BLC

    assert_as_accurate(ours(pipe), theirs(peer), theirs(copy.deepcopy(peer).to(torch.float64)))
    assert torch.equal(ours(Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "ours"))), ours(pipe))
    assert torch.equal(ours(Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "w", format="diffusers"))), ours(pipe))


def test_weighted_prompts_know_the_words(pipe: Pipeline) -> None:
    pipe.load_textual_inversion({"<cat>": CAT})
    assert pipe.conditioner is not None
    weighted = pipe.conditioner(["(a:1.0) <cat>"], prompt_syntax="weighted").tokens_BLC
    assert weighted is not None
    torch.testing.assert_close(weighted, encoded(pipe, "a <cat>"))


def test_words_are_written_out() -> None:
    words = [("<cat>", 2), ("<cat>s", 1), ("dog", 3)]
    assert expand("<CAT> <cat>s <cat>_1 dog", words) == "<cat> <cat>_1 <cat>s <cat>_1 dog dog_1 dog_2"
    assert expand("no word", ()) == "no word"


@pytest.mark.parametrize(
    ("content", "token", "error", "message"),
    [
        ({"<cat>": CAT, "<dog>": DOG}, "<one>", InputError, "can name only one"),
        ({"clip_l": CAT}, None, InputError, "give token="),
        ({"<cat>": vectors(1, 0, 13)}, None, ArchitectureMismatchError, "width 13; .* have 12"),
        ({"<cat>": CAT * float("nan")}, None, CheckpointError, "holds 36 NaN"),
        ({"<cat>": CAT.int()}, None, CheckpointError, "floating-point"),
        ({"a": torch.zeros(2, 2, 2)}, None, CheckpointError, "no embeddings of textual inversion, but a"),
        ({"encoder.a": CAT, "encoder.b": CAT}, None, CheckpointError, "but encoder.a, encoder.b"),
        ({}, None, CheckpointError, "but nothing"),
        ({"string_to_param": {}}, None, CheckpointError, "must hold one embedding"),
        ({"<cat>": CAT, "cat</w>": DOG}, None, InputError, "'cat</w>' is in the vocabulary"),
        ({"<cat>": CAT, "<CAT>_2": DOG}, None, InputError, "'<CAT>_2' is in the vocabulary"),
        ({"any": CAT}, "a cat", InputError, "without spaces"),
        ({"any": CAT}, 5, InputTypeError, "token must be a string"),
        (5, None, InputTypeError, "a file or a mapping"),
    ],
)
def test_what_does_not_fit_changes_nothing(pipe: Pipeline, content: Any, token: Any, error: type, message: str) -> None:
    before = encoded(pipe)
    with pytest.raises(error, match=message):
        pipe.load_textual_inversion(content, token)
    assert torch.equal(encoded(pipe), before)
    pipe.load_textual_inversion({"<cat>": CAT})


def test_conditioners_without_a_vocabulary(pipe: Pipeline) -> None:
    pipe.conditioner = None
    with pytest.raises(InputError, match="no conditioner"):
        pipe.load_textual_inversion({"<cat>": CAT})
