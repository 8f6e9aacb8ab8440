"""Renaming checkpoint keys both ways: a table of rules, theirs <-> ours, that is its own inverse."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ldmkit.errors import CheckpointError


@dataclass(frozen=True)
class Rule:
    """One module path (or one key) of theirs, and what it is called here.

    Attributes:
        theirs, ours: dotted paths; what follows them in a key stays. "" stands for all keys that no other rule names.
        axes: trailing axes of size 1 that their weight has and ours has not (a 1x1 convolution that is linear here).
        transposed: their matrix is ours transposed.
        piece, pieces: ours is one of several pieces that they store as one, along the first axis.
        block: rows of a piece that lie together in theirs (a head's queries, then its keys, ...); None = all of them.
    """

    theirs: str
    ours: str
    axes: int = 0
    transposed: bool = False
    piece: int = 0
    pieces: int = 1
    block: int | None = None

    def take(self, whole: Tensor) -> Tensor:
        """Their tensor => ours, a view wherever strides allow one."""
        if self.pieces > 1:
            total = whole.shape[0] if whole.ndim else 0
            rows = total // self.pieces
            block = self.block or rows
            if not rows or rows * self.pieces != total or rows % block:
                raise CheckpointError(
                    f"{self.theirs} has {total} rows, which are not {self.pieces} equal pieces in blocks of {block}"
                )
            parts = whole.unflatten(0, (rows // block, self.pieces, block))[:, self.piece]
            whole = parts[0] if rows == block else parts.flatten(0, 1)
        if self.axes and whole.ndim == 2 + self.axes and set(whole.shape[2:]) == {1}:
            whole = whole.flatten(1)
        return whole.t() if self.transposed and whole.ndim == 2 else whole  # of another rank, it fits nowhere

    def give(self, pieces: list[Tensor]) -> Tensor:
        """Our tensors (all pieces, in order) => theirs."""
        if self.transposed:
            pieces = [piece.t() for piece in pieces]
        if self.axes and pieces[0].ndim == 2:
            pieces = [piece[(...,) + (None,) * self.axes] for piece in pieces]
        if len(pieces) == 1:
            return pieces[0]
        block = self.block or len(pieces[0])
        return torch.stack([piece.unflatten(0, (-1, block)) for piece in pieces], dim=1).flatten(0, 2)


class KeyMap:
    """Rules, looked up by the longest path that a key begins with.

    Raises:
        ValueError: for two rules that could not be told apart on the way back.
    """

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)
        self._by_theirs: dict[str, list[Rule]] = {}
        self._by_ours: dict[str, Rule] = {}
        for rule in self.rules:
            self._by_theirs.setdefault(rule.theirs, []).append(rule)
            if self._by_ours.setdefault(rule.ours, rule) is not rule:
                raise ValueError(f"two rules lead to {rule.ours!r}")
        for theirs, rules_ in self._by_theirs.items():
            if [rule.piece for rule in rules_] != list(range(rules_[0].pieces)):
                raise ValueError(f"the pieces of {theirs!r} are not each there once, in order")

    def prefixed(self, theirs: str, ours: str = "") -> KeyMap:
        """The same below another path, on either side."""
        return KeyMap(
            replace(rule, theirs=_moved(rule.theirs, "", theirs), ours=_moved(rule.ours, "", ours)) for rule in self.rules
        )

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap((*self.rules, *other.rules))

    def targets(self, key: str) -> list[tuple[str, Rule]]:
        """Our keys that their key becomes, each with its rule; none for a key that the map does not know."""
        path = _longest(key, self._by_theirs)
        return [] if path is None else [(_moved(key, path, rule.ours), rule) for rule in self._by_theirs[path]]

    def source(self, key: str) -> tuple[str, Rule] | None:
        """The key of theirs that our key comes from, and the rule."""
        path = _longest(key, self._by_ours)
        return None if path is None else (_moved(key, path, self._by_ours[path].theirs), self._by_ours[path])

    def restore(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Our tensors under their names.

        Raises:
            CheckpointError: for keys of ours that the map does not know, or a tensor of theirs whose pieces are not all there.
        """
        found: dict[str, dict[int, tuple[Rule, str]]] = {}
        unknown = []
        for key in tensors:
            source = self.source(key)
            if source is None:
                unknown.append(key)
            else:
                found.setdefault(source[0], {})[source[1].piece] = (source[1], key)
        if unknown:
            raise CheckpointError(f"no name in the other layout for {', '.join(sorted(unknown))}")
        result = {}
        for theirs, pieces in found.items():
            rule = next(iter(pieces.values()))[0]
            if len(pieces) != rule.pieces:
                raise CheckpointError(f"{theirs} is made of {rule.pieces} tensors, of which only {len(pieces)} are there")
            result[theirs] = rule.give([tensors[pieces[i][1]] for i in range(rule.pieces)])
        return result


def _longest(key: str, paths: Mapping[str, object]) -> str | None:
    """The longest of the paths that key begins with; "" is the beginning of every key."""
    path = key
    while path not in paths:
        if not path:
            return None
        path = path.rpartition(".")[0]
    return path


def _moved(key: str, old: str, new: str) -> str:
    return ".".join(part for part in (new, key[len(old) :].removeprefix(".")) if part)


IDENTITY = KeyMap([Rule("", "")])
"""Both have the same names."""
