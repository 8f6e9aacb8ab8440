"""Which implementation runs, how to force one, and what the report says."""

import json
import threading

import pytest
import torch

from ldmkit.errors import KernelError
from ldmkit.kernels import backends, compiled, geglu, group_norm_silu, report, use

needs_compiled = pytest.mark.skipif(compiled.ABSENT is not None, reason=str(compiled.ABSENT))


@pytest.fixture
def environment(monkeypatch):
    """Sets LDMKIT_KERNELS, which is otherwise read once per process."""

    def set_to(value):
        monkeypatch.setenv(backends.ENVIRONMENT, value)
        backends._environment.cache_clear()

    yield set_to
    monkeypatch.undo()
    backends._environment.cache_clear()


def chosen(op="geglu", dtype=torch.float32, backend=None):
    """The name of what would run."""
    call = backends.choose(op, torch.zeros(2, 2, dtype=dtype), backend)
    (name,) = {n for n, i in backends.implementations(op).items() if i.call is call} - ({"cuda"} if op == "geglu" else set())
    return name


def test_call_beats_context_beats_environment_beats_automatic(environment):
    environment("geglu=cuda")
    with pytest.raises(KernelError, match="'cuda' was forced but cannot serve"):
        geglu(torch.zeros(2, 2))
    with use("geglu=reference"):
        assert chosen() == "reference"
        with pytest.raises(KernelError, match="'triton' was forced but cannot serve this call: not in this version"):
            geglu(torch.zeros(2, 2), backend="triton")
    assert chosen(backend="auto") == backends.automatic("geglu", "cpu", torch.float32)
    assert chosen("group_norm_silu") == "reference"


@needs_compiled
def test_use_nests_restores_and_merges():
    with use("geglu=cpu"):
        with use("group_norm_silu=reference"):
            assert chosen() == "cpu"
        with pytest.raises(KernelError, match="'cuda' was forced"), use("cuda"):
            geglu(torch.zeros(2, 2))
        assert chosen() == "cpu"
        with use("auto"):
            assert chosen() == backends.automatic("geglu", "cpu", torch.float32)


def test_use_is_seen_by_its_own_thread_only():
    seen = []
    with use("cuda"):
        thread = threading.Thread(target=lambda: seen.append(backends.forced_backend("geglu")))
        thread.start()
        thread.join()
        assert backends.forced_backend("geglu") == "cuda"
    assert seen == [None]


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("refrence", "did you mean 'reference'"),
        ("gelgu=cpu", "did you mean 'geglu'"),
        ("geglu=", "unknown backend ''"),
        ("geglu=cpu,nonsense", "unknown backend 'nonsense'"),
    ],
)
def test_misspelt(spec, told, environment):
    with pytest.raises(KernelError, match=told), use(spec):
        pass
    environment(spec)
    with pytest.raises(KernelError, match=f"LDMKIT_KERNELS: .*{told}"):
        geglu(torch.zeros(2, 2))
    with pytest.raises(KernelError, match="unknown kernel backend"):
        geglu(torch.zeros(2, 2), backend=spec)


def test_one_name_forces_all_ops():
    with use("cpu"), pytest.raises(KernelError, match="group_norm_silu: backend 'cpu' was forced"):
        group_norm_silu(torch.zeros(1, 2, 2), 1)


@needs_compiled
def test_a_forced_backend_says_what_it_serves():
    with pytest.raises(KernelError, match="serves cpu tensors only, this one is on meta"):
        geglu(torch.zeros(2, 2, device="meta"), backend="cpu")
    with pytest.raises(KernelError, match=r"serves float32, bfloat16, float16, float64, not torch\.float8"):
        geglu(torch.zeros(2, 2).to(torch.float8_e4m3fn), backend="cpu")


@needs_compiled
def test_automatic_choice_is_by_dtype():
    faster = {"avx512_bf16": {torch.float32, torch.bfloat16}, "avx512": {torch.float32, torch.bfloat16}, "avx2": {torch.float32}, "default": set()}[
        compiled.build_info()["cpu"]
    ]
    for dtype in report.DTYPES:
        assert chosen(dtype=dtype) == ("cpu" if dtype in faster else "reference")


def test_report_is_json_and_complete():
    described = json.loads(json.dumps(report.describe()))
    assert set(described["ops"]) == set(backends.OPS)
    for op, entry in described["ops"].items():
        assert set(entry["backends"]) == set(backends.BACKENDS)
        assert entry["backends"]["reference"]["available"]
        for row in entry["backends"].values():
            assert row["available"] == (row["why_not"] is None)
        everything = [c for row in entry["backends"].values() for c in row["chosen_for"]]
        assert sorted(everything) == sorted(set(everything)), f"{op}: chosen twice"
        assert {"cpu float32", "cpu bfloat16", "cpu float16", "cpu float64"} <= set(everything)


def test_report_follows_what_is_forced():
    with use("geglu=reference"):
        described = report.describe()["ops"]["geglu"]
        assert described["forced"] == "reference"
        assert "cpu float32" in described["backends"]["reference"]["chosen_for"]
        assert "(forced)" in report.table()


def test_without_the_extension_the_table_names_the_command(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    extension, reason = compiled._load()
    assert extension is None
    assert "pip install --no-build-isolation -e ." in reason
    cpu = backends.Implementation(call=geglu, device="cpu", missing=reason)
    monkeypatch.setitem(backends._implementations["geglu"], "cpu", cpu)
    monkeypatch.setattr(report, "ABSENT", reason)
    monkeypatch.setitem(backends._automatic, "geglu", {})
    assert reason in report.table()
    assert report.describe()["ops"]["geglu"]["backends"]["cpu"] == {"available": False, "why_not": reason, "chosen_for": []}
    with pytest.raises(KernelError, match="build could not see torch"):
        geglu(torch.zeros(2, 2), backend="cpu")
    assert torch.equal(geglu(torch.zeros(2, 2)), torch.zeros(2, 1))


def test_an_extension_that_cannot_be_loaded_says_why(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled.importlib, "import_module", broken)
    extension, reason = compiled._load()
    assert extension is None
    assert "undefined symbol: _ZN2at" in reason
    assert "rebuild them with `pip install --no-build-isolation" in reason
