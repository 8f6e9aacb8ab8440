"""`ldmkit generate`: draw pictures from the command line.

Every PNG carries, in its text chunk `ldmkit`, what drew it (prompt, seed, settings, versions), and `--like` draws it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmkit.errors import InputError, OutputError

if TYPE_CHECKING:
    from PIL import Image

    from ldmkit.pipeline import Pipeline
    from ldmkit.preview import Preview

CHUNK = "ldmkit"
SETTINGS = (
    "model", "sampler", "steps", "guidance", "negative", "height", "width", "image", "mask", "strength", "noise_level",
    "image_prompt", "dtype",
)  # fmt: skip
"""Options that decide a picture, beside its prompt, seed and number."""
FILES = ("image", "mask", "image_prompt")
"""Those that name a picture."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options. Options not given are the model's own defaults."""
    parser.add_argument("prompt", nargs="*", metavar="PROMPT", help="what to draw; one picture (or N, with -n) for each")
    parser.add_argument("--model", help="a pipeline's registered name or folder (default: emoji)")
    parser.add_argument("--sampler", help="ddim, euler, ... (see: ldmkit plugins)")
    parser.add_argument("--steps", type=int, help="number of sampling steps")
    parser.add_argument("--guidance", type=float, metavar="SCALE", help="classifier-free guidance scale; up to 1 is off")
    parser.add_argument("--negative", metavar="TEXT", help="what not to draw")
    parser.add_argument("--seed", type=int, help="the same seed draws the same pictures (default: a new one, which is printed)")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="pictures per prompt")
    parser.add_argument("--height", type=int, help="in pixels")
    parser.add_argument("--width", type=int, help="in pixels")
    parser.add_argument("--image", metavar="FILE", help="start from this picture, or upscale it (by the model)")
    parser.add_argument("--strength", type=float, help="how far to go from --image, 0 to 1")
    parser.add_argument("--noise-level", type=int, metavar="N", help="of upscalers: how much noise hides --image's flaws")
    parser.add_argument("--image-prompt", metavar="FILE", help="a picture instead of a PROMPT, for models that vary pictures")
    parser.add_argument("--mask", metavar="FILE", help="repaint --image where this picture is white")
    parser.add_argument("--like", metavar="PICTURE.png", help="draw again what drew this picture; other options change it")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="pictures drawn at once at most (default: 8)")
    parser.add_argument("--grid", metavar="FILE.png", help="also write all pictures into one sheet with their prompts")
    parser.add_argument("--preview", metavar="FILE.png", help="show the pictures as they emerge: written anew after each step")
    parser.add_argument("--taesd", metavar="DIR", help="a small decoder for --preview, see load_decoder (default: the model's)")
    parser.add_argument(
        "-o", "--output", default="out", metavar="DIR|FILE.png", help="a folder, or a file for one picture (default: out)"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Draw, write, and say where. Raises: LdmkitError for anything that cannot be served, before drawing."""
    settings = {name: getattr(args, name) for name in SETTINGS}
    seed, prompts, first = args.seed, list(args.prompt), 0
    if args.like is not None:
        recorded = read_metadata(Path(args.like))
        settings = {name: recorded.get(name) if value is None else value for name, value in settings.items()}
        seed = recorded["seed"] if seed is None else seed
        prompts, first = prompts or [recorded["prompt"]], recorded["number"]
        _check_same_inputs(recorded, settings)
    if settings["image_prompt"] is not None:
        if args.prompt:
            raise InputError(f"--image-prompt {settings['image_prompt']} is instead of a PROMPT; give one of them")
        prompts = prompts or [Path(settings["image_prompt"]).stem]
    if not prompts:
        raise InputError("nothing to draw: give a PROMPT, or --like PICTURE.png")
    for name, value in (("-n", args.n), ("--batch", args.batch)):
        if value < 1:
            raise InputError(f"{name} = {value}: must be at least 1")
    prompts = [prompt for prompt in prompts for _ in range(args.n)]
    targets = _targets(Path(args.output), prompts)
    if args.grid is not None:
        _check_png(Path(args.grid), "--grid")
    if args.preview is not None:
        _check_png(Path(args.preview), "--preview")
    elif args.taesd is not None:
        raise InputError(f"--taesd {args.taesd} is the decoder of --preview, which was not given; add it, or leave this out")

    pipe = _pipeline(settings, args.device)
    preview = _preview(args, pipe)
    if seed is None:
        import secrets

        seed = secrets.randbits(32)
    options = _call_options(settings)
    shown = options.pop("image_prompt", None)
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), args.batch):
        batch = prompts[start : start + args.batch]
        drawn = pipe(
            batch if shown is None else None,
            image_prompt=None if shown is None else [shown] * len(batch),
            seed=seed,
            first_image=first + start,
            callback_on_step_end=preview,
            progress=False if args.no_progress else None,
            **options,
        ).images
        for k, picture in enumerate(drawn, start=start):
            _write(picture, targets[k], _metadata(settings, prompts[k], seed, first + k, pipe))
            pictures.append(picture)
    for target in targets:
        print(target)
    if args.grid is not None:
        from ldmkit.images import grid

        _save(grid(pictures, scale=max(1, 192 // pictures[0].width), labels=prompts), Path(args.grid), {})
        print(args.grid)
    print(f"seed {seed}", file=sys.stderr)
    return 0


def read_metadata(picture: Path) -> dict[str, Any]:
    """What drew a picture. Raises: InputError where the file is no picture, or was not drawn by `ldmkit generate`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as image:
            text = image.info.get(CHUNK)
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"--like {picture}: cannot be read as a picture ({error})") from None
    if text is None:
        raise InputError(f"--like {picture}: carries no ldmkit settings; only pictures from 'ldmkit generate' do")
    recorded: dict[str, Any] = json.loads(text)
    return recorded


def _pipeline(settings: dict[str, Any], device: str) -> Pipeline:
    import torch

    from ldmkit.pipeline import Pipeline

    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"--device {device}: torch knows no such device; use cpu or cuda") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise InputError(f"--device {device}: this torch ({torch.__version__}) sees {count} CUDA device; use --device cpu")
    parts = {} if settings["sampler"] is None else {"sampler": settings["sampler"]}
    dtype = getattr(torch, settings["dtype"] or "float32")
    return Pipeline.from_pretrained(settings["model"] or "emoji", dtype=dtype, device=device, **parts)


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
    names = {
        "steps": "num_inference_steps", "guidance": "guidance_scale", "negative": "negative_prompt", "height": "height",
        "width": "width", "strength": "strength", "noise_level": "noise_level",
    }  # fmt: skip
    options = {theirs: settings[ours] for ours, theirs in names.items() if settings[ours] is not None}
    for name in FILES:
        if settings[name] is not None:
            options["mask_image" if name == "mask" else name] = _open(Path(settings[name]), _option(name))
    return options


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _open(path: Path, option: str) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{option} {path}: cannot be read as a picture ({error})") from None


def _targets(output: Path, prompts: list[str]) -> list[Path]:
    """Where each picture goes; checked to be writable before anything is drawn."""
    from ldmkit.checkpoints.files import check_writable

    if output.suffix and not output.is_dir():
        if output.suffix.lower() == ".png" and len(prompts) > 1:
            raise InputError(
                f"-o {output}: one file for {len(prompts)} pictures; name a folder, or use --grid {output} for one sheet"
            )
        _check_png(output, "-o")
        return [output]
    check_writable(output)
    taken = {path.name for path in output.glob("*.png")}
    targets = []
    for prompt in prompts:
        stem = "-".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())[:60]
        stem = stem.encode()[:200].decode(errors="ignore") or "picture"  # most file systems take 255 bytes, not characters
        name = next(n for k in range(1, 10**6) if (n := f"{stem}-{k}.png") not in taken)
        taken.add(name)
        targets.append(output / name)
    return targets


def _check_png(path: Path, option: str) -> None:
    """Raise where a file is not called .png, or cannot be written."""
    from ldmkit.checkpoints.files import check_writable

    if path.suffix.lower() != ".png":
        folder = " a folder or" if option == "-o" else ""
        raise InputError(f"{option} {path}: pictures are written as PNG; name{folder} a file that ends in .png")
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; name a file in it")
    check_writable(path.parent)


def _metadata(settings: dict[str, Any], prompt: str, seed: int, number: int, pipe: Pipeline) -> dict[str, Any]:
    import torch

    from ldmkit import __version__
    from ldmkit.checkpoints.pipelines import INDEX

    used = {name: value for name, value in settings.items() if value is not None}
    for name in FILES:
        if name in used:
            used[name] = str(Path(used[name]).resolve())
            used[f"{name}_sha256"] = _sha256(Path(used[name]))
    used.setdefault("model", "emoji")
    if (Path(used["model"]) / INDEX).is_file():
        used["model"] = str(Path(used["model"]).resolve())
    used.setdefault("steps", pipe.defaults.num_inference_steps)
    used.setdefault("guidance", pipe.defaults.guidance_scale)
    versions = {"ldmkit": __version__, "torch": torch.__version__}
    return {"prompt": prompt, "seed": seed, "number": number, **used, "versions": versions}


def _check_same_inputs(recorded: dict[str, Any], settings: dict[str, Any]) -> None:
    for name in FILES:
        path, option = settings[name], _option(name)
        if path is None or path != recorded.get(name):
            continue
        if not Path(path).is_file():
            raise InputError(
                f"--like: the picture was drawn from {option} {path}, which is gone; pass {option} with where it is now"
            )
        if _sha256(Path(path)) != recorded[f"{name}_sha256"]:
            raise InputError(
                f"--like: {path} has changed since the picture was drawn; pass {option} {path} to use it as it is now"
            )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write(picture: Image.Image, target: Path, metadata: dict[str, Any]) -> None:
    _save(picture, target, {CHUNK: json.dumps(metadata), "prompt": metadata["prompt"], "seed": str(metadata["seed"])})


def _save(picture: Image.Image, target: Path, chunks: dict[str, str]) -> None:
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    from ldmkit.checkpoints.files import write_bytes

    info = PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    buffer = BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_bytes(target, buffer.getvalue())
