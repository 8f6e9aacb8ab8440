"""The log of a run: log.jsonl (append-only) and TensorBoard curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.checkpoints.files import write_bytes
from ldmkit.errors import MissingDependencyError, OutputError


class Meter:
    """Means since the last report, summed on the device so that nothing waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, int]] = {}

    def add(self, values: dict[str, Tensor]) -> None:
        """Count one step's values (scalars)."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + value.detach().float(), count + 1)

    def peek(self) -> dict[str, tuple[float, int]]:
        """(sum, count) by name, as plain numbers that JSON keeps exactly."""
        return {name: (float(total), count) for name, (total, count) in self._sums.items()}

    def restore(self, values: dict[str, tuple[float, int]], device: torch.device) -> None:
        """Take up what `peek` gave."""
        self._sums = {name: (torch.tensor(total, device=device), count) for name, (total, count) in values.items()}

    def take(self) -> dict[str, float]:
        """The means; starts afresh."""
        means = {name: total / count for name, (total, count) in self.peek().items()}
        self._sums = {}
        return means


class Log:
    """Writes a run's numbers.

    Args:
        step: what is logged of later steps is cut off, since those are about to be done again.

    Raises:
        MissingDependencyError: without TensorBoard. OutputError: where the log cannot be written.
    """

    def __init__(self, folder: Path, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MissingDependencyError("loss curves need TensorBoard: pip install 'ldmkit[train]'") from None
        self._path = folder / "log.jsonl"
        if self._path.exists():
            write_bytes(self._path, b"".join(_up_to(self._path, step)))
        # Each piece of a run has its own events file; TensorBoard hides what `purge_step` says is about to be done again.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: dict[str, Any]) -> None:
        """One line, and one point of each curve."""
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}") from error
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the curves."""
        self._board.close()


def _up_to(path: Path, step: int) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # the line that a killed writer left half-written
            continue
    return kept
