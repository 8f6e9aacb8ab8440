"""What ldmkit promises, read from its sources alone, so that neither Python's version nor torch's changes a line of it.

python -m tests.public_api    # records it anew, in tests/public_api.txt
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECORD = Path(__file__).with_suffix(".txt")
MODULES = (
    "ldmkit",
    "ldmkit.kernels",
    "ldmkit.nn",
    "ldmkit.plugin.spec",
    "ldmkit.testing.accuracy",
    "ldmkit.testing.conformance",
    "ldmkit.testing.contract",
    "ldmkit.testing.oracles",
    "ldmkit.testing.strategies",
)
"""All public names of these."""
NAMES = ("ldmkit.pipeline.PipelineOutput", "ldmkit.training.data.Pictures", "ldmkit.training.recipes.DataConfig")
"""What hooks' signatures name beside them."""
INNER = ("__post_init__", "__repr__", "__str__")
"""Special methods that are called by nobody but Python."""

Found = tuple[str, ast.stmt]
"""A statement, and the module it stands in."""


def lines() -> list[str]:
    """One for each public name, sorted: where it is, and its signature."""
    names = [*NAMES, *(f"{module}.{name}" for module in MODULES for name in public(module))]
    return sorted({line for name in names for line in described(name, *resolved(*name.rsplit(".", 1)))})


def public(module: str) -> list[str]:
    """`__all__`, or what a module without one defines itself."""
    if hasattr(import_module(module), "__all__"):
        return [name for name in import_module(module).__all__ if name != "__version__"]
    return [name for node in tree(module).body for name in defined(node) if not name.startswith("_")]


def described(name: str, module: str, node: ast.stmt) -> Iterator[str]:
    """The lines of one name: a class has one for itself, and one for each public member."""
    match node:
        case ast.ClassDef():
            yield f"{name}: {marks(node)}class({', '.join(map(ast.unparse, node.bases))})"
            for member, (home, inner) in members(module, node).items():
                yield from described(f"{name}.{member}", home, inner)
        case ast.FunctionDef():
            yield f"{name}: {marks(node)}({ast.unparse(node.args)}) -> {ast.unparse(node.returns) if node.returns else 'Any'}"
        case ast.AnnAssign():
            default = f" = {ast.unparse(node.value)}" if node.value else ""
            yield f"{name}: {ast.unparse(node.annotation)}{default}"
        case ast.Assign():
            yield f"{name} = {ast.unparse(node.value)}"
        case _:
            yield f"{name}: module"


def marks(node: ast.ClassDef | ast.FunctionDef) -> str:
    """Its decorators: whether it is frozen, a property, a context manager."""
    return "".join(f"@{ast.unparse(mark)} " for mark in node.decorator_list)


def members(module: str, node: ast.ClassDef) -> dict[str, Found]:
    """Public members by name: its own, and those inherited from classes of ldmkit."""
    found: dict[str, Found] = {}
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0].split(".")[-1]
        home, parent = resolved(module, name, missing_is_fine=True)
        if isinstance(parent, ast.ClassDef):
            found |= members(home, parent)
    for inner in node.body:
        for name in defined(inner):
            special = name.startswith("__") and name.endswith("__") and name not in INNER
            if special or not name.startswith("_"):
                found[f"{name}.setter" if is_setter(inner) else name] = (module, inner)
    return found


def is_setter(node: ast.stmt) -> bool:
    """Whether it is what a property is assigned through."""
    return isinstance(node, ast.FunctionDef) and any(ast.unparse(mark).endswith(".setter") for mark in node.decorator_list)


def resolved(module: str, name: str, *, missing_is_fine: bool = False) -> Found:
    """Where a name is defined, through imports."""
    found: Found | None = None
    for node in statements(module):
        if name in defined(node):
            found = (module, node)  # of overloads the last one, which says all
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ldmkit":
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    whole = f"{node.module}.{alias.name}"
                    found = (whole, ast.Pass()) if source(whole) else resolved(str(node.module), alias.name)
    if found is None and not missing_is_fine:
        raise LookupError(f"{module} defines no {name}")
    return found or (module, ast.Pass())


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement gives a value to."""
    match node:
        case ast.ClassDef() | ast.FunctionDef():
            return [node.name]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Assign():
            return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
    return []


def statements(module: str) -> Iterator[ast.stmt]:
    """Those of the module, and of `if TYPE_CHECKING:`."""
    for node in tree(module).body:
        yield from node.body if isinstance(node, ast.If) else [node]


def source(module: str) -> Path | None:
    """The file of a module, None where there is none."""
    path = ROOT.joinpath(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@functools.cache
def tree(module: str) -> ast.Module:
    """Its parsed source."""
    file = source(module)
    assert file is not None, module
    return ast.parse(file.read_text(encoding="utf-8"))


if __name__ == "__main__":
    RECORD.write_text("\n".join(lines()) + "\n", encoding="utf-8")
