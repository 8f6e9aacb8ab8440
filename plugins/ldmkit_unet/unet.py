"""The U-Net of latent diffusion and Stable Diffusion."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ldmkit import Condition, Denoiser
from ldmkit.checkpoints.foreign import Configs, Reading, Written
from ldmkit.errors import InputError
from ldmkit.interfaces import PERTURBED
from ldmkit.nn import (
    Attention,
    AttentionBlock,
    Context,
    EmbeddingMLP,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    sinusoidal_embedding,
)
from ldmkit_unet.blocks import DownBlock, MidBlock, UpBlock
from ldmkit_unet.config import UNetConfig
from ldmkit_unet.diffusers_config import convert_diffusers_config, write_diffusers_config

KV_KEY = "unet.kv"
"""Where `prepare` keeps cross-attention's keys and values in `Condition.extra`: {layer path: (keys, values)}."""


class UNet(Denoiser):
    """Noisy latents, time and condition => a raw prediction (Rombach et al. 2022, arXiv:2112.10752, sec. 3.2-3.3).

    State dict: conv_in, time_embedding, class_embedding, add_embedding, down_blocks, mid_block, up_blocks, conv_norm_out,
    conv_out, named as in the diffusers layout. A fresh network predicts zero: the last layers of res blocks, of spatial
    transformers and of the whole start at zero, as in the code of Dhariwal and Nichol 2021 (arXiv:2105.05233).
    """

    Config = UNetConfig
    config: UNetConfig

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        self.in_channels = config.in_channels
        self.out_channels = config.out_channels
        widths = config.block_out_channels
        self.multiple_of = 2 ** (len(widths) - 1)
        uses = {
            "tokens_BLC": config.cross_attention_dim,
            "labels_B": config.num_class_embeds,
            "vector_BC": config.vector_dim,
            "guidance_B": config.guidance_dim,
            "spatial_BCHW": config.spatial_channels,
        }
        self.accepts = self.requires = frozenset(name for name, size in uses.items() if size)

        time_channels = 4 * widths[0]
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = EmbeddingMLP(widths[0], time_channels, extra_channels=config.guidance_dim)
        self.class_embedding = nn.Embedding(config.num_class_embeds, time_channels) if config.num_class_embeds else None
        self.add_embedding = EmbeddingMLP(config.vector_dim, time_channels) if config.vector_dim else None
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in range(len(widths)))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, level) for level in reversed(range(len(widths))))
        self.conv_norm_out = GroupNorm(config.norm_num_groups, widths[0], eps=config.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        self._name_attention()
        self._start_at_zero()

    def forward(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """Predict; see `Denoiser.forward`.

        Raises:
            InputError: where a shape does not fit the config, naming both.
        """
        x_BCHW = self._with_spatial(x_BCHW, condition)
        self._check_sizes(x_BCHW, t_B, condition)
        time_BC = silu(self._embedding(t_B, condition))
        context = self._context(condition)
        h_BCHW = self.conv_in(x_BCHW)
        skips = [h_BCHW]
        for down_block in self.down_blocks:
            h_BCHW, new = down_block(h_BCHW, time_BC, context)
            skips += new
        h_BCHW = self.mid_block(h_BCHW, time_BC, context)
        used = self.config.layers_per_block + 1
        for up_block in self.up_blocks[:-1]:
            skips, taken = skips[:-used], skips[-used:]
            h_BCHW = up_block(h_BCHW, taken, time_BC, context)
        h_BCHW, residual_BCHW = cast(UpBlock, self.up_blocks[-1]).branches(h_BCHW, skips, time_BC, context)
        out: Tensor = self.conv_out(self.conv_norm_out(h_BCHW, residual_BCHW=residual_BCHW))
        return out

    def check(self, condition: Condition) -> None:
        """Raise InputError for fields it ignores or lacks, for tokens or vectors of another width."""
        super().check(condition)
        self._check_condition(condition)

    def prepare(self, condition: Condition) -> Condition:
        """Keys and values of every cross-attention, computed once, into `condition.extra`; the same bits as without.

        Raises:
            InputError: as `check`; for class labels outside the table.
        """
        self.check(condition)
        labels_B = condition.labels_B
        if labels_B is not None and len(labels_B):
            low, high = int(labels_B.min()), int(labels_B.max())
            if low < 0 or high >= (self.config.num_class_embeds or 0):
                raise InputError(
                    f"class labels from {low} to {high}: the network knows 0 to {(self.config.num_class_embeds or 0) - 1}"
                )
        if not self.config.cache_context or condition.tokens_BLC is None:
            return condition
        tokens_BLC = condition.tokens_BLC.to(self.conv_in.weight.dtype)
        cached = {layer.path: layer.keys_values(tokens_BLC) for layer in self._cross_attentions()}
        return dataclasses.replace(condition, extra={**condition.extra, KV_KEY: cached})

    @classmethod
    def from_diffusers(cls, configs: Configs, tokenizers: Mapping[str, Path]) -> Reading:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        (values,) = configs.values()
        return Reading(convert_diffusers_config(values))

    def to_diffusers(self) -> dict[str, Written]:
        """See `ldmkit.checkpoints.foreign`. Raises: ConfigError."""
        class_name, values = write_diffusers_config(self.config)
        return {"unet": Written("diffusers", class_name, values)}

    # ----------------------------------------------------------------------------------------------------------- inner parts

    def _embedding(self, t_B: Tensor, condition: Condition) -> Tensor:
        """Time, class and vector in one, (B, 4 x the first width)."""
        config, dtype = self.config, self.conv_in.weight.dtype
        waves_BC = sinusoidal_embedding(
            t_B, config.block_out_channels[0], flip_sin_to_cos=config.flip_sin_to_cos, freq_shift=config.freq_shift
        )
        time_BC: Tensor = self.time_embedding(waves_BC.to(dtype), self._guidance_embedding(condition))
        if self.class_embedding is not None:
            time_BC = time_BC + self.class_embedding(condition.labels_B)
        if self.add_embedding is not None:
            assert condition.vector_BC is not None
            time_BC = time_BC + self.add_embedding(condition.vector_BC.to(dtype))
        return time_BC

    def _guidance_embedding(self, condition: Condition) -> Tensor | None:
        """Sinusoids of 1000 (scale - 1), sines first, as latent consistency models are told it (Luo et al. 2023,
        arXiv:2310.04378: their w is the scale less 1)."""
        if self.config.guidance_dim is None:
            return None
        assert condition.guidance_B is not None
        angle_B = 1000 * (condition.guidance_B - 1)
        waves_BC = sinusoidal_embedding(angle_B, self.config.guidance_dim, flip_sin_to_cos=False, freq_shift=1.0)
        return waves_BC.to(self.conv_in.weight.dtype)

    def _context(self, condition: Condition) -> Context:
        perturbed = condition.extra.get(PERTURBED, {})
        if self.config.cross_attention_dim is None:
            return Context(perturbed=perturbed)
        assert condition.tokens_BLC is not None
        tokens_BLC = condition.tokens_BLC.to(self.conv_in.weight.dtype)
        return Context(tokens_BLC, condition.mask_BL, condition.extra.get(KV_KEY, {}), perturbed)

    def _with_spatial(self, x_BCHW: Tensor, condition: Condition) -> Tensor:
        spatial, config = condition.spatial_BCHW, self.config
        if not config.spatial_channels:
            return x_BCHW
        if spatial is None or spatial.shape[1] != config.spatial_channels or spatial.shape[2:] != x_BCHW.shape[2:]:
            raise InputError(
                f"spatial_BCHW must have {config.spatial_channels} channels and the latents' {tuple(x_BCHW.shape[2:])}, "
                f"got {None if spatial is None else tuple(spatial.shape)}"
            )
        return torch.cat([x_BCHW, spatial.to(x_BCHW.dtype)], dim=1)

    def _check_sizes(self, x_BCHW: Tensor, t_B: Tensor, condition: Condition) -> None:
        batch, channels, height, width = x_BCHW.shape
        if channels != self.in_channels:
            extra = self.config.spatial_channels
            raise InputError(f"the U-Net takes latents of {self.in_channels - extra} channels, got {channels - extra}")
        if height % self.multiple_of or width % self.multiple_of:
            raise InputError(f"latent height and width must be multiples of {self.multiple_of}, got {height} x {width}")
        if t_B.shape != (batch,):
            raise InputError(f"t_B must hold one time per image, ({batch},), got {tuple(t_B.shape)}")
        self._check_condition(condition)
        if condition.batch_size not in (None, batch):
            raise InputError(f"the condition is for {condition.batch_size} images, the latents for {batch}")

    def _check_condition(self, condition: Condition) -> None:
        wanted = {"tokens_BLC": self.config.cross_attention_dim, "vector_BC": self.config.vector_dim}
        for name, channels in wanted.items():
            value: Tensor | None = getattr(condition, name)
            if channels and (value is None or value.shape[-1] != channels):
                raise InputError(f"{name} must have {channels} channels, got {None if value is None else tuple(value.shape)}")
        if self.config.num_class_embeds and condition.labels_B is None:
            raise InputError(f"labels_B must be given: the U-Net has a table of {self.config.num_class_embeds} classes")
        if self.config.guidance_dim and condition.guidance_B is None:
            raise InputError("guidance_B must be given: the U-Net is told the guidance scale")

    def _cross_attentions(self) -> list[Attention]:
        return [layer for layer in self.modules() if isinstance(layer, Attention) and layer.to_context]

    def _name_attention(self) -> None:
        layers = {path: m for path, m in self.named_modules() if isinstance(m, Attention | AttentionBlock)}
        for path, layer in layers.items():
            layer.path = path
        to_self = (path for path, m in layers.items() if not (isinstance(m, Attention) and m.to_context))
        self.self_attentions = tuple(to_self)

    def _start_at_zero(self) -> None:
        last_layers: list[nn.Module] = [self.conv_out]
        last_layers += [layer.conv2 for layer in self.modules() if isinstance(layer, ResBlock)]
        last_layers += [layer.proj_out for layer in self.modules() if isinstance(layer, SpatialTransformer)]
        for layer in last_layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
