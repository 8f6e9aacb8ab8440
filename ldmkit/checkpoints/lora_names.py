"""What the keys of LoRA files mean: kohya's names, PEFT's, diffusers' of three ages, and cloneofsimo's numbers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

from torch import nn

from ldmkit.checkpoints.compvis import unet_map
from ldmkit.checkpoints.keymap import KeyMap
from ldmkit.nn.low_rank import adaptable

Role = Literal["down", "up", "alpha", "magnitude"]

UNET, ENCODERS = "unet", ("text_encoder", "text_encoder_2")
RAW_PEFT = "base_model.model."
"""What PEFT puts in front of names in files of its own; how the adapters are scaled is then in `adapter_config.json`."""

_END = re.compile(
    r"(?:(?:\.lora_|[._]lora(?:_linear_layer)?\.)(?P<plain>down|up)\.weight"  # kohya; diffusers before PEFT
    r"|\.lora_(?P<peft>[AB])(?:\.\w+)?\.weight"
    r"|(?P<alpha>\.alpha)"
    r"|(?P<magnitude>\.dora_scale|\.lora_magnitude_vector(?:\.\w+){0,2}))$"  # LyCORIS and OneTrainer; PEFT and diffusers
)
_NUMBERED = re.compile(r"(unet|text_encoder):(\d+):(down|up)$")
_FLAT = {"lora_unet_": UNET, "lora_te_": ENCODERS[0], "lora_te1_": ENCODERS[0], "lora_te2_": ENCODERS[1]}
_OLD = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
"""A text encoder's layers as diffusers called them before 0.17."""
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


class Place(NamedTuple):
    """Where a tensor belongs: one of the matrices, the alpha, or DoRA's magnitude, of a layer ("unet.mid_block....to_q")."""

    layer: str
    role: Role


def describe(key: str) -> tuple[str, str, Role] | None:
    """What a key says by itself: component ("" where it names none), whose names they are, role; None for no LoRA's."""
    if numbered := _NUMBERED.match(key):
        return numbered[1], "cloneofsimo's numbers", "down" if numbered[3] == "down" else "up"
    end = _END.search(key)
    if end is None:
        return None
    role: Role = "down" if (end["plain"] or end["peft"]) in ("down", "A") else "up"
    role = "alpha" if end["alpha"] else "magnitude" if end["magnitude"] else role
    for start, component in _FLAT.items():
        if key.startswith(start):
            return component, "kohya's names", role
    first = key.partition(".")[0]
    return first if first in (UNET, *ENCODERS) else "", "PEFT's names" if end["peft"] else "diffusers' names", role


class Layers:
    """The layers of a pipeline that can be adapted, under all the names that files have for them.

    Attributes:
        by_name: component and path ("text_encoder.encoder.layers.0.mlp.fc1") => the layer.
    """

    def __init__(self, denoiser: nn.Module, conditioner: nn.Module | None) -> None:
        self.by_name: dict[str, nn.Module] = {}
        self._dotted: dict[str, str] = {}
        self._flat: dict[str, str] = {}
        self._numbered: dict[str, list[str]] = {}
        found = {UNET: denoiser, **dict(zip(ENCODERS, _text_encoders(conditioner), strict=False))}
        for component, root in found.items():
            paths = [path for path, layer in root.named_modules() if adaptable(layer)]
            compvis = _compvis(paths) if component == UNET else None
            alone = component != UNET and len(found) == 2  # the only encoder may be the second, as in XL's refiner
            called_too = ENCODERS if alone else (component,)
            for path in paths:
                name = f"{component}.{path}"
                self.by_name[name] = root.get_submodule(path)
                for alias in _aliases(path, compvis, encoder=component != UNET):
                    for called in called_too:
                        self._dotted[f"{called}.{alias}"] = self._flat[f"{called}.{_flat(alias)}"] = name
            order = _cloneofsimo_unet(paths) if component == UNET else _cloneofsimo_text(paths)
            self._numbered[component] = [f"{component}.{path}" for path in order]

    def place(self, key: str) -> Place | None:
        """What a key means; None where it names no layer, or no matrix of an adapter."""
        if numbered := _NUMBERED.match(key):
            component, number, role = numbered[1], int(numbered[2]), numbered[3]
            names = self._numbered.get(component, [])
            return Place(names[number], "down" if role == "down" else "up") if number < len(names) else None
        told = describe(key)
        layer = None if told is None else self._layer(_END.sub("", key))
        return None if told is None or layer is None else Place(layer, told[2])

    def _layer(self, path: str) -> str | None:
        for start, component in _FLAT.items():
            if path.startswith(start):
                return self._flat.get(f"{component}.{path[len(start) :]}")
        path = path.removeprefix(RAW_PEFT).replace(".processor.", ".")
        parent, _, last = path.rpartition(".")
        paths = [path, f"{path}.0", f"{parent}.{_OLD.get(last, last)}"]
        # A file for one component alone does not name it.
        names = [name for path in paths for name in (path, *(f"{component}.{path}" for component in (UNET, *ENCODERS)))]
        return next((self._dotted[name] for name in names if name in self._dotted), None)


def _text_encoders(conditioner: nn.Module | None) -> Iterator[nn.Module]:
    """Those built as transformers' CLIP, in order."""
    if conditioner is not None:
        for name, _ in conditioner.named_modules():
            if re.search(r"(^|\.)encoder\.layers\.0\.self_attn\.q_proj$", name):
                yield conditioner.get_submodule(name.removesuffix("encoder.layers.0.self_attn.q_proj").rstrip("."))


def _flat(path: str) -> str:
    return path.replace(".", "_")


def _aliases(path: str, compvis: KeyMap | None, *, encoder: bool) -> Iterator[str]:
    yield path
    if encoder:
        yield f"text_model.{path}"
    source = compvis.source(f"{path}.weight") if compvis else None
    if source is not None and source[1].pieces == 1:
        yield source[0].removesuffix(".weight")


def _compvis(paths: list[str]) -> KeyMap | None:
    """The names that trainers on Stability's code write (SDXL's `input_blocks_4_1_...`); None for another kind of network."""
    attention: dict[int, bool] = {}
    for path in paths:
        if level := re.match(r"down_blocks\.(\d+)\.(attentions)?", path):
            attention[int(level[1])] = attention.get(int(level[1]), False) or bool(level[2])
    layers = len({match[0] for path in paths if (match := re.match(r"down_blocks\.0\.resnets\.\d+", path))})
    if not layers:
        return None
    has = tuple(attention[level] for level in sorted(attention))
    return unet_map(levels=len(has), layers_per_block=layers, attention=has)


def _cloneofsimo_unet(paths: list[str]) -> list[str]:
    """The order in which diffusers 0.9 walked its U-Net: down, up, then the middle; the feed-forward between the attentions."""
    places = ("down_blocks", "up_blocks", "mid_block")
    blocks = [path.removesuffix(".attn1.to_q") for path in paths if path.startswith(places) and path.endswith(".attn1.to_q")]
    blocks.sort(key=lambda path: places.index(path.split(".")[0]))
    first, second = ([f"{end}.{name}" for name in _PROJECTIONS] for end in ("attn1", "attn2"))
    order = [f"{block}.{layer}" for block in blocks for layer in (*first, "ff.net.0.proj", *second)]
    return order if set(order) <= set(paths) else []  # without cross-attention there were no such files


def _cloneofsimo_text(paths: list[str]) -> list[str]:
    """As transformers registers a CLIP attention's layers."""
    layers = [path.removesuffix("q_proj") for path in paths if path.endswith(".self_attn.q_proj")]
    return [f"{layer}{name}" for layer in layers for name in ("k_proj", "v_proj", "q_proj", "out_proj")]


NUMBERED_CLASSES: Mapping[str, frozenset[str]] = {
    "unet": frozenset({"CrossAttention", "Attention", "GEGLU"}),
    "text_encoder": frozenset({"CLIPAttention"}),
}
"""What the numbers of cloneofsimo's files count, as their metadata say; others are counted otherwise."""
