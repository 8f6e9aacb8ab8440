"""Variations: image-to-image, several times from one image."""

from __future__ import annotations

from typing import Any

import ldmkit
from ldmkit.pipeline import PipelineOutput


def variations(pipe: ldmkit.Pipeline, image: Any, *, count: int = 4, strength: float = 0.5, **arguments: Any) -> PipelineOutput:
    """`count` pictures near `image`, nearer the smaller `strength` is. `arguments` go to the pipeline.

    Raises:
        InputError: for a count below 1, and whatever the pipeline refuses.
    """
    if count < 1:
        raise ldmkit.InputError(f"count = {count}: must be at least 1")
    return pipe(image=image, strength=strength, num_images_per_prompt=count, **arguments)
