"""Holds a plugin's parts and kernels to what the interfaces promise, from outside."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldmkit import __version__
from ldmkit.commands.table import table
from ldmkit.errors import InputError, MissingDependencyError, PluginError
from ldmkit.plugin.manager import CORE, Plugin, canonical
from ldmkit.plugin.registry import registry
from ldmkit.plugin.spec import Extension
from ldmkit.plugin.targets import load_target


def check(what: str, *, examples: int, as_json: bool) -> int:
    """Prints a table for each part. Returns 1 where a property does not hold.

    Args:
        what: an installed distribution or entry point, or "dist:name" for one of its parts; or else the folder of a plugin's
            source, which is read where it lies.
        examples: drawn for each property, at least 1.

    Raises:
        InputError: nothing of that name is installed, or the folder holds no plugin; too few examples.
        PluginError: the plugin fails, is blocked, or offers nothing to check.
    """
    if examples < 1:
        raise InputError(f"--examples {examples}: at least one case is drawn for each property")
    if importlib.util.find_spec("hypothesis") is None:
        raise MissingDependencyError("`ldmkit plugin check` draws its cases with hypothesis; `pip install hypothesis`")
    if Path(what).is_dir() and not any(plugin.called(what) for plugin in registry().plugins):
        return _check_source(Path(what), examples=examples, as_json=as_json)
    from ldmkit.testing import conformance

    dist, _, wanted = what.partition(":")
    plugins = _plugins(dist)
    subjects = [subject for plugin in plugins for subject in _offered(plugin, wanted, conformance)]
    others = [] if wanted else [_loads(plugin, row) for plugin in plugins for row in plugin.extensions]
    if wanted and not subjects:
        names = [row.name for plugin in plugins for row in plugin.components]
        names += [row.backend for plugin in plugins for row in plugin.kernels]
        raise InputError(f"{dist} has no part or kernel backend {wanted!r}; it has {', '.join(names) or 'none'}")
    if not subjects:
        held = f" (it offers the {', the '.join(others)}, which can be loaded: its own tests hold them)" if others else ""
        raise PluginError(f"{what}: there is a suite for nothing in it{held}")
    reports = []
    for i, subject in enumerate(subjects, start=1):
        with _progress(f"{i} of {len(subjects)}: {subject}") as progress:
            report = conformance.check(subject, examples=examples, progress=progress)
        reports.append(report)
        if not as_json:
            print(report.table(), end="\n\n", flush=True)
    passed = all(report.passed for report in reports)
    if len(reports) > 1 and not as_json:
        rows = [(report.kind, report.name, report.summary()) for report in reports]
        print(table(("kind", "name", "properties"), rows), end="\n\n")
    if as_json:
        versions = {plugin.distribution: plugin.version for plugin in plugins} | {"ldmkit": __version__}
        plain = {"passed": passed, "versions": versions, "reports": [report.as_dict() for report in reports]}
        plain |= {"without_suite": others}
        print(json.dumps(plain, indent=2))
    elif others:
        print(f"There is no suite for the {', the '.join(others)}, which can be loaded: its own tests hold them.")
    elif canonical(what) == CORE:
        print("Its kernels are tried by `ldmkit verify all`.")
    return 0 if passed else 1


def _plugins(what: str) -> list[Plugin]:
    """Those of that name, which all work."""
    plugins = [plugin for plugin in registry().plugins if plugin.called(what)]
    if not plugins:
        known = sorted(f"{plugin.entry_point} (of {plugin.distribution})" for plugin in registry().plugins)
        raise InputError(f"no plugin or distribution is called {what!r}, and no folder; there are {', '.join(known)}")
    for plugin in plugins:
        if plugin.state != "ok":
            where = f"\n{plugin.traceback.rstrip()}" if plugin.traceback else ""
            raise PluginError(f"{plugin} {plugin.state}: {plugin.error}{where}")
    return plugins


def _offered(plugin: Plugin, wanted: str, conformance: Any) -> Iterator[Any]:
    """What there is a suite for; only the parts and kernels of one name, unless that is ""."""
    for component in plugin.components:
        if wanted in ("", component.name):
            name = f"{plugin.distribution or plugin.entry_point}:{component.name}"
            yield conformance.pipeline(name) if component.kind == "pipeline" else conformance.subject(component.kind, name)
    for kernel in plugin.kernels:
        if wanted in ("", kernel.backend):
            yield conformance.kernel(kernel.op, backend=kernel.backend)


def _loads(plugin: Plugin, row: Extension) -> str:
    """What there is no suite for. Raises: PluginError where it cannot be imported, or is not what its hook demands."""
    load_target(plugin, row)
    return f"{row.kind} {row.name!r}"


def _check_source(folder: Path, *, examples: int, as_json: bool) -> int:
    """In a process of its own, with the folder's package on the path and described as if it were installed."""
    import tempfile

    project = _project(folder)
    sources = folder / "src" if (folder / "src").is_dir() else folder
    with tempfile.TemporaryDirectory() as site:
        info = Path(site) / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        (info / "METADATA").write_text(metadata, encoding="utf-8")
        points = project["entry-points"]["ldmkit"]
        lines = ["[ldmkit]", *(f"{name} = {target}" for name, target in points.items())]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        path = os.pathsep.join(filter(None, [site, str(sources.resolve()), os.environ.get("PYTHONPATH", "")]))
        command = [sys.executable, "-m", "ldmkit.cli", "plugin", "check", project["name"], "--examples", str(examples)]
        command += ["--json"] if as_json else []
        return subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode


def _project(folder: Path) -> dict[str, Any]:
    try:
        project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        project["entry-points"]["ldmkit"]
    except (OSError, KeyError, tomllib.TOMLDecodeError) as error:
        raise InputError(
            f"{folder} holds no plugin: its pyproject.toml needs [project.entry-points.ldmkit]; {type(error).__name__}: {error}"
        ) from None
    return {"version": "0", **project}


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None] | None]:
    """Tells a terminal which property is being tried, in a line that is gone afterwards; a log, which part is."""
    if not sys.stderr.isatty():
        print(what, file=sys.stderr, flush=True)
        yield None
        return
    try:
        yield lambda prop: print(f"\r\033[K{what}: {prop}", end="", file=sys.stderr, flush=True)
    finally:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
