"""The `bert` conditioner against transformers, and its promises: padding, batches, warnings, errors."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel, BertTokenizer

from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, InputError, InputTypeError
from ldmkit_text.bert import BertConditioner
from ldmkit_text.prompts import PromptTruncatedWarning

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
WORDS = ["a", "red", "apple", "on", "blue", "background", "the", "cat", "##s", "face"]
TYPED = ("", "[SEP]", "[PAD] a", "漢 ünï\u0301 👩‍🚀", "\x00\t\u2028", "apple" * 500, "a red apple " * 500)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("".join(piece + "\n" for piece in ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]))
    return str(path)


@pytest.fixture(scope="module")
def bert(vocab: str) -> BertConditioner:
    torch.manual_seed(0)
    return BertConditioner.build(vocab=vocab, max_length=12, **TINY)


def reconfigured(conditioner: BertConditioner, **changes: object) -> BertConditioner:
    """The same weights under another config."""
    other = BertConditioner(conditioner.config.replace(**changes))
    other.load_state_dict(conditioner.state_dict())
    return other


def assert_below_single_precision(a: Tensor, b: Tensor, single: Tensor) -> None:
    """Two float64 results differ by less than float32 rounds the same computation."""
    assert a.dtype == b.dtype == torch.float64
    assert (a - b).abs().max() < (a - single.double()).abs().max()


# ------------------------------------------------------------------------------------------------------- against transformers


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_pretrained_folder_gives_what_transformers_gives(shared: Path, tmp_path: Path, prefix: str) -> None:
    (tmp_path / "vocab.txt").write_bytes((shared / "data/bert/vocab.txt").read_bytes())
    config = BertConfig(vocab_size=30522, max_position_embeddings=64, **TINY)
    full = BertForPreTraining(config).eval()
    tensors = full.state_dict() if prefix else full.bert.state_dict()
    save_file({key: value.clone() for key, value in tensors.items()}, tmp_path / "model.safetensors")
    config.save_pretrained(tmp_path)
    prompts = ["A red apple, on a BLUE background!", "", "schrödinger's 漢字 👩‍🚀", "word " * 100]
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    inputs = tokenizer(prompts, padding="max_length", truncation=True, max_length=20, return_tensors="pt")
    ours = BertConditioner.from_huggingface(tmp_path, max_length=20)
    with pytest.warns(PromptTruncatedWarning):
        condition = ours(prompts)
    expected = full.bert(**inputs).last_hidden_state
    assert torch.equal(condition.tokens_BLC, expected)
    assert torch.equal(condition.mask_BL, inputs["attention_mask"].bool())


def test_old_files_with_gamma_and_beta_load(vocab: str, tmp_path: Path) -> None:
    model = BertModel(BertConfig(vocab_size=14, max_position_embeddings=77, **TINY))
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in model.state_dict().items()
    }
    assert old.keys() != model.state_dict().keys()
    save_file({**old, "embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(Path(vocab).read_bytes())
    loaded = BertConditioner.from_huggingface(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], model.state_dict()[key]) for key in loaded)


def test_a_misfit_folder_names_every_key(vocab: str, tmp_path: Path) -> None:
    model = BertModel(BertConfig(vocab_size=14, max_position_embeddings=77, **TINY), add_pooling_layer=False)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    lost = sorted(tensors)[:3]
    for key in lost:
        del tensors[key]
    save_file({**tensors, "extra.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(Path(vocab).read_bytes())
    with pytest.raises(ArchitectureMismatchError) as caught:
        BertConditioner.from_huggingface(tmp_path)
    assert all(key in str(caught.value) for key in [*lost, "extra.weight"])


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"model_type": "roberta"}, ConfigError),
        ({"model_type": "bert", "is_decoder": True}, ConfigError),
        ({}, CheckpointError),
    ],
)
def test_a_folder_that_is_no_bert_encoder(tmp_path: Path, config: dict[str, object], error: type[Exception]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=r"config\.json"):
        BertConditioner.from_huggingface(tmp_path)


def test_a_folder_without_weights(vocab: str, tmp_path: Path) -> None:
    BertConfig(vocab_size=14, **TINY).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_bytes(Path(vocab).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        BertConditioner.from_huggingface(tmp_path)


@given(prompt=st.one_of(st.text(max_size=80), st.sampled_from(TYPED)))
def test_real_vocabulary_tokenizes_as_transformers(real: tuple[BertConditioner, BertTokenizer], prompt: str) -> None:
    ours, theirs = real
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        ids_BL, mask_BL = ours.prompt_encoder([prompt])
    expected = theirs([prompt], padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    assert torch.equal(ids_BL, expected["input_ids"])
    assert torch.equal(mask_BL, expected["attention_mask"].bool())


@pytest.fixture(scope="module")
def real(shared: Path) -> tuple[BertConditioner, BertTokenizer]:
    vocab = str(shared / "data/bert/vocab.txt")
    with torch.device("meta"):
        return BertConditioner.build(vocab=vocab, **TINY), BertTokenizer(vocab)


# -------------------------------------------------------------------------------------------------------- padding and batches


@given(extra=st.integers(0, 20), prompt=st.sampled_from(["", "a cat", "red cats on the blue face"]))
def test_real_tokens_do_not_depend_on_padding(bert: BertConditioner, extra: int, prompt: str) -> None:
    roomy = BertConditioner(bert.config.replace(max_length=12 + extra, max_position_embeddings=32))
    weights = bert.state_dict()
    longer = torch.zeros(32, 16)
    longer[:12] = weights["embeddings.position_embeddings.weight"]
    roomy.load_state_dict({**weights, "embeddings.position_embeddings.weight": longer})
    tight = reconfigured(bert, padding="longest")
    single, exact = tight([prompt]), copy.deepcopy(tight).double()([prompt])
    padded = roomy.double()([prompt])
    length = exact.tokens_BLC.shape[1]
    assert exact.mask_BL.all()
    assert padded.mask_BL.sum() == length
    assert padded.tokens_BLC.shape == (1, 12 + extra, 16)
    assert_below_single_precision(exact.tokens_BLC, padded.tokens_BLC[:, :length], single.tokens_BLC)


@given(order=st.permutations(["", "a red apple", "the cat", "blue zebra", "a cat on a face"]))
def test_a_batch_in_another_order_is_the_same_pictures(bert: BertConditioner, order: list[str]) -> None:
    double = copy.deepcopy(bert).double()
    together, alone = double(order), [double([prompt]) for prompt in order]
    single = torch.cat([bert([prompt]).tokens_BLC for prompt in order])
    assert torch.equal(together.mask_BL, torch.cat([condition.mask_BL for condition in alone]))
    assert_below_single_precision(torch.cat([c.tokens_BLC for c in alone]), together.tokens_BLC, single)


def test_attended_padding_takes_part(bert: BertConditioner) -> None:
    ldm = reconfigured(bert, attend_padding=True)
    condition = ldm(["a cat"])
    assert condition.mask_BL is None
    assert ldm.provides == condition.given() == {"tokens_BLC"}
    assert bert.provides == bert(["a cat"]).given() == {"tokens_BLC", "mask_BL"}
    masked = bert(["a cat"]).tokens_BLC[:, :4]
    assert not torch.allclose(condition.tokens_BLC[:, :4], masked)
    ids = torch.tensor([[2, 4, 11, 3] + [0] * 8])
    assert torch.equal(condition.tokens_BLC, bert._bert[0](input_ids=ids).last_hidden_state)


# ------------------------------------------------------------------------------------------------------- what users are told


def test_pooled_is_the_mean_of_the_prompts_own_tokens(bert: BertConditioner) -> None:
    assert bert([""]).vector_BC is None
    pooled = reconfigured(bert, pooled=True)
    assert pooled.provides == {"tokens_BLC", "mask_BL", "vector_BC"}
    made = pooled(["", "a red apple"])
    assert made.tokens_BLC is not None and made.mask_BL is not None and made.vector_BC is not None  # noqa: PT018
    for tokens_LC, mask_L, vector_C in zip(made.tokens_BLC, made.mask_BL, made.vector_BC, strict=True):
        torch.testing.assert_close(vector_C, tokens_LC[mask_L].mean(dim=0))


def test_a_cut_prompt_is_quoted(bert: BertConditioner) -> None:
    with pytest.warns(PromptTruncatedWarning, match=r"takes 12 tokens .*: 'blue cats'"):
        bert(["a red apple on the cat on the red face blue cats"])


def test_a_prompt_that_just_fits_is_not_warned_of(bert: BertConditioner) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bert(["a " * 10]).mask_BL.all()


def test_unknown_words(bert: BertConditioner) -> None:
    assert bert.unknown("A red Zebra on cats, 漢") == ["Zebra", ",", "漢"]
    assert bert.unknown("a " * 40 + "quagga") == ["quagga"]
    assert bert.unknown("") == []


@given(prompt=st.one_of(st.text(max_size=200), st.sampled_from(TYPED)))
def test_any_text_gives_finite_tokens(bert: BertConditioner, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        condition = bert([prompt])
    assert condition.tokens_BLC.shape == (1, 12, 16)
    assert condition.tokens_BLC.isfinite().all()
    assert condition.mask_BL[0, :2].all()


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ("a cat", InputTypeError, "list of strings, got 'a cat'"),
        (["a", 3], InputTypeError, "prompt 1 must be a string, got 3 of type int"),
        ([None], InputTypeError, "prompt 0 .* NoneType"),
        (5, InputTypeError, "got 5"),
        ([], InputError, "no prompts"),
        (["a", "b\ud800"], InputError, "prompt 1 is not valid Unicode: .* character 1"),
    ],
)
def test_bad_prompts(bert: BertConditioner, inputs: object, error: type[Exception], message: str) -> None:
    for call in (bert.check, bert):
        with pytest.raises(error, match=message):
            call(inputs)  # type: ignore[operator]


# ---------------------------------------------------------------------------------------------------------- module and config


def test_names_are_those_of_bert_model(bert: BertConditioner) -> None:
    names = [name for name, _ in bert.named_parameters()]
    assert names == list(bert.state_dict()) == list(bert._bert[0].state_dict())


def test_copies_share_nothing(bert: BertConditioner) -> None:
    before = bert(["a cat"]).tokens_BLC
    twin = copy.deepcopy(bert)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(bert(["a cat"]).tokens_BLC, before)
    assert not twin(["a cat"]).tokens_BLC.any()


def test_every_parameter_learns(bert: BertConditioner) -> None:
    twin = copy.deepcopy(bert)
    tokens_BLC = twin(["a red apple", "the cats"]).tokens_BLC
    (tokens_BLC * torch.randn_like(tokens_BLC)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in twin.named_parameters()}
    # A constant added to all keys cancels in the softmax: their bias alone learns nothing.
    silent = [
        name
        for name, grad in gradients.items()
        if not grad.abs().max() > torch.finfo(torch.float32).eps * len(tokens_BLC.flatten())
    ]
    assert silent == [name for name in gradients if name.endswith("key.bias")]


@given(
    values=st.fixed_dictionaries(
        {
            "hidden_size": st.integers(1, 8).map(lambda n: 8 * n),
            "num_attention_heads": st.sampled_from([1, 2, 4, 8]),
            "dropout": st.floats(0, 0.9),
            "max_length": st.integers(3, 77),
            "lowercase": st.booleans(),
            "padding": st.sampled_from(["max_length", "longest"]),
            "max_position_embeddings": st.none() | st.integers(77, 512),
        }
    )
)
def test_config_round_trip(values: dict[str, object]) -> None:
    config = BertConditioner.Config.parse({"vocab": "vocab.txt", **values})
    assert BertConditioner.Config.parse_json(config.to_json()) == config
    assert BertConditioner.Config.asset_fields() == ("vocab",)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 must be a multiple of num_attention_heads 4"),
        ({"max_length": 100, "max_position_embeddings": 77}, "max_length 100 exceeds max_position_embeddings 77"),
        ({"attend_padding": True, "padding": "longest"}, "attend_padding"),
        ({"hiden_size": 8}, "did you mean 'hidden_size'"),
        ({"dropout": 1.0}, "dropout"),
        ({"vocab_size": 5}, "vocab_size 5 is less than the 14 pieces"),
    ],
)
def test_bad_configs(vocab: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BertConditioner.build(vocab=vocab, **values)
    with pytest.raises(ConfigError, match="'vocab' is required"):
        BertConditioner.build()
