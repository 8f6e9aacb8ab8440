"""The latents' scale against closed forms, and latents kept for stage two."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import Autoencoder
from ldmkit.checkpoints.parts import load_part
from ldmkit.errors import NumericalError
from ldmkit.training.data import StoredPictures
from ldmkit.training.latents import encode_all, latent_moments
from ldmkit.training.stage import to_pixels
from tests.training.toy import squares

CPU = torch.device("cpu")


@given(seed=st.integers(0, 99), per_channel=st.booleans(), offset=st.sampled_from([0.0, 3.0, -1e4]))
def test_moments_are_those_of_all_latents_at_once(seed: int, per_channel: bool, offset: float) -> None:
    z = np.random.default_rng(seed).normal(offset, [[[0.5]], [[2.0]]], (7, 2, 3, 3))
    batches = [torch.from_numpy(z[:4]), torch.from_numpy(z[4:])]
    std, mean = latent_moments(batches, per_channel=per_channel)
    flat = z.transpose(1, 0, 2, 3).reshape(2, -1) if per_channel else z.reshape(1, -1)
    rounding = 64 * np.finfo(np.float64).eps * np.abs(z).max()
    assert np.abs(std.numpy() - flat.std(axis=1)).max() <= rounding
    assert np.abs(mean.numpy() - flat.mean(axis=1)).max() <= rounding


def test_latents_that_say_nothing_are_an_error() -> None:
    with pytest.raises(NumericalError, match="encodes nothing"):
        latent_moments([torch.ones(2, 3, 4, 4)], per_channel=True)
    with pytest.raises(NumericalError, match="nan"):
        latent_moments([torch.full((2, 3, 4, 4), torch.nan)], per_channel=False)


def test_the_exported_autoencoder_has_latents_of_unit_deviation(autoencoder: Path) -> None:
    part: Autoencoder = load_part(autoencoder, kind="autoencoder")
    z = part.encode(to_pixels(squares()[0])).sample(torch.randn(24, 3, 8, 8, generator=torch.Generator().manual_seed(0)))
    # Measured with other noise than here: two estimates of one mean square, whose spread the posterior's deviation bounds.
    posterior = part.encode(to_pixels(squares()[0]))
    spread = (posterior.sample(torch.ones_like(z)) - posterior.mode()).abs().max().item()
    assert abs(z.square().mean().sqrt().item() - 1) <= 5 * spread * (1 + z.abs().max().item()) / z.numel() ** 0.5


class Counting(StoredPictures):
    """Counts how often pictures are read."""

    reads = 0

    def read(self, indices: object) -> np.ndarray:
        self.reads += 1
        return super().read(indices)  # type: ignore[arg-type]


def posterior(part: Autoencoder, noise: Tensor) -> Tensor:
    with torch.no_grad():
        return part.encode(to_pixels(squares()[0])).sample(noise)


def test_kept_latents_are_the_posterior(autoencoder: Path, tmp_path: Path) -> None:
    part: Autoencoder = load_part(autoencoder, kind="autoencoder")
    pictures = Counting(squares()[0])
    cache = encode_all(part, pictures, folder=tmp_path, dtype=torch.float32, device=CPU, batch_size=24)
    indices, noise = np.array([5, 0, 5]), torch.randn(24, 3, 8, 8)
    expected = posterior(part, noise)[indices]
    bound = 4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert (cache.sample(indices, noise[indices]) - expected).abs().max() <= bound
    encodings = pictures.reads
    again = encode_all(part, pictures, folder=tmp_path, dtype=torch.float32, device=CPU, batch_size=1)
    assert torch.equal(again.mean_NCHW, cache.mean_NCHW)
    assert torch.equal(again.std_NCHW, cache.std_NCHW)
    assert pictures.reads - encodings == encodings - 1  # the fingerprint's one pass; no encoding


def test_other_weights_or_pictures_are_encoded_anew(autoencoder: Path, tmp_path: Path) -> None:
    part: Autoencoder = load_part(autoencoder, kind="autoencoder")
    x = squares()[0].copy()
    names = []
    for change in (None, "pictures", "weights", "dtype"):
        if change == "pictures":
            x[0, 0, 0, 0] ^= 1
        if change == "weights":
            with torch.no_grad():
                next(part.parameters()).add_(1e-3)
        dtype = torch.float16 if change == "dtype" else torch.float32
        encode_all(part, StoredPictures(x), folder=tmp_path, dtype=dtype, device=CPU)
        names += [path.name for path in tmp_path.glob("latents-*")]
    assert len(names) == len(set(names)) == 4  # each time one, and another
