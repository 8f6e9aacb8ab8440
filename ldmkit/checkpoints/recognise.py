"""What a CompVis or Stability file holds, from its keys and shapes alone: configs as diffusers writes them, and key maps."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ldmkit.checkpoints.compvis import clip_map, ldm_bert_map, open_clip_map, unet_map, vae_map
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.errors import ArchitectureMismatchError

Shapes = Mapping[str, tuple[int, ...]]

UNET, VAE = "model.diffusion_model", "first_stage_model"
PLAIN_HEAD_CHANNELS = 32
"""Channels of a head in the unconditional originals' attention (`num_head_channels` of their configs)."""
TABLES = (
    r"betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+|lvlb_weights|logvar|denoiser\.sigmas|"
    r"low_scale_model\.(betas|alphas_cumprod\w*|sqrt_\w+|log_one_minus_alphas_cumprod|posterior_\w+)"
)
IGNORED = {
    rf"({TABLES})$": "tables of the noise schedule, which is computed anew",
    r"model_ema\.": "averaged weights, which ema=True takes instead",
    r"first_stage_model\.(loss|model_ema)\.": "what only the autoencoder's training uses",
    r"scale_factor$": "a setting, which is read",
    r"(v_pred|ztsnr)$": "a mark, which is read",
    r".*\.position_ids$": "a constant, 0 to 76, that old versions stored",
    r".*\.(logit_scale|attn_mask)$": "what only CLIP's training uses, or a constant",
    r".*\.transformer\.to_logits\.": "the language model's head; conditioning uses the last hidden states",
}
"""Patterns of keys that are left out, and why."""


@dataclass(frozen=True)
class Found:
    """One component of a file.

    Attributes:
        name: the folder it would have in the diffusers layout ("unet", "vae", "text_encoder").
        class_name: of diffusers or transformers.
        config: as its config.json would be.
        keymap: names in the file <-> in the diffusers layout (text encoders: without `text_model.`).
        ignored: further patterns of keys that are left out, and why.
    """

    name: str
    class_name: str
    config: dict[str, Any]
    keymap: KeyMap
    ignored: dict[str, str] = field(default_factory=dict)


def recognise(shapes: Shapes) -> list[Found]:
    """The components of a single file.

    Raises:
        ArchitectureMismatchError: for keys that are no single file's, or of an architecture that is not known here.
    """
    found = []
    if any(key.startswith(f"{UNET}.") for key in shapes):
        found.append(unet(_below(shapes, UNET)))
    if any(key.startswith(f"{VAE}.") for key in shapes):
        found.append(vae(_below(shapes, VAE)))
    found += text_encoders(shapes)
    if not found:
        first = ", ".join(sorted(shapes)[:3]) or "none"
        raise ArchitectureMismatchError(
            f"no key begins with {UNET}., {VAE}., cond_stage_model. or conditioner.embedders.; the first are {first}. "
            "This is no CompVis or Stability single file; a folder in the diffusers layout is for from_pretrained"
        )
    return found


def _below(shapes: Shapes, prefix: str) -> Shapes:
    return {key.removeprefix(f"{prefix}."): shape for key, shape in shapes.items() if key.startswith(f"{prefix}.")}


def _count(shapes: Shapes, pattern: str) -> int:
    """One more than the highest number that the pattern's group matches, 0 if none."""
    numbers = [int(match[1]) for key in shapes if (match := re.match(pattern, key))]
    return max(numbers, default=-1) + 1


def _shape(shapes: Shapes, key: str, what: str) -> tuple[int, ...]:
    if key not in shapes:
        raise ArchitectureMismatchError(f"{what} lacks {key}, by which it would be recognised; the file is not complete")
    return shapes[key]


# ------------------------------------------------------------------------------------------------------------------- U-Net


def unet(shapes: Shapes) -> Found:
    """From keys without `model.diffusion_model.`"""

    def shape(key: str) -> tuple[int, ...]:
        return _shape(shapes, key, "the U-Net")

    levels = 1 + len([key for key in shapes if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key)])
    blocks = _count(shapes, r"input_blocks\.(\d+)\.")
    if "input_blocks.1.0.in_layers.0.weight" not in shapes or blocks % levels or blocks // levels < 2:
        raise ArchitectureMismatchError(
            f"the U-Net has {blocks} input blocks on {levels} levels, and no architecture known here has that"
        )
    layers = blocks // levels - 1
    first = [level * (layers + 1) + 1 for level in range(levels)]
    widths = [shape(f"input_blocks.{i}.0.out_layers.3.weight")[0] for i in first]
    if shape("input_blocks.1.0.emb_layers.1.weight")[0] == 2 * widths[0]:
        raise ArchitectureMismatchError(
            "the U-Net scales and shifts by the time embedding (use_scale_shift_norm), ours adds it"
        )
    plain = "middle_block.1.qkv.weight" in shapes
    depths = [_count(shapes, rf"input_blocks\.{i}\.1\.transformer_blocks\.(\d+)\.") for i in first]
    attended = [f"input_blocks.{i}.1.norm.weight" in shapes for i in first]
    config: dict[str, Any] = {
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "block_out_channels": widths,
        "layers_per_block": layers,
    }
    if plain:
        config |= {
            "down_block_types": ["AttnDownBlock2D" if has else "DownBlock2D" for has in attended],
            "up_block_types": ["AttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]],
            "attention_head_dim": PLAIN_HEAD_CHANNELS,
            "downsample_padding": 1,
            "flip_sin_to_cos": True,
            "freq_shift": 0,
        }
    else:
        config |= _transformers(shapes, shape, widths, depths, attended, first)
    keymap = unet_map(
        levels=levels,
        layers_per_block=layers,
        attention=tuple(attended),
        plain_head_channels=PLAIN_HEAD_CHANNELS if plain else None,
    )
    class_name = "UNet2DModel" if plain else "UNet2DConditionModel"
    return Found("unet", class_name, config, keymap.prefixed(UNET))


def _transformers(
    shapes: Shapes, shape: Any, widths: list[int], depths: list[int], attended: list[bool], first: list[int]
) -> dict[str, Any]:
    mid = _count(shapes, r"middle_block\.1\.transformer_blocks\.(\d+)\.")
    if attended[-1] and depths[-1] != mid:
        raise ArchitectureMismatchError(f"the U-Net's last level has {depths[-1]} transformer layers and its middle {mid}")
    middle = "middle_block.1.transformer_blocks.0"
    context = shape(f"{middle}.attn2.to_k.weight")[1]
    linear = len(shape("middle_block.1.proj_in.weight")) == 2
    only_cross = [
        has and (keys := shape(f"input_blocks.{i}.1.transformer_blocks.0.attn1.to_k.weight"))[0] != keys[1]
        for i, has in zip(first, attended, strict=True)
    ]
    config: dict[str, Any] = {
        "cross_attention_dim": context,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attended],
        "up_block_types": ["CrossAttnUpBlock2D" if has else "UpBlock2D" for has in attended[::-1]],
        "transformer_layers_per_block": [depth if has else mid for depth, has in zip(depths, attended, strict=True)],
        "attention_head_dim": _heads(widths, context=context, linear=linear, labelled="label_emb.weight" in shapes),
        "use_linear_projection": linear,
        "only_cross_attention": only_cross if any(only_cross) else False,
        "num_class_embeds": shapes["label_emb.weight"][0] if "label_emb.weight" in shapes else None,
    }
    if "label_emb.0.0.weight" in shapes:
        config |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": shape("label_emb.0.0.weight")[1],
        }
    return config


def _heads(widths: list[int], *, context: int, linear: bool, labelled: bool) -> int | list[int]:
    """Heads leave no trace in shapes: 64 channels each in SD2 and SDXL, else 8, and 1 in class-conditional latent diffusion."""
    if linear and not labelled:
        return [width // 64 for width in widths]
    return 1 if context == 512 and not linear else 8


# --------------------------------------------------------------------------------------------------------------- autoencoder


def vae(shapes: Shapes) -> Found:
    """From keys without `first_stage_model.` The scaling factor leaves no trace; see `single_file`."""

    def shape(key: str) -> tuple[int, ...]:
        return _shape(shapes, key, "the autoencoder")

    levels = _count(shapes, r"encoder\.down\.(\d+)\.")
    layers = _count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
    attended = [f"encoder.down.{i}.attn.0.norm.weight" in shapes for i in range(levels)]
    vq = "quantize.embedding.weight" in shapes
    config: dict[str, Any] = {
        "in_channels": shape("encoder.conv_in.weight")[1],
        "out_channels": shape("decoder.conv_out.weight")[0],
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "block_out_channels": [shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
        "layers_per_block": layers,
        "down_block_types": ["AttnDownEncoderBlock2D" if has else "DownEncoderBlock2D" for has in attended],
        "up_block_types": ["AttnUpDecoderBlock2D" if has else "UpDecoderBlock2D" for has in attended[::-1]],
    }
    if vq:
        entries, width = shape("quantize.embedding.weight")
        config |= {"num_vq_embeddings": entries, "vq_embed_dim": width}
    else:
        config |= {key: f"{key.removeprefix('use_')}.weight" in shapes for key in ("use_quant_conv", "use_post_quant_conv")}
    keymap = vae_map(levels=levels, layers_per_block=layers)
    return Found("vae", "VQModel" if vq else "AutoencoderKL", config, keymap.prefixed(VAE))


# -------------------------------------------------------------------------------------------------------------- text encoders


def text_encoders(shapes: Shapes) -> list[Found]:
    """All of a file; none in unconditional models."""
    found = []
    if "cond_stage_model.embedding.weight" in shapes:
        classes, width = shapes["cond_stage_model.embedding.weight"]
        config = {"num_classes": classes, "embed_dim": width}
        found.append(
            Found("class_embedder", "ClassEmbedder", config, KeyMap([Rule("cond_stage_model.embedding", "embedding")]))
        )
    embedders = _count(shapes, r"conditioner\.embedders\.(\d+)\.")
    for place in ("cond_stage_model", *(f"conditioner.embedders.{i}" for i in range(embedders))):
        if f"{place}.transformer.token_emb.weight" in shapes:
            found.append(_ldm_bert(_below(shapes, f"{place}.transformer"), f"{place}.transformer"))
        elif any(key.startswith(f"{place}.transformer.") for key in shapes):
            found.append(_clip(_below(shapes, f"{place}.transformer"), f"{place}.transformer"))
        elif any(key.startswith(f"{place}.model.") for key in shapes):
            found.append(_open_clip(_below(shapes, f"{place}.model"), f"{place}.model"))
    return found


def _clip(shapes: Shapes, place: str) -> Found:
    nested = any(key.startswith("text_model.") for key in shapes)
    own = _below(shapes, "text_model") if nested else shapes
    layers = _count(own, r"encoder\.layers\.(\d+)\.")
    config = _clip_config(own, "embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight", layers)
    config |= {"hidden_act": "quick_gelu", "pad_token": "<|endoftext|>"}
    config |= {"max_position_embeddings": _positions(own, "embeddings.position_embedding.weight")}
    return Found("text_encoder", "CLIPTextModel", config, clip_map(nested=nested).prefixed(place))


def _open_clip(shapes: Shapes, place: str) -> Found:
    """SD2's, whose last layer is not used and which has no pooled output; or SDXL's."""
    layers = _count(shapes, r"transformer\.resblocks\.(\d+)\.")
    config = _clip_config(shapes, "token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", layers)
    config |= {"hidden_act": "gelu", "pad_token": "!"}
    config |= {"max_position_embeddings": _positions(shapes, "positional_embedding")}
    if place.startswith("conditioner."):
        config["projection_dim"] = _shape(shapes, "text_projection", "the OpenCLIP text encoder")[1]
        keymap = open_clip_map(layers=layers).prefixed(place)
        return Found("text_encoder_2", "CLIPTextModelWithProjection", config, keymap)
    last, layers = layers - 1, layers - 1
    ignored = {
        rf"{place}\.transformer\.resblocks\.{last}\.": "the last layer: Stable Diffusion 2 takes the one before",
        rf"{place}\.text_projection$": "the pooled output's: Stable Diffusion 2 has none",
    }
    config["num_hidden_layers"] = layers
    keymap = KeyMap(rule for rule in open_clip_map(layers=layers).rules if rule.theirs != "text_projection").prefixed(place)
    return Found("text_encoder", "CLIPTextModel", config, keymap, ignored)


def _clip_config(shapes: Shapes, table: str, feed_forward: str, layers: int) -> dict[str, Any]:
    vocabulary, width = _shape(shapes, table, "the text encoder")
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": _shape(shapes, feed_forward, "the text encoder")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "eos_token_id": 2,
    }


def _positions(shapes: Shapes, key: str) -> int:
    return _shape(shapes, key, "the text encoder")[0]


def _ldm_bert(shapes: Shapes, place: str) -> Found:
    layers = _count(shapes, r"attn_layers\.layers\.(\d+)\.") // 2
    vocabulary, width = shapes["token_emb.weight"]
    inner = _shape(shapes, "attn_layers.layers.0.1.to_q.weight", "the BERT encoder")[0]
    config = {
        "vocab_size": vocabulary,
        "d_model": width,
        "max_position_embeddings": _positions(shapes, "pos_emb.emb.weight"),
        "encoder_layers": layers,
        "encoder_ffn_dim": _shape(shapes, "attn_layers.layers.1.1.net.0.0.weight", "the BERT encoder")[0],
        "encoder_attention_heads": max(inner // 64, 1),
        "head_dim": min(inner, 64),
    }
    return Found("bert", "LDMBertModel", config, ldm_bert_map(layers=layers).prefixed(place))
