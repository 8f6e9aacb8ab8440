"""CLIP's text encoder as a conditioner: Stable Diffusion 1 (CLIP-L), 2 (OpenCLIP-H) and XL (CLIP-L beside OpenCLIP-bigG)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import ldmkit.config
from ldmkit.checkpoints.compvis import clip_map
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.config import AssetPath
from ldmkit.errors import CheckpointError, ConfigError, InputError, InputTypeError
from ldmkit.interfaces import Condition, Conditioner
from ldmkit_text.added_tokens import added_decoder, check_new, fitting, grow, pieces
from ldmkit_text.byte_pair import BOS, EOS, read_byte_pairs
from ldmkit_text.prompts import PromptEncoder, check_prompts
from ldmkit_text.weighting import chunks, emphasise, parse

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # Stable Diffusion 1; XL's first encoder is the same with layer="penultimate", final_layer_norm=False.
    "clip-l": {},
    # Stable Diffusion 2 uses the penultimate of 24 layers; its files leave the 24th out, so it is the last of 23.
    "open-clip-h": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "pad_token": "!",
    },
    # Stable Diffusion XL's second encoder.
    "open-clip-bigg": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "hidden_act": "gelu",
        "projection_dim": 1280,
        "pad_token": "!",
        "layer": "penultimate",
        "final_layer_norm": False,
        "pooled": True,
    },
}
"""Values of `CLIPTextConditioner.Config` for the encoders people have; `vocab` and `merges` are to be added."""


class CLIPEncoderConfig(ldmkit.config.Config):
    """Architecture as in transformers' `CLIPTextConfig`, and what is taken from it. The defaults are CLIP-L's.

    Attributes:
        vocab_size: rows of the embedding table; None = the entries of the vocabulary.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads, hidden_act, layer_norm_eps,
            max_position_embeddings: as there; prompts are cut and padded to the last.
        projection_dim: width of the pooled vector's projection; None = there is none.
        eos_token_id: where the pooled vector is taken: the first such token; None = <|endoftext|>; 2 = the highest id, as
            transformers treats old configs that say 2.
        pad_token: <|endoftext|>, or "!" for OpenCLIP. As in transformers, a "!" in a prompt then means padding too.
        layer: the hidden state to take: "last", "penultimate", or its index, 0 = the embeddings, -1 = the last.
        final_layer_norm: apply CLIP's last LayerNorm to it (Stable Diffusion 1 and 2) or not (XL).
        pooled: also give the projected <|endoftext|> token of the last layer, as `vector_BC`.
        added_tokens: words beyond the vocabulary and how many embeddings each has, in the order of their ids (textual
            inversion); `add_tokens` adds them.
    """

    vocab_size: int | None = Field(None, ge=1)
    hidden_size: int = Field(768, ge=1)
    intermediate_size: int = Field(3072, ge=1)
    num_hidden_layers: int = Field(12, ge=1)
    num_attention_heads: int = Field(12, ge=1)
    hidden_act: Literal["quick_gelu", "gelu"] = "quick_gelu"
    max_position_embeddings: int = Field(77, ge=3)
    projection_dim: int | None = Field(None, ge=1)
    eos_token_id: int | None = Field(None, ge=0)
    layer_norm_eps: float = Field(1e-5, gt=0)
    pad_token: str = EOS
    layer: Literal["last", "penultimate"] | int = "last"
    final_layer_norm: bool = True
    pooled: bool = False
    added_tokens: tuple[tuple[str, int], ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_attention_heads {self.num_attention_heads}"
            )
        n = self.num_hidden_layers
        if isinstance(self.layer, int) and not -n - 1 <= self.layer <= n:
            raise ValueError(f"layer {self.layer} is outside -{n + 1} to {n}, the hidden states of {n} layers")
        return self

    @property
    def layer_index(self) -> int:
        """The hidden state `layer` names, from 0 (the embeddings) to num_hidden_layers."""
        index = {"last": -1, "penultimate": -2}[self.layer] if isinstance(self.layer, str) else self.layer
        return index % (self.num_hidden_layers + 1)


class CLIPTextConditioner(Conditioner):
    """Prompts => (B, max_position_embeddings, hidden_size) tokens of one of CLIP's layers, and a pooled vector if wanted.

    As in Stable Diffusion, padding is attended to, so there is no mask. State-dict keys are those of transformers (>= 5.6)
    `CLIPTextModel`, whichever class transformers needs for them: without `text_model.`, and with `text_projection.weight` where
    there is one. `from_huggingface` reads files of either naming.
    """

    class Config(CLIPEncoderConfig):
        """Attributes: those of `CLIPEncoderConfig`, and

        vocab, merges: the byte-pair vocabulary, `vocab.json` and `merges.txt`; or one file that holds both:
            `tokenizer.json`, or `bpe_simple_vocab_16e6.txt.gz` as open_clip ships it.
        """

        vocab: AssetPath
        merges: AssetPath | None = None

    config: CLIPTextConditioner.Config
    null_input = ""

    def __init__(self, config: CLIPTextConditioner.Config) -> None:
        super().__init__()
        self.config = config
        vocab, merges = read_byte_pairs(config.vocab, config.merges, pad_token=config.pad_token)
        if config.vocab_size is not None and config.vocab_size < len(vocab):
            raise ConfigError(f"vocab_size {config.vocab_size} is less than the {len(vocab)} pieces of {config.vocab}")
        self.provides = frozenset({"tokens_BLC", "vector_BC"} if config.pooled else {"tokens_BLC"})
        try:
            tokenizer = CLIPTokenizer(vocab, merges, pad_token=config.pad_token).backend_tokenizer
        except Exception as error:  # the library raises a bare Exception
            raise CheckpointError(f"{config.merges or config.vocab} does not fit {config.vocab}: {error}") from None
        self.prompt_encoder = PromptEncoder(
            tokenizer,
            max_length=config.max_position_embeddings,
            pad_token=config.pad_token,
            pad_id=vocab[config.pad_token],
        )
        self.prompt_encoder.add(config.added_tokens)
        self._first_added, self._end = len(vocab), vocab[EOS]
        model_class = CLIPTextModel if config.projection_dim is None else CLIPTextModelWithProjection
        model = model_class(_clip_config(config, vocab))
        # Its parts are registered, it is not: names are then free of transformers' nesting, and it shares what moves and loads.
        self._clip = (model,)
        body = getattr(model, "text_model", model)
        self.embeddings, self.encoder, self.final_layer_norm = body.embeddings, body.encoder, body.final_layer_norm
        if config.projection_dim is not None:
            self.text_projection = model.text_projection
        self._freeze_idle()

    def _freeze_idle(self) -> None:
        """What the config leaves unused is not trained: it would get no gradient, which distributed training stops at."""
        config = self.config
        if config.pooled:
            return
        idle = list(self.encoder.layers[config.layer_index :])
        idle += [] if config.final_layer_norm else [self.final_layer_norm]
        idle += [] if config.projection_dim is None else [self.text_projection]
        for module in idle:
            module.requires_grad_(False)

    def check(self, inputs: Sequence[Any], *, prompt_syntax: str = "plain") -> None:
        """Raise InputTypeError or InputError unless the inputs are a list of strings, of that syntax."""
        check_prompts(inputs)
        if prompt_syntax not in ("plain", "weighted"):
            raise InputError(f"prompt_syntax = {prompt_syntax!r}: must be 'plain' or 'weighted'")
        if prompt_syntax == "weighted":
            for prompt in inputs:
                parse(prompt)

    def forward(
        self, inputs: Sequence[str], *, clip_skip: int | None = None, prompt_syntax: Literal["plain", "weighted"] = "plain"
    ) -> Condition:
        """Prompts => tokens (B, max_position_embeddings, hidden_size) and, if `pooled`, a vector (B, projection_dim).

        Args:
            clip_skip: take the tokens this many layers before the configured one, as in diffusers.
            prompt_syntax: "plain" takes every character as it is, and cuts off what is beyond the window. "weighted" reads
                `(word:1.3)`, `[word]` and BREAK, and prompts of any length, see `ldmkit_text.weighting`: tokens are then longer
                by as many windows, and masked where prompts of a batch differ in that. A short prompt without syntax is the
                same to the bit.

        Raises:
            InputTypeError, InputError: as `check`, and for a clip_skip that is no integer or leaves no layer.

        Warns:
            PromptTruncatedWarning: for a plain prompt that does not fit, quoting what is cut off.
        """
        self.check(inputs, prompt_syntax=prompt_syntax)
        index = self._layer_index(clip_skip)
        if prompt_syntax == "plain":
            return self._encode(self.prompt_encoder(inputs)[0], index)
        windows = [self._windows(prompt) for prompt in inputs]
        ids_KL, weights_KL = (torch.cat([each[i] for each in windows]) for i in range(2))
        every = self._encode(ids_KL, index)
        assert every.tokens_BLC is not None
        tokens_KLC = emphasise(every.tokens_BLC, weights_KL.to(every.tokens_BLC.device))
        counts = [len(ids) for ids, _ in windows]
        tokens = [part.flatten(0, 1)[None] for part in tokens_KLC.split(counts)]
        vectors = [None] * len(counts) if every.vector_BC is None else [part[:1] for part in every.vector_BC.split(counts)]
        return Condition.cat([Condition(tokens_BLC=t, vector_BC=v) for t, v in zip(tokens, vectors, strict=True)])

    def _windows(self, prompt: str) -> tuple[Tensor, Tensor]:
        """A weighted prompt => (ids_KL, weights_KL), one row per window."""
        length, encoder = self.config.max_position_embeddings, self.prompt_encoder
        start, end = (self._clip[0].config.bos_token_id, encoder.tokenizer.token_to_id(EOS))
        cut = chunks(parse(prompt), encoder.ids, window=length - 2, comma=encoder.tokenizer.token_to_id(",</w>"))
        ids, weights = [], []
        for inner, own in cut:
            padding = length - 2 - len(inner)
            ids.append([start, *inner, end, *[encoder.pad_id] * padding])
            weights.append([1.0, *own, 1.0, *[1.0] * padding])
        return torch.tensor(ids), torch.tensor(weights, dtype=torch.float64)

    def _encode(self, ids_BL: Tensor, index: int) -> Condition:
        output = self._clip[0](input_ids=ids_BL.to(self.embeddings.token_embedding.weight.device), output_hidden_states=True)
        tokens_BLC: Tensor = output.hidden_states[index]
        if self.config.final_layer_norm:
            tokens_BLC = self.final_layer_norm(tokens_BLC)
        if not self.config.pooled:
            return Condition(tokens_BLC=tokens_BLC)
        vector_BC = output.pooler_output if self.config.projection_dim is None else output.text_embeds
        return Condition(tokens_BLC=tokens_BLC, vector_BC=vector_BC)

    def check_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The vectors of each word for this encoder. Raises: as `add_tokens`, which would refuse the words."""
        vectors = {word: fitting(word, each, self.config.hidden_size) for word, each in words.items()}
        known = list(self.config.added_tokens)
        for word, each in vectors.items():
            check_new(word, len(each), self.prompt_encoder.tokenizer, known)
            known.append((word, len(each)))
        return vectors

    def add_tokens(self, words: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Extend vocabulary and embeddings by words, each of one vector or several; see `Conditioner.add_tokens`.

        Raises:
            InputError: for a word that is there already, or has spaces.
            ArchitectureMismatchError: for vectors of another width.
        """
        vectors = self.check_tokens(words)
        known = list(self.config.added_tokens)
        new = [(word, len(each)) for word, each in vectors.items()]
        config = self.config.replace(added_tokens=[*known, *new])
        table = self.embeddings.token_embedding
        grow(table, self._first_added + len(pieces(known)), torch.cat([*vectors.values()]))
        self.prompt_encoder.add(new)
        self.config, model = config, self._clip[0]
        model.config.vocab_size = table.num_embeddings
        model.config.eos_token_id = _end(config, self._end)
        getattr(model, "text_model", model).eos_token_id = model.config.eos_token_id

    def _layer_index(self, clip_skip: int | None) -> int:
        index = self.config.layer_index
        if clip_skip is None:
            return index
        if not isinstance(clip_skip, int) or isinstance(clip_skip, bool):
            raise InputTypeError(f"clip_skip must be an integer, got {clip_skip!r} of type {type(clip_skip).__name__}")
        if not 0 <= clip_skip <= index:
            raise InputError(f"clip_skip = {clip_skip} is outside 0 to {index}, the layers before the one in use")
        return index - clip_skip

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError, CheckpointError."""
        from ldmkit_text.huggingface import clip_values, tokenizer_of

        ((name, given),) = configs.items()
        tokenizer = tokenizer_of(name, tokenizers)
        return Reading(clip_values(given, tokenizer, projected=False, source=f"the config of {name}"))

    def to_diffusers(self) -> Mapping[str, Written]:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError where Stable Diffusion 1 and 2 would take other tokens."""
        config = self.config
        if config.layer_index != config.num_hidden_layers or not config.final_layer_norm or config.pooled:
            raise ConfigError(
                f"layer = {config.layer!r}, final_layer_norm = {config.final_layer_norm}, pooled = {config.pooled}: diffusers' "
                "Stable Diffusion pipelines take the last layer, normalised, and nothing else"
            )
        return self.components()

    def components(self, end: str = "", path: str = "") -> dict[str, Written]:
        """The encoder and its tokenizer as they are written; `end` is that of their names, `path` where it is in a part."""
        from ldmkit_text.huggingface import clip_tokenizer_files

        config, model = self.config, self._clip[0]
        class_name = type(model).__name__
        values = model.config.to_diff_dict()
        values |= {"model_type": "clip_text_model", "architectures": [class_name], "hidden_act": config.hidden_act}
        merges = None if config.merges is None else Path(config.merges)
        length = config.max_position_embeddings
        files = clip_tokenizer_files(Path(config.vocab), merges, pad_token=config.pad_token, length=length)
        if config.added_tokens:
            told = json.loads(cast(bytes, files["tokenizer_config.json"]))
            told["added_tokens_decoder"] = added_decoder(config.added_tokens, self._first_added)
            files["tokenizer_config.json"] = json.dumps(told, indent=2).encode()
        return {
            f"text_encoder{end}": Written("transformers", class_name, values, clip_map().prefixed("", path)),
            f"tokenizer{end}": Written("transformers", "CLIPTokenizer", files=files),
        }

    @classmethod
    def from_huggingface(cls, folder: str | Path, tokenizer: str | Path | None = None, **changes: Any) -> Self:
        """Pretrained weights from a local folder with `config.json` and `model.safetensors`, in evaluation mode.

        Args:
            tokenizer: the folder with `vocab.json` and `merges.txt` (a pipeline's `tokenizer`); None = `folder`.
            changes: fields of the config to set otherwise: `layer`, `pooled` and the like, which are not in the files.

        Raises:
            CheckpointError: for a missing or damaged file. ConfigError: for a model that is no CLIP text encoder.
            ArchitectureMismatchError: listing every key that does not fit.
        """
        from ldmkit_text.huggingface import clip_config_values, load_clip

        folder = Path(folder)
        conditioner = cls.build(**{**clip_config_values(folder, Path(tokenizer or folder)), **changes})
        load_clip(conditioner, folder)
        return conditioner.eval()


def _clip_config(config: CLIPTextConditioner.Config, vocab: Mapping[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=max(config.vocab_size or 0, len(vocab) + len(pieces(config.added_tokens))),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        projection_dim=config.projection_dim or config.hidden_size,
        layer_norm_eps=config.layer_norm_eps,
        bos_token_id=vocab[BOS],
        eos_token_id=_end(config, vocab[EOS]),
        pad_token_id=vocab[config.pad_token],
    )


def _end(config: CLIPTextConditioner.Config, end: int) -> int:
    """Where transformers pools. Its rule for old configs that say 2, the highest id, would take an added word for the end."""
    told = config.eos_token_id
    return end if told is None or (told == 2 and config.added_tokens) else told
