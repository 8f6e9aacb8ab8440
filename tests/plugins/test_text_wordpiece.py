"""WordPiece vocabularies: reading real and damaged ones, and training the same one every time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.implementations import BertWordPieceTokenizer

from ldmkit.errors import CheckpointError, DataError, InputError
from ldmkit_text.wordpiece import SPECIAL, main, read_vocab, train_wordpiece

CAPTIONS = ["A red apple on a blue background", "grinning face with smiling eyes", "woman: medium skin tone", "smiling cat"]


def test_reads_the_real_vocabulary(shared: Path) -> None:
    vocab = read_vocab(shared / "data/bert/vocab.txt")
    assert len(vocab) == 30522
    assert (vocab["[PAD]"], vocab["[UNK]"], vocab["[CLS]"], vocab["[SEP]"], vocab["the"]) == (0, 100, 101, 102, 1996)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\na\nb\na\n", "'a' stands on lines 5 and 7"),
        (b"[PAD]\n\n[UNK]\n[CLS]\n[SEP]\n", "line 2 is empty"),
        (b"[PAD]\n[CLS]\na\n", r"lacks \[UNK\], \[SEP\]"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_damaged_vocabularies(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_vocab(path)
    assert str(path) in str(caught.value)


def test_missing_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_vocab(tmp_path / "vocab.txt")


@given(texts=st.lists(st.text(max_size=30), min_size=1, max_size=8), size=st.integers(150, 400))
def test_training_is_deterministic_and_spells_its_texts(texts: list[str], size: int) -> None:
    texts = [*texts, *CAPTIONS]
    pieces = train_wordpiece(texts, size)
    assert pieces == train_wordpiece(iter(texts), size)
    assert len(pieces) == len(set(pieces)) <= size
    assert tuple(pieces[:4]) == SPECIAL
    tokenizer = BertWordPieceTokenizer({piece: i for i, piece in enumerate(pieces)})
    for text in texts:
        if max(map(len, text.split()), default=0) <= 20:  # longer words are [UNK] to WordPiece, whatever the vocabulary
            assert "[UNK]" not in tokenizer.encode(text, add_special_tokens=False).tokens


def test_training_does_not_depend_on_the_process(tmp_path: Path, root: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("\n".join(CAPTIONS))
    output = tmp_path / "vocab.txt"
    paths = os.pathsep.join([str(root), str(root / "plugins")])
    command = [sys.executable, "-m", "ldmkit_text.wordpiece", str(captions), "--size", "90", "-o", str(output)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True)
    assert "90 pieces" in done.stdout
    assert list(read_vocab(output)) == train_wordpiece(CAPTIONS, 90)


def test_case_is_kept_on_request(tmp_path: Path) -> None:
    assert "A" in train_wordpiece(CAPTIONS, 200, lowercase=False)
    assert "A" not in train_wordpiece(CAPTIONS, 200)


def test_impossible_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="size 10 is too small"):
        train_wordpiece(CAPTIONS, 10)
    with pytest.raises(InputError, match="positive, got 0"):
        train_wordpiece(CAPTIONS, 0)
    with pytest.raises(DataError, match="no words"):
        train_wordpiece(["", " "], 100)
    assert main([str(tmp_path / "missing.txt"), "--size", "100", "-o", str(tmp_path / "vocab.txt")]) == 1
    assert "missing.txt" in capsys.readouterr().err
