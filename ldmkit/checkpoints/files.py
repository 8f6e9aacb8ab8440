"""Files of bytes and JSON, written so that a reader never sees half of one, and folders likewise."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmkit.errors import CheckpointError, OutputError


def check_writable(folder: Path) -> None:
    """Make the folder, and raise OutputError where nothing can be written to it, before any work is done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OutputError(
            f"cannot write to {folder}: {error.strerror or error}; choose another folder or fix its rights"
        ) from None


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically and durably: all of it appears under its name, or nothing. Raises: OutputError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. Raises: OutputError."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON. Raises: CheckpointError naming the file where it is missing or is not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); the file is damaged or is something else") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read JSON that is an object. Raises: CheckpointError, as `read_json`, and where it is something else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, and holds a {type(value).__name__}")
    return value


@contextmanager
def atomic_folder(target: Path, *, stale: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder beside `target` to write into; on success it becomes `target`, on failure it is removed.

    Where `target` exists already, its files are replaced one by one, JSON (which is read first) last; others are left alone,
    except those that would be taken for part of what is new.

    Args:
        stale: patterns of names that are deleted from every folder that is written into, if not written anew.

    Raises:
        OutputError: when the disk is full or the place cannot be written.
    """
    check_writable(target.parent)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    left = "what was there before is untouched"
    try:
        yield temporary
        _sync(temporary)
        if not target.exists():
            temporary.chmod(0o755)
            temporary.rename(target)
        else:
            left = "it may now hold old and new files: save again, or delete it"
            files = [path for path in temporary.rglob("*") if path.is_file()]
            _delete_stale(target, {path.relative_to(temporary) for path in files}, stale)
            for path in sorted(files, key=lambda p: (p.suffix == ".json", p.parent == temporary, p.name)):
                destination = target / path.relative_to(temporary)
                destination.parent.mkdir(parents=True, exist_ok=True)
                path.replace(destination)
        _sync_folder(target.parent)
    except OSError as error:
        if isinstance(error, OutputError):
            raise
        raise OutputError(f"cannot write {target}: {error.strerror or error}; {left}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _delete_stale(target: Path, new: set[Path], patterns: Sequence[str]) -> None:
    for folder in {path.parent for path in new}:
        for old in (path for pattern in patterns for path in sorted((target / folder).glob(pattern))):
            if old.relative_to(target) not in new:
                old.unlink()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb+") as file:  # Windows syncs only what is open for writing
                os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
