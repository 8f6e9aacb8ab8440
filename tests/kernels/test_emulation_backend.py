"""The backend "cuda-emulated": our CUDA kernels, through torch, on the emulated GPU."""

import shutil

import pytest
import torch

import ldmkit
import ldmkit.kernels
from ldmkit.errors import InputError, KernelError
from ldmkit.testing import emulation, emulation_build

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++: install it")


@pytest.fixture(scope="module", autouse=True)
def registered():
    emulation.register()


@pytest.fixture
def x_BN():
    return torch.randn(7, 2 * 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_schedule_gives_the_same_bits(x_BN, dtype):
    results = []
    for name in emulation.SCHEDULES:
        x = x_BN.to(dtype).requires_grad_()
        with emulation.schedule(name, seed=3):
            y = ldmkit.kernels.geglu(x, backend="cuda-emulated")
            y.backward(torch.ones_like(y))
        results.append((y, x.grad))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])
    torch.testing.assert_close(y, ldmkit.kernels.geglu(x, backend="reference"))


def test_what_the_op_allocates_is_full_of_nan_and_is_freed_by_torch(x_BN):
    module = emulation.load(emulation_build.build())
    untouched = emulation.on_device(module, lambda: torch.empty(1000))()
    assert untouched.isnan().all()
    del untouched
    assert not torch.zeros(1000).isnan().any()


def test_a_failing_kernel_is_a_kernel_error_with_the_line_and_the_next_call_works(x_BN, tmp_path):
    module = emulation.load(emulation_build.build(csrc=changed(tmp_path, "geglu.cu", "; i < packs;", "; i <= packs;", count=2)))
    forward = emulation.implementation(module, "geglu").forward
    with pytest.raises(KernelError, match=r"geglu.cu:\d+: kernel forward<T, V, Index>, block \(0, 0, 0\), thread") as caught:
        forward(x_BN)
    assert "out of bounds: it reads 16 bytes, beginning 0 past the end of tensor argument 0 (1344 bytes)" in str(caught.value)
    ldmkit.kernels.geglu(x_BN, backend="cuda-emulated")


def changed(folder, file, old, new, *, count=1):
    """A copy of csrc with a change."""
    csrc = shutil.copytree(emulation_build.csrc_folder(), folder / "csrc")
    text = (csrc / file).read_text()
    assert text.count(old) == count, f"{file} has changed: {old!r} is there {text.count(old)} times, not {count}"
    (csrc / file).write_text(text.replace(old, new))
    return csrc


def test_a_file_that_does_not_compile_is_an_error_that_quotes_the_compiler(tmp_path):
    with pytest.raises(KernelError, match=r"do not compile:\ng\+\+ .*(.|\n)*error: .*nonsense"):
        emulation_build.build(csrc=changed(tmp_path, "geglu.cu", "namespace ldmkit {", "nonsense", count=1))


def test_without_a_compiler_or_a_checkout(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setenv("CXX", "no-such-compiler")
        with pytest.raises(KernelError, match="'no-such-compiler' is absent: install g\\+\\+, or set CXX"):
            emulation_build.build()
    monkeypatch.setattr(ldmkit, "__file__", str(tmp_path / "ldmkit" / "__init__.py"))
    with pytest.raises(KernelError, match=r"there is no .*csrc: run it in a checkout"):
        emulation_build.build()


def test_a_schedule_must_be_known(monkeypatch):
    with pytest.raises(InputError, match="the schedule is 'backward'; it must be one of forward, reverse, random"):
        emulation.schedule("backward").__enter__()
    monkeypatch.setenv("LDMKIT_EMULATION_SCHEDULE", "random:many")
    with pytest.raises(InputError, match="the seed is 'many'"), emulation.schedule("forward"):
        pass
