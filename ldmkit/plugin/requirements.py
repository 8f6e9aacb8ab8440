"""What a plugin's distribution needs and this environment lacks, as a line to paste."""

from __future__ import annotations

import shlex
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement


def unmet(distribution: str) -> tuple[Requirement, ...]:
    """Requirements of an installed distribution (those of its extras apart) that are not installed, or in another version."""
    try:
        stated = metadata.distribution(distribution).requires or []
    except (metadata.PackageNotFoundError, ValueError):  # no such distribution, or no name
        return ()
    lacking = [need for need in map(_parsed, stated) if need is not None and not _met(need)]
    for need in lacking:
        need.marker = None  # it holds here, and is not for pip's command line
    return tuple(lacking)


def install_line(*requirements: str) -> str:
    """pip install '...' '...'."""
    return f"pip install {' '.join(map(shlex.quote, requirements))}"


def hint(error: ImportError, distribution: str) -> str:
    """What to install after an import failed for a plugin of this distribution; "" where its own code is at fault."""
    lacking = unmet(distribution)
    if lacking:
        described = ", ".join(f"{need} ({_state(need)})" for need in lacking)
        return f"{distribution} requires {described}: {install_line(*map(str, lacking))}"
    missing = (error.name or "").partition(".")[0]
    if isinstance(error, ModuleNotFoundError) and missing:
        return (
            f"is {missing!r} installed? {distribution or 'its distribution'} does not say that it needs it: "
            f"{install_line(missing)} (if its package is called so), and tell its author"
        )
    return ""


def _parsed(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:  # a stranger's metadata; pip would have refused it
        return None


def _met(need: Requirement) -> bool:
    if need.marker is not None and not need.marker.evaluate({"extra": ""}):
        return True
    version = _installed(need)
    return version is not None and need.specifier.contains(version, prereleases=True)


def _installed(need: Requirement) -> str | None:
    try:
        return metadata.version(need.name)
    except metadata.PackageNotFoundError:
        return None


def _state(need: Requirement) -> str:
    version = _installed(need)
    return "not installed" if version is None else f"{version} is installed"
