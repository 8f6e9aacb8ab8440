"""The options that say which model draws, and the model itself."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmkit.errors import InputError

if TYPE_CHECKING:
    import torch

    from ldmkit.pipeline import Pipeline

OF_ANY = ("sampler", "prediction")
OF_FOLDERS = ("variant", "revision", "allow_download")
OF_FILES = ("config", "tokenizer", "ema", "allow_pickle")
"""Options, and the models they are for."""
CONSENT = ("allow_pickle", "allow_download")
"""Those that allow something; a picture does not carry them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options, in a group of their own."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a registered name, a folder or a single file; owner/model on the hub (default: emoji)")
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32")
    group.add_argument("--lora", action="append", metavar="FILE[=WEIGHT]", help="a LoRA, of weight 1 if not given; or several")
    group.add_argument("--embedding", action="append", metavar="FILE[=WORD]", help="a word of textual inversion; or several")
    group.add_argument("--prediction", metavar="TYPE", help="epsilon, v_prediction, ..., where the files do not tell")
    group.add_argument("--variant", metavar="NAME", help="of a folder: fp16 reads *.fp16.safetensors")
    group.add_argument("--allow-download", action="store_true", help="fetch owner/model from the Hugging Face hub")
    group.add_argument("--revision", metavar="COMMIT", help="of a model on the hub: the full hash")
    group.add_argument(
        "--config", metavar="DIR", help="of a single file: a folder in diffusers' layout, for what keys do not tell"
    )
    group.add_argument("--tokenizer", metavar="DIR", help="of a single file: the folder of its vocabulary")
    group.add_argument("--ema", action="store_const", const=True, help="of a single file: take the averaged weights")
    group.add_argument("--allow-pickle", action="store_true", help="read a .ckpt, by torch's unpickler for tensors alone")


def load(settings: dict[str, Any], device: str, *, allowed: Collection[str]) -> Pipeline:
    """The model that the settings name, with what is added to it. `allowed` are of `CONSENT`.

    Raises:
        InputError: for options it has no use for; others as `from_pretrained` and `from_single_file`.
    """
    import torch

    from ldmkit.pipeline import Pipeline

    model, file = settings["model"], Path(settings["model"]).is_file()
    given = {**settings, **{name: True if name in allowed else None for name in CONSENT}}
    added = settings["lora"] or settings["embedding"]  # which may be pickles
    unfit = [name for name in (OF_FOLDERS if file else OF_FILES) if given[name] is not None]
    unfit = [name for name in unfit if not (added and name == "allow_pickle")]
    if unfit:
        option, fits = f"--{unfit[0].replace('_', '-')}", "folders and names" if file else "single files"
        raise InputError(f"{option} is for {fits}, and --model {model} is {'a single file' if file else 'none'}; leave it out")
    names = (*OF_ANY, *(OF_FILES if file else OF_FOLDERS))
    options = {name: given[name] for name in names if given[name] is not None}
    options |= {"dtype": getattr(torch, settings["dtype"] or "float32"), "device": _device(device)}
    pipe = Pipeline.from_single_file(model, **options) if file else Pipeline.from_pretrained(model, **options)
    for text in settings["lora"] or ():
        lora, weight = path_and_word(text)
        pipe.load_lora_weights(lora, weight=_number(text, weight), allow_pickle="allow_pickle" in allowed)
    for text in settings["embedding"] or ():
        embedding, word = path_and_word(text)
        pipe.load_textual_inversion(embedding, word, allow_pickle="allow_pickle" in allowed)
    return pipe


def path_and_word(text: str) -> tuple[Path, str | None]:
    """`FILE=WORD` or `FILE` in two; a file may have = in its name."""
    file, sign, word = text.rpartition("=")
    return (Path(text), None) if not file or not sign or Path(text).exists() else (Path(file), word)


def _number(text: str, weight: str | None) -> float:
    try:
        return 1.0 if weight is None else float(weight)
    except ValueError:
        raise InputError(f"--lora {text}: what follows = is the weight, a number, not {weight!r}") from None


def _device(name: str) -> torch.device:
    import torch

    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: torch knows no such device; use cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count() or "no"
        raise InputError(f"--device {name}: this torch ({torch.__version__}) sees {count} CUDA device; use --device cpu")
    return device
