"""Modules without weights, made of a config alone: without memory, and no larger than what is there to fill them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldmkit.errors import ArchitectureMismatchError, ConfigError, LdmkitError

M = TypeVar("M", bound=nn.Module)

PER_TENSOR, SPARE = 4, 1000
"""How many weights a module may have for each stored tensor (which may be queries, keys and values in one), and besides."""
PER_BYTE, SPARE_BYTES = 4, 2**28
"""How much memory making it may take for each stored byte (a file may have 8 bits), and besides, for tables."""

_INITIALISERS = frozenset({"kaiming_uniform_", "uniform_", "normal_", "zeros_", "ones_", "zero_", "fill_"})
"""Of torch and transformers, which puts its own in the place of torch's; their first argument is the tensor."""
_FACTORIES = frozenset(
    {torch.empty, torch.zeros, torch.ones, torch.full, torch.eye, torch.arange, torch.linspace, torch.rand, torch.randn}
)


def skeleton(
    part_class: Callable[[Any], M], config: Any, *, held: Collection[Tensor] | None = None, source: str = "this file"
) -> M:
    """A module whose weights have no memory yet; `fill` gives them some. The caller's random state is not spent.

    A class that needs numbers of its weights while it is made, or keeps some outside its state dict, is made with all of them.

    Args:
        held: the tensors that are there to fill it. A config that describes far more is refused before memory runs out.
        source: of these, for messages.

    Raises:
        ArchitectureMismatchError: for a config that describes more, or tensors that cannot be.
        ConfigError: for one that the class cannot be made of.
    """
    with torch.random.fork_rng(devices=[]):
        try:
            module = _made(part_class, config, _Making(held, source, on_meta=True))
        except (NotImplementedError, RuntimeError):  # torch's answers to reading a number of a tensor that has none
            return _made(part_class, config, _Making(held, source, on_meta=False))
        stored = module.state_dict().keys()
        if any(buffer.is_meta for name, buffer in module.named_buffers() if name not in stored):
            return _made(part_class, config, _Making(held, source, on_meta=False))
    return module


class _Making(TorchFunctionMode):
    """Counts what a module is made of, and refuses what is too much before it is there.

    On meta, `torch.empty`, which is how modules make weights, gives tensors without memory. Other tensors are made as ever.
    Initialising what has no memory does nothing, and took about a quarter of the time of making a U-Net: it is left out.
    """

    def __init__(self, held: Collection[Tensor] | None, source: str, *, on_meta: bool) -> None:
        super().__init__()
        self.held, self.source, self.on_meta = held, source, on_meta
        self.number = self.size = 0
        self.most: float = math.inf if held is None else PER_TENSOR * len(held) + SPARE
        self.most_bytes: float = math.inf if held is None else PER_BYTE * sum(t.nbytes for t in held) + SPARE_BYTES

    def __torch_function__(self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in _INITIALISERS:
            tensor = kwargs["tensor"] if "tensor" in kwargs else args[0]
            if isinstance(tensor, Tensor) and tensor.is_meta:
                return tensor
        if func not in _FACTORIES or "out" in kwargs:
            return func(*args, **kwargs)
        weightless = self._without_memory(func, args, kwargs)
        if func is torch.empty:
            self.number += 1
            if self.on_meta and kwargs.get("device") is None:
                return self._checked(weightless)
        self.size += weightless.nbytes
        self._checked(weightless)
        return func(*args, **kwargs)

    def _without_memory(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Tensor:
        told = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory")}
        try:
            made: Tensor = func(*args, **{**told, "device": "meta"})
        except (OverflowError, RuntimeError, TypeError) as error:
            why = str(error).partition("\n")[0]
            raise ArchitectureMismatchError(
                f"{self.source}: the config describes a tensor that cannot be ({why}); it is damaged"
            ) from error
        return made

    def _checked(self, made: Tensor) -> Tensor:
        if self.held is not None and (self.number > self.most or self.size > self.most_bytes):
            much = f"{self.number} weights" if self.number > self.most else f"{self.size} bytes"
            raise ArchitectureMismatchError(
                f"{self.source}: the config describes a model of {much} and more, and there are {len(self.held)} weights of "
                f"{sum(t.nbytes for t in self.held)} bytes to fill it; it is damaged, or of another model"
            )
        return made


def _made(part_class: Callable[[Any], M], config: Any, making: _Making) -> M:
    try:
        with making:
            return part_class(config)
    except LdmkitError:
        raise
    except (ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        name, why = getattr(part_class, "__name__", "the part"), str(error).partition("\n")[0]
        raise ConfigError(f"{making.source}: {name} cannot be made of its config ({type(error).__name__}: {why})") from error
