"""Stable Diffusion XL's conditioner: two text encoders side by side, and the sizes that the network is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

import ldmkit.config
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.config import AssetPath
from ldmkit.errors import CheckpointError, InputError, InputTypeError
from ldmkit.interfaces import Condition, Conditioner
from ldmkit.nn import sinusoidal_embedding
from ldmkit_text.clip import CLIPEncoderConfig, CLIPTextConditioner
from ldmkit_text.prompts import check_prompts

Size = tuple[int, int]
"""(height, width), or (top, left), in pixels."""

Sizes = Size | Sequence[Size] | Tensor
"""One for all inputs, or one for each: (B, 2)."""

SCORE = 6.0
"""Aesthetic score that the refiner is told unless another is given."""


class SecondEncoderConfig(CLIPEncoderConfig):
    """As any CLIP encoder's, but the vector is made of its pooled text."""

    pooled: Literal[True] = True


class SDXLTextConditioner(Conditioner):
    """Prompts => tokens (B, 77, C) of both encoders side by side, and a vector (B, D): the second's pooled text, then the sizes
    (Podell et al. 2023, arXiv:2307.01952, sec. 2.1 and 2.2).

    State dict: first and second, each as `clip-text` has it. The refiner has the second encoder alone.
    """

    class Config(ldmkit.config.Config):
        """Attributes:
        vocab, merges: of both encoders, as for `clip-text`.
        first, second: the encoders; first = None is the refiner.
        size_dim: length of the embedding of each number.
        zero_null: nothing asked (no negative prompt) is all zeros instead of the empty prompt, as in XL's base model.
        """

        vocab: AssetPath
        merges: AssetPath | None = None
        first: CLIPEncoderConfig | None = None
        second: SecondEncoderConfig = SecondEncoderConfig()
        size_dim: int = Field(256, ge=2)
        zero_null: bool = True

    config: SDXLTextConditioner.Config
    provides = frozenset({"tokens_BLC", "vector_BC"})

    def __init__(self, config: SDXLTextConditioner.Config) -> None:
        super().__init__()
        self.config = config
        self.null_input = None if config.zero_null else ""
        self.first = None if config.first is None else self._encoder("first", config.first)
        self.second = self._encoder("second", config.second)

    def _encoder(self, name: str, config: CLIPEncoderConfig) -> CLIPTextConditioner:
        shared = {"vocab": self.config.vocab, "merges": self.config.merges}
        return CLIPTextConditioner(CLIPTextConditioner.Config.parse({**config.to_dict(), **shared}, owner=f"sdxl-text: {name}"))

    def check(self, inputs: Sequence[Any], *, prompt_2: Any = None, prompt_syntax: str = "plain") -> None:
        """Raise InputTypeError or InputError unless the inputs, and prompt_2, are strings (None = nothing asked)."""
        texts = _texts(inputs)
        for prompts in (texts, _for_second(texts, prompt_2)):
            self.second.check(prompts, prompt_syntax=prompt_syntax)

    def forward(
        self,
        inputs: Sequence[str | None],
        *,
        prompt_2: str | Sequence[str] | None = None,
        clip_skip: int | None = None,
        prompt_syntax: Literal["plain", "weighted"] = "plain",
        image_size: Size | None = None,
        original_size: Sizes | None = None,
        crops_coords_top_left: Sizes = (0, 0),
        target_size: Sizes | None = None,
        aesthetic_score: float = SCORE,
    ) -> Condition:
        """Prompts => tokens and vector.

        Args:
            prompt_2: for the second encoder; the same prompts if not given.
            clip_skip, prompt_syntax: as for `clip-text`.
            image_size: (height, width) of what is drawn, which original_size and target_size are where they are not given.
                Those and crops_coords_top_left are one pair for all inputs, or one for each (in training, each picture's own).
            original_size: (height, width) that the picture is to look as if it had had before it was scaled.
            crops_coords_top_left: where it is to look as if it had been cut.
            target_size: (height, width) that it is to look as if it had been scaled to; not told to the refiner,
            aesthetic_score: which is told this instead.

        Raises:
            InputTypeError, InputError: as `check`; for sizes that are no pairs of numbers, or that nothing tells.
        """
        self.check(inputs, prompt_2=prompt_2, prompt_syntax=prompt_syntax)
        told = {
            "original_size": image_size if original_size is None else original_size,
            "crops_coords_top_left": crops_coords_top_left,
            "target_size": image_size if target_size is None else target_size,
        }
        if self.first is None:
            told.pop("target_size")
        sizes = [_pairs(name, value, len(inputs)) for name, value in told.items()]
        if self.first is None:
            sizes.append(torch.full((1, 1), aesthetic_score))
        texts = _texts(inputs)
        options: dict[str, Any] = {"clip_skip": clip_skip, "prompt_syntax": prompt_syntax}
        made = self.second(_for_second(texts, prompt_2), **options)
        if self.first is not None:
            made = _side_by_side(self.first(texts, **options), made)
        tokens_BLC, pooled_BC = made.tokens_BLC, made.vector_BC
        assert tokens_BLC is not None
        assert pooled_BC is not None
        if self.config.zero_null:
            asked_B = torch.tensor([value is not None for value in inputs], device=tokens_BLC.device)
            tokens_BLC, pooled_BC = tokens_BLC * asked_B[:, None, None], pooled_BC * asked_B[:, None]
        rows = max(map(len, sizes))  # 1 where all inputs are told the same
        numbers = torch.cat([size.to(pooled_BC.device).expand(rows, -1) for size in sizes], dim=1)
        sizes_BC = sinusoidal_embedding(numbers.flatten(), self.config.size_dim).reshape(rows, -1)
        sizes_BC = sizes_BC.to(pooled_BC.dtype).expand(len(pooled_BC), -1)
        return Condition(tokens_BLC=tokens_BLC, mask_BL=made.mask_BL, vector_BC=torch.cat([pooled_BC, sizes_BC], dim=1))

    def add_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Teach both encoders words, each by the vectors of its width; see `Conditioner.add_tokens`.

        Raises:
            InputError: for a word that is there already, or has spaces.
            ArchitectureMismatchError: where an encoder has no vectors of its width.
        """
        encoders = {name: each for name, each in (("first", self.first), ("second", self.second)) if each is not None}
        for encoder in encoders.values():
            encoder.check_tokens(words)
        changes = {}
        for name, encoder in encoders.items():
            encoder.add_tokens(words)
            own = getattr(self.config, name).to_dict()
            changes[name] = own | {"added_tokens": encoder.config.to_dict()["added_tokens"]}
        self.config = self.config.replace(**changes)

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError, CheckpointError."""
        from ldmkit_text.huggingface import clip_values

        folder = tokenizers.get("tokenizer", tokenizers.get("tokenizer_2"))
        if folder is None:
            raise CheckpointError(
                f"{' and '.join(configs)} have no tokenizer beside them, and prompts need one; pass conditioner=..."
            )
        values: dict[str, Any] = {"zero_null": "text_encoder" in configs}
        names = {}
        for component, part in (("text_encoder", "first"), ("text_encoder_2", "second")):
            if component not in configs:
                continue
            last = part == "second"
            own_folder = tokenizers.get(f"tokenizer{'_2' if last else ''}", folder)
            own = clip_values(configs[component], own_folder, projected=last, source=f"the config of {component}")
            values |= {key: own.pop(key) for key in ("vocab", "merges") if key in own}
            values[part] = own | {"layer": "penultimate", "final_layer_norm": False, "pooled": last}
            names[component] = KeyMap([Rule("", part)])
        return Reading(values, names)

    def to_diffusers(self) -> Mapping[str, Written]:
        """See `ldmkit.checkpoints.foreign`."""
        made: dict[str, Written] = {}
        for end, part, encoder in (("", "first", self.first), ("_2", "second", self.second)):
            if encoder is not None:
                made |= encoder.components(end, part)
        return made


def _side_by_side(first: Condition, second: Condition) -> Condition:
    """Both encoders' tokens. Raises: InputError where one prompt fills more windows than the other."""
    masks, tokens = (first.mask_BL, second.mask_BL), (first.tokens_BLC, second.tokens_BLC)
    lengths = [t.shape[1] for t in tokens if t is not None]
    same = all(mask is None for mask in masks) or (None not in masks and torch.equal(masks[0], masks[1]))  # type: ignore[arg-type]
    if lengths[0] != lengths[1] or not same:
        raise InputError(
            f"prompt and prompt_2 fill {lengths[0]} and {lengths[1]} tokens' windows; make them as long as each other"
        )
    return dataclasses.replace(first, mask_BL=None).merge(second)


def _texts(inputs: Sequence[Any]) -> list[str]:
    if isinstance(inputs, str) or not isinstance(inputs, Sequence):
        check_prompts(inputs)
    return ["" if value is None else value for value in inputs]


def _for_second(texts: list[str], prompt_2: Any) -> list[str]:
    if prompt_2 is None:
        return texts
    own = [prompt_2] if isinstance(prompt_2, str) else list(prompt_2)
    if len(own) not in (1, len(texts)):
        raise InputError(f"prompt_2 has {len(own)} entries for {len(texts)} prompts; give one, or one per prompt")
    return own * len(texts) if len(own) == 1 else own


def _pairs(name: str, value: Any, count: int) -> Tensor:
    """float32 (1, 2), or (count, 2)."""
    if value is None:
        raise InputError(f"{name} is not known: give it, or image_size=(height, width)")
    try:
        pairs = torch.as_tensor(value, dtype=torch.float32)
    except (TypeError, ValueError):
        pairs = torch.empty(0)
    if pairs.shape not in ((2,), (count, 2)):
        shown = f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise InputTypeError(f"{name} = {shown}: must be a pair of numbers of pixels, or one for each of {count} inputs")
    return pairs.reshape(-1, 2)
