"""Single files: tiny models under CompVis' names, recognised, run beside diffusers, every key accounted for."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ldmkit
from ldmkit import Pipeline, build
from ldmkit.checkpoints.assembling import UnexpectedKeysWarning
from ldmkit.checkpoints.compvis import clip_map, open_clip_map, unet_map, vae_map
from ldmkit.checkpoints.tokenizers import PACKED, find_tokenizer
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError, InputError, LdmkitError
from tests.checkpoint_peers import latents, stable_diffusion, write_tokenizer
from tests.mutants import Change, changed

GROUPS = {"norm_num_groups": 8}
CONFIG = {"unet": {**GROUPS, "attention_head_dim": 2}, "vae": GROUPS, "text_encoder": {"num_attention_heads": 2}}
"""What shapes do not tell, and toys have otherwise than full-size models."""


def compvis(peer: Any, *, open_clip: bool = False) -> dict[str, Tensor]:
    """A pipeline of diffusers under the names of CompVis' code, by the key maps' inverse."""
    unet = unet_map(levels=2, layers_per_block=2, attention=(True, False)).prefixed("model.diffusion_model")
    vae = vae_map(levels=2, layers_per_block=2).prefixed("first_stage_model")
    text = {key.removeprefix("text_model."): value for key, value in peer.text_encoder.state_dict().items()}
    if open_clip:
        names = open_clip_map(layers=2).prefixed("cond_stage_model.model")
    else:
        names = clip_map().prefixed("cond_stage_model.transformer")
    tensors = unet.restore(peer.unet.state_dict()) | vae.restore(peer.vae.state_dict()) | names.restore(text)
    return {key: value.contiguous().clone() for key, value in tensors.items()}


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return stable_diffusion(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def expected(peer: Any, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """What our own pipeline draws with the weights of the folder."""
    folder = tmp_path_factory.mktemp("folder") / "sd"
    peer.save_pretrained(folder)
    return latents(Pipeline.from_pretrained(folder, sampler="ddim"))


@pytest.fixture
def file(peer: Any, tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer")
    save_file({**compvis(peer), **clutter()}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def clutter() -> dict[str, Tensor]:
    """What published files hold besides."""
    return {
        "betas": torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square().float(),
        "alphas_cumprod": torch.zeros(1000),
        "sqrt_one_minus_alphas_cumprod": torch.zeros(1000),
        "posterior_mean_coef1": torch.zeros(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "model_ema.decay": torch.zeros(()),
        "model_ema.num_updates": torch.zeros((), dtype=torch.int32),
    }


def test_loaded_by_keys_and_shapes(file: Path, expected: Tensor) -> None:
    pipe = Pipeline.from_single_file(file, CONFIG)
    assert torch.equal(latents(pipe), expected)
    assert pipe.defaults.height == 512
    ignored = {key for accounting in pipe.accounting.values() for key in accounting.ignored}
    assert ignored == set(clutter())
    mapped = {key for accounting in pipe.accounting.values() for key in accounting.mapped.values()}
    assert mapped | ignored == set(ldmkit.checkpoints.container.SafetensorsFile(file).entries)


def test_a_config_folder_says_all(file: Path, peer: Any, tmp_path: Path, expected: Tensor) -> None:
    peer.save_pretrained(tmp_path / "configs")
    pipe = Pipeline.from_single_file(file, tmp_path / "configs")
    assert type(pipe.sampler).__name__ == "PLMSSampler"
    pipe.sampler = "ddim"
    assert torch.equal(latents(pipe), expected)


def test_stable_diffusion_2(tmp_path: Path) -> None:
    peer = stable_diffusion(tmp_path / "tokenizer", "sd2", prediction_type="v_prediction")
    peer.text_encoder.config.hidden_act = "gelu"
    tensors = compvis(peer, open_clip=True)
    last = {
        key.replace("resblocks.1.", "resblocks.2."): value.clone() for key, value in tensors.items() if "resblocks.1." in key
    }
    extra = {"cond_stage_model.model.logit_scale": torch.ones(()), "cond_stage_model.model.text_projection": torch.ones(12, 12)}
    save_file({**tensors, **last, **extra}, tmp_path / "sd2.safetensors")
    config = {**CONFIG, "unet": {**GROUPS, "attention_head_dim": [2, 4]}}
    with pytest.raises(InputError, match="keys do not tell what it predicts: pass prediction='v_prediction'"):
        Pipeline.from_single_file(tmp_path / "sd2.safetensors", config)
    pipe = Pipeline.from_single_file(tmp_path / "sd2.safetensors", config, prediction="v_prediction")
    assert pipe.defaults.height == 768
    assert pipe.conditioner is not None
    assert pipe.conditioner.config.pad_token == "!"
    assert {**last, **extra}.keys() == pipe.accounting["conditioner"].ignored.keys()
    own = {key.removeprefix("text_model."): value for key, value in peer.text_encoder.state_dict().items()}
    assert all(torch.equal(value, own[key]) for key, value in pipe.conditioner.state_dict().items())


@pytest.mark.parametrize("ema", [False, True])
def test_averaged_weights(file: Path, peer: Any, ema: bool) -> None:
    tensors = compvis(peer)
    averages = {
        "model_ema." + key.removeprefix("model.").replace(".", ""): value + 1
        for key, value in tensors.items()
        if key.startswith("model.")
    }
    save_file({**tensors, **averages}, file)
    pipe = Pipeline.from_single_file(file, CONFIG, ema=ema)
    assert torch.equal(pipe.denoiser.conv_in.weight, peer.unet.conv_in.weight + int(ema))
    assert len(pipe.accounting["file"].ignored) == len(averages)
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"ema=True, but 304 of 304 weights of the U-Net have no average"):
        Pipeline.from_single_file(file, CONFIG, ema=True)


def test_pickles_only_on_request(file: Path, peer: Any, expected: Tensor) -> None:
    path = file.with_suffix(".ckpt")
    torch.save({"state_dict": compvis(peer), "global_step": 3}, path)
    with pytest.raises(CheckpointError, match="allow_pickle=True reads it"):
        Pipeline.from_single_file(path, CONFIG)
    assert torch.equal(latents(Pipeline.from_single_file(path, CONFIG, allow_pickle=True)), expected)


def test_unknown_keys_are_errors_unless_allowed(file: Path, peer: Any) -> None:
    save_file(
        {**compvis(peer), "control_model.conv.weight": torch.zeros(1), "model.diffusion_model.x.bias": torch.zeros(2)}, file
    )
    with pytest.raises(ArchitectureMismatchError, match=r"unexpected  control_model.conv.weight \(1,\)"):
        Pipeline.from_single_file(file, CONFIG)
    with pytest.warns(UnexpectedKeysWarning) as caught:
        Pipeline.from_single_file(file, CONFIG, strict=False)
    said = " ".join(str(warning.message) for warning in caught)
    assert "control_model.conv.weight" in said
    assert "model.diffusion_model.x.bias" in said


def test_schedules_are_read_from_betas(file: Path, peer: Any) -> None:
    tensors = compvis(peer)
    save_file({**tensors, "betas": torch.linspace(0.0015, 0.0195, 100)}, file)
    pipe = Pipeline.from_single_file(file, CONFIG)
    values = pipe.schedule.config.to_dict()
    assert (values["beta_start"], values["beta_end"], values["beta_schedule"]) == (0.0015, 0.0195, "linear")
    assert values["num_train_timesteps"] == 100
    save_file({**tensors, "betas": torch.rand(100)}, file)
    with pytest.raises(ConfigError, match="follow neither a linear nor a scaled linear"):
        Pipeline.from_single_file(file, CONFIG)
    assert Pipeline.from_single_file(file, CONFIG, schedule={"beta_end": 0.02}).schedule.config.beta_end == 0.02


def test_class_conditional_original(tmp_path: Path) -> None:
    unet = build(
        "denoiser",
        "unet",
        in_channels=4,
        out_channels=4,
        block_out_channels=[16, 32],
        transformer_layers_per_block=[1, 0],
        num_attention_heads=1,
        cross_attention_dim=512,
        norm_num_groups=8,
    )
    vae = build("autoencoder", "kl", block_out_channels=[16, 32], norm_num_groups=8)
    tensors = (
        unet_map(levels=2, layers_per_block=2, attention=(True, False))
        .prefixed("model.diffusion_model")
        .restore(unet.state_dict())
    )
    tensors |= vae_map(levels=2, layers_per_block=2).prefixed("first_stage_model").restore(vae.state_dict())
    tensors |= {"cond_stage_model.embedding.weight": torch.randn(11, 512), "scale_factor": torch.tensor(0.25)}
    tensors = {key: value.contiguous() for key, value in tensors.items()}
    path = tmp_path / "cin.safetensors"
    save_file(tensors, path)
    config = {"unet": GROUPS, "vae": GROUPS}
    with pytest.raises(InputError, match="holds no betas, and latent-diffusion models differ"):
        Pipeline.from_single_file(path, config)
    pipe = Pipeline.from_single_file(path, config, schedule={"beta_start": 0.0015, "beta_end": 0.0195})
    assert pipe.autoencoder.config.scaling_factor == 0.25
    assert pipe.conditioner is not None
    assert pipe.conditioner.config.num_classes == 10
    assert pipe(class_labels=[3], height=16, width=16, num_inference_steps=1, output_type="latent").images.isfinite().all()


# ------------------------------------------------------------------------------------------------------------------ tokenizers


def test_tokenizers_are_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, package = tmp_path / "hub", tmp_path / "packages" / "open_clip"
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    file = tmp_path / "models" / "model.safetensors"
    file.parent.mkdir()
    with pytest.raises(CheckpointError, match=r"tokenizer=FOLDER .*models/tokenizer with .*hub\); pip install open_clip_torch"):
        find_tokenizer(file, None)
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (package / PACKED).write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path / "packages")
    assert find_tokenizer(file, None) == package
    cached = write_tokenizer(cache / "models--openai--clip-vit-large-patch14" / "snapshots" / "abc")
    assert find_tokenizer(file, None) == cached
    beside = write_tokenizer(file.parent / "tokenizer")
    assert find_tokenizer(file, None) == beside
    given = write_tokenizer(tmp_path / "given")
    assert find_tokenizer(file, given) == find_tokenizer(file, given / "vocab.json") == given
    with pytest.raises(InputError, match=r"does not hold vocab\.json and merges\.txt or tokenizer\.json"):
        find_tokenizer(file, tmp_path)


def test_the_packed_vocabulary_is_the_published_one(shared: Path, tmp_path: Path) -> None:
    from ldmkit_text.clip import CLIPTextConditioner
    from ldmkit_text.packed import read_packed

    folder = shared / "data/checkpoints/sd15/tokenizer"
    merges = (folder / "merges.txt").read_text().splitlines()
    path = tmp_path / PACKED
    path.write_bytes(gzip.compress("\n".join(["header", *merges[1:], "beyond the vocabulary", ""]).encode()))
    vocab, pairs = read_packed(path)
    assert vocab == json.loads((folder / "vocab.json").read_text())
    assert [" ".join(pair) for pair in pairs] == merges[1:]
    tiny = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    files = CLIPTextConditioner.build(vocab=str(path), **tiny).to_diffusers()["tokenizer"].files
    assert json.loads(files["vocab.json"]) == vocab
    assert files["merges.txt"].decode().splitlines()[1:] == merges[1:]
    for wrong, told in (({"pad_token": "<pad>"}, "lacks <pad>"), ({"vocab_size": 9}, "vocab_size 9 is less than the 49408")):
        with pytest.raises((CheckpointError, ConfigError), match=told):
            CLIPTextConditioner.build(vocab=str(path), **tiny, **wrong)
    for content, message in ((b"no gzip", "cannot be read"), (gzip.compress(b"x\na b c\n"), "no list of merges")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_packed(path)
    path.write_bytes(gzip.compress(bytes(20_000_000)))
    with pytest.raises(CheckpointError, match="more than 10000000 bytes when unpacked"):
        read_packed(path)


def test_what_is_no_file_of_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is missing"):
        Pipeline.from_single_file(tmp_path / "no.safetensors")
    with pytest.raises(CheckpointError, match="is a folder; from_pretrained"):
        Pipeline.from_single_file(tmp_path)
    save_file({"encoder.weight": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ArchitectureMismatchError, match=r"the first are encoder\.weight"):
        Pipeline.from_single_file(tmp_path / "x.safetensors")


UNET = "model.diffusion_model"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((f"{UNET}.input_blocks.0.0.weight", "shaped", "one number"), "missing or of an odd shape"),
        ((f"{UNET}.middle_block.1.transformer_blocks.0.attn2.to_k.weight", "shaped", "one row"), "missing or of an odd shape"),
        (
            (f"{UNET}.input_blocks.1.0.in_layers.0.bias", "called", f"{UNET}.input_blocks.{'9' * 5000}.x"),
            "a number above that of",
        ),
        ((f"{UNET}.out.2.weight", "cast", torch.int64), r"out\.2\.weight is stored in torch.int64"),
        (("betas", "cast", torch.bool), "its betas follow neither"),
        (("betas", "shaped", "nothing"), "its betas follow neither"),
        (("betas", "called", "scale_factor"), r"scale_factor must be one number, and is \(1000,\)"),
    ],
)
def test_odd_tensors_are_named(peer: Any, tmp_path: Path, change: Change, message: str) -> None:
    write_tokenizer(tmp_path / "tokenizer")
    file = tmp_path / "model.safetensors"
    save_file(changed({**compvis(peer), "betas": clutter()["betas"]}, [change]), file)
    with pytest.raises(LdmkitError, match=message) as error:
        Pipeline.from_single_file(file, CONFIG)
    assert str(file) in str(error.value)
