"""GPU kernels compiled without a GPU: what their machine code must and must not hold (ldmkit.testing.static)."""

import importlib.util

import pytest

from ldmkit.errors import KernelError
from ldmkit.kernels.backends import OPS
from ldmkit.testing.static import ARCHITECTURES, check_cuda, check_triton, nvcc_lacks
from tests.conftest import ROOT

TRITON = [f"ldmkit.kernels.{op}.triton" for op in OPS if importlib.util.find_spec(f"ldmkit.kernels.{op}.triton")]
CUDA = sorted((ROOT / "csrc").glob("*.cu"))
needs_nvcc = pytest.mark.skipif(nvcc_lacks() is not None, reason=str(nvcc_lacks()))


def clean(rows):
    """Every kernel keeps the rules; what is only noted is printed."""
    assert rows
    for row in rows:
        print(row)
    return [str(row) for row in rows if row.wrong] == []


@pytest.mark.parametrize("module", TRITON)
def test_triton_kernels(module):
    assert clean(check_triton(module, every=False))


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("module", TRITON)
def test_every_case_of_triton_kernels(module, architecture):
    assert clean(check_triton(module, architectures=(architecture,)))


MATRICES = {"geglu_linear": "on_tensor_cores", "cross_attention": "_forward", "cross_attention_backward": "s_backward"}
"""By .cu file, kernels whose fp16 and bf16 belong on tensor cores, and whose rows in loads of 16 bytes."""


def without_tensor_cores(rows, source):
    """Those of MATRICES that lack them, or such loads."""
    found = [row for row in rows if row.dtype == "low" and MATRICES.get(source.stem, "none") in row.kernel]
    assert (source.stem in MATRICES) == bool(found)
    return [str(row) for row in found if not (row.tensor_cores and row.vector_loads)]


def cuda_cases():
    """Every source for every architecture; in the short run sm_90 only, without those that take most of a minute."""
    for source in CUDA:
        for architecture in ARCHITECTURES:
            short = architecture == 90 and not source.stem.startswith("cross_attention")
            marks = () if short else pytest.mark.exhaustive
            yield pytest.param(source, architecture, id=f"{source.name}-{architecture}", marks=marks)


@needs_nvcc
@pytest.mark.parametrize(("source", "architecture"), list(cuda_cases()))
def test_cuda_kernels(source, architecture):
    rows = check_cuda(source, architecture)
    assert clean(rows)
    assert without_tensor_cores(rows, source) == []


def test_wrong_triton_kernels_are_seen():
    rows = check_triton("tests.kernels.wrong_triton", architectures=(90,))
    assert len(rows) == 6
    for row in rows:
        only_noted = row.label.startswith("only noted: ")
        told = row.noted if only_noted else row.wrong
        assert row.label.removeprefix("only noted: ") in " ".join(told), str(row)
        assert not (only_noted and row.wrong)


WRONG_CUDA = """
#include <cuda_fp16.h>
__global__ void scaled(const __half* x, __half* y, double factor) {
  y[threadIdx.x] = __double2half(__half2float(x[threadIdx.x]) * factor);
}
__global__ void __launch_bounds__(1024, 2) spilled(const __half* x, __half* y) {
  float kept[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) kept[i] = __half2float(x[i * 1024 + threadIdx.x]);
#pragma unroll
  for (int i = 0; i < 64; ++i) y[i * 1024 + threadIdx.x] = __float2half(kept[i] * kept[63 - i] + kept[(7 * i) % 64]);
}
"""


@needs_nvcc
def test_wrong_cuda_kernels_are_seen(tmp_path):
    source = tmp_path / "wrong.cu"
    source.write_text(WRONG_CUDA)
    scaled, spilled = sorted(check_cuda(source, 90), key=lambda row: "spilled" in row.kernel)
    assert scaled.wrong == ("float64 instructions",)
    assert not scaled.tensor_cores
    assert not scaled.vector_loads
    assert "spills of" in " ".join(spilled.wrong)
    source.write_text("#include <torch/extension.h>\n")
    with pytest.raises(KernelError, match="includes torch"):
        check_cuda(source, 90)
    source.write_text("nonsense\n")
    with pytest.raises(KernelError, match="does not compile for sm_90"):
        check_cuda(source, 90)
