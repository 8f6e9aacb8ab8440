"""What parts that are networks promise, beside what all parts do: they move, learn, compile, and keep images apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ldmkit.testing.conformance.common import Use
from ldmkit.testing.conformance.core import Property, Trial, alike, apart, same_bits


def moves(t: Trial) -> None:
    """`.to(device)` moves all that a network computes with: its tensors are parameters or buffers."""
    part = t.network(torch.float32)
    for path, tensor in _held(part):
        raise AssertionError(f"{path} {tuple(tensor.shape)} is neither a parameter nor a buffer, and would stay behind")
    part.to("meta")
    behind = [name for name, tensor in part.state_dict(keep_vars=True).items() if not tensor.is_meta]
    assert not behind, f"{', '.join(behind)} stays behind"


def _held(part: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors in plain attributes."""
    for path, module in part.named_modules():
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers", "_modules"):
                continue
            items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
            for item in items:
                if isinstance(item, Tensor):
                    yield f"{path}.{name}".lstrip("."), item


def _roomy(t: Trial) -> Trial:
    """The case on larger images: where attention sees one pixel only, its queries and keys have no part in it."""
    return Trial(t.subject, {**t.case, **{name: 2 for name in ("height", "width") if name in t.case}})


def properties_of_networks(use: Use, kind: str, methods: Sequence[str], *, fullgraph: bool) -> tuple[Property, ...]:
    """The properties of networks, given how one is used, the public name of its interface, and the methods that
    `torch.compile` is tried on: each as one graph, or with breaks.
    """

    def dtypes(t: Trial) -> None:
        """`.to(dtype)` decides what a network computes in: bfloat16, float32 and float64 all work, and the last two agree."""
        results = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            part = t.network(torch.float32).to(dtype)
            wrong = [name for name, weight in part.named_parameters() if weight.is_floating_point() and weight.dtype != dtype]
            assert not wrong, f"after .to({dtype}), {wrong[0]} is not"
            results[dtype] = use(part, t, dtype)
            for y in results[dtype]:
                if y.is_floating_point():
                    assert y.dtype == dtype, f"in {dtype} it gives {y.dtype}"
                    assert y.isfinite().all(), f"not finite in {dtype}"
        for wide, single in zip(results[torch.float64], results[torch.float32], strict=True):
            assert alike(wide.to(single.dtype), single), f"float32 against float64: {apart(single, wide.to(single.dtype))}"

    @torch.enable_grad()
    def learns(t: Trial) -> None:
        """Gradients reach every parameter that is to be trained."""
        part, t = t.network(torch.float32), _roomy(t)
        outputs = [y for y in use(part, t) if y.requires_grad]
        wanted = [name for name, weight in part.named_parameters() if weight.requires_grad]
        if not wanted:
            return
        assert outputs, "no output depends on any parameter"
        for i, y in enumerate(outputs):
            y.backward(t.normal(*y.shape, stream=70 + i, dtype=y.dtype), retain_graph=True)
        dead = [
            name
            for name, weight in part.named_parameters()
            if name in wanted and weight.numel() and (weight.grad is None or not bool((weight.grad != 0).any()))
        ]
        assert not dead, f"no gradient reaches {', '.join(dead[:5])}" + (
            f" and {len(dead) - 5} others" if len(dead) > 5 else ""
        )

    def compiles(t: Trial) -> None:
        """`torch.compile` traces a network, and what it traced computes the same bits."""
        part = t.network(torch.float32)
        want = use(part, t)
        torch.compiler.reset()
        for name in methods:
            setattr(part, name, torch.compile(getattr(part, name), backend="eager", fullgraph=fullgraph))
        got = use(part, t)
        torch.compiler.reset()
        for a, b in zip(got, want, strict=True):
            assert same_bits(a, b), f"compiled: {apart(a, b)}"

    return (
        Property("device moves", moves, kind, once=True),
        Property("dtype moves", dtypes, kind),
        Property("gradients reach every parameter", learns, kind),
        Property("torch.compile", compiles, kind, once=True),
    )
