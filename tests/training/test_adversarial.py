"""The adversarial and perceptual terms against closed forms."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from ldmkit.errors import ArchitectureMismatchError, CheckpointError, ConfigError
from ldmkit.training import Options, train_autoencoder
from ldmkit.training.adversarial import PatchDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from ldmkit.training.perceptual import PerceptualLoss
from tests.training.toy import stage_one

# ------------------------------------------------------------------------------------------------------------- adversarial


def test_adaptive_weight_balances_gradients_at_the_last_layer() -> None:
    """For losses a . (W h) and b . (W h) the gradients at W are a h^T and b h^T, of norms |a||h| and |b||h|."""
    last, h = nn.Linear(3, 2, bias=False), torch.tensor([1.0, 2.0, 2.0])
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([0.6, 0.8])
    found = adaptive_weight(a @ last(h), b @ last(h), last.weight)
    assert found.item() == pytest.approx(15 / (3 + 1e-4), rel=1e-6)
    assert not found.requires_grad


def test_adaptive_weight_is_bounded() -> None:
    last = nn.Linear(1, 1, bias=False)
    y = last(torch.ones(1)).sum()
    assert adaptive_weight(1e3 * y, 0.0 * y, last.weight).item() == 1e4


def test_hinge_losses() -> None:
    real, made = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
    assert discriminator_loss(real, made).item() == 0.5 * (0.25 + 0.5)
    assert generator_loss(made).item() == 1.5


def test_each_picture_is_judged_alone_patch_by_patch() -> None:
    judge = PatchDiscriminator(3, channels=8, layers=2)
    x = torch.rand(3, 3, 32, 32)
    logits = judge(x)
    assert logits.shape == (3, 1, 6, 6)  # 32 -> 16 -> 8 -> 7 -> 6
    alone = torch.cat([judge(x[k : k + 1]) for k in range(3)])
    assert (logits - alone).abs().max() <= 64 * torch.finfo(torch.float32).eps * logits.abs().max()


def test_the_adversary_joins_at_its_step_and_learns(data: Path, tmp_path: Path) -> None:
    recipe = stage_one(data, loss={"adversarial": {"start": 4, "channels": 4, "layers": 1}}, log_every=1, steps=6)
    train_autoencoder(recipe, Options(tmp_path, device="cpu"))
    lines = [set(line.split('"')[1::2]) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ["adversarial_weight" in line for line in lines] == [False] * 4 + [True] * 2
    assert ["discriminator_grad_norm" in line for line in lines] == [False] * 4 + [True] * 2


def test_an_unknown_last_layer_is_named(data: Path, tmp_path: Path) -> None:
    recipe = stage_one(data, loss={"adversarial": {"last_layer": "decoder.conv_out.wait"}})
    with pytest.raises(ConfigError, match=r"'decoder.conv_out.wait' is no parameter .*'decoder.conv_out.weight'"):
        train_autoencoder(recipe, Options(tmp_path, device="cpu"))


# -------------------------------------------------------------------------------------------------------------- perceptual

VGG16 = {0: 3, 2: 64, 5: 64, 7: 128, 10: 128, 12: 256, 14: 256, 17: 256, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
"""torchvision's vgg16: number of each convolution in `features`, and its input channels."""
OUT = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for i, channels in VGG16.items():
        out = OUT.get(i, 512)
        tensors[f"features.{i}.weight"] = torch.randn(out, channels, 3, 3, generator=generator) * (2 / (9 * channels)) ** 0.5
        tensors[f"features.{i}.bias"] = torch.zeros(out)
    tensors["classifier.6.bias"] = torch.zeros(1000)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(tensors, path)
    return path


def test_perceptual_distance(vgg: Path) -> None:
    """Against the formula written out layer by layer."""
    distance = PerceptualLoss(vgg)
    assert not any(p.requires_grad for p in distance.parameters())
    generator = torch.Generator().manual_seed(1)
    a, b = 2 * torch.rand(2, 2, 3, 32, 32, generator=generator) - 1
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = torch.zeros(2)
    h = [((x + 1) / 2 - mean) / std for x in (a, b)]
    weights = dict(distance.features.named_parameters())
    for i in VGG16:
        if i in (5, 10, 17, 24):
            h = [F.max_pool2d(x, 2) for x in h]
        h = [F.relu(F.conv2d(x, weights[f"{i}.weight"], weights[f"{i}.bias"], padding=1)) for x in h]
        if i in (2, 7, 14, 21, 28):  # the last convolution of each block
            unit = [x / x.norm(dim=1, keepdim=True).clamp(min=1e-10) for x in h]
            expected += (unit[0] - unit[1]).square().sum(1).mean((1, 2))
    found = distance(a, b)
    assert found.shape == (2,)
    assert (found - expected).abs().max() <= 1e3 * torch.finfo(
        torch.float32
    ).eps * expected.max()  # 13 layers of 4608-term sums
    assert torch.equal(distance(a, a), torch.zeros(2))


def test_perceptual_distance_takes_grey(vgg: Path) -> None:
    distance = PerceptualLoss(vgg)
    a, b = torch.rand(2, 1, 1, 16, 16)
    assert torch.equal(distance(a, b), distance(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1)))


def test_wrong_perceptual_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent.safetensors is missing"):
        PerceptualLoss(tmp_path / "absent.safetensors")
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "part.safetensors")
    with pytest.raises(ArchitectureMismatchError, match=r"missing     features.28.weight"):
        PerceptualLoss(tmp_path / "part.safetensors")


def test_training_with_the_perceptual_term(data: Path, vgg: Path, tmp_path: Path) -> None:
    recipe = stage_one(data, loss={"perceptual": {"weights": str(vgg), "weight": 0.1}}, steps=2, log_every=1)
    train_autoencoder(recipe, Options(tmp_path, device="cpu"))
    assert '"perceptual"' in (tmp_path / "log.jsonl").read_text()
