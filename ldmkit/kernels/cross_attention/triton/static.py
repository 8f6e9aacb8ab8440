"""What calls launch, for the checks that compile kernels without a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ldmkit.kernels.cross_attention.triton import launches
from ldmkit.kernels.triton_support import TRITON_DTYPES, StaticCase

DIMS = (8, 16, 32, 40, 64, 72, 80, 96, 128, 160, 256, 512)
LOW = (torch.float16, torch.bfloat16)
KEYS = (16, 77, 154, 4096)
TARGETS = (launches.Target(large=False, processors=108), launches.Target(large=True, processors=132))


def static_cases() -> Iterator[StaticCase]:
    """Every head dimension and both regimes in 16 bits, without a mask and with one; fp32 and masked heads of 512, whose
    spilling kernels no rule and no network of ours chooses.
    """
    for D in DIMS:
        for dtype in LOW:
            yield from cases(D, dtype, mask=None)
        yield from cases(D, torch.float16, mask=(1, 1, 1, 1))
        yield from cases(D, torch.float16, mask=(1, 1, 2, 1))
        yield from cases(D, torch.float32, mask=None, keys=(4096,))


def cases(
    D: int, dtype: torch.dtype, *, mask: tuple[int, ...] | None, keys: tuple[int, ...] = KEYS, L: int = 4096
) -> Iterator[StaticCase]:
    """The kernels of one head dimension. `mask` is the shape of a bool mask, 2 standing for L."""
    for target in TARGETS:
        seen = set()
        for S in keys:
            for launch in _launches(D, S, L, dtype, mask, target):
                case = _case(launch, dtype, target)
                if case.label not in seen:  # many S share a kernel
                    seen.add(case.label)
                    yield case


def _launches(
    D: int, S: int, L: int, dtype: torch.dtype, mask_shape: tuple[int, ...] | None, target: launches.Target
) -> list[launches.Launch]:
    """Of the forward and the backward of a (1, 8, L, D) over S keys, on tensors without data."""
    q = torch.empty(1, L, 8, D, dtype=dtype, device="meta").transpose(1, 2)
    k = torch.empty(1, S, 8, D, dtype=dtype, device="meta").transpose(1, 2)
    lse = torch.empty(1, 8, L, device="meta")
    mask = None
    if mask_shape is not None:
        mask = torch.empty(1, 1, L if mask_shape[2] > 1 else 1, S, dtype=torch.bool, device="meta")
    chunks = launches.chunks_of(L, S)
    partial = torch.empty(2, chunks, 1, S, 8, D, device="meta") if chunks > 1 else None
    tensors = {"g": q, "q": q, "k": k, "v": k}
    results = {"dq": q, "dk": k, "dv": k, "delta": lse}
    return [
        *launches.forward_launches(q, k, k, mask, D**-0.5, q, lse, target),
        *launches.backward_launches(tensors, mask, D**-0.5, {"out": q, "lse": lse}, None, results, partial, target),
    ]


def _case(launch: launches.Launch, dtype: torch.dtype, target: launches.Target) -> StaticCase:
    signature, constants, aligned = {}, {}, []
    for parameter in launch.kernel.params:
        name, value = parameter.name, launch.arguments[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            constants[name] = value
        elif isinstance(value, Tensor):
            signature[name] = "*" + ("u8" if value.dtype == torch.uint8 else TRITON_DTYPES[value.dtype])
            aligned.append(name)
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    sizes = "".join(
        f" {name}={constants[name]}" for name in ("D", "SA", "SB", "BLOCK", "KEYS", "MASK", "BY_ROW") if name in constants
    )
    return StaticCase(
        kernel=launch.kernel,
        label=f"{TRITON_DTYPES[dtype]}{sizes}, sm_{'90, 100' if target.large else '80'}",
        signature=signature,
        constants=constants,
        aligned=aligned,
        options={"num_warps": launch.warps, "num_stages": launch.stages},
        dot="PRECISION" in constants,
        dispatched=dtype != torch.float32 and not (constants.get("D") == 512 and constants["MASK"]),
        architectures=(90, 100) if target.large else (80,),
    )
