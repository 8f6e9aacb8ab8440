"""The benchmarks run, write what they say they write, and reckon rightly."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import common
from benchmarks.common import Spread, judge
from benchmarks.geglu import summarise
from ldmkit.kernels.compiled import lacks

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common", "gpu_check"))
KEYS = {"benchmark", "claim", "date", "quick", "timing", "environment", "cases", "summary"}
RECORD = {"cpu", "cores", "threads", "instructions", "load", "os", "python", "versions", "commit"}
OF_ITS_OWN = {
    "cross_attention": {"gflops", "automatic", "choice"},
    "geglu": {"automatic", "choice"},
    "group_norm_silu": set(),
    "loading": {"peak_over_weights"},
    "pipeline": {"overhead", "latents_differ_by"},
    "plugins_startup": {"seconds_each"},
    "sampler_overhead": {"percent_of_network"},
    "startup": {"own_seconds"},
    "unet_step": {"outputs_differ_by", "kernels", "peak_mib"},
}

seconds = st.floats(1e-6, 1e3)


def check(result: dict, *, quick: bool) -> None:
    """A result has all its keys, and figures that can be."""
    assert set(result) == KEYS
    assert set(result["environment"]) == RECORD
    assert {"ldmkit", "torch"} <= set(result["environment"]["versions"])
    assert result["quick"] is quick
    assert re.match(r"\d{4}-\d\d-\d\dT[\d:]+\+00:00$", result["date"])
    assert result["cases"]
    for case in result["cases"]:
        assert {"case", "seconds", "ratios"} | OF_ITS_OWN[result["benchmark"]] == set(case)
        for spread in (*case["seconds"].values(), *case["ratios"].values()):
            assert 0 < spread["low"] <= spread["median"] <= spread["high"]
            assert spread["count"] == result["timing"]["rounds"]


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_runs_and_writes_its_result(name, tmp_path):
    if name in ("cross_attention", "geglu") and lacks("cpu"):
        pytest.skip(str(lacks("cpu")))
    extra = ["--without-compile"] if name in ("cross_attention", "geglu", "group_norm_silu") else []
    command = [sys.executable, "-m", f"benchmarks.{name}", "--quick", "--threads", "1", "-o", str(tmp_path), *extra]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (path,) = tmp_path.iterdir()
    assert str(path) in done.stdout
    result = json.loads(path.read_text())
    check(result, quick=True)
    assert result["benchmark"] == name
    assert path.name == f"{name}-{common.machine_name(result['environment'])}.json"
    assert result["environment"]["threads"] == 1
    if name == "pipeline":  # the two sides did the same work: a fault would show in the first digits
        assert all(case["latents_differ_by"] < 1e-3 for case in result["cases"])


@pytest.mark.exhaustive
@pytest.mark.skipif(bool(lacks("cpu")), reason=str(lacks("cpu")))
def test_geglu_beside_torch_compile(tmp_path):
    command = [sys.executable, "-m", "benchmarks.geglu", "--quick", "-o", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    result = json.loads(next(tmp_path.iterdir()).read_text())
    told = result["summary"]["without_torch_compile"]
    assert all(("torch.compile/cpu" in case["ratios"]) == (told is None) for case in result["cases"])


def test_results_that_are_kept_are_whole_runs():
    names = [path.name for path in (FOLDER / "results").iterdir()]
    assert "README.md" in names
    for path in (FOLDER / "results").glob("*.json"):
        result = json.loads(path.read_text())
        check(result, quick=False)
        assert path.name == f"{result['benchmark']}-{common.machine_name(result['environment'])}.json"


def test_the_page_tells_of_every_benchmark():
    page = (FOLDER / "README.md").read_text()
    assert NAMES
    assert [name for name in NAMES if f"[{name}.py]({name}.py)" not in page or f"benchmarks.{name} " not in page] == []


# -------------------------------------------------------------------------------------------------------------------- reckoning


class Clock:
    """A clock that moves only when a run moves it, and remembers who did."""

    def __init__(self) -> None:
        self.now, self.log = 0.0, ""

    def __call__(self) -> float:
        return self.now

    def run(self, name: str, seconds: float):
        def move() -> None:
            self.now += seconds
            self.log += name

        return move


def test_runs_take_turns_after_one_call_to_warm_up():
    clock = Clock()
    times = common.interleave({"A": clock.run("a", 2.0), "B": clock.run("b", 0.5)}, rounds=3, clock=clock)
    assert clock.log == "ab" + "ab" * 3
    assert times == {"A": [2.0] * 3, "B": [0.5] * 3}


def test_short_calls_are_repeated_and_times_stay_per_call():
    clock = Clock()
    runs = {"A": clock.run("a", 4.0), "B": clock.run("b", 0.75)}
    times = common.interleave(runs, rounds=2, least_seconds=2.0, clock=clock)
    assert clock.log == "aabb" + "abbb" * 2
    assert times == {"A": [4.0] * 2, "B": [0.75] * 2}


def test_quartiles_of_known_samples():
    assert Spread.of([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(median=3.0, low=2.0, high=4.0, count=5)
    assert Spread.of([1.0, 2.0]) == Spread(median=1.5, low=1.25, high=1.75, count=2)
    assert Spread.of([7.0]) == Spread(median=7.0, low=7.0, high=7.0, count=1)
    assert Spread.of([0.001, 0.002, 0.003]).text(1, 1e3) == "2.0 [1.5, 2.5]"


@given(st.lists(seconds, min_size=1, max_size=20), st.sampled_from([0.25, 2.0, 8.0]))
def test_a_drift_that_both_runs_share_leaves_their_ratio(drift, times_slower):
    times = {"ours": drift, "peer": [times_slower * value for value in drift]}
    whole = Spread(times_slower, times_slower, times_slower, len(drift))
    assert common.ratio(times, peer="peer", ours="ours") == whole
    assert common.ratio(times, peer="ours", ours="peer").median == 1 / times_slower


def test_differences_are_taken_in_pairs():
    times = {"whole": [3.0, 12.0, 6.0], "part": [1.0, 9.0, 2.0]}
    assert common.difference(times, "whole", "part") == Spread(median=3.0, low=2.5, high=3.5, count=3)


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=10))
def test_the_geometric_mean_does_not_care_which_side_is_below(ratios):
    mean = common.geometric_mean(ratios)
    assert math.isclose(mean * common.geometric_mean(1 / value for value in ratios), 1, rel_tol=1e-12)
    assert math.isclose(common.geometric_mean([2.0, 8.0]), 4, rel_tol=1e-12)


@pytest.mark.parametrize(
    ("cpu", "reference", "verdict"),
    [([1, 1, 1], [2, 2, 2], "right"), ([2, 2, 2], [1, 1, 1], "wrong"), ([1, 1, 1], [0.5, 1, 2], "even")],
)
def test_a_choice_is_judged_by_the_quartiles_of_the_pairs(cpu, reference, verdict):
    times = {"cpu": cpu, "reference": reference}
    assert judge(times, "cpu", list(times)) == verdict
    assert judge(times, "reference", list(times)) == {"right": "wrong", "wrong": "right", "even": "even"}[verdict]


def test_the_summary_of_geglu_is_per_dtype_and_direction():
    def case(dtype: str, direction: str, median: float) -> dict:
        return {
            "case": {"op": "geglu", "dtype": dtype, "direction": direction},
            "ratios": {"reference/cpu": Spread(median, median, median, 1)},
            "automatic": "cpu",
            "choice": "right",
        }

    groups = summarise([case("float32", "forward", 2.0), case("bfloat16", "forward", 3.0), case("float32", "forward", 8.0)])
    assert [(group["dtype"], group["least"]["reference/cpu"]) for group in groups] == [("float32", 2.0), ("bfloat16", 3.0)]
    assert math.isclose(groups[0]["geometric_mean"]["reference/cpu"], 4.0)
    assert groups[0]["choices"] == ["cpu: right", "cpu: right"]


def test_files_of_different_machines_and_threads_have_different_names():
    record = {"cpu": "Some CPU (R) @ 3 GHz", "instructions": "AVX512", "threads": 2}
    assert common.machine_name(record) == "some-cpu-r-3-ghz-avx512-2-threads"
    assert common.machine_name(record | {"threads": 1}) != common.machine_name(record)


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path):
    options, record = common.Options(quick=True, threads=1, folder=tmp_path), common.environment()
    path = common.report("x", "Claim.\n\nMore.", options, record, cases=[], summary={"figure": Spread.of([1.0])})
    before = path.read_text()
    assert json.loads(before)["summary"]["figure"] == {"median": 1.0, "low": 1.0, "high": 1.0, "count": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        common.report("x", "Claim.", options, record, cases=[], summary={"figure": math.nan})
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]
