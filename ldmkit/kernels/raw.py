"""The raw torch ops, `torch.ops.ldmkit.<op>(..., backend)` and `<op>_backward(..., backend)`: schema, fake, vmap, and a
backward that can be differentiated no further. The last argument names the implementation that runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import KernelError
from ldmkit.kernels.backends import record_call, served

LIBRARY = torch.library.Library("ldmkit", "FRAGMENT")


def define(op: str, schema: str, fake: Callable[..., Any], *, rows: Sequence[int] = (), leading: bool = False) -> None:
    """Defines `ldmkit::<op>` by its schema "(Tensor x, ...) -> ...", whose last argument is `str backend`.

    Args:
        op: ends in "_backward" for the backward of another.
        fake: takes all arguments, gives empty outputs of the right shapes and strides.
        rows: the places of the tensors whose first dimension is one of independent items, as in every output: vmap then runs
            the op once, over more items. Where other tensors are mapped over too, it runs item by item.
        leading: these tensors, and the outputs, may have any number of dimensions in front.
    """
    LIBRARY.define(op + schema)
    forward = op.removesuffix("_backward")

    def run(*arguments: Any) -> Any:
        *rest, backend = arguments
        implementation = served(forward, backend)
        if op == forward:
            record_call(op, backend, rest)
            function = implementation.forward
        else:
            function = implementation.backward
        assert function is not None
        return function(*rest)

    LIBRARY.impl(op, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"ldmkit::{op}", fake, lib=LIBRARY)
    call = getattr(torch.ops.ldmkit, op)

    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        mapped = [i for i, dim in enumerate(in_dims) if dim is not None]
        size = info.batch_size
        if size and rows and set(mapped) <= set(rows):
            wide = [_in_front(a, in_dims[i], size) if i in rows else a for i, a in enumerate(arguments)]
            if leading:
                return _each(call(*wide), lambda t: t)
            folded = [a.flatten(0, 1) if i in rows and isinstance(a, Tensor) else a for i, a in enumerate(wide)]
            return _each(call(*folded), lambda t: t.unflatten(0, (size, t.shape[0] // size)))
        items = [
            call(*(a if dim is None else a.select(dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(size)
        ]
        if isinstance(items[0], Tensor):
            return torch.stack(items), 0
        return tuple(map(torch.stack, zip(*items, strict=True))), (0,) * len(items[0])

    torch.library.register_vmap(f"ldmkit::{op}", vmap, lib=LIBRARY)


def _in_front(argument: Any, dim: int | None, size: int) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return argument.expand(size, *argument.shape) if dim is None else argument.movedim(dim, 0)


def _each(result: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    if isinstance(result, Tensor):
        return change(result), 0
    return tuple(map(change, result)), (0,) * len(result)


class _Backward(torch.autograd.Function):
    """A raw backward, itself a function so that a second differentiation is refused with the way out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, *arguments: Any) -> Any:
        return getattr(torch.ops.ldmkit, op)(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0].removesuffix("_backward")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KernelError(f"{ctx.op}: this kernel can be differentiated once, not twice; backend='reference' can")


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for positional arguments, at less cost: torch's own binds them to the signature of `forward` at every
    call (20 us), which it needs for torch.func and torch.compile alone.
    """

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = function.forward(*arguments)
        function.setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(function.backward)}
    eager: Any = type(function.__name__, (torch.autograd.Function,), members)

    def apply(*arguments: Any) -> Any:
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        chosen: Any = function if transformed else eager
        return chosen.apply(*arguments)

    return apply


def differentiate_once(op: str, *arguments: Any) -> Any:
    """Runs a raw backward inside an autograd.Function's backward."""
    if torch.is_grad_enabled():  # create_graph, or a transform of torch.func
        return _Backward.apply(op, *arguments)  # type: ignore[no-untyped-call]
    return getattr(torch.ops.ldmkit, op)(*arguments)
