"""The raw ops `ldmkit::geglu_linear` and `ldmkit::geglu_linear_backward`, and the differentiable function over them.

The forward gives y and, where `keep` asks for it, hidden = x weight^T + bias. The backward gives the gradient of hidden, from
hidden or, where that is empty, from what made it; the gradients of x, weight and bias are then products of the library's (whose
bits may depend on the batch), each only where it is asked for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.kernels.raw import applied, define, differentiate_once

FORWARD = "(Tensor x, Tensor weight, Tensor? bias, bool keep, str backend) -> (Tensor, Tensor)"
BACKWARD = "(Tensor grad, Tensor x, Tensor weight, Tensor? bias, Tensor hidden, str backend) -> Tensor"
RECOMPUTED = {"cuda": 384, "cpu": 0}
"""Up to this K, by type of device, the backward computes hidden anew. An element of it costs 2 K operations, or 2 bytes out and
2 bytes in; at 790 TFLOP/s in bf16 and 4.3 TB/s, what an H200 does, these take equally long at K = 367."""


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
    """y (..., N); hidden (..., 2N), or (..., 0) where it is not kept."""
    lead, columns = x.shape[:-1], weight.shape[0]
    return x.new_empty((*lead, columns // 2)), x.new_empty((*lead, columns if keep else 0))


def _backward_fake(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor, backend: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


define("geglu_linear", FORWARD, _fake, rows=(0,), leading=True)
define("geglu_linear_backward", BACKWARD, _backward_fake, rows=(0, 1, 4), leading=True)


class _GegluLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, keep: bool, backend: str) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = torch.ops.ldmkit.geglu_linear(x, weight, bias, keep, backend)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, weight, bias, _, ctx.backend = inputs
        hidden = output[1]
        ctx.mark_non_differentiable(hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, bias, hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 5
        x, weight, bias, hidden = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad_hidden = differentiate_once("geglu_linear_backward", grad, x, weight, bias, hidden, ctx.backend)
        grad_RN = grad_hidden.flatten(0, -2) if x.dim() > 1 else grad_hidden[None]
        x_RK = x.flatten(0, -2) if x.dim() > 1 else x[None]
        return (
            _product(grad_hidden, weight) if needs_x else None,
            _product(grad_RN.mT, x_RK) if needs_weight else None,
            grad_RN.sum(0) if needs_bias else None,
            None,
            None,
        )


def _product(a: Tensor, b_MK: Tensor) -> Tensor:
    """a (..., M) @ b. In fp32 on the CPU it is oneDNN's product, not MKL's, which takes 1.5 to 2 times as long on
    AMD's processors.
    Compilers choose for themselves; oneDNN's has no derivative, no rule for vmap, and takes no empty tensors.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch.is_grad_enabled()
        or a.device.type != "cpu"
        or a.dtype != torch.float32
        or 0 in (*a.shape, *b_MK.shape)
        or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled)
    ):
        return a @ b_MK
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b_MK.mT, None, "none", [], "")
    return product


_apply = applied(_GegluLinear)


def geglu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
    """(..., K) => (..., N), differentiable once; arguments checked, all given."""
    if torch.is_grad_enabled():
        differentiated = any(t is not None and t.requires_grad for t in (x, weight, bias))
        keep = differentiated and weight.shape[1] > RECOMPUTED[x.device.type]
        y: Tensor = _apply(x, weight, bias, keep, backend)[0]
    else:
        y = torch.ops.ldmkit.geglu_linear(x, weight, bias, False, backend)[0]
    return y
