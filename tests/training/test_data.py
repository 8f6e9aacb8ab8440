"""Reading pictures and conditions from npz files, folders and datasets; every fault is named before training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, Image

from ldmkit.errors import DataError
from ldmkit.training.data import DecodedPictures, Pictures, StoredPictures, open_pictures
from ldmkit.training.recipes import DataConfig
from ldmkit.training.stage import to_pixels
from tests.training.toy import SIZE, squares


def load(base: Path, *, channels: int = 3, conditioned: bool = True, **values: Any) -> Pictures:
    return open_pictures(DataConfig.parse({"size": SIZE, **values}), base, channels=channels, conditioned=conditioned)


def dataset(folder: Path, **columns: Any) -> Path:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk(str(folder / "saved"))
    return folder


# ------------------------------------------------------------------------------------------------------------- what is read


def test_npz(data: Path) -> None:
    x, y = squares()
    pictures = load(data, npz="squares.npz")
    assert np.array_equal(pictures.read([3, 1]), x[[3, 1]])
    assert pictures.conditions is not None
    assert pictures.conditions[:2] == ["a red square", "a green square"]
    assert load(data, npz="squares.npz", condition_key="y").conditions == y.tolist()
    assert load(data, npz="squares.npz", conditioned=False).conditions is None


def test_npz_of_grey_pictures_without_channels(tmp_path: Path) -> None:
    x = np.arange(2 * SIZE * SIZE, dtype=np.uint8).reshape(2, SIZE, SIZE)
    np.savez(tmp_path / "grey.npz", x=x)
    assert np.array_equal(load(tmp_path, npz="grey.npz", channels=1, conditioned=False).read([1, 0])[..., 0], x[::-1])


def test_folder(data: Path) -> None:
    x, y = squares()
    pictures = load(data, folder="squares")
    assert isinstance(pictures, StoredPictures)
    assert np.array_equal(pictures.read(np.array([5, 0])), x[[5, 0]])
    assert pictures.conditions is not None
    assert pictures.conditions[3] == "a yellow square"
    assert load(data, folder="squares", condition_key="label").conditions == y.tolist()
    assert len(load(data, folder="squares", conditioned=False)) == len(x)


def test_pictures_beyond_the_memory_limit_are_decoded_when_read(data: Path) -> None:
    pictures = load(data, folder="squares", memory_mib=0)
    assert isinstance(pictures, DecodedPictures)
    assert np.array_equal(pictures.read([7, 2]), squares()[0][[7, 2]])
    assert len(pictures) == 24


def test_dataset(tmp_path: Path) -> None:
    x, y = squares()
    images = [Image.fromarray(p) for p in x[:5]]
    pictures = load(dataset(tmp_path, image=images, text=["one"] * 5, label=y[:5].tolist()), dataset="saved")
    assert np.array_equal(pictures.read([4, 0]), x[[4, 0]])
    assert pictures.conditions == ["one"] * 5
    assert load(tmp_path, dataset="saved", condition_key="label").conditions == y[:5].tolist()


def test_dataset_with_splits(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(p) for p in squares()[0][:4]]
    split = datasets.Dataset.from_dict({"image": images, "text": ["a", "b", "c", "d"]}).train_test_split(2, shuffle=False)
    split.save_to_disk(str(tmp_path / "saved"))
    assert load(tmp_path, dataset="saved", split="test").conditions == ["c", "d"]
    with pytest.raises(DataError, match=r"splits train, test; data.split = 'valid'"):
        load(tmp_path, dataset="saved", split="valid")


def test_crop_keeps_the_centre_and_transparency_becomes_white(tmp_path: Path) -> None:
    wide = np.zeros((32, 64, 4), np.uint8)
    wide[:, 16:48] = (0, 200, 0, 255)
    wide[:, :16, 3] = wide[:, 48:, 3] = 255
    wide[16:, 16:48, 3] = 0
    Image.fromarray(wide).save(tmp_path / "wide.png")
    (picture,) = load(tmp_path, folder=".", conditioned=False).read([0])
    inner = picture[:, 3:-3]  # Lanczos reaches three pixels across an edge
    assert np.unique(inner[:5].reshape(-1, 3), axis=0).tolist() == [[0, 200, 0]]
    assert np.unique(inner[-5:].reshape(-1, 3), axis=0).tolist() == [[255, 255, 255]]
    grey = load(tmp_path, folder=".", conditioned=False, channels=1).read([0])
    assert grey.shape == (1, SIZE, SIZE, 1)


def test_pictures_stand_as_their_cameras_say(tmp_path: Path) -> None:
    stored = np.zeros((SIZE, SIZE, 3), np.uint8)
    stored[: SIZE // 2] = 255
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be turned by a quarter, clockwise
    Image.fromarray(stored).save(tmp_path / "camera.png", exif=turned)
    (picture,) = load(tmp_path, folder=".", conditioned=False).read([0])
    assert np.array_equal(picture, np.rot90(stored, -1))


def test_npz_pictures_are_resized(tmp_path: Path) -> None:
    np.savez(tmp_path / "big.npz", x=np.full((2, 32, 48, 3), 77, np.uint8))
    assert np.array_equal(load(tmp_path, npz="big.npz", conditioned=False).read([0, 1]), np.full((2, SIZE, SIZE, 3), 77))


def test_bytes_become_raw_pixels() -> None:
    x = to_pixels(np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 3))
    assert x.flatten().tolist() == pytest.approx([-1, -0.6, 1])
    assert x.shape == (1, 3, 1, 1)


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arrays", "options", "message"),
    [
        ({"y": [1]}, {}, "no array 'x'; it has y"),
        ({"x": np.zeros((2, 16, 16, 3), np.uint8)}, {}, "no array 'text'"),
        ({"x": np.zeros((2, 16, 16, 3))}, {"conditioned": False}, r"must be uint8 .* got float64 \(2, 16, 16, 3\)"),
        ({"x": np.zeros((0, 16, 16, 3), np.uint8)}, {"conditioned": False}, "is empty"),
        ({"x": np.zeros((2, 16, 16), np.uint8)}, {"conditioned": False}, "1 channels and the autoencoder takes 3"),
        ({"x": np.zeros((2, 8, 16, 3), np.uint8)}, {"conditioned": False}, "8 x 16 .* data.size is 16 x 16; .*data.upscale"),
        ({"x": np.zeros((2, 32, 32, 3), np.uint8)}, {"conditioned": False, "fit": "exact"}, "32 x 32 .*data.fit to 'crop'"),
        ({"x": np.zeros((2, 16, 16, 3), np.uint8), "text": ["a"]}, {}, r"per picture \(2\), got <U1 \(1,\)"),
        ({"x": np.zeros((3, 16, 16, 3), np.uint8), "text": ["a", "", ""]}, {}, r"2 of 3 pictures have no 'text'.*\[1\].*\[2\]"),
        ({"x": np.zeros((1, 16, 16, 3), np.uint8), "y": [0.5]}, {"condition_key": "y"}, "float64"),
    ],
)
def test_npz_mistakes(tmp_path: Path, arrays: dict[str, Any], options: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(DataError, match=message):
        load(tmp_path, npz="x.npz", **options)


def test_missing_and_damaged_npz(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent.npz is missing"):
        load(tmp_path, npz="absent.npz")
    whole = (data / "squares.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.npz cannot be read as an npz file"):
        load(tmp_path, npz="cut.npz")
    (tmp_path / "worse.npz").write_bytes(whole.replace(b"\xe6\x1e\x1e", b"\x00\x00\x00", 3))
    with pytest.raises(DataError, match=r"worse.npz cannot be read as an npz file"):
        load(tmp_path, npz="worse.npz")


def test_npz_with_pickles_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.zeros((1, 16, 16, 3), np.uint8), text=np.array(["a"], dtype=object))
    with pytest.raises(DataError, match="allow_pickle=False"):
        load(tmp_path, npz="x.npz")


def test_folder_mistakes(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load(tmp_path, folder="absent")
    with pytest.raises(DataError, match=r"metadata.jsonl is missing"):
        load(tmp_path, folder=".")
    with pytest.raises(DataError, match="is empty: no picture"):
        load(tmp_path, folder=".", conditioned=False)
    (tmp_path / "metadata.jsonl").write_text("\n")
    with pytest.raises(DataError, match="is empty: no picture"):
        load(tmp_path, folder=".")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"file": "b.png"}\n')
    with pytest.raises(DataError, match=r"line 2: must be JSON with the key \"file_name\""):
        load(tmp_path, folder=".")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
    with pytest.raises(DataError, match=r"names a.png that"):
        load(tmp_path, folder=".")


def test_missing_captions_are_named_and_counted(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "squares", tmp_path / "s")
    rows = [json.loads(line) for line in (tmp_path / "s/metadata.jsonl").read_text().splitlines()]
    del rows[2]["text"]
    rows[7]["text"] = None
    (tmp_path / "s/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"2 of 24 pictures have no 'text' .*: 02.png, 07.png"):
        load(tmp_path, folder="s")


def test_unreadable_and_small_pictures_are_named_and_counted(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "squares", tmp_path / "s")
    whole = (tmp_path / "s/03.png").read_bytes()
    (tmp_path / "s/03.png").write_bytes(whole[: len(whole) - 30])
    (tmp_path / "s/05.png").write_bytes(b"not a picture")
    Image.new("RGB", (40, 9)).save(tmp_path / "s/09.png")
    Image.fromarray(np.full((SIZE, SIZE), 65535, np.uint16)).save(tmp_path / "s/11.png")
    with pytest.raises(DataError) as error:
        load(tmp_path, folder="s")
    message = str(error.value)
    assert "4 of 24 pictures cannot be used" in message
    assert "unreadable: 03.png" in message
    assert "unreadable: 05.png" in message
    assert "wrong size: 09.png is 9 x 40" in message
    assert "of 16 bits or more: 11.png (mode I;16)" in message
    (tmp_path / "s/03.png").write_bytes(whole)
    (tmp_path / "s/05.png").write_bytes(whole)
    (tmp_path / "s/11.png").write_bytes(whole)
    assert len(load(tmp_path, folder="s", upscale=True)) == 24


def test_long_lists_of_faults_are_cut(tmp_path: Path) -> None:
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"9 of 9 .*4.jpg.*; and 4 more$"):
        load(tmp_path, folder=".", conditioned=False)


def test_dataset_mistakes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read as a dataset"):
        load(tmp_path, dataset="absent")
    images = [Image.fromarray(p) for p in squares()[0][:2]]
    dataset(tmp_path, image=images, text=["a", None])
    with pytest.raises(DataError, match=r"no column 'caption'; it has image, text"):
        load(tmp_path, dataset="saved", condition_key="caption")
    with pytest.raises(DataError, match=r"1 of 2 pictures have no 'text' .*: row 1"):
        load(tmp_path, dataset="saved")
    with pytest.raises(DataError, match=r"no column 'img'"):
        load(tmp_path, dataset="saved", image_key="img")
