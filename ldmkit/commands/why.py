"""`ldmkit plugins --why NAME`: why a plugin or a part is in use, or is not."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import metadata

from ldmkit.errors import PartClashError, UnknownPartError
from ldmkit.plugin.manager import DISABLE, Plugin
from ldmkit.plugin.registry import Registry
from ldmkit.plugin.requirements import install_line, unmet
from ldmkit.plugin.spec import API_VERSION, EXTENSION_KINDS, KINDS


def why(registry: Registry, name: str) -> str:
    """All there is to say of a plugin or distribution called so, and of every part, extension and kernel called so.

    Raises:
        UnknownPartError: when nothing is called so, with close names.
    """
    said = [_of_plugin(plugin) for plugin in registry.plugins if plugin.called(name)]
    said += [_of_part(registry, kind, name) for kind in (*KINDS, *EXTENSION_KINDS) if registry.offers(kind, name)]
    said += _of_kernels(registry, name)
    if not said:
        known = {word for plugin in registry.plugins for word in (plugin.distribution, plugin.entry_point) if word}
        known |= {row.name for plugin in registry.plugins for row in plugin.rows}
        known |= {kernel.backend for plugin in registry.plugins for kernel in plugin.kernels}
        close = get_close_matches(name, sorted(known), n=3, cutoff=0.6)
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else "; `ldmkit plugins` lists what there is"
        raise UnknownPartError(f"no installed plugin, distribution or part is called {name!r}{hint}")
    return "\n\n".join(said)


def _of_plugin(plugin: Plugin) -> str:
    lines = [f"plugin {plugin}, module {plugin.module}{_place(plugin)}"]
    lines.append(f"state: {plugin.state}" + (f": {plugin.error}" if plugin.error else ""))
    if plugin.state != "blocked":
        lines.append(f"loaded in {1000 * plugin.seconds:.0f} ms")
        declared = f"plugin API {plugin.api}" if plugin.api else "any plugin API (it declares none)"
        lines.append(f"works with {declared}; this ldmkit has {'.'.join(map(str, API_VERSION))}")
    lacking = [str(need) for need in unmet(plugin.distribution)]
    if lacking:
        lines.append(f"lacks what it requires: {install_line(*lacking)}")
    lines += [f"offers the {component.kind} {component.name!r} ({component.target})" for component in plugin.rows]
    lines += [f"offers the kernel {kernel.backend!r} of {kernel.op} ({kernel.target})" for kernel in plugin.kernels]
    text = "\n  ".join(lines)
    return text if not plugin.traceback else f"{text}\n{plugin.traceback.rstrip()}"


def _of_part(registry: Registry, kind: str, name: str) -> str:
    """Whose it is and why, or why it is nobody's."""
    try:
        used = registry.find(kind, name)
    except PartClashError as clash:
        return str(clash)
    offers, bare = registry.offers(kind, name), name.rpartition(":")[2]
    (plugin,) = (plugin for plugin, component in offers if component is used)
    reason = "no other plugin offers it" if len(offers) == 1 else "it is built in, and a built-in part keeps its name"
    lines = [f"the {kind} {name!r} is {used.target} of {plugin}: {reason}"]
    lines += [message for message in registry.shadowed() if message.startswith(f"the {kind} {bare!r} of ")]
    return "\n  ".join(lines)


def _of_kernels(registry: Registry, name: str) -> list[str]:
    """One sentence for each op that has a backend called so."""
    offers: dict[str, list[tuple[Plugin, str]]] = {}
    for plugin in registry.plugins:
        for kernel in plugin.kernels:
            if kernel.backend == name:
                offers.setdefault(kernel.op, []).append((plugin, kernel.target))
    said = []
    for op, found in offers.items():
        what = f"the kernel {name!r} of {op} is"
        if len(found) > 1:
            said.append(f"{what} offered by {' and by '.join(str(p) for p, _ in found)}; block one with {DISABLE}")
        else:
            (plugin, target), *_ = found
            said.append(f"{what} {target} of {plugin}: it runs where it is named, and nowhere else")
    return said


def _place(plugin: Plugin) -> str:
    """Where the distribution is installed."""
    try:
        return f", in {metadata.distribution(plugin.distribution).locate_file('')}"
    except (metadata.PackageNotFoundError, ValueError):
        return ""
