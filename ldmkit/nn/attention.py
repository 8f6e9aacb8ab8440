"""Attention layers (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2), for sequences and for feature maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ldmkit.kernels import cross_attention
from ldmkit.nn.norm import GroupNorm

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, (B, heads, L, head_dim) each."""


@dataclass(frozen=True)
class Context:
    """What attention is told beside the pixels.

    Attributes:
        tokens_BLC: the sequence that cross-attention attends to; None without cross-attention.
        mask_BL: bool, True = attend; None = attend to all.
        cached: keys and values computed beforehand, by the layer's `path`; layers not in it compute theirs.
        perturbed: by the layer's `path`, where self-attention's map is the identity: bool, one per image or per equal part of
            the batch (perturbed-attention guidance: Ahn et al. 2024, arXiv:2403.17377).
    """

    tokens_BLC: Tensor | None = None
    mask_BL: Tensor | None = None
    cached: Mapping[str, KeysValues] = field(default_factory=dict)
    perturbed: Mapping[str, Tensor] = field(default_factory=dict)


def split_heads(x_BLC: Tensor, heads: int) -> Tensor:
    """(B, L, C) => (B, heads, L, C / heads)."""
    batch, length, channels = x_BLC.shape
    return x_BLC.view(batch, length, heads, channels // heads).transpose(1, 2)


def merge_heads(x_BHLD: Tensor) -> Tensor:
    """(B, heads, L, D) => (B, L, heads D)."""
    return x_BHLD.transpose(1, 2).flatten(2)


def self_attention(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, which_B: Tensor | None) -> Tensor:
    """Attention of a sequence to itself, each place keeping its own value in the images of `which_B`."""
    out_BHLD = cross_attention(q_BHLD, k_BHLD, v_BHLD)
    if which_B is None:
        return out_BHLD
    which_B = which_B.repeat_interleave(len(v_BHLD) // len(which_B))
    return torch.where(which_B[:, None, None, None], v_BHLD, out_BHLD)


class Attention(nn.Module):
    """Multi-head attention of a sequence to itself or to a context. State dict: to_q, to_k, to_v (no biases), to_out.0."""

    path: str = ""
    """Where the layer sits in its network; the key of its cached keys and values. The network sets it."""

    def __init__(self, channels: int, *, heads: int, context_channels: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.to_context = context_channels is not None
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_v = nn.Linear(context_channels or channels, channels, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def keys_values(self, source_BLC: Tensor) -> KeysValues:
        """Keys and values of a sequence."""
        return split_heads(self.to_k(source_BLC), self.heads), split_heads(self.to_v(source_BLC), self.heads)

    def forward(self, x_BLC: Tensor, context: Context | None) -> Tensor:
        """(B, L, C) => (B, L, C). The context is used by layers built with `context_channels`, and only by them."""
        q_BHLD = split_heads(self.to_q(x_BLC), self.heads)
        if not self.to_context:
            k_BHLD, v_BHLD = self.keys_values(x_BLC)
            out_BHLD = self_attention(q_BHLD, k_BHLD, v_BHLD, context.perturbed.get(self.path) if context else None)
        else:
            assert context is not None
            assert context.tokens_BLC is not None
            cached = context.cached.get(self.path)
            k_BHLD, v_BHLD = self.keys_values(context.tokens_BLC) if cached is None else cached
            out_BHLD = cross_attention(q_BHLD, k_BHLD, v_BHLD, mask=context.mask_BL)
        out: Tensor = self.to_out[0](merge_heads(out_BHLD))
        return out


class AttentionBlock(nn.Module):
    """Group norm, self-attention over all pixels, + input: the block of autoencoders and of unconditional U-Nets.

    State dict: group_norm, to_q, to_k, to_v, to_out.0 (all with biases).
    """

    path: str = ""
    """Where the layer sits in its network, as in `Attention`."""

    def __init__(self, channels: int, *, heads: int, num_groups: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.group_norm = GroupNorm(num_groups, channels, eps=eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) => the same shape."""
        h_BCHW, skip_BCHW = self.branches(x_BCHW)
        return h_BCHW + skip_BCHW

    def branches(self, x_BCHW: Tensor, context: Context | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` adds up, for a norm that can add it itself (`GroupNorm`'s residual)."""
        h_BLC = self.group_norm(x_BCHW).flatten(2).transpose(1, 2)
        q, k, v = (split_heads(project(h_BLC), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        which_B = context.perturbed.get(self.path) if context else None
        out_BLC = self.to_out[0](merge_heads(self_attention(q, k, v, which_B)))
        return out_BLC.transpose(1, 2).reshape(x_BCHW.shape), x_BCHW
