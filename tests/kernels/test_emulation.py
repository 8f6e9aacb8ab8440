"""The emulated GPU: our CUDA kernels on the host."""

import shutil

import pytest
import torch

import ldmkit.kernels
from ldmkit.testing import emulation

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")


@pytest.fixture(scope="module", autouse=True)
def emulated():
    emulation.register()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_schedule_gives_the_same_bits(dtype):
    x_BN = torch.randn(7, 2 * 24, dtype=dtype, generator=torch.Generator().manual_seed(0))
    with emulation.schedule("forward"):
        expected = ldmkit.kernels.geglu(x_BN, backend="cuda-emulated")
    for name in emulation.SCHEDULES:
        with emulation.schedule(name, seed=3):
            assert torch.equal(ldmkit.kernels.geglu(x_BN, backend="cuda-emulated"), expected)
    torch.testing.assert_close(expected, ldmkit.kernels.geglu(x_BN, backend="reference"))
