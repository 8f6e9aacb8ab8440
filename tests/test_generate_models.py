"""`ldmkit generate` from models that take no prompt: unconditional, class-conditional, upscaling; and from single files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ldmkit import Pipeline, build
from ldmkit.checkpoints.compvis import unet_map, vae_map
from ldmkit.checkpoints.lora_names import Layers
from ldmkit.commands.recorded import CHUNK
from tests.conditions import randomise
from tests.test_generate import generate, pixels, settings

VQ: dict[str, Any] = {"block_out_channels": [8, 8], "layers_per_block": 2, "norm_num_groups": 4, "latent_channels": 3}
UNET: dict[str, Any] = {
    "out_channels": 3,
    "block_out_channels": [16, 32],
    "layers_per_block": 2,
    "transformer_layers_per_block": [0, 1],
    "num_attention_heads": [1, 1],
    "norm_num_groups": 8,
}
PLAIN: dict[str, Any] = {"attention_block": "plain", "cross_attention_dim": None}
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195, "beta_schedule": "scaled_linear"}


def pipeline(told: int = 0, conditioner: Any = None, **options: Any) -> Pipeline:
    """VQ-f2 and a U-Net in small. `told`: channels of a small picture."""
    values = {**UNET, **({"cross_attention_dim": 8} if conditioner is not None else PLAIN)}
    autoencoder = build("autoencoder", "vq", **VQ)
    denoiser = build("denoiser", "unet", in_channels=3 + told, spatial_channels=told, **values)
    for seed, part in enumerate(part for part in (autoencoder, denoiser, conditioner) if part is not None):
        randomise(part, seed)
    size = {} if told else {"height": 16, "width": 16}
    return Pipeline(
        autoencoder=autoencoder,
        denoiser=denoiser,
        conditioner=conditioner,
        schedule={**BETAS, "timestep_spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False},
        defaults={**size, "num_inference_steps": 2, "guidance_scale": 1.0},
        **options,
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models."""
    folder = tmp_path_factory.mktemp("models")
    faces = pipeline()
    faces.save_pretrained(folder / "faces")
    faces.save_pretrained(folder / "their-faces", format="diffusers")
    unet = unet_map(levels=2, layers_per_block=2, attention=(False, True), plain_head_channels=[16, 32])
    own = {
        "model.diffusion_model": (unet, faces.denoiser),
        "first_stage_model": (vae_map(levels=2, layers_per_block=2), faces.autoencoder),
    }
    tensors = {
        key: value.contiguous().clone()
        for place, (keys, part) in own.items()
        for key, value in keys.prefixed(place).restore(part.state_dict()).items()
    }
    tensors["betas"] = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64).square().float()
    save_file(tensors, folder / "faces.safetensors")
    torch.save({"state_dict": tensors}, folder / "faces.ckpt")
    pipeline(told=3, upscaling={}).save_pretrained(folder / "upscaler")
    named = {"num_classes": 3, "hidden_size": 8, "names": ["tench", "red fox", "1"]}
    pipeline(conditioner=build("conditioner", "class-label", **named)).save_pretrained(folder / "classes")
    return folder


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def drawn(pipe: Pipeline, **call: Any) -> list[np.ndarray]:
    return [np.asarray(picture).astype(int) for picture in pipe(progress=False, **call).images]


def assert_same(path: Path | str, picture: np.ndarray) -> None:
    """Alone or in a batch, products round differently; a pixel may fall on the other side."""
    assert np.abs(pixels(Path(path)) - picture).max() <= 1


@pytest.mark.parametrize("name", ["faces", "their-faces"])
def test_an_unconditional_model_takes_a_number(name: str, saved: Path) -> None:
    call = [] if name == "faces" else ["--steps", 2]
    assert generate("--model", saved / name, "-n", 3, "--batch", 2, "--seed", 7, "--grid", "all.png", *call) == 0
    expected = drawn(Pipeline.from_pretrained(saved / name), num_images_per_prompt=3, seed=7, num_inference_steps=2)
    for k, picture in enumerate(expected, start=1):
        assert_same(f"out/{name}-{k}.png", picture)
    assert (expected[0] != expected[1]).any()
    recorded = settings(Path(f"out/{name}-2.png"))
    assert recorded.pop("versions").keys() == {"ldmkit", "torch"}  # type: ignore[attr-defined]
    assert recorded == {"seed": 7, "number": 1, "model": str(saved / name), "steps": 2}
    assert "prompt" not in Image.open(f"out/{name}-2.png").info
    assert generate("--like", f"out/{name}-3.png", "-o", "again.png") == 0
    assert_same("again.png", expected[2])
    assert settings(Path("again.png")) == settings(Path(f"out/{name}-3.png"))
    assert Image.open("all.png").width > 3 * 16


def test_a_relative_model_is_found_from_elsewhere(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved)
    assert generate("--model", "their-faces", "--steps", 2, "-o", tmp_path / "face.png") == 0
    monkeypatch.chdir(tmp_path)
    assert generate("--like", "face.png", "-o", "again.png") == 0
    assert settings(Path("again.png")) == settings(Path("face.png"))


def test_a_single_file_and_what_it_cannot_tell(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("--model", saved / "their-faces", "--seed", 1, "--steps", 2, "-o", "folder.png") == 0
    told = ["--config", saved / "their-faces", "--height", 16, "--width", 16, "--steps", 2, "--seed", 1]
    assert generate("--model", saved / "faces.safetensors", *told) == 0
    assert_same("out/faces-1.png", pixels(Path("folder.png")))
    assert generate("--like", "out/faces-1.png", "-o", "again.png") == 0
    assert_same("again.png", pixels(Path("folder.png")))
    capsys.readouterr()
    assert generate("--model", saved / "faces.ckpt", *told) == 2
    assert "is a pickle" in capsys.readouterr().err
    assert generate("--model", saved / "faces.ckpt", *told, "--allow-pickle", "-o", "pickle.png") == 0
    assert_same("pickle.png", pixels(Path("folder.png")))
    assert generate("--like", "pickle.png") == 2  # a picture does not speak for its pickle


def test_the_hub_when_allowed(saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(saved / name.partition("/")[2]))
    call = ["--model", "some/faces", "--revision", "0" * 40]
    assert generate(*call) == 2
    assert generate(*call, "--allow-download", "-o", "face.png") == 0
    assert settings(Path("face.png"))["revision"] == "0" * 40
    assert generate("--like", "face.png") == 2  # nor for the network
    assert generate("--like", "face.png", "--allow-download", "-o", "again.png") == 0
    assert_same("again.png", pixels(Path("face.png")))


def test_upscaling_takes_a_picture(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8))
    small.save("small cat.png")
    assert generate("--model", saved / "upscaler", "--image", "small cat.png", "-n", 2, "--seed", 3) == 0
    for k, picture in enumerate(
        drawn(Pipeline.from_pretrained(saved / "upscaler"), image=small, num_images_per_prompt=2, seed=3), start=1
    ):
        assert picture.shape == (16, 24, 3)
        assert_same(f"out/small-cat-{k}.png", picture)
    assert generate("--like", "out/small-cat-2.png", "-o", "again.png") == 0
    assert_same("again.png", pixels(Path("out/small-cat-2.png")))
    small.rotate(180).save("small cat.png")
    capsys.readouterr()
    assert generate("--like", "out/small-cat-2.png", "-o", "again.png") == 2
    assert "small cat.png has changed" in capsys.readouterr().err


def test_classes_by_name_and_number(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name comes first: class 2 is called "1"."""
    assert generate("red fox", "0", "1", "--model", saved / "classes", "-n", 2, "--seed", 5, "--guidance", 2) == 0
    names = ["red-fox-1.png", "red-fox-2.png", "0-1.png", "0-2.png", "1-1.png", "1-2.png"]
    assert capsys.readouterr().out.split() == [str(Path("out") / name) for name in names]
    pipe = Pipeline.from_pretrained(saved / "classes")
    expected = drawn(pipe, class_labels=[1, 1, 0, 0, 2, 2], seed=5, guidance_scale=2.0)
    for name, picture in zip(names, expected, strict=True):
        assert_same(f"out/{name}", picture)
    assert settings(Path("out/0-2.png"))["prompt"] == "0"
    assert generate("--like", "out/0-2.png", "-o", "again.png") == 0
    assert_same("again.png", expected[3])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("faces", ["a face"], "a PROMPT was given, 'a face', but"),
        ("faces", ["a face"], "is unconditional: it draws without one; leave it out"),
        ("faces", ["--negative", "a face"], "negative_prompt was given, but this pipeline has no conditioner"),
        ("faces", ["--guidance", "3"], "guidance_scale = 3 has no effect: this pipeline is unconditional"),
        ("faces", ["--image-prompt", "small.png"], "image_prompt was given, but this pipeline has no conditioner"),
        ("upscaler", [], "upscales pictures: give --image FILE"),
        ("upscaler", ["a cat", "--image", "small.png"], "upscales without one; leave it out"),
        ("classes", [], "draws classes; give their names or numbers as PROMPT"),
        ("classes", ["red fix"], "'red fix', which names no class; did you mean 'red fox'?"),
        ("classes", ["9"], "class label 0 is 9, outside 0 to 2"),
        ("faces", ["--ema"], "--ema is for single files"),
        ("faces", ["--allow-pickle"], "--allow-pickle is for single files"),
        ("faces.safetensors", ["--variant", "fp16"], "--variant is for folders"),
        ("faces.safetensors", ["--allow-download"], "--allow-download is for folders and names"),
        ("faces", ["--allow-download"], "is no name on the hub"),
    ],
)
def test_what_a_model_does_not_take(
    model: str, arguments: list[str], message: str, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (8, 8)).save("small.png")
    assert generate("--model", saved / model, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not list(Path("out").glob("*.png"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "its ldmkit settings"),
        ("[]", "its ldmkit settings"),
        ("{}", "'seed' is required"),
        ('{"seed": "1"}', "seed = '1'"),
        ('{"seed": 1, "number": -1}', "number = -1"),
        ('{"seed": 1, "model": 7}', "model = 7"),
        ('{"seed": 1, "stepps": 7}', "did you mean 'steps'?"),
    ],
)
def test_spoilt_settings_are_one_line(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt(CHUNK, text)
    Image.new("RGB", (8, 8)).save("spoilt.png", pnginfo=info)
    assert generate("--like", "spoilt.png") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --like spoilt.png: its ldmkit settings")
    assert message in error


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts, a LoRA for it and a word."""
    from tests.checkpoint_peers import stable_diffusion
    from tests.checkpoints.test_lora import draw, kohya

    folder = tmp_path_factory.mktemp("texts")
    stable_diffusion(folder / "tokenizer").save_pretrained(folder / "sd")
    pipe = Pipeline.from_pretrained(folder / "sd")
    pairs = draw(Layers(pipe.denoiser, pipe.conditioner))
    save_file(kohya(pairs), folder / "style=1.safetensors")
    torch.save({"<dog>": torch.randn(2, 12, generator=torch.Generator().manual_seed(1))}, folder / "learned_embeds.bin")
    return folder


def test_loras_and_words(texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(texts)
    lora, words = "style=1.safetensors", "learned_embeds.bin"
    call = ["a <cat>", "--model", "sd", "--seed", 1, "--steps", 4, "--guidance", 20, "--allow-pickle"]
    assert generate(*call, "--lora", f"{lora}=-3", "--lora", lora, "--embedding", f"{words}=<cat>", "-o", "a.png") == 0
    pipe = Pipeline.from_pretrained("sd")
    told = {"prompt": "a <cat>", "seed": 1, "num_inference_steps": 4, "guidance_scale": 20.0}
    seen = drawn(pipe, **told)
    pipe.load_textual_inversion(words, "<cat>", allow_pickle=True)
    seen += drawn(pipe, **told)
    for weight in (-3.0, 1.0):
        pipe.load_lora_weights(lora, weight=weight)
        seen += drawn(pipe, **told)
    assert_same("a.png", seen[-1])
    assert all(np.abs(after - before).max() > 2 for before, after in itertools.pairwise(seen))
    assert settings(Path("a.png"))["lora"] == [f"{texts / lora}=-3", f"{texts / lora}"]
    monkeypatch.chdir(texts / "sd")
    assert generate("--like", texts / "a.png", "-o", texts / "b.png", "--allow-pickle") == 0
    assert_same(texts / "b.png", seen[-1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora", "style=1.safetensors=much"], "what follows = is the weight, a number, not 'much'"),
        (["--lora", "style=1.safetensors=inf"], "inf"),
        (["--lora", "nothing.safetensors"], "nothing.safetensors"),
        (["--embedding", "learned_embeds.bin"], "is a pickle"),
    ],
)
def test_loras_and_words_that_cannot_be(
    arguments: list[str], message: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(texts)
    assert generate("a cat", "--model", "sd", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
