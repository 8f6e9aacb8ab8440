"""Is our result as accurate as a peer's? Both are measured against a float64 oracle, so no tolerance is ever picked by hand."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_as_accurate(
    ours: Tensor, peer: Tensor, exact: Tensor, *, factor: float = 2.0, eps_multiple: float = 2.0, what: str = "result"
) -> None:
    """Assert max|ours - exact| <= factor * max|peer - exact| + eps_multiple * eps * max|exact|.

    The last term is a floor of rounding, for when the peer happens to hit the oracle; eps is that of `ours`' dtype.

    Args:
        ours: the result under test, in any floating dtype.
        peer: a trusted implementation's result, in the same dtype.
        exact: the same computation in float64.
        what: names the quantity in the failure message.

    Raises:
        AssertionError: with both errors, the bound and the worst place; also on differing shapes or dtypes, or NaN anywhere.
    """
    assert ours.shape == peer.shape == exact.shape, f"{what}: shapes {ours.shape}, {peer.shape} and {exact.shape} differ"
    assert ours.dtype == peer.dtype, f"{what}: {ours.dtype} cannot be judged by a peer in {peer.dtype}"
    assert exact.dtype == torch.float64, f"{what}: the oracle must be float64, got {exact.dtype}"
    for name, tensor in (("ours", ours), ("the peer", peer), ("the oracle", exact)):
        assert torch.isfinite(tensor).all(), f"{what}: {name} has NaN or infinite elements"
    if exact.numel() == 0:
        return
    error = (ours.detach().double() - exact.detach()).abs()
    peer_error = float((peer.detach().double() - exact.detach()).abs().max())
    size = float(exact.detach().abs().max())
    bound = factor * peer_error + eps_multiple * torch.finfo(ours.dtype).eps * size
    worst = int(error.argmax())
    values = [float(tensor.detach().flatten()[worst]) for tensor in (ours, peer, exact)]
    assert float(error.max()) <= bound, (
        f"{what}: our error {float(error.max()):.3e} exceeds {bound:.3e}, {factor:g} x the peer's {peer_error:.3e} "
        f"+ {eps_multiple:g} eps x max|exact| ({size:.3e}); worst at flat index {worst}: "
        f"ours {values[0]:.9g}, peer {values[1]:.9g}, exact {values[2]:.17g}"
    )
