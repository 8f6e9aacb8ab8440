"""What can be added to a pipeline after it was made: LoRA, beside its weights or merged into them, and new words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ldmkit.checkpoints.accounting import Accounting
from ldmkit.checkpoints.lora import Pair, pairs_of
from ldmkit.checkpoints.lora_files import read_lora
from ldmkit.checkpoints.lora_names import Layers
from ldmkit.checkpoints.textual_inversion import read_textual_inversion
from ldmkit.errors import InputError, InputTypeError
from ldmkit.interfaces import Conditioner, Denoiser
from ldmkit.nn.low_rank import LowRank, attach, detach, directions


@dataclass
class Adapter:
    """One LoRA: what it adds to which layers (as its file has it), and how much of it is wanted."""

    pairs: list[tuple[nn.Module, Pair]]
    weight: float


@dataclass
class Adapters:
    """All LoRAs of a pipeline.

    Attributes:
        loaded: by name, in the order they came.
        kept: while fused, the plain weights that the merged ones stand in for, on the CPU.
    """

    loaded: dict[str, Adapter] = field(default_factory=dict)
    kept: list[tuple[nn.Module, Tensor]] | None = None

    def attach(self) -> None:
        for name, adapter in self.loaded.items():
            self.attach_one(name, adapter)

    def attach_one(self, name: str, adapter: Adapter) -> None:
        made = []
        for layer, pair in adapter.pairs:
            weight = cast(Tensor, layer.weight)
            gain = None if pair.magnitude is None else (_directed(weight.detach(), pair) - 1).to(weight.dtype)
            low_rank = LowRank(pair.down, pair.up, scale=pair.scale, weight=adapter.weight, gain=gain)
            made.append(low_rank.to(weight.device, weight.dtype))
        for (layer, _), low_rank in zip(adapter.pairs, made, strict=True):  # once there was memory for all
            attach(layer, name, low_rank)

    def detach(self, names: Sequence[str]) -> None:
        for name in names:
            for layer, _ in self.loaded[name].pairs:
                detach(layer, name)

    @torch.no_grad()
    def fuse(self, lora_scale: float) -> None:
        """Merge in float64 and round once, so that no order of adapters matters; then the layers are plain."""
        changes: dict[nn.Module, list[tuple[float, Pair]]] = {}
        for adapter in self.loaded.values():
            for layer, pair in adapter.pairs:
                changes.setdefault(layer, []).append((adapter.weight * lora_scale, pair))
        self.detach(list(self.loaded))
        self.kept = []
        try:
            for layer, terms in changes.items():
                weight = cast(nn.Parameter, layer.weight)
                self.kept.append((layer, weight.detach().to("cpu", copy=True)))
                plain = weight.to(_exact(weight.device), torch.float64)
                weight.copy_(plain + sum(factor * _change(plain, pair) for factor, pair in terms))
        except BaseException:  # memory ran out, or the user's patience
            self.unfuse()
            raise

    @torch.no_grad()
    def unfuse(self) -> None:
        for layer, weight in self.kept or []:
            cast(nn.Parameter, layer.weight).copy_(weight)
        self.kept = None
        self.attach()


def _change(plain: Tensor, pair: Pair) -> Tensor:
    """What a whole adapter adds to a weight, in float64."""
    up, down = (side.to(plain).flatten(1) for side in (pair.up, pair.down))
    change = pair.scale * (up @ down).view_as(plain)
    return change if pair.magnitude is None else _directed(plain, pair) * (plain + change) - plain


def _directed(weight: Tensor, pair: Pair) -> Tensor:
    """DoRA's m / |W + scale up down|, in float64."""
    assert pair.magnitude is not None
    exact = weight.to(_exact(weight.device), torch.float64)
    return directions(exact, pair.down, pair.up, scale=pair.scale, magnitude=pair.magnitude)


def _exact(device: torch.device) -> torch.device:
    """Where float64 is to be had: not on Apple's GPUs."""
    return torch.device("cpu") if device.type == "mps" else device


class Adaptable:
    """The part of `Pipeline` that takes adapters and words."""

    denoiser: Denoiser
    conditioner: Conditioner | None
    accounting: Mapping[str, Accounting]
    _adapters: Adapters

    @property
    def adapters(self) -> dict[str, float]:
        """The LoRAs that are loaded, and their weights."""
        return {name: adapter.weight for name, adapter in self._adapters.loaded.items()}

    def load_lora_weights(
        self,
        file: str | Path | Mapping[str, Tensor],
        adapter_name: str | None = None,
        weight: float = 1.0,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
    ) -> str:
        """Add a LoRA beside those that are loaded already; it works at once, together with them.

        Names of kohya, PEFT, diffusers (old and new) and cloneofsimo are understood, for the denoiser's and the text encoders'
        linear layers and convolutions; so is DoRA (Liu et al. 2024), of which half a weight goes half the way.
        `pipe.accounting["lora NAME"]` says where each key went.

        Args:
            file: a safetensors file, a folder that holds one, tensors by name, or a pickle (see `allow_pickle`).
            adapter_name: what it is called in `set_adapters`; default_0, default_1, ... if not given.
            weight: how much of it is wanted; may be negative.
            strict: whether keys that the pipeline has no layer for are an error; else they are left out with a warning.
            allow_pickle: read `.bin` and `.pt`, by torch's unpickler for tensors alone, which runs no code of the file.

        Returns:
            Its name.

        Raises:
            CheckpointError, ArchitectureMismatchError: for a file that is missing, damaged, of another kind or does not fit;
                the pipeline is as it was.
            InputError, InputTypeError: for a name that is taken, a weight that is no finite number, or while fused.
        """
        held = self._adapters
        self._check_unfused("load another")
        if adapter_name is None:
            adapter_name = next(name for i in range(len(held.loaded) + 1) if (name := f"default_{i}") not in held.loaded)
        if not isinstance(adapter_name, str) or not adapter_name or "." in adapter_name:
            raise InputError(f"adapter_name = {adapter_name!r}: must be a string, not empty, without dots")
        if adapter_name in held.loaded or hasattr(nn.ModuleDict(), adapter_name):
            raise InputError(f"adapter_name = {adapter_name!r} is taken; choose another, or unload_lora_weights first")
        layers = Layers(self.denoiser, self.conditioner)
        model = " and ".join(type(part).__name__ for part in (self.denoiser, self.conditioner) if part is not None)
        pairs, accounting = pairs_of(read_lora(file, allow_pickle=allow_pickle), layers, model=model, strict=strict)
        adapter = Adapter([(layers.by_name[name], pair) for name, pair in pairs.items()], _number("weight", weight))
        held.attach_one(adapter_name, adapter)
        held.loaded[adapter_name] = adapter
        self.accounting = {**self.accounting, f"lora {adapter_name}": accounting}
        return adapter_name

    def load_textual_inversion(
        self, file: str | Path | Mapping[str, Any], token: str | None = None, *, allow_pickle: bool = False
    ) -> list[str]:
        """Teach the conditioner words of textual inversion; the tokenizer and the embeddings are extended and saved with it.

        Read are diffusers' `learned_embeds`, the web UI's `string_to_param` and `emb_params`, SDXL's `clip_l` and `clip_g`, and
        embeddings inside LoRA files. A word of several vectors stands for all of them wherever a prompt has it.

        Args:
            file: a safetensors file, a pickle (see `allow_pickle`), or its content.
            token: the word; not given, the file's own, or the file's name where it has none.
            allow_pickle: read `.pt` and `.bin`, by torch's unpickler for tensors alone, which runs no code of the file.

        Returns:
            The new words.

        Raises:
            CheckpointError, ArchitectureMismatchError: for a file that is missing, damaged, or of another width.
            InputError: for a word that is in the vocabulary already; the pipeline is then as it was.
        """
        words = read_textual_inversion(file, token, allow_pickle=allow_pickle)
        if self.conditioner is None:
            raise InputError("this pipeline has no conditioner that could learn a word")
        self.conditioner.add_tokens(words)
        return list(words)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: float | Sequence[float] = 1.0) -> None:
        """Use these LoRAs, each with its weight (one weight is for all of them); others stay loaded and are off.

        Raises:
            InputError, InputTypeError: for unknown names, another number of weights than of names, or while fused.
        """
        self._check_unfused("set weights")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = [*weights] if isinstance(weights, Sequence) else [weights] * len(names)
        self._check_known(names)
        if len(given) != len(names):
            raise InputError(f"set_adapters got {len(names)} names and {len(given)} weights; give one for each, or one for all")
        wanted = {name: _number("weights", weight) for name, weight in zip(names, given, strict=True)}
        for name, adapter in self._adapters.loaded.items():
            adapter.weight = wanted.get(name, 0.0)
            for layer, _ in adapter.pairs:
                cast(LowRank, cast(nn.ModuleDict, layer.adapters)[name]).weight = adapter.weight

    def fuse_lora(self, lora_scale: float = 1.0) -> None:
        """Merge all LoRAs, by their weights times `lora_scale`, into the weights; `save_pretrained` then writes what is drawn.

        The plain weights are kept on the CPU, so that `unfuse_lora` restores them bit for bit.

        Raises:
            InputError: without any LoRA, or while fused.
        """
        self._check_unfused("fuse again")
        if not self._adapters.loaded:
            raise InputError("there is no LoRA to fuse; load_lora_weights loads one")
        self._adapters.fuse(_number("lora_scale", lora_scale))

    def unfuse_lora(self) -> None:
        """Undo `fuse_lora`: plain weights, adapters beside them. Raises: InputError unless fused."""
        if self._adapters.kept is None:
            raise InputError("no LoRA is fused; fuse_lora does that")
        self._adapters.unfuse()

    def unload_lora_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Take LoRAs away (all of them, if none are named); the weights are then as before any was loaded, bit for bit.

        Raises:
            InputError: for unknown names, or for names while fused.
        """
        held = self._adapters
        if adapter_names is not None:
            self._check_unfused("unload some")
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names or held.loaded)
        self._check_known(names)
        if held.kept is not None:
            held.unfuse()
        held.detach(names)
        for name in names:
            del held.loaded[name]
        gone = {f"lora {name}" for name in names}
        self.accounting = {name: accounting for name, accounting in self.accounting.items() if name not in gone}

    def _check_savable(self) -> None:
        if self._adapters.loaded and self._adapters.kept is None:
            raise InputError(
                f"LoRA {', '.join(self._adapters.loaded)} would not be saved; fuse_lora merges into the weights, "
                "unload_lora_weights leaves it out"
            )

    def _check_unfused(self, what: str) -> None:
        if self._adapters.kept is not None:
            raise InputError(f"LoRA weights are fused; unfuse_lora first, then {what}")

    def _check_known(self, names: Sequence[str]) -> None:
        known = self._adapters.loaded
        unknown = [name for name in names if name not in known]
        if unknown or len(set(names)) != len(names):
            shown = ", ".join(map(repr, unknown)) or "a name given twice"
            raise InputError(f"no such LoRA: {shown}; loaded are {', '.join(known) or 'none'}")


def _number(name: str, value: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise InputTypeError(f"{name} = {value!r}: must be a number")
    if value != value or abs(value) == float("inf"):
        raise InputError(f"{name} = {value!r}: must be finite")
    return float(value)
