"""What the KL autoencoder promises by itself: its Gaussian, scale, tiles and slices, gradients, and named errors."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ldmkit import build
from ldmkit.errors import ConfigError, InputError
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_vae.diffusers_config import convert_diffusers_config
from ldmkit_vae.posterior import LOGVAR_RANGE, DiagonalGaussian, from_final, to_final
from ldmkit_vae.tiling import tile_starts, tiled
from tests.network_peers import VAES, double, randomise

TINY: dict[str, Any] = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}


def tiny(**changes: Any) -> Any:
    network = build("autoencoder", "kl", **{**TINY, **changes}).eval()
    randomise(network)
    return network


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------------------------- posterior


def test_loss_is_the_divergence_in_nats() -> None:
    moments = normal(3, 4, 2, 5)
    posterior = DiagonalGaussian(moments, scaling_factor=0.2, shift_factor=1.0)

    def divergence(dtype: torch.dtype) -> torch.Tensor:
        mean, logvar = moments.to(dtype).chunk(2, dim=1)
        return kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(torch.zeros_like(mean), 1.0)).flatten(1).sum(1)

    assert_as_accurate(posterior.loss_B(), divergence(torch.float32), divergence(torch.float64))
    assert not DiagonalGaussian(torch.zeros(1, 2, 3, 3)).loss_B().any()


def test_loss_of_half_precision_moments_is_summed_in_float32() -> None:
    moments = normal(1, 8, 64, 64).half()
    assert torch.equal(DiagonalGaussian(moments).loss_B(), DiagonalGaussian(moments.float()).loss_B())


def test_extreme_log_variances_are_clamped_as_stated() -> None:
    posterior = DiagonalGaussian(torch.tensor([0.0, 0.0, -1e4, 1e4]).view(1, 4, 1, 1))
    assert posterior.logvar_BCHW.flatten().tolist() == list(LOGVAR_RANGE)
    assert torch.isfinite(posterior.loss_B()).all()


def test_samples_have_the_mean_and_deviation() -> None:
    posterior = DiagonalGaussian(normal(1, 4, 2, 2), scaling_factor=0.5, shift_factor=(1.0, -2.0))
    zeros, ones = torch.zeros(1, 2, 2, 2), torch.ones(1, 2, 2, 2)
    assert torch.equal(posterior.sample(zeros), posterior.mode())
    exact = posterior.mode().double() + posterior.std.double()
    assert_as_accurate(posterior.sample(ones), posterior.mode() + posterior.std, exact)


@given(scale=st.floats(0.01, 10), shift=st.floats(-3, 3))
def test_scale_and_shift_are_undone(scale: float, shift: float) -> None:
    z_BCHW = normal(2, 3, 2, 2).double()
    for s, m in ((scale, shift), ((scale, 1.0, 0.3), (shift, 0.0, -1.0))):
        error = (from_final(to_final(z_BCHW, s, m), s, m) - z_BCHW).abs().max()
        assert error <= 4 * torch.finfo(torch.float64).eps * (z_BCHW.abs().max() + abs(shift) + 1)


def test_measured_statistics_give_unit_latents() -> None:
    """Component-wise, as the trainer does it: measure in the encoder's units, rescale, and the final latents are standard."""
    network = tiny(scaling_factor=1.0)
    x_BCHW = normal(8, 3, 16, 16)
    weights = copy.deepcopy(network.state_dict())
    with torch.no_grad():
        raw = network.encode(x_BCHW).mode().double()
        shift, std = raw.mean(dim=(0, 2, 3)), raw.std(dim=(0, 2, 3))
        network.rescaled(scaling_factor=tuple((1 / std).tolist()), shift_factor=tuple(shift.tolist()))
        final = network.encode(x_BCHW).mode().double()
    eps = torch.finfo(torch.float32).eps
    assert final.mean(dim=(0, 2, 3)).abs().max() <= 8 * eps * float((shift.abs() / std + 1).max())
    assert (final.std(dim=(0, 2, 3)) - 1).abs().max() <= 8 * eps * float((shift.abs() / std + 1).max())
    assert network.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    twin = build("autoencoder", "kl", **network.config.to_dict())
    twin.load_state_dict(weights)
    assert torch.equal(twin.encode(x_BCHW).mode(), network.encode(x_BCHW).mode())


# ------------------------------------------------------------------------------------------------------------ tiles and slices


@torch.no_grad()
def test_one_image_at_a_time_is_the_same_function() -> None:
    network = tiny()
    x_BCHW, z_BCHW = normal(3, 3, 8, 8), normal(3, 4, 4, 4)
    whole, moments = network.decode(z_BCHW), network.encode(x_BCHW)
    wide = double(network)
    network.enable_slicing()
    assert_as_accurate(network.decode(z_BCHW), whole, wide.decode(z_BCHW.double()))
    assert_as_accurate(network.encode(x_BCHW).mode(), moments.mode(), wide.encode(x_BCHW.double()).mode())
    for k in range(3):
        assert torch.equal(network.decode(z_BCHW)[k], network.decode(z_BCHW[k : k + 1])[0])
    network.disable_slicing()
    assert torch.equal(network.decode(z_BCHW), whole)


@given(
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    tile=st.integers(1, 12),
    fraction=st.floats(0, 0.5),
    up=st.integers(1, 3),
)
def test_tiles_of_a_local_map_are_its_whole(size: tuple[int, int], tile: int, fraction: float, up: int) -> None:
    """Blending weights sum to one everywhere: with nothing global in the map, no seam can be told."""
    x_BCHW = normal(1, 2, *size).double()

    def enlarge(part: torch.Tensor) -> torch.Tensor:
        return 3 * part.repeat_interleave(up, dim=2).repeat_interleave(up, dim=3) + 1

    blended = tiled(enlarge, x_BCHW, tile=tile, overlap=int(fraction * tile), out_unit=up)
    assert (blended - enlarge(x_BCHW)).abs().max() <= 16 * torch.finfo(torch.float64).eps * enlarge(x_BCHW).abs().max()


@given(size=st.integers(1, 200), tile=st.integers(1, 40), fraction=st.floats(0, 0.5))
def test_tiles_cover_without_waste(size: int, tile: int, fraction: float) -> None:
    overlap = int(fraction * tile)
    starts = tile_starts(size, tile, overlap)
    ends = [min(start + tile, size) for start in starts]
    assert starts[0] == 0
    assert ends[-1] == size
    assert ends == sorted(set(ends))
    assert all(end - start == overlap for start, end in zip(starts[1:], ends, strict=False))


@torch.no_grad()
def test_tiling_spares_what_fits_one_tile_and_can_be_switched_off() -> None:
    network = tiny()
    z_BCHW = normal(1, 4, 8, 8)
    whole = network.decode(z_BCHW)
    network.enable_tiling(8, 2)
    assert torch.equal(network.decode(z_BCHW), whole)
    network.enable_tiling(4, 1)
    assert not torch.equal(network.decode(z_BCHW), whole)
    network.disable_tiling()
    assert torch.equal(network.decode(z_BCHW), whole)


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0), (8, 5), (8, -1)])
def test_impossible_tiles_are_named(tile: int, overlap: int) -> None:
    with pytest.raises(InputError, match=rf"tile = {tile}, overlap = {overlap}"):
        tiny().enable_tiling(tile, overlap)


# --------------------------------------------------------------------------------------------------------------- the network


@pytest.mark.parametrize("style", VAES)
def test_gradients_reach_every_parameter(style: str) -> None:
    network = build("autoencoder", "kl", **convert_diffusers_config(VAES[style]))
    randomise(network)
    posterior = network.encode(normal(2, 3, 8, 8))
    pixels = network.decode(posterior.sample(normal(*posterior.mode().shape)))
    (pixels.square().mean() + posterior.loss_B().mean()).backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sizes_are_declared() -> None:
    network = tiny(in_channels=1, out_channels=1, latent_channels=6, block_out_channels=(8, 8, 16))
    assert (network.image_channels, network.latent_channels, network.downscale) == (1, 6, 4)
    latents = network.encode(normal(2, 1, 8, 12)).mode()
    assert latents.shape == (2, 6, 2, 3)
    assert network.decode(latents).shape == (2, 1, 8, 12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_weights_decide_the_arithmetic_and_inputs_the_result(dtype: torch.dtype) -> None:
    network = tiny()
    x_BCHW = normal(1, 3, 8, 8)
    expected = copy.deepcopy(network).to(dtype).encode(x_BCHW.to(dtype)).mode().float()
    mode = network.to(dtype).encode(x_BCHW).mode()
    assert mode.dtype == torch.float32
    assert network.decode(mode).dtype == torch.float32
    # final latents are scaled after, or before, the last rounding
    assert (mode - expected).abs().max() <= torch.finfo(dtype).eps * expected.abs().max() + torch.finfo(torch.float32).eps


@pytest.mark.parametrize(
    ("shape", "words"),
    [((1, 4, 8, 8), ["3 channels", "(1, 4, 8, 8)"]), ((1, 3, 9, 8), ["multiples of 2", "9 x 8"])],
)
def test_images_that_do_not_fit_are_named(shape: tuple[int, ...], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        tiny().encode(torch.zeros(shape))
    assert all(word in str(caught.value) for word in words), caught.value


def test_latents_that_do_not_fit_are_named() -> None:
    with pytest.raises(InputError, match=r"4 channels, got \(1, 3, 8, 8\)"):
        tiny().decode(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"block_out_channels": (8, 18)}, ["[8, 18]", "norm_num_groups = 4"]),
        ({"attention_levels": (True,)}, ["attention_levels has 1 entries for 2 levels"]),
        ({"scaling_factor": (1.0, 2.0)}, ["scaling_factor has 2 entries", "latent_channels = 4"]),
        ({"shift_factor": (1.0,)}, ["shift_factor has 1 entries"]),
        ({"scaling_factor": 0.0}, ["scaling_factor = 0.0", "positive"]),
        ({"scaling_factor": (1.0, 1.0, -1.0, 1.0)}, ["positive"]),
        ({"latent_channel": 4}, ["unknown key 'latent_channel'", "latent_channels"]),
    ],
)
def test_impossible_configs_are_named(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        build("autoencoder", "kl", **{**TINY, **changes})
    assert all(word in str(caught.value) for word in words), caught.value


def test_rescaling_is_validated() -> None:
    with pytest.raises(ConfigError, match="3 entries for latent_channels = 4"):
        tiny().rescaled(scaling_factor=(1.0, 1.0, 1.0), shift_factor=0.0)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"act_fn": "relu"}, "act_fn = 'relu'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"frobnicate": 1}, "unknown key 'frobnicate'"),
        ({"down_block_types": ("DownEncoderBlock2D", "Mystery")}, "Mystery"),
        ({"up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D")}, "must mirror each other"),
    ],
)
def test_foreign_configs_that_cannot_be_served_are_named(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        convert_diffusers_config({**VAES["sd"], **changes})


def test_config_round_trips() -> None:
    for values in (*map(convert_diffusers_config, VAES.values()), {"scaling_factor": (1.0, 2.0, 3.0, 4.0)}):
        config = build("autoencoder", "kl", **{**TINY, **values}).config
        assert type(config).parse_json(config.to_json()) == config
