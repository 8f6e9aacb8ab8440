"""A transformer encoder with a norm before each layer (Xiong et al. 2020, arXiv:2002.04745, fig. 1b)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import gelu

from ldmkit.kernels import cross_attention


class SelfAttention(nn.Module):
    """Every position attends to every other; heads need not add up to the width.

    State dict: q_proj, k_proj, v_proj (no biases), out_proj.
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(channels, heads * head_dim, bias=False) for _ in range(3))
        self.out_proj = nn.Linear(heads * head_dim, channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) => the same shape."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q_BHLD, k_BHLD, v_BHLD = (project(x_BLC).unflatten(2, (self.heads, -1)).transpose(1, 2) for project in projections)
        out_BHLD = cross_attention(q_BHLD, k_BHLD, v_BHLD)
        out: Tensor = self.out_proj(out_BHLD.transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    State dict: self_attn_layer_norm, self_attn, final_layer_norm, fc1, fc2.
    """

    def __init__(self, channels: int, *, heads: int, head_dim: int, inner_channels: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.self_attn = SelfAttention(channels, heads=heads, head_dim=head_dim)
        self.final_layer_norm = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, inner_channels)
        self.fc2 = nn.Linear(inner_channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) => the same shape."""
        x_BLC = x_BLC + self.dropout(self.self_attn(self.self_attn_layer_norm(x_BLC)))
        out: Tensor = x_BLC + self.dropout(self.fc2(gelu(self.fc1(self.final_layer_norm(x_BLC)))))
        return out


class PreNormEncoder(nn.Module):
    """Token and position embeddings, layers, a last norm. State dict: embed_tokens, embed_positions, layers.i, layer_norm."""

    def __init__(
        self,
        *,
        vocab_size: int,
        length: int,
        channels: int,
        layers: int,
        heads: int,
        head_dim: int,
        inner_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, channels)
        self.embed_positions = nn.Embedding(length, channels)
        for table in (self.embed_tokens, self.embed_positions):
            nn.init.normal_(table.weight, std=0.02)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            Layer(channels, heads=heads, head_dim=head_dim, inner_channels=inner_channels, dropout=dropout)
            for _ in range(layers)
        )
        self.layer_norm = nn.LayerNorm(channels)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Token ids (B, L), int64 => hidden states (B, L, C)."""
        x_BLC = self.dropout(self.embed_tokens(ids_BL) + self.embed_positions.weight[: ids_BL.shape[1]])
        for layer in self.layers:
            x_BLC = layer(x_BLC)
        out: Tensor = self.layer_norm(x_BLC)
        return out
