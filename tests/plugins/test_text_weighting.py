"""Weighted and long prompts: the grammar, the windows, and embeddings against transformers' encoder and the formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import CLIPTokenizer

from ldmkit import And, Pipeline, build
from ldmkit.errors import InputError
from ldmkit_text.byte_pair import BOS, EOS
from ldmkit_text.clip import CLIPTextConditioner
from ldmkit_text.weighting import chunks, parse
from tests.conditions import randomise, tiny_pipeline

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


@pytest.fixture(scope="module", params=[EOS, "!"])
def clip(folder: Path, request: pytest.FixtureRequest) -> CLIPTextConditioner:
    assets = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    made = CLIPTextConditioner.build(**assets, **TINY, projection_dim=8, pooled=True, pad_token=request.param)
    randomise(made, std=0.3)
    return made.double().eval()


def weighted(clip: CLIPTextConditioner, *prompts: str) -> Any:
    with torch.no_grad():
        return clip(list(prompts), prompt_syntax="weighted")


# -------------------------------------------------------------------------------------------------------------------- grammar


@pytest.mark.parametrize(
    ("prompt", "segments"),
    [
        ("a cat", [("a cat", 1)]),
        ("", [("", 1)]),
        ("a (cat) dog", [("a ", 1), ("cat", 1.1), (" dog", 1)]),
        ("((cat))", [("cat", 1.1 * 1.1)]),
        ("[cat]", [("cat", 1 / 1.1)]),
        ("(cat:1.3)", [("cat", 1.3)]),
        ("(cat : .5 )", [("cat ", 0.5)]),
        ("(cat:-1)", [("cat", -1)]),
        ("(a (cat:2) [dog]:3)", [("a ", 3), ("cat", 6), (" ", 3), ("dog", 3 / 1.1)]),
        (r"\(cat\) \[a\] \\ \x", [(r"(cat) [a] \ \x", 1)]),
        ("4:3 at 12:30", [("4:3 at 12:30", 1)]),
        ("a  BREAK cat", [("a", 1), (None, 1), ("cat", 1)]),
        ("(a BREAK cat:2)", [("a", 2), (None, 1), ("cat", 2)]),
        ("BREAKFAST", [("BREAKFAST", 1)]),
    ],
)
def test_what_is_read(prompt: str, segments: list[tuple[str | None, float]]) -> None:
    got = parse(prompt)
    assert [text for text, _ in got] == [text for text, _ in segments]
    assert [weight for _, weight in got] == pytest.approx([weight for _, weight in segments], rel=1e-15)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (cat", r"'a \(cat', character 2: '\(' is never closed; write \\\( for"),
        ("a cat)", r"character 5: '\)' closes nothing; write \\\)"),
        ("(a cat]", r"'\]' closes nothing"),
        ("a cat:1.3)", r"'\)' closes nothing"),
        ("[cat:dog:0.5]", r"\[from:to:when\] and \[one\|other\] are not served"),
        ("[cat|dog]", r"\[one\|other\] are not served"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(clip: CLIPTextConditioner, prompt: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        clip.check([prompt], prompt_syntax="weighted")
    clip.check([prompt])  # plain prompts have no syntax


@given(st.lists(st.tuples(st.text("ab ,:.\\", min_size=1, max_size=5), st.sampled_from([1.1, 0.5, 2.0])), max_size=6))
def test_text_is_never_lost(pieces: list[tuple[str, float]]) -> None:
    prompt = "".join("(" + text.replace("\\", "\\\\") + f" :{weight})" for text, weight in pieces)
    assert "".join(text or "" for text, _ in parse(prompt)) == "".join(text + " " for text, _ in pieces)


# -------------------------------------------------------------------------------------------------------------------- windows

COMMA = 0


def windows(*tokens: int) -> list[list[int]]:
    return [ids for ids, _ in chunks([("", 1.0)], lambda _: list(tokens), window=75, comma=COMMA)]


def test_where_windows_end() -> None:
    words = list(range(1, 200))
    assert windows() == [[]]
    assert windows(*words[:75]) == [words[:75]]
    assert windows(*words[:76]) == [words[:75], words[75:76]]
    near, far = [*words[:55], COMMA, *words[55:80]], [*words[:54], COMMA, *words[54:80]]
    assert windows(*near) == [near[:56], near[56:]]  # the comma is among the last 20 of 75
    assert windows(*far) == [far[:75], far[75:]]
    last = [*words[:74], COMMA, 9]
    assert windows(*last) == [last[:75], [9]]
    beyond = [*words[:60], COMMA, *words[60:74], COMMA, 9]
    assert windows(*beyond) == [beyond[:75], beyond[75:]]  # what comes next is a comma itself: nothing is torn


# ----------------------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize("prompt", ["a cat, on a dog", "", "Schrödinger's 漢字 👩‍🚀", "a!!", "cat " * 75])
def test_plain_prompts_are_the_same_to_the_bit(clip: CLIPTextConditioner, prompt: str) -> None:
    with torch.no_grad():
        plain = clip([prompt])
    mine = weighted(clip, prompt)
    assert torch.equal(mine.tokens_BLC, plain.tokens_BLC)
    assert torch.equal(mine.vector_BC, plain.vector_BC)
    assert mine.mask_BL is None


def test_embeddings_are_weighted_and_the_mean_restored(clip: CLIPTextConditioner, folder: Path) -> None:
    """By transformers' own tokenizer and encoder, each window written out."""
    theirs = CLIPTokenizer.from_pretrained(folder)
    prompt = "a (cat:1.5), [dog] " + "dog " * 80 + "BREAK (at:0.2)"

    def ids(text: str) -> list[int]:
        return theirs(text, add_special_tokens=False).input_ids

    long = ids("dog " * 80)
    first = [(ids("a"), 1.0), (ids("cat"), 1.5), (ids(","), 1.0), (ids("dog"), 1 / 1.1), (long[:71], 1.0)]
    second, third = [(long[71:], 1.0)], [(ids("at"), 0.2)]
    model, pad = clip._clip[0], theirs.convert_tokens_to_ids(clip.config.pad_token)
    parts: list[Tensor] = []
    pooled: list[Tensor] = []
    for window in (first, second, third):
        tokens = [theirs.bos_token_id, *(i for some, _ in window for i in some), theirs.eos_token_id]
        weights = [1.0, *(w for some, w in window for _ in some), 1.0]
        tokens += [pad] * (77 - len(tokens))
        weights += [1.0] * (77 - len(weights))
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokens]))
        z = out.last_hidden_state * torch.tensor(weights, dtype=torch.float64)[None, :, None]
        parts.append(z * (out.last_hidden_state.mean() / z.mean()))
        pooled.append(out.text_embeds)
    mine = weighted(clip, prompt)
    torch.testing.assert_close(mine.tokens_BLC, torch.cat(parts, dim=1), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(mine.vector_BC, pooled[0], rtol=1e-12, atol=1e-12)


def test_prompts_of_different_length_are_masked_and_alone_the_same(clip: CLIPTextConditioner) -> None:
    both = weighted(clip, "a (cat:1.4)", "cat " * 100)
    assert both.tokens_BLC.shape == (2, 154, 16)
    assert both.mask_BL.sum(dim=1).tolist() == [77, 154]
    alone = weighted(clip, "a (cat:1.4)")
    torch.testing.assert_close(both.tokens_BLC[:1, :77], alone.tokens_BLC, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------- pipeline


def test_in_the_pipeline(clip: CLIPTextConditioner, tmp_path: Path) -> None:
    pipe: Pipeline = tiny_pipeline(tmp_path)
    pipe.conditioner = build("conditioner", "clip-text", **{**clip.config.to_dict(), "pooled": False, "hidden_size": 32})
    randomise(pipe.conditioner)

    def draw(prompt: Any, **options: Any) -> Tensor:
        latents: Tensor = pipe(prompt, seed=1, output_type="latent", num_inference_steps=2, **options).images
        return latents

    plain = draw("a cat, on a dog")
    assert torch.equal(draw("a cat, on a dog", prompt_syntax="weighted"), plain)
    assert torch.equal(draw("a cat, on a dog", prompt_syntax="plain"), plain)
    strong = draw("a (cat:2.5), on a dog", prompt_syntax="weighted")
    assert (strong - plain).abs().max() > 1e-4
    assert not torch.equal(draw("a (cat:2.5), on a dog"), strong)
    long = draw("cat " * 100, prompt_syntax="weighted", negative_prompt="(dog:0.3)")  # of two windows and one
    assert long.isfinite().all()
    assert torch.equal(draw("a cat AND a dog :0.5", prompt_syntax="weighted"), draw(And("a cat", ("a dog", 0.5))))
    pipe.autoencoder.encode = lambda *_: pytest.fail("the picture was encoded")
    for wrong in ({"prompt": "(cat"}, {"prompt": "cat", "negative_prompt": "(cat"}, {"prompt": "(a AND b)"}):
        with pytest.raises(InputError, match=r"'\(' is never closed"):
            pipe(**wrong, prompt_syntax="weighted", image=torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match="must be 'plain' or 'weighted'"):
        draw("cat", prompt_syntax="heavy")
    with pytest.raises(InputError, match="prompt_syntax = 'weighted' was given, but BertConditioner does not take it"):
        tiny_pipeline(tmp_path)("a", prompt_syntax="weighted")


def test_and_is_read_as_in_the_web_ui() -> None:
    assert repr(And.parse("a cat AND a dog :0.7")) == "And(('a cat', 1.0), ('a dog', 0.7))"
    assert repr(And.parse("a :-1 AND (b:1.2)")) == "And(('a', -1.0), ('(b:1.2)', 1.0))"
    assert And.parse("a SAND castle, 16:9") == "a SAND castle, 16:9"
