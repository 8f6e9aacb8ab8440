"""Latents of whole data sets: measuring their scale, and keeping them for stage two."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ldmkit.checkpoints.files import atomic_folder
from ldmkit.checkpoints.weights import read_weights, write_weights
from ldmkit.errors import NumericalError
from ldmkit.interfaces import Autoencoder
from ldmkit.training.data import Pictures
from ldmkit.training.stage import to_pixels


@torch.no_grad()
def latent_moments(batches: Iterable[Tensor], *, per_channel: bool) -> tuple[Tensor, Tensor]:
    """Standard deviation about the mean, and mean, of latents over all components (Rombach et al. 2022, app. G), in float64.

    Args:
        batches: latents (B, C, H, W).
        per_channel: one value per channel (C,), else one for all (1,).

    Raises:
        NumericalError: where the deviation is 0 or not finite.
    """
    count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    offset: Tensor | None = None
    for z_BCHW in batches:
        z = z_BCHW.double().cpu().transpose(0, 1)
        z = z.reshape(len(z), -1) if per_channel else z.reshape(1, -1)
        if offset is None:  # sums are taken about the first batch's mean, so that nothing cancels
            offset = z.mean(dim=1)
        z = z - offset[:, None]
        count, total, squares = count + z.shape[1], total + z.sum(dim=1), squares + z.square().sum(dim=1)
    assert offset is not None, "no latents to measure"
    std = (squares / count - (total / count).square()).clamp(min=0).sqrt()
    if not bool((torch.isfinite(std) & (std > 0)).all()):
        raise NumericalError(f"the latents' standard deviation is {std.tolist()}: the autoencoder encodes nothing")
    return std, total / count + offset


@dataclasses.dataclass(frozen=True)
class LatentCache:
    """Posterior means and standard deviations of every picture, (N, C, H, W), in final latents."""

    mean_NCHW: Tensor
    std_NCHW: Tensor

    def sample(self, indices: np.ndarray, noise_BCHW: Tensor) -> Tensor:
        """Final latents of some pictures, drawn from their posteriors, float32."""
        index = torch.from_numpy(indices)
        return self.mean_NCHW[index].float() + self.std_NCHW[index].float() * noise_BCHW


@torch.no_grad()
def encode_all(
    autoencoder: Autoencoder,
    pictures: Pictures,
    *,
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
    batch_size: int = 64,
) -> LatentCache:
    """Encode every picture once; what was encoded before by the same autoencoder from the same pictures is read back.

    Args:
        folder: where latents are kept, named by a hash of weights, config and pixels; others there are deleted.
    """
    kept = folder / f"latents-{_fingerprint(autoencoder, pictures, dtype)}"
    if not kept.is_dir():
        parts: list[tuple[Tensor, Tensor]] = []
        chunks = list(_chunks(len(pictures), batch_size))
        for indices in tqdm(chunks, "encoding pictures", unit="batch", disable=not progress):
            posterior = autoencoder.encode(to_pixels(pictures.read(indices)).to(device))
            mean = posterior.mode()
            std = posterior.sample(torch.ones_like(mean)) - mean
            parts.append((mean.to("cpu", dtype), std.to("cpu", dtype)))
        for stale in folder.glob("latents-*"):
            shutil.rmtree(stale)
        with atomic_folder(kept) as temporary:
            write_weights(temporary, {"mean": torch.cat([m for m, _ in parts]), "std": torch.cat([s for _, s in parts])})
    tensors = read_weights(kept)
    return LatentCache(tensors["mean"], tensors["std"])


def _chunks(n: int, size: int) -> Iterator[np.ndarray]:
    for first in range(0, n, size):
        yield np.arange(first, min(n, first + size))


def _fingerprint(autoencoder: Autoencoder, pictures: Pictures, dtype: torch.dtype) -> str:
    digest = hashlib.sha256(f"{autoencoder.config.to_json()} {dtype} {len(pictures)}".encode())
    for key, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    for indices in _chunks(len(pictures), 256):
        digest.update(np.ascontiguousarray(pictures.read(indices)).data)
    return digest.hexdigest()[:16]
