"""The patch-adversarial term of stage one (Esser et al. 2021, "Taming Transformers", arXiv:2012.09841)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PatchDiscriminator(nn.Sequential):
    """Real or made, judged patch by patch (Isola et al. 2017, arXiv:1611.07004): raw pixels => logits (B, 1, H', W').

    Group norm stands where the paper has batch norm, so that a picture is judged alone, whatever the batch or the number of
    processes.
    """

    def __init__(self, image_channels: int, channels: int = 64, layers: int = 3) -> None:
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        blocks: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i, (narrow, wide) in enumerate(pairwise(widths), start=1):
            blocks += [
                nn.Conv2d(narrow, wide, 4, stride=2 if i < layers else 1, padding=1, bias=False),
                nn.GroupNorm(math.gcd(32, wide), wide),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*blocks, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)


def generator_loss(logits: Tensor) -> Tensor:
    """-mean of the logits of made pictures (a scalar)."""
    return -logits.float().mean()


def discriminator_loss(real: Tensor, made: Tensor) -> Tensor:
    """Hinge loss (Lim and Ye 2017, arXiv:1705.02894): half the sum of E max(0, 1 - real) and E max(0, 1 + made)."""
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + made.float()).mean())


def adaptive_weight(reconstruction_loss: Tensor, adversarial_loss: Tensor, last_layer: Tensor) -> Tensor:
    """How much the adversarial loss counts, so that both pull equally at the decoder's last layer (a scalar, no gradient).

    |grad of the reconstruction loss| / (|grad of the adversarial loss| + 1e-4), both at `last_layer`, at most 1e4 (Esser et al.
    2021, eq. 7, with the paper's code's delta and bound).
    """
    (pull,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (push,) = torch.autograd.grad(adversarial_loss, last_layer, retain_graph=True)
    ratio: Tensor = pull.float().norm() / (push.float().norm() + 1e-4)
    return ratio.clamp(0.0, 1e4).detach()
