"""The `ldm-bert` conditioner against diffusers' LDMBertModel, and what it reads."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from ldmkit import build
from ldmkit.checkpoints.compvis import ldm_bert_map
from ldmkit.errors import CheckpointError, ConfigError, InputTypeError
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_text.huggingface import bert_tokenizer_values
from ldmkit_text.ldm_bert import LDMBertConditioner
from ldmkit_text.prompts import PromptTruncatedWarning
from tests.ldm_peers import BERT, bert, write_bert_tokenizer

PROMPTS = ["A cat, on a red dog", "", "cats on CATS  unknown\twörds", "a [SEP] dog"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bert_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def ours_of(peer, tokenizer: Path) -> LDMBertConditioner:
    reading = LDMBertConditioner.from_diffusers({"bert": peer.config.to_dict()}, {"tokenizer": tokenizer})
    ours = LDMBertConditioner.build(**reading.config).eval()
    tensors = {key: value for key, value in peer.state_dict().items() if not key.startswith("to_logits.")}
    ours.load_state_dict(tensors)
    return ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_as_accurate_as_diffusers(tokenizer: Path, dtype: torch.dtype) -> None:
    peer = bert(max_position_embeddings=20)
    ours = ours_of(peer, tokenizer)
    told = BertTokenizer.from_pretrained(tokenizer)(
        PROMPTS, padding="max_length", max_length=20, truncation=True, return_tensors="pt"
    )
    oracles = [copy.deepcopy(peer).double()(told.input_ids)[0], copy.deepcopy(ours).double()(PROMPTS).tokens_BLC]
    condition, theirs = ours.to(dtype)(PROMPTS), peer.to(dtype)(told.input_ids)[0]
    assert condition.mask_BL is None
    for exact in oracles:
        assert_as_accurate(condition.tokens_BLC, theirs, exact)


def test_the_published_size(tokenizer: Path) -> None:
    """Every key of the CompVis layout, both ways, and as many parameters as LDMBertModel has without its head."""
    with torch.device("meta"):
        ours = build("conditioner", "ldm-bert", vocab=str(tokenizer / "vocab.txt"))
        full = type(bert())(type(bert().config)())
    keymap = ldm_bert_map(layers=32)
    theirs = keymap.restore(full.state_dict())
    assert len(theirs) == 2 + 32 * 13 + 2 + 2
    assert {name for key in theirs for name, _ in keymap.targets(key)} == set(full.state_dict())
    head = sum(p.numel() for p in full.to_logits.parameters())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in full.parameters()) - head


def test_settings_that_cannot_be_served(tokenizer: Path) -> None:
    config = bert().config.to_dict()
    with pytest.raises(ConfigError, match=r"activation_function = 'relu' \(only 'gelu' can be served\)"):
        LDMBertConditioner.from_diffusers({"bert": {**config, "activation_function": "relu"}}, {"tokenizer": tokenizer})
    with pytest.raises(CheckpointError, match="bert has no tokenizer beside it"):
        LDMBertConditioner.from_diffusers({"bert": config}, {})
    with pytest.raises(ConfigError, match="vocab_size 3 is less than the 12 pieces"):
        build("conditioner", "ldm-bert", vocab=str(tokenizer / "vocab.txt"), vocab_size=3)


def test_prompts_that_do_not_fit(tokenizer: Path) -> None:
    ours = ours_of(bert(max_position_embeddings=6), tokenizer)
    with pytest.warns(PromptTruncatedWarning, match="'red dog'"):
        ours(["a cat on a red dog"])
    with pytest.raises(InputTypeError, match="put a single prompt in a list"):
        ours("a cat")


def test_both_forms_of_the_vocabulary(tokenizer: Path, tmp_path: Path) -> None:
    """transformers writes a tokenizer.json; older versions a vocab.txt."""
    BertTokenizer.from_pretrained(tokenizer).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink(missing_ok=True)
    values = bert_tokenizer_values(tmp_path)
    assert values == {"vocab": str(tmp_path / "tokenizer.json"), "lowercase": True}
    lines, whole = (bert_tokenizer_values(folder)["vocab"] for folder in (tokenizer, tmp_path))
    encode = [build("conditioner", "ldm-bert", vocab=path, **SIZES).prompt_encoder for path in (lines, whole)]
    assert torch.equal(encode[0](PROMPTS)[0], encode[1](PROMPTS)[0])
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "strip_accents": False}))
    with pytest.raises(ConfigError, match="accents go exactly where case goes"):
        bert_tokenizer_values(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}, "merges": []}}')
    settings.unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json of a WordPiece tokenizer"):
        bert_tokenizer_values(tmp_path)


def test_words_that_were_added(tokenizer: Path, tmp_path: Path) -> None:
    write_bert_tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<cat>": 12}')
    with pytest.raises(ConfigError, match="adds '<cat>' to the vocabulary"):
        bert_tokenizer_values(tmp_path)


SIZES = {"vocab_size": BERT["vocab_size"], "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "head_dim": 4}
