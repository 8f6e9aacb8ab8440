"""Attention in CUDA, on the emulated GPU and on a real one: what the contract (tests/kernels/test_contract.py) does not ask."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from ldmkit.errors import KernelError
from ldmkit.kernels import cross_attention
from ldmkit.kernels.backends import implementations
from ldmkit.testing import contract, emulation
from ldmkit.testing.contract.cross_attention import PLAIN_CASE
from tests.kernels.oracle import DTYPES, assert_within_bound, randn, values_and_gradients
from tests.kernels.test_cross_attention import oracle

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")
DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
INF = float("inf")
BOUND = "the bound, over shapes, dtypes, layouts, sizes"


ON_A_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if implementations("cross_attention")["cuda"].missing is None else []


@pytest.fixture(scope="module")
def emulated():
    emulation.register()


@pytest.fixture(params=["cuda-emulated", *ON_A_GPU])
def backend(request):
    if request.param == "cuda-emulated":  # on a GPU, time is dear: nothing is compiled for the emulation
        request.getfixturevalue("emulated")
    return request.param


def run(backend, tensors, grad, mask=None, scale=None):
    return values_and_gradients(lambda *t: cross_attention(*t, mask=mask, scale=scale, backend=backend), tensors, grad)


def check(backend, B, H, L, S, D, dtype, *, mask=None, scale=None, gap=0):
    """Values and gradients against float64, by plain torch's own error; heads lie inside, rows are `gap` elements apart."""
    device = "cuda" if backend == "cuda" else "cpu"
    wide = (randn((B, n, H, D + gap), i, dtype).to(device) for i, n in enumerate((L, S, S, L)))
    *tensors, grad = (x[..., gap:].transpose(1, 2) for x in wide)
    mask = None if mask is None else mask.to(device)
    factor = D**-0.5 if scale is None else scale
    truth = values_and_gradients(lambda *t: oracle(*t, mask, factor), [t.double() for t in tensors], grad.double())
    plain = values_and_gradients(lambda *t: F.scaled_dot_product_attention(*t, attn_mask=mask, scale=scale), tensors, grad)
    assert_within_bound(run(backend, tensors, grad, mask, scale), plain, truth, dtype)


@pytest.mark.parametrize("S", [77, 154, 170])
@pytest.mark.parametrize("D", DIMS)
def test_every_head_dimension(backend, D, S):
    check(backend, 1, 1, 20, S, D, torch.bfloat16 if D % 16 else torch.float16)


def check_contract(backend, S, D, dtype):
    """Values, log-sum-exp and gradients within the contract's bound, at one key too."""
    sizes = {"batch": 1, "heads": 1, "queries": 3, "keys": S, "dim": D, "dtype": dtype, "seed": S}
    contract.replay("cross_attention", BOUND, backend, **{**PLAIN_CASE, **sizes})


@pytest.mark.parametrize("S", [1, 7, 8, 9, 15, 16, 17, 31, 33, 79, 80, 81, 144, 159, 160, 161])
def test_keys_at_the_ends_of_tiles(backend, S):
    check_contract(backend, S, 40, "float16")


@pytest.mark.exhaustive
@pytest.mark.parametrize("D", DIMS)
def test_every_number_of_keys_at_every_width(backend, D):
    for S in range(1, 161):
        check_contract(backend, S, D, ("float16", "bfloat16")[S // 16 % 2])


@pytest.mark.exhaustive
def test_every_number_of_keys_in_float32(backend):
    for S in range(1, 161):
        check_contract(backend, S, 40, "float32")


@pytest.mark.parametrize("D", [20, 65, 130, 300])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_no_vector_fits(backend, dtype, D):
    check(backend, 1, 2, 5, 40, D, dtype)
    check(backend, 1, 2, 5, 40, 40, dtype, gap=3)


@pytest.mark.parametrize("S", [40, 200], ids=["few", "many"])
@pytest.mark.parametrize("kind", ["keys", "rows", "added"])
def test_masks(backend, kind, S):
    mask = randn((2, 1, 1 if kind == "keys" else 20, S), 1) > 0
    if kind == "added":
        mask = randn(mask.shape, 2, torch.bfloat16).masked_fill(~mask, -INF)
    check(backend, 2, 2, 20, S, 40, torch.bfloat16, mask=mask)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(backend, scale):
    check(backend, 1, 1, 20, 77, 40, torch.float16, scale=scale)
    check(backend, 1, 1, 20, 200, 40, torch.float16, scale=scale)


def test_queries_are_dealt_out_for_the_gradient_of_few_keys(backend):
    """290 queries over 9 keys go in eight parts of 64 at most, the last of which have none."""
    check(backend, 1, 2, 290, 9, 40, torch.float16)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("S", "D"), [(77, 40), (200, 64), (50, 512)])
def test_every_schedule_gives_the_same_bits(S, D):
    *tensors, grad = (randn((1, 1, n, D), i, torch.float16) for i, n in enumerate((40, S, S, 40)))
    expected = run("cuda-emulated", tensors, grad)
    for name in emulation.SCHEDULES:
        with emulation.schedule(name, seed=5):
            assert all(map(torch.equal, run("cuda-emulated", tensors, grad), expected))


@pytest.mark.usefixtures("emulated")
def test_wider_heads_are_refused():
    """Where the dispatch asks, and where nobody has asked."""
    q = torch.zeros(1, 1, 2, 520)
    reason = implementations("cross_attention")["cuda"].refusal(q, q, q, None, 1.0)
    assert reason == "it serves head dimensions up to 512, not 520"
    with pytest.raises(KernelError, match="head dimensions up to 512 are served, not 520"):
        cross_attention(q, q, q, backend="cuda-emulated")


@pytest.mark.exhaustive
@pytest.mark.parametrize(("S", "D"), [(4096, 40), (4096, 80), (4096, 160), (4096, 512), (4096, 64), (16384, 64)])
def test_long_contexts(backend, S, D):
    check(backend, 1, 1, 64, S, D, torch.bfloat16)
