"""Embeddings of scalars: diffusion times, and the sizes that SDXL is told."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import pad, silu


def sinusoidal_embedding(
    t_B: Tensor, dim: int, *, flip_sin_to_cos: bool = True, freq_shift: float = 0.0, max_period: float = 10000.0
) -> Tensor:
    """Sinusoids of t at geometrically falling frequencies (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.5; Ho et al. 2020).

    Always computed in float32, as in the code that the published networks were trained with.

    Args:
        t_B: times, (B,), any dtype, fractions allowed.
        dim: length of the embedding; an odd one ends in a zero.
        flip_sin_to_cos: cosines first (Stable Diffusion) or sines first (DDPM).
        freq_shift: the lowest frequency is max_period^-((dim/2 - 1) / (dim/2 - freq_shift)); Stable Diffusion 0, DDPM 1.

    Returns:
        (B, dim), float32.
    """
    half = dim // 2
    exponents = -math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t_B.device) / (half - freq_shift)
    angles = t_B.float()[:, None] * torch.exp(exponents)
    waves = [torch.cos(angles), torch.sin(angles)] if flip_sin_to_cos else [torch.sin(angles), torch.cos(angles)]
    return pad(torch.cat(waves, dim=-1), (0, dim % 2))


class EmbeddingMLP(nn.Module):
    """Linear, SiLU, linear: from a sinusoidal embedding (or any vector) to the width that res blocks are told.

    State dict: linear_1, linear_2, and cond_proj where there are `extra_channels`: of a second vector, added to the first.
    """

    def __init__(self, in_channels: int, channels: int, *, extra_channels: int | None = None) -> None:
        super().__init__()
        self.cond_proj = nn.Linear(extra_channels, in_channels, bias=False) if extra_channels else None
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)

    def forward(self, x_BC: Tensor, extra_BC: Tensor | None = None) -> Tensor:
        """(B, in_channels), and (B, extra_channels) where there are, => (B, channels)."""
        if self.cond_proj is not None:
            x_BC = x_BC + self.cond_proj(extra_BC)
        out: Tensor = self.linear_2(silu(self.linear_1(x_BC)))
        return out
