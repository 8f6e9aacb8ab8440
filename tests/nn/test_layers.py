"""Layers, each against its formula or a peer; whole networks are tested in tests/plugins."""

import math

import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv2d, group_norm, pad, silu

from ldmkit.nn import (
    Attention,
    AttentionBlock,
    Context,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    Upsample,
    sinusoidal_embedding,
)
from ldmkit.testing.accuracy import assert_as_accurate
from tests.network_peers import double, randomise


@given(
    times=st.lists(st.floats(0, 1000, width=32), min_size=1, max_size=4),
    dim=st.integers(3, 33),
    flip=st.booleans(),
    shift=st.sampled_from([0.0, 0.5]),
)
def test_sinusoidal_embedding_has_diffusers_bits(times: list[float], dim: int, flip: bool, shift: float) -> None:
    t_B = torch.tensor(times)
    ours = sinusoidal_embedding(t_B, dim, flip_sin_to_cos=flip, freq_shift=shift)
    theirs = get_timestep_embedding(t_B, dim, flip_sin_to_cos=flip, downscale_freq_shift=shift)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_sinusoidal_embedding_takes_any_dtype(dtype: torch.dtype) -> None:
    embedding = sinusoidal_embedding(torch.tensor([0, 7], dtype=dtype), 8)
    assert embedding.dtype == torch.float32
    assert torch.equal(embedding, sinusoidal_embedding(torch.tensor([0.0, 7.0]), 8))


def test_sinusoidal_embedding_is_the_formula() -> None:
    t, dim = 12.5, 6
    angles = [t * 10000 ** (-i / 3) for i in range(3)]
    exact = torch.tensor([[math.cos(a) for a in angles] + [math.sin(a) for a in angles]], dtype=torch.float64)
    # one rounding of the frequency, one of the product, one of the wave: angles carry an absolute error of a few eps t
    bound = 4 * torch.finfo(torch.float32).eps * t
    assert (sinusoidal_embedding(torch.tensor([t]), dim).double() - exact).abs().max() < bound


@pytest.mark.parametrize("fused", [False, True])
def test_group_norm_with_silu(fused: bool) -> None:
    layer = GroupNorm(4, 8, eps=1e-5, silu=fused)
    randomise(layer)
    x_BCHW = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))

    def formula(dtype: torch.dtype) -> torch.Tensor:
        normed = group_norm(x_BCHW.to(dtype), 4, layer.weight.to(dtype), layer.bias.to(dtype), 1e-5)
        return silu(normed) if fused else normed

    assert_as_accurate(layer(x_BCHW), formula(torch.float32), formula(torch.float64))


def test_resampling() -> None:
    x_BCHW = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    up, symmetric, asymmetric = Upsample(2), Downsample(2), Downsample(2, asymmetric=True)
    repeated = x_BCHW.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(up(x_BCHW), conv2d(repeated, up.conv.weight, up.conv.bias, padding=1))
    for layer, padding in ((symmetric, (1, 1, 1, 1)), (asymmetric, (0, 1, 0, 1))):
        expected = conv2d(pad(x_BCHW.double(), padding), layer.conv.weight.double(), layer.conv.bias.double(), stride=2)
        peer = conv2d(pad(x_BCHW, padding), layer.conv.weight, layer.conv.bias, stride=2)
        assert layer(x_BCHW).shape == (1, 2, 2, 3)
        assert_as_accurate(layer(x_BCHW), peer, expected)


@torch.no_grad()
def test_masked_tokens_do_not_matter() -> None:
    layer = Attention(8, heads=2, context_channels=6)
    generator = torch.Generator().manual_seed(0)
    x_BLC, tokens_BLC = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    mask_BL = torch.tensor([[True, False, True, False, False]] * 2)
    changed = tokens_BLC.masked_fill(~mask_BL[..., None], 1e3)
    assert torch.equal(layer(x_BLC, Context(tokens_BLC, mask_BL)), layer(x_BLC, Context(changed, mask_BL)))
    assert not torch.equal(layer(x_BLC, Context(tokens_BLC)), layer(x_BLC, Context(changed)))


@torch.no_grad()
def test_tokens_have_no_order() -> None:
    """Cross-attention knows positions only through the tokens' own values: a permutation changes roundings only."""
    layer = Attention(8, heads=2, context_channels=6)
    generator = torch.Generator().manual_seed(0)
    x_BLC, tokens_BLC = torch.randn(2, 4, 8, generator=generator), torch.randn(2, 5, 6, generator=generator)
    out, permuted = layer(x_BLC, Context(tokens_BLC)), layer(x_BLC, Context(tokens_BLC[:, torch.tensor([3, 0, 4, 1, 2])]))
    assert_as_accurate(permuted, out, double(layer)(x_BLC.double(), Context(tokens_BLC.double())))


@pytest.mark.parametrize("linear", [False, True])
def test_both_projections_are_one_map(linear: bool) -> None:
    """1x1 convolutions and linear layers with the same weights are the same function, in either memory format."""
    options = {"heads": 2, "depth": 1, "context_channels": 6, "num_groups": 4}
    layer, twin = (SpatialTransformer(8, linear_projection=flag, **options) for flag in (linear, not linear))
    randomise(layer)
    twin.load_state_dict({k: v.reshape(twin.state_dict()[k].shape) for k, v in layer.state_dict().items()})
    generator = torch.Generator().manual_seed(0)
    x_BCHW, tokens_BLC = torch.randn(2, 8, 3, 4, generator=generator), torch.randn(2, 5, 6, generator=generator)
    context = Context(tokens_BLC)
    out, exact = layer(x_BCHW, context), double(layer)(x_BCHW.double(), Context(tokens_BLC.double()))
    assert_as_accurate(twin(x_BCHW, context), out, exact)
    assert_as_accurate(layer(x_BCHW.to(memory_format=torch.channels_last), context), out, exact)


@torch.no_grad()
def test_attention_block_commutes_with_pixel_permutations() -> None:
    block = AttentionBlock(8, heads=2, num_groups=4, eps=1e-6)
    randomise(block)
    x_BCHW = torch.randn(1, 8, 2, 6, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    permuted = block(x_BCHW.flatten(2)[:, :, order].unflatten(2, (2, 6))).flatten(2)
    out, exact = block(x_BCHW).flatten(2), double(block)(x_BCHW.double()).flatten(2)
    assert_as_accurate(permuted, out[:, :, order], exact[:, :, order])


@torch.no_grad()
def test_what_a_norm_adds_is_what_would_be_added_before_it() -> None:
    """The time embedding inside a res block, and the last sum of a network inside its last norm; the names of weights stay."""
    generator = torch.Generator().manual_seed(0)
    norm = GroupNorm(4, 8, eps=1e-5, silu=True)
    randomise(norm)
    x_BCHW, residual_BCHW = (torch.randn(2, 8, 3, 4, generator=generator) for _ in range(2))
    shift_BC = torch.randn(2, 8, generator=generator)
    fused = norm(x_BCHW, shift_BC=shift_BC, residual_BCHW=residual_BCHW)
    torch.testing.assert_close(fused, norm(x_BCHW + shift_BC[:, :, None, None] + residual_BCHW))
    assert set(norm.state_dict()) == {"weight", "bias"}

    block = ResBlock(8, 8, time_channels=6, num_groups=4, eps=1e-5)
    randomise(block)
    time_BC = torch.randn(2, 6, generator=generator)
    assert torch.equal(torch.add(*block.branches(x_BCHW, time_BC)), block(x_BCHW, time_BC))
    shifted_BCHW = block.conv1(block.norm1(x_BCHW)) + block.time_emb_proj(time_BC)[:, :, None, None]
    torch.testing.assert_close(block(x_BCHW, time_BC), x_BCHW + block.conv2(block.norm2(shifted_BCHW)))
