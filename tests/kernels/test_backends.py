"""Which implementation runs, how to force one, and what the report says."""

import json
import re
import sys
import threading
import types

import pytest
import torch

from ldmkit.errors import KernelError, PluginError
from ldmkit.kernels import backends, compiled, geglu, group_norm_silu, record, report, rules, third_party, triton_support, use
from ldmkit.plugin import spec
from ldmkit.plugin.manager import Plugin
from ldmkit.plugin.spec import Kernel

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
    features = {name: 1 for rule in backends.rules(op) for name in rule.when}
    return backends.choose(op, (torch.zeros(2, 2, dtype=dtype),), features, backend)


def test_call_beats_context_beats_environment_beats_automatic(environment):
    environment("geglu=cuda")
    with pytest.raises(KernelError, match="'cuda' was forced but cannot serve"):
        geglu(torch.zeros(2, 2))
    with use("geglu=reference"):
        assert chosen() == "reference"
    assert chosen(backend="auto") == backends.automatic("geglu", (torch.zeros(2, 2),), {"N": 1}).backend


@needs_compiled
def test_use_nests_restores_and_merges():
    with use("geglu=cpu"):
        with use("group_norm_silu=reference"):
            assert chosen() == "cpu"
        with pytest.raises(KernelError, match="'cuda' was forced"), use("cuda"):
            geglu(torch.zeros(2, 2))
        assert chosen() == "cpu"
        with use("auto"):
            assert chosen() == backends.automatic("geglu", (torch.zeros(2, 2),), {"N": 1}).backend


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
    with use("cuda"), pytest.raises(KernelError, match="group_norm_silu: backend 'cuda' was forced"):
        group_norm_silu(torch.zeros(1, 2, 2), 1)


@needs_compiled
def test_a_forced_backend_says_what_it_serves():
    with pytest.raises(KernelError, match="serves cpu tensors only, this one is on meta"):
        geglu(torch.zeros(2, 2, device="meta"), backend="cpu")
    with pytest.raises(KernelError, match=r"serves float32, bfloat16, float16, float64, not float8"):
        geglu(torch.zeros(2, 2).to(torch.float8_e4m3fn), backend="cpu")


def rule(**fields):
    return rules._rule(**{"backend": "cpu", "device": "cpu", "measured": "here", **fields})


@needs_compiled
def test_the_first_rule_that_fits_decides(monkeypatch):
    shipped = (
        rule(backend="reference", dtypes=["float32"], when={"N": [None, 3]}, training=False),
        rule(dtypes=["float32"], instructions=["no such set"]),
        rule(backend="cuda"),
        rule(dtypes=["float32", "float64"], when={"N": [2, 5]}),
    )
    monkeypatch.setattr(backends, "rules", lambda op: shipped)

    def choice(n, dtype=torch.float32, training=False):
        x = torch.zeros(2, 2 * n, dtype=dtype, requires_grad=training)
        return backends.automatic("geglu", (x,), {"N": n})

    assert choice(3) == backends.Choice("reference", "rule 1 of geglu/choice.json")
    assert choice(3, training=True) == backends.Choice("cpu", "rule 4 of geglu/choice.json")
    assert choice(5).backend == "cpu"
    assert choice(6) == backends.Choice("reference", "no rule of geglu/choice.json fits")
    assert choice(3, torch.bfloat16).backend == "reference"
    assert choice(2, torch.float64).backend == "cpu"


FEATURES = {
    "geglu": ("N",),
    "geglu_linear": ("N", "K", "rows"),
    "group_norm_silu": ("C", "spatial", "groups"),
    "cross_attention": ("H", "L", "S", "D", "mask"),
}


@pytest.mark.parametrize("op", backends.OPS)
def test_shipped_rules_are_sound(op):
    for one in rules.rules(op):
        assert one.backend in backends.BACKENDS
        assert one.device in ("cpu", "cuda")
        assert one.measured
        assert set(one.when) <= set(FEATURES[op])


def test_rules_in_words():
    assert rule().describe() == "cpu"
    full = rule(dtypes=["float32", "bfloat16"], instructions=["avx2"], training=True, when={"S": [1, 77], "D": [40, 40]})
    assert full.describe() == "cpu float32/bfloat16, with avx2, S 1 to 77, D 40, when training"
    assert rule(training=False, when={"S": [None, 3], "L": [4, None]}).describe() == (
        "cpu, S at most 3, L at least 4, when not training"
    )


@needs_compiled
def test_what_really_ran_is_recorded():
    x = torch.zeros(3, 4)
    with record() as calls:
        geglu(x, backend="cpu")
        with record() as inner, use("reference"):
            geglu(x)
        torch.compile(lambda t: geglu(t, backend="cpu"), backend="aot_eager", fullgraph=True)(x)
    assert [(c.op, c.backend, c.reason, c.shapes) for c in inner] == [("geglu", "reference", "forced", ((3, 4),))]
    assert [c.backend for c in calls] == ["cpu", "reference", "cpu"]
    geglu(x)
    assert len(calls) == 3


def test_report_is_json_and_complete():
    described = json.loads(json.dumps(report.describe()))
    assert set(described["ops"]) == set(backends.OPS)
    for entry in described["ops"].values():
        assert entry["backends"]["reference"]["available"]
        for row in entry["backends"].values():
            assert row["available"] == (row["why_not"] is None)
        for line in entry["rules"]:
            assert entry["backends"][line["backend"]]["available"]


def test_report_follows_what_is_forced():
    with use("geglu=reference"):
        assert report.describe()["ops"]["geglu"]["forced"] == "reference"
        assert re.search(r"geglu +reference +available +forced", report.table())
        assert compiled.ABSENT or re.search(r"geglu +cpu +available +reference is forced", report.table())


def test_without_the_extension_the_table_names_the_command(monkeypatch):
    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: None)
    extension, reason = compiled._load()
    assert extension is None
    assert "pip install --no-build-isolation -e ." in reason
    cpu = backends.Implementation(forward=None, backward=None, device="cpu", missing=reason)
    monkeypatch.setitem(backends._implementations["geglu"], "cpu", cpu)
    monkeypatch.setattr(report, "ABSENT", reason)
    assert reason in report.table()
    assert report.describe()["ops"]["geglu"]["backends"]["cpu"] == {"available": False, "why_not": reason}
    with pytest.raises(KernelError, match="build could not see torch"):
        geglu(torch.zeros(2, 2), backend="cpu")
    with pytest.raises(KernelError, match="build could not see torch"):
        torch.ops.ldmkit.geglu(torch.zeros(2, 2), "cpu")
    assert torch.equal(geglu(torch.zeros(2, 2)), torch.zeros(2, 1))


class Mine:
    """A plugin's kernel: plain torch without autograd."""

    @staticmethod
    def forward(x):
        value, gate = x.chunk(2, dim=-1)
        return value * torch.nn.functional.gelu(gate)

    @staticmethod
    def backward(grad, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(Mine.forward(x), x, grad)[0]


@pytest.fixture
def plugins(monkeypatch):
    """Makes discovery find the given plugins' kernels, in a table of its own."""
    monkeypatch.setitem(sys.modules, "mine", types.SimpleNamespace(kernel=Mine))

    def install(*kernels):
        found = [
            Plugin(entry_point=f"p{i}", module="m", distribution=f"dist-{i}", version="1.0", kernels=(kernel,))
            for i, kernel in enumerate(kernels)
        ]
        monkeypatch.setattr(third_party, "discover_plugins", lambda: found)
        monkeypatch.setattr(backends, "_implementations", {op: dict(kept) for op, kept in backends._implementations.items()})
        third_party.discover.cache_clear()

    yield install
    third_party.discover.cache_clear()


def test_a_plugin_s_kernel_runs_where_it_is_named(plugins):
    plugins(Kernel(op="geglu", backend="mine", target="mine:kernel", device="cpu", dtypes=("float32",)))
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got, want = (torch.autograd.grad(geglu(x, backend=b).sum(), x)[0] for b in ("mine", "reference"))
    assert torch.equal(got, want)
    with use("mine"), record() as calls:
        geglu(x)
    assert [c.backend for c in calls] == ["mine"]
    assert re.search(r"geglu +mine +available +nothing by itself", report.table())
    with pytest.raises(KernelError, match="serves float32, not float64"):
        geglu(x.double(), backend="mine")
    with pytest.raises(KernelError, match=r"group_norm_silu: backend 'mine' was forced but .*: it has no such kernel"):
        group_norm_silu(torch.zeros(1, 2, 2), 1, backend="mine")
    with pytest.raises(KernelError, match="did you mean 'mine'"):
        geglu(x, backend="mien")


def test_a_broken_or_clashing_kernel_says_so_when_it_is_asked_for(plugins):
    broken = Kernel(op="geglu", backend="broken", target="no_such_module:x", device="cpu")
    twice = Kernel(op="geglu", backend="twice", target="mine:kernel", device="cpu")
    plugins(broken, twice, twice)
    with pytest.raises(KernelError, match=r"no_such_module:x of plugin dist-0 1\.0 .*failed: ModuleNotFoundError"):
        geglu(torch.zeros(2, 2), backend="broken")
    with pytest.raises(KernelError, match=r"two plugins offer it, dist-1 1\.0 .* and dist-2 1\.0 .*LDMKIT_DISABLE_PLUGINS"):
        geglu(torch.zeros(2, 2), backend="twice")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"op": "gelgu"}, "kernel 'mine': op 'gelgu' is none of group_norm_silu, cross_attention, geglu, geglu_linear"),
        ({"device": "tpu"}, "kernel 'mine': device 'tpu' is none of cpu, cuda"),
        ({"dtypes": ("float32", "float8")}, "kernel 'mine': dtype 'float8' is none of float32, bfloat16, float16, float64"),
    ],
)
def test_a_kernel_for_what_there_is_not_is_refused(change, told):
    with pytest.raises(PluginError, match=re.escape(told)):
        Kernel(**{"op": "geglu", "backend": "mine", "target": "m:x", "device": "cpu"} | change)


def test_plugins_are_told_of_the_ops_and_dtypes_there_are():
    assert spec.KERNEL_OPS == backends.OPS
    assert tuple(getattr(torch, name) for name in spec.KERNEL_DTYPES) == backends.DTYPES
    assert ("auto", *backends.BACKENDS) == spec.RESERVED


def test_an_extension_that_cannot_be_loaded_says_why(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at")

    monkeypatch.setattr(compiled.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(compiled.importlib, "import_module", broken)
    extension, reason = compiled._load()
    assert extension is None
    assert "undefined symbol: _ZN2at" in reason
    assert "rebuild them with `pip install --no-build-isolation" in reason


def test_versions_that_cannot_interpret_are_named():
    assert triton_support._interpreter_lacks("3.7.1", "2.4.6") is None
    assert triton_support._interpreter_lacks("3.6.0", "2.3.5") is None
    assert "triton>=3.7" in (triton_support._interpreter_lacks("3.6.0", "2.4.0") or "")
