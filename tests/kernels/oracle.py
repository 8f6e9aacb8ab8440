"""How a kernel is judged: against the op in float64, by the error that plain torch makes in the same dtype."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.testing.contract.core import Judge, Problem, Tally, evaluate
from ldmkit.testing.contract.cross_attention import OP

LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float64)


def values_and_gradients(op: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, then the gradient of every input, each in float64. The inputs themselves are left alone."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    before = [t.detach().clone() for t in inputs]
    y = op(*leaves)
    gradients = torch.autograd.grad(y, leaves, grad.to(y.dtype))
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True)), "an input was modified"
    return [t.detach().double() for t in (y, *gradients)]


def assert_within_bound(
    got: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], dtype: torch.dtype, c: float = 1.0
):
    """err(kernel) <= 2 err(plain torch) + 2 eps max|oracle| c in max norm, for the output and every gradient."""
    for i, (g, p, t) in enumerate(zip(got, plain, truth, strict=True)):
        assert g.shape == t.shape
        if t.numel() == 0:
            continue
        error, theirs = (g - t).abs().max().item(), (p - t).abs().max().item()
        bound = 2 * theirs + 2 * torch.finfo(dtype).eps * t.abs().max().item() * c
        assert error <= bound, f"result {i}: error {error:g} > {bound:g}; plain torch's is {theirs:g}"


def judge_attention(call: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, **options: Any):
    """Asserts the contract's bound on values and gradients: it knows how large the numbers are that cancel. Of few results,
    plain torch's largest error is small by luck, and its own softmax and product by hand break a bound made of that alone.
    """
    problem = Problem({"q": q, "k": k, "v": v}, {name: value for name, value in options.items() if value is not None}, (grad,))
    Judge(OP, problem).check(evaluate(call, problem, OP.outputs), Tally())


def phi(x: Tensor) -> Tensor:
    """The normal distribution function in float64, accurate in both tails."""
    return torch.special.erfc(x.double() * -math.sqrt(0.5)) / 2


def randn(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Normal numbers from their own generator."""
    return (torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


seeds = st.integers(0, 2**32 - 1)


def strided(values: Tensor, layout: str) -> Tensor:
    """The same numbers under other strides: sliced, transposed, chunk-half or offset views, or dense."""
    if layout == "sliced":
        wide = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1] + 1))
        view = wide[..., 1::2]
    elif layout == "transposed":
        view = torch.empty_like(values.mT.contiguous()).mT if values.dim() > 1 else torch.empty_like(values)
    elif layout == "chunk-half":
        view = values.new_zeros((*values.shape[:-1], 2 * values.shape[-1])).chunk(2, dim=-1)[1]
    elif layout == "offset":
        view = values.new_zeros(values.numel() + 3)[3:].view(values.shape)
    else:
        return values.contiguous()
    return view.copy_(values)


layouts = st.sampled_from(["dense", "sliced", "transposed", "chunk-half", "offset"])
