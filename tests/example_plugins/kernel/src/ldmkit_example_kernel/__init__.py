"""One more backend of geglu. Light: its own module, and torch, are imported when the backend is asked for."""

from collections.abc import Iterable

from ldmkit.plugin.spec import Kernel, hookimpl


@hookimpl
def ldmkit_api() -> str:
    """The plugin interface it was written for."""
    return ">=1.0,<2"


@hookimpl
def ldmkit_kernels() -> Iterable[Kernel]:
    """geglu in double precision."""
    yield Kernel(
        op="geglu",
        backend="example-wide",
        target="ldmkit_example_kernel.geglu:Wide",
        device="cpu",
        dtypes=("float32", "bfloat16", "float16"),
        summary="Computed in float64 and rounded once.",
    )
