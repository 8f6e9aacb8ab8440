"""TAESD beside diffusers' AutoencoderTiny, with random weights and with the published ones."""

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from skimage import data

from ldmkit import ArchitectureMismatchError, InputError, build
from ldmkit.testing.accuracy import assert_as_accurate
from ldmkit_vae.diffusers_config import convert_tiny_config, write_tiny_config
from ldmkit_vae.tiny import TinyAutoencoder
from tests.network_peers import double, randomise

SMALL = {
    "encoder_block_out_channels": (8, 8),
    "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 2),
    "num_decoder_blocks": (2, 1),
}


def images(size: int = 16) -> torch.Tensor:
    return 2 * torch.rand(2, 3, size, size + 8, generator=torch.Generator().manual_seed(2)) - 1


@torch.no_grad()
def test_as_accurate_as_diffusers() -> None:
    peer = AutoencoderTiny(**SMALL).eval()
    randomise(peer)
    ours = build("autoencoder", "taesd", **convert_tiny_config(peer.config)).eval()
    ours.load_state_dict(peer.state_dict())
    x_BCHW = images()
    z_BCHW, wide = peer.encode(x_BCHW).latents, double(peer)
    assert_as_accurate(ours.encode(x_BCHW).mode(), z_BCHW, wide.encode(x_BCHW.double()).latents)
    assert_as_accurate(ours.decode(z_BCHW), peer.decode(z_BCHW).sample, wide.decode(z_BCHW.double()).sample)
    again = AutoencoderTiny(**write_tiny_config(ours.config.to_dict()))
    again.load_state_dict(ours.state_dict())
    assert torch.equal(again.decode(z_BCHW).sample, peer.decode(z_BCHW).sample)


@torch.no_grad()
def test_published_files(shared) -> None:
    """Round trips of three photographs: within 0.1 dB of diffusers' with the same weights."""
    folder = shared / "data/taesd"
    ours = TinyAutoencoder.from_files(folder / "taesd_encoder.safetensors", folder / "taesd_decoder.safetensors").eval()
    peer = AutoencoderTiny().eval()
    peer.load_state_dict(ours.state_dict())
    for name in ("astronaut", "chelsea", "coffee"):
        picture = np.ascontiguousarray(getattr(data, name)()[:256, :256])
        x_BCHW = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1
        mine, theirs = ours.decode(ours.encode(x_BCHW).mode()), peer.decode(peer.encode(x_BCHW).latents).sample
        assert abs(psnr(mine, x_BCHW) - psnr(theirs, x_BCHW)) < 0.1
        assert psnr(mine, x_BCHW) > 18


def psnr(made: torch.Tensor, x: torch.Tensor) -> float:
    return float(10 * torch.log10(4 / (made.clamp(-1, 1) - x).square().mean()))


def test_other_files_are_refused(shared, tmp_path) -> None:
    encoder, decoder = (shared / f"data/taesd/taesd_{part}.safetensors" for part in ("encoder", "decoder"))
    with pytest.raises(ArchitectureMismatchError):
        TinyAutoencoder.from_files(decoder, encoder)
    tensors = load_file(decoder)
    tensors.pop("1.weight")
    save_file(tensors, tmp_path / "short.safetensors")
    with pytest.raises(ArchitectureMismatchError, match=r"decoder\.layers\.0\.weight"):
        TinyAutoencoder.from_files(encoder, tmp_path / "short.safetensors")


def test_sizes_are_checked() -> None:
    ours = build("autoencoder", "taesd", channels=8)
    with pytest.raises(InputError, match="multiples of 8"):
        ours.encode(torch.zeros(1, 3, 12, 16))
    with pytest.raises(InputError, match="latents of 4"):
        ours.decode(torch.zeros(1, 3, 4, 4))
