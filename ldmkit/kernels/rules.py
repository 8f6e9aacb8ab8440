"""The shipped rules of the automatic choice, one `choice.json` an op.

Rules are tried in order, and the first that fits decides; where none fits, plain torch runs. A rule is an object of

- "backend": what runs, "reference" included;
- "device": "cpu" or "cuda";
- "dtypes": a list of names; left out, all;
- "instructions": for the CPU, the instruction sets (as `ldmkit kernels` names them) under which the rule was measured;
- "training": true where a gradient will be asked for, false where not; left out, both;
- "when": features of the shape of one image, each with its least and greatest value, null for none;
- "measured": where the figures behind the rule are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ldmkit.kernels.compiled import build_info


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One rule; see above."""

    backend: str
    device: str
    measured: str
    dtypes: tuple[torch.dtype, ...] | None = None
    instructions: tuple[str, ...] | None = None
    training: bool | None = None
    when: Mapping[str, tuple[int | None, int | None]] = field(default_factory=dict)

    def fits(self, device: str, dtype: torch.dtype, training: bool, features: Mapping[str, int]) -> bool:
        """Whether the rule speaks of such a call."""
        return (
            self.device == device
            and (self.dtypes is None or dtype in self.dtypes)
            and self.on_this_machine()
            and (self.training is None or self.training == training)
            and all(
                (low is None or features[name] >= low) and (high is None or features[name] <= high)
                for name, (low, high) in self.when.items()
            )
        )

    def on_this_machine(self) -> bool:
        """Whether the rule was measured with the instructions in use here."""
        return self.instructions is None or _instructions() in self.instructions

    def describe(self) -> str:
        """In words: "cpu float32, D 8 to 128, S at most 256, when training"."""
        dtypes = "" if self.dtypes is None else " " + "/".join(str(d).removeprefix("torch.") for d in self.dtypes)
        words = [f"{self.device}{dtypes}"]
        if self.instructions is not None:
            words.append("with " + "/".join(self.instructions))
        words += [f"{name} {_interval(low, high)}" for name, (low, high) in self.when.items()]
        if self.training is not None:
            words.append("when training" if self.training else "when not training")
        return ", ".join(words)


def _interval(low: int | None, high: int | None) -> str:
    if low is None or high is None:
        return "any" if low is high else f"at least {low}" if high is None else f"at most {high}"
    return str(low) if low == high else f"{low} to {high}"


@torch.compiler.assume_constant_result
def _instructions() -> str:
    return str(build_info()["cpu"])


def rules(op: str) -> tuple[Rule, ...]:
    """The rules of an op, in order."""
    return _RULES[op]


def _rule(
    backend: str,
    device: str,
    measured: str,
    dtypes: list[str] | None = None,
    instructions: list[str] | None = None,
    training: bool | None = None,
    when: dict[str, tuple[int | None, int | None]] | None = None,
) -> Rule:
    return Rule(
        backend=backend,
        device=device,
        measured=measured,
        dtypes=None if dtypes is None else tuple(getattr(torch, name) for name in dtypes),
        instructions=None if instructions is None else tuple(instructions),
        training=training,
        when={name: (low, high) for name, (low, high) in (when or {}).items()},
    )


# Read when imported: dynamo traces through functools.cache, and cannot trace how a file is read.
_RULES: Mapping[str, tuple[Rule, ...]] = {
    path.parent.name: tuple(_rule(**entry) for entry in json.loads(path.read_text()))
    for path in Path(__file__).parent.glob("*/choice.json")
}
