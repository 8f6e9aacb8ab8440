"""The evaluation can fail: perfect pictures reach 100%, pictures that ignore the prompt reach nearly nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmkit import Autoencoder, Pipeline
from ldmkit.errors import CheckpointError, DataError, InputError, OutputError
from ldmkit_emoji import bundle, charts, data, demo, evaluate, gallery, history, measures, scenes
from ldmkit_emoji.captions import COLOURS
from ldmkit_emoji.glyphs import Emoji, Glyphs
from ldmkit_emoji.metrics import NearestGlyph, background, feature_distance, psnr

RECIPES = Path(data.__file__).parent / "recipes"
TONES = ("", ": light skin tone", ": dark skin tone")


@pytest.fixture(scope="module")
def toys() -> Glyphs:
    """Families of three skin tones: blocks of random colours, the tones a little apart, on a free margin."""
    random = np.random.default_rng(0)
    emoji, pictures = [], []
    for i in range(120):
        look = random.integers(30, 226, (6, 6, 4)).repeat(10, axis=0).repeat(10, axis=1)
        look[..., 3] = 255 * (look[..., 3] > 100)
        for tone, shade in zip(TONES, (0, 12, -12), strict=True):
            emoji.append(
                Emoji(text="?", name=f"Toy {i}{tone}", group="g", subgroup=scenes.SUBGROUPS[0], family=f"Toy {i}", keywords=())
            )
            pictures.append(
                np.pad(look + np.array([shade, shade, shade, 0]), ((2, 2), (2, 2), (0, 0))).clip(0, 255).astype(np.uint8)
            )
    return Glyphs(tuple(emoji), np.stack(pictures))


def ideal(toys: Glyphs, shift: int = 0) -> measures.Draw:
    """Draws what is asked for, or the emoji `shift` places further on."""
    found: dict[str, np.ndarray] = {}
    for colour, rgb in COLOURS.items():
        pictures_NHWC = np.roll(toys.on(rgb), -shift, axis=0) / 255
        for emoji, picture_HWC in zip(toys.emoji, pictures_NHWC, strict=True):
            found[measures.pair_prompt(emoji, colour)] = picture_HWC
            if colour == "white":
                found[emoji.name.lower()] = picture_HWC
    return lambda prompts: np.stack([found[prompt] for prompt in prompts])


def constant(prompts: Sequence[str]) -> np.ndarray:
    return np.full((len(prompts), 64, 64, 3), 0.5)


def test_a_perfect_model_reaches_everything(toys: Glyphs) -> None:
    every = {"top1": 1.0, "top5": 1.0, "prompts": 100}
    assert measures.fidelity(ideal(toys), toys, 100, 0) == every | {"others": every}
    pairs = measures.held_out_pairs(ideal(toys), toys, 50, 0)
    assert pairs == {"background": 1.0, "top1": 1.0, "top5": 1.0, "prompts": 50}


def test_a_model_that_ignores_the_prompt_reaches_nothing(toys: Glyphs) -> None:
    figures = measures.fidelity(constant, toys, 100, 0)
    assert figures["top1"] < 0.05
    assert figures["top5"] < 0.15
    assert measures.held_out_pairs(constant, toys, 50, 0)["background"] < 0.3, "gray is one of eleven"


def test_the_wrong_family_is_wrong_and_another_skin_tone_is_right(toys: Glyphs) -> None:
    assert measures.fidelity(ideal(toys, shift=3), toys, 100, 0)["top1"] == 0
    cycle = {name: name.replace(TONES[2], "") if TONES[2] in name else name for name in (e.name.lower() for e in toys.emoji)}
    draw = ideal(toys)
    assert measures.fidelity(lambda prompts: draw([cycle[p] for p in prompts]), toys, 100, 0)["top1"] == 1


def test_people_are_counted_apart(toys: Glyphs) -> None:
    """The first half are people and drawn right, the others are all drawn as something else."""
    half = len(toys) // 2
    mixed = Glyphs(
        tuple(replace(e, group=measures.PEOPLE) if i < half else e for i, e in enumerate(toys.emoji)), toys.rgba_NHWC
    )
    right, wrong = ideal(toys), ideal(toys, shift=3)
    people = {e.name.lower() for e in mixed.emoji[:half]}
    figures = measures.fidelity(lambda ps: np.concatenate([(right if p in people else wrong)([p]) for p in ps]), mixed, 100, 0)
    others = figures.pop("others")
    assert others["top1"] == 0
    assert figures["top1"] == 1 - others["prompts"] / figures["prompts"]
    only = Glyphs(mixed.emoji[:half], mixed.rgba_NHWC[:half])
    assert "others" not in measures.fidelity(right, only, 30, 0)


def scene_draw(toys: Glyphs, swap: bool = False) -> measures.Draw:
    """Draws the scene that is asked for, or its mirror image: the other one on the left."""
    found = {}
    index = {emoji.name: i for i, emoji in enumerate(toys.emoji)}
    for a, b in measures.held_out_scenes(toys)[:12]:
        left, right = (b, a) if swap else (a, b)
        for colour in COLOURS:
            scene = scenes.Scene(((index[left.name], "left"), (index[right.name], "right")), colour, "")
            for wording in scenes.PAIRS:
                found[scenes.pair_text(wording, a, b, colour)] = scenes.paint(scene, toys) / 255
    return lambda prompts: np.stack([found[prompt] for prompt in prompts])


def test_scenes_are_right_only_with_each_emoji_in_its_half(toys: Glyphs, monkeypatch: pytest.MonkeyPatch) -> None:
    every = measures.held_out_scenes(toys)
    assert all(data.scene_held_out(a.family, b.family) and a.family != b.family for a, b in every)
    monkeypatch.setattr(measures, "held_out_scenes", lambda glyphs: every[:12])
    perfect = measures.composed_scenes(scene_draw(toys), toys, 6, 0)
    assert perfect == {"scenes": 1.0, "parts": 1.0, "top5": 1.0, "background": 1.0, "prompts": 6}
    swapped = measures.composed_scenes(scene_draw(toys, swap=True), toys, 6, 0)
    assert swapped["scenes"] == swapped["parts"] == 0
    assert swapped["background"] == 1
    draw = scene_draw(toys)

    def half(prompts: Sequence[str]) -> np.ndarray:
        pictures_BHWC = draw(prompts).copy()
        pictures_BHWC[:, :, 32:] = 0.5
        return pictures_BHWC

    one_of_two = measures.composed_scenes(half, toys, 6, 0)
    assert one_of_two["scenes"] == 0
    assert one_of_two["parts"] == 0.5


def test_diversity_is_that_of_noise(toys: Glyphs) -> None:
    assert measures.diversity(ideal(toys), toys, 4, 0)["same"] < 1e-12
    random = np.random.default_rng(0)
    noise = measures.diversity(lambda prompts: random.normal(size=(len(prompts), 64, 64, 3)), toys, 8, 0)
    assert noise["same"] == pytest.approx(np.sqrt(2), rel=0.01), "two samples of unit deviation; 98,304 x 8 of them"
    assert noise["different"] == pytest.approx(np.sqrt(2), rel=0.01)


def test_the_distance_of_features_sees_edges_not_shades() -> None:
    random = np.random.default_rng(0)
    blocks = random.integers(0, 2, (4, 8, 8, 3)).repeat(8, axis=1).repeat(8, axis=2) * 0.8
    assert feature_distance(blocks, blocks).tolist() == [0.0] * 4
    lighter, blurred = blocks + 0.1, (blocks + np.roll(blocks, 4, axis=1) + np.roll(blocks, 4, axis=2)) / 3
    assert feature_distance(blocks, lighter).max() < 1e-9
    assert feature_distance(blocks, blurred).min() > 0.1
    np.testing.assert_allclose(feature_distance(blocks, blurred), feature_distance(blurred, blocks))


def test_only_trained_names_and_held_out_pairs_are_asked_for(toys: Glyphs) -> None:
    asked: list[str] = []

    def draw(prompts: Sequence[str]) -> np.ndarray:
        asked.extend(prompts)
        return ideal(toys)(prompts)

    measures.fidelity(draw, toys, 10_000, 0)
    assert sorted(asked) == sorted(e.name.lower() for e in toys.emoji if not data.glyph_held_out(e.family))
    asked.clear()
    measures.held_out_pairs(draw, toys, 10_000, 0)
    pairs = [(e, c) for e in toys.emoji for c in COLOURS if data.pair_held_out(e.family, c)]
    assert sorted(asked) == sorted(measures.pair_prompt(e, c) for e, c in pairs)
    assert measures.fidelity(ideal(toys), toys, 30, seed=1)["prompts"] == 30


def test_a_tie_is_no_hit(toys: Glyphs) -> None:
    twins = Glyphs(toys.emoji[:6], np.concatenate([toys.rgba_NHWC[:3]] * 2))
    pictures = twins.on(COLOURS["white"])[:1] / 255
    assert NearestGlyph(twins).ranks(pictures, ["Toy 0"]).tolist() == [1]


def test_distances_are_to_the_nearest_of_a_family(toys: Glyphs) -> None:
    nearest = NearestGlyph(toys, "blue")
    reference = toys.on(COLOURS["blue"]) / 255
    small = reference.reshape(-1, 32, 2, 32, 2, 3).mean(axis=(2, 4))
    picture = reference[4:5] * 0.5
    expected = dict.fromkeys(nearest.families, np.inf)
    for emoji, other in zip(toys.emoji, small, strict=True):
        expected[emoji.family] = min(expected[emoji.family], float(np.square(other - small[4] * 0.5).mean()))
    computed = nearest.distances(picture)[0]
    np.testing.assert_allclose(computed, [expected[f] for f in nearest.families], rtol=1e3 * np.finfo(np.float32).eps)


def test_backgrounds_are_told_apart_beside_any_glyph(toys: Glyphs) -> None:
    for colour, rgb in COLOURS.items():
        assert set(background(toys.on(rgb) / 255)) == {colour}


def test_psnr_has_its_closed_form() -> None:
    a = np.zeros((2, 64, 64, 3))
    b = np.stack([np.full((64, 64, 3), 0.1), np.zeros((64, 64, 3))])
    np.testing.assert_allclose(psnr(a, b), [20, np.inf])
    with pytest.raises(InputError, match=r"\(1, 32, 32, 3\)"):
        psnr(np.zeros((1, 32, 32, 3)), np.zeros((1, 32, 32, 3)))


class Faded(Autoencoder):
    """Halves the contrast."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def encode(self, x_BCHW: torch.Tensor) -> Any:
        class Mode:
            mode = staticmethod(lambda: x_BCHW)

        return Mode

    def decode(self, z_BCHW: torch.Tensor) -> torch.Tensor:
        return z_BCHW * self.factor


def test_autoencoders_are_measured_on_held_out_glyphs(toys: Glyphs) -> None:
    kept = [i for i, e in enumerate(toys.emoji) if data.glyph_held_out(e.family)]
    truth = toys.on(COLOURS["white"])[kept] / 255
    expected = psnr(truth, (truth - 0.5) * 0.5 + 0.5)
    figures = measures.autoencoder_fidelity(Faded(), toys, batch_size=4)
    assert figures["glyphs"] == len(kept) > 0
    assert figures["psnr"] == pytest.approx(expected.mean(), rel=1e-5)
    assert figures["worst"] == pytest.approx(expected.min(), rel=1e-5)
    assert figures["distance"] == pytest.approx(feature_distance(truth, (truth - 0.5) * 0.5 + 0.5).mean(), rel=1e-4)
    with pytest.raises(InputError, match="nothing to measure"):
        measures.fidelity(constant, Glyphs(toys.emoji[:0], toys.rgba_NHWC[:0]), 1, 0)


# ---------------------------------------------------------------------------------------------------------- with a whole model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained pipeline of the recipes' kind, saved."""
    torch.manual_seed(0)
    pipe = Pipeline(
        autoencoder={
            "name": "kl",
            "latent_channels": 4,
            "block_out_channels": [8, 8, 8],
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "mid_block_add_attention": False,
        },
        denoiser={
            "name": "unet",
            "block_out_channels": [8, 16],
            "layers_per_block": 1,
            "transformer_layers_per_block": [0, 1],
            "num_attention_heads": 2,
            "cross_attention_dim": 16,
            "norm_num_groups": 4,
        },
        conditioner={
            "name": "bert",
            "vocab": str(RECIPES / "vocab.txt"),
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "max_length": 32,
        },
        prediction="v_prediction",
        defaults={"height": 64, "width": 64, "num_inference_steps": 4, "guidance_scale": 2.0},
    )
    return pipe.save_pretrained(tmp_path_factory.mktemp("emoji") / "tiny")


def test_the_whole_evaluation_runs_and_repeats(
    tiny: Path, toys: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = Glyphs(toys.emoji[:90], toys.rgba_NHWC[:90])
    few.save(tmp_path / "glyphs.npz", [False] * len(few))
    arguments = ["--fast", "--model", str(tiny), "--data", str(tmp_path), "-o", str(tmp_path / "report.json")]
    reports = []
    for only in ([], ["--only", "fidelity", "--only", "scenes"]):
        evaluate.main(arguments + only)
        reports.append(json.loads((tmp_path / "report.json").read_text()))
    assert set(evaluate.MEASUREMENTS) < set(reports[0])
    for name in ("fidelity", "scenes"):
        figures = [{k: v for k, v in report[name].items() if "seconds" not in k} for report in reports]
        assert figures[0] == figures[1]
    for name in ("curves", "image-to-image", "inpainting"):
        with Image.open(tmp_path / f"report-{name}.png") as picture:
            assert picture.width > picture.height
    assert reports[0]["fidelity"]["prompts"] == evaluate.FAST
    assert reports[0]["settings"]["defaults"]["num_inference_steps"] == 4
    assert reports[0]["versions"]["torch"] == str(torch.__version__)
    out = capsys.readouterr().out
    assert all(part in out for part in ("PSNR", "scenes never trained on", "top-1 and top-5 by steps"))


def test_one_measurement_alone(tiny: Path, toys: Glyphs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toys.save(tmp_path / "glyphs.npz", [False] * len(toys))
    evaluate.main(["--only", "autoencoder", "--model", str(tiny), "--data", str(tmp_path), "-o", str(tmp_path / "a.json")])
    assert set(json.loads((tmp_path / "a.json").read_text())) == {"autoencoder", "settings", "versions"}
    assert not (tmp_path / "a-curves.png").exists()
    assert len(capsys.readouterr().out.splitlines()) == 2, "the figures, and what was written"


def test_a_report_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        evaluate.main(["--model", "no such model", "-o", str(tmp_path / "absent" / "report.json")])


def test_pictures_of_another_size_are_refused() -> None:
    class Large:
        def __call__(self, prompts: Sequence[str], **settings: Any) -> Any:
            return type("Output", (), {"images": np.zeros((len(prompts), 128, 128, 3))})

    with pytest.raises(InputError, match=r"\(128, 128, 3\)"):
        evaluate.pipeline_draw(Large(), 0)(["red apple"])  # type: ignore[arg-type]


def test_the_demo_draws_its_sixteen_prompts(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    demo.main(["--model", str(tiny), "-o", str(tmp_path / "new" / "demo.png")])
    out = capsys.readouterr().out
    assert str(tmp_path / "new" / "demo.png") in out
    assert all(part in out for part in ("loading", "drawing", "writing"))
    with Image.open(tmp_path / "new" / "demo.png") as picture:
        assert picture.size[0] > 4 * 64 * 2
    assert len(set(demo.PROMPTS)) == 16
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        demo.main(["--model", str(tiny), "-o", str(tmp_path / "file" / "demo.png")])


def test_packing_writes_small_float16_files(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "SHARD", 40_000)
    written = bundle.pack(tiny, tmp_path / "weights")
    assert sum("safetensors" in name and "denoiser" in name and "index" not in name for name in written) > 1
    packed = Pipeline.from_pretrained(tmp_path / "weights", dtype="auto")
    assert packed.dtype == torch.float16
    monkeypatch.setattr(bundle, "SHARD", bundle.MIB)
    assert len(bundle.pack(tiny, tmp_path / "weights")) < len(written), "no shard of the first packing is left"
    before = bundle.sizes(tmp_path / "weights")
    for limit, message in (("FILE_LIMIT", "below"), ("TOTAL_LIMIT", "in all")):
        with monkeypatch.context() as patch:
            patch.setattr(bundle, limit, 10_000)
            with pytest.raises(OutputError, match=message):
                bundle.pack(tiny, tmp_path / "weights")
    assert bundle.sizes(tmp_path / "weights") == before, "what was there is untouched"
    assert [path.name for path in tmp_path.iterdir()] == ["weights"], "and nothing is left beside it"
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match="no saved pipeline"):
        bundle.pack(tiny, tmp_path / "other")


def test_recipes_are_valid_and_fit_one_another() -> None:
    from ldmkit.training import AutoencoderRecipe, DiffusionRecipe, load_recipe

    stage_one = load_recipe(AutoencoderRecipe, RECIPES / "autoencoder.yaml")
    stage_two = load_recipe(DiffusionRecipe, RECIPES / "diffusion.yaml")
    assert stage_two.conditioner is not None
    assert stage_one.data.npz == stage_two.data.npz
    stage_three = load_recipe(DiffusionRecipe, RECIPES / "balanced.yaml")
    assert stage_three.denoiser == stage_two.denoiser
    assert stage_three.conditioner == stage_two.conditioner | {"padding": "longest"}
    assert (stage_three.schedule, stage_three.prediction) == (stage_two.schedule, stage_two.prediction)
    channels = stage_one.autoencoder["latent_channels"]
    assert channels == stage_two.denoiser["in_channels"] == stage_two.denoiser["out_channels"]
    assert stage_two.denoiser["cross_attention_dim"] == stage_two.conditioner["hidden_size"]
    assert stage_two.conditioner["vocab"] == "vocab.txt"


def test_the_embedded_model_is_small_and_draws() -> None:
    try:
        folder = bundle.folder()
    except CheckpointError as error:
        pytest.skip(f"no embedded weights in this tree: {error}")
    written = bundle.sizes(folder)
    assert any(name.endswith("vocab.txt") for name in written)
    pipe = Pipeline.from_pretrained("emoji")
    a, b = (
        pipe("a red apple on a blue background", seed=1, num_inference_steps=2, output_type="np", progress=False) for _ in "ab"
    )
    assert a.images.shape == (1, 64, 64, 3)
    np.testing.assert_array_equal(a.images, b.images)


def test_the_gallery_draws_every_picture(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery.main(["--model", str(tiny), "-o", str(tmp_path / "docs")])
    written = {path.stem: path for path in (tmp_path / "docs").iterdir()}
    assert set(written) == set(gallery.PICTURES)
    sizes = {}
    for name, path in written.items():
        with Image.open(path) as picture:
            sizes[name] = picture.size
    assert sizes["guidance"] == sizes["noising"], "six pictures in a row"
    assert str(written["samplers"]) in capsys.readouterr().out


def test_the_history_is_drawn_from_logs_and_previews(tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run / "samples").mkdir(parents=True)
        lines = [json.dumps({"step": step, "loss": 1 / step}) for step in (50, 100)]
        (tmp_path / run / "log.jsonl").write_text("\n".join(lines) + "\n")
        for step in range(6):
            Image.new("RGB", (40, 20), (255, 40 * step, 0)).save(tmp_path / run / "samples" / f"step-{step:08d}.png")
    runs = [tmp_path / "first", tmp_path / "second"]
    assert history.losses(runs) == {"first": [(50, 0.02), (100, 0.01)], "second": [(150, 0.02), (200, 0.01)]}
    assert history.samples(runs).size == (4 * 40, 2 * 36), "eight of twelve, four a row"
    history.main([*map(str, runs), "-o", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"loss.png", "samples.png"}
    (tmp_path / "first" / "log.jsonl").write_text("")
    with pytest.raises(DataError, match="empty"):
        history.losses(runs)
    with pytest.raises(DataError, match="no folder of a training run"):
        history.losses([tmp_path])
    with pytest.raises(DataError, match="no samples"):
        history.samples([tmp_path])


def test_charts_draw_their_lines_where_they_belong() -> None:
    image = np.asarray(charts.chart("", "", {"": [(0, 1.0), (9, 1.0)]}))
    rows = np.flatnonzero((image == charts.LINES[0]).all(axis=-1)[:, charts.WIDTH // 2])
    assert abs(rows.mean() - charts.TOP) <= 1, "the highest value is at the top"


@pytest.mark.parametrize("module", ["demo", "evaluate", "bundle"])
def test_a_mistake_on_the_command_line_is_one_line(module: str, tmp_path: Path) -> None:
    options = [str(tmp_path / "nothing")] if module == "bundle" else ["--model", str(tmp_path / "nothing")]
    done = subprocess.run(
        [sys.executable, "-m", f"ldmkit_emoji.{module}", *options], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
