"""Configs of published KL autoencoders: `ldmkit.build("autoencoder", "kl", **PRESETS["sd"])`. Plain JSON values."""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # Rombach et al. 2022, arXiv:2112.10752, table 8, and the configs published with the models; 1/4 to 1/32 of the image.
    # Their latents are scaled by what was measured for each diffusion model: set scaling_factor.
    "ldm-kl-f4": {"block_out_channels": [128, 256, 512], "latent_channels": 3, "scaling_factor": 1.0},
    "ldm-kl-f8": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 1.0},
    "ldm-kl-f16": {
        "block_out_channels": [128, 128, 256, 256, 512],
        "latent_channels": 16,
        "attention_levels": [False, False, False, False, True],
        "scaling_factor": 1.0,
    },
    "ldm-kl-f32": {
        "block_out_channels": [128, 128, 256, 256, 512, 512],
        "latent_channels": 64,
        "attention_levels": [False, False, False, False, True, True],
        "scaling_factor": 1.0,
    },
    "sd": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 0.18215},
    "sdxl": {"block_out_channels": [128, 256, 512, 512], "latent_channels": 4, "scaling_factor": 0.13025, "force_upcast": True},
    "x4-upscaler": {"block_out_channels": [128, 256, 512], "latent_channels": 4, "scaling_factor": 0.08333},
}
"""By name."""

VQ_PRESETS: dict[str, dict[str, Any]] = {
    # As above; `ldmkit.build("autoencoder", "vq", **VQ_PRESETS["ldm-vq-f4"])`.
    "ldm-vq-f4": {"block_out_channels": [128, 256, 512], "latent_channels": 3, "num_vq_embeddings": 8192},
    "ldm-vq-f8": {
        "block_out_channels": [128, 128, 256, 512],
        "latent_channels": 4,
        "num_vq_embeddings": 16384,
        "attention_levels": [False, False, False, True],
    },
}
"""By name."""
