"""`ldmkit generate`: draw pictures from the command line.

Every PNG carries, in its text chunk `ldmkit`, what drew it (prompt, seed, settings, versions), and `--like` draws it again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmkit.commands import models, pictures, recorded
from ldmkit.errors import InputError, LdmkitError

if TYPE_CHECKING:
    from PIL import Image

    from ldmkit.interfaces import Conditioner
    from ldmkit.pipeline import Pipeline
    from ldmkit.preview import Preview

CALL = {
    "steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt", "height": "height",
    "width": "width", "strength": "strength", "noise_level": "noise_level",
}  # fmt: skip
"""Settings that a call takes, and their names there."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. Options not given are the model's own defaults."""
    parser.add_argument(
        "prompt",
        nargs="*",
        metavar="PROMPT",
        help="what to draw; one picture (or N, with -n) for each. Of class-conditional models: a class's name or number; of "
        "models that draw or upscale without being told what: none",
    )
    parser.add_argument("--sampler", help="ddim, euler, ... (see: ldmkit plugins)")
    parser.add_argument("--steps", type=int, help="number of sampling steps")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free guidance scale; up to 1 is off")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    parser.add_argument("--seed", type=int, help="the same seed draws the same pictures (default: a new one, which is printed)")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="pictures per prompt, or in all")
    parser.add_argument("--height", type=int, help="in pixels")
    parser.add_argument("--width", type=int, help="in pixels")
    parser.add_argument("--image", metavar="FILE", help="start from this picture, or upscale it (by the model)")
    parser.add_argument("--strength", type=float, help="how far to go from --image, 0 to 1")
    parser.add_argument("--noise-level", type=int, metavar="N", help="of upscalers: how much noise hides --image's flaws")
    parser.add_argument("--image-prompt", metavar="FILE", help="a picture instead of a PROMPT, for models that vary pictures")
    parser.add_argument("--mask", metavar="FILE", help="repaint --image where this picture is white")
    parser.add_argument("--like", metavar="PICTURE.png", help="draw again what drew this picture; other options change it")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures drawn at once at most (default: 8)")
    parser.add_argument("--grid", metavar="FILE.png", help="also write all pictures into one sheet with their prompts")
    parser.add_argument("--preview", metavar="FILE.png", help="show the pictures as they emerge: written anew after each step")
    parser.add_argument("--taesd", metavar="DIR", help="a small decoder for --preview, see load_decoder (default: the model's)")
    parser.add_argument(
        "-o", "--output", default="out", metavar="DIR|FILE.png", help="a folder, or a file for one picture (default: out)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    models.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, write, and say where. Raises: LdmkitError for anything that cannot be served, before drawing."""
    settings = {name: getattr(args, name) for name in recorded.SETTINGS}
    seed, prompts, first = args.seed, list(args.prompt), 0
    if args.like is not None:
        like = recorded.read(Path(args.like))
        settings = {name: getattr(like, name) if value is None else value for name, value in settings.items()}
        seed, first = like.seed if seed is None else seed, like.number
        prompts = prompts or ([] if like.prompt is None else [like.prompt])
        recorded.check_same_pictures(like, settings)
    settings["model"] = settings["model"] or "emoji"
    if settings["image_prompt"] is not None and prompts:
        raise InputError(f"--image-prompt {settings['image_prompt']} is instead of a PROMPT; give one of them")
    for name, value in (("-n", args.n), ("--batch", args.batch)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    names = [name for name in prompts or [_name(settings)] for _ in range(args.n)]
    targets = pictures.targets(Path(args.output), names)
    _check_sheets(args)

    pipe = models.load(settings, args.device, allowed=[name for name in models.CONSENT if getattr(args, name)])
    preview = _preview(args, pipe)
    if seed is None:
        import secrets

        seed = secrets.randbits(32)
    options = _call_options(settings)
    about, inputs = _asked(pipe, prompts, settings, options)
    each = [one for one in inputs for _ in range(args.n)]
    drawn: list[Image.Image] = []
    for start in range(0, len(each), args.batch):
        batch = each[start : start + args.batch]
        drawn += pipe(
            **({"num_images_per_prompt": len(batch)} if about is None else {about: batch}),
            seed=seed,
            first_image=first + start,
            callback_on_step_end=preview,
            progress=False if args.no_progress else None,
            **options,
        ).images
        for k in range(start, len(drawn)):
            prompt = names[k] if prompts else None
            pictures.save(drawn[k], targets[k], recorded.chunks(settings, prompt, seed, first + k, pipe))
    for target in targets:
        print(target)
    if args.grid is not None:
        from ldmkit.images import grid

        labels = None if about is None else names
        pictures.save(grid(drawn, scale=max(1, 192 // drawn[0].width), labels=labels), Path(args.grid), {})
        print(args.grid)
    print(f"seed {seed}", file=sys.stderr)
    return 0


# ------------------------------------------------------------------------------------------------------------ what is asked for


def _asked(
    pipe: Pipeline, prompts: list[str], settings: dict[str, Any], options: dict[str, Any]
) -> tuple[str | None, list[Any]]:
    """The call's argument that says what to draw, and its values; None and one value where the model is told nothing.

    Args:
        options: of the call; a picture to vary moves from there to the values.

    Raises:
        InputError: where what is asked for is lacking, or is more than the model takes.
    """
    model, conditioner = settings["model"], pipe.conditioner
    if pipe.upscaling is not None and settings["image"] is None:
        raise InputError(f"{model} upscales pictures: give --image FILE, the small one")
    if "image_prompt" in options:
        return "image_prompt", [options.pop("image_prompt")]
    if conditioner is None:
        if prompts:
            does = "upscales without one" if pipe.upscaling is not None else "is unconditional: it draws without one"
            raise InputError(f"a PROMPT was given, {prompts[0]!r}, but {model} {does}; leave it out (-n N for more pictures)")
        return None, [None]
    if isinstance(conditioner.null_input, int):
        if not prompts:
            raise InputError(f"nothing to draw: {model} draws classes; give their names or numbers as PROMPT")
        return "class_labels", [_class(conditioner, prompt) for prompt in prompts]
    if not prompts:
        raise InputError("nothing to draw: give a PROMPT, --image-prompt FILE or --like PICTURE.png")
    return "prompt", prompts


def _class(conditioner: Conditioner, text: str) -> str | int:
    """A class by its name, or else by its number."""
    try:
        conditioner.check([text])
    except LdmkitError:
        return int(text) if text.isdecimal() else text
    return text


def _name(settings: dict[str, Any]) -> str:
    """What pictures without a prompt are called: as the one they are made of, or as the model."""
    made_of = settings["image_prompt"] or settings["image"]
    model = Path(settings["model"])
    return Path(made_of).stem if made_of else model.stem if model.is_file() else model.resolve().name


def _check_sheets(args: argparse.Namespace) -> None:
    """Raise InputError or OutputError for --grid, --preview and --taesd that cannot be."""
    for path, option in ((args.grid, "--grid"), (args.preview, "--preview")):
        if path is not None:
            pictures.check_png(Path(path), option)
    if args.taesd is not None and args.preview is None:
        raise InputError(f"--taesd {args.taesd} is the decoder of --preview, which was not given; add it, or leave this out")


# -------------------------------------------------------------------------------------------------------- what it is drawn with


def _preview(args: argparse.Namespace, pipe: Pipeline) -> Preview | None:
    """The callback of --preview, checked against the model before anything is drawn."""
    from ldmkit.preview import Preview, load_decoder

    if args.preview is None:
        return None
    decoder = None if args.taesd is None else load_decoder(args.taesd, dtype=pipe.dtype, device=args.device)
    preview = Preview(args.preview, decoder=decoder)
    preview.check(pipe)
    return preview


def _call_options(settings: dict[str, Any]) -> dict[str, Any]:
    options = {theirs: settings[ours] for ours, theirs in CALL.items() if settings[ours] is not None}
    for name in recorded.PICTURES:
        if settings[name] is not None:
            options["mask_image" if name == "mask" else name] = _open(Path(settings[name]), f"--{name.replace('_', '-')}")
    return options


def _open(path: Path, option: str) -> Image.Image:
    """Turned as its EXIF data say. Raises: InputError where the file is no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{option} {path}: cannot be read as a picture ({error})") from None
