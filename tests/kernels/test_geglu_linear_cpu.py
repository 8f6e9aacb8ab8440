"""GEGLU of a linear layer on the CPU: blocks of rows over the library's product."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import KernelError
from ldmkit.kernels import geglu_linear
from ldmkit.kernels.compiled import ABSENT
from tests.kernels.oracle import DTYPES, LOW, layouts, randn, seeds, strided
from tests.kernels.test_geglu_linear import check, inputs, plain

pytestmark = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))


def on_cpu(*tensors):
    return geglu_linear(*tensors, backend="cpu")


@given(
    lead=st.lists(st.integers(0, 4), max_size=3),
    n=st.integers(0, 20),
    k=st.integers(0, 20),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),
    layout=layouts,
    expanded=st.booleans(),
    seed=seeds,
)
def test_values_and_gradients(lead, n, k, dtype, bias, scale, layout, expanded, seed):
    x, weight, *rest = inputs(lead, n, k, dtype, seed, bias=bias, scale=scale)
    grad = randn((*lead, 1 if expanded else n), seed + 3, dtype).expand(*lead, n)
    check(on_cpu, [strided(x, layout), strided(weight, layout), *rest], grad)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_blocks_of_rows(dtype, threads):
    """Blocks of 256 rows, the last one short; from 512 rows on, two threads take one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        tensors, grad = inputs((2, 300), 33, 16, dtype, 0), randn((2, 300, 33), 3, dtype)
        check(on_cpu, tensors, grad)
        assert torch.equal(on_cpu(*tensors), on_cpu(*tensors))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", LOW)
def test_large_outputs(dtype):
    """y and hidden of more than 32 MiB each."""
    rows, n = 34 * 2**20 // (1024 * dtype.itemsize), 1024
    x, weight, bias = inputs((64,), n, 2, dtype, 0)
    y, hidden = torch.ops.ldmkit.geglu_linear(x[torch.arange(rows) % 64], weight, bias, True, "cpu")
    few, few_hidden = torch.ops.ldmkit.geglu_linear(x, weight, bias, True, "cpu")
    eps = torch.finfo(dtype).eps
    for large, small in ((y, few), (hidden, few_hidden)):
        torch.testing.assert_close(large, small.repeat(rows // 64, 1), rtol=2 * eps, atol=8 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hidden_is_the_linear_layer_and_may_be_made_anew(dtype):
    x, weight, bias = inputs((3, 5), 7, 12, dtype, 0)
    grad = randn((3, 5, 7), 3, dtype)
    y, hidden = torch.ops.ldmkit.geglu_linear(x, weight, bias, True, "cpu")
    without, empty = torch.ops.ldmkit.geglu_linear(x, weight, bias, False, "cpu")
    assert torch.equal(y, without)
    assert empty.shape == (3, 5, 0)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(hidden, torch.nn.functional.linear(x, weight, bias), rtol=4 * eps, atol=4 * eps)
    kept, anew = (torch.ops.ldmkit.geglu_linear_backward(grad, x, weight, bias, h, "cpu") for h in (hidden, empty))
    torch.testing.assert_close(kept, anew, rtol=4 * eps, atol=4 * eps)


def test_only_what_is_asked_for_is_differentiated():
    x, weight, bias = inputs((3,), 5, 4, torch.float32, 0)
    grad = randn((3, 5), 3)
    for i in range(3):
        tensors = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        torch.testing.assert_close(*(torch.autograd.grad(op(*tensors), tensors[i], grad)[0] for op in (on_cpu, plain)))


def test_gradcheck_and_a_second_backward():
    tensors = [t.double().requires_grad_() for t in inputs((3,), 4, 5, torch.float32, 0)]
    assert torch.autograd.gradcheck(on_cpu, tensors)
    y = on_cpu(*tensors).sum()
    first, second = torch.autograd.grad(y, tensors, retain_graph=True), torch.autograd.grad(y, tensors)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck(bias):
    x, weight, *rest = inputs((2, 3), 4, 5, torch.float32, 0, bias=bias)
    arguments = (x, weight, rest[0] if bias else None)
    for keep in (False, True):
        torch.library.opcheck(torch.ops.ldmkit.geglu_linear.default, (*arguments, keep, "cpu"))
        hidden = randn((2, 3, 8 if keep else 0), 1)
        torch.library.opcheck(torch.ops.ldmkit.geglu_linear_backward.default, (randn((2, 3, 4), 2), *arguments, hidden, "cpu"))


def test_torch_func_transforms():
    x, weight, bias = inputs((3, 5), 4, 6, torch.float32, 0)
    ours, theirs = (lambda x, w, b, op=op: op(x, w, b).square().sum() for op in (on_cpu, plain))
    close = torch.testing.assert_close
    every = (0, 1, 2)
    close(torch.func.grad(ours, every)(x, weight, bias), torch.func.grad(theirs, every)(x, weight, bias))
    by_item = [torch.func.vmap(torch.func.grad(f, every), in_dims=(0, None, None))(x, weight, bias) for f in (ours, theirs)]
    close(*by_item)
    weights = torch.stack([weight, 2 * weight, -weight])
    close(*(torch.func.vmap(f)(x, weights, bias.expand(3, -1)) for f in (on_cpu, plain)))


def test_second_derivatives_are_refused():
    tensors = [t.requires_grad_() for t in inputs((3,), 4, 5, torch.float32, 0)]
    (first,) = torch.autograd.grad(on_cpu(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises(KernelError, match="not twice; backend='reference' can"):
        first.sum().backward()


def test_autocast():
    tensors = inputs((3,), 8, 4, torch.float32, 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = on_cpu(*tensors)
    assert torch.equal(got, on_cpu(*(t.bfloat16() for t in tensors)))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    compiled = torch.compile(lambda *t: on_cpu(*t) + 1, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lead in ((3,), (2, 4)):
        tensors = [t.requires_grad_() for t in inputs(lead, 6, 5, torch.float32, 0)]
        results = [op(*tensors) for op in (compiled, lambda *t: on_cpu(*t) + 1)]
        torch.testing.assert_close(*results)
        torch.testing.assert_close(*(torch.autograd.grad(y.sum(), tensors) for y in results))
