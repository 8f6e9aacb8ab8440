"""GEGLU of a linear layer: the op, its checks, and plain torch's implementation, against float64."""

import pytest
import torch
import torch.nn.functional as F

from ldmkit.errors import InputError, InputTypeError, KernelError
from ldmkit.kernels import geglu, geglu_linear, record, use
from ldmkit.testing.contract.core import Judge, Problem, Tally, evaluate
from ldmkit.testing.contract.geglu_linear import OP
from tests.kernels.oracle import DTYPES, randn


def plain(x, weight, bias=None):
    value, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return value * F.gelu(gate)


def inputs(lead, n, k, dtype, seed, *, bias=True, scale=1.0):
    """x, weight and perhaps bias, on the scale that a trained layer has, times `scale` for hidden."""
    tensors = [randn((*lead, k), seed, dtype), randn((2 * n, k), seed + 1, dtype, scale / max(k, 1) ** 0.5)]
    return [*tensors, randn((2 * n,), seed + 2, dtype, scale)] if bias else tensors


def check(call, tensors, grad):
    """By the contract's bound, which knows of terms that cancel; plain torch's own error is none by luck now and then."""
    problem = Problem(dict(zip(("x", "weight", "bias"), tensors, strict=False)), {}, (grad,))
    got = evaluate(lambda **named: call(*named.values()), problem, OP.outputs)
    Judge(OP, problem).check(got, Tally())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype, bias):
    check(
        lambda *t: geglu_linear(*t, backend="reference"), inputs((2, 5), 7, 12, dtype, 0, bias=bias), randn((2, 5, 7), 3, dtype)
    )


def test_the_library_product_goes_with_the_chosen_geglu():
    tensors = inputs((3,), 8, 4, torch.float32, 0)
    with record() as calls:
        want = geglu(F.linear(*tensors))
    with record() as fused:
        got = geglu_linear(*tensors)
    assert torch.equal(got, want)
    assert [(call.op, call.backend) for call in fused] == [("geglu_linear", "reference"), ("geglu", calls[0].backend)]
    with record() as forced, use("reference"):
        geglu_linear(*tensors)
    assert [call.backend for call in forced] == ["reference", "reference"]


def test_autocast_converts_as_for_a_linear_layer():
    tensors = inputs((3,), 8, 4, torch.float32, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = geglu_linear(*tensors, backend="reference")
    assert torch.equal(got, geglu_linear(*(t.bfloat16() for t in tensors), backend="reference"))


@pytest.mark.parametrize(
    ("x", "weight", "bias", "error", "told"),
    [
        (torch.zeros(3, 4), torch.zeros(5, 4), None, InputError, r"weight \(5, 4\); they need \(\.\.\., K\) and \(2N, K\)"),
        (torch.zeros(3, 4), torch.zeros(6, 3), None, InputError, r"x has shape \(3, 4\), weight \(6, 3\)"),
        (torch.zeros(()), torch.zeros(6, 1), None, InputError, r"x has shape \(\)"),
        (torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(3), InputError, r"bias has shape \(3,\); it needs \(6,\)"),
        (torch.zeros(3, 4), torch.zeros(6, 4, device="meta"), None, InputError, "weight is on meta"),
        (torch.zeros(3, 4), torch.zeros(6, 4), torch.zeros(6).double(), InputTypeError, r"bias is torch\.float64"),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(6, 4), None, InputTypeError, r"x is torch\.int32"),
    ],
)
def test_bad_input(x, weight, bias, error, told):
    with pytest.raises(error, match=told):
        geglu_linear(x, weight, bias)


def test_a_backend_that_cannot_serve_says_so():
    with pytest.raises(KernelError, match="'cuda' was forced but cannot serve"):
        geglu_linear(*inputs((3,), 8, 4, torch.float32, 0), backend="cuda")
