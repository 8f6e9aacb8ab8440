"""A stranger's plugin: a distribution of its own, really installed by pip, then found, listed and used by name."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
import sys, torch, ldmkit
assert "ldmkit_example.sampler" not in sys.modules
sampler = ldmkit.build("sampler", "renoise", freshness=0.5)
schedule = ldmkit.NoiseSchedule()
truth = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
draws = torch.Generator().manual_seed(1)
noise = lambda: torch.randn(truth.shape, generator=draws)
state = sampler.init(noise(), sampler.levels(schedule, 5))
while not state.done:
    state = sampler.step(lambda x, level: truth, state, noise)
assert state.step == 5 and torch.equal(state.x, truth)
print(type(sampler).__module__)
"""


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed the example into (built from a copy, so that no build files land in the repository)."""
    work = tmp_path_factory.mktemp("example")
    source = shutil.copytree(root / "tests" / "example_plugins" / "renoise", work / "source")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(work / "site"), str(source)], check=True, capture_output=True, text=True)
    return work / "site"


def run(site: Path, *args: str, **environment: str) -> str:
    env = (
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))} | environment
    )
    return subprocess.run([sys.executable, *args], env=env, check=True, capture_output=True, text=True).stdout


def test_it_is_listed(installed):
    listed = json.loads(run(installed, "-m", "ldmkit.cli", "plugins", "--json"))["plugins"]
    (ours,) = [plugin for plugin in listed if plugin["distribution"] == "ldmkit-example"]
    assert (ours["version"], ours["entry_point"], ours["state"], ours["traceback"]) == ("0.2.0", "example", "ok", "")
    assert [(c["kind"], c["name"]) for c in ours["components"]] == [("sampler", "renoise")]


def test_it_is_built_by_name_and_samples(installed):
    assert run(installed, "-c", USE).strip() == "ldmkit_example.sampler"


def test_its_config_has_a_schema(installed):
    schema = json.loads(run(installed, "-m", "ldmkit.cli", "schema", "sampler", "ldmkit-example:renoise"))
    assert schema["properties"]["freshness"] == {
        "default": 1.0,
        "maximum": 1,
        "minimum": 0,
        "title": "Freshness",
        "type": "number",
    }


def test_it_can_be_blocked(installed):
    listed = json.loads(run(installed, "-m", "ldmkit.cli", "plugins", "--json", LDMKIT_DISABLE_PLUGINS="ldmkit_example"))
    assert [p["state"] for p in listed["plugins"] if p["distribution"] == "ldmkit-example"] == ["blocked"]
