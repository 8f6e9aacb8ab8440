r"""The prompt syntax of AUTOMATIC1111's web UI (`prompt_syntax="weighted"`): emphasis, and prompts of any length in chunks.

Emphasis. `(word)` weighs 1.1, `[word]` 1 / 1.1, `(word:1.3)` 1.3; they nest, and factors multiply. `\(`, `\)`, `\[`, `\]`, `\\`
are the characters themselves. Each token's embedding is multiplied by its weight, then all of the chunk by one number that
restores the chunk's mean. (There it is the mean over the batch; here over each prompt's chunk: no picture depends on its
batch. The other convention, of the library compel, interpolates between embeddings.)

Chunks. Tokens fill windows of 75 (a window's size less start and end), each encoded on its own, the embeddings joined. `BREAK`
ends a window. A full window ends after its last comma if that is among its last 20 tokens, and where it is full otherwise. The
pooled vector is that of the first window.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ldmkit.errors import InputError

Segment = tuple[str | None, float]
"""A piece of text and its weight; None is a BREAK."""
Chunk = tuple[list[int], list[float]]
"""Token ids of one window, without start and end, and their weights."""

ROUND, SQUARE = 1.1, 1 / 1.1
BACKTRACK = 20
_LEXEMES = re.compile(
    r"\\(?P<escaped>[\\()\[\]])|(?P<opened>[(\[])|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*(?P<weighted>[)\]])|(?P<closed>[)\]])"
    r"|(?P<pause>\s*\bBREAK\b\s*)|(?P<text>.)",
    re.DOTALL,
)


def parse(prompt: str) -> list[Segment]:
    """Text and weights, in order; neighbours of one weight are one segment.

    Raises:
        InputError: for brackets that do not match, and for the web UI's [from:to:when] and [one|other], which are not served.
    """
    segments: list[Segment] = []
    opened: list[tuple[str, int, int]] = []  # the bracket, its place, the segments before it
    for found in _LEXEMES.finditer(prompt):
        kind, value = str(found.lastgroup), found[str(found.lastgroup)]
        if kind in ("text", "escaped"):
            segments.append((value, 1.0))
        elif kind == "pause":
            segments.append((None, 1.0))
        elif kind == "opened":
            opened.append((value, found.start(), len(segments)))
        else:
            _close(prompt, found, opened, segments)
    if opened:
        bracket, place, _ = opened[-1]
        raise InputError(
            f"prompt {_around(prompt, place)}: {bracket!r} is never closed; write \\{bracket} for the character itself"
        )
    return list(_merged(segments)) or [("", 1.0)]


def _close(prompt: str, found: re.Match[str], opened: list[tuple[str, int, int]], segments: list[Segment]) -> None:
    """Weigh what is between a closing bracket and its opening one."""
    bracket, weight = found[0][-1], found["weight"]
    if not opened or opened[-1][0] != {")": "(", "]": "["}[bracket]:
        where = _around(prompt, found.end() - 1)
        raise InputError(f"prompt {where}: {bracket!r} closes nothing; write \\{bracket} for the character itself")
    _, place, start = opened.pop()
    if bracket == "]" and (weight is not None or "|" in prompt[place : found.end()]):
        raise InputError(
            f"prompt {_around(prompt, place)}: [from:to:when] and [one|other] are not served; weights go into round brackets"
        )
    factor = float(weight) if weight is not None else {")": ROUND, "]": SQUARE}[bracket]
    segments[start:] = [(text, own * factor) for text, own in segments[start:]]


def _merged(segments: Sequence[Segment]) -> Iterator[Segment]:
    run: list[str] = []
    weight = 1.0
    for text, own in segments:
        if run and (text is None or own != weight):
            yield "".join(run), weight
            run = []
        if text is None:
            yield None, 1.0
        else:
            run.append(text)
            weight = own
    if run:
        yield "".join(run), weight


def _around(prompt: str, place: int) -> str:
    return f"{prompt[max(0, place - 20) : place + 20]!r}, character {place}"


def chunks(segments: Sequence[Segment], encode: Callable[[str], list[int]], *, window: int, comma: int | None) -> list[Chunk]:
    """The windows of a prompt, at least one, each of up to `window` tokens.

    Args:
        encode: text => token ids, without start and end.
        comma: the token after which a full window is cut, if it has one.
    """
    done: list[Chunk] = []
    ids: list[int] = []
    weights: list[float] = []
    for text, weight in segments:
        if text is None:
            done.append((ids, weights))
            ids, weights = [], []
            continue
        for token in encode(text):
            if len(ids) == window:
                cut = window if token == comma else _cut(ids, comma)
                done.append((ids[:cut], weights[:cut]))
                ids, weights = ids[cut:], weights[cut:]
            ids.append(token)
            weights.append(weight)
    return [*done, (ids, weights)] if ids or not done else done


def _cut(ids: Sequence[int], comma: int | None) -> int:
    """Where a full window ends: after its last comma, if that is near enough."""
    for place in range(len(ids) - 1, len(ids) - 1 - BACKTRACK, -1):
        if place >= 0 and ids[place] == comma:
            return place + 1
    return len(ids)


def emphasise(tokens_KLC: Tensor, weights_KL: Tensor) -> Tensor:
    """Each token times its weight, each chunk's mean restored. Chunks whose weights are all 1 are as they were, to the bit."""
    wide = tokens_KLC.to(torch.promote_types(tokens_KLC.dtype, torch.float32))
    weighted = wide * weights_KL[..., None].to(wide)
    restored = weighted * (wide.mean(dim=(1, 2), keepdim=True) / weighted.mean(dim=(1, 2), keepdim=True))
    plain_K11 = (weights_KL == 1).all(dim=1)[:, None, None]
    return torch.where(plain_K11, tokens_KLC, restored.to(tokens_KLC.dtype))
