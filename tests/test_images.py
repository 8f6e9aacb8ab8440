"""Pictures and masks as users have them: which number is white, and what cannot be known."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ldmkit.errors import InputError, InputTypeError
from ldmkit.images import to_mask, to_pixels

GREY = Image.fromarray(np.full((4, 4), 40000, np.uint16))  # 16 bits; PIL's own conversion to 8 would make it white


def test_bytes_are_bytes_in_arrays_tensors_and_pil() -> None:
    values = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    tensor = torch.from_numpy(values).permute(2, 0, 1)
    wanted = tensor[None] / 127.5 - 1
    for given in (values, tensor, Image.fromarray(values)):
        torch.testing.assert_close(to_pixels(given, channels=3), wanted)
    mask = np.array([[0, 255], [127, 128]], np.uint8)
    for plane in (mask, torch.from_numpy(mask), Image.fromarray(mask), mask >= 128):
        assert to_mask(plane, size=(2, 2)).flatten().tolist() == [0, 1, 0, 1]


def test_arrays_that_are_views_of_pictures_are_taken_without_a_word() -> None:
    grey = np.asarray(Image.new("RGB", (4, 4), (255, 255, 255)))
    assert not grey.flags.writeable
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert to_pixels(grey, channels=3).eq(1).all()
        assert to_mask(grey[..., 0], size=(4, 4)).eq(1).all()


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_pil_images_without_a_known_white_are_refused(mode: str) -> None:
    image = GREY.convert(mode) if mode != "I;16" else GREY
    assert image.mode == mode
    with pytest.raises(InputError, match=f"mode '{mode}' does not say which number is white; give an array"):
        to_pixels(image, channels=3)
    with pytest.raises(InputError, match="which number is white"):
        to_mask(image, size=(4, 4))
    given = (np.asarray(GREY) / 65535)[..., None].repeat(3, axis=-1)  # what the message says
    torch.testing.assert_close(to_pixels(given, channels=3), torch.full((1, 3, 4, 4), 2 * 40000 / 65535 - 1))


@pytest.mark.parametrize(
    "mask", [np.eye(4, dtype=np.uint8), torch.eye(4, dtype=torch.uint8), Image.fromarray(np.eye(4, dtype=np.uint8))]
)
def test_a_mask_of_bytes_0_and_1_is_refused(mask: Any) -> None:
    with pytest.raises(InputError, match="goes from 0 to 1, but white is 255 there"):
        to_mask(mask, size=(4, 4))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_lie_on_white_and_masks_say_what_they_mean(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 2))  # black, and seen through above
    image = image.convert(mode)
    assert to_pixels(image, channels=3)[0, :, :, 0].tolist() == [[1, 1, -1, -1]] * 3
    assert to_pixels(image, channels=1)[0, 0, :, 0].tolist() == [1, 1, -1, -1]
    with pytest.raises(InputError, match=r"transparent in places may mean either; .*getchannel\('A'\)"):
        to_mask(image, size=(4, 4))
    opaque = Image.new("RGBA", (4, 4), "white").convert(mode)
    assert to_mask(opaque, size=(4, 4)).all()
    if mode != "P":  # what the message says
        assert to_mask(ImageOps.invert(image.getchannel("A")), size=(4, 4))[0, 0, :, 0].tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("nothing", [[], np.zeros((0, 4, 4, 3)), torch.zeros(0, 3, 4, 4)])
def test_no_image_at_all(nothing: Any) -> None:
    with pytest.raises(InputError, match="there is none among them"):
        to_pixels(nothing, channels=3)


@pytest.mark.parametrize("nothing", [[], torch.zeros(0, 4, 4)])
def test_no_mask_at_all(nothing: Any) -> None:
    with pytest.raises(InputError, match="holds no mask"):
        to_mask(nothing, size=(4, 4))


def test_what_is_no_picture_is_named() -> None:
    objects = np.full((4, 4, 3), None)
    with pytest.raises(InputTypeError, match="an image must be made of numbers, got an array of object"):
        to_pixels(objects, channels=3)
    with pytest.raises(InputTypeError, match="a mask must be made of numbers, got an array of object"):
        to_mask(objects[..., 0], size=(4, 4))
    for path in ("cat.png", Path("cat.png")):
        with pytest.raises(InputTypeError, match=r"open it first: PIL\.Image\.open\('cat\.png'\)"):
            to_pixels(path, channels=3)
        with pytest.raises(InputTypeError, match=r"open it first: PIL\.Image\.open\('cat\.png'\)"):
            to_mask(path, size=(4, 4))
