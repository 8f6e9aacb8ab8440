"""Writes a plugin from the templates that come with ldmkit."""

from __future__ import annotations

import datetime
import importlib.util
import keyword
import re
import shutil
import string
import sys
import tempfile
from pathlib import Path
from typing import Any

from ldmkit import __version__
from ldmkit.errors import InputError, OutputError
from ldmkit.plugin.registry import registry
from ldmkit.plugin.spec import API_VERSION, RESERVED

TEMPLATES = Path(__file__).parent.parent / "templates" / "plugin"
LONGEST = 40
"""Characters of a name, so that what is written fits its lines."""
EXAMPLES = {
    "conditioner": '\n        inputs=("a cat", "two dogs in the snow, under a red moon", "fog"),',
    "denoiser": '\n        configs=({"width": 8},),\n        condition={"tokens_BLC": "token_channels"},',
}
"""What the example of a kind says beyond its name."""


def write_plugin(name: str, kind: str, *, into: Path) -> Path:
    """Write the folder NAME of a complete distribution. Nothing is overwritten, and a failure leaves nothing behind.

    Raises:
        InputError: for a name that no package can have, or that is taken.
        OutputError: where the folder exists, or cannot be written.
    """
    words = _words(name, kind)
    target = into / name
    if target.exists():
        raise OutputError(f"{target} exists; nothing is overwritten: choose another name, or another folder with --into")
    try:
        into.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=into))
    except OSError as error:
        raise OutputError(f"{into} cannot be written: {error.strerror}") from None
    try:
        for path, template in _files(kind, words["package"]).items():
            file = work / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(string.Template(template.read_text(encoding="utf-8")).substitute(words), encoding="utf-8")
        (work / "ci.sh").chmod(0o755)
        if kind == "pipeline":
            _make_weights(work / "src" / words["package"])
        work.chmod(0o755)
        work.rename(target)
    except OSError as error:
        raise OutputError(f"{target} cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _words(name: str, kind: str) -> dict[str, str]:
    """What the templates' placeholders stand for."""
    if len(name) > LONGEST or not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise InputError(
            f"plugin name {name!r}: use lower-case words joined with hyphens, like 'ldmkit-mine', {LONGEST} characters at most"
        )
    package, part = name.replace("-", "_"), name.removeprefix("ldmkit-")
    if keyword.iskeyword(package) or package in sys.stdlib_module_names or importlib.util.find_spec(package) is not None:
        raise InputError(f"plugin name {name!r}: a module {package!r} exists already; choose another name")
    _check_free(part, kind)
    cls = "".join(word.capitalize() for word in part.removesuffix(f"-{kind}").split("-")) + kind.capitalize()
    return {
        "dist": name,
        "package": package,
        "part": part,
        "kind": kind,
        "module": kind,
        "cls": cls if cls.isidentifier() else f"Ldmkit{cls}",  # ldmkit-2x
        "api": f">={API_VERSION[0]}.{API_VERSION[1]},<{API_VERSION[0] + 1}",
        "ldmkit": __version__,
        "year": str(datetime.date.today().year),
        "example": EXAMPLES.get(kind, ""),
        "usage": _usage(kind, part),
    }


def _check_free(part: str, kind: str) -> None:
    if part in (RESERVED if kind == "kernel" else registry().available(kind)):
        raise InputError(f"there is {'an' if kind[0] == 'a' else 'a'} {kind} {part!r} already; choose another name")


def _usage(kind: str, part: str) -> str:
    if kind == "pipeline":
        return f'import ldmkit\n\npipe = ldmkit.Pipeline.from_pretrained("{part}")'
    if kind == "kernel":
        return f'import torch\nfrom ldmkit import kernels\n\nkernels.geglu(torch.ones(2, 8), backend="{part}")'
    return f'import ldmkit\n\npart = ldmkit.build("{kind}", "{part}")'


def _files(kind: str, package: str) -> dict[str, Path]:
    """Path in the new folder => template; a kind's own template goes before the common one."""
    places = {
        "__init__.py": f"src/{package}/__init__.py",
        "py.typed": f"src/{package}/py.typed",
        f"{kind}.py": f"src/{package}/{kind}.py",
        "test_part.py": f"tests/test_{kind}.py",
    }
    found: dict[str, Path] = {}
    for folder in (TEMPLATES / "common", TEMPLATES / kind):
        for template in sorted(folder.glob("*.tmpl")):
            name = template.name.removesuffix(".tmpl")
            found[places.get(name, name)] = template
    return found


def _make_weights(package: Path) -> None:
    """Runs the new module's own `make`, so that the pipeline can be loaded as it is."""
    location = importlib.util.spec_from_file_location("ldmkit_new_pipeline", package / "pipeline.py")
    assert location is not None
    assert location.loader is not None
    module: Any = importlib.util.module_from_spec(location)
    location.loader.exec_module(module)
    module.make(package / "weights")
    shutil.rmtree(package / "__pycache__", ignore_errors=True)
