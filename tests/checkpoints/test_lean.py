"""Loading is lean: no more memory than the weights take, and nothing from the network unless asked."""

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldmkit import Pipeline
from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.container import SafetensorsFile
from ldmkit.checkpoints.filling import fill
from ldmkit.checkpoints.skeletons import skeleton
from ldmkit.errors import CheckpointError, InputError, InputTypeError
from ldmkit_unet.unet import UNet
from tests.conditions import tiny_pipeline

MIDDLE = {"block_out_channels": [192, 384, 512], "transformer_layers_per_block": [0, 1, 1], "layers_per_block": 1}


class Peak:
    """The most anonymous memory beyond what there was, in bytes, while the block runs."""

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon in /proc/self/status")

    def __enter__(self) -> "Peak":
        gc.collect()
        self.start = self.most = self.now()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, self.now())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, self.now())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells anonymous memory apart from mapped files")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_peak_memory_is_that_of_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    config = UNet.Config.parse({**MIDDLE, "num_attention_heads": 8, "cross_attention_dim": 768})
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in UNet(config).state_dict().items()}
    save_file({key: torch.full(shape, 0.5, dtype=torch.float16) for key, shape in shapes.items()}, tmp_path / "x.safetensors")
    fill_from(tmp_path / "x.safetensors", config, dtype)  # what torch allocates once
    with Peak() as peak:
        module = fill_from(tmp_path / "x.safetensors", config, dtype)
    weights = sum(parameter.nbytes for parameter in module.parameters())
    assert weights > 50e6
    assert peak.most - peak.start <= 1.1 * weights


def fill_from(path: Path, config: Any, dtype: torch.dtype) -> nn.Module:
    module, tensors = skeleton(UNet, config), SafetensorsFile(path).tensors()
    return fill(module, tensors, Accounting.of(module.state_dict(), tensors, source=str(path), model="UNet"), dtype=dtype)


class Tied(nn.Module):
    """Two names of one weight, and a constant outside the state dict."""

    def __init__(self, config: None) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight
        self.register_buffer("constant", torch.arange(3.0), persistent=False)


class Awkward(nn.Module):
    """Needs numbers of its weights while it is made, or keeps some that no file holds."""

    def __init__(self, config: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.norm = float(self.layer.weight.detach().norm()) if config else 0.0
        self.register_buffer("ones", torch.empty(2).fill_(1), persistent=False)


def filled(module: nn.Module, tensors: dict[str, Tensor], **options: Any) -> nn.Module:
    accounting = Accounting.of(module.state_dict(), tensors, source="here", model=type(module).__name__)
    return fill(module, tensors, accounting, **{"dtype": torch.float64, **options})


def test_tied_weights_stay_tied_and_constants_keep_their_values() -> None:
    tensors = {"one.weight": torch.randn(3, 3), "two.weight": torch.randn(3, 3)}
    module = filled(skeleton(Tied, None), tensors)
    assert module.one.weight is module.two.weight
    assert torch.equal(module.one.weight, tensors["one.weight"].double())
    assert torch.equal(module.constant, torch.arange(3.0).double())


@pytest.mark.parametrize("asks", [False, True])
def test_classes_that_cannot_be_made_without_weights_are_made_with(asks: bool) -> None:
    module = filled(skeleton(Awkward, asks), {"layer.weight": torch.ones(2, 2), "layer.bias": torch.ones(2)})
    assert torch.equal(module.ones, torch.ones(2).double())
    assert (module.norm > 0) == asks


def test_progress_is_shown_for_large_files_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_pipeline(tmp_path).save_pretrained(tmp_path / "p")
    Pipeline.from_pretrained(folder)
    assert "UNet" not in capsys.readouterr().err
    monkeypatch.setattr("ldmkit.checkpoints.filling.SHOWN_FROM", 1)
    Pipeline.from_pretrained(folder)
    told = capsys.readouterr().err
    assert "UNet: 100%" in told
    assert "KLAutoencoder: 100%" in told


# --------------------------------------------------------------------------------------------------------------------- the hub


def test_the_hub_only_when_asked_and_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="pip install huggingface_hub")
    folder = tiny_pipeline(tmp_path).save_pretrained(tmp_path / "p")
    asked: list[tuple[str, str]] = []

    def download(name: str, *, revision: str, **patterns: Any) -> str:
        assert "*.bin" not in patterns["allow_patterns"]
        asked.append((name, revision))
        if name == "some/gone":
            raise OSError("404")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    commit = "0123456789abcdef0123456789abcdef01234567"
    with pytest.raises(CheckpointError, match="allow_download=True, revision=COMMIT"):
        Pipeline.from_pretrained("some/model")
    for revision in (None, "main", commit[:-1]):
        with pytest.raises(InputError, match="give the full 40-digit commit hash"):
            Pipeline.from_pretrained("some/model", allow_download=True, revision=revision)
    with pytest.raises(InputError, match="is no name on the hub"):
        Pipeline.from_pretrained(str(folder), revision=commit)
    assert asked == []
    Pipeline.from_pretrained("some/model", allow_download=True, revision=commit)
    assert asked == [("some/model", commit)]
    with pytest.raises(CheckpointError, match=r"some/gone at 0123.* cannot be fetched: OSError: 404"):
        Pipeline.from_pretrained("some/gone", allow_download=True, revision=commit)
    with pytest.raises(InputTypeError, match="dtype = 'half'"):
        Pipeline.from_pretrained(folder, dtype="half")  # type: ignore[arg-type]
