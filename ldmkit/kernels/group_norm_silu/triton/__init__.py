"""GroupNorm and SiLU in Triton: a slice of groups in one program that keeps it in registers or reads it twice, or, where it is
large, in many: moments (the backward's sums) of each part, then the rest. The cut follows from the shape of one image alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ldmkit.kernels.backends import DTYPES
from ldmkit.kernels.group_norm_silu.triton.backward import backward_kernel, parameters_kernel
from ldmkit.kernels.group_norm_silu.triton.forward import forward_kernel
from ldmkit.kernels.layout import memory_format_of
from ldmkit.kernels.triton_support import TRITON_DTYPES, StaticCase, interpreting

# Elements: of a tile in a loop, and of one kept in registers; bytes: of a slice that one program takes, and of a part. In the
# interpreter all are so small that small shapes come through every mode.
TILE, KEPT, ALONE, PART = (256, 512, 2048, 512) if interpreting() else (4096, 16384, 98304, 32768)
PARAMETER_CHANNELS, PARAMETER_ROWS, PARAMETER_WARPS = 16, 64, 8
PARTS = 256
"""At most: every program of the second launch joins the parts of its groups."""
CHANNELS = 4096
"""Of a group, at most: a tile has all its channels."""


@dataclass(frozen=True)
class Plan:
    """How an image is cut."""

    slices: int
    parts: int
    once: bool
    constants: dict[str, Any]
    warps: int


@functools.lru_cache(maxsize=4096)
def plan(channels: int, pixels: int, groups: int, itemsize: int, last: bool, backward: bool) -> Plan:
    """The cut for one shape of an image. `last`: channels_last."""
    vector, share = 16 // itemsize, 2 if backward else 1
    slice_groups = _slice_groups(channels, pixels, groups, itemsize, last)
    wide = channels // groups * slice_groups
    channels_2, tile = triton.next_power_of_2(wide), TILE * 4 // max(4, itemsize) // share
    kept = channels_2 * triton.next_power_of_2(pixels)
    single = kept <= KEPT * 4 // max(4, itemsize) // share
    block = triton.next_power_of_2(pixels) if single else min(triton.next_power_of_2(pixels), max(1, tile // channels_2))
    once = single or wide * pixels * itemsize * share <= ALONE
    parts = 1 if once else min(triton.cdiv(pixels, block), PARTS, triton.cdiv(wide * pixels * itemsize * share, PART))
    constants = {
        "UNIT_C": vector if channels % vector == 0 else 1,
        "UNIT_S": vector if pixels % vector == 0 else 1,
        "LAST": last,
        "D": channels // groups,
        "SLICE": wide,
        "CHANNELS": channels_2,
        "GROUPS": triton.next_power_of_2(slice_groups),
        "PIXELS": block,
        "PARTS": triton.next_power_of_2(parts),
        "SINGLE": single,
    }
    per_warp = 512 if backward and last and not single else 1024  # such a thread has sums of 8 channels, and would spill
    warps = min(8, max(1, channels_2 * block * share // per_warp))
    return Plan(groups // slice_groups, parts, once, constants, warps)


def _slice_groups(channels: int, pixels: int, groups: int, itemsize: int, last: bool) -> int:
    """So few groups that channels_last rows are whole accesses of at least 64 bytes, and a slice has a few elements."""
    found = 0
    for n in range(1, groups + 1):
        wide = channels // groups * n
        if groups % n or (last and channels * itemsize % 16 == 0 and wide * itemsize % 16):
            continue
        if found and wide > CHANNELS // 16:
            break
        found = n
        if wide * pixels >= TILE // 4 and (not last or wide * itemsize >= 64):
            break
    return found


def dense_images(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """x, or a copy, with dense images that 16-byte accesses can walk wherever their shape allows it."""
    vector = 16 // x.element_size()
    size = x.shape[1] if memory_format != torch.contiguous_format else x[0, 0].numel()
    if not x.is_contiguous(memory_format=memory_format) and not (
        x[:1].is_contiguous(memory_format=memory_format) and (size % vector or x.stride(0) % vector == 0)
    ):
        x = x.contiguous(memory_format=memory_format)
    return x if x.data_ptr() % 16 == 0 else x.clone(memory_format=memory_format)


def _prepare(
    num_groups: int, memory_format: torch.memory_format, images: tuple[Tensor | None, ...], rows: tuple[Tensor | None, ...]
) -> tuple[Plan, list[Tensor | None], list[int]]:
    """The cut, the tensors as the kernels take them, and sizes in units: between the images of each of `images`, of which the
    last may be None, then channels and pixels, groups and parts.
    """
    ready = [None if t is None else dense_images(t, memory_format) for t in images]
    x = ready[0]
    assert x is not None
    channels, last = x.shape[1], memory_format != torch.contiguous_format
    pixels = x[0, 0].numel()
    cut = plan(channels, pixels, num_groups, x.element_size(), last, len(images) == 3)
    unit_c, unit_s = cut.constants["UNIT_C"], cut.constants["UNIT_S"]
    between = [0 if t is None else (t.stride(0) if t.shape[0] > 1 else t.numel()) for t in ready]
    units = [n // (unit_c if last else unit_s) for n in between] + [channels // unit_c, pixels // unit_s, num_groups, cut.parts]
    return cut, [*ready, *(None if t is None else t.contiguous() for t in rows)], units


def _statistics_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def forward(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As the raw op `ldmkit::group_norm_silu`."""
    memory_format = memory_format_of(x)
    y = torch.empty_like(x, memory_format=memory_format)
    row = (x.shape[0], num_groups)
    if y.numel() == 0:
        return y, x.new_zeros(row, dtype=_statistics_dtype(x)), x.new_zeros(row, dtype=_statistics_dtype(x))
    mean, rstd = (x.new_empty(row, dtype=_statistics_dtype(x)) for _ in range(2))
    cut, tensors, units = _prepare(num_groups, memory_format, (x, residual), (weight, bias, shift))
    partial = mean if cut.once else mean.new_empty((*row, cut.parts, 2))
    grid = (x.shape[0] * cut.slices * cut.parts,)
    with torch.cuda.device_of(x):
        for mode in ("once",) if cut.once else ("reduce", "apply"):
            forward_kernel[grid](
                *tensors, y, mean, rstd, partial, *units, **cut.constants, EPS=eps, MODE=mode, SILU=silu, num_warps=cut.warps
            )
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    silu: bool,
    shift: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the raw op `ldmkit::group_norm_silu_backward`."""
    memory_format = memory_format_of(x)
    grad_x = torch.empty_like(x, memory_format=memory_format)
    images, channels = x.shape[:2]
    if x.numel() == 0:
        return grad_x, x.new_zeros(channels), x.new_zeros(channels), x.new_zeros((images, channels))
    grad_weight, grad_bias, grad_shift = x.new_empty(channels), x.new_empty(channels), x.new_empty((images, channels))
    cut, tensors, units = _prepare(num_groups, memory_format, (grad, x, residual), (weight, bias, shift, mean, rstd))
    partial = mean.new_empty((images, num_groups, cut.parts, 2))
    channel_sums = mean.new_empty((images, cut.parts, 3, channels))
    grid = (images * cut.slices * cut.parts,)
    some = min(PARAMETER_CHANNELS, triton.next_power_of_2(channels))
    with torch.cuda.device_of(x):
        for mode in ("once",) if cut.once else ("reduce", "apply"):
            backward_kernel[grid](
                *tensors, grad_x, partial, channel_sums, *units, **cut.constants, MODE=mode, SILU=silu, num_warps=cut.warps
            )
        parameters_kernel[(images + 1) * triton.cdiv(channels, some),](
            *(partial, channel_sums, tensors[3], tensors[7], grad_weight, grad_bias, grad_shift, images, channels),
            *(x[0, 0].numel(), num_groups, cut.parts),
            D=cut.constants["D"],
            CHANNELS=some,
            ROWS=PARAMETER_ROWS,
            num_warps=PARAMETER_WARPS,
        )
    return grad_x, grad_weight, grad_bias, grad_shift


def refusal(x: Tensor, num_groups: int, *others: Any) -> str | None:
    """Why it cannot serve a call; None where it can."""
    if x.shape[1] // num_groups > CHANNELS:
        return f"serves groups of at most {CHANNELS} channels, these have {x.shape[1] // num_groups}"
    return None


def static_cases() -> Iterator[StaticCase]:
    """Both directions, every mode and dtype, in both memory formats, with and without what may be left out."""
    shapes = {"once": (1280, 64, 32), "loop": (320, 1024, 32), "parts": (128, 1 << 20, 32), "odd": (30, 35, 3)}
    for dtype in DTYPES:
        for name, (channels, pixels, groups) in shapes.items():
            for last in (False, True):
                for way, kernel in (("forward", forward_kernel), ("backward", backward_kernel)):
                    cut = plan(channels, pixels, groups, dtype.itemsize, last, way == "backward")
                    for mode in ("once",) if cut.once else ("reduce", "apply"):
                        for whole in (True, False):
                            yield _static_case(kernel, dtype, cut, mode, whole, f"{name} {'NHWC' if last else 'NCHW'}")
        yield _static_parameters(dtype)


def _static_case(kernel: Any, dtype: torch.dtype, cut: Plan, mode: str, whole: bool, label: str) -> StaticCase:
    element, statistics = "*" + TRITON_DTYPES[dtype], "*fp64" if dtype == torch.float64 else "*fp32"
    optional = ("residual", "weight", "bias", "shift")
    given = ("grad", "x", "grad_x") if kernel is backward_kernel else ("x", "y")
    found = ("mean", "rstd", "partial", *(["channel_sums"] if kernel is backward_kernel else []))
    types = dict.fromkeys(given + (optional if whole else ()), element) | dict.fromkeys(found, statistics)
    constants = cut.constants | {"MODE": mode, "SILU": whole} | ({} if whole else dict.fromkeys(optional))
    if kernel is forward_kernel:
        constants["EPS"] = 1e-5
    sizes = [name for name in kernel.arg_names if name not in types and name not in constants]
    return StaticCase(
        kernel=kernel,
        label=f"{TRITON_DTYPES[dtype]} {label} {mode} {'with all' if whole else 'with x alone'}",
        signature={n: types.get(n, "i32") for n in kernel.arg_names if n in types or n in sizes},
        constants=constants,
        aligned=tuple(types),
        options={"num_warps": cut.warps},
        vectors=constants["UNIT_C" if constants["LAST"] else "UNIT_S"] > 1,
    )


def _static_parameters(dtype: torch.dtype) -> StaticCase:
    element, statistics = "*" + TRITON_DTYPES[dtype], "*fp64" if dtype == torch.float64 else "*fp32"
    types = dict.fromkeys(("weight", "grad_weight", "grad_bias", "grad_shift"), element)
    types |= dict.fromkeys(("partial", "channel_sums", "rstd"), statistics)
    constants = {"D": 10, "CHANNELS": PARAMETER_CHANNELS, "ROWS": PARAMETER_ROWS}
    return StaticCase(
        kernel=parameters_kernel,
        label=f"{TRITON_DTYPES[dtype]} parameters",
        signature={n: types.get(n, "i32") for n in parameters_kernel.arg_names if n not in constants},
        constants=constants,
        aligned=tuple(types),
        options={"num_warps": PARAMETER_WARPS},
    )
