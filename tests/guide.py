"""The author's guide as a script, and an environment to run it in that leaves the running one alone."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "plugins.md"

UPLOAD = """\
import sys
from email import message_from_bytes
from packaging.metadata import Metadata
from packaging.utils import parse_wheel_filename
from pathlib import Path
from zipfile import ZipFile

assert sys.argv[1] == "upload" and sys.argv[2:], sys.argv
for path in map(Path, sys.argv[2:]):
    name, version, _, _ = parse_wheel_filename(path.name)
    with ZipFile(path) as wheel:
        assert wheel.testzip() is None
        (about,) = (file for file in wheel.namelist() if file.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(wheel.read(about))  # as strict as the index
    assert (metadata.name, metadata.version) == (name, version)
    assert metadata.description and metadata.license_expression
    print("checked, and not uploaded:", path.name)
"""
"""`twine upload` without the upload: no test goes to the network."""


def section(title: str) -> str:
    """The text under a heading of the second level."""
    (found,) = re.findall(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), flags=re.M | re.S)
    return str(found)


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """(language, what the block is to be written to, content) of each fenced block; "" where it is not a file."""
    for before, language, content in re.findall(r"([^\n]*)\n\n```([^\n]*)\n(.*?)^```$", text, flags=re.M | re.S):
        into = re.fullmatch(r"Into `(.+)`:", before)
        yield language, into[1] if into else "", content


def script(*titles: str, slow: bool) -> str:
    """Every block of these sections, in order, as one shell script."""
    steps = ["set -eux"]
    for language, file, content in (block for title in titles for block in blocks(section(title))):
        if file:
            steps.append(f"cat > {file} <<'END_OF_BLOCK'\n{content}END_OF_BLOCK")
        elif language == "python":
            steps.append(f"python - <<'END_OF_BLOCK'\n{content}END_OF_BLOCK")
        elif language == "sh" or slow:
            assert language in ("sh", "sh slow"), language
            steps.append(content)
    return "\n".join(steps)


def environment(folder: Path) -> dict[str, str]:
    """The variables of a virtual environment in which the running one's packages are seen, and pip stays offline."""
    venv.create(folder / "venv", with_pip=False)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    running = {sysconfig.get_paths()[key] for key in ("purelib", "platlib")}
    (packages / "zz-running.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in sorted(running)))
    for name, code in {
        "pip": "import runpy; runpy.run_module('pip', run_name='__main__')",
        "pytest": "import runpy; runpy.run_module('pytest', run_name='__main__')",
        "ldmkit": "import sys; from ldmkit.cli import main; sys.exit(main())",
        "twine": UPLOAD,
    }.items():
        command = folder / "venv" / "bin" / name
        command.write_text(f"#!{folder / 'venv' / 'bin' / 'python'}\n{code}\n")
        command.chmod(0o755)
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH", "")]))
    pip = {
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }
    pip["PIP_QUIET"] = "1"
    bins = f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LDMKIT_", "PIP_", "PYTEST_"))}
    return {**kept, **pip, "PATH": bins, "PYTHONPATH": path, "PYTHON": "python"}


def follow(folder: Path, *titles: str, slow: bool) -> str:
    """Do what these sections say, in an empty folder. Returns all that was printed."""
    (folder / "work").mkdir()
    command = ["bash", "-c", script(*titles, slow=slow)]
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run(command, cwd=folder / "work", env=environment(folder), check=False, **options)
    assert done.returncode == 0, done.stdout
    return str(done.stdout)
