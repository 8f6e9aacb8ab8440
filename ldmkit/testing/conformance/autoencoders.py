"""What autoencoders promise: raw pixels to final latents and back, through a posterior that is told its noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import InputError
from ldmkit.interfaces import Autoencoder, Posterior
from ldmkit.testing.conformance.common import properties_of_all
from ldmkit.testing.conformance.core import Property, Subject, Trial, alike, apart, same_bits
from ldmkit.testing.conformance.modules import properties_of_networks

KIND = "ldmkit.Autoencoder"
SCALES = {"scaling_factor": 0.7, "shift_factor": 0.3}
"""The config fields, by the names that all have for them, that final latents are scaled and shifted by; and other values."""


def size(part: Autoencoder, t: Trial) -> tuple[int, int]:
    """Height and width of the case's latents."""
    return 2 * int(t.case["height"]), 2 * int(t.case["width"])


def pixels(part: Autoencoder, t: Trial, *, dtype: torch.dtype = torch.float64, stream: int = 0) -> Tensor:
    """(B, image_channels, H, W) in [-1, 1]."""
    height, width = (side * part.downscale for side in size(part, t))
    return t.normal(t.batch, part.image_channels, height, width, stream=stream, dtype=dtype).tanh()


def use(part: Any, t: Trial, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """There and back, with noise."""
    posterior = part.encode(pixels(part, t, dtype=dtype))
    z = posterior.sample(t.normal(*posterior.mode().shape, stream=3, dtype=dtype))
    return z, part.decode(z), posterior.loss_B().to(dtype)


def geometry(t: Trial) -> None:
    """Images (B, image_channels, H, W) become latents (B, latent_channels, H / downscale, W / downscale), and these images
    again, in the images' dtype. Heights and widths that are no multiples of `downscale` are an InputError.
    """
    part = t.network()
    for name in ("image_channels", "latent_channels", "downscale"):
        value = getattr(part, name, None)
        assert isinstance(value, int) and value >= 1, f"{name} is {value!r}"
    x = pixels(part, t)
    posterior = part.encode(x)
    assert isinstance(posterior, Posterior), f"encode() gives a {type(posterior).__name__}, no ldmkit.Posterior"
    z, want = posterior.mode(), (t.batch, part.latent_channels, *size(part, t))
    assert tuple(z.shape) == want, f"{tuple(x.shape)} becomes latents {tuple(z.shape)}, not {want}"
    y = part.decode(z)
    assert y.shape == x.shape, f"latents {tuple(z.shape)} become {tuple(y.shape)}, not {tuple(x.shape)}"
    assert z.dtype == y.dtype == x.dtype, f"{x.dtype} becomes latents in {z.dtype} and images in {y.dtype}"
    if part.downscale > 1:
        try:
            part.encode(x[..., 1:])
        except InputError:
            return
        raise AssertionError(f"an image {tuple(x[..., 1:].shape)} is taken, whose width is no multiple of {part.downscale}")


def posterior(t: Trial) -> None:
    """A posterior's `mode` and `sample` have the latents' shape; the same noise gives the same sample, and noise 0
    the mode. `loss_B` is one finite number for each image, not below 0.
    """
    part = t.network()
    found = part.encode(pixels(part, t))
    z = found.mode()
    noise = t.normal(*z.shape, stream=3)
    first, again = found.sample(noise), found.sample(noise)
    assert first.shape == z.shape, f"a sample has shape {tuple(first.shape)}, the mode {tuple(z.shape)}"
    assert same_bits(first, again), f"the same noise gives two samples: {apart(first, again)}"
    still = found.sample(torch.zeros_like(noise))
    assert alike(still, z), f"noise 0 gives no mode: {apart(still, z)}"
    loss = found.loss_B()
    assert tuple(loss.shape) == (t.batch,), f"loss_B has shape {tuple(loss.shape)}, not ({t.batch},)"
    assert bool(loss.isfinite().all()) and bool((loss >= 0).all()), f"loss_B is {loss.tolist()}"


def independent(t: Trial) -> None:
    """An image's latents, its loss and what its latents decode to do not depend on its neighbours, nor on its place."""
    part = t.network()
    x = pixels(part, t)
    found, turned, alone = part.encode(x), part.encode(x.flip(0)), part.encode(x[1:2])
    z = found.mode()
    for what, whole, flipped, single in (
        ("latents", z, turned.mode(), alone.mode()),
        ("loss_B", found.loss_B(), turned.loss_B(), alone.loss_B()),
        ("images", part.decode(z), part.decode(z.flip(0)), part.decode(z[1:2])),
    ):
        assert alike(flipped.flip(0), whole), f"{what}, in another order: {apart(flipped.flip(0), whole)}"
        assert alike(single, whole[1:2]), f"{what}, alone: {apart(single, whole[1:2])}"


def used(t: Trial) -> None:
    """Latents depend on the image, images on the latents."""
    part = t.network()
    one, other = (part.encode(pixels(part, t, stream=stream)).mode() for stream in (0, 1))
    assert not alike(one, other), "two images have the same latents"
    assert not alike(part.decode(one), part.decode(other)), "two latents decode to the same image"


def scale(t: Trial) -> None:
    """Scale and shift live inside: with others in the config, final latents change, and what they decode to does not."""
    part = t.network()
    x = pixels(part, t)
    z = part.encode(x).mode()
    for name, value in SCALES.items():
        if name not in type(part).Config.model_fields:
            continue
        other = t.build(**{name: value})
        other.load_state_dict(part.state_dict())
        other.to(torch.float64).eval()
        rescaled = other.encode(x).mode()
        assert not alike(rescaled, z), f"with {name} = {value} the final latents are the same"
        back, want = other.decode(rescaled), part.decode(z)
        assert alike(back, want), f"with {name} = {value} the way there and back differs: {apart(back, want)}"


def arguments_kept(t: Trial) -> None:
    """Neither `encode` nor `decode`, nor `sample`, writes into its arguments."""
    part = t.network()
    x = pixels(part, t)
    kept = x.clone()
    found = part.encode(x)
    z = found.mode().clone()
    noise, z_kept = t.normal(*z.shape, stream=3), z.clone()
    found.sample(noise)
    part.decode(z)
    assert same_bits(x, kept), "encode() writes into the image"
    assert same_bits(noise, t.normal(*z.shape, stream=3)), "sample() writes into the noise"
    assert same_bits(z, z_kept), "decode() writes into the latents"


def _no_scale(subject: Subject) -> str | None:
    known = [name for name in SCALES if name in subject.part.Config.model_fields]
    return None if known else f"its config has none of {', '.join(SCALES)}"


PROPERTIES = (
    *properties_of_all(use, KIND),
    *properties_of_networks(use, KIND, ("encode", "decode"), fullgraph=False),
    Property("geometry", geometry, "ldmkit.Autoencoder.encode"),
    Property("posterior", posterior, "ldmkit.Posterior"),
    Property("images are independent", independent, "ldmkit.Autoencoder.encode"),
    Property("its input is used", used, "ldmkit.Autoencoder"),
    Property("scale and shift", scale, "ldmkit.Autoencoder", absent=_no_scale),
    Property("arguments are kept", arguments_kept, "ldmkit.Autoencoder"),
)
