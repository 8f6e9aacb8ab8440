"""All of a plugin's life in a fresh environment that sees the running one's torch, from wheels alone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from ldmkit.commands.plugin import KINDS
from tests.plugin.wheels import wheel_of

PROJECTS = ("bytes", "digits", "dit", "extras", "flow", "kernel", "renoise", "tiny-autoencoder")
SHIPPED = ("ldmkit", "plugins", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")

DRAW = """
import sys, torch, ldmkit
pipe = ldmkit.Pipeline.from_pretrained(sys.argv[1])
picture = pipe("a seven", seed=5, guidance_method="rising", guidance_scale=2.0, output_type="pt", progress=False).images
if sys.argv[1] == "example-digits":
    torch.save(picture, "picture.pt")
    pipe.save_pretrained("saved")
assert torch.equal(picture, torch.load("picture.pt", weights_only=True))
print(ldmkit.__file__)
"""

BUILD_EACH = """
import torch, ldmkit, ldmkit.kernels
for kind in ("sampler", "autoencoder", "denoiser", "conditioner"):
    assert ldmkit.build(kind, f"new-{kind}").__module__ == f"ldmkit_new_{kind}.{kind}"
ldmkit.Pipeline.from_pretrained("new-pipeline")
with ldmkit.kernels.record() as calls:
    ldmkit.kernels.geglu(torch.ones(2, 8), backend="new-kernel")
assert [call.backend for call in calls] == ["new-kernel"]
"""


class Environment:
    """A virtual environment of its own, whose path ends with the running one's packages."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder / "venv", with_pip=False)
        self.folder, self.bin = folder, folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
        packages = self.run("-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])").strip()
        running = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
        (Path(packages) / "zz-running.pth").write_text("\n".join(sorted(running)) + "\n")

    def run(self, *args: str, code: int = 0) -> str:
        """Standard output; with an exit code other than 0, standard error."""
        variables = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
        done = subprocess.run(
            [str(self.bin / "python"), *args], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    def install(self, *wheels: Path) -> None:
        pip = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-index",
            "--no-deps",
            "--ignore-installed",
        ]
        self.run(*pip, *map(str, wheels))

    def ldmkit(self, *args: str, code: int = 0) -> str:
        return self.run("-m", "ldmkit.cli", *args, code=code)


def build(sources: list[Path], wheels: Path) -> None:
    """What `pip wheel` makes of them, offline, without compiled kernels."""
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command = [*pip, "--no-build-isolation", "--wheel-dir", str(wheels), *map(str, sources)]
    subprocess.run(command, env=os.environ | {"LDMKIT_BUILD": "python"}, check=True, capture_output=True, text=True)


def python_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name.endswith((".py", "entry_points.txt"))]
        return {name: archive.read(name).strip() for name in kept}


@pytest.mark.exhaustive
def test_a_plugin_s_whole_life(root: Path, tmp_path: Path) -> None:
    sources = tmp_path / "sources"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in SHIPPED:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copy
        (sources / "ldmkit").mkdir(parents=True, exist_ok=True)
        copy(root / name, sources / "ldmkit" / name, **({"ignore": ignore} if copy is shutil.copytree else {}))
    projects = [shutil.copytree(root / "tests" / "example_plugins" / name, sources / name, ignore=ignore) for name in PROJECTS]
    wheels = tmp_path / "wheels"
    build([sources / "ldmkit", *projects], wheels)

    # The other tests install wheels that are zipped by hand: they are what pip builds.
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    for project in projects:
        made = wheel_of(project, by_hand)
        assert python_files(made) == python_files(wheels / made.name)

    fresh = Environment(tmp_path)
    (core,) = wheels.glob("ldmkit-*.whl")
    fresh.install(core)
    listed = json.loads(fresh.ldmkit("plugins", "--json"))["plugins"]
    assert {plugin["distribution"] for plugin in listed} == {"ldmkit"}
    assert "no pipeline is called 'example-digits'" in fresh.run("-c", DRAW, "example-digits", code=1)
    fresh.install(*(path for path in wheels.glob("*.whl") if path != core))

    listed = json.loads(fresh.ldmkit("plugins", "--json"))["plugins"]
    assert {plugin["distribution"]: plugin["error"] for plugin in listed if plugin["state"] != "ok"} == {}
    assert len({plugin["distribution"] for plugin in listed}) == 1 + len(PROJECTS)
    assert "no other plugin offers it" in fresh.ldmkit("plugins", "--why", "example-dit")

    where = fresh.run("-c", DRAW, "example-digits").strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    fresh.run("-c", DRAW, "saved")

    fresh.run("-m", "pip", "uninstall", "--quiet", "--yes", "ldmkit-example-dit", "ldmkit-example-flow")
    error = fresh.run("-c", DRAW, "saved", code=1)
    assert "the denoiser 'example-dit' was saved by ldmkit-example-dit 0.1.0, which is not installed" in error
    assert "the sampler 'example-midpoint' was saved by ldmkit-example-flow 0.1.0, which is not installed" in error
    assert "pip install ldmkit-example-dit==0.1.0 ldmkit-example-flow==0.1.0" in error

    fresh.install(*wheels.glob("ldmkit_example_dit-*.whl"), *wheels.glob("ldmkit_example_flow-*.whl"))
    fresh.run("-c", DRAW, "saved")

    # A new plugin of each kind, as the installed ldmkit writes it.
    for kind in KINDS:
        fresh.ldmkit("plugin", "new", f"ldmkit-new-{kind}", "--kind", kind, "--into", str(tmp_path / "new"))
    build(sorted((tmp_path / "new").iterdir()), wheels)
    made = sorted(wheels.glob("ldmkit_new_*.whl"))
    assert len(made) == len(KINDS)
    fresh.install(*made)
    listed = json.loads(fresh.ldmkit("plugins", "--json"))["plugins"]
    assert {plugin["distribution"] for plugin in listed if plugin["state"] == "ok"} >= {f"ldmkit-new-{kind}" for kind in KINDS}
    fresh.run("-c", BUILD_EACH)
    checked = json.loads(fresh.ldmkit("plugin", "check", "ldmkit-new-sampler", "--examples", "1", "--json"))
    assert checked["passed"]
