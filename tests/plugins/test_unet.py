"""What the U-Net promises by itself: caching, independence of images, gradients, and named errors."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import Condition, build
from ldmkit.errors import ConfigError, InputError
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_unet.diffusers_config import convert_diffusers_config
from tests.network_peers import UNETS, double, randomise, unet_inputs

TINY: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "transformer_layers_per_block": (1, 0),
    "num_attention_heads": 2,
    "cross_attention_dim": 12,
    "norm_num_groups": 8,
}


def tiny(*, style: str | None = None, **changes: Any) -> Any:
    """A tiny network with every parameter random."""
    values = convert_diffusers_config(UNETS[style]) if style else TINY
    network = build("denoiser", "unet", **{**values, **changes}).eval()
    randomise(network)
    return network


@pytest.mark.parametrize("style", UNETS)
@torch.no_grad()
def test_prepared_keys_and_values_give_the_same_bits(style: str) -> None:
    network = tiny(style=style)
    x_BCHW, t_B, condition = unet_inputs(network)
    weights = copy.deepcopy(network.state_dict())
    prepared = network.prepare(condition)
    layers = [name for name, module in network.named_modules() if name.endswith(".to_k") and module.in_features == 12]
    assert sorted(prepared.extra["unet.kv"]) == sorted(name.removesuffix(".to_k") for name in layers)
    assert torch.equal(network(x_BCHW, t_B, condition), network(x_BCHW, t_B, prepared))
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())


@torch.no_grad()
def test_prepared_keys_and_values_are_what_is_used() -> None:
    network = tiny()
    x_BCHW, t_B, condition = unet_inputs(network)
    prepared = network.prepare(condition)
    others = dataclasses.replace(prepared, tokens_BLC=torch.zeros_like(condition.tokens_BLC))
    assert torch.equal(network(x_BCHW, t_B, prepared), network(x_BCHW, t_B, others))


@torch.no_grad()
def test_prepared_condition_is_still_a_batch() -> None:
    """Joined, sliced and repeated, it means what the condition would."""
    network = tiny()
    x_BCHW, t_B, condition = unet_inputs(network)
    prepared = network.prepare(condition)
    for change in (lambda c: c[1:], lambda c: c.repeat(2), lambda c: Condition.cat([c, c[:1]])):
        mine, plain = change(prepared), change(condition)
        rows = len(plain.tokens_BLC)
        x, t = x_BCHW[:1].expand(rows, -1, -1, -1), t_B[:1].expand(rows)
        exact = double(network)(x.double(), t, plain.to(dtype=torch.float64))
        assert_as_accurate(network(x, t, mine), network(x, t, plain), exact)


def test_caching_can_be_switched_off() -> None:
    network = tiny(cache_context=False)
    condition = unet_inputs(network)[2]
    assert network.prepare(condition) is condition


@given(order=st.permutations(range(4)), style=st.sampled_from(sorted(UNETS)))
@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other(order: list[int], style: str) -> None:
    network = tiny(style=style)
    x_BCHW, t_B, condition = unet_inputs(network, batch=4)
    permuted = network(x_BCHW[order], t_B[order], condition.map(lambda tensor: tensor[order]))
    exact = double(network)(x_BCHW.double(), t_B, condition.to(dtype=torch.float64))
    assert_as_accurate(permuted, network(x_BCHW, t_B, condition)[order], exact[order])


@pytest.mark.parametrize("style", UNETS)
def test_gradients_reach_every_parameter(style: str) -> None:
    network = tiny(style=style)
    x_BCHW, t_B, condition = unet_inputs(network)
    network(x_BCHW, t_B, condition).square().mean().backward()
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []


@torch.no_grad()
def test_a_fresh_network_predicts_zero_and_can_learn() -> None:
    network = build("denoiser", "unet", **TINY)
    x_BCHW, t_B, condition = unet_inputs(network)
    assert not network(x_BCHW, t_B, condition).any()
    with torch.enable_grad():
        (network(x_BCHW, t_B, condition) - x_BCHW).square().mean().backward()
    assert network.conv_out.weight.grad.any()


@torch.no_grad()
def test_every_input_matters() -> None:
    for style in ("sdxl", "x4-upscaler", "inpainting"):
        network = tiny(style=style)
        x_BCHW, t_B, condition = unet_inputs(network)
        out = network(x_BCHW, t_B, condition)
        assert not torch.equal(network(x_BCHW, t_B + 10, condition), out)
        for name in network.requires:
            value = getattr(condition, name)
            other = (value + 1) % 20 if name == "labels_B" else value + 1
            assert not torch.equal(network(x_BCHW, t_B, dataclasses.replace(condition, **{name: other})), out), name


@torch.no_grad()
def test_channels_last_is_the_same_function() -> None:
    network = tiny()
    x_BCHW, t_B, condition = unet_inputs(network)
    exact = double(network)(x_BCHW.double(), t_B, condition.to(dtype=torch.float64))
    out = network(x_BCHW, t_B, condition)
    network.to(memory_format=torch.channels_last)
    assert_as_accurate(network(x_BCHW.to(memory_format=torch.channels_last), t_B, condition), out, exact)


def test_config_round_trips() -> None:
    for values in UNETS.values():
        config = build("denoiser", "unet", **convert_diffusers_config(values)).config
        assert type(config).parse_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_out_channels": (16, 36)}, ["[16, 36]", "norm_num_groups = 8"]),
        ({"block_out_channels": ()}, ["block_out_channels"]),
        ({"num_attention_heads": 3}, ["num_attention_heads = 3", "16 channels"]),
        ({"num_attention_heads": 0}, ["num_attention_heads = 0"]),
        ({"num_attention_heads": (2, 5)}, ["num_attention_heads = 5", "32 channels"]),
        ({"num_attention_heads": (2, 2, 2)}, ["num_attention_heads has 3 entries for 2 levels"]),
        ({"transformer_layers_per_block": (1,)}, ["transformer_layers_per_block has 1 entries for 2 levels"]),
        ({"transformer_layers_per_block": (-1, 0)}, ["must not be negative"]),
        ({"only_cross_attention": (True,)}, ["only_cross_attention has 1 entries for 2 levels"]),
        ({"only_cross_attention": True, "cross_attention_dim": None}, ["needs a cross_attention_dim"]),
        ({"spatial_channels": 4}, ["spatial_channels = 4", "in_channels = 4"]),
        ({"freq_shift": 8.0}, ["freq_shift = 8", "16"]),
        ({"attention_block": "plain"}, ["cross_attention_dim = 12"]),
        ({"attention_block": "plain", "cross_attention_dim": None, "transformer_layers_per_block": (2, 0)}, ["[2, 0, 1]"]),
        ({"attention_head_dim": 8}, ["unknown key 'attention_head_dim'", "num_attention_heads"]),
        ({"dropout": 1.0}, ["dropout = 1.0"]),
        ({"layers_per_block": "2"}, ["layers_per_block = '2'"]),
    ],
)
def test_impossible_configs_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("denoiser", "unet", **{**TINY, **changes})
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("style", "change", "words"),
    [
        ("sd1", lambda x, t, c: (x[:, :3], t, c), ["4 channels", "got 3"]),
        ("sd1", lambda x, t, c: (x[..., :7], t, c), ["multiples of 2", "8 x 7"]),
        ("sd1", lambda x, t, c: (x, t[:1], c), ["(3,)", "(1,)"]),
        ("sd1", lambda x, t, c: (x, t, c[:2]), ["2 images", "latents for 3"]),
        ("sd1", lambda x, t, c: (x, t, c.map(lambda v: v[..., :3])), ["tokens_BLC must have 12 channels", "(3, 5, 3)"]),
        ("sd1", lambda x, t, c: (x, t, Condition()), ["tokens_BLC must have 12 channels", "None"]),
        ("sdxl", lambda x, t, c: (x, t, dataclasses.replace(c, vector_BC=None)), ["vector_BC must have 34 channels"]),
        ("x4-upscaler", lambda x, t, c: (x, t, dataclasses.replace(c, labels_B=None)), ["labels_B", "20 classes"]),
        (
            "inpainting",
            lambda x, t, c: (x, t, dataclasses.replace(c, spatial_BCHW=None)),
            ["spatial_BCHW must have 5 channels"],
        ),
        (
            "inpainting",
            lambda x, t, c: (x, t, dataclasses.replace(c, spatial_BCHW=c.spatial_BCHW[:, :4])),
            ["5 channels", "(3, 4, 8, 8)"],
        ),
        (
            "inpainting",
            lambda x, t, c: (x, t, dataclasses.replace(c, spatial_BCHW=c.spatial_BCHW[..., :4])),
            ["(8, 8)", "(3, 5, 8, 4)"],
        ),
    ],
)
def test_inputs_that_do_not_fit_are_named(style: str, change: Any, words: list[str]) -> None:
    network = tiny(style=style)
    with pytest.raises(InputError) as caught:
        network(*change(*unet_inputs(network)))
    assert all(word in str(caught.value) for word in words), caught.value


def test_conditions_it_would_ignore_or_lacks_are_named_before_the_run() -> None:
    network = tiny()
    condition = unet_inputs(network)[2]
    with pytest.raises(InputError, match="would ignore labels_B"):
        network.prepare(dataclasses.replace(condition, labels_B=torch.tensor([0, 1, 2])))
    with pytest.raises(InputError, match="needs tokens_BLC"):
        network.prepare(Condition())


@pytest.mark.parametrize("labels", [[0, 20, 1], [-1, 3, 5]])
def test_class_labels_outside_the_table_are_named(labels: list[int]) -> None:
    network = tiny(style="x4-upscaler")
    condition = dataclasses.replace(unet_inputs(network)[2], labels_B=torch.tensor(labels))
    with pytest.raises(InputError, match=rf"from {min(labels)} to {max(labels)}: the network knows 0 to 19"):
        network.prepare(condition)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "gelu"}, ["act_fn = 'gelu'", "'silu'"]),
        ({"resnet_time_scale_shift": "scale_shift", "time_embedding_type": "fourier"}, ["scale_shift", "fourier"]),
        ({"frobnicate": 1}, ["unknown key 'frobnicate'"]),
        ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}, ["SimpleCrossAttnDownBlock2D"]),
        ({"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}, ["must mirror each other"]),
    ],
)
def test_foreign_configs_that_cannot_be_served_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        convert_diffusers_config({**UNETS["sd1"], **changes})
    assert all(word in str(caught.value) for word in words), caught.value
