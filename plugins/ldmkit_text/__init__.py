"""Built-in conditioners: CLIP text and images, BERT trained with the denoiser, class labels."""

from collections.abc import Iterable
from pathlib import Path

from ldmkit.plugin.spec import Component, Example, hookimpl

EXAMPLES = Path(__file__).parent / "examples"
"""Vocabularies of a few pieces."""


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
            name="ldm-bert",
            target="ldmkit_text.ldm_bert:LDMBertConditioner",
            summary="WordPiece and the transformer of latent diffusion's text-to-image model.",
            diffusers=("LDMBertModel",),
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
            name="clip-image",
            target="ldmkit_text.clip_image:CLIPImageConditioner",
            summary="CLIP's image encoder: pictures as prompts, one projected embedding each (image variations).",
            diffusers=("CLIPVisionModelWithProjection",),
        ),
        Component(
            kind="conditioner",
            name="class-label",
            target="ldmkit_text.class_label:ClassLabelConditioner",
            summary="Class labels, as one learned token or as plain labels.",
            diffusers=("ClassEmbedder",),
        ),
    ]


@hookimpl
def ldmkit_examples() -> Iterable[Example]:
    """Small encoders, for checks."""
    from PIL import Image

    small = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    letters = {"vocab": str(EXAMPLES / "byte_pairs.txt.gz")}
    penultimate = {**small, "layer": "penultimate", "final_layer_norm": False}
    pooled = {**penultimate, "pooled": True, "projection_dim": 6}
    pictures = {**small, "image_size": 14, "patch_size": 7, "projection_dim": 6}
    prompts = ("a red apple", "the cats", "", "apple on the red apple")
    return [
        Example(
            kind="conditioner",
            name="bert",
            configs=(
                {**small, "vocab": str(EXAMPLES / "pieces.txt"), "max_length": 8},
                {**small, "vocab": str(EXAMPLES / "pieces.txt"), "padding": "longest", "pooled": True},
            ),
            inputs=prompts,
        ),
        Example(
            kind="conditioner",
            name="ldm-bert",
            configs=({**small, "vocab": str(EXAMPLES / "pieces.txt"), "vocab_size": 64, "head_dim": 3, "max_length": 8},),
            inputs=prompts,
        ),
        Example(
            kind="conditioner",
            name="clip-text",
            configs=({**small, **letters}, {**penultimate, **letters}, {**pooled, **letters}),
            inputs=prompts,
        ),
        Example(
            kind="conditioner",
            name="sdxl-text",
            configs=(
                {**letters, "first": penultimate, "second": pooled, "size_dim": 4},
                {**letters, "second": pooled, "size_dim": 4, "zero_null": False},
            ),
            inputs=prompts,
        ),
        Example(
            kind="conditioner",
            name="clip-image",
            configs=(pictures, {**pictures, "gives": "vector", "shortest_edge": 16}),
            inputs=tuple(Image.new("RGB", (20, 30), colour) for colour in ("red", "green", "white")),
        ),
        Example(
            kind="conditioner",
            name="class-label",
            configs=({"num_classes": 5, "hidden_size": 4}, {"num_classes": 5, "mode": "labels"}),
            inputs=(0, 3, 1),
        ),
    ]
