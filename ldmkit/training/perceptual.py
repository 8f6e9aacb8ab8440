"""A perceptual distance on VGG-16 features, after LPIPS (Zhang et al. 2018, arXiv:1801.03924), from local weights."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldmkit.checkpoints.weights import load_weights, read_file

_WIDTHS = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512)
_TAPS = (3, 8, 15, 22, 29)  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3, as LPIPS takes them
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, over [0, 1]


class PerceptualLoss(nn.Module):
    """Mean squared distance of channel-normalised VGG-16 features (Zhang et al. 2018, eq. 1 with all weights w = 1).

    Args:
        weights: a safetensors file with torchvision's vgg16 names ("features.0.weight", ...); its classifier is not used.

    Raises:
        CheckpointError, ArchitectureMismatchError: for a missing, damaged or wrong file.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: Path) -> None:
        super().__init__()
        self.features = _vgg16_features()
        tensors = {key: tensor for key, tensor in read_file(weights).items() if not key.startswith("classifier.")}
        load_weights(nn.ModuleDict({"features": self.features}), tensors, source=str(weights))
        self.requires_grad_(False).eval()
        self.register_buffer("mean", 2 * torch.tensor(_MEAN).view(1, 3, 1, 1) - 1, persistent=False)
        self.register_buffer("std", 2 * torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, a_BCHW: Tensor, b_BCHW: Tensor) -> Tensor:
        """Distance of raw pixels in [-1, 1] per picture, (B,). One channel is taken for grey."""
        h_BCHW = (torch.cat([a_BCHW, b_BCHW]).expand(-1, 3, -1, -1) - self.mean) / self.std
        total_B = torch.zeros(len(a_BCHW), device=a_BCHW.device)
        for i, layer in enumerate(self.features):
            h_BCHW = layer(h_BCHW)
            if i in _TAPS:
                a, b = F.normalize(h_BCHW.float(), dim=1, eps=1e-10).chunk(2)
                total_B = total_B + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return total_B


def _vgg16_features() -> nn.Sequential:
    """Layers numbered as torchvision numbers them."""
    layers: list[nn.Module] = []
    channels = 3
    for width in _WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    return nn.Sequential(*layers)
