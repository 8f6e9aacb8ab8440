"""Where every key of a file went, and where every weight of a model came from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from ldmkit.errors import ArchitectureMismatchError

Shape = tuple[int, ...]

LISTED = 100
"""Up to so many keys of one sort are listed each; more are written as patterns."""


@dataclass(frozen=True)
class Accounting:
    """All keys of one source, sorted by their fate.

    Attributes:
        source: the file or folder.
        model: what was to be filled.
        mapped: key of the model => key of the file.
        ignored: key of the file => why it is left out.
        missing: keys of the model that the file does not have, with their shapes.
        unexpected: keys of the file that the model does not have, with their shapes.
        misshapen: keys of the model with the file's shape and the model's.
    """

    source: str
    model: str
    mapped: Mapping[str, str]
    ignored: Mapping[str, str] = field(default_factory=dict)
    missing: Mapping[str, Shape] = field(default_factory=dict)
    unexpected: Mapping[str, Shape] = field(default_factory=dict)
    misshapen: Mapping[str, tuple[Shape, Shape]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        own: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
        *,
        source: str,
        model: str,
        origins: Mapping[str, str] | None = None,
        ignored: Mapping[str, str] | None = None,
    ) -> Accounting:
        """A model's state dict beside the tensors meant for it (`origins`: their names in the file, where these differ)."""
        both = own.keys() & tensors.keys()
        names = origins or {}
        return cls(
            source=source,
            model=model,
            mapped={key: names.get(key, key) for key in own if key in both},
            ignored=ignored or {},
            missing={key: tuple(own[key].shape) for key in own if key not in both},
            unexpected={names.get(key, key): tuple(tensors[key].shape) for key in tensors if key not in both},
            misshapen={
                key: (tuple(tensors[key].shape), tuple(own[key].shape))
                for key in own
                if key in both and tensors[key].shape != own[key].shape
            },
        )

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.misshapen)

    def report(self) -> str:
        """A few lines for reading: counts, ignored keys by reason, and what does not fit."""
        lines = [f"{self.source} -> {self.model}: {len(self.mapped)} keys mapped, {len(self.ignored)} ignored"]
        for reason in dict.fromkeys(self.ignored.values()):
            keys = [key for key, why in self.ignored.items() if why == reason]
            lines += [f"ignored     {line}  ({reason})" for line in grouped(keys, listed=4)]
        return "\n  ".join(lines + self._differences())

    def check(self) -> None:
        """Raise ArchitectureMismatchError with every key that differs, unless all is complete."""
        if self.complete:
            return
        differing = len(self.missing) + len(self.unexpected) + len(self.misshapen)
        total = len(self.mapped) + len(self.missing) + len(self.unexpected)
        lines = "\n  ".join(self._differences())
        raise ArchitectureMismatchError(
            f"{self.source} does not fit {self.model}: {differing} of {total} keys differ; "
            f"the weights belong to another architecture or config\n  {lines}"
        )

    def _differences(self) -> list[str]:
        lines = [f"missing     {line}" for line in grouped(self.missing, lambda key: f" {self.missing[key]}")]
        lines += [f"unexpected  {line}" for line in grouped(self.unexpected, lambda key: f" {self.unexpected[key]}")]
        shapes = {key: f": file {file}, model {model}" for key, (file, model) in self.misshapen.items()}
        return lines + [f"shape       {line}" for line in grouped(shapes, shapes.__getitem__)]


def grouped(keys: Iterable[str], detail: Callable[[str], str] = lambda key: "", *, listed: int = LISTED) -> list[str]:
    """Lines for keys: each with its detail while they are few, else those that differ in numbers only in one line.

    >>> grouped(["a.0.b", "a.1.b", "c"], listed=2)
    ['a.{0,1}.b (2 keys)', 'c']
    """
    keys = sorted(keys)
    if len(keys) <= listed:
        return [key + detail(key) for key in keys]
    groups: dict[tuple[str, str], list[str]] = {}
    for key in keys:
        groups.setdefault((re.sub(r"\d+", "#", key), detail(key)), []).append(key)
    return [_pattern(group) + how for (_, how), group in groups.items()]


def _pattern(keys: list[str]) -> str:
    if len(keys) == 1:
        return keys[0]
    columns = zip(*(re.findall(r"\d+", key) for key in keys), strict=True)
    texts = iter([_braces(list(dict.fromkeys(column))) for column in columns])
    return re.sub(r"\d+", lambda _: next(texts), keys[0]) + f" ({len(keys)} keys)"


def _braces(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    run = len(values) > 2 and values == list(range(values[0], values[-1] + 1))
    return "{" + (f"{values[0]}..{values[-1]}" if run else ",".join(map(str, values))) + "}"
