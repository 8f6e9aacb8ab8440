"""The spatial transformer (Rombach et al. 2022, arXiv:2112.10752, sec. 3.3 and app. E.2.1)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ldmkit.kernels import geglu, geglu_linear
from ldmkit.nn.attention import Attention, Context
from ldmkit.nn.norm import GroupNorm


class GEGLU(nn.Module):
    """A linear layer, half of whose output is gated by the GELU of the other half (Shazeer 2020, arXiv:2002.05202).

    State dict: proj.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(in_channels, 2 * out_channels)

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, in_channels) => (B, L, out_channels)."""
        if is_plain_linear(self.proj):
            return geglu_linear(x_BLC, self.proj.weight, self.proj.bias)
        return geglu(self.proj(x_BLC))


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling a module is F.linear of its weight and bias and nothing else, so that a fused kernel may take its place.

    Not so with a class of its own (adapters, parametrizations, quantised layers), a forward of its own (offloading), hooks on
    it or on all modules, or a weight that is a subclass of Tensor (quantised, sharded).
    """
    return (
        type(module) is nn.Linear
        and type(module.weight) is nn.Parameter
        and "forward" not in vars(module)
        and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)
        and not _has_any_global_hook()
    )


class FeedForward(nn.Module):
    """GEGLU to four times the width and back. State dict: net.0.proj, net.2 (net.1 is where others keep a dropout)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) => (B, L, C)."""
        out: Tensor = self.net(x_BLC)
        return out


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward, each after a layer norm and around a residual.

    State dict: norm1, attn1, norm2, attn2 (both only with a context), norm3, ff.
    """

    def __init__(self, channels: int, *, heads: int, context_channels: int | None, only_cross_attention: bool = False) -> None:
        """With `only_cross_attention` the first attention, too, looks at the context (Stable Diffusion's x4 upscaler)."""
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = Attention(channels, heads=heads, context_channels=context_channels if only_cross_attention else None)
        self.norm2 = nn.LayerNorm(channels) if context_channels is not None else None
        self.attn2 = (
            Attention(channels, heads=heads, context_channels=context_channels) if context_channels is not None else None
        )
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x_BLC: Tensor, context: Context | None) -> Tensor:
        """(B, L, C) => (B, L, C)."""
        x_BLC = x_BLC + self.attn1(self.norm1(x_BLC), context)
        if self.norm2 is not None and self.attn2 is not None:
            x_BLC = x_BLC + self.attn2(self.norm2(x_BLC), context)
        out: Tensor = x_BLC + self.ff(self.norm3(x_BLC))
        return out


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map, around a residual.

    State dict: norm, proj_in, transformer_blocks.i, proj_out; the projections are 1x1 convolutions, or linear layers.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        depth: int,
        context_channels: int | None,
        num_groups: int,
        linear_projection: bool = False,
        only_cross_attention: bool = False,
    ) -> None:
        super().__init__()
        self.linear_projection = linear_projection
        self.norm = GroupNorm(num_groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                channels, heads=heads, context_channels=context_channels, only_cross_attention=only_cross_attention
            )
            for _ in range(depth)
        )
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor, context: Context | None) -> Tensor:
        """(B, C, H, W) => the same shape."""
        h_BCHW, skip_BCHW = self.branches(x_BCHW, context)
        return h_BCHW + skip_BCHW

    def branches(self, x_BCHW: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """What `forward` adds up, for a norm that can add it itself (`GroupNorm`'s residual)."""
        size = x_BCHW.shape[2:]
        h = self.norm(x_BCHW)
        if self.linear_projection:
            h_BLC = self.proj_in(h.flatten(2).transpose(1, 2))
        else:
            h_BLC = self.proj_in(h).flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            h_BLC = block(h_BLC, context)
        if self.linear_projection:
            h = self.proj_out(h_BLC).transpose(1, 2).unflatten(2, size)
        else:
            h = self.proj_out(h_BLC.transpose(1, 2).unflatten(2, size))
        return h, x_BCHW
