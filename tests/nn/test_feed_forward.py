"""The feed-forward takes the fused product only where its linear layer is a plain one."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from ldmkit.kernels import geglu, record
from ldmkit.nn.transformer import GEGLU, FeedForward


class Adapted(nn.Linear):
    """A low-rank adapter, as a subclass."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(dim=-1, keepdim=True)


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class Quantised(Tensor):
    """A weight of whole quarters under a tensor subclass that converts itself where it is used."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is nn.functional.linear:
            x, weight, bias = args
            return func(x, weight.as_subclass(Tensor) / 4, bias)
        return super().__torch_function__(func, types, args, kwargs or {})


def adapter(layer: GEGLU) -> None:
    adapted = Adapted(8, 12)
    adapted.load_state_dict(layer.proj.state_dict())
    layer.proj = adapted


def forward_hook(layer: GEGLU) -> None:
    layer.proj.register_forward_hook(lambda module, args, output: output + 1)


def forward_pre_hook(layer: GEGLU) -> None:
    layer.proj.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(layer: GEGLU) -> None:
    layer.proj.register_full_backward_hook(lambda module, grad_in, grad_out: None)


def parametrization(layer: GEGLU) -> None:
    parametrize.register_parametrization(layer.proj, "weight", Doubled())


def own_forward(layer: GEGLU) -> None:
    """As Accelerate's offloading does it."""
    forward = layer.proj.forward
    layer.proj.forward = lambda x: forward(x) - 1  # type: ignore[method-assign]


def quantised(layer: GEGLU) -> None:
    values = (4 * layer.proj.weight).round().detach().as_subclass(Quantised)
    layer.proj.weight = nn.Parameter(values, requires_grad=False)


MODIFICATIONS = [adapter, forward_hook, forward_pre_hook, backward_hook, parametrization, own_forward, quantised]


@pytest.fixture
def layer() -> GEGLU:
    torch.manual_seed(0)
    return GEGLU(8, 6)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


def ops(layer: GEGLU, x: Tensor) -> tuple[Tensor, list[str]]:
    with record() as calls:
        y = layer(x)
    return y, [call.op for call in calls]


def test_a_plain_linear_layer_is_fused(layer: GEGLU, x: Tensor) -> None:
    y, ran = ops(layer, x)
    assert ran[0] == "geglu_linear"
    torch.testing.assert_close(y, geglu(layer.proj(x)))


@pytest.mark.parametrize("modify", MODIFICATIONS, ids=lambda m: m.__name__)
def test_anything_else_on_it_is_called(layer: GEGLU, x: Tensor, modify: Callable[[GEGLU], None]) -> None:
    before = layer(x)
    modify(layer)
    y, ran = ops(layer, x)
    assert ran == ["geglu"]
    assert torch.equal(y, geglu(layer.proj(x)))
    assert modify is backward_hook or not torch.allclose(y, before)


@pytest.fixture
def seen() -> Iterator[list[nn.Module]]:
    modules: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, args, output: modules.append(module))
    yield modules
    handle.remove()


def test_hooks_on_all_modules_see_it(layer: GEGLU, x: Tensor, seen: list[nn.Module]) -> None:
    assert ops(layer, x)[1] == ["geglu"]
    assert seen == [layer.proj, layer]


def test_names_in_the_state_dict() -> None:
    names = {"net.0.proj.weight", "net.0.proj.bias", "net.2.weight", "net.2.bias"}
    assert set(FeedForward(8).state_dict()) == names


def test_compiles_whole(layer: GEGLU, x: Tensor) -> None:
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
