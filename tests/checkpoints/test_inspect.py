"""`ldmkit inspect`: what a file or folder is, without a tensor being read."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldmkit.checkpoints.accounting import grouped
from ldmkit.cli import main
from tests.checkpoint_peers import stable_diffusion
from tests.conditions import tiny_pipeline


def hollow(path: Path, shapes: dict[str, list[int]], dtype: str = "F16") -> Path:
    """A safetensors file of full size that takes no room: all header, and a hole."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * 2
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("compvis_keys_sd1", ["unet       UNet2DConditionModel  686   859,520,964  float16", "vae        AutoencoderKL"]),
        ("sgm_keys_sd_xl_base", ["architecture  Stable Diffusion XL", "unet       UNet2DConditionModel  1,680  2,567,463,684"]),
    ],
)
def test_full_size_files(shared: Path, tmp_path: Path, name: str, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shapes = json.loads((shared / f"data/key_shapes/{name}.json").read_text())
    path = hollow(tmp_path / "x.safetensors", {**shapes, "betas": [1000], "control.bias": [3]})
    assert main(["inspect", str(path)]) == 0
    out = capsys.readouterr().out
    assert [line for line in lines if line not in out] == []
    assert "left out: tables of the noise schedule, which is computed anew\n  betas" in out
    assert "keys not understood: 1\n  control.bias" in out


def test_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stable_diffusion(tmp_path / "tokenizer").save_pretrained(tmp_path / "sd")
    path = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), "loss.logvar": torch.zeros(1)}, path)
    assert main(["inspect", str(tmp_path / "sd"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["architecture"] == "StableDiffusionPipeline"
    assert found["prediction"] == "epsilon"
    assert [component["name"] for component in found["components"]] == ["unet", "vae", "text_encoder"]
    assert found["unknown"] == ["autoencoder: loss.logvar"]
    assert "unexpected  loss.logvar" in found["problems"][0]
    assert main(["inspect", str(tiny_pipeline(tmp_path).save_pretrained(tmp_path / "own"))]) == 0
    assert "architecture  autoencoder kl, denoiser unet, conditioner bert" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds neither model_index.json (diffusers) nor pipeline.json (ldmkit)" in capsys.readouterr().err


def test_long_lists_are_grouped_without_loss() -> None:
    keys = [f"down.{i}.res.{j}.weight" for i in range(4) for j in (0, 2)]
    assert grouped([*keys, "out"], listed=3) == ["down.{0..3}.res.{0,2}.weight (8 keys)", "out"]
    assert grouped(["a", "b"], lambda key: f" ({key})") == ["a (a)", "b (b)"]
