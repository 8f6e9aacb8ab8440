"""Vectors snapped to the nearest entry of a codebook (van den Oord et al. 2017, arXiv:1711.00937)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-5
"""Laplace smoothing of the codes' counts (van den Oord et al. 2017, as published with app. A.1)."""


@dataclasses.dataclass(frozen=True)
class CodeUsage:
    """How a codebook is used.

    Attributes:
        used: number of codes that were chosen at all.
        size: of the codebook.
        perplexity: exp of the entropy (nats) of the codes' frequencies; `size` where all are equally frequent.
    """

    used: int
    size: int
    perplexity: float


class Quantizer(nn.Module):
    """A codebook of (size, dim). State dict: embedding.weight; with moving averages, also their buffers.

    Args:
        ema_decay: None: the codebook is learned by the loss. Else it follows moving averages of what falls to each code
            (app. A.1, eq. 6-8), in training mode, and takes no gradient.
    """

    def __init__(self, size: int, dim: int, *, ema_decay: float | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)
        self.ema_decay = ema_decay
        if ema_decay is not None:
            self.embedding.weight.requires_grad_(False)
            self.register_buffer("count_K", torch.ones(size))
            self.register_buffer("sum_KC", self.embedding.weight.detach().clone())

    def indices(self, z_BCHW: Tensor) -> Tensor:
        """The nearest codes, (B, H, W), int64; the first of equals. Distances are taken in at least float32."""
        dtype = torch.promote_types(z_BCHW.dtype, torch.float32)
        codes_KC = self.embedding.weight.to(dtype)
        z_NC = z_BCHW.movedim(1, -1).flatten(0, -2).to(dtype)
        distance_NK = z_NC.square().sum(1, keepdim=True) + codes_KC.square().sum(1) - 2 * z_NC @ codes_KC.T
        indices_N: Tensor = distance_NK.argmin(1)
        return indices_N.view(len(z_BCHW), *z_BCHW.shape[2:])

    def codes(self, indices_BHW: Tensor) -> Tensor:
        """Codes => their vectors, (B, C, H, W)."""
        codes_BHWC: Tensor = F.embedding(indices_BHW, self.embedding.weight)
        return codes_BHWC.movedim(-1, 1)

    def forward(self, z_BCHW: Tensor) -> Tensor:
        """The nearest codes' vectors, whose gradient goes straight through to z (sec. 3.2)."""
        indices_BHW = self.indices(z_BCHW)
        codes_BCHW = self.codes(indices_BHW).to(z_BCHW.dtype)
        if self.training and self.ema_decay is not None and torch.is_grad_enabled():
            self._follow(z_BCHW.detach(), indices_BHW)
        return z_BCHW + (codes_BCHW - z_BCHW).detach()

    def loss_B(self, z_BCHW: Tensor, commitment: float) -> Tensor:
        """Per image and value, |sg(z) - e|^2 + commitment |z - sg(e)|^2 (eq. 3), summed over an image, (B,), at least float32.

        The first term, which teaches the codebook, is left out where the codebook follows moving averages.
        """
        dtype = torch.promote_types(z_BCHW.dtype, torch.float32)
        z, codes = z_BCHW.to(dtype), self.codes(self.indices(z_BCHW.detach())).to(dtype)
        loss = commitment * (z - codes.detach()).square()
        if self.ema_decay is None:
            loss = loss + (z.detach() - codes).square()
        return loss.flatten(1).sum(1)

    def usage(self, indices_BHW: Tensor) -> CodeUsage:
        """Statistics of some codes."""
        size = self.embedding.num_embeddings
        counts_K = torch.bincount(indices_BHW.flatten(), minlength=size)
        share_K = counts_K.double() / counts_K.sum()
        return CodeUsage(int((counts_K > 0).sum()), size, float(torch.exp(-torch.special.xlogy(share_K, share_K).sum())))

    @torch.no_grad()
    def _follow(self, z_BCHW: Tensor, indices_BHW: Tensor) -> None:
        assert self.ema_decay is not None
        size, count_K, sum_KC = self.embedding.num_embeddings, self.get_buffer("count_K"), self.get_buffer("sum_KC")
        one_hot_NK = F.one_hot(indices_BHW.flatten(), size).to(sum_KC.dtype)
        z_NC = z_BCHW.movedim(1, -1).flatten(0, -2).to(sum_KC.dtype)
        count_K.lerp_(one_hot_NK.sum(0), 1 - self.ema_decay)
        sum_KC.lerp_(one_hot_NK.T @ z_NC, 1 - self.ema_decay)
        total = count_K.sum()
        smoothed_K = (count_K + EPS) / (total + size * EPS) * total
        self.embedding.weight.copy_(sum_KC / smoothed_K[:, None])
