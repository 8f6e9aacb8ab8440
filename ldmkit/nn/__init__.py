"""Layers over the kernels, shared by all models. State-dict names are those of the diffusers layout."""

from ldmkit.nn.attention import Attention, AttentionBlock, Context, KeysValues
from ldmkit.nn.embedding import EmbeddingMLP, sinusoidal_embedding
from ldmkit.nn.norm import GroupNorm
from ldmkit.nn.resnet import Downsample, ResBlock, Upsample
from ldmkit.nn.transformer import SpatialTransformer, TransformerBlock

__all__ = [
    "Attention",
    "AttentionBlock",
    "Context",
    "Downsample",
    "EmbeddingMLP",
    "GroupNorm",
    "KeysValues",
    "ResBlock",
    "SpatialTransformer",
    "TransformerBlock",
    "Upsample",
    "sinusoidal_embedding",
]
