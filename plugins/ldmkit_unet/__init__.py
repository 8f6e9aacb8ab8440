"""The built-in denoiser."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


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
