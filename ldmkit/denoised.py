"""x0 with the variance that a model predicts beside it: Nichol and Dhariwal 2021, arXiv:2102.09672, eq. 15."""

from __future__ import annotations

import torch
from torch import Tensor

from ldmkit.errors import InputError


class Denoised(Tensor):
    """What D(x, level) gives where a sampler takes the model's variance: x0, (B, C, H, W), and `variance_fraction`.

    It is x0, and any operation on it gives a plain tensor, as with `torch.nn.Parameter`. So a guidance method that computes
    with x0 says itself whose variance goes on: `Denoised.carry(changed, denoised)`.
    """

    variance_fraction: Tensor
    """(B, C, H, W): log variance = fraction log beta + (1 - fraction) log beta-tilde; 0 is the posterior's, 1 the forward
    step's. In [0, 1] only as far as the model keeps to it: it is not clamped, as in the paper."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(x0: Tensor, variance_fraction: Tensor) -> Denoised:
        """Both together."""
        denoised = x0.as_subclass(Denoised)
        denoised.variance_fraction = variance_fraction
        return denoised

    @staticmethod
    def carry(x0: Tensor, source: Tensor) -> Tensor:
        """x0 with the variance of `source`, if that has one."""
        return Denoised.of(x0, source.variance_fraction) if isinstance(source, Denoised) else x0

    @staticmethod
    def chunk_of(estimates: Tensor, count: int) -> tuple[Tensor, ...]:
        """Equal parts of a batch."""
        parts = estimates.chunk(count)
        if not isinstance(estimates, Denoised):
            return parts
        return tuple(Denoised.of(*both) for both in zip(parts, estimates.variance_fraction.chunk(count), strict=True))

    @staticmethod
    def parts_of(estimate: Tensor) -> tuple[Tensor, Tensor]:
        """Plain x0, and the fraction. Raises: InputError where D gave no fraction."""
        if not isinstance(estimate, Denoised):
            raise InputError(
                "the sampler takes the variance that the model predicts, and D gave x0 alone: make its `Model` with "
                "keep_variance=True, and let a guidance method of one's own end with ldmkit.Denoised.carry"
            )
        return estimate.as_subclass(Tensor), estimate.variance_fraction
