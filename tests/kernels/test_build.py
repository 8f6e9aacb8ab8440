"""What setup.py decides to build."""

import importlib.util
import subprocess
import sys

import pytest


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
