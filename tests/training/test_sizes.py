"""Sizes and crops reach the conditioners that ask for them, and a tiny Stable Diffusion XL is trained by a recipe."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import ldmkit
from ldmkit import Condition, Conditioner, Pipeline
from ldmkit.errors import DataError, InputTypeError
from ldmkit.nn import sinusoidal_embedding
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit.training import Options, train_diffusion
from ldmkit.training.data import Pictures, StoredPictures, _crop, open_pictures
from ldmkit.training.diffusion import DiffusionStage
from ldmkit.training.recipes import DataConfig
from ldmkit.training.sizes import told
from ldmkit.training.stage import Share
from tests.checkpoints.test_sdxl import stable_diffusion_xl
from tests.training.test_runs import bits, log
from tests.training.toy import SIZE, UNET, stage_two

SIZES = ((16, 16), (20, 32), (48, 16), (33, 40))  # height, width
CORNERS = ((0, 0), (0, 5), (16, 0), (0, 1))  # of what is left after the shorter side is 16
SIZE_DIM = 4


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of many sizes, and a vocabulary."""
    folder = tmp_path_factory.mktemp("sizes")
    rows = []
    for i, (height, width) in enumerate(SIZES):
        Image.new("RGB", (width, height), (60 * i, 90, 200)).save(folder / f"{i}.png")
        rows.append(f'{{"file_name": "{i}.png", "text": "{"a cat" if i % 2 else "the dog"}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def sdxl(pictures: Path, autoencoder: Path, examples: dict[str, Any], **changes: Any) -> Any:
    """A recipe."""
    vector = 6 + 6 * SIZE_DIM
    return stage_two(
        pictures,
        autoencoder,
        data={"folder": str(pictures), "size": SIZE},
        denoiser={**UNET, "cross_attention_dim": 16, "vector_dim": vector},
        conditioner={"name": "sdxl-text", **examples},
        preview={"inputs": ["a cat"], "num_inference_steps": 2},
        **changes,
    )


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    """The first of the conditioner's own small configs."""
    from ldmkit.testing import conformance

    return dict(conformance.subject("conditioner", "sdxl-text").fixed_configs()[0])


# ------------------------------------------------------------------------------------------------------------- what is known


@given(original=st.tuples(st.integers(1, 200), st.integers(1, 200)), wanted=st.tuples(st.integers(1, 64), st.integers(1, 64)))
def test_the_crop_is_the_centre(original: tuple[int, int], wanted: tuple[int, int]) -> None:
    resized, corner = _crop(original, wanted)
    assert any(side == want for side, want in zip(resized, wanted, strict=True))
    for side, want, first in zip(resized, wanted, corner, strict=True):
        assert side >= want
        assert 0 <= side - want - 2 * first <= 1  # as much is cut off before as after


@pytest.mark.parametrize("memory_mib", [0, 64])
def test_folders_know_sizes_and_crops(pictures: Path, memory_mib: int) -> None:
    data = DataConfig(folder=".", size=SIZE, memory_mib=memory_mib)
    opened = open_pictures(data, pictures, channels=3, conditioned=True)
    assert opened.original_sizes is not None
    assert opened.crops is not None
    assert opened.original_sizes.tolist() == [list(size) for size in SIZES]
    assert opened.crops.tolist() == [list(corner) for corner in CORNERS]


def test_npz_pictures_know_theirs(tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", x=np.zeros((2, 32, 48, 3), np.uint8))
    opened = open_pictures(DataConfig(npz="big.npz", size=SIZE), tmp_path, channels=3, conditioned=False)
    assert opened.original_sizes is not None
    assert opened.crops is not None
    assert (opened.original_sizes.tolist(), opened.crops.tolist()) == ([[32, 48]] * 2, [[0, 4]] * 2)


class Telling(Conditioner):
    """Asks for some of it."""

    class Config(ldmkit.Config):
        """Nothing."""

    provides = frozenset({"vector_BC"})
    null_input = ""

    def forward(self, inputs: Sequence[str], *, image_size: Any = None, target_size: Any = None) -> Condition:  # type: ignore[override]
        return Condition(vector_BC=target_size.float())


def test_each_conditioner_is_told_what_it_asks_for(config: dict[str, Any]) -> None:
    known, indices = StoredPictures(np.zeros((3, 8, 12, 3), np.uint8)), np.array([2, 0])
    some = told(Telling(), known, indices, (8, 12))
    assert some.pop("image_size") == (8, 12)
    assert {name: value.tolist() for name, value in some.items()} == {"target_size": [[8, 12]] * 2}
    xl, labels = ldmkit.build("conditioner", "sdxl-text", **config), ldmkit.build("conditioner", "class-label", num_classes=2)
    assert told(labels, known, indices, (8, 12)) == {}
    sizes = {"original_size": [[8, 12]] * 2, "crops_coords_top_left": [[0, 0]] * 2, "target_size": [[8, 12]] * 2}
    assert {name: value.tolist() for name, value in told(xl, known, indices, (8, 12)).items() if name in sizes} == sizes
    known.original_sizes, known.crops = np.arange(6).reshape(3, 2), np.arange(6, 12).reshape(3, 2)
    sizes |= {"original_size": [[4, 5], [0, 1]], "crops_coords_top_left": [[10, 11], [6, 7]]}
    assert {name: value.tolist() for name, value in told(xl, known, indices, (8, 12)).items() if name in sizes} == sizes


def test_a_source_with_wrong_sizes_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: Pictures = StoredPictures(np.zeros((2, SIZE, SIZE, 3), np.uint8))

    class Source:
        def open(self, *_: Any, **__: Any) -> Pictures:
            return opened

    monkeypatch.setattr("ldmkit.training.data.build", lambda *_, **__: Source())
    data = DataConfig(source={"name": "mine"}, size=SIZE)
    for name, value, found in (
        ("crops", np.zeros((3, 2), int), r"int64 \(3, 2\)"),
        ("original_sizes", np.zeros((2, 2)), r"float64 \(2, 2\)"),
        ("original_sizes", [(1, 2), (3, 4)], r"\[\(1, 2\), \(3, 4\)\]"),
    ):
        setattr(opened, name, value)
        with pytest.raises(DataError, match=rf"'mine': {name} must be whole numbers \(2, 2\) or None, and is {found}"):
            open_pictures(data, tmp_path, channels=3, conditioned=False)
        setattr(opened, name, None)
    assert open_pictures(data, tmp_path, channels=3, conditioned=False) is opened


# --------------------------------------------------------------------------------------------------------- Stable Diffusion XL


@torch.no_grad()
def test_the_network_is_told_each_ones_own(pictures: Path, autoencoder: Path, config: dict[str, Any], tmp_path: Path) -> None:
    recipe = sdxl(pictures, autoencoder, config, guidance_dropout=0.5)
    stage = DiffusionStage(recipe, pictures, Options(tmp_path), torch.device("cpu"))
    assert stage.conditioner is not None
    stage.conditioner.eval()
    seen: list[Tensor] = []
    stage.denoiser.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2].vector_BC))
    dropped = 0
    for step in range(4):
        batch = stage.batch(step, Share(0, 1))
        list(stage.losses(step, batch, torch.device("cpu")))
        captions = batch[3] or []
        order = stage._order(step)
        dropped += sum(caption is None for caption in captions)
        for row, caption, i in zip(seen[-1], captions, order.tolist(), strict=True):
            numbers = torch.tensor([*SIZES[i], *CORNERS[i], SIZE, SIZE])
            assert torch.equal(row[6:], sinusoidal_embedding(numbers, SIZE_DIM).flatten())
            assert bool((row[:6] == 0).all()) == (caption is None)
    assert 0 < dropped < 16


def test_sdxl_is_trained_and_resumes_to_the_same_bits(
    pictures: Path, autoencoder: Path, config: dict[str, Any], tmp_path: Path
) -> None:
    def train(out: str, **options: Any) -> None:
        train_diffusion(sdxl(pictures, autoencoder, config), Options(tmp_path / out, device="cpu", **options), base=pictures)

    train("whole")
    for steps in (3, 1, None):
        train("pieces", max_steps=steps)
    assert bits(tmp_path / "pieces") == bits(tmp_path / "whole")
    assert len(log(tmp_path / "whole")) == 2
    pipe = Pipeline.from_pretrained(tmp_path / "whole" / "pipeline")
    call: dict[str, Any] = {"seed": 1, "num_inference_steps": 2, "height": SIZE, "width": SIZE, "output_type": "pt"}
    small, large = (pipe("a cat", original_size=(n, n), **call).images for n in (8, 999))
    assert not torch.equal(small, large)


@torch.no_grad()
def test_the_loss_is_that_of_diffusers(pictures: Path, tmp_path: Path) -> None:
    """Fine-tuning what diffusers saved, told the time ids that diffusers' script for SDXL gives: sizes, crop, target."""
    peer = stable_diffusion_xl(tmp_path / "tokenizers")
    peer.save_pretrained(tmp_path / "theirs")
    saved = Pipeline.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    specs = {kind: json.loads((saved / kind / "part.json").read_text()) for kind in ("denoiser", "conditioner")}
    recipe = stage_two(
        pictures,
        saved / "autoencoder",
        data={"folder": str(pictures), "size": SIZE},
        **{kind: {"name": spec["name"], **spec["config"]} for kind, spec in specs.items()},
        **{f"{kind}_weights": str(saved / kind) for kind in specs},
        freeze_conditioner=True,
        guidance_dropout=0.0,
        schedule={"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
        cache_dtype="float32",
        preview=None,
    )
    stage = DiffusionStage(recipe, saved / "conditioner", Options(tmp_path), torch.device("cpu"))
    for network in stage.networks.values():
        network.eval()
    x0, noise, t, captions, _ = batch = stage.batch(0, Share(0, 1))
    ((_, ours, _),) = stage.losses(0, batch, torch.device("cpu"))

    def theirs(pipe: Any, dtype: torch.dtype) -> Tensor:
        text, _, pooled, _ = pipe.encode_prompt(captions, device="cpu", do_classifier_free_guidance=False)
        ids = torch.tensor([[*SIZES[i], *CORNERS[i], SIZE, SIZE] for i in stage._order(0).tolist()], dtype=dtype)
        noisy = pipe.scheduler.add_noise(x0.to(dtype), noise.to(dtype), t)
        told = {"text_embeds": pooled, "time_ids": ids}
        out = pipe.unet(noisy, t, encoder_hidden_states=text, added_cond_kwargs=told).sample
        return (out - noise).square().mean()

    scheduler = diffusers.DDPMScheduler.from_config(peer.scheduler.config)
    peer.scheduler = scheduler
    wide = copy.deepcopy(peer).to(torch.float64)
    assert_as_accurate(ours, theirs(peer, torch.float32), theirs(wide, torch.float64))


def test_one_pair_for_all_is_one_for_each(config: dict[str, Any]) -> None:
    conditioner = ldmkit.build("conditioner", "sdxl-text", **config).eval()
    texts, pair = ["a cat", "the dog"], (20, 24)
    want = conditioner(texts, original_size=pair, target_size=pair).vector_BC
    for pairs in ([pair, pair], torch.tensor([pair, pair])):
        assert torch.equal(conditioner(texts, original_size=pairs, target_size=pair).vector_BC, want)
    with pytest.raises(InputTypeError, match=r"original_size = a tensor \(3, 2\): must be .*, or one for each of 2 inputs"):
        conditioner(texts, original_size=torch.zeros(3, 2), target_size=pair)
    with pytest.raises(InputTypeError, match="target_size = 'wide': must be a pair"):
        conditioner(texts, original_size=pair, target_size="wide")
