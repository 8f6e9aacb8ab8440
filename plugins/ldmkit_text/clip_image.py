"""CLIP's image encoder as a conditioner: pictures as prompts (image variations; the embedding that Stable unCLIP is told)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

import ldmkit.config
from ldmkit.checkpoints.compvis import clip_vision_map
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.errors import ConfigError, InputError, InputTypeError
from ldmkit.images import from_pixels, to_pixels
from ldmkit.interfaces import Condition, Conditioner
from ldmkit_text.clip_preparing import PREPROCESSOR, read_preprocessor, write_preprocessor

COPIED = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "projection_dim",
)
DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "patch_size": 32}
"""Of transformers' `CLIPVisionConfig`, where they are not ours; its files need not hold them."""


class CLIPImageConditioner(Conditioner):
    """Pictures => the projected embedding of each, as one token (B, 1, projection_dim) or as a vector (B, projection_dim).

    Nothing asked is all zeros, as in diffusers' StableDiffusionImageVariationPipeline. State-dict keys are those of
    transformers' `CLIPVisionModelWithProjection` without `vision_model.`
    """

    class Config(ldmkit.config.Config):
        """Architecture as in transformers' `CLIPVisionConfig`, and how pictures are prepared. The defaults are CLIP ViT-L/14's.

        Attributes:
            hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps: as there.
            image_size: side of the square that the network sees, in pixels. patch_size: of its tokens.
            projection_dim: width of the embedding.
            shortest_edge: of the picture when it is resized, before its middle is cut out; None = image_size.
            mean, std: of each colour, of values in [0, 1].
            gives: "tokens", for cross-attention, or "vector", added to the time embedding.
        """

        hidden_size: int = Field(1024, ge=1)
        intermediate_size: int = Field(4096, ge=1)
        num_hidden_layers: int = Field(24, ge=1)
        num_attention_heads: int = Field(16, ge=1)
        hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
        layer_norm_eps: float = Field(1e-5, gt=0)
        image_size: int = Field(224, ge=1)
        patch_size: int = Field(14, ge=1)
        projection_dim: int = Field(768, ge=1)
        shortest_edge: int | None = Field(None, ge=1)
        mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
        std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
        gives: Literal["tokens", "vector"] = "tokens"

        @model_validator(mode="after")
        def _fits(self) -> Self:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
                )
            if self.image_size < self.patch_size:
                raise ValueError(f"image_size {self.image_size} has no room for a patch of {self.patch_size}")
            if self.shortest_edge is not None and self.shortest_edge < self.image_size:
                raise ValueError(f"shortest_edge {self.shortest_edge} leaves no square of image_size {self.image_size}")
            if min(self.std) <= 0:
                raise ValueError(f"std = {list(self.std)} must be above 0")
            return self

    config: CLIPImageConditioner.Config
    null_input = None

    def __init__(self, config: CLIPImageConditioner.Config) -> None:
        super().__init__()
        self.config = config
        self.provides = frozenset({"tokens_BLC" if config.gives == "tokens" else "vector_BC"})
        model = CLIPVisionModelWithProjection(CLIPVisionConfig(**{name: getattr(config, name) for name in COPIED}))
        # Its parts are registered, it is not: names are then free of transformers' nesting, and it shares what moves and loads.
        self._clip = (model,)
        body = model.vision_model
        self.embeddings, self.pre_layrnorm, self.encoder = body.embeddings, body.pre_layrnorm, body.encoder
        self.post_layernorm, self.visual_projection = body.post_layernorm, model.visual_projection

    def check(self, inputs: Sequence[Any]) -> None:
        """Raise InputTypeError or InputError unless the inputs are a list of pictures, or None."""
        self._pictures(inputs)

    def forward(self, inputs: Sequence[Any]) -> Condition:
        """Pictures => tokens (B, 1, projection_dim), or a vector (B, projection_dim).

        Args:
            inputs: each a PIL image, an array (H, W, 3) in [0, 1] or of uint8, a tensor (3, H, W) in [-1, 1], or None.

        Raises:
            InputTypeError, InputError: as `check`.
        """
        pictures, weight = self._pictures(inputs), self.visual_projection.weight
        embeds_BC = weight.new_zeros(len(pictures), self.config.projection_dim)
        asked = [k for k, picture in enumerate(pictures) if picture is not None]
        if asked:
            made: Tensor = self._clip[0](pixel_values=self._pixels(pictures).to(weight)).image_embeds
            embeds_BC = embeds_BC.index_copy(0, torch.tensor(asked, device=weight.device), made)
        return Condition(tokens_BLC=embeds_BC[:, None]) if self.config.gives == "tokens" else Condition(vector_BC=embeds_BC)

    @torch.compiler.disable  # Pillow's and numpy's work, which is not traced
    def _pixels(self, pictures: Sequence[Image.Image | None]) -> Tensor:
        return torch.from_numpy(np.stack([self.prepare(picture) for picture in pictures if picture is not None]))

    def prepare(self, picture: Image.Image) -> np.ndarray:
        """A picture => what the network sees, float32 (3, image_size, image_size): resized by its shorter side (bicubic), its
        middle cut out, scaled to [0, 1], less the mean, by the standard deviation. The bits of transformers'
        `CLIPImageProcessor` without torchvision; transparency lies on white.
        """
        config, side = self.config, self.config.image_size
        edge = config.shortest_edge or side
        short, long = min(picture.size), max(picture.size)
        other = int(edge * long / short)
        width, height = (edge, other) if picture.width <= picture.height else (other, edge)
        resized = np.asarray(_opaque(picture).resize((width, height), Image.Resampling.BICUBIC))
        top, left = (height - side) // 2, (width - side) // 2
        square = resized[top : top + side, left : left + side]
        scaled = (square.astype(np.float64) * (1 / 255)).astype(np.float32)
        mean, std = (np.array(values, dtype=np.float32) for values in (config.mean, config.std))
        return np.ascontiguousarray(((scaled - mean) / std).transpose(2, 0, 1))

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError, CheckpointError."""
        (values,) = configs.values()
        if values.get("model_type") != "clip_vision_model":
            raise ConfigError(f"model_type = {values.get('model_type')!r} is not supported here, only 'clip_vision_model' is")
        own = {**DEFAULTS, "projection_dim": 512, **{name: values[name] for name in COPIED if name in values}}
        folder = tokenizers.get("feature_extractor")
        prepared = {} if folder is None else read_preprocessor(folder, own.get("image_size", 224))
        return Reading({**own, **prepared}, {"image_encoder": clip_vision_map()})

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`."""
        values = {name: getattr(self.config, name) for name in COPIED}
        config = {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", **values}
        edge = self.config.shortest_edge or self.config.image_size
        preparing = write_preprocessor(edge, self.config.image_size, self.config.mean, self.config.std)
        files: dict[str, Path | bytes] = {PREPROCESSOR: json.dumps(preparing, indent=2).encode()}
        return {
            "image_encoder": Written("transformers", "CLIPVisionModelWithProjection", config, clip_vision_map()),
            "feature_extractor": Written("transformers", "CLIPImageProcessor", files=files),
        }

    def _pictures(self, inputs: Sequence[Any]) -> list[Image.Image | None]:
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence):
            raise InputTypeError(f"picture prompts must be a list, got {type(inputs).__name__}; put a single picture in a list")
        if not inputs:
            raise InputError("no picture prompts given")
        return [None if value is None else _picture(i, value) for i, value in enumerate(inputs)]


def _picture(i: int, value: Any) -> Image.Image:
    if not isinstance(value, Image.Image | np.ndarray | Tensor):
        raise InputTypeError(f"picture prompt {i} must be a PIL image, an array or a tensor, got {type(value).__name__}")
    images: list[Image.Image] = from_pixels(to_pixels(value, channels=3), "pil")
    if len(images) != 1:
        raise InputError(f"picture prompt {i} holds {len(images)} pictures; give each an entry of its own")
    return images[0]


def _opaque(picture: Image.Image) -> Image.Image:
    """RGB, on white where it is transparent."""
    if "A" not in picture.getbands() and picture.info.get("transparency") is None:
        return picture.convert("RGB")
    above = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", above.size, (255, 255, 255, 255)), above).convert("RGB")
