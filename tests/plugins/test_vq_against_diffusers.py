"""The VQ autoencoder beside diffusers' VQModel: same weights, same latents (before quantising: codes flip at near-ties)."""

import pytest
import torch
from diffusers import VQModel

from ldmkit import ConfigError, build
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_vae.diffusers_config import convert_vq_config, write_vq_config
from ldmkit_vae.presets import VQ_PRESETS
from ldmkit_vae.vq import VQAutoencoder
from tests.network_peers import double, randomise

STYLES = {
    "f4": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 32,
    },
    "f8, attention": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "latent_channels": 4,
        "vq_embed_dim": 2,
        "norm_num_groups": 4,
        "num_vq_embeddings": 16,
        "scaling_factor": 1.0,
    },
}


def pair(style: str) -> tuple[VQAutoencoder, VQModel]:
    peer = VQModel(**STYLES[style]).eval()
    randomise(peer)
    ours = build("autoencoder", "vq", **convert_vq_config(peer.config)).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def images() -> torch.Tensor:
    return 2 * torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(2)) - 1


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_latents_and_pixels(style: str) -> None:
    ours, peer = pair(style)
    scale, x_BCHW = peer.config.scaling_factor, images()
    theirs, exact = peer.encode(x_BCHW).latents, double(peer).encode(x_BCHW.double()).latents
    assert_as_accurate(ours.encode(x_BCHW).mode(), theirs * scale, exact * scale)
    z_BCHW = theirs * scale
    for quantised in (True, False):
        ours.config = ours.config.replace(quantize_before_decode=quantised)
        mine = ours.decode(z_BCHW)
        pixels = peer.decode(z_BCHW / scale, force_not_quantize=not quantised).sample
        wide = double(peer).decode(z_BCHW.double() / scale, force_not_quantize=not quantised).sample
        assert_as_accurate(mine, pixels, wide, what=f"pixels, quantised: {quantised}")


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_codes_are_the_nearest(style: str) -> None:
    ours, _ = pair(style)
    z_BCHW = torch.randn(2, ours.latent_channels, 5, 3, generator=torch.Generator().manual_seed(3))
    wide = (z_BCHW / ours.config.scaling_factor).double().movedim(1, -1)
    distances = (wide[..., None, :] - ours.quantize.embedding.weight.double()).square().sum(-1)
    assert torch.equal(ours.indices(z_BCHW), distances.argmin(-1))
    usage = ours.code_usage(z_BCHW)
    assert usage.used == len(ours.indices(z_BCHW).unique())
    assert 1 <= usage.perplexity <= usage.used <= usage.size


@pytest.mark.parametrize("style", STYLES)
def test_config_there_and_back(style: str) -> None:
    ours, peer = pair(style)
    again = VQModel(**write_vq_config(ours.config.to_dict()))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.encode(images()).latents, peer.encode(images()).latents)
    assert VQAutoencoder.Config.parse(convert_vq_config(write_vq_config(ours.config.to_dict()))) == ours.config


@pytest.mark.parametrize("change", [{"norm_type": "spatial"}, {"lookup_from_codebook": True}, {"act_fn": "relu"}, {"some": 1}])
def test_what_cannot_be_served_is_named(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        convert_vq_config(STYLES["f4"] | change)


@pytest.mark.parametrize("preset", VQ_PRESETS)
def test_every_preset_is_a_config(preset: str) -> None:
    assert VQAutoencoder.Config.parse(VQ_PRESETS[preset]).final_channels in (3, 4)


# --------------------------------------------------------------------------------------------------------------------- training


def test_the_gradient_goes_straight_through() -> None:
    ours, _ = pair("f4")
    z_BCHW = torch.randn(1, 3, 2, 2, dtype=torch.double, requires_grad=True)
    quantise = ours.double().quantize
    out = quantise(z_BCHW)
    assert torch.equal(out.detach(), z_BCHW.detach() + (quantise.codes(quantise.indices(z_BCHW)) - z_BCHW.detach()))
    grad = torch.randn_like(out)
    assert torch.equal(torch.autograd.grad(out, z_BCHW, grad)[0], grad)


def test_loss_is_the_papers() -> None:
    """diffusers' quantiser with legacy=False has the same terms, as means, with beta on the encoder's."""
    ours, peer = pair("f4")
    peer.quantize.legacy = False
    z_BCHW = torch.randn(2, 3, 4, 4, dtype=torch.double, requires_grad=True)
    _, wanted, _ = peer.double().quantize(z_BCHW)
    got = ours.double().quantize.loss_B(z_BCHW, peer.quantize.beta).sum() / z_BCHW.numel()
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=0)
    theirs = torch.autograd.grad(wanted, [z_BCHW, peer.quantize.embedding.weight])
    mine = torch.autograd.grad(got, [z_BCHW, ours.quantize.embedding.weight])
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-18)


def test_moving_averages_follow_what_falls_to_each_code() -> None:
    """With decay 0 and one update, a used code becomes the mean of its vectors, up to the smoothing of counts."""
    ours = build("autoencoder", "vq", **convert_vq_config(STYLES["f4"]), codebook="ema", ema_decay=0.0).double().train()
    z_BCHW = torch.randn(4, 3, 8, 8, dtype=torch.double)
    indices = ours.quantize.indices(z_BCHW)
    before = ours.quantize.embedding.weight.clone()
    ours.quantize(z_BCHW)
    for code in indices.unique():
        mean = z_BCHW.movedim(1, -1)[indices == code].mean(0)
        count, size, total = int((indices == code).sum()), 32, indices.numel()
        smoothed = (count + 1e-5) / (total + size * 1e-5) * total
        torch.testing.assert_close(ours.quantize.embedding.weight[code], mean * count / smoothed, rtol=1e-12, atol=0)
    ours.eval().quantize(z_BCHW)
    assert not torch.equal(before, ours.quantize.embedding.weight)
    assert "quantize.embedding.weight" not in {name for name, p in ours.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("codebook", ["loss", "ema"])
def test_it_learns(codebook: str) -> None:
    """Stage one's loss falls on four pictures, and several codes are used."""
    from ldmkit.training.losses import autoencoder_loss

    torch.manual_seed(0)
    values = convert_vq_config(STYLES["f4"]) | {"scaling_factor": 1.0}
    ours = build("autoencoder", "vq", **values, codebook=codebook, ema_decay=0.9).train()
    x_BCHW, noise = images()[:, :, :16, :16], torch.zeros(2, 3, 4, 4)
    optimizer = torch.optim.Adam([p for p in ours.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(60):
        pixel_B, commitment_B, _, _ = autoencoder_loss(ours, x_BCHW, noise, kl_weight=1.0)
        loss = pixel_B.mean() + commitment_B.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(pixel_B.detach().mean()))
    assert losses[-1] < 0.9 * losses[0]
    assert ours.code_usage(ours.encode(x_BCHW).mode()).used > 1
