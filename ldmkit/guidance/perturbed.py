"""Perturbed-attention guidance: Ahn et al. 2024, arXiv:2403.17377.

A second, worse estimate comes from the same network with the self-attention maps of some layers replaced by the identity
(each place keeps its own value); guidance goes away from it. Needs no negative prompt, and works without any condition.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from ldmkit.errors import InputError
from ldmkit.interfaces import PERTURBED, Condition, Denoiser


def perturb(denoiser: Denoiser, condition: Condition, layers: Sequence[str], on: bool) -> Condition:
    """The condition that also says whose self-attention maps are the identity: in `layers`, of all its images or of none.

    Args:
        layers: names of self-attention layers or the beginnings of names, part by part: "mid" or "mid_block" are all in
            "mid_block", "up_blocks.1.attentions.0" is one block's. As in diffusers' `pag_applied_layers`, without patterns.

    Raises:
        InputError: where the denoiser has no such layer, or none at all that can be perturbed.
    """
    if not denoiser.self_attentions:
        raise InputError(f"{type(denoiser).__name__} has no self-attention layers that perturbed-attention guidance could use")
    chosen: set[str] = set()
    for layer in layers:
        found = {path for path in denoiser.self_attentions if _begins(path, layer)}
        if not found:
            known = ", ".join(denoiser.self_attentions)
            raise InputError(
                f"pag_layers: {layer!r} is no self-attention layer of {type(denoiser).__name__}; there are {known}"
            )
        chosen |= found
    if not chosen:
        raise InputError("pag_layers is empty; name at least one layer")
    device = next((p.device for p in denoiser.parameters()), torch.device("cpu"))
    which_B = torch.full((condition.batch_size or 1,), on, device=device)
    return dataclasses.replace(condition, extra={**condition.extra, PERTURBED: dict.fromkeys(sorted(chosen), which_B)})


def _begins(path: str, layer: str) -> bool:
    parts, wanted = path.split("."), layer.split(".")
    return len(wanted) <= len(parts) and all(a == b or a.startswith(f"{b}_") for a, b in zip(parts, wanted, strict=False))
