"""Built-in autoencoders."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, Example, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """The parts of this plugin."""
    return [
        Component(
            kind="autoencoder",
            name="kl",
            target="ldmkit_vae.autoencoder:KLAutoencoder",
            summary="KL-regularised autoencoder of latent and Stable Diffusion.",
            diffusers=("AutoencoderKL",),
        ),
        Component(
            kind="autoencoder",
            name="vq",
            target="ldmkit_vae.vq:VQAutoencoder",
            summary="Vector-quantised autoencoder of latent diffusion; codebook learned by the loss or by moving averages.",
            diffusers=("VQModel",),
        ),
        Component(
            kind="autoencoder",
            name="taesd",
            target="ldmkit_vae.tiny:TinyAutoencoder",
            summary="TAESD: tiny autoencoder of Stable Diffusion's latents, for previews.",
            diffusers=("AutoencoderTiny",),
        ),
        Component(
            kind="autoencoder",
            name="identity",
            target="ldmkit_vae.identity:IdentityAutoencoder",
            summary="Pixels as they are, for denoisers that work on them.",
        ),
    ]


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """Small ones, for checks."""
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
    other = {"attention_levels": [False, True], "use_quant_conv": False, "scaling_factor": [0.5, 1.0, 1.5, 2.0]}
    return [
        Example(kind="autoencoder", name="kl", configs=(small, {**small, **other})),
        Example(kind="autoencoder", name="vq", configs=({**small, "num_vq_embeddings": 16},)),
        Example(kind="autoencoder", name="taesd", configs=({"channels": 8},)),
    ]
