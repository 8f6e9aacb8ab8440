"""What conditioners promise: for each input its part of a `Condition`, whatever stands beside it in the batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ldmkit.arguments import SIZES, takes
from ldmkit.errors import InputTypeError, LdmkitError
from ldmkit.interfaces import Condition, Conditioner
from ldmkit.testing.conformance.common import properties_of_all
from ldmkit.testing.conformance.core import Property, Subject, Trial, alike, apart
from ldmkit.testing.conformance.modules import properties_of_networks

KIND = "ldmkit.Conditioner"
DTYPES = {"mask_BL": torch.bool, "labels_B": torch.int64}
"""Of fields that are no floats."""
TEXTS = ("a cat", "two dogs in the snow, under a red moon", "fog")
"""Inputs where the subject gives none, and the null input is a text."""
SIZE = (64, 96)
"""Of the picture that is asked for: height, width, in pixels."""
INPUTS_WANTED = "give two or more that mean different things, in the plugin's ldmkit_examples or as inputs=[...]"
DIMENSIONS = {"tokens_BLC": 3, "mask_BL": 2, "vector_BC": 2, "labels_B": 1, "guidance_B": 1, "spatial_BCHW": 4}


def inputs_of(part: Conditioner, t: Trial) -> list[Any]:
    """The batch of the case: inputs that the subject gives, all different where there are enough."""
    given: Sequence[Any] = t.case["inputs"] or (TEXTS if isinstance(part.null_input, str) else ())
    assert given, f"null_input is {part.null_input!r}, so that inputs are no texts: {INPUTS_WANTED}"
    assert len(given) >= 2, f"only one input is given, {given[0]!r}: {INPUTS_WANTED}"
    try:
        part.check(given)
    except LdmkitError as error:
        raise AssertionError(f"it refuses the inputs {list(given)}: {error}; {INPUTS_WANTED}") from None
    return [given[i % len(given)] for i in range(t.batch)]


def fields(condition: Condition) -> tuple[Tensor, ...]:
    """The tensors that are set, in the order of `Condition.FIELDS`."""
    return tuple(getattr(condition, name) for name in Condition.FIELDS if getattr(condition, name) is not None)


def call(part: Any, inputs: Sequence[Any], **told: Any) -> Any:
    """As pipelines call it: one that asks for the size of the picture is told it."""
    return part(inputs, **({"image_size": SIZE} if takes(part, "image_size") else {}), **told)


def use(part: Any, t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """One condition, in the dtype of the weights."""
    return fields(call(part, inputs_of(part, t)))


def shapes(t: Trial) -> None:
    """The condition sets the fields that `provides` names (and a mask with tokens), with one entry for each input:
    tokens (B, L, C), mask (B, L) of bool, vector (B, C), labels (B,) of int64, spatial (B, C, H, W).
    """
    part = t.network()
    assert isinstance(part.provides, frozenset), f"provides is {part.provides!r}, no frozenset"
    inputs = inputs_of(part, t)
    condition = call(part, inputs)
    assert isinstance(condition, Condition), f"it gives a {type(condition).__name__}, no ldmkit.Condition"
    given = condition.given()
    assert given - {"mask_BL"} == part.provides - {"mask_BL"}, f"it provides {sorted(part.provides)} and sets {sorted(given)}"
    for name in given:
        value = getattr(condition, name)
        right = len(value) == len(inputs) and value.ndim == DIMENSIONS[name]
        assert right, f"{name} of {len(inputs)} inputs is {tuple(value.shape)}"
        right = value.dtype == DTYPES[name] if name in DTYPES else value.is_floating_point()
        assert right, f"{name} is {value.dtype}"
    if condition.mask_BL is not None and condition.tokens_BLC is not None:
        tokens, mask = condition.tokens_BLC, condition.mask_BL
        assert mask.shape == tokens.shape[:2], f"mask_BL {tuple(mask.shape)} and tokens_BLC {tuple(tokens.shape)}"


def seen(condition: Condition, i: int) -> dict[str, Tensor]:
    """Entry i without what its mask hides."""
    found = {name: getattr(condition, name)[i] for name in condition.given() - {"mask_BL"}}
    if condition.mask_BL is not None and "tokens_BLC" in found:
        found["tokens_BLC"] = found["tokens_BLC"][condition.mask_BL[i]]
    return found


def _check_same(got: dict[str, Tensor], want: dict[str, Tensor], what: str) -> None:
    for name, value in want.items():
        assert alike(got[name], value), f"{name}, {what}: {apart(got[name], value)}"


def padding(t: Trial) -> None:
    """What an input becomes, as far as its mask shows it, is the same alone, beside longer inputs, and at any place."""
    part = t.network()
    inputs = inputs_of(part, t)
    together, turned = call(part, inputs), call(part, inputs[::-1])
    for i, value in enumerate(inputs):
        want = seen(call(part, [value]), 0)
        _check_same(seen(together, i), want, f"beside {len(inputs) - 1} others")
        _check_same(seen(turned, len(inputs) - 1 - i), want, "in another order")


def masked(t: Trial) -> None:
    """A mask is True for what is to be attended to: every input, `null_input` too, has at least one such token."""
    part = t.network()
    condition = call(part, [part.null_input, *inputs_of(part, t)])
    if condition.mask_BL is None:
        return
    mask = condition.mask_BL
    assert bool(mask.any(dim=1).all()), f"an input has no token to attend to: mask_BL is {mask.long().tolist()}"


def unconditional(t: Trial) -> None:
    """`null_input` is an input like others: its condition has the same fields, joins theirs in a batch, and differs."""
    part = t.network()
    inputs = inputs_of(part, t)
    nothing, something = call(part, [part.null_input]), call(part, inputs)
    assert nothing.given() == something.given(), (
        f"fields {sorted(nothing.given())}, those of inputs {sorted(something.given())}"
    )
    joined = Condition.cat([nothing, something])
    assert joined.batch_size == 1 + len(inputs), f"joined with {len(inputs)} inputs, it is a batch of {joined.batch_size}"
    for i, value in enumerate(inputs):
        if value != part.null_input:
            assert _differ(seen(nothing, 0), seen(something, i)), f"{value!r} gives the same condition as null_input"


def told_apart(t: Trial) -> None:
    """Inputs that mean different things give different conditions."""
    part = t.network()
    inputs = inputs_of(part, t)
    condition = call(part, inputs)
    for i, one in enumerate(inputs):
        for j, other in enumerate(inputs[:i]):
            if one != other:
                assert _differ(seen(condition, i), seen(condition, j)), f"{one!r} and {other!r} give the same condition"


def _differ(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return any(not alike(a[name], b[name]) for name in a)


def own_sizes(t: Trial) -> None:
    """One that takes original_size, crops_coords_top_left or target_size takes a tensor (B, 2) for each, as training gives it:
    every input has its own row, and what it becomes is as if it alone were told that pair.
    """
    part = t.network()
    inputs = inputs_of(part, t)
    asked = [name for name in SIZES if takes(part, name)]
    rows = {name: [(64 + 8 * i + k, 96 - 16 * i - k) for i in range(len(inputs))] for k, name in enumerate(asked)}
    together = call(part, inputs, **{name: torch.tensor(pairs) for name, pairs in rows.items()})
    for i, value in enumerate(inputs):
        alone = seen(call(part, [value], **{name: pairs[i] for name, pairs in rows.items()}), 0)
        _check_same(seen(together, i), alone, f"told {', '.join(asked)} of its own beside {len(inputs) - 1} others")


def _no_sizes(subject: Subject) -> str | None:
    return None if any(takes(subject.part, name) for name in SIZES) else "it asks for no sizes of pictures"


def wrong_type(t: Trial) -> None:
    """An input of the wrong type is an InputTypeError, from `check` as from a call; `check` lets through what a call takes."""
    part = t.network()
    part.check(inputs_of(part, t))
    wrong = [object()]
    for name, function in (("check", part.check), ("a call", partial(call, part))):
        try:
            function(wrong)
        except InputTypeError:
            continue
        except Exception as error:
            raise AssertionError(f"{name} with an object() raises {type(error).__name__}, no InputTypeError: {error}") from None
        raise AssertionError(f"{name} takes an object() without an error")


PROPERTIES = (
    *properties_of_all(use, KIND),
    *properties_of_networks(use, KIND, ("forward",), fullgraph=False),
    Property("shapes", shapes, "ldmkit.Conditioner"),
    Property("padding and place do not matter", padding, "ldmkit.Conditioner.forward"),
    Property("the mask shows something", masked, "ldmkit.Condition"),
    Property("unconditional", unconditional, "ldmkit.Conditioner"),
    Property("inputs are told apart", told_apart, "ldmkit.Conditioner.forward"),
    Property("each picture's own sizes", own_sizes, "ldmkit.Conditioner.forward", absent=_no_sizes),
    Property("wrong types", wrong_type, "ldmkit.Conditioner.check"),
)
