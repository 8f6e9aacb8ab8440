"""GEGLU in CUDA, on the emulated GPU: what the contract (tests/kernels/test_contract.py) does not ask."""

import shutil

import pytest
import torch

from ldmkit.kernels import geglu
from ldmkit.testing import emulation
from tests.kernels.oracle import DTYPES, randn
from tests.kernels.test_geglu import check, oracle

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulation.register()


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 4), (torch.bfloat16, 0.51), (torch.float16, 0.51)])
def test_both_tails_keep_their_relative_accuracy(dtype, roundings):
    """16-bit results are those of exact arithmetic, rounded; those in fp32 are a few roundings off."""
    gate = torch.linspace(-13, 13, 4001).to(dtype)
    x = torch.stack([torch.ones_like(gate), gate], dim=-1)
    truth = oracle(x)
    normal = truth.abs() > torch.finfo(dtype).smallest_normal
    relative = ((geglu(x, backend="cuda-emulated").double() - truth) / truth).abs()[normal].max()
    assert relative <= roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "gap"), [(16, 0), (16, 16), (16, 1), (17, 0)])
def test_rows_with_and_without_alignment(dtype, n, gap):
    """16 bytes an access where rows begin and end at multiples of 16 bytes, else one element."""
    x = randn((3, 2 * n + gap), 0, dtype)[:, : 2 * n]
    check("cuda-emulated", x, randn((3, n), 1, dtype))
