"""What a CompVis or Stability file holds, from its keys and shapes alone: configs as diffusers writes them, and key maps."""

from __future__ import annotations

from typing import Any

from ldmkit.checkpoints.compvis import clip_map, ldm_bert_map, open_clip_map, vae_map
from ldmkit.checkpoints.found import Found, Shapes, Told, below, count, shape_of
from ldmkit.checkpoints.keymap import KeyMap, Rule
from ldmkit.checkpoints.recognise_unet import UNET, unet
from ldmkit.errors import ArchitectureMismatchError, LdmkitError

VAE = "first_stage_model"
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


def recognise(shapes: Shapes, told: Told = lambda name: {}) -> list[Found]:
    """The components of a single file.

    Raises:
        ArchitectureMismatchError: for keys that are no single file's, or of an architecture that is not known here.
        ConfigError: where what is told cannot be.
    """
    try:
        return _recognise(shapes, told)
    except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, LdmkitError):
            raise
        raise ArchitectureMismatchError(
            f"a weight by which the architecture would be recognised is missing or of an odd shape ({error!r}); the file is "
            "damaged, or of an architecture that is not known here"
        ) from error


def _recognise(shapes: Shapes, told: Told) -> list[Found]:
    found = []
    if any(key.startswith(f"{UNET}.") for key in shapes):
        found.append(unet(below(shapes, UNET), told("unet")))
    if any(key.startswith(f"{VAE}.") for key in shapes):
        found.append(vae(below(shapes, VAE)))
    found += text_encoders(shapes)
    for component in found:
        component.config.update(told(component.name))
    if not found:
        first = ", ".join(sorted(shapes)[:3]) or "none"
        raise ArchitectureMismatchError(
            f"no key begins with {UNET}., {VAE}., cond_stage_model. or conditioner.embedders.; the first are {first}. "
            "This is no CompVis or Stability single file; a folder in the diffusers layout is for from_pretrained"
        )
    return found


# --------------------------------------------------------------------------------------------------------------- autoencoder


def vae(shapes: Shapes) -> Found:
    """From keys without `first_stage_model.` The scaling factor leaves no trace; see `families`."""

    def shape(key: str) -> tuple[int, ...]:
        return shape_of(shapes, key, "the autoencoder")

    levels = count(shapes, r"encoder\.down\.(\d+)\.")
    layers = count(shapes, r"encoder\.down\.0\.block\.(\d+)\.")
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
    embedders = count(shapes, r"conditioner\.embedders\.(\d+)\.")
    for place in ("cond_stage_model", *(f"conditioner.embedders.{i}" for i in range(embedders))):
        if f"{place}.transformer.token_emb.weight" in shapes:
            found.append(_ldm_bert(below(shapes, f"{place}.transformer"), f"{place}.transformer"))
        elif any(key.startswith(f"{place}.transformer.") for key in shapes):
            found.append(_clip(below(shapes, f"{place}.transformer"), f"{place}.transformer"))
        elif any(key.startswith(f"{place}.model.") for key in shapes):
            found.append(_open_clip(below(shapes, f"{place}.model"), f"{place}.model"))
    return found


def _clip(shapes: Shapes, place: str) -> Found:
    nested = any(key.startswith("text_model.") for key in shapes)
    own = below(shapes, "text_model") if nested else shapes
    layers = count(own, r"encoder\.layers\.(\d+)\.")
    config = _clip_config(own, "embeddings.token_embedding.weight", "encoder.layers.0.mlp.fc1.weight", layers)
    config |= {"hidden_act": "quick_gelu", "pad_token": "<|endoftext|>"}
    config |= {"max_position_embeddings": _positions(own, "embeddings.position_embedding.weight")}
    return Found("text_encoder", "CLIPTextModel", config, clip_map(nested=nested).prefixed(place))


def _open_clip(shapes: Shapes, place: str) -> Found:
    """SD2's, whose last layer is not used and which has no pooled output; or SDXL's."""
    layers = count(shapes, r"transformer\.resblocks\.(\d+)\.")
    config = _clip_config(shapes, "token_embedding.weight", "transformer.resblocks.0.mlp.c_fc.weight", layers)
    config |= {"hidden_act": "gelu", "pad_token": "!"}
    config |= {"max_position_embeddings": _positions(shapes, "positional_embedding")}
    if place.startswith("conditioner."):
        config["projection_dim"] = shape_of(shapes, "text_projection", "the OpenCLIP text encoder")[1]
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
    vocabulary, width = shape_of(shapes, table, "the text encoder")
    return {
        "model_type": "clip_text_model",
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shape_of(shapes, feed_forward, "the text encoder")[0],
        "num_hidden_layers": layers,
        "num_attention_heads": max(width // 64, 1),
        "eos_token_id": 2,
    }


def _positions(shapes: Shapes, key: str) -> int:
    return shape_of(shapes, key, "the text encoder")[0]


def _ldm_bert(shapes: Shapes, place: str) -> Found:
    layers = count(shapes, r"attn_layers\.layers\.(\d+)\.") // 2
    vocabulary, width = shapes["token_emb.weight"]
    inner = shape_of(shapes, "attn_layers.layers.0.1.to_q.weight", "the BERT encoder")[0]
    config = {
        "vocab_size": vocabulary,
        "d_model": width,
        "max_position_embeddings": _positions(shapes, "pos_emb.emb.weight"),
        "encoder_layers": layers,
        "encoder_ffn_dim": shape_of(shapes, "attn_layers.layers.1.1.net.0.0.weight", "the BERT encoder")[0],
        "encoder_attention_heads": max(inner // 64, 1),
        "head_dim": min(inner, 64),
    }
    return Found("bert", "LDMBertModel", config, ldm_bert_map(layers=layers).prefixed(place))
