"""Pixel-space models through the same pipeline."""

import torch

from ldmkit import Pipeline, build
from tests.conditions import randomise


def test_a_pixel_space_pipeline_draws_and_round_trips(tmp_path) -> None:
    denoiser = build(
        "denoiser",
        "unet",
        in_channels=1,
        out_channels=1,
        block_out_channels=[8, 16],
        layers_per_block=1,
        transformer_layers_per_block=[0, 1],
        num_attention_heads=1,
        attention_block="plain",
        cross_attention_dim=None,
        norm_num_groups=4,
    )
    randomise(denoiser)
    pipe = Pipeline(
        autoencoder={"name": "identity", "channels": 1},
        denoiser=denoiser,
        sampler="ddpm",
        defaults={"height": 8, "width": 8, "num_inference_steps": 3},
    )
    drawn = pipe(num_images_per_prompt=2, seed=1, progress=False)
    assert [image.size for image in drawn.images] == [(8, 8), (8, 8)]
    latents = pipe(num_images_per_prompt=2, seed=1, output_type="latent", progress=False).images
    again = Pipeline.from_pretrained(pipe.save_pretrained(tmp_path / "p"))
    assert torch.equal(again(num_images_per_prompt=2, seed=1, output_type="latent", progress=False).images, latents)


def test_it_is_the_identity() -> None:
    autoencoder = build("autoencoder", "identity")
    x_BCHW = torch.randn(2, 3, 4, 4)
    posterior = autoencoder.encode(x_BCHW)
    assert torch.equal(posterior.mode(), x_BCHW)
    assert torch.equal(posterior.sample(torch.randn(2, 3, 4, 4)), x_BCHW)
    assert not posterior.loss_B().any()
    assert torch.equal(autoencoder.decode(x_BCHW), x_BCHW)
