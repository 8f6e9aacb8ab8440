"""GEGLU: plain torch and the C++ kernel, against float64."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import InputError, InputTypeError, KernelError
from ldmkit.kernels import geglu
from ldmkit.kernels.compiled import ABSENT
from tests.kernels.oracle import DTYPES, assert_within_bound, layouts, phi, randn, seeds, strided, values_and_gradients

needs_compiled = pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))
backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_compiled)])


def plain(x):
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def oracle(x):
    value, gate = x.double().chunk(2, dim=-1)
    return value * gate * phi(gate)


def check(backend, x, grad):
    truth = values_and_gradients(oracle, [x.double()], grad.double())
    got = values_and_gradients(lambda t: geglu(t, backend=backend), [x], grad)
    assert_within_bound(got, values_and_gradients(plain, [x], grad), truth, x.dtype)


@backends
@given(
    lead=st.lists(st.integers(0, 5), max_size=3),
    n=st.one_of(st.integers(0, 40), st.just(8200)),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1e-3, 1.0, 5.0, 100.0]),
    layout=layouts,
    expanded=st.booleans(),
    seed=seeds,
)
def test_values_and_gradients(backend, lead, n, dtype, scale, layout, expanded, seed):
    x = strided(randn((*lead, 2 * n), seed, dtype, scale), layout)
    grad = randn((*lead, 1 if expanded else n), seed + 1, dtype).expand(*lead, n)
    check(backend, x, grad)


@needs_compiled
@given(rows=st.integers(1, 9), n=st.integers(1, 70), dtype=st.sampled_from(DTYPES), seed=seeds)
def test_a_row_has_the_same_bits_alone_in_any_order_and_on_any_threads(rows, n, dtype, seed):
    x = randn((rows, 2 * n), seed, dtype, 3.0)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    y = geglu(x, backend="cpu")
    assert torch.equal(geglu(x[order], backend="cpu"), y[order])
    assert torch.equal(geglu(x[:1], backend="cpu"), y[:1])
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(geglu(x, backend="cpu"), y)
    finally:
        torch.set_num_threads(threads)


@backends
@given(n=st.integers(1, 40), dtype=st.sampled_from([torch.float32, torch.float64]), seed=seeds)
def test_linear_in_the_first_half(backend, n, dtype, seed):
    x = randn((2, 2 * n), seed, dtype)
    doubled = torch.cat([2 * x[:, :n], x[:, n:]], dim=1)
    assert torch.equal(geglu(doubled, backend=backend), 2 * geglu(x, backend=backend))


@needs_compiled
def test_tails_keep_their_relative_accuracy():
    """Plain torch's 1 + erf cancels for gates under -5; the kernel's error stays at a few roundings of the result."""
    gate = torch.linspace(-13, 13, 20001)
    x = torch.stack([torch.ones_like(gate), gate], dim=-1)
    truth = oracle(x)
    relative = lambda y: ((y.double() - truth) / truth).abs().nan_to_num().max().item()  # noqa: E731
    assert relative(geglu(x, backend="cpu")) <= 4 * torch.finfo(torch.float32).eps
    assert relative(plain(x)) > 0.5


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_gates(backend, dtype):
    gates = torch.tensor([0.0, -0.0, 1e4, -1e4, 1e18, -1e18, 1e-40, float("nan"), float("inf"), -float("inf")]).to(dtype)
    x = torch.stack([torch.full_like(gates, 0.5), gates], dim=-1).requires_grad_()
    y = geglu(x, backend=backend)
    torch.testing.assert_close(y, plain(x), rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)
    (got,) = torch.autograd.grad(y.sum(), x)
    (want,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True)


@backends
def test_gelu_is_the_exact_one(backend):
    gate = torch.linspace(-3, 3, 101)
    x = torch.stack([torch.ones_like(gate), gate], dim=-1)
    tanh = F.gelu(gate, approximate="tanh")[:, None]
    assert (geglu(x, backend=backend) - oracle(x)).abs().max() < 1e-3 * (tanh - oracle(x)).abs().max()


@backends
def test_gradcheck_and_a_second_backward(backend):
    x = randn((3, 10), 0).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: geglu(t, backend=backend), x)
    y = geglu(x, backend=backend).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(), (3,), (2, 5)])
def test_odd_last_dimension(shape):
    with pytest.raises(InputError, match="last dimension must be even"):
        geglu(torch.zeros(shape))


def test_integers_are_refused():
    with pytest.raises(InputTypeError, match=r"torch\.int64"):
        geglu(torch.zeros(2, 4, dtype=torch.int64))


@needs_compiled
def test_opcheck():
    x = randn((2, 3, 8), 0)
    torch.library.opcheck(torch.ops.ldmkit.geglu.default, (x, "cpu"))
    torch.library.opcheck(torch.ops.ldmkit.geglu_backward.default, (randn((2, 3, 2), 1), x[:, :, ::2], "cpu"))


@needs_compiled
def test_torch_func_transforms():
    x = randn((3, 5, 8), 0)
    squares = {b: lambda t, b=b: geglu(t, backend=b).square().sum() for b in ("reference", "cpu")}
    close = torch.testing.assert_close
    got, want = (
        [torch.func.grad(f)(x), torch.func.vmap(torch.func.grad(f))(x)] for f in (squares["cpu"], squares["reference"])
    )
    close(got, want)
    close(torch.func.grad(lambda t: torch.func.vmap(squares["cpu"])(t).sum())(x), want[0])
    mapped = torch.func.vmap(lambda t: geglu(t, backend="cpu"), in_dims=1, out_dims=1)(x)
    assert torch.equal(mapped, geglu(x, backend="cpu"))


@needs_compiled
def test_second_and_forward_derivatives_are_refused():
    x = randn((3, 8), 0).requires_grad_()
    (first,) = torch.autograd.grad(geglu(x, backend="cpu").sum(), x, create_graph=True)
    with pytest.raises(KernelError, match="not twice; backend='reference' can"):
        first.sum().backward()
    with pytest.raises(NotImplementedError, match="forward mode"):
        torch.func.jvp(lambda t: geglu(t, backend="cpu"), (x.detach(),), (x.detach(),))


@backends
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(backend, dynamic):
    def block(x):
        return geglu(x * 1.5, backend=backend) + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((3, 8), (4, 7, 10)):
        x = randn(shape, 0).requires_grad_()
        torch.testing.assert_close(compiled(x), block(x))
        got, want = (torch.autograd.grad(f(x).sum(), x)[0] for f in (compiled, block))
        torch.testing.assert_close(got, want)


NARROWER = """
from ldmkit.kernels.compiled import build_info
from tests.kernels.oracle import DTYPES, randn
from tests.kernels import test_geglu, test_geglu_cpu
for dtype in DTYPES:
    for n in (1, 4, 7, 8, 33, 65):
        test_geglu.check("cpu", randn((5, 2 * n), n, dtype, 5.0), randn((5, n), 1, dtype))
test_geglu.test_tails_keep_their_relative_accuracy()
test_geglu_cpu.test_relative_accuracy_in_far_tails_and_near_zero()
for dtype in test_geglu_cpu.LOW[1:]:
    test_geglu_cpu.test_every_gate_of_16_bits_is_rounded_once(dtype)
    test_geglu_cpu.test_gradients_of_every_gate_of_16_bits(dtype)
test_geglu_cpu.test_large_outputs_have_the_bits_of_small_ones(dtype, 4096)
print(build_info()["cpu"])
"""


@needs_compiled
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_narrower_instruction_sets(capability, root):
    """The code paths that this processor would not take by itself: torch's own switch restricts our kernels too."""
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    done = subprocess.run(
        [sys.executable, "-c", NARROWER], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {"default", capability}
