"""Key maps: the names of CompVis' and Stability's code <-> the diffusers and transformers layouts, which are ours.

Facts from the published state dicts. What a number in a name means depends on levels and layers, so a map is made for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ldmkit.checkpoints.keymap import KeyMap, Rule

_RES = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "label_emb": "class_embedding",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_OPEN_CLIP_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def unet_map(
    *,
    levels: int,
    layers_per_block: int,
    attention: tuple[bool, ...],
    plain_head_channels: Sequence[int] | None = None,
    resnet_resampling: bool = False,
) -> KeyMap:
    """The U-Net's, without `model.diffusion_model`

    Args:
        levels: resolutions.
        layers_per_block: res blocks per level on the way down.
        attention: which levels have attention; the middle always has it.
        plain_head_channels: where attention is the plain block of the unconditional originals: channels of a head, by level;
            the middle has the last level's.
        resnet_resampling: res blocks, rather than convolutions, change the resolution.
    """

    def blocks() -> Iterator[Rule]:
        yield from (Rule(theirs, ours) for theirs, ours in _UNET_ENDS.items())
        down, up = layers_per_block, layers_per_block + 1
        for level in range(levels):
            for layer in range(down):
                yield from block(f"input_blocks.{level * up + layer + 1}", f"down_blocks.{level}", layer, level)
            if level < levels - 1:
                yield from resample(f"input_blocks.{(level + 1) * up}.0", f"down_blocks.{level}.downsamplers.0", "op")
        yield from res("middle_block.0", "mid_block.resnets.0")
        yield from attend("middle_block.1", "mid_block.attentions.0", levels - 1)
        yield from res("middle_block.2", "mid_block.resnets.1")
        for i in range(levels):
            level = levels - 1 - i
            for layer in range(up):
                yield from block(f"output_blocks.{i * up + layer}", f"up_blocks.{i}", layer, level)
            if level > 0:
                place = f"output_blocks.{i * up + up - 1}.{2 if attention[level] else 1}"
                yield from resample(place, f"up_blocks.{i}.upsamplers.0", "conv")

    def block(theirs: str, ours: str, layer: int, level: int) -> Iterator[Rule]:
        yield from res(f"{theirs}.0", f"{ours}.resnets.{layer}")
        if attention[level]:
            yield from attend(f"{theirs}.1", f"{ours}.attentions.{layer}", level)

    def resample(theirs: str, ours: str, name: str) -> Iterator[Rule]:
        if resnet_resampling:
            yield from res(theirs, ours)
        else:
            yield Rule(f"{theirs}.{name}", f"{ours}.conv")

    def res(theirs: str, ours: str) -> Iterator[Rule]:
        yield from (Rule(f"{theirs}.{old}", f"{ours}.{new}") for old, new in _RES.items())

    def attend(theirs: str, ours: str, level: int) -> Iterator[Rule]:
        if plain_head_channels is None:  # inside transformers the names agree
            yield Rule(theirs, ours)
            return
        yield Rule(f"{theirs}.norm", f"{ours}.group_norm")
        for i, name in enumerate(("to_q", "to_k", "to_v")):  # head by head: its queries, its keys, its values
            yield Rule(f"{theirs}.qkv", f"{ours}.{name}", axes=1, piece=i, pieces=3, block=plain_head_channels[level])
        yield Rule(f"{theirs}.proj_out", f"{ours}.to_out.0", axes=1)

    return KeyMap(blocks())


def vae_map(*, levels: int, layers_per_block: int) -> KeyMap:
    """The autoencoder's (KL or VQ), without `first_stage_model.`"""

    def rules() -> Iterator[Rule]:
        for name in ("quant_conv", "post_quant_conv", "quantize"):
            yield Rule(name, name)
        for side in ("encoder", "decoder"):
            for name, ours in (("conv_in", "conv_in"), ("norm_out", "conv_norm_out"), ("conv_out", "conv_out")):
                yield Rule(f"{side}.{name}", f"{side}.{ours}")
            for i in range(2):
                yield from res(f"{side}.mid.block_{i + 1}", f"{side}.mid_block.resnets.{i}")
            yield from attend(f"{side}.mid.attn_1", f"{side}.mid_block.attentions.0")
        for level in range(levels):
            yield from stage(f"encoder.down.{level}", f"encoder.down_blocks.{level}", layers_per_block)
            yield Rule(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
            ours = f"decoder.up_blocks.{levels - 1 - level}"
            yield from stage(f"decoder.up.{level}", ours, layers_per_block + 1)
            yield Rule(f"decoder.up.{level}.upsample.conv", f"{ours}.upsamplers.0.conv")

    def stage(theirs: str, ours: str, layers: int) -> Iterator[Rule]:
        for layer in range(layers):
            yield from res(f"{theirs}.block.{layer}", f"{ours}.resnets.{layer}")
            yield from attend(f"{theirs}.attn.{layer}", f"{ours}.attentions.{layer}")

    def res(theirs: str, ours: str) -> Iterator[Rule]:
        yield Rule(f"{theirs}.nin_shortcut", f"{ours}.conv_shortcut")
        yield from (Rule(f"{theirs}.{name}", f"{ours}.{name}") for name in ("norm1", "conv1", "norm2", "conv2"))

    def attend(theirs: str, ours: str) -> Iterator[Rule]:
        yield Rule(f"{theirs}.norm", f"{ours}.group_norm")
        for old, new in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            yield Rule(f"{theirs}.{old}", f"{ours}.{new}", axes=2)

    return KeyMap(rules())


def clip_map(*, nested: bool = True) -> KeyMap:
    """Hugging Face's CLIP text encoder, its parts below `text_model.` or not, <-> without."""
    names = ("embeddings", "encoder", "final_layer_norm")
    inner = KeyMap(Rule(name, name) for name in names)
    return (inner.prefixed("text_model") if nested else inner) + KeyMap([Rule("text_projection", "text_projection")])


def clip_vision_map() -> KeyMap:
    """Hugging Face's CLIP image encoder <-> without `vision_model.`"""
    names = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    body = KeyMap(Rule(name, name) for name in names).prefixed("vision_model")
    return body + KeyMap([Rule("visual_projection", "visual_projection")])


def open_clip_map(*, layers: int) -> KeyMap:
    """OpenCLIP's text encoder <-> Hugging Face's CLIP text encoder without `text_model.`"""

    def rules() -> Iterator[Rule]:
        yield Rule("token_embedding", "embeddings.token_embedding")
        yield Rule("positional_embedding", "embeddings.position_embedding.weight")
        yield Rule("ln_final", "final_layer_norm")
        yield Rule("text_projection", "text_projection.weight", transposed=True)
        for i in range(layers):
            theirs, ours = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            yield from (Rule(f"{theirs}.{old}", f"{ours}.{new}") for old, new in _OPEN_CLIP_BLOCK.items())
            for kind in ("weight", "bias"):
                for piece, name in enumerate(("q_proj", "k_proj", "v_proj")):
                    yield Rule(f"{theirs}.attn.in_proj_{kind}", f"{ours}.self_attn.{name}.{kind}", piece=piece, pieces=3)

    return KeyMap(rules())


def ldm_bert_map(*, layers: int) -> KeyMap:
    """The text encoder of the latent-diffusion text-to-image model (x-transformers) <-> diffusers' LDMBertModel."""

    def rules() -> Iterator[Rule]:
        yield Rule("token_emb", "model.embed_tokens")
        yield Rule("pos_emb.emb", "model.embed_positions")
        yield Rule("norm", "model.layer_norm")
        yield Rule("to_logits", "to_logits")
        for i in range(layers):
            attention, feed, ours = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}", f"model.layers.{i}"
            yield Rule(f"{attention}.0", f"{ours}.self_attn_layer_norm")
            for old, new in (("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")):
                yield Rule(f"{attention}.1.{old}", f"{ours}.self_attn.{new}")
            yield Rule(f"{feed}.0", f"{ours}.final_layer_norm")
            yield Rule(f"{feed}.1.net.0.0", f"{ours}.fc1")
            yield Rule(f"{feed}.1.net.2", f"{ours}.fc2")

    return KeyMap(rules())
