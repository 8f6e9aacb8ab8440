"""`ldmkit generate`: pictures with their settings inside, drawn again on request."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from ldmkit.cli import main
from ldmkit.commands.recorded import CHUNK
from tests.conditions import tiny_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return tiny_pipeline(folder).save_pretrained(folder / "tiny")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def generate(*arguments: object) -> int:
    return main(["generate", "--no-progress", *map(str, arguments)])


def settings(path: Path) -> dict[str, object]:
    with Image.open(path) as picture:
        recorded: dict[str, object] = json.loads(picture.info[CHUNK])
    return recorded


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_are_named_by_prompt_and_never_overwritten(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate("a Red apple!", "a pear", "-n", 2, "--model", model, "--seed", 3) == 0
    names = ["a-red-apple-1.png", "a-red-apple-2.png", "a-pear-1.png", "a-pear-2.png"]
    assert capsys.readouterr().out.split() == [str(Path("out") / name) for name in names]
    assert generate("a pear", "--model", model) == 0
    assert Path("out/a-pear-3.png").exists()
    assert (pixels(Path("out/a-pear-1.png")) != pixels(Path("out/a-pear-2.png"))).any()


def test_the_text_chunks_say_what_drew_it(model: Path) -> None:
    assert generate("a pear", "--model", model, "--seed", 3, "--steps", 2, "--sampler", "euler", "-o", "pear.png") == 0
    recorded = settings(Path("pear.png"))
    assert recorded.pop("versions").keys() == {"ldmkit", "torch"}  # type: ignore[attr-defined]
    assert recorded == {
        "prompt": "a pear",
        "seed": 3,
        "number": 0,
        "model": str(model),
        "sampler": "euler",
        "steps": 2,
        "guidance": 3.0,
    }
    assert Image.open("pear.png").info["prompt"] == "a pear"


def test_like_draws_it_again(model: Path) -> None:
    generate("a pear", "a red apple", "--model", model, "--sampler", "euler-ancestral", "--negative", "blue")
    for name in ("a-pear-1.png", "a-red-apple-1.png"):
        assert generate("--like", Path("out") / name, "-o", "again.png") == 0
        difference = np.abs(pixels(Path("again.png")) - pixels(Path("out") / name))
        assert difference.max() <= 1  # alone or in a batch, products round differently; a pixel may fall on the other side
        assert settings(Path("again.png")) == settings(Path("out") / name)


def test_like_takes_changes(model: Path) -> None:
    generate("a pear", "--model", model, "--seed", 1, "-o", "pear.png")
    assert generate("--like", "pear.png", "--guidance", 6, "-o", "more.png") == 0
    assert settings(Path("more.png"))["seed"] == 1
    assert settings(Path("more.png"))["guidance"] == 6.0
    assert (pixels(Path("more.png")) != pixels(Path("pear.png"))).any()


def test_a_picture_stands_as_its_camera_says(model: Path) -> None:
    stored, turned = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(stored).save("camera.png", exif=turned)
    Image.fromarray(np.rot90(stored, -1)).save("upright.png")
    for name in ("camera", "upright"):
        assert generate("a pear", "--model", model, "--seed", 3, "--image", f"{name}.png", "-o", f"out/{name}.png") == 0
    assert (pixels(Path("out/camera.png")) == pixels(Path("out/upright.png"))).all()


def test_like_wants_the_same_image(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate("a pear", "--model", model, "--seed", 1, "-o", "pear.png")
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save("mask.png")
    assert generate("a red pear", "--model", model, "--image", "pear.png", "--mask", "mask.png", "-o", "red.png") == 0
    assert generate("--like", "red.png", "-o", "again.png") == 0
    np.testing.assert_array_equal(pixels(Path("again.png")), pixels(Path("red.png")))
    Image.open("pear.png").rotate(90).save("pear.png")
    assert generate("--like", "red.png", "-o", "again.png") == 2
    assert "pear.png has changed" in capsys.readouterr().err
    Path("pear.png").unlink()
    assert generate("--like", "red.png", "-o", "again.png") == 2
    assert "pear.png, which is gone" in capsys.readouterr().err


def test_a_sheet_of_all(model: Path) -> None:
    assert generate("a pear", "a red apple", "--model", model, "--grid", "sheet.png") == 0
    sheet = Image.open("sheet.png")
    assert sheet.width > 2 * 32
    assert sheet.height > 32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to draw"),
        (["a", "-o", "x.jpg"], "x.jpg: pictures are written as PNG"),
        (["a", "b", "-o", "x.png"], "one file for 2 pictures"),
        (["a", "-n", "0"], "-n = 0"),
        (["a", "--steps", "0"], "num_inference_steps = 0"),
        (["a", "--strength", "0.5"], "strength = 0.5 was given without image"),
        (["a", "--image", "nothing.png"], "--image nothing.png: cannot be read"),
        (["a", "--sampler", "eular"], "did you mean 'euler'"),
        (["a", "--model", "no-such"], "'no-such' is not a folder"),
        (["a", "--device", "cuda:99"], "--device cuda:99: this torch"),
        (["a", "--device", "gpu"], "--device gpu: torch knows no such device"),
        (["a", "--grid", "x.jpg"], "--grid x.jpg: pictures are written as PNG"),
        (["a", "--grid", "file/below/x.png"], "cannot write"),
        (["--like", "nothing.png"], "--like nothing.png: cannot be read"),
        (["a", "-o", "file/below"], "cannot write"),
    ],
)
def test_bad_options_are_one_line(model: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("in the way")
    model_given = [] if "--model" in arguments or "--like" in arguments else ["--model", model]
    assert generate(*arguments, *model_given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_names_are_short_enough_in_any_script_and_folders_may_have_dots(model: Path) -> None:
    Path("v1.5").mkdir()
    assert generate("\U00010400" * 100, "--model", model, "-o", "v1.5") == 0
    (path,) = Path("v1.5").iterdir()
    assert path.suffix == ".png"


def test_like_finds_a_model_from_another_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert generate("a pear", "--model", model.name, "-o", tmp_path / "pear.png") == 0
    monkeypatch.chdir(tmp_path)
    assert generate("--like", "pear.png", "-o", "again.png") == 0


def test_a_strangers_picture_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (8, 8)).save("plain.png")
    assert generate("--like", "plain.png") == 2
    assert "carries no ldmkit settings" in capsys.readouterr().err
