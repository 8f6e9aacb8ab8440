"""Drawn calls of group_norm_silu, and what every kernel for a GPU must do with them, whichever backend runs it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from ldmkit.kernels import group_norm_silu
from tests.kernels.oracle import DTYPES, assert_within_bound, randn, seeds, strided, values_and_gradients

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class GroupNormCall:
    """The tensors of a call, those that are left out None, and the incoming gradient."""

    x: Tensor
    groups: int
    weight: Tensor | None
    bias: Tensor | None
    silu: bool
    shift: Tensor | None
    residual: Tensor | None
    grad: Tensor

    def run(self, op, convert=lambda t: t) -> list[Tensor]:
        """The output and the gradients of all that is there, in float64."""
        tensors = {k: convert(t) for k in ("x", "weight", "bias", "shift", "residual") if (t := getattr(self, k)) is not None}

        def call(*given: Tensor) -> Tensor:
            named = dict.fromkeys(("weight", "bias", "shift", "residual")) | dict(zip(tensors, given, strict=True))
            return op(
                named["x"], self.groups, named["weight"], named["bias"], 1e-5, self.silu, named["shift"], named["residual"]
            )

        return values_and_gradients(call, list(tensors.values()), convert(self.grad))


def _hidden(x, shift, residual):
    h = x if shift is None else x + shift.view(*shift.shape, *(1,) * (x.dim() - 2))
    return h if residual is None else h + residual


def oracle(x, groups, weight, bias, eps, silu, shift, residual):
    """Wu and He 2018, eq. 1 and 2, in two passes."""
    h = _hidden(x, shift, residual)
    grouped = h.reshape(h.shape[0], groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    y = (centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(h.shape)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = y if weight is None else y * weight.view(shape)
    y = y if bias is None else y + bias.view(shape)
    return y * torch.sigmoid(y) if silu else y


def plain(x, groups, weight, bias, eps, silu, shift, residual):
    if weight is None and bias is not None:
        weight = torch.ones_like(bias)  # torch 2.13 cannot differentiate with a bias alone
    y = torch.group_norm(_hidden(x, shift, residual), groups, weight, bias, eps)
    return F.silu(y) if silu else y


def formatted(x: Tensor, channels_last: bool) -> Tensor:
    return x.contiguous(memory_format=FORMATS[x.dim()]) if channels_last and x.dim() in FORMATS else x


@st.composite
def calls(draw) -> GroupNormCall:
    """Small calls of every kind: odd channels, pixels that no vector divides, one pixel, views, large means."""
    batch, groups = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    channels = groups * draw(st.sampled_from([1, 2, 3, 4, 8, 10, 16, 30]))
    spatial = draw(st.sampled_from([(), (1, 1), (7,), (8,), (5, 7), (4, 4), (2, 3, 4), (8, 16), (16, 24)]))
    dtype, seed, last = draw(st.sampled_from(DTYPES)), draw(seeds), draw(st.booleans())
    offset = draw(st.sampled_from([0.0, 1.0, 100.0, 1e4]))
    shape = (batch, channels, *spatial)

    def tensor(number, shape, layout="dense"):
        return formatted(strided(randn(shape, seed + number, dtype), layout), last)

    def maybe(number, shape):
        return tensor(number, shape) if draw(st.booleans()) else None

    x = formatted(
        strided(randn(shape, seed, torch.float64).add(offset).to(dtype), draw(st.sampled_from(["dense", "offset"]))), last
    )
    if draw(st.booleans()):
        x = torch.cat([x, x], dim=0)[::2][:batch] if batch % 2 == 0 else x  # images that are not neighbours
    grad = tensor(9, shape, draw(st.sampled_from(["dense", "sliced" if spatial else "dense"])))
    weight, bias = maybe(1, (channels,)), maybe(2, (channels,))
    return GroupNormCall(x, groups, weight, bias, draw(st.booleans()), maybe(3, shape[:2]), maybe(4, shape), grad)


def assert_accurate(call: GroupNormCall, backend: str, device: str = "cpu") -> None:
    """Output and gradients within the contract's bound, and in x's memory format."""

    def kernel(x, groups, weight, bias, eps, silu, shift, residual):
        return group_norm_silu(x, groups, weight, bias, eps, silu=silu, shift=shift, residual=residual, backend=backend)

    got = call.run(kernel, lambda t: t.to(device))
    truth, theirs = call.run(oracle, Tensor.double), call.run(plain)
    h = _hidden(*(None if t is None else t.double() for t in (call.x, call.shift, call.residual)))
    grouped = h.reshape(h.shape[0], call.groups, -1)
    worst = 1 + (grouped.mean(2).abs() / (grouped.var(2, unbiased=False) + 1e-5).sqrt()).max().item()
    assert_within_bound([t.cpu() for t in got], theirs, truth, call.x.dtype, worst)
