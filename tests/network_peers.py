"""diffusers' networks as peers and oracles: tiny ones, with every parameter random, and the same weights in ours."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from ldmkit import Condition, build
from ldmkit_unet.diffusers_config import convert_diffusers_config as convert_unet
from ldmkit_vae.diffusers_config import convert_diffusers_config as convert_vae

_TWO_LEVELS = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "norm_num_groups": 8,
    "cross_attention_dim": 12,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd1": {**_TWO_LEVELS, "attention_head_dim": 2},
    "sd2": {**_TWO_LEVELS, "attention_head_dim": (2, 4), "use_linear_projection": True},
    "sdxl": {
        **_TWO_LEVELS,
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 3, 4),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 10 + 6 * 4,
    },
    "inpainting": {**_TWO_LEVELS, "attention_head_dim": 2, "in_channels": 9},
    "x4-upscaler": {
        **_TWO_LEVELS,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "in_channels": 7,
        "attention_head_dim": 2,
        "only_cross_attention": (True, True),
        "use_linear_projection": True,
        "num_class_embeds": 20,
    },
    "one-res-block-sines-first": {
        **_TWO_LEVELS,
        "attention_head_dim": 1,
        "layers_per_block": 1,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
    },
}
"""diffusers configs of the architectures, with the widths of toys."""

VAES: dict[str, dict[str, Any]] = {
    "sd": {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 2,
        "norm_num_groups": 8,
    },
    "ldm-f16": {
        "block_out_channels": (8, 8, 16),
        "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"),
        "layers_per_block": 1,
        "latent_channels": 6,
        "norm_num_groups": 4,
    },
    "bare": {
        "block_out_channels": (8, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.7,
        "shift_factor": 0.3,
    },
}


def randomise(network: nn.Module, seed: int = 0) -> None:
    """Give every parameter random values of a usual size; nothing stays at zero or one, so nothing can hide."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        with torch.no_grad():
            parameter.copy_(noise / fan_in**0.5 if parameter.ndim > 1 else 0.2 * noise + (parameter == 1))


def unet_pair(style: str) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers', float32, with the same random weights."""
    peer = UNet2DConditionModel(**UNETS[style]).eval()
    randomise(peer)
    ours = build("denoiser", "unet", **convert_unet(UNETS[style])).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def unet_inputs(ours: Any, *, batch: int = 3, size: int = 8, tokens: int = 5) -> tuple[Tensor, Tensor, Condition]:
    """Latents, times, all the network requires, and a mask (not with only_cross_attention: there diffusers has none)."""
    generator = torch.Generator().manual_seed(1)
    config = ours.config
    latents = torch.randn(batch, config.in_channels - config.spatial_channels, size, size, generator=generator)
    context, vector, classes = config.cross_attention_dim, config.vector_dim, config.num_class_embeds
    extra, masked = config.spatial_channels, not any(config.per_level(config.only_cross_attention))
    condition = Condition(
        tokens_BLC=torch.randn(batch, tokens, context, generator=generator) if context else None,
        mask_BL=torch.arange(tokens) < torch.arange(1, batch + 1)[:, None] if context and masked else None,
        vector_BC=torch.randn(batch, vector, generator=generator) if vector else None,
        labels_B=torch.randint(classes, (batch,), generator=generator) if classes else None,
        spatial_BCHW=torch.randn(batch, extra, size, size, generator=generator) if extra else None,
    )
    times = torch.tensor([3.0, 999.0, 421.5])[torch.arange(batch) % 3]
    return latents, times, condition


def peer_unet(peer: Any, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
    """diffusers' prediction for our condition. SDXL's vector goes in by a side door: they build it from texts and sizes."""
    vector_BC, options = condition.vector_BC, {"class_labels": condition.labels_B}
    if condition.spatial_BCHW is not None:
        x_BCHW = torch.cat([x_BCHW, condition.spatial_BCHW], dim=1)
    with ExitStack() as stack:
        if vector_BC is not None:
            text_length = vector_BC.shape[1] - 6 * peer.config.addition_time_embed_dim
            texts, sizes = vector_BC[:, :text_length], vector_BC.new_zeros(len(x_BCHW), 6)
            options["added_cond_kwargs"] = {"text_embeds": texts, "time_ids": sizes}
            stack.enter_context(peer.add_embedding.register_forward_pre_hook(lambda _module, _args: (vector_BC,)))
        tokens_BLC, mask_BL = condition.tokens_BLC, condition.mask_BL
        out: Tensor = peer(x_BCHW, t_B, tokens_BLC, encoder_attention_mask=mask_BL, **options).sample
    return out


def vae_pair(style: str) -> tuple[nn.Module, nn.Module]:
    """Ours and diffusers', float32, with the same random weights."""
    peer = AutoencoderKL(**VAES[style]).eval()
    randomise(peer)
    ours = build("autoencoder", "kl", **convert_vae(VAES[style])).eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def double(network: nn.Module) -> nn.Module:
    """A float64 copy."""
    return copy.deepcopy(network).double()


def shapes_of(file: Path) -> dict[str, list[int]]:
    """Recorded keys and shapes of a checkpoint."""
    shapes: dict[str, list[int]] = json.loads(file.read_text())
    return shapes
