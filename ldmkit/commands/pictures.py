"""Where drawn pictures go: names, checks before drawing, PNG files with text chunks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ldmkit.errors import InputError, OutputError

if TYPE_CHECKING:
    from PIL import Image


def targets(output: Path, names: list[str]) -> list[Path]:
    """Where each picture goes, in a folder by what it is called. Raises: InputError, OutputError where it cannot be written."""
    from ldmkit.checkpoints.files import check_writable

    if output.suffix and not output.is_dir():
        if output.suffix.lower() == ".png" and len(names) > 1:
            raise InputError(
                f"-o {output}: one file for {len(names)} pictures; name a folder, or use --grid {output} for one sheet"
            )
        check_png(output, "-o")
        return [output]
    check_writable(output)
    taken = {path.name for path in output.glob("*.png")}
    chosen = []
    for called in names:
        stem = "-".join("".join(c if c.isalnum() else " " for c in called.lower()).split())[:60]
        stem = stem.encode()[:200].decode(errors="ignore") or "picture"  # most file systems take 255 bytes, not characters
        name = next(n for k in range(1, 10**6) if (n := f"{stem}-{k}.png") not in taken)
        taken.add(name)
        chosen.append(output / name)
    return chosen


def check_png(path: Path, option: str) -> None:
    """Raise where a file is not called .png, or cannot be written."""
    from ldmkit.checkpoints.files import check_writable

    if path.suffix.lower() != ".png":
        folder = " a folder or" if option == "-o" else ""
        raise InputError(f"{option} {path}: pictures are written as PNG; name{folder} a file that ends in .png")
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; name a file in it")
    check_writable(path.parent)


def save(picture: Image.Image, target: Path, chunks: dict[str, str]) -> None:
    """Write a PNG with text chunks. Raises: OutputError."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    from ldmkit.checkpoints.files import write_bytes

    info = PngInfo()
    for key, value in chunks.items():
        info.add_itxt(key, value)
    buffer = BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info)
    write_bytes(target, buffer.getvalue())
