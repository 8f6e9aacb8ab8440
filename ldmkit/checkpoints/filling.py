"""Weights put into modules that were made without: no tensor is copied twice, and none at all that the file holds as wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.errors import CheckpointError, InputError, InputTypeError

DType = torch.dtype | Literal["auto"]
M = TypeVar("M", bound=nn.Module)

SHOWN_FROM = 2**30
"""Bytes from which a progress bar is shown."""


ALIGNMENT = 64
"""Bytes: torch's own tensors begin at multiples of it. Its products of others in 32 or 64 bits may round differently (those of
a matrix and a single vector do); the bits would change. Products in 16 bits are the same wherever a weight begins."""


_UNSEEN: WeakKeyDictionary[nn.Module, list[tuple[Tensor, str]]] = WeakKeyDictionary()
"""Modules whose stored numbers nobody has looked at yet, with what each tensor is called in messages."""


def check_dtype(dtype: Any) -> None:
    """Raise InputTypeError unless it is a floating-point type or "auto"."""
    if dtype != "auto" and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputTypeError(f"dtype = {dtype!r}: must be a floating-point torch.dtype such as torch.bfloat16, or 'auto'")


def fill(
    module: M,
    tensors: Mapping[str, Tensor],
    accounting: Accounting,
    *,
    dtype: DType,
    device: torch.device | str = "cpu",
) -> M:
    """Give a module its weights, in the wanted dtype and place, and put it in evaluation mode.

    Those that have that dtype already, and begin where they compute what they would anywhere, are not copied: they stay in the
    file, of which each page is read when it is first used and copied when it is first written to (the file never changes).
    Whether the file's own numbers are finite is looked at by `verify`, before they are first used.

    Raises:
        ArchitectureMismatchError: with every key that does not fit.
        CheckpointError: for weights that are no floating-point numbers, that `dtype` cannot hold, or that are NaN or infinite
            on another device.
    """
    accounting.check()
    wanted = _stored_dtype(tensors, accounting.source) if dtype == "auto" else dtype
    own = module.state_dict(keep_vars=True)
    parameters: dict[int, nn.Parameter] = {}
    filled: dict[str, Tensor] = {}
    taken: set[int] = set()
    unseen: list[tuple[Tensor, str]] = []
    size = sum(tensor.nbytes for tensor in tensors.values())
    with tqdm(total=size, unit="B", unit_scale=True, desc=accounting.model, disable=size < SHOWN_FROM) as bar:
        for key, place in own.items():
            if id(place) in parameters:  # tied to one before
                filled[key] = parameters[id(place)]
                continue
            stored = tensors[key]
            if stored.data_ptr() in taken:  # a pickle may hold one tensor under two names, which are two weights here
                stored = stored.clone()
            taken.add(stored.data_ptr())
            what = f"{accounting.source}: {accounting.mapped[key]}"
            if place.is_floating_point() and not stored.is_floating_point():
                raise CheckpointError(f"{what} is stored in {stored.dtype}, and weights are floating-point numbers")
            filled[key] = _converted(stored, wanted, device)
            if _keeps_finite(stored, filled[key]):
                unseen.append((stored, what))
            else:
                _check(filled[key], stored, what)
            if isinstance(place, nn.Parameter):
                filled[key] = parameters[id(place)] = nn.Parameter(filled[key], requires_grad=place.requires_grad)
            bar.update(tensors[key].nbytes)
    module.load_state_dict(filled, assign=True)
    module.to(device=device, dtype=wanted)  # what the file does not hold: constants
    _UNSEEN[module] = unseen
    return module.eval()


def verify(module: nn.Module) -> None:
    """Look at the numbers that a module was filled with and that were not read for it; once. A pipeline does so before it draws
    or saves: reading them all when they are loaded would take longer than everything else.

    Raises:
        CheckpointError: for weights that are NaN or infinite, every time.
    """
    for stored, what in _UNSEEN.get(module, ()):
        _check(stored, stored, what)
    _UNSEEN.pop(module, None)


def _converted(stored: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The stored tensor itself where it is as wanted, so that weights of a mapped file stay there until they are used."""
    wanted = dtype if stored.is_floating_point() else stored.dtype
    made = stored.detach()
    elsewhere = stored.device != torch.empty(0, device=device).device
    if stored.dtype != wanted or elsewhere or not stored.is_contiguous() or not _well_placed(stored):
        made = torch.empty(stored.shape, dtype=wanted, device=device)
        made.copy_(stored)
    return made


def _keeps_finite(stored: Tensor, made: Tensor) -> bool:
    """Whether what is made is finite where the stored numbers are, and these can be looked at later as well as now."""
    if made.device.type != "cpu" or not made.is_floating_point():
        return not made.is_floating_point()
    return torch.finfo(made.dtype).max >= torch.finfo(stored.dtype).max


def _check(made: Tensor, stored: Tensor, what: str) -> None:
    if made.is_floating_point() and not _finite(made):
        count = int((~torch.isfinite(stored.double())).sum())
        why = f"{count} NaN or infinite values" if count else f"values that {made.dtype} cannot hold"
        raise CheckpointError(f"{what} has {why}; " + ("the file is damaged" if count else "choose another dtype"))


def _well_placed(stored: Tensor) -> bool:
    return stored.dtype.itemsize < 4 or stored.data_ptr() % ALIGNMENT == 0


def _finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite: then the sum is neither, unless it overflows, so that a closer look is needed."""
    x = x.half() if x.dtype.itemsize == 1 else x  # torch adds up no numbers of 8 bits
    return bool(torch.isfinite(x.sum())) or bool(torch.isfinite(torch.stack(torch.aminmax(x))).all())


def _stored_dtype(tensors: Mapping[str, Tensor], source: str) -> torch.dtype:
    stored = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if len(stored) > 1:
        raise InputError(f"{source} stores several dtypes ({', '.join(sorted(map(str, stored)))}); name one with dtype=")
    return stored.pop() if stored else torch.float32
