"""GroupNorm then SiLU, against its formula in float64."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ldmkit.errors import InputError, InputTypeError
from ldmkit.kernels import group_norm_silu
from tests.kernels.oracle import DTYPES, assert_within_bound, layouts, randn, seeds, strided, values_and_gradients


def oracle(x, num_groups, weight, bias, eps, silu):
    """Wu and He 2018, eq. 1 and 2, in two passes."""
    if x.numel() == 0:
        return x * weight.sum() + bias.sum()
    grouped = x.reshape(x.shape[0], num_groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    normal = (centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    shape = (1, -1) + (1,) * (x.dim() - 2)
    y = normal * weight.view(shape) + bias.view(shape)
    return y * torch.sigmoid(y) if silu else y


def plain(x, num_groups, weight, bias, eps, silu):
    y = torch.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


@given(
    batch=st.integers(0, 3),
    groups=st.integers(1, 4),
    per_group=st.sampled_from([1, 2, 3, 10]),
    spatial=st.lists(st.integers(1, 4), max_size=3),
    dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 1.0, 100.0]),
    layout=st.one_of(layouts, st.just("channels_last")),
    silu=st.booleans(),
    seed=seeds,
)
def test_values_and_gradients(batch, groups, per_group, spatial, dtype, offset, layout, silu, seed):
    channels = groups * per_group
    x = randn((batch, channels, *spatial), seed, torch.float64).add(offset).to(dtype)
    if layout == "channels_last":
        x = x.to(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim(), torch.contiguous_format))
    else:
        x = strided(x, layout)
    weight, bias = randn((channels,), seed + 1, dtype), randn((channels,), seed + 2, dtype)
    grad = randn(x.shape, seed + 3, dtype)
    truth, got, theirs = (
        values_and_gradients(lambda *t, op=op: op(t[0], groups, t[1], t[2], 1e-5, silu=silu), inputs, g)
        for op, inputs, g in (
            (oracle, [x.double(), weight.double(), bias.double()], grad.double()),
            (group_norm_silu, [x, weight, bias], grad),
            (plain, [x, weight, bias], grad),
        )
    )
    worst = 1.0
    if x.numel():
        grouped = x.double().reshape(batch, groups, -1)
        worst += (grouped.mean(2).abs() / (grouped.var(2, unbiased=False) + 1e-5).sqrt()).max().item()
    assert_within_bound(got, theirs, truth, dtype, worst)


@given(silu=st.booleans(), groups=st.sampled_from([1, 2, 4]), seed=seeds)
def test_without_gradients_the_same_values_and_x_is_left_alone(silu, groups, seed):
    x = randn((2, 4, 3, 3), seed)
    before = x.clone()
    y = group_norm_silu(x, groups, silu=silu)
    assert torch.equal(x, before)
    assert torch.equal(y, group_norm_silu(x.requires_grad_(), groups, silu=silu))


def test_groups_of_one_channel_and_of_all_are_instance_and_layer_norm():
    x = randn((2, 6, 3, 5), 0)
    torch.testing.assert_close(group_norm_silu(x, 6, silu=False), F.instance_norm(x))
    torch.testing.assert_close(group_norm_silu(x, 1, silu=False), F.layer_norm(x, x.shape[1:]))


def test_channels_last_stays_in_both_directions():
    x = randn((2, 8, 3, 5), 0).to(memory_format=torch.channels_last).requires_grad_()
    y = group_norm_silu(x, 4)
    assert y.is_contiguous(memory_format=torch.channels_last)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, group_norm_silu(x.contiguous(), 4))


@pytest.mark.parametrize("shape", [(0, 4, 2, 2), (2, 4, 0, 3)])
def test_nothing_in_gives_nothing_out_and_gradients_of_zero(shape):
    x, weight, bias = (
        torch.zeros(shape, requires_grad=True),
        torch.ones(4, requires_grad=True),
        torch.ones(4, requires_grad=True),
    )
    y = group_norm_silu(x, 2, weight, bias)
    assert y.shape == shape
    for gradient in torch.autograd.grad(y.sum(), [weight, bias]):
        assert torch.equal(gradient, torch.zeros(4))


def test_one_pixel_and_groups_of_one_value():
    weight, bias = randn((4,), 0), randn((4,), 1)
    y = group_norm_silu(torch.ones(1, 4, 1, 1), 4, weight, bias)[0, :, 0, 0]
    truth = F.silu(bias.double())
    assert_within_bound([y.double()], [truth], [truth], torch.float32, c=1 + 1 / math.sqrt(1e-5))


def test_gradcheck_twice():
    x, w, b = (randn(shape, i).double().requires_grad_() for i, shape in enumerate([(2, 4, 3), (4,), (4,)]))
    assert torch.autograd.gradcheck(lambda *t: group_norm_silu(t[0], 2, *t[1:]), (x, w, b))
    assert torch.autograd.gradgradcheck(lambda *t: group_norm_silu(t[0], 2, *t[1:]), (x, w, b))


def test_autocast_takes_weights_of_another_dtype():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = group_norm_silu(randn((2, 4, 3), 0, torch.bfloat16), 2, torch.ones(4), torch.zeros(4))
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("x", "groups", "weight", "error", "told"),
    [
        (torch.zeros(4), 2, None, InputError, r"shape \(4,\)"),
        (torch.zeros(1, 10, 2), 4, None, InputError, "10 channels cannot be split into 4"),
        (torch.zeros(1, 10, 2), 0, None, InputError, "into 0 groups"),
        (torch.zeros(1, 4, 2), 2, torch.ones(3), InputError, r"weight has shape \(3,\)"),
        (torch.zeros(1, 4, 2), 2, torch.ones(4, device="meta"), InputError, "weight is on meta"),
        (torch.zeros(1, 4, 2), 2, torch.ones(4).double(), InputTypeError, "weight is torch.float64"),
        (torch.zeros(1, 4, 2, dtype=torch.int32), 2, None, InputTypeError, r"x is torch\.int32"),
    ],
)
def test_bad_input(x, groups, weight, error, told):
    with pytest.raises(error, match=told):
        group_norm_silu(x, groups, weight)
