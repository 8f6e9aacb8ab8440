"""Configs of published U-Nets: `ldmkit.build("denoiser", "unet", **PRESETS["sd15"])`. Plain JSON values."""

from typing import Any

_SD1: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280, 1280],
    "transformer_layers_per_block": [1, 1, 1, 0],
    "num_attention_heads": 8,
    "cross_attention_dim": 768,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Rombach et al. 2022, arXiv:2112.10752, the configs published with the models.
    "ldm-celebahq": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [224, 448, 672, 896],
        "transformer_layers_per_block": [0, 1, 1, 1],
        "num_attention_heads": [7, 14, 21, 28],
        "attention_block": "plain",
        "cross_attention_dim": None,
    },
    "ldm-churches": {
        "block_out_channels": [192, 384, 384, 768, 768],
        "transformer_layers_per_block": [1, 1, 1, 1, 0],
        "num_attention_heads": 8,
        "attention_block": "plain",
        "cross_attention_dim": None,
        "time_scale_shift": True,
        "resnet_resampling": True,
    },
    "ldm-super-resolution": {
        "in_channels": 6,
        "out_channels": 3,
        "spatial_channels": 3,
        "block_out_channels": [160, 320, 320, 640],
        "transformer_layers_per_block": [0, 0, 0, 1],
        "num_attention_heads": [5, 10, 10, 20],
        "attention_block": "plain",
        "cross_attention_dim": None,
    },
    "ldm-imagenet-class": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [192, 384, 576, 960],
        "transformer_layers_per_block": [0, 1, 1, 1],
        "num_attention_heads": 1,
        "cross_attention_dim": 512,
    },
    "ldm-text2img": {
        "block_out_channels": [320, 640, 1280, 1280],
        "transformer_layers_per_block": [1, 1, 1, 0],
        "num_attention_heads": 8,
        "cross_attention_dim": 1280,
    },
    "sd15": _SD1,
    "sd15-inpainting": {**_SD1, "in_channels": 9, "spatial_channels": 5},
    "sd21": {**_SD1, "num_attention_heads": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True},
    "sdxl": {
        "block_out_channels": [320, 640, 1280],
        "transformer_layers_per_block": [0, 2, 10],
        "mid_transformer_layers": 10,
        "num_attention_heads": [5, 10, 20],
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "vector_dim": 2816,
    },
    "x4-upscaler": {
        "in_channels": 7,
        "spatial_channels": 3,
        "block_out_channels": [256, 512, 512, 1024],
        "transformer_layers_per_block": [0, 1, 1, 1],
        "num_attention_heads": 8,
        "cross_attention_dim": 1024,
        "only_cross_attention": [True, True, True, False],
        "use_linear_projection": True,
        "num_class_embeds": 1000,
    },
}
"""By name; the Stable Diffusion 1 family (1.1 to 1.5) shares one."""
