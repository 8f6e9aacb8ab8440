"""The built-in denoiser."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, Example, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """The parts of this plugin."""
    return [
        Component(
            kind="denoiser",
            name="unet",
            target="ldmkit_unet.unet:UNet",
            summary="Conditional U-Net of Stable Diffusion 1, 2, XL and the latent-diffusion originals.",
            diffusers=("UNet2DConditionModel", "UNet2DModel"),
        )
    ]


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """Small networks, for checks: with cross-attention, with labels and a vector, unconditional, with further channels."""
    small = {
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, 0],
        "num_attention_heads": 2,
        "cross_attention_dim": 8,
        "norm_num_groups": 4,
    }
    plain = {**small, "attention_block": "plain", "cross_attention_dim": None}
    return [
        Example(
            kind="denoiser",
            name="unet",
            configs=(
                small,
                {**small, "cross_attention_dim": None, "num_class_embeds": 3, "vector_dim": 6},
                {**plain, "time_scale_shift": True, "resnet_resampling": True},
                {**small, "in_channels": 7, "spatial_channels": 3, "cache_context": False, "use_linear_projection": True},
            ),
            condition={
                "tokens_BLC": "cross_attention_dim",
                "vector_BC": "vector_dim",
                "labels_B": "num_class_embeds",
                "spatial_BCHW": "spatial_channels",
            },
        )
    ]
