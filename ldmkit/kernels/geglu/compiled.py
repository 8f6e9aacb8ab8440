"""GEGLU through ldmkit._C: two raw ops, with schema, fake and vmap, under one differentiable function.

`ldmkit::geglu(x)` and `ldmkit::geglu_backward(grad, x)` know nothing of autograd; `geglu` below does, once: differentiating it
twice, or in forward mode, is an error (the reference can do both). A `jvp` that said so better
than torch does would keep dynamo from tracing the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import KernelError
from ldmkit.kernels.compiled import ABSENT, EXTENSION

NAMESPACE = torch.library.Library("ldmkit", "FRAGMENT")
NAMESPACE.define("geglu(Tensor x) -> Tensor")
NAMESPACE.define("geglu_backward(Tensor grad, Tensor x) -> Tensor")


def _forward(x: Tensor) -> Tensor:
    if EXTENSION is None:
        raise KernelError(f"geglu: {ABSENT}")
    result: Tensor = (EXTENSION.geglu_forward_cpu if x.is_cpu else EXTENSION.geglu_forward_cuda)(x)
    return result


def _backward(grad: Tensor, x: Tensor) -> Tensor:
    if EXTENSION is None:
        raise KernelError(f"geglu: {ABSENT}")
    result: Tensor = (EXTENSION.geglu_backward_cpu if x.is_cpu else EXTENSION.geglu_backward_cuda)(grad, x)
    return result


for _device in ("CPU", "CUDA"):
    NAMESPACE.impl("geglu", _forward, _device)
    NAMESPACE.impl("geglu_backward", _backward, _device)


@torch.library.register_fake("ldmkit::geglu", lib=NAMESPACE)
def _forward_fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


@torch.library.register_fake("ldmkit::geglu_backward", lib=NAMESPACE)
def _backward_fake(grad: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


# Only the last dimension is special, so a batch dimension in front is one more row.
def _forward_vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
    return torch.ops.ldmkit.geglu(x.movedim(in_dims[0], 0)), 0


def _backward_vmap(info: Any, in_dims: tuple[int | None, int | None], grad: Tensor, x: Tensor) -> tuple[Tensor, int]:
    grad, x = (
        t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
        for t, dim in zip((grad, x), in_dims, strict=True)
    )
    return torch.ops.ldmkit.geglu_backward(grad, x), 0


torch.library.register_vmap("ldmkit::geglu", _forward_vmap, lib=NAMESPACE)
torch.library.register_vmap("ldmkit::geglu_backward", _backward_vmap, lib=NAMESPACE)


class _Geglu(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.ldmkit.geglu(x)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph, or a transform of torch.func
            result: Tensor = _GegluBackward.apply(grad, x)  # type: ignore[no-untyped-call]
        else:
            result = torch.ops.ldmkit.geglu_backward(grad, x)
        return result


class _GegluBackward(torch.autograd.Function):
    """The gradient, itself a function so that a second differentiation is refused with the way out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.ldmkit.geglu_backward(grad, x)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        raise KernelError("geglu: a compiled kernel can be differentiated once, not twice; backend='reference' can")


def geglu(x: Tensor) -> Tensor:
    """(..., 2N) => dense (..., N), on the CPU or a CUDA device, differentiable once."""
    if torch.is_grad_enabled():
        result: Tensor = _Geglu.apply(x)  # type: ignore[no-untyped-call]
    else:
        result = torch.ops.ldmkit.geglu(x)
    return result
