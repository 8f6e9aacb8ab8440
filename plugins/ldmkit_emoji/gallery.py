"""The pictures of README.md: `python -m ldmkit_emoji.gallery -o docs/gallery`. One function each, keyed by a seed.

prompts          twelve prompts (`ldmkit_emoji.demo` makes docs/demo.png of others)
guidance         one prompt over guidance scales
samplers         one prompt over samplers and steps
image-to-image   one picture over strengths
inpainting       half of a picture repainted
noising          the forward process on one picture, decoded
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image

from ldmkit import Pipeline
from ldmkit.checkpoints.files import check_writable
from ldmkit.errors import OutputError
from ldmkit.images import from_pixels, grid, to_pixels
from ldmkit_emoji.glyphs import SIZE
from ldmkit_emoji.plainly import plainly

PROMPT = "blue heart on a yellow background"
PROMPTS = (
    "crying face",
    "green heart on a pink background",
    "flag: france",
    "raised hand: medium skin tone",
    "a police officer on a teal background",
    "sun on a blue background",
    "tomato",
    "butterfly on a gray background",
    "an owl and cherries",
    "an eagle left of a banana on a blue background",
    "a small octopus on the right",
    "a lemon next to a watermelon",
)
"""Two things in one prompt are pairs that were never trained on together."""
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 7.0, 10.0)
SAMPLERS = ("ddim", "euler-ancestral", "dpm++-2m")
STEPS = (4, 8, 16, 32)
STRENGTHS = (0.3, 0.5, 0.7, 0.85, 1.0)
TIMES = (0, 50, 150, 300, 500, 999)


def prompts(pipe: Pipeline, seed: int) -> Image.Image:
    """Twelve prompts: names, backgrounds, two things in one picture."""
    return grid(pipe(list(PROMPTS), seed=seed).images, columns=4, scale=2, labels=PROMPTS)


def guidance(pipe: Pipeline, seed: int) -> Image.Image:
    """The same noise under rising guidance scales."""
    drawn = [pipe(PROMPT, seed=seed, guidance_scale=scale).images[0] for scale in GUIDANCE]
    return grid(drawn, columns=len(GUIDANCE), scale=2, labels=[f"guidance {scale:g}" for scale in GUIDANCE])


def samplers(pipe: Pipeline, seed: int) -> Image.Image:
    """The same noise by several samplers (one a row) in few and many steps."""
    before, drawn = pipe.sampler, []
    try:
        for name in SAMPLERS:
            pipe.sampler = name
            drawn += [pipe(PROMPT, seed=seed, num_inference_steps=steps).images[0] for steps in STEPS]
    finally:
        pipe.sampler = before
    return grid(drawn, columns=len(STEPS), scale=2, labels=[f"{name}, {steps} steps" for name in SAMPLERS for steps in STEPS])


def image_to_image(pipe: Pipeline, seed: int) -> Image.Image:
    """A red apple on its way to a green one, from little noise to all of it."""
    start = pipe("red apple", seed=seed).images[0]
    drawn = [pipe("green apple", image=start, strength=strength, seed=seed).images[0] for strength in STRENGTHS]
    labels = ["red apple", *(f"green apple, strength {strength:g}" for strength in STRENGTHS)]
    return grid([start, *drawn], columns=len(labels), scale=2, labels=labels)


def inpainting(pipe: Pipeline, seed: int) -> Image.Image:
    """The right half of a picture repainted in other colours; the left half stays."""
    start = pipe(PROMPT, seed=seed).images[0]
    mask = Image.new("L", (SIZE, SIZE))
    mask.paste(255, (SIZE // 2, 0, SIZE, SIZE))
    others = [f"{colour} heart on a yellow background" for colour in ("red", "green", "purple", "black")]
    drawn = [pipe(other, image=start, mask_image=mask, seed=seed).images[0] for other in others]
    labels = [PROMPT, "mask", *others]
    return grid([start, mask.convert("RGB"), *drawn], columns=len(labels), scale=2, labels=labels)


@torch.no_grad()
def noising(pipe: Pipeline, seed: int) -> Image.Image:
    """One picture's latents under rising noise, x_t = alpha_t x_0 + sigma_t noise, decoded."""
    start = pipe(PROMPT, seed=seed).images[0]
    parameter = next(pipe.autoencoder.parameters())
    x0_1CHW = pipe.autoencoder.encode(to_pixels(start, channels=3).to(parameter.device, parameter.dtype)).mode()
    noise_1CHW = torch.randn(x0_1CHW.shape, generator=torch.Generator().manual_seed(seed)).to(x0_1CHW)
    drawn = []
    for t in TIMES:
        level = pipe.schedule.level(t)
        x_1CHW = x0_1CHW if t == 0 else level.alpha * x0_1CHW + level.sigma * noise_1CHW
        drawn += from_pixels(pipe.autoencoder.decode(x_1CHW), "pil")
    return grid(drawn, columns=len(TIMES), scale=2, labels=["encoded, decoded", *(f"t = {t}" for t in TIMES[1:])])


PICTURES: dict[str, Callable[[Pipeline, int], Image.Image]] = {
    "prompts": prompts,
    "guidance": guidance,
    "samplers": samplers,
    "image-to-image": image_to_image,
    "inpainting": inpainting,
    "noising": noising,
}


def save(picture: Image.Image, path: Path) -> None:
    """Write a picture with at most 256 colours, which the eye hardly misses and which halves the file. Raises: OutputError."""
    try:
        picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error}") from None


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m ldmkit_emoji.gallery", description="Make the pictures of README.md.")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--only", choices=list(PICTURES), action="append", help="one of them (may be given again)")
    parser.add_argument("--model", default="emoji", help="name or folder of a saved pipeline (default emoji)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    args = parser.parse_args(argv)
    check_writable(args.output)
    pipe = Pipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    for name in args.only or PICTURES:
        path = args.output / f"{name}.png"
        save(PICTURES[name](pipe, args.seed), path)
        print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    plainly(main)
