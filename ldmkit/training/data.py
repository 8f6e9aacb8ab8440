"""Pictures and what they are conditioned on: npz arrays, folders with captions, Hugging Face datasets. All checked first."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from ldmkit.errors import DataError, MissingDependencyError
from ldmkit.images import on_white
from ldmkit.plugin.registry import build
from ldmkit.training.recipes import DataConfig

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
SHOWN = 5


class Pictures(ABC):
    """Training pictures, all of one size, and their conditions.

    Attributes:
        conditions: one per picture (prompts or labels), or None where none were asked for.
        original_sizes: whole numbers (N, 2), (height, width) of each before it was brought to its size; None: that size.
        crops: whole numbers (N, 2), (top, left) of what is left of it, in pixels after it was resized and before it is
            mirrored; None: nothing was cut off. Both are for conditioners that ask for them, as `sdxl-text` does.
    """

    conditions: list[Any] | None
    original_sizes: np.ndarray | None = None
    crops: np.ndarray | None = None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""


class StoredPictures(Pictures):
    """Pictures held in memory, uint8 (N, H, W, C)."""

    def __init__(self, x_NHWC: np.ndarray, conditions: list[Any] | None = None) -> None:
        self.x_NHWC, self.conditions = x_NHWC, conditions

    def __len__(self) -> int:
        return len(self.x_NHWC)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return self.x_NHWC[indices]


class DecodedPictures(Pictures):
    """Pictures decoded whenever they are read, in threads."""

    def __init__(self, decode: Callable[[int], np.ndarray], n: int, conditions: list[Any] | None = None) -> None:
        self._decode, self._n, self.conditions = decode, n, conditions
        self._threads = ThreadPoolExecutor()

    def __len__(self) -> int:
        return self._n

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        return np.stack(list(self._threads.map(self._decode, [int(i) for i in indices])))


def open_pictures(config: DataConfig, base: Path, *, channels: int, conditioned: bool, progress: bool = False) -> Pictures:
    """Open and check a recipe's data: every picture is decoded once before training starts.

    Args:
        base: what relative paths are relative to.
        channels: 3 or 1; pictures in files are converted, with transparency laid on white.
        conditioned: whether conditions are needed.

    Raises:
        DataError: for missing or empty data, unreadable pictures (named and counted), missing conditions, wrong sizes.
    """
    if config.npz is not None:
        return _open_npz(config, base / config.npz, channels, conditioned)
    if config.folder is not None:
        return _open_folder(config, base / config.folder, channels, conditioned, progress)
    if config.source is not None:
        values = dict(config.source)
        source = build("data-source", values.pop("name"), **values)
        return _checked_source(
            source.open(config, base, channels=channels, conditioned=conditioned), config, channels, conditioned
        )
    assert config.dataset is not None
    return _open_dataset(config, base / config.dataset, channels, conditioned, progress)


def _checked_source(pictures: Any, config: DataConfig, channels: int, conditioned: bool) -> Pictures:
    """What a plugin's source opened, once its first picture is what it must be. Raises: DataError."""
    name = config.source["name"] if config.source else ""
    if not isinstance(pictures, Pictures) or not len(pictures):
        raise DataError(f"data.source {name!r} must open ldmkit.training.data.Pictures, at least one, and opened {pictures!r}")
    first, wanted = pictures.read([0]), (1, *config.height_width, channels)
    if first.shape != wanted or first.dtype != np.uint8:
        raise DataError(f"data.source {name!r} must read uint8 {wanted}, and read {first.dtype} {first.shape}")
    if conditioned and (pictures.conditions is None or len(pictures.conditions) != len(pictures)):
        raise DataError(f"data.source {name!r} must have one condition for each of its {len(pictures)} pictures")
    for what in ("original_sizes", "crops"):
        told = getattr(pictures, what)
        if told is not None and not (
            isinstance(told, np.ndarray) and told.shape == (len(pictures), 2) and told.dtype.kind in "iu"
        ):
            found = f"{told.dtype} {told.shape}" if isinstance(told, np.ndarray) else repr(told)
            raise DataError(f"data.source {name!r}: {what} must be whole numbers ({len(pictures)}, 2) or None, and is {found}")
    return pictures


# --------------------------------------------------------------------------------------------------------------------- npz


def _open_npz(config: DataConfig, path: Path, channels: int, conditioned: bool) -> Pictures:
    try:
        with np.load(path, allow_pickle=False) as file:
            keys = ("x", config.condition_key) if conditioned else ("x",)
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise DataError(f"{path} has no array {missing[0]!r}; it has {', '.join(file.files) or 'none'}")
            x, conditions = file["x"], file[config.condition_key] if conditioned else None
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except Exception as error:  # zipfile, zlib, struct and numpy each have their own for a damaged file
        raise DataError(f"{path} cannot be read as an npz file: {error}") from error
    x_NHWC = x[..., None] if x.ndim == 3 else x
    if x_NHWC.ndim != 4 or x_NHWC.dtype != np.uint8:
        raise DataError(f"{path}: x must be uint8 (N, H, W, C) or (N, H, W), got {x.dtype} {x.shape}")
    if not len(x_NHWC):
        raise DataError(f"{path} is empty: x has shape {x.shape}")
    if x_NHWC.shape[-1] != channels:
        raise DataError(f"{path}: x has {x_NHWC.shape[-1]} channels and the autoencoder takes {channels}")
    if conditions is not None:
        if conditions.shape != (len(x_NHWC),) or conditions.dtype.kind not in "Uiu":
            raise DataError(
                f"{path}: {config.condition_key} must hold one string or whole number per picture ({len(x_NHWC)}), "
                f"got {conditions.dtype} {conditions.shape}"
            )
        conditions = _checked(conditions.tolist(), [f"{path}[{i}]" for i in range(len(x_NHWC))], config.condition_key)
    height, width = x_NHWC.shape[1:3]
    if (height, width) != config.height_width:
        problem = _size_problem(config, width, height)
        if problem:
            raise DataError(f"{path}: the pictures are {problem}")
        x_NHWC = np.stack([_fitted(_to_image(x), config, channels) for x in x_NHWC])
    return _measured(StoredPictures(x_NHWC, conditions), np.tile([height, width], (len(x_NHWC), 1)), config)


def _to_image(x_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(x_HWC.squeeze(-1) if x_HWC.shape[-1] == 1 else x_HWC)


# ------------------------------------------------------------------------------------------------------ folder and dataset


def _open_folder(config: DataConfig, folder: Path, channels: int, conditioned: bool, progress: bool) -> Pictures:
    if not folder.is_dir():
        raise DataError(f"the data folder {folder} does not exist")
    listing = folder / "metadata.jsonl"
    conditions: list[Any] | None = None
    if conditioned:
        if not listing.is_file():
            raise DataError(
                f'{listing} is missing: it must hold a line {{"file_name": ..., "{config.condition_key}": ...}} per picture'
            )
        rows = _read_listing(listing, config.condition_key)
        paths, conditions = [folder / name for name, _ in rows], [value for _, value in rows]
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise DataError(f"{listing} names {_some(absent)} that {folder} does not hold")
    else:
        paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(f"the data folder {folder} is empty: no picture ({', '.join(sorted(SUFFIXES))}) in it")
    names = [str(path.relative_to(folder)) for path in paths]

    def load(i: int) -> Image.Image:
        with Image.open(paths[i]) as image:
            return _upright(image)

    return _checked_pictures(config, load, names, str(folder), conditions, channels, progress)


def _read_listing(path: Path, key: str) -> list[tuple[str, Any]]:
    rows, names = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            rows.append((str(row["file_name"]), row.get(key)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f'{path}, line {number}: must be JSON with the key "file_name", got {line[:80]!r}') from None
        names.append(rows[-1][0])
    _checked([value for _, value in rows], names, key)
    return rows


def _open_dataset(config: DataConfig, folder: Path, channels: int, conditioned: bool, progress: bool) -> Pictures:
    try:
        import datasets
    except ImportError:
        raise MissingDependencyError("data.dataset needs the package `datasets`: pip install 'ldmkit[train]'") from None
    try:
        table = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever pyarrow or fsspec say of a missing or damaged folder
        raise DataError(f"{folder} cannot be read as a dataset that save_to_disk wrote: {error}") from error
    if isinstance(table, datasets.DatasetDict):
        if config.split not in table:
            raise DataError(f"{folder} has the splits {', '.join(table)}; data.split = {config.split!r} is none of them")
        table = table[config.split]
    for key in (config.image_key, config.condition_key) if conditioned else (config.image_key,):
        if key not in table.column_names:
            raise DataError(f"{folder} has no column {key!r}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise DataError(f"the dataset {folder} is empty")
    names = [f"row {i}" for i in range(len(table))]
    conditions = _checked(list(table[config.condition_key]), names, config.condition_key) if conditioned else None
    column = table.select_columns([config.image_key])

    def load(i: int) -> Image.Image:
        value = column[i][config.image_key]
        return _upright(value) if isinstance(value, Image.Image) else _to_image(np.asarray(value, dtype=np.uint8))

    return _checked_pictures(config, load, names, str(folder), conditions, channels, progress)


def _checked_pictures(
    config: DataConfig,
    load: Callable[[int], Image.Image],
    names: Sequence[str],
    source: str,
    conditions: list[Any] | None,
    channels: int,
    progress: bool,
) -> Pictures:
    """Decode everything once. What fits into `memory_mib` is kept decoded."""

    def decode(i: int) -> np.ndarray:
        return _fitted(load(i), config, channels)

    def attempt(i: int) -> tuple[np.ndarray, tuple[int, int]] | str:
        try:
            image = load(i)
        except Exception as error:  # Pillow raises a dozen kinds, by file format
            return f"unreadable: {names[i]} ({type(error).__name__}: {str(error)[:80]})"
        if image.mode.startswith(("I", "F")):  # Pillow would clip it to 0 .. 255
            return f"of 16 bits or more: {names[i]} (mode {image.mode}); save it with 8"
        problem = _size_problem(config, *image.size)
        return f"wrong size: {names[i]} is {problem}" if problem else (_fitted(image, config, channels), image.size)

    height, width = config.height_width
    keep = len(names) * height * width * channels <= config.memory_mib * 2**20
    x_NHWC = np.empty((len(names) if keep else 0, height, width, channels), np.uint8)
    original_sizes = np.empty((len(names), 2), np.int64)
    problems: list[str] = []
    with ThreadPoolExecutor() as threads:
        checked = tqdm(threads.map(attempt, range(len(names))), "checking pictures", total=len(names), disable=not progress)
        for i, result in enumerate(checked):
            if isinstance(result, str):
                problems.append(result)
                continue
            original_sizes[i] = result[1][::-1]
            if keep:
                x_NHWC[i] = result[0]
    if problems:
        raise DataError(f"{source}: {len(problems)} of {len(names)} pictures cannot be used; {_some(problems, separator='; ')}")
    pictures = StoredPictures(x_NHWC, conditions) if keep else DecodedPictures(decode, len(names), conditions)
    return _measured(pictures, original_sizes, config)


# ----------------------------------------------------------------------------------------------------------------- details


def _checked(conditions: list[Any], names: Sequence[str], key: str) -> list[Any]:
    bad = [
        name
        for name, c in zip(names, conditions, strict=True)
        if isinstance(c, bool) or not isinstance(c, str | int) or c == ""
    ]
    if bad:
        raise DataError(f"{len(bad)} of {len(names)} pictures have no {key!r} (a string or a whole number): {_some(bad)}")
    return conditions


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return separator.join(names[:SHOWN]) + more


def _upright(image: Image.Image) -> Image.Image:
    """Decoded, and turned as its EXIF data say: cameras store pictures as the sensor lies."""
    return ImageOps.exif_transpose(image)


def _size_problem(config: DataConfig, width: int, height: int) -> str | None:
    wanted_height, wanted_width = config.height_width
    sizes = f"{height} x {width} (height x width) and data.size is {wanted_height} x {wanted_width}"
    if config.fit == "exact" and (height, width) != config.height_width:
        return f"{sizes}; resize them, or set data.fit to 'crop'"
    if not config.upscale and (height < wanted_height or width < wanted_width):
        return f"{sizes}; remove them, or set data.upscale to true to enlarge them"
    return None


def _measured(pictures: Pictures, original_sizes: np.ndarray, config: DataConfig) -> Pictures:
    """The same pictures, which know what they were made from."""
    pictures.original_sizes = original_sizes
    pictures.crops = np.array([_crop(size, config.height_width)[1] for size in original_sizes.tolist()])
    return pictures


def _crop(original: Sequence[int], wanted: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """(height, width) to resize to, so that nothing wanted is missing, and (top, left) of the centre there."""
    scale = max(wanted[1] / original[1], wanted[0] / original[0])
    height, width = (max(side, round(before * scale)) for side, before in zip(wanted, original, strict=True))
    return (height, width), ((height - wanted[0]) // 2, (width - wanted[1]) // 2)


def _fitted(image: Image.Image, config: DataConfig, channels: int) -> np.ndarray:
    """Transparency laid on white, the shorter side resized, the centre cropped: uint8 (H, W, C)."""
    image = on_white(image).convert("RGB" if channels == 3 else "L")
    height, width = config.height_width
    if image.size != (width, height):
        size, (top, left) = _crop((image.height, image.width), (height, width))
        image = image.resize(size[::-1], Image.Resampling.LANCZOS).crop((left, top, left + width, top + height))
    x_HWC = np.asarray(image)
    return x_HWC if x_HWC.ndim == 3 else x_HWC[..., None]
