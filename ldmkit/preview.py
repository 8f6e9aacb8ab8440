"""The picture as it emerges: a ready callback for `callback_on_step_end`, and small autoencoders for it."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ldmkit.checkpoints.assembling import assemble
from ldmkit.checkpoints.files import read_object, write_bytes
from ldmkit.checkpoints.folders import source
from ldmkit.checkpoints.parts import load_part
from ldmkit.errors import CheckpointError, ConfigError, InputError
from ldmkit.images import from_pixels, grid
from ldmkit.interfaces import Autoencoder
from ldmkit.plugin.registry import registry
from ldmkit.tasks import like_weights

if TYPE_CHECKING:
    from ldmkit.pipeline import Pipeline

Show = Callable[[Sequence[Image.Image], int], object]
"""(pictures, steps done)."""


class Preview:
    """Decodes the estimate of the finished latents after each step; give it as `callback_on_step_end`.

    Example:
        >>> preview = Preview("preview.png", decoder=load_decoder("taesd"))          # doctest: +SKIP
        >>> pipe("a red apple", callback_on_step_end=preview)                        # doctest: +SKIP

    Args:
        target: a PNG file, written anew (atomically) each time, all pictures of the batch in one sheet; or a function that is
            given the pictures and the number of steps done.
        decoder: an autoencoder of the same latents, usually TAESD. None = the pipeline's own, which is as slow as it is.
        every: steps from one picture to the next. The finished one is always shown.

    Raises:
        InputError: for an `every` below 1, or a file that is no PNG.
    """

    def __init__(self, target: str | Path | Show, *, decoder: Autoencoder | None = None, every: int = 1) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError(f"every = {every!r}: must be a whole number of at least 1")
        if isinstance(target, str | Path) and Path(target).suffix.lower() != ".png":
            raise InputError(f"{target}: previews are written as PNG; name a file that ends in .png")
        self.target, self.decoder, self.every = target, decoder, every

    def check(self, pipe: Pipeline) -> None:
        """Raise ConfigError where the decoder is for other latents than the pipeline's."""
        decoder, own = self.decoder, pipe.autoencoder
        if decoder is not None and decoder.latent_channels != own.latent_channels:
            raise ConfigError(
                f"the preview's decoder takes latents of {decoder.latent_channels} channels, and the pipeline's have "
                f"{own.latent_channels}; use one that was made for them"
            )

    @torch.no_grad()
    def __call__(self, pipe: Pipeline, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        """Show the estimate, or the finished latents; see `ldmkit.pipeline.Callback`. Raises: ConfigError, OutputError."""
        done = tensors["state"].state.done
        if (step + 1) % self.every and not done:
            return
        self.check(pipe)
        decoder = self.decoder or pipe.autoencoder
        latents = tensors["latents" if done else "denoised"]
        images = from_pixels(decoder.decode(like_weights(latents, decoder)), "pil")
        if not isinstance(self.target, str | Path):
            self.target(images, step + 1)
            return
        buffer = io.BytesIO()
        (grid(images) if len(images) > 1 else images[0]).save(buffer, format="PNG")
        write_bytes(Path(self.target), buffer.getvalue())


def load_decoder(
    folder: str | Path, *, name: str = "taesd", dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> Autoencoder:
    """A small autoencoder: a folder of diffusers' AutoencoderTiny, one written by `save_part`, or TAESD's own two files.

    Args:
        name: of the files, `NAME_encoder.safetensors` and `NAME_decoder.safetensors`: "taesd", or "taesdxl".

    Raises:
        CheckpointError: for a folder that holds none of these, or is damaged.
        ArchitectureMismatchError: where weights do not fit.
    """
    folder = Path(folder)
    if (folder / "part.json").is_file():
        part: Autoencoder = load_part(folder, kind="autoencoder", dtype=dtype, device=device)
        return part
    if (folder / "config.json").is_file():
        class_name = str(read_object(folder / "config.json").get("_class_name"))
        part, _ = assemble("autoencoder", {"vae": source(folder, class_name, None)}, {}, dtype=dtype, device=device)
        return part
    files = [folder / f"{name}_{side}.safetensors" for side in ("encoder", "decoder")]
    if not all(file.is_file() for file in files):
        raise CheckpointError(
            f"{folder} holds neither config.json (diffusers) nor part.json (ldmkit), nor TAESD's {files[0].name} and "
            f"{files[1].name}"
        )
    made: Autoencoder = registry().load("autoencoder", "taesd").from_files(*files, dtype=dtype)
    return made.to(device).eval()
