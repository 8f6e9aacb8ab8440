"""What setup.py decides to build."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest
import torch
from setuptools import Distribution
from torch.utils import cpp_extension


@pytest.fixture
def setup_py(root):
    spec = importlib.util.spec_from_file_location("ldmkit_setup", root / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_without_torch_a_plain_install_unless_more_is_asked(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py.importlib.util, "find_spec", lambda name: None)
    kind, why = setup_py.decide("auto")
    assert kind == "python"
    assert "--no-build-isolation" in why
    for choice in ("cpu", "cuda"):
        with pytest.raises(SystemExit, match=f"LDMKIT_BUILD={choice}, but torch cannot be imported"):
            setup_py.decide(choice)


def test_setup_py_runs_where_torch_cannot_be_imported(root):
    """A None in sys.modules hides torch as build isolation does."""
    run = "sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    hidden = f"import sys, runpy; sys.modules['torch'] = None; {run}"
    done = subprocess.run([sys.executable, "-c", hidden], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no compiled kernels" in done.stderr


@pytest.mark.parametrize(
    ("choice", "lacking", "kind"),
    [
        ("auto", None, "cuda"),
        ("auto", "no nvcc", "cpu"),
        ("cpu", None, "cpu"),
        ("cuda", None, "cuda"),
        ("python", None, "python"),
    ],
)
def test_with_torch(setup_py, monkeypatch, choice, lacking, kind):
    monkeypatch.setattr(setup_py, "cuda_lacks", lambda: lacking)
    assert setup_py.decide(choice)[0] == kind


def test_cuda_that_cannot_be_had_and_unknown_choices_are_errors(setup_py, monkeypatch):
    monkeypatch.setattr(setup_py, "cuda_lacks", lambda: "nvcc was not found")
    with pytest.raises(SystemExit, match="LDMKIT_BUILD=cuda, but nvcc was not found"):
        setup_py.decide("cuda")
    with pytest.raises(SystemExit, match="'gpu'; it must be one of auto, python, cpu, cuda"):
        setup_py.decide("gpu")


def test_every_source_is_built_and_no_flag_ties_the_build_to_this_machine(setup_py, root, monkeypatch):
    monkeypatch.chdir(root)
    (module,) = setup_py.extension("cpu")["ext_modules"]
    assert set(module.sources) == {str(p.relative_to(root)) for p in (root / "csrc").glob("*.cpp")}
    assert set(module.depends) == {str(p.relative_to(root)) for p in (root / "csrc").glob("*.*h")}
    flags = module.extra_compile_args["cxx"] if isinstance(module.extra_compile_args, dict) else module.extra_compile_args
    assert not [f for f in flags if f.startswith(("-march", "-mtune", "-ffast-math"))]


@pytest.fixture
def cuda_here(setup_py, monkeypatch, tmp_path):
    """A torch for CUDA 13.0, a compiler of the release that is given, no device."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(setup_py, "nvcc_release", lambda home: "13.1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)


@pytest.mark.usefixtures("cuda_here")
def test_what_cuda_lacks(setup_py, monkeypatch):
    assert setup_py.cuda_lacks() is None
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Tesla T4")
    for capability, lacks in (((9, 0), False), ((8, 0), False), ((7, 5), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda number, it=capability: it)
        assert (setup_py.cuda_lacks() is not None) == lacks
    assert setup_py.cuda_lacks() == "Tesla T4 is of compute capability 7.5, and the kernels need 8.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    assert setup_py.cuda_lacks() is None
    monkeypatch.setattr(setup_py, "nvcc_release", lambda home: "12.8")
    assert re.search(r"is of CUDA 13.0, and the nvcc in .* of CUDA 12.8", setup_py.cuda_lacks())
    monkeypatch.setattr(setup_py, "nvcc_release", lambda home: None)
    assert "nvcc was not found" in setup_py.cuda_lacks()


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler is a shell script")
def test_the_compilers_release(setup_py, tmp_path):
    assert setup_py.nvcc_release(str(tmp_path)) is None
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    assert setup_py.nvcc_release(str(tmp_path)) == "12.8"


@pytest.mark.usefixtures("cuda_here")
def test_cuda_sources_have_objects_of_their_own_and_an_architecture_where_no_device_tells_one(setup_py, root, monkeypatch):
    """geglu.cpp and geglu.cu both came to be geglu.o, and torch fails without devices: no CUDA build could be made."""
    monkeypatch.chdir(root)
    monkeypatch.setattr(cpp_extension, "IS_HIP_EXTENSION", False)
    monkeypatch.setattr(cpp_extension, "library_paths", lambda *args, **options: [])  # a torch for the CPU has none for CUDA
    monkeypatch.setattr(cpp_extension, "include_paths", lambda *args, **options: [])
    monkeypatch.setattr(cpp_extension, "_check_cuda_version", lambda *compiler: None)
    arguments = setup_py.extension("cuda")
    assert cpp_extension._get_cuda_arch_flags() == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=compute_90",
        "-gencode=arch=compute_90,code=sm_90",
    ]
    (module,) = arguments["ext_modules"]
    command = arguments["cmdclass"]["build_ext"](Distribution({"name": "ldmkit", "ext_modules": [module]}))
    objects = {}

    def note(self, module):
        objects.update(zip(module.sources, self.compiler.object_filenames(module.sources, output_dir="o"), strict=True))

    monkeypatch.setattr(type(command), "build_extension", note)
    command.ensure_finalized()
    command.run()
    assert set(objects) == {str(p.relative_to(root)) for p in (root / "csrc").glob("*.c*") if p.suffix in (".cpp", ".cu")}
    assert len(set(objects.values())) == len(objects)
    assert objects["csrc/geglu.cpp"] == "o/csrc/geglu.o"
    assert objects["csrc/geglu.cu"] == "o/csrc/geglu.cu.o"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++: install it")
def test_the_sources_are_cxx17(root):
    """So older torch builds extensions, whatever the one here does. Bindings take the standard of its headers."""
    sources = [path for path in (root / "csrc").glob("*.cpp") if not path.name.endswith("binding.cpp")]
    assert len(sources) > 4
    for source in sources:
        command = ["g++", "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi", str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
