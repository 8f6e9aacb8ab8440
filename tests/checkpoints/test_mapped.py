"""Weights that stay in the mapped file: as good as copies, and the file never changes."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldmkit import Pipeline, build
from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.filling import fill, verify
from ldmkit.checkpoints.parts import load_part, save_part
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.errors import CheckpointError
from ldmkit.kernels import geglu_linear, group_norm_silu
from tests.conditions import tiny_pipeline


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny_pipeline(tmp_path).save_pretrained(tmp_path / "pipeline")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_writing_to_weights_does_not_write_to_the_file(saved: Path) -> None:
    before = contents(saved)
    assert before
    pipe, twin = (Pipeline.from_pretrained(saved).denoiser for _ in range(2))
    optimiser = torch.optim.SGD(pipe.parameters(), lr=1.0)
    for parameter in pipe.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimiser.step()
    for one, other in zip(pipe.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other - 1)
    assert contents(saved) == before


def test_weights_begin_where_torch_has_them(saved: Path) -> None:
    """Elsewhere, torch's products may round differently, and what was loaded would not compute the same bits."""
    pipe = Pipeline.from_pretrained(saved)
    assert not [name for name, weight in pipe.denoiser.state_dict().items() if weight.data_ptr() % 64]


def test_a_folder_that_is_in_use_can_be_written_anew(saved: Path) -> None:
    pipe = Pipeline.from_pretrained(saved)
    weights = {key: value.clone() for key, value in pipe.denoiser.state_dict().items()}
    tiny_pipeline(saved.parent).save_pretrained(saved)
    pipe.save_pretrained(saved)
    again = Pipeline.from_pretrained(saved)
    for state in (pipe.denoiser.state_dict(), again.denoiser.state_dict()):
        assert all(torch.equal(state[key], weights[key]) for key in weights)


def test_one_weight_is_saved_without_its_file(tmp_path: Path) -> None:
    save_file({"large": torch.zeros(100_000), "small": torch.arange(3.0)}, tmp_path / "x.safetensors")
    small = SafetensorsFile(tmp_path / "x.safetensors").tensors()["small"]
    buffer = io.BytesIO()
    torch.save(small, buffer)
    assert len(buffer.getvalue()) < 10_000
    assert torch.equal(small, torch.arange(3.0))  # the file object is gone, its memory is not


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [[float("nan")], [float("inf")], [float("inf"), float("-inf")], []], ids=str)
def test_nan_is_an_error_and_large_sums_are_none(tmp_path: Path, dtype: torch.dtype, bad: list[float]) -> None:
    save_part(build("autoencoder", "kl", block_out_channels=[8], norm_num_groups=4).to(dtype), tmp_path / "part")
    file = tmp_path / "part" / "model.safetensors"
    tensors = {key: value.clone() for key, value in SafetensorsFile(file).tensors().items()}
    key = next(key for key, value in tensors.items() if value.numel() > 500)
    tensors[key].fill_(torch.finfo(dtype).max)
    tensors[key].flatten()[: len(bad)] = torch.tensor(bad)
    save_file(tensors, file)
    if not bad:
        part = load_part(tmp_path / "part", dtype=dtype)
        verify(part)
        assert torch.equal(part.state_dict()[key], tensors[key])
        return
    part = load_part(tmp_path / "part", dtype=dtype)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{key} has {len(bad)} NaN or infinite values; the file is damaged"):
            verify(part)


def test_a_pickle_s_shared_tensors_become_weights_of_their_own() -> None:
    norm, one = skeleton(lambda _: nn.LayerNorm(3), None), torch.ones(3)
    tensors = {"weight": one, "bias": one}
    fill(norm, tensors, Accounting.of(norm.state_dict(), tensors, source="here", model="LayerNorm"), dtype=torch.float32)
    with torch.no_grad():
        norm.weight.zero_()
    assert torch.equal(norm.bias, torch.ones(3))


# ------------------------------------------------------------------------------------------------------ places of any alignment


def shifted(x: Tensor, tmp_path: Path, dtype: torch.dtype) -> Tensor:
    """The same numbers where files may have them: at a multiple of the size of one number, and of no more."""
    path = tmp_path / f"{len(list(tmp_path.iterdir()))}.safetensors"
    for odd in range(1, 64):
        save_file({"a": torch.zeros(odd, dtype=dtype), "b": x.to(dtype)}, path)
        mapped = SafetensorsFile(path).tensors()["b"]
        if mapped.data_ptr() % (2 * dtype.itemsize):
            return mapped
    raise AssertionError("no place is odd")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_products_in_16_bits_are_the_same_wherever_a_weight_begins(tmp_path: Path, dtype: torch.dtype) -> None:
    """So these stay in the file; linear layers on one vector, two, and many, and convolutions."""
    torch.manual_seed(0)
    for rows, columns in ((24, 12), (320, 64), (64, 1280)):
        weight = torch.randn(rows, columns).to(dtype)
        mapped = shifted(weight, tmp_path, dtype)
        for count in (1, 2, 77):
            x = torch.randn(count, columns).to(dtype)
            assert torch.equal(torch.nn.functional.linear(x, mapped), torch.nn.functional.linear(x, weight))
    for out, into in ((4, 32), (32, 4), (16, 16)):
        weight, x = torch.randn(out, into, 3, 3).to(dtype), torch.randn(1, into, 8, 8).to(dtype)
        mapped = shifted(weight, tmp_path, dtype)
        assert torch.equal(torch.nn.functional.conv2d(x, mapped), torch.nn.functional.conv2d(x, weight))


def test_weights_in_16_bits_stay_in_the_file(tmp_path: Path) -> None:
    """All of them, whatever their places; those in 32 bits only where torch would have them."""
    pipe = tiny_pipeline(tmp_path)
    for dtype, all_of_them in ((torch.bfloat16, True), (torch.float32, False)):
        folder = pipe.to(dtype).save_pretrained(tmp_path / str(dtype))
        file = folder / "denoiser" / "model.safetensors"
        odd = {key: value for key, value in pipe.denoiser.state_dict().items() if value.ndim > 1}
        save_file({"0": torch.zeros(3, dtype=torch.uint8), **pipe.denoiser.state_dict()}, tmp_path / "odd.safetensors")
        stored = SafetensorsFile(tmp_path / "odd.safetensors").tensors()
        del stored["0"]
        net = skeleton(type(pipe.denoiser), pipe.denoiser.config)
        accounting = Accounting.of(net.state_dict(), stored, source=str(file), model="UNet")
        places = {key: tensor.data_ptr() for key, tensor in stored.items()}
        fill(net, stored, accounting, dtype=dtype)
        kept = {key for key, tensor in net.state_dict().items() if tensor.data_ptr() == places[key]}
        assert kept >= odd.keys() if all_of_them else kept == {key for key, place in places.items() if place % 64 == 0}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_kernels_take_weights_at_any_place(tmp_path: Path, dtype: torch.dtype) -> None:
    def check(kernel: Any, x: Tensor, *weights: Tensor, **options: Any) -> None:
        mapped = [shifted(weight, tmp_path, dtype) for weight in weights]
        for inference in (True, False):
            results = []
            for given in ([w.to(dtype) for w in weights], mapped):
                inputs = [each.detach().requires_grad_(not inference) for each in (x.to(dtype), *given)]
                out = kernel(*inputs, **options)
                grads = [] if inference else torch.autograd.grad(out.float().sum(), inputs)
                results.append([out, *grads])
            assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))

    torch.manual_seed(0)
    check(geglu_linear, torch.randn(70, 48), torch.randn(2 * 64, 48), torch.randn(2 * 64), backend="cpu")

    def norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return group_norm_silu(x, 4, weight, bias, backend="cpu")

    check(norm, torch.randn(2, 24, 9, 9), torch.randn(24), torch.randn(24))
