"""The KL autoencoder beside diffusers': same weights, same numbers, same keys, same tiles."""

import json

import pytest
import torch
from torch import nn

from ldmkit import build
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_vae.autoencoder import KLAutoencoder
from ldmkit_vae.diffusers_config import convert_diffusers_config
from ldmkit_vae.presets import PRESETS
from tests.network_peers import VAES, double, shapes_of, vae_pair


def images(channels: int = 3, *, batch: int = 2, height: int = 16, width: int = 24) -> torch.Tensor:
    return 2 * torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(2)) - 1


@pytest.mark.parametrize("style", VAES)
@torch.no_grad()
def test_encodes_as_accurately(style: str) -> None:
    ours, peer = vae_pair(style)
    x_BCHW = images()
    mine, theirs = ours.encode(x_BCHW), peer.encode(x_BCHW).latent_dist
    for oracle in (double(peer).encode(x_BCHW.double()).latent_dist, double(ours).encode(x_BCHW.double())):
        mean, logvar = (oracle.mean, oracle.logvar) if hasattr(oracle, "mean") else (oracle.mean_BCHW, oracle.logvar_BCHW)
        assert_as_accurate(mine.mean_BCHW, theirs.mean, mean, what="mean")
        assert_as_accurate(mine.logvar_BCHW, theirs.logvar, logvar, what="log-variance")


@pytest.mark.parametrize("style", VAES)
@torch.no_grad()
def test_final_latents_and_back(style: str) -> None:
    """Scale and shift as diffusers' pipelines apply them, around their autoencoder."""
    ours, peer = vae_pair(style)
    scale, shift = peer.config.scaling_factor, peer.config.shift_factor or 0.0
    x_BCHW = images()
    noise = torch.randn(peer.encode(x_BCHW).latent_dist.mean.shape, generator=torch.Generator().manual_seed(3))
    exact, exact_peer = x_BCHW.double(), double(peer)
    posterior, wide = peer.encode(x_BCHW).latent_dist, exact_peer.encode(exact).latent_dist
    theirs = (posterior.mean + posterior.std * noise - shift) * scale
    assert_as_accurate(ours.encode(x_BCHW).sample(noise), theirs, (wide.mean + wide.std * noise.double() - shift) * scale)
    assert_as_accurate(ours.encode(x_BCHW).mode(), (posterior.mode() - shift) * scale, (wide.mode() - shift) * scale)

    z_BCHW = ours.encode(x_BCHW).mode()
    pixels, wide_pixels = peer.decode(z_BCHW / scale + shift), exact_peer.decode(z_BCHW.double() / scale + shift)
    assert_as_accurate(ours.decode(z_BCHW), pixels.sample, wide_pixels.sample, what="pixels")
    assert_as_accurate(ours.decode(z_BCHW), pixels.sample, double(ours).decode(z_BCHW.double()), what="pixels, our oracle")


@torch.no_grad()
def test_regulariser() -> None:
    ours, peer = vae_pair("sd")
    x_BCHW = images()
    mine, theirs = ours.encode(x_BCHW).loss_B(), peer.encode(x_BCHW).latent_dist.kl()
    assert_as_accurate(mine, theirs, double(peer).encode(x_BCHW.double()).latent_dist.kl())


@pytest.mark.parametrize(("height", "width"), [(28, 6), (6, 28), (16, 22)])
@torch.no_grad()
def test_tiles_are_diffusers(height: int, width: int) -> None:
    """Everywhere but in the corners where four tiles meet: there diffusers blends one pair twice, and ours is symmetric.

    The sizes are such that the last tile brings more than its overlap; diffusers also makes tiles that bring less.
    """
    ours, peer = vae_pair("sd")
    peer.enable_tiling()
    peer.tile_latent_min_size, peer.tile_sample_min_size, peer.tile_overlap_factor = 8, 16, 0.25
    ours.enable_tiling(8, 2)
    z_BCHW = torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(4))
    scaled = z_BCHW / ours.config.scaling_factor
    pixels = (ours.decode(z_BCHW), peer.decode(scaled).sample, double(peer).decode(scaled.double()).sample)
    assert_as_accurate(*_outside_corners(pixels, unit=2))
    x_BCHW = images(height=2 * height, width=2 * width)
    mine, theirs = ours.encode(x_BCHW), peer.encode(x_BCHW).latent_dist
    exact = double(peer).encode(x_BCHW.double()).latent_dist
    assert_as_accurate(*_outside_corners((mine.mean_BCHW, theirs.mean, exact.mean), unit=1))
    assert_as_accurate(*_outside_corners((mine.logvar_BCHW, theirs.logvar, exact.logvar), unit=1))


def _outside_corners(tensors: tuple[torch.Tensor, ...], *, unit: int) -> list[torch.Tensor]:
    """The pixels in the overlap of at most two tiles, for tiles of 8 that start every 6 units."""
    height, width = (
        (torch.arange(size) >= 6 * unit) & (torch.arange(size) % (6 * unit) < 2 * unit) for size in tensors[0].shape[2:]
    )
    return [tensor[:, :, ~(height[:, None] & width)] for tensor in tensors]


def test_keys_and_shapes_of_published_weights(shared) -> None:
    network = _on_meta(**PRESETS["sd"])
    wanted = shapes_of(shared / "data/key_shapes/diffusers_keys_sd15_vae.json")
    assert {key: list(value.shape) for key, value in network.state_dict().items()} == wanted
    assert sum(p.numel() for p in network.parameters()) == 83_653_863


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    config = KLAutoencoder.Config.parse(PRESETS[preset])
    assert config.replace(**PRESETS[preset]) == config


@pytest.mark.parametrize(("folder", "preset"), [("sd14", "sd"), ("sd15", "sd"), ("sd21-base", "sd"), ("sdxl-base", "sdxl")])
def test_published_configs_are_the_presets(folder: str, preset: str, shared) -> None:
    values = json.loads((shared / "data/checkpoints" / folder / "vae/config.json").read_text())
    config, wanted = KLAutoencoder.Config.parse(convert_diffusers_config(values)), KLAutoencoder.Config.parse(PRESETS[preset])
    assert config == wanted.replace(force_upcast=True)  # diffusers' default; published configs of SD1 and SD2 do not say


@torch.no_grad()
def test_overflow_in_half_precision_is_avoided_as_diffusers_does() -> None:
    """A float16 network whose inner values pass 65504: upcast, it is as near the truth as diffusers' own upcast copy."""
    _, peer = vae_pair("sd")
    for name, parameter in peer.decoder.named_parameters():
        if name.endswith("conv1.weight"):
            parameter.mul_(1e5)
    peer.half()
    values = convert_diffusers_config(VAES["sd"])
    ours, plain = (build("autoencoder", "kl", **{**values, "force_upcast": upcast}).half() for upcast in (True, False))
    for network in (ours, plain):
        network.load_state_dict(peer.state_dict())
    z_BCHW = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(5)).half()
    pixels = ours.decode(z_BCHW)
    assert not torch.isfinite(plain.decode(z_BCHW)).all()
    assert pixels.dtype == torch.float16
    assert {p.dtype for p in ours.parameters()} == {torch.float16}
    scale = ours.config.scaling_factor
    exact = double(peer).decode(z_BCHW.double() / scale).sample
    assert_as_accurate(pixels, peer.float().decode(z_BCHW.float() / scale).sample.half(), exact)


def _on_meta(**values) -> nn.Module:
    with torch.device("meta"):
        return build("autoencoder", "kl", **values)
