"""Small distributions as wheels, made without a build (a wheel is a zip), and installed by pip, offline."""

from __future__ import annotations

import base64
import hashlib
import subprocess
import sys
import textwrap
import tomllib
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def wheel(
    folder: Path,
    distribution: str,
    files: Mapping[str, str],
    *,
    version: str = "1.0",
    entry_points: Mapping[str, str],
    requires: Sequence[str] = (),
) -> Path:
    """Write a pure wheel of these files (by path, with their source) whose plugins are these entry points."""
    stem = f"{distribution.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {distribution}", f"Version: {version}"]
    contents = {path: textwrap.dedent(source) for path, source in files.items()}
    contents[f"{info}/METADATA"] = "\n".join([*lines, *(f"Requires-Dist: {need}" for need in requires)]) + "\n"
    contents[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    contents[f"{info}/entry_points.txt"] = "\n".join(["[ldmkit]", *(f"{k} = {v}" for k, v in entry_points.items())]) + "\n"
    record = [f"{path},sha256={_digest(text)},{len(text.encode())}" for path, text in contents.items()]
    contents[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"]) + "\n"
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in contents.items():
            archive.writestr(name, text)
    return path


def wheel_of(source: Path, folder: Path) -> Path:
    """The wheel of a project with pyproject.toml and src/."""
    project = tomllib.loads((source / "pyproject.toml").read_text())["project"]
    code = {str(path.relative_to(source / "src")): path.read_text() for path in sorted((source / "src").rglob("*.py"))}
    points, needs = project["entry-points"]["ldmkit"], project["dependencies"]
    return wheel(folder, project["name"], code, version=project["version"], entry_points=points, requires=needs)


def install(target: Path, *wheels: Path) -> Path:
    """What `pip install` makes of wheels, in a folder to put on the path."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command = [*pip, "--no-compile", "--target", str(target), *map(str, wheels)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def _digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
