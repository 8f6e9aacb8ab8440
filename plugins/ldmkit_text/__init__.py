"""Built-in conditioners: CLIP text, BERT trained with the denoiser, class labels."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Component, hookimpl


@hookimpl
def ldmkit_components() -> Iterable[Component]:
    """The conditioners of this package."""
    return [
        Component(
            kind="conditioner",
            name="bert",
            target="ldmkit_text.bert:BertConditioner",
            summary="WordPiece and a BERT encoder, trained with the denoiser or from pretrained weights.",
        ),
        Component(
            kind="conditioner",
            name="clip-text",
            target="ldmkit_text.clip:CLIPTextConditioner",
            summary="CLIP's text encoder: hidden-layer choice, clip-skip, pooled output (Stable Diffusion 1, 2, XL).",
            diffusers=("CLIPTextModel",),
        ),
        Component(
            kind="conditioner",
            name="sdxl-text",
            target="ldmkit_text.sdxl:SDXLTextConditioner",
            summary="Stable Diffusion XL's two text encoders, pooled text and sizes; the refiner's one, with a score.",
            diffusers=("CLIPTextModel+CLIPTextModelWithProjection", "CLIPTextModelWithProjection"),
        ),
        Component(
            kind="conditioner",
            name="class-label",
            target="ldmkit_text.class_label:ClassLabelConditioner",
            summary="Class labels, as one learned token or as plain labels.",
            diffusers=("ClassEmbedder",),
        ),
    ]
