"""The losses of both stages as plain functions: tensors in, one value per picture out. No optimizer, no device, no state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmkit.interfaces import Autoencoder, Condition, Denoiser, Posterior
from ldmkit.prediction import Prediction
from ldmkit.training.recipes import WeightingConfig

Pixel = Literal["l1", "l2", "mixed"]


def pixel_loss(reconstruction_BCHW: Tensor, x_BCHW: Tensor, kind: Pixel = "l1") -> Tensor:
    """Mean distance of raw pixels per picture, (B,): absolute, squared, or the mean of both ("mixed")."""
    difference = (reconstruction_BCHW.float() - x_BCHW.float()).flatten(1)
    if kind == "l1":
        return difference.abs().mean(dim=1)
    if kind == "l2":
        return difference.square().mean(dim=1)
    return 0.5 * (difference.abs().mean(dim=1) + difference.square().mean(dim=1))


def autoencoder_loss(
    autoencoder: Autoencoder, x_BCHW: Tensor, noise_BCHW: Tensor, *, pixel: Pixel = "l1", kl_weight: float = 1e-6
) -> tuple[Tensor, Tensor, Tensor, Posterior]:
    """Stage one without its perceptual and adversarial terms (Rombach et al. 2022, app. G).

    Args:
        x_BCHW: raw pixels in [-1, 1].
        noise_BCHW: standard normal, of the latents' shape.
        kl_weight: weight of the regulariser, which is divided by the number of values per picture, as the pixel term is.

    Returns:
        the pixel loss (B,), the weighted regulariser (B,), the reconstruction (B, C, H, W), the posterior.
    """
    posterior = autoencoder.encode(x_BCHW)
    reconstruction = autoencoder.decode(posterior.sample(noise_BCHW))
    regulariser_B = posterior.loss_B().float() * (kl_weight / x_BCHW[0].numel())
    return pixel_loss(reconstruction, x_BCHW, pixel), regulariser_B, reconstruction, posterior


def level_weight(config: WeightingConfig, prediction: Prediction, alpha_B: Tensor, sigma_B: Tensor) -> Tensor:
    """Weight of each level on the squared error of the raw prediction, (B,).

    Min-SNR weights the error of x0 by min(SNR, gamma) (Hang et al. 2023, sec. 3.4). In the network's own terms that is
    min(SNR, gamma) / SNR for epsilon, and min(SNR, gamma) / (SNR + 1) for v, since |eps error|^2 = SNR |x0 error|^2 and
    |v error|^2 = (SNR + 1) |x0 error|^2; for flow and edm it is the square of what their outputs are multiplied by in x0. At
    SNR = 0 the weight of epsilon is its limit, 1.
    """
    if config.name == "uniform":
        return torch.ones_like(alpha_B)
    snr_B = (alpha_B / sigma_B).square()
    clipped_B = snr_B.clamp(max=config.gamma)
    if prediction.config.type == "sample":
        return clipped_B
    if prediction.config.type == "v_prediction":
        return clipped_B / (snr_B + 1)
    if prediction.config.type in ("flow", "edm"):
        on_output_B = sigma_B / prediction.input_scale_B(alpha_B, sigma_B) * (prediction.config.sigma_data or 1.0)
        return clipped_B * on_output_B.square()
    epsilon_B = (config.gamma / snr_B).clamp(max=1)
    above = prediction.config.x0_above_sigma
    return epsilon_B if above is None else torch.where(sigma_B > above * alpha_B, clipped_B, epsilon_B)


def diffusion_loss(
    denoiser: Denoiser,
    prediction: Prediction,
    x0_BCHW: Tensor,
    condition: Condition,
    noise_BCHW: Tensor,
    *,
    alpha_B: Tensor,
    sigma_B: Tensor,
    t_B: Tensor,
    weight_B: Tensor | None = None,
    distance: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """weight x mean squared error of the raw prediction (Ho et al. 2020, eq. 14, generalised to any target), (B,).

    Args:
        x0_BCHW: final latents.
        noise_BCHW: standard normal.
        alpha_B, sigma_B, t_B: the level of each picture: x = alpha x0 + sigma noise, which the network sees divided by the
            prediction's input scale, and the time it is told.
        weight_B: see `level_weight`; 1 where not given.
        distance: (output, target) => (B,), instead of the mean squared error.
    """
    shape = (-1, *[1] * (x0_BCHW.ndim - 1))
    scale_B = prediction.input_scale_B(alpha_B, sigma_B)
    x_BCHW = (alpha_B / scale_B).view(shape) * x0_BCHW + (sigma_B / scale_B).view(shape) * noise_BCHW
    output = denoiser(x_BCHW, t_B, condition)
    target = prediction.target(x0_BCHW, noise_BCHW, alpha_B, sigma_B)
    if distance is None:
        loss_B = F.mse_loss(output.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
    else:
        loss_B = distance(output.float(), target.float())
    return loss_B if weight_B is None else weight_B * loss_B
