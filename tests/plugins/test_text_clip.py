"""The `clip-text` conditioner against transformers and diffusers, and the full-size models' keys and counts."""

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, InputError, InputTypeError
from ldmkit_text.byte_pair import BOS, EOS
from ldmkit_text.clip import PRESETS, CLIPTextConditioner
from ldmkit_text.prompts import PromptTruncatedWarning

TINY = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
MERGES = ["a t</w>", "c at</w>", "d o", "do g</w>"]
PROMPTS = ["a cat, on a dog", "", "Schrödinger's 漢字 👩‍🚀"]
TYPED = ("", "!!", EOS, f"a {BOS}{EOS} b", "漢 ünï\u0301 👩‍🚀", "\x00\t\u2028", "cat" * 500, f"dog {EOS} " * 200)


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair vocabulary of every byte, four merges, and CLIP's special tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES), BOS, EOS]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    return folder


@pytest.fixture(scope="module")
def assets(tokenizer_folder: Path) -> dict[str, str]:
    return {"vocab": str(tokenizer_folder / "vocab.json"), "merges": str(tokenizer_folder / "merges.txt")}


@pytest.fixture(scope="module")
def clip(assets: dict[str, str]) -> CLIPTextConditioner:
    torch.manual_seed(0)
    return CLIPTextConditioner.build(**assets, **TINY, projection_dim=8, pooled=True).eval()


def reconfigured(conditioner: CLIPTextConditioner, **changes: Any) -> CLIPTextConditioner:
    """The same weights under another config."""
    other = CLIPTextConditioner(conditioner.config.replace(**changes)).eval()
    other.load_state_dict(conditioner.state_dict())
    return other


def tokenizer_of(folder: Path, **options: Any) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, **options)


# ----------------------------------------------------------------------------------------------------- layers and pooled output


@pytest.mark.parametrize("layer", ["last", "penultimate", 0, 1, 3, -1, -4])
@pytest.mark.parametrize("norm", [True, False])
def test_layers_are_those_of_transformers(clip: CLIPTextConditioner, tokenizer_folder: Path, layer: Any, norm: bool) -> None:
    theirs = clip._clip[0]
    ids = tokenizer_of(tokenizer_folder)(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
        condition = reconfigured(clip, layer=layer, final_layer_norm=norm)(PROMPTS)
    tokens = expected.hidden_states[{"last": 3, "penultimate": 2}.get(layer, layer)]
    assert torch.equal(condition.tokens_BLC, theirs.text_model.final_layer_norm(tokens) if norm else tokens)
    assert torch.equal(condition.vector_BC, expected.text_embeds)
    if norm and layer == "last":
        assert torch.equal(condition.tokens_BLC, expected.last_hidden_state)


@pytest.mark.parametrize("legacy", [True, False])
def test_pooled_without_a_projection(assets: dict[str, str], tokenizer_folder: Path, legacy: bool) -> None:
    ours = CLIPTextConditioner.build(**assets, **TINY, pooled=True, eos_token_id=2 if legacy else None)
    ids = tokenizer_of(tokenizer_folder)(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    first_end = [len(tokenizer_of(tokenizer_folder)(prompt).input_ids) - 1 for prompt in PROMPTS]
    condition = ours(PROMPTS)
    assert torch.equal(condition.vector_BC, ours._clip[0](ids).pooler_output)
    assert torch.equal(condition.vector_BC, condition.tokens_BLC[range(3), first_end])
    assert "text_projection.weight" not in ours.state_dict()


def test_provides_what_it_gives(clip: CLIPTextConditioner) -> None:
    assert clip.provides == clip([""]).given() == {"tokens_BLC", "vector_BC"}
    plain = reconfigured(clip, pooled=False)
    assert plain.provides == plain([""]).given() == {"tokens_BLC"}


# ---------------------------------------------------------------------------------------------------------- against diffusers


def tiny_denoising_parts() -> dict[str, Any]:
    """What diffusers' pipelines insist on and `encode_prompt` does not use."""
    return {
        "vae": AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
        "unet": UNet2DConditionModel(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
            cross_attention_dim=16,
            attention_head_dim=4,
        ),
        "scheduler": DDIMScheduler(steps_offset=1, clip_sample=False),
    }


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 3])
def test_stable_diffusion_prompts(
    assets: dict[str, str], tokenizer_folder: Path, clip_skip: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # diffusers still asks for the nesting that transformers 5.6 took away (diffusers #13833).
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    ours = CLIPTextConditioner.build(**assets, **TINY).eval()
    pipeline = StableDiffusionPipeline(
        **tiny_denoising_parts(),
        text_encoder=ours._clip[0],
        tokenizer=tokenizer_of(tokenizer_folder),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with torch.no_grad():
        expected, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False, clip_skip=clip_skip)
        assert torch.equal(ours(PROMPTS, clip_skip=clip_skip).tokens_BLC, expected)


@pytest.mark.parametrize("clip_skip", [None, 1])
def test_stable_diffusion_xl_prompts(assets: dict[str, str], tokenizer_folder: Path, clip_skip: int | None) -> None:
    xl = {"layer": "penultimate", "final_layer_norm": False}
    one = CLIPTextConditioner.build(**assets, **TINY, **xl).eval()
    two = CLIPTextConditioner.build(**assets, **TINY, **xl, projection_dim=8, pooled=True, pad_token="!").eval()
    pipeline = StableDiffusionXLPipeline(
        **tiny_denoising_parts(),
        text_encoder=one._clip[0],
        text_encoder_2=two._clip[0],
        tokenizer=tokenizer_of(tokenizer_folder),
        tokenizer_2=tokenizer_of(tokenizer_folder, pad_token="!"),
        add_watermarker=False,
    )
    with torch.no_grad():
        tokens, _, pooled, _ = pipeline.encode_prompt(
            PROMPTS, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip
        )
        condition = one(PROMPTS, clip_skip=clip_skip).merge(two(PROMPTS, clip_skip=clip_skip))
    assert torch.equal(condition.tokens_BLC, tokens)
    assert torch.equal(condition.vector_BC, pooled)


# ------------------------------------------------------------------------------------------------------------ full-size models


@pytest.fixture(scope="module")
def real_folder(shared: Path) -> Path:
    return shared / "data/checkpoints/sd15/tokenizer"


@pytest.mark.parametrize(
    ("preset", "count"), [("clip-l", 123_060_480), ("open-clip-h", 340_387_840), ("open-clip-bigg", 694_659_840)]
)
def test_presets_have_the_published_sizes(real_folder: Path, preset: str, count: int) -> None:
    with torch.device("meta"):
        model = CLIPTextConditioner.build(
            **PRESETS[preset], vocab=str(real_folder / "vocab.json"), merges=str(real_folder / "merges.txt")
        )
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert [name for name, _ in model.named_parameters()] == list(model.state_dict())


def test_keys_and_shapes_of_clip_l(real_folder: Path, shared: Path) -> None:
    with torch.device("meta"):
        model = CLIPTextConditioner.build(vocab=str(real_folder / "vocab.json"), merges=str(real_folder / "merges.txt"))
    expected = json.loads((shared / "data/key_shapes/diffusers_keys_sd15_text.json").read_text())
    assert {key: list(value.shape) for key, value in model.state_dict().items()} == expected


@pytest.fixture(scope="module")
def real(real_folder: Path) -> tuple[CLIPTextConditioner, CLIPTokenizer]:
    ours = CLIPTextConditioner.build(vocab=str(real_folder / "vocab.json"), merges=str(real_folder / "merges.txt"), **TINY)
    return ours, CLIPTokenizer.from_pretrained(real_folder)


@given(prompt=st.one_of(st.text(max_size=80), st.sampled_from(TYPED)))
def test_real_vocabulary_tokenizes_as_transformers(real: tuple[CLIPTextConditioner, CLIPTokenizer], prompt: str) -> None:
    ours, theirs = real
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        ids_BL, _ = ours.prompt_encoder([prompt])
    assert torch.equal(ids_BL, theirs([prompt], padding="max_length", truncation=True, return_tensors="pt").input_ids)


@pytest.mark.parametrize(
    ("model", "encoder", "preset"),
    [("sd15", "", "clip-l"), ("sd21-base", "", "open-clip-h"), ("sdxl-base", "_2", "open-clip-bigg")],
)
def test_presets_agree_with_real_configs(shared: Path, tmp_path: Path, model: str, encoder: str, preset: str) -> None:
    from ldmkit_text.huggingface import clip_config_values

    folder = shared / "data/checkpoints" / model
    values = clip_config_values(folder / f"text_encoder{encoder}", folder / f"tokenizer{encoder}")
    chosen = {key: value for key, value in PRESETS[preset].items() if key in ("layer", "final_layer_norm", "pooled")}
    ours = CLIPTextConditioner.Config.parse({**PRESETS[preset], "vocab": values["vocab"], "merges": values["merges"]})
    assert CLIPTextConditioner.Config.parse({**values, **chosen}) == ours.replace(vocab_size=49408, eos_token_id=2)


# ----------------------------------------------------------------------------------------------------------- pretrained folders


@pytest.mark.parametrize("prefix", ["", "text_model."])
@pytest.mark.parametrize("projected", [False, True])
def test_pretrained_folder(tokenizer_folder: Path, tmp_path: Path, prefix: str, projected: bool) -> None:
    config = CLIPTextConfig(**TINY, vocab_size=518, projection_dim=8, bos_token_id=516, eos_token_id=517, pad_token_id=517)
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    plain = {key.removeprefix("text_model."): value.clone() for key, value in model.state_dict().items()}
    stored = {key if key.startswith("text_projection") else prefix + key: value for key, value in plain.items()}
    save_file({**stored, f"{prefix}embeddings.position_ids": torch.arange(77)[None]}, tmp_path / "model.safetensors")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    ours = CLIPTextConditioner.from_huggingface(tmp_path, tokenizer_folder, pooled=True)
    ids = tokenizer_of(tokenizer_folder)(PROMPTS, padding="max_length", return_tensors="pt").input_ids
    condition, expected = ours(PROMPTS), model(ids)
    assert torch.equal(condition.tokens_BLC, expected.last_hidden_state)
    assert torch.equal(condition.vector_BC, expected.text_embeds if projected else expected.pooler_output)


def test_a_misfit_folder_names_every_key(tokenizer_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    model = CLIPTextModel(CLIPTextConfig(**TINY, vocab_size=518, bos_token_id=516, eos_token_id=517, pad_token_id=517))
    model.config.save_pretrained(tmp_path)
    tensors = {key: value.clone() for key, value in model.state_dict().items() if "layers.2" not in key}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ArchitectureMismatchError) as caught:
        CLIPTextConditioner.from_huggingface(tmp_path)
    assert all(key in str(caught.value) for key in model.state_dict() if "layers.2" in key)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ConfigError, match="model_type = 'clip'"):
        CLIPTextConditioner.from_huggingface(tmp_path)


# ------------------------------------------------------------------------------------------------------- what users are told


@given(prompt=st.one_of(st.text(max_size=200), st.sampled_from(TYPED)))
def test_any_text_gives_finite_tokens(clip: CLIPTextConditioner, prompt: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptTruncatedWarning)
        condition = clip([prompt])
    assert condition.tokens_BLC.shape == (1, 77, 16)
    assert condition.vector_BC.shape == (1, 8)
    assert condition.tokens_BLC.isfinite().all()


def test_a_cut_prompt_is_quoted(clip: CLIPTextConditioner) -> None:
    with pytest.warns(PromptTruncatedWarning, match="takes 77 tokens .*: 'DOG on a cat'"):
        clip(["cat " * 75 + "DOG on a cat"])


def test_bad_prompts_and_clip_skips(clip: CLIPTextConditioner) -> None:
    with pytest.raises(InputTypeError, match="prompt 1 must be a string, got 3 of type int"):
        clip.check(["a", 3])
    for skip in (-1, 4):
        with pytest.raises(InputError, match=f"clip_skip = {skip} is outside 0 to 3"):
            clip([""], clip_skip=skip)
    for skip in (1.0, True, "1"):
        with pytest.raises(InputTypeError, match="clip_skip must be an integer"):
            clip([""], clip_skip=skip)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocab.json", "{", "is not valid JSON"),
        ("vocab.json", '{"a": 0, "b": 0}', "numbers from 0 on"),
        ("vocab.json", '{"a": 0}', "lacks <.startoftext.>"),
        ("merges.txt", "#version: 0.2\nab\n", "line 2 is not two pieces"),
        ("merges.txt", "a zzz\n", "does not fit"),
        ("vocab.json", None, "is missing"),
        ("merges.txt", None, "cannot be read"),
    ],
)
def test_damaged_vocabularies(tokenizer_folder: Path, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    shutil.copytree(tokenizer_folder, tmp_path, dirs_exist_ok=True)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        CLIPTextConditioner.build(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"), **TINY)
    assert str(tmp_path / file) in str(caught.value)


# ---------------------------------------------------------------------------------------------------------- module and config


def test_copies_share_nothing(clip: CLIPTextConditioner) -> None:
    before = clip(["a cat"], clip_skip=1).tokens_BLC
    twin = copy.deepcopy(clip)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(clip(["a cat"], clip_skip=1).tokens_BLC, before)
    assert not twin(["a cat"], clip_skip=1).tokens_BLC.any()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10, "num_attention_heads": 4}, "hidden_size 10 must be a multiple"),
        ({"num_hidden_layers": 3, "layer": 4}, "layer 4 is outside -4 to 3"),
        ({"num_hidden_layers": 3, "layer": -5}, "layer -5 is outside -4 to 3"),
        ({"layer": "first"}, "layer"),
        ({"layer": True}, "layer"),
        ({"vocab_size": 500}, "vocab_size 500 is less than the 518"),
    ],
)
def test_bad_configs(assets: dict[str, str], values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CLIPTextConditioner.build(**assets, **values)


@given(
    values=st.fixed_dictionaries(
        {
            "num_hidden_layers": st.integers(2, 40),
            "layer": st.sampled_from(["last", "penultimate", 0, 1, -2]),
            "final_layer_norm": st.booleans(),
            "projection_dim": st.none() | st.integers(1, 4096),
            "layer_norm_eps": st.floats(1e-12, 1e-3),
            "hidden_act": st.sampled_from(["quick_gelu", "gelu"]),
        }
    )
)
def test_config_round_trip(values: dict[str, Any]) -> None:
    config = CLIPTextConditioner.Config.parse({"vocab": "vocab.json", "merges": "merges.txt", **values})
    assert CLIPTextConditioner.Config.parse_json(config.to_json()) == config
    assert CLIPTextConditioner.Config.asset_fields() == ("vocab", "merges")
