"""All the guidance of one call, and the closure that it amounts to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

from ldmkit.errors import InputError
from ldmkit.guidance.classifier import Classifier, classifier_guided
from ldmkit.guidance.combination import Weight, combined
from ldmkit.guidance.interval import within
from ldmkit.guidance.threshold import clipped, thresholded
from ldmkit.interfaces import Condition, Denoise
from ldmkit.prediction import Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """What there is to choose; the defaults are no guidance.

    Attributes:
        scale, rescale: classifier-free guidance, see `combined`; off at 1.
        pag_scale, pag_layers: perturbed attention, see `perturb`; off at 0.
        interval: (low, high) in sigma / alpha, outside of which neither of the two acts.
        classifier, classifier_scale: see `classifier_guided`; acts on top of them, at every level.
        thresholding_ratio, thresholding_limit: see `thresholded`; acts last, at every level.
        batched: one pass or several, see `Passes`.
        method: a plugin's, called with (model, condition, negative, scale), in the place of classifier-free guidance.
        told: the scale that a denoiser distilled with guidance is told as `guidance_B`, for one pass; None for others.
    """

    scale: float = 1.0
    rescale: float = 0.0
    pag_scale: float = 0.0
    pag_layers: Sequence[str] = ("mid",)
    interval: tuple[float, float] | None = None
    classifier: Classifier | None = None
    classifier_scale: float = 1.0
    thresholding_ratio: float | None = None
    thresholding_limit: float = 1.0
    batched: bool | None = None
    method: Callable[[Model, Condition, Condition | None, float], Denoise] | None = None
    told: float | None = None

    def closure(
        self, model: Model, conditions: Sequence[Condition], weights: Sequence[Weight], negative: Condition | None
    ) -> Denoise:
        """D, guided. Raises: InputError, as the closures it is made of."""
        plain = partial(combined, model, conditions, weights=weights, negative=negative, batched=self.batched)
        if self.method is not None:
            if len(conditions) > 1 or self.rescale or self.pag_scale:
                raise InputError(
                    f"guidance_method takes the place of classifier-free guidance: it goes with one prompt a picture (here "
                    f"{len(conditions)}), without guidance_rescale ({self.rescale:g}) and pag_scale ({self.pag_scale:g})"
                )
            denoise = self.method(model, conditions[0], negative, self.scale)
        else:
            denoise = plain(scale=self.scale, rescale=self.rescale, pag_scale=self.pag_scale, pag_layers=self.pag_layers)
        if self.interval is not None:
            denoise = within(denoise, plain(), *self.interval)
        if self.classifier is not None:
            denoise = classifier_guided(denoise, self.classifier, self.classifier_scale)
        if model.prediction.config.clip is not None:
            denoise = clipped(denoise, model.prediction.config.clip)
        if self.thresholding_ratio is not None:
            denoise = thresholded(denoise, self.thresholding_ratio, self.thresholding_limit)
        return denoise
