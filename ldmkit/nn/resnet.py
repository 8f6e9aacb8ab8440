"""Residual blocks and changes of resolution (Ho et al. 2020, arXiv:2006.11239, app. B)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, pad, silu

from ldmkit.nn.norm import GroupNorm


class ResBlock(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, dropout, conv, + input.

    With `scale_shift` the time scales and shifts after the second norm instead, and with `resample` both branches halve or
    double height and width before the first convolution (Dhariwal and Nichol 2021, arXiv:2105.05233, sec. 3).

    State dict: norm1, conv1, time_emb_proj (where `time_channels` is given), norm2, conv2, conv_shortcut (where the number of
    channels changes).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        time_channels: int | None,
        num_groups: int,
        eps: float,
        dropout: float = 0.0,
        scale_shift: bool = False,
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.norm1 = GroupNorm(num_groups, in_channels, eps=eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        told = out_channels * (2 if scale_shift else 1)
        self.time_emb_proj = nn.Linear(time_channels, told) if time_channels is not None else None
        self.norm2 = GroupNorm(num_groups, out_channels, eps=eps, silu=not scale_shift)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCHW: Tensor, time_BC: Tensor | None = None) -> Tensor:
        """(B, in_channels, H, W) => (B, out_channels, H, W), or half or twice as high and wide.

        Args:
            time_BC: the time embedding with SiLU already applied (it is the same for all blocks), (B, time_channels).
        """
        h_BCHW, skip_BCHW = self.branches(x_BCHW, time_BC)
        return h_BCHW + skip_BCHW

    def branches(self, x_BCHW: Tensor, time_BC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What `forward` adds up, for a norm that can add it itself (`GroupNorm`'s residual)."""
        h_BCHW = self.norm1(x_BCHW)
        if self.resample is not None:
            h_BCHW, x_BCHW = self._resampled(h_BCHW), self._resampled(x_BCHW)
        h_BCHW = self.conv1(h_BCHW)
        told_BC = None if self.time_emb_proj is None else self.time_emb_proj(time_BC)
        if self.scale_shift and told_BC is not None:
            scale_BC11, shift_BC11 = told_BC[..., None, None].chunk(2, dim=1)
            h_BCHW = silu(self.norm2(h_BCHW) * (1 + scale_BC11) + shift_BC11)
        else:
            h_BCHW = self.norm2(h_BCHW, shift_BC=told_BC)
        return self.conv2(self.dropout(h_BCHW)), x_BCHW if self.conv_shortcut is None else self.conv_shortcut(x_BCHW)

    def _resampled(self, x_BCHW: Tensor) -> Tensor:
        return avg_pool2d(x_BCHW, 2) if self.resample == "down" else interpolate(x_BCHW, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Halve height and width with a strided convolution. State dict: conv."""

    def __init__(self, channels: int, *, asymmetric: bool = False) -> None:
        """`asymmetric` pads right and bottom only (autoencoders); otherwise one pixel all round (U-Nets)."""
        super().__init__()
        self.asymmetric = asymmetric
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=0 if asymmetric else 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) => (B, C, H/2, W/2)."""
        out: Tensor = self.conv(pad(x_BCHW, (0, 1, 0, 1)) if self.asymmetric else x_BCHW)
        return out


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution. State dict: conv."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) => (B, C, 2H, 2W)."""
        out: Tensor = self.conv(interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))
        return out
