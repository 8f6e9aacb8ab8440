"""Several things to draw in one picture: the inputs of compositional guidance (Liu et al. 2022, arXiv:2206.01714)."""

from __future__ import annotations

import math
import re
from typing import Any

from ldmkit.errors import InputError

_TERM = re.compile(r"(?P<text>.*?)(?:\s*:\s*(?P<weight>[-+]?(?:\d+\.?\d*|\.\d+)))?\s*", re.DOTALL)


class And:
    """Things to draw together, each with a weight; in place of one prompt or one class label.

    Example:
        >>> And("a red apple", ("a blue background", 0.7))
        And(('a red apple', 1.0), ('a blue background', 0.7))

    Args:
        terms: inputs, or pairs (input, weight). A weight is how strongly the picture is pulled from the negative prompt towards
            it; a negative one pushes away.

    Raises:
        InputError: for no terms, or a weight that is no finite number.
    """

    def __init__(self, *terms: Any) -> None:
        pairs = [term if isinstance(term, tuple) else (term, 1.0) for term in terms]
        if not pairs:
            raise InputError("And() has no terms; give at least one input")
        for pair in pairs:
            if (
                len(pair) != 2
                or isinstance(pair[1], bool)
                or not isinstance(pair[1], int | float)
                or not math.isfinite(pair[1])
            ):
                raise InputError(f"And: {pair!r} is no pair of an input and a finite weight")
        self.inputs = [value for value, _ in pairs]
        self.weights = [float(weight) for _, weight in pairs]

    @classmethod
    def parse(cls, text: str) -> And | str:
        """`"a cat AND a dog :0.7"` => `And(("a cat", 1.0), ("a dog", 0.7))`, as AUTOMATIC1111's web UI reads it; a text without
        AND as it is (also "16:9", which there is a weight).
        """
        parts = re.split(r"\bAND\b", text)
        terms = [_TERM.fullmatch(part) for part in parts]
        pairs = [(term["text"].strip(), float(term["weight"] or 1)) for term in terms if term is not None]
        return text if len(parts) == 1 else cls(*pairs)

    def __repr__(self) -> str:
        return f"And({', '.join(map(repr, zip(self.inputs, self.weights, strict=True)))})"
