"""A plugin's whole life in a fresh environment that sees the running one's torch, from wheels alone."""

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

GALLERY = ("bytes", "digits", "dit", "extras", "flow", "kernel", "renoise", "tiny-autoencoder")
SHIPPED = ("ldmkit", "plugins", "pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in")
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
LIGHT = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")


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
        variables = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "PYTHONHOME", "LDMKIT_"))
        }
        done = subprocess.run(
            [str(self.bin / "python"), *args], cwd=self.folder, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    def install(self, *wheels: Path) -> None:
        self.run(*PIP, "install", "--no-index", "--no-deps", "--ignore-installed", *map(str, wheels))

    def uninstall(self, *distributions: str) -> None:
        self.run(*PIP, "uninstall", "--yes", *distributions)

    def ldmkit(self, *args: str, code: int = 0) -> str:
        return self.run("-m", "ldmkit.cli", *args, code=code)

    def listed(self) -> dict[str, str]:
        """Distribution => "ok", or what is wrong with it."""
        found: dict[str, str] = {}
        for plugin in json.loads(self.ldmkit("plugins", "--json"))["plugins"]:
            said = "ok" if plugin["state"] == "ok" else plugin["error"]
            if found.setdefault(plugin["distribution"], said) == "ok":
                found[plugin["distribution"]] = said
        return found


def build(sources: list[Path], wheels: Path) -> list[Path]:
    """What `pip wheel` makes of them, offline, without compiled kernels."""
    before = set(wheels.glob("*.whl"))
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels)]
    command = [sys.executable, *PIP, "wheel", *options, *map(str, sources)]
    done = subprocess.run(command, env=os.environ | {"LDMKIT_BUILD": "python"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(set(wheels.glob("*.whl")) - before)


@pytest.fixture(scope="module")
def core(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ldmkit's own wheel."""
    source = tmp_path_factory.mktemp("core") / "source"
    source.mkdir()
    for name in SHIPPED:
        if (root / name).is_dir():
            shutil.copytree(root / name, source / name, ignore=LIGHT)
        else:
            shutil.copy(root / name, source / name)
    (wheel,) = build([source], source.parent / "wheels")
    return wheel


@pytest.fixture
def fresh(core: Path, tmp_path: Path) -> Environment:
    """An environment with nothing but ldmkit."""
    environment = Environment(tmp_path)
    environment.install(core)
    assert environment.listed() == {"ldmkit": "ok"}
    where = environment.run("-c", "import ldmkit; print(ldmkit.__file__)").strip()
    assert Path(where).is_relative_to(tmp_path / "venv")
    return environment


# ------------------------------------------------------------------------------------------------------------- one of each kind

PARTS = ("autoencoder", "denoiser", "conditioner", "sampler")
MAKE = """
import torch, ldmkit
with torch.random.fork_rng():
    torch.manual_seed(0)
    pipe = ldmkit.Pipeline(
        **{kind: f"new-{kind}" for kind in ("autoencoder", "denoiser", "conditioner", "sampler")},
        defaults={"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 2.0},
    )
pipe.save_pretrained("made-of-them")
"""
DRAW = """
import sys, pathlib, torch, ldmkit, ldmkit.kernels
pictures = {}
pipe = ldmkit.Pipeline.from_pretrained("made-of-them")
assert {type(part).__module__.split(".")[0] for part in (*pipe.modules.values(), pipe.sampler)} == {
    f"ldmkit_new_{kind}" for kind in ("autoencoder", "denoiser", "conditioner", "sampler")
}
pictures["parts"] = pipe(["a red apple", "fog"], seed=1, output_type="pt", progress=False).images
pipe = ldmkit.Pipeline.from_pretrained("new-pipeline")
with ldmkit.kernels.use("geglu=new-kernel"), ldmkit.kernels.record() as calls:
    pictures["pipeline"] = pipe(class_labels=[3, 7], seed=1, output_type="pt", progress=False).images
assert "new-kernel" in {call.backend for call in calls}
if not pathlib.Path("pictures.pt").exists():
    torch.save(pictures, "pictures.pt")
for name, wanted in torch.load("pictures.pt", weights_only=True).items():
    assert torch.equal(pictures[name], wanted), name
    assert not torch.equal(wanted[0], wanted[1]), name
"""
NAMED = """
import torch, ldmkit, ldmkit.kernels
for use in (
    lambda: ldmkit.Pipeline.from_pretrained("made-of-them"),
    lambda: ldmkit.Pipeline.from_pretrained("new-pipeline"),
    lambda: ldmkit.kernels.geglu(torch.ones(2, 8), backend="new-kernel"),
):
    try:
        use()
    except ldmkit.LdmkitError as error:
        print(error)
    else:
        raise AssertionError("it works without its plugin")
"""


@pytest.mark.exhaustive
def test_a_new_plugin_of_every_kind(fresh: Environment) -> None:
    """Generated, built, installed, listed, checked, used, saved; uninstalled, an error; reinstalled, the same bits."""
    distributions = {f"ldmkit-new-{kind}" for kind in KINDS}
    for kind in KINDS:
        fresh.ldmkit("plugin", "new", f"ldmkit-new-{kind}", "--kind", kind, "--into", "new")
    wheels = build(sorted((fresh.folder / "new").iterdir()), fresh.folder / "wheels")
    assert len(wheels) == len(KINDS)
    shutil.rmtree(fresh.folder / "new")
    fresh.install(*wheels)

    assert fresh.listed() == {"ldmkit": "ok", **dict.fromkeys(distributions, "ok")}
    for kind in KINDS:
        assert f"plugin ldmkit-new-{kind} 0.1.0" in fresh.ldmkit("plugins", "--why", f"new-{kind}")
        checked = json.loads(fresh.ldmkit("plugin", "check", f"ldmkit-new-{kind}", "--examples", "1", "--json"))
        assert checked["passed"]
        assert [report["kind"] for report in checked["reports"]] == [kind]

    fresh.run("-c", MAKE)
    fresh.run("-c", DRAW)
    generate = ("generate", "a red apple", "--steps", "2", "--seed", "1", "--no-progress", "--output")
    fresh.ldmkit(*generate, "emoji.png", "--sampler", "new-sampler")
    fresh.ldmkit(*generate, "parts.png", "--model", "made-of-them")
    assert {path.name for path in fresh.folder.glob("*.png")} == {"emoji.png", "parts.png"}
    fresh.uninstall(*distributions)
    assert fresh.listed() == {"ldmkit": "ok"}
    told = fresh.run("-c", NAMED)
    for kind in PARTS:
        assert f"the {kind} 'new-{kind}' was saved by ldmkit-new-{kind} 0.1.0, which is not installed" in told
    order = ("autoencoder", "denoiser", "conditioner", "sampler")
    assert f"  pip install {' '.join(f'ldmkit-new-{kind}==0.1.0' for kind in order)}\n" in told
    assert "no pipeline is called 'new-pipeline'" in told
    assert "new-kernel" in told

    fresh.install(*wheels)
    fresh.run("-c", DRAW)


# ------------------------------------------------------------------------------------------------------------------ the gallery

DRAW_GALLERY = """
import sys, torch, ldmkit
pipe = ldmkit.Pipeline.from_pretrained(sys.argv[1])
picture = pipe("a seven", seed=5, guidance_method="rising", guidance_scale=2.0, output_type="pt", progress=False).images
if sys.argv[1] == "example-digits":
    torch.save(picture, "picture.pt")
    pipe.save_pretrained("saved")
assert torch.equal(picture, torch.load("picture.pt", weights_only=True))
"""


def python_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        kept = [name for name in archive.namelist() if name.endswith((".py", "entry_points.txt"))]
        return {name: archive.read(name).strip() for name in kept}


@pytest.mark.exhaustive
def test_the_gallery(root: Path, fresh: Environment) -> None:
    folder = fresh.folder
    projects = [
        shutil.copytree(root / "tests" / "example_plugins" / name, folder / "gallery" / name, ignore=LIGHT) for name in GALLERY
    ]
    wheels = build(projects, folder / "wheels")

    # The other tests install wheels that are zipped by hand: they are what pip builds.
    (folder / "by_hand").mkdir()
    for project in projects:
        made = wheel_of(project, folder / "by_hand")
        assert python_files(made) == python_files(folder / "wheels" / made.name)

    assert "no pipeline is called 'example-digits'" in fresh.run("-c", DRAW_GALLERY, "example-digits", code=1)
    fresh.install(*wheels)
    listed = fresh.listed()
    assert set(listed.values()) == {"ok"}
    assert len(listed) == 1 + len(GALLERY)
    assert "no other plugin offers it" in fresh.ldmkit("plugins", "--why", "example-dit")
    fresh.run("-c", DRAW_GALLERY, "example-digits")
    fresh.run("-c", DRAW_GALLERY, "saved")

    fresh.uninstall("ldmkit-example-dit", "ldmkit-example-flow")
    error = fresh.run("-c", DRAW_GALLERY, "saved", code=1)
    assert "the denoiser 'example-dit' was saved by ldmkit-example-dit 0.1.0, which is not installed" in error
    assert "the sampler 'example-midpoint' was saved by ldmkit-example-flow 0.1.0, which is not installed" in error
    assert "pip install ldmkit-example-dit==0.1.0 ldmkit-example-flow==0.1.0" in error

    fresh.install(*(wheel for wheel in wheels if "_dit-" in wheel.name or "_flow-" in wheel.name))
    fresh.run("-c", DRAW_GALLERY, "saved")
