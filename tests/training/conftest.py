"""Tiny data and a tiny autoencoder, made once."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldmkit.training import Options, train_autoencoder
from tests.training.toy import squares, stage_one


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with squares.npz, squares/ with metadata.jsonl, and vocab.txt."""
    folder = tmp_path_factory.mktemp("data")
    x, y = squares()
    text = np.array([f"a {['red', 'green', 'blue', 'yellow'][k]} square" for k in y])
    np.savez(folder / "squares.npz", x=x, y=y, text=text)
    (folder / "squares").mkdir()
    rows = []
    for i, (picture, caption) in enumerate(zip(x, text, strict=True)):
        Image.fromarray(picture).save(folder / "squares" / f"{i:02d}.png")
        rows.append(json.dumps({"file_name": f"{i:02d}.png", "text": str(caption), "label": int(y[i])}))
    (folder / "squares" / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "green", "blue", "yellow", "square"]
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n")
    return folder


@pytest.fixture(scope="session")
def autoencoder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stage one exports, after a few steps."""
    return train_autoencoder(stage_one(data), Options(tmp_path_factory.mktemp("stage-one"), device="cpu")).exported
