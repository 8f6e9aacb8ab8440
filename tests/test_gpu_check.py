"""`make gpu-check`'s own logic, and that of the GPU benchmarks, without a GPU."""

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import tarfile
import time
import types

import pytest
import torch

from benchmarks import common, gpu_check
from benchmarks.common import ROOT, Spread
from benchmarks.gpu import geglu, timing
from benchmarks.gpu_check import Step, run_all, table
from ldmkit.testing import contract


def step(name, code, seconds=30.0, **rest):
    return Step(name, [sys.executable, "-c", code], seconds, **rest)


CODES = {
    "good": "print('fine')",
    "bad": "print('wrong\\nbecause'); raise SystemExit(3)",
    "skipped": "print('2 skipped in 0.1s')",
    "slow": "import time; print('began', flush=True); time.sleep(60)",
}


def plan():
    return [
        step("bad", CODES["bad"]),
        step("good", CODES["good"]),
        step("skipped", CODES["skipped"], proof=" passed"),
        step("slow", CODES["slow"], seconds=1.0),
        step("absent", "", skip="no such tool"),
        Step("not there", ["/no/such/program"], 5.0),
    ]


def test_a_failure_is_shown_and_stops_nothing(tmp_path, capsys):
    outcomes = run_all(plan(), tmp_path / "state.json", "key")
    assert [o.verdict for o in outcomes] == ["failed", "passed", "failed", "timed out", "skipped", "failed"]
    assert [o.bad for o in outcomes] == [True, False, True, True, False, True]
    assert [o.last for o in outcomes[:5]] == ["because", "fine", "2 skipped in 0.1s", "began", "no such tool"]
    assert "wrong\nbecause" in capsys.readouterr().out
    assert [line.split()[0] for line in table(outcomes).splitlines()] == ["bad", "good", "skipped", "slow", "absent", "not"]


def test_what_passed_is_not_run_again_until_a_source_changes(tmp_path):
    state, mark = tmp_path / "state.json", tmp_path / "mark"
    count = step("count", f"open({str(mark)!r}, 'a').write('x')")
    for key, verdict, runs in (("a", "passed", 1), ("a", "passed before", 1), ("b", "passed", 2)):
        (outcome,) = run_all([count], state, key)
        assert (outcome.verdict, len(mark.read_text())) == (verdict, runs)


def test_a_build_runs_each_time_and_every_step_is_told_of(tmp_path):
    """A lease that goes on does so on a machine that has nothing built yet."""
    mark, told = tmp_path / "mark", []
    build = dataclasses.replace(step("build", f"open({str(mark)!r}, 'a').write('x')"), always=True)
    for runs in (1, 2):
        outcomes = run_all([build, *plan()[:2]], tmp_path / "state.json", "key", note=lambda o: told.append(len(o)))
        assert (outcomes[0].verdict, len(mark.read_text())) == ("passed", runs)
    assert told == [1, 2, 3, 3, 1, 2, 3]


def test_a_budget_ends_the_run_and_the_next_one_goes_on(tmp_path):
    state = tmp_path / "state.json"
    first = [step("good", CODES["good"]), step("slow", CODES["slow"]), step("after", CODES["good"])]
    assert [o.verdict for o in run_all(first, state, "key", budget=2.0)] == ["passed", "timed out", "no time left"]
    assert all(o.bad for o in run_all(first[2:], state, "key", budget=0.0))
    again = [first[0], step("slow", CODES["good"]), first[2]]
    assert [o.verdict for o in run_all(again, state, "key")] == ["passed before", "passed", "passed"]


def test_a_step_past_its_limit_leaves_no_process_behind(tmp_path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(2); open({str(mark)!r}, 'w')"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_check.run(step("parent", code, seconds=1.0), tmp_path / "log").verdict == "timed out"
    time.sleep(2.5)
    assert not mark.exists()


def test_the_key_follows_the_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    (tmp_path / "csrc").mkdir()
    source = tmp_path / "csrc" / "a.cu"
    keys = []
    for text in ("one", "two", "one"):
        source.write_text(text)
        (tmp_path / "setup.py").write_text("")
        keys.append(gpu_check.sources_key("device"))
    assert keys[0] == keys[2] != keys[1]
    assert gpu_check.sources_key("another") != keys[0]


def test_the_exit_code_and_the_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "device", lambda: {"gpu": "NVIDIA Test"})
    monkeypatch.setattr(gpu_check, "FOLDER", tmp_path / "state")
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    monkeypatch.setattr(gpu_check, "steps", lambda quick: plan()[:2])
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    archive = tmp_path / "archive.tar.gz"
    assert gpu_check.main(["--archive", str(archive)]) == 1
    with tarfile.open(archive) as tar:
        assert {"state/state.json", "state/bad.log", "gpu/gpu-check-nvidia-test.json"} <= set(tar.getnames())
    assert gpu_check.main(["--only", "good"]) == 0
    assert gpu_check.main(["--only", "nothing"]) == 2
    result = json.loads((tmp_path / "gpu" / "gpu-check-nvidia-test.json").read_text())
    assert [s["verdict"] for s in result["steps"]] == ["passed before"]
    assert "there are bad, good" in capsys.readouterr().out


def test_every_step_names_what_is_there():
    assert set(gpu_check.OPS) == set(contract.OPS)
    for quick in (True, False):
        steps = gpu_check.steps(quick=quick)
        names = [s.name for s in steps]
        assert len(names) == len(set(names))
        assert names[0] == "build"
        for op in gpu_check.OPS:
            assert {f"verify {backend} {op}" for backend in ("cuda", "triton")} <= set(names)
            assert {f"sanitizer: {tool} {op}" for tool in gpu_check.TOOLS} <= set(names)
        assert {f"benchmark: gpu.{name}" for name in ("geglu", "cross_attention")} <= set(names)
        files = [word for s in steps for word in s.command if word.startswith("tests")]
        assert len(files) > 4
        assert all((ROOT / name).exists() for name in files)
    for module, *_options in gpu_check.benchmarks():
        assert (ROOT / "benchmarks" / (module.replace(".", "/") + ".py")).is_file()


def test_what_a_sanitizer_is_told_to_run_runs():
    """On the CPU's kernels: names and options of this package are right."""
    tiny = gpu_check.TINY.replace('"cuda"', '"cpu"')
    for command in (["-c", tiny, "geglu"], [*gpu_check.verify("geglu")[1:], "cpu", "--only", "14", "--only", "11"]):
        done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "named sizes" in done.stdout


def test_a_checkout_that_is_not_installed_is_registered(monkeypatch):
    assert gpu_check.registration() == []

    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert gpu_check.registration() == ["egg_info"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: `make gpu-check` runs these for real")
@pytest.mark.parametrize("words", ["gpu_check", "gpu.geglu", "geglu --device cuda", "group_norm_silu --gpu"])
def test_without_a_gpu_it_says_so(words):
    command = [sys.executable, "-m", *f"benchmarks.{words} --quick".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "needs a CUDA device" in done.stdout + done.stderr


def test_a_case_is_judged_by_the_best_kernel_of_ours():
    ceiling = Spread(1e12, 1e12, 1e12, 1)
    times = {"plain": [1e-6], "triton": [2.1e-6], "cuda": [4e-6]}
    case = geglu.case("geglu", (3, 5), times, 2e6, ceiling)
    assert (case["best"], case["reached"], case["line"]) == ("triton", True, "93%")
    assert case["share_of_ceiling"]["cuda"].median == pytest.approx(0.5)
    assert not geglu.case("geglu", (3, 5), {**times, "triton": [2.2e-6]}, 2e6, ceiling)["reached"]
    assert not geglu.case("geglu", (8192, 2560), {"cuda": [33e-6]}, 2e6, ceiling)["reached"]
    assert not geglu.case("geglu", (3, 5), {"plain": [1e-9]}, 2e6, ceiling)["reached"]


def test_what_cannot_be_timed_is_told_and_the_rest_is_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(timing, "FAILURES", [])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: types.SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(timing, "clock", time.perf_counter)
    monkeypatch.setattr(timing, "graph", lambda call, inputs: call(*inputs[0]) and (lambda: None))

    def greedy(x):
        raise RuntimeError("out of resource\nand more")

    times = timing.measure({"greedy": greedy, "plain": torch.numel}, lambda i: (torch.zeros(2, 3),), 1, {"rounds": 2})
    assert list(times) == ["plain"]
    assert timing.FAILURES == ["greedy of 2x3: RuntimeError: out of resource"]
    record = {"instructions": "", "threads": 1, "gpu": {"name": "NVIDIA Test"}}
    with pytest.raises(SystemExit, match="1"):
        timing.report("geglu", "claim", common.Options(True, 1, tmp_path), record, cases=[], summary={})
    (result,) = (tmp_path / "gpu").glob("*.json")
    assert json.loads(result.read_text())["environment"]["failed"] == timing.FAILURES
    assert "failed: greedy of 2x3" in capsys.readouterr().out


def test_inputs_of_a_graph_outgrow_the_cache():
    assert [timing.copies(size, 60) for size in (1, 30, 240, 10**9)] == [timing.MOST_CALLS, 8, 2, 2]


def test_plain_backward_is_autograds():
    x, grad = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    (want,) = torch.autograd.grad(geglu.plain(x), x, grad)
    torch.testing.assert_close(geglu.plain_backward(grad, x.detach()), want)
