"""Pictures in and out: PIL, numpy and torch images <=> raw pixels in [-1, 1]."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ldmkit.errors import InputError, InputTypeError

OutputType = Literal["pil", "np", "pt", "latent"]


def to_pixels(images: Any, *, channels: int, size: tuple[int, int] | None = None) -> Tensor:
    """Images => raw pixels in [-1, 1], float32 (B, C, H, W).

    Args:
        images: a PIL image; an array (H, W, C) or (B, H, W, C) in [0, 1] or uint8; a tensor (C, H, W) or (B, C, H, W), uint8 or
            in [-1, 1] (taken to be in [0, 1] when nothing in it is negative, as diffusers does); or a list of these.
        channels: 3 or 1; PIL images are converted, transparent ones over white, as in training.
        size: (height, width) to resize PIL images to.

    Raises:
        InputTypeError: for anything else. InputError: for wrong shapes, differing sizes, or values out of range.
    """
    entries = list(images) if isinstance(images, list | tuple) else [images]
    batches = [_one(entry, channels, size) for entry in entries]
    if not sum(map(len, batches)):
        raise InputError("images were given, but there is none among them: an empty list, or a batch of none")
    sizes = {tuple(batch.shape[2:]) for batch in batches}
    if len(sizes) > 1:
        raise InputError(f"images of one call must have one size, got (height, width) {sorted(sizes)}; resize them first")
    return torch.cat(batches)


def _one(image: Any, channels: int, size: tuple[int, int] | None) -> Tensor:
    if isinstance(image, Image.Image):
        _check_mode(image)
        image = on_white(image).convert("RGB" if channels == 3 else "L")
        if size is not None and image.size != size[::-1]:
            image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        image = np.array(image)
        image = image if image.ndim == 3 else image[..., None]
    if isinstance(image, np.ndarray):
        x_BHWC = image[None] if image.ndim == 3 else image
        if x_BHWC.ndim != 4:
            raise InputError(f"an image array must be (H, W, C) or (B, H, W, C), got shape {image.shape}")
        _check_numbers("an image", image)
        x = torch.from_numpy(np.array(x_BHWC, order="C")).permute(0, 3, 1, 2)
        x = x.float() / 255 if x.dtype == torch.uint8 else x.float()
        if x.numel() and not (x.min() >= 0 and x.max() <= 1):
            raise InputError(f"an image array must be in [0, 1] (or uint8), got [{x.min():g}, {x.max():g}]")
        x = 2 * x - 1
    elif isinstance(image, Tensor):
        x = (image[None] if image.ndim == 3 else image).float() / (255 if image.dtype == torch.uint8 else 1)
        if x.ndim != 4:
            raise InputError(f"an image tensor must be (C, H, W) or (B, C, H, W), got shape {tuple(image.shape)}")
        if x.numel() and not (x.min() >= -1 and x.max() <= 1):
            raise InputError(f"an image tensor must be in [-1, 1], got [{x.min():g}, {x.max():g}]")
        x = x if bool((x < 0).any()) else 2 * x - 1
    else:
        raise InputTypeError(
            "an image must be a PIL image, a numpy array, a tensor or a list of them, got "
            f"{type(image).__name__}{_opening(image)}"
        )
    if x.shape[1] != channels:
        raise InputError(f"an image with {x.shape[1]} channels was given where {channels} are needed")
    if size is not None and tuple(x.shape[2:]) != size:
        raise InputError(f"the image is {x.shape[2]} x {x.shape[3]}, but height x width = {size[0]} x {size[1]} was asked for")
    return x


def to_mask(mask: Any, *, size: tuple[int, int], resize: bool = False) -> Tensor:
    """A mask image => float32 (B, 1, H, W) of 0 (keep) and 1 (repaint); white, above one half, is repainted.

    Takes what `to_pixels` takes, and arrays (H, W) or tensors (H, W), (1, H, W) with values in [0, 1] or uint8, where white is
    255.

    Args:
        size: (height, width) it must have.
        resize: bring PIL masks to that size, as `to_pixels` does with images.

    Raises:
        InputError: when its size differs from the image's, with both; where uint8 goes from 0 to 1, for white is 255; of a
            transparent PIL image.
    """
    entries = list(mask) if isinstance(mask, list | tuple) else [mask]
    planes = []
    for entry in entries:
        if isinstance(entry, Image.Image):
            _check_mode(entry)
            if entry.has_transparency_data and np.array(entry.convert("RGBA"))[..., 3].min() < 255:
                raise InputError(
                    "a mask that is transparent in places may mean either; give one that is white where to repaint, say "
                    "PIL.ImageOps.invert(mask.getchannel('A')) for what is transparent"
                )
            entry = entry.convert("L")
            if resize and entry.size != size[::-1]:
                entry = entry.resize(size[::-1], Image.Resampling.NEAREST)
            entry = np.array(entry)
        if isinstance(entry, np.ndarray):
            _check_numbers("a mask", entry)
            entry = torch.from_numpy(np.array(entry, order="C"))
            entry = entry.squeeze(-1) if entry.ndim == 3 and entry.shape[-1] == 1 else entry
        if not isinstance(entry, Tensor):
            raise InputTypeError(
                "a mask must be a PIL image, a numpy array, a tensor or a list of them, got "
                f"{type(entry).__name__}{_opening(entry)}"
            )
        if entry.dtype == torch.uint8 and entry.numel() and entry.max() == 1:
            raise InputError("a uint8 mask goes from 0 to 1, but white is 255 there: multiply it by 255, or give it as bool")
        entry = entry.float() / (255 if entry.dtype == torch.uint8 else 1)
        if not 2 <= entry.ndim <= 4 or (entry.ndim == 4 and entry.shape[1] != 1):
            raise InputError(f"a mask must be (H, W), (1, H, W) or (B, 1, H, W), got shape {tuple(entry.shape)}")
        plane = entry[:, None] if entry.ndim == 3 else entry.reshape(-1, 1, *entry.shape[-2:])
        if plane.numel() and not (plane.min() >= 0 and plane.max() <= 1):
            raise InputError(f"a mask must be in [0, 1] (or uint8), got [{plane.min():g}, {plane.max():g}]")
        if tuple(plane.shape[-2:]) != size:
            raise InputError(
                f"mask_image is {plane.shape[-2]} x {plane.shape[-1]} (height x width) and the image {size[0]} x {size[1]}; "
                "they must be of one size"
            )
        planes.append(plane)
    if not sum(map(len, planes)):
        raise InputError("mask_image holds no mask: an empty list, or a batch of none")
    return (torch.cat(planes) >= 0.5).float()


def on_white(image: Image.Image) -> Image.Image:
    """A picture whose transparent places are white; one without any as it is."""
    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)


def _check_mode(image: Image.Image) -> None:
    """Raise InputError for a picture in which white is no known number: PIL would clip it to 0 .. 255."""
    if image.mode.startswith(("I", "F")):
        raise InputError(
            f"a PIL image of mode {image.mode!r} does not say which number is white; give an array in [0, 1] instead: "
            "np.asarray(image) / 65535 where it is 16 bits of grey, with [..., None].repeat(3, axis=-1) for a picture"
        )


def _check_numbers(what: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "bfiu":
        raise InputTypeError(f"{what} must be made of numbers, got an array of {array.dtype}")


def _opening(value: Any) -> str:
    return f"; open it first: PIL.Image.open({str(value)!r})" if isinstance(value, str | Path) else ""


def from_pixels(x_BCHW: Tensor, output_type: OutputType) -> Any:
    """Raw pixels in [-1, 1] => PIL images, a numpy array (B, H, W, C) in [0, 1] or a tensor (B, C, H, W) in [0, 1]."""
    x = (x_BCHW.float() / 2 + 0.5).clamp(0, 1)
    if output_type == "pt":
        return x
    array = x.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    pixels = (array * 255).round().astype(np.uint8)
    return [Image.fromarray(p.squeeze(-1) if p.shape[-1] == 1 else p) for p in pixels]


def grid(
    images: Sequence[Image.Image], *, columns: int | None = None, scale: int = 1, labels: Sequence[str] | None = None
) -> Image.Image:
    """Pictures of one size in rows on light grey, `scale` times enlarged, each over its label (two lines at most)."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].width * scale, images[0].height * scale
    text_size = max(9, min(width // 12, 24))
    margin, line = text_size, 0 if labels is None else int(2.6 * text_size)
    cell_width, cell_height = width + margin, height + line + margin
    sheet = Image.new("RGB", (columns * cell_width + margin, rows * cell_height + margin), (245, 245, 245))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(text_size)
    for k, image in enumerate(images):
        left, top = margin + k % columns * cell_width, margin + k // columns * cell_height
        sheet.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        if labels is not None:
            text = "\n".join(textwrap.wrap(labels[k], int(width / text_size * 1.9), max_lines=2, placeholder=" …"))
            where = (left + width / 2, top + height + text_size / 4)
            pen.multiline_text(where, text, fill=(40, 40, 40), font=font, anchor="ma", align="center", spacing=1)
    return sheet
