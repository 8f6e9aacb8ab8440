"""`.ckpt` files: zip archives of a pickle and raw bytes. Read on request only, by torch's unpickler for tensors alone."""

from __future__ import annotations

import codecs
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldmkit.errors import CheckpointError

LONGEST_PICKLE = 100_000_000
"""Bytes of `data.pkl`, which holds names and shapes only."""


class _LeftOut:
    """Stands for classes that trainers' checkpoints name beside the weights: nothing of theirs is imported or kept."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


LEFT_OUT = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",  # in Stable Diffusion's first files
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
)
"""Names of such classes."""


def is_pickle(path: Path) -> bool:
    """Whether a file begins as torch.save's do, by its content."""
    try:
        with path.open("rb") as file:
            return file.read(2) in (b"PK", b"\x80\x02")
    except OSError as error:
        raise CheckpointError(f"weights file {path} cannot be read: {error.strerror or error}") from None


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.ckpt`, mapped into memory; those below "state_dict" where there is one. No code of the file is run.

    Raises:
        CheckpointError: for anything but an archive of tensors: other objects, compressed or oversized members, damage.
    """
    content = unpickle(path)
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    return tensors_of(path, content)


def unpickle(path: Path) -> Any:
    """What an archive holds: tensors, plain values, lists and mappings of them. Raises: CheckpointError, as `read_pickle`."""
    _check_archive(path)
    try:
        with torch.serialization.safe_globals([(_LeftOut, name) for name in LEFT_OUT]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0] if "Unsupported global" not in str(error) else _global(str(error))
        raise CheckpointError(
            f"{path} holds more than tensors ({reason}); such pickles can run code, and none was run. "
            "Ask for a safetensors file, or convert it where you trust it"
        ) from None
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def tensors_of(path: Path, content: Any) -> dict[str, Tensor]:
    """The tensors of a mapping by name. Raises: CheckpointError where it is none, or a tensor is not an ordinary one."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not tensors by name")
    tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        _check_tensor(path, key, tensor)
    return tensors


def _check_archive(path: Path) -> None:
    """Every member is stored as it is, within the file: nothing grows when it is read."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            programs = [
                archive.read(member)
                for member in members
                if member.filename.endswith(".pkl")
                and member.compress_type == zipfile.ZIP_STORED
                and member.file_size <= min(LONGEST_PICKLE, path.stat().st_size)
            ]
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, EOFError) as error:
        raise CheckpointError(
            f"{path} is no zip archive, or a damaged one ({error}); files from before torch 1.6 are not read: save it again"
        ) from None
    packed = [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]
    size = path.stat().st_size
    if packed or sum(member.file_size for member in members) > size:
        raise CheckpointError(
            f"{path} is compressed ({', '.join(packed[:3]) or 'its members overlap'}), which torch.save never does; "
            "it could grow without end and is not read"
        )
    large = [member.filename for member in members if member.filename.endswith(".pkl") and member.file_size > LONGEST_PICKLE]
    if large:
        raise CheckpointError(f"{path}: {large[0]} is larger than {LONGEST_PICKLE} bytes; it should only hold names and shapes")
    for program in programs:
        _check_growth(path, program)


def _check_growth(path: Path, program: bytes) -> None:
    """What torch's unpickler calls may make much of little: bytes of any length, or codecs applied again and again."""
    names, strings = set(), set()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            if opcode.name == "GLOBAL":
                names.add(str(argument))
            elif isinstance(argument, str) and len(argument) < 32:
                strings.add(argument)
    except Exception as error:  # a damaged pickle fails in as many ways as there are opcodes
        raise CheckpointError(f"{path} is damaged: its pickle breaks off: {error}") from None
    grows = [name for name in sorted(names) if name.split(" ")[-1] == "bytearray"]
    if "_codecs encode" in names:  # how bytes are stored, as text in latin1
        grows += [f"_codecs encode with {string!r}" for string in sorted(strings) if _is_of_bytes(string)]
    if grows:
        raise CheckpointError(f"{path} calls {grows[0]}, which weights never do; it could grow without end and is not read")


def _is_of_bytes(name: str) -> bool:
    """Whether a string names a codec from bytes to bytes, as hex, which can be applied to its own result."""
    try:
        return not codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


def _check_tensor(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise CheckpointError(f"{path}: {key} is no ordinary tensor ({tensor.layout}, {tensor.device})")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CheckpointError(f"{path}: {key} of shape {tuple(tensor.shape)} is larger than what is stored of it")


def _global(message: str) -> str:
    found = next((word for word in message.split() if word.startswith("GLOBAL")), "")
    start = message.find("GLOBAL")
    return message[start : start + 80].split(" was not", maxsplit=1)[0] if found else "an unknown class"
