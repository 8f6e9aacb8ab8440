"""The U-Net beside diffusers': same weights, same numbers, same keys."""

import json

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from ldmkit import ConfigError, build
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_unet.diffusers_config import convert_diffusers_config, write_diffusers_config
from ldmkit_unet.presets import PRESETS
from ldmkit_unet.unet import UNet
from tests.ldm_peers import CHURCHES, PLAIN
from tests.network_peers import UNETS, double, peer_unet, randomise, shapes_of, unet_inputs, unet_pair


@pytest.mark.parametrize("style", UNETS)
@torch.no_grad()
def test_as_accurate_as_diffusers(style: str) -> None:
    ours, peer = unet_pair(style)
    x_BCHW, t_B, condition = unet_inputs(ours)
    wide = condition.to(dtype=torch.float64)
    mine, theirs = ours(x_BCHW, t_B, condition), peer_unet(peer, x_BCHW, t_B, condition)
    for oracle in (
        double(ours)(x_BCHW.double(), t_B, wide),
        peer_unet(double(peer), x_BCHW.double(), t_B, wide),
    ):
        assert_as_accurate(mine, theirs, oracle, what=style)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_as_accurate_as_diffusers_in_half_precision(dtype: torch.dtype) -> None:
    ours, peer = unet_pair("sdxl")
    x_BCHW, t_B, condition = unet_inputs(ours)
    oracle = peer_unet(double(peer), x_BCHW.double(), t_B, condition.to(dtype=torch.float64))
    x_BCHW, condition = x_BCHW.to(dtype), condition.to(dtype=dtype)
    mine, theirs = ours.to(dtype)(x_BCHW, t_B, condition), peer_unet(peer.to(dtype), x_BCHW, t_B, condition)
    assert_as_accurate(mine, theirs, oracle)


@pytest.mark.parametrize("values", [PLAIN, CHURCHES], ids=["faces", "churches"])
@torch.no_grad()
def test_unconditional_as_accurate_as_diffusers(values: dict) -> None:
    """The plain attention of the LDM originals without a condition is UNet2DModel's; its config goes there and back."""
    peer = UNet2DModel(**values).eval()
    randomise(peer)
    ours = build("denoiser", "unet", **convert_diffusers_config({**peer.config, "_class_name": "UNet2DModel"})).eval()
    ours.load_state_dict(peer.state_dict())
    x_BCHW, t_B, condition = unet_inputs(ours)
    mine, theirs = ours(x_BCHW, t_B, condition), peer(x_BCHW, t_B).sample
    exact = double(peer)(x_BCHW.double(), t_B).sample
    assert_as_accurate(mine, theirs, exact)
    assert_as_accurate(mine, theirs, double(ours)(x_BCHW.double(), t_B, condition))
    class_name, written = write_diffusers_config(ours.config)
    again = UNet2DModel(**written).eval()
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again(x_BCHW, t_B).sample, theirs)
    assert UNet.Config.parse(convert_diffusers_config({**written, "_class_name": class_name})) == ours.config


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift = 'spatial'"),
        ({"attn_norm_num_groups": None}, "attn_norm_num_groups = None"),
        ({"downsample_type": "conv"}, "resampled by conv and resnet"),
        ({"up_block_types": ("UpBlock2D", "AttnUpBlock2D")}, "resampled by conv and resnet"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0 must be positive"),
        ({"mid_block_type": None, "some": 1}, r"unknown key 'some' \(= 1\); mid_block_type = None \(only 'UNetMidBlock2D' can"),
        ({"down_block_types": ("DownBlock2D", "SkipDownBlock2D")}, r"block types \['SkipDownBlock2D'\] are none of"),
        ({"down_block_types": ("DownBlock2D", "DownBlock2D")}, "must mirror each other"),
    ],
)
def test_unconditional_configs_that_cannot_be_served(change: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        convert_diffusers_config({**CHURCHES, **change, "_class_name": "UNet2DModel"})


def test_unconditional_configs_that_diffusers_lacks() -> None:
    """The churches have as many heads at every level; UNet2DModel has heads of one size."""
    with pytest.raises(ConfigError, match=r"heads of \[24, 48, 96\] channels"):
        write_diffusers_config(UNet.Config.parse(PRESETS["ldm-churches"]))
    plain = {"attention_block": "plain", "cross_attention_dim": None, "guidance_dim": 8, "num_attention_heads": 10}
    with pytest.raises(ConfigError, match="guidance_dim = 8: diffusers' UNet2DModel is told no such thing"):
        write_diffusers_config(UNet.Config(**plain))
    assert write_diffusers_config(UNet.Config(guidance_dim=8))[1]["time_cond_proj_dim"] == 8
    with pytest.raises(ConfigError, match="diffusers has these with attention_block = 'plain' only"):
        write_diffusers_config(UNet.Config(time_scale_shift=True))


@pytest.mark.parametrize(
    ("preset", "file", "parameters"),
    [("sd15", "diffusers_keys_sd15_unet.json", 859_520_964), ("sdxl", "diffusers_keys_sdxl-base_unet.json", 2_567_463_684)],
)
def test_keys_and_shapes_of_published_weights(preset, file, parameters, shared) -> None:
    network = _on_meta(**PRESETS[preset])
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == shapes_of(
        shared / "data/key_shapes" / file
    )
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    config = UNet.Config.parse(PRESETS[preset])
    assert config.replace(**PRESETS[preset]) == config


PUBLISHED = {"sd14": "sd15", "sd15": "sd15", "sd21-base": "sd21", "sdxl-base": "sdxl"}


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_configs_are_the_presets(folder: str, shared) -> None:
    values = json.loads((shared / "data/checkpoints" / folder / "unet/config.json").read_text())
    config, wanted = UNet.Config.parse(convert_diffusers_config(values)), UNet.Config.parse(PRESETS[PUBLISHED[folder]])
    heads = [c.per_level(c.num_attention_heads) for c in (config, wanted)]
    assert heads[0] == heads[1]
    assert config.replace(num_attention_heads=1) == wanted.replace(num_attention_heads=1)


def _on_meta(**values) -> nn.Module:
    with torch.device("meta"):
        return build("denoiser", "unet", **values)
