"""A whole pipeline by name. A real bundle ships trained weights in its wheel, as ldmkit's `emoji` does; to stay small this one
draws them from a fixed seed, into a folder that is deleted when the process ends.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

import ldmkit

_kept: list[tempfile.TemporaryDirectory[str]] = []


@functools.cache
def folder() -> Path:
    """The saved pipeline: 28 x 28 grey digits, from what they are called."""
    _kept.append(tempfile.TemporaryDirectory(prefix="ldmkit-example-digits-"))
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not spent on the weights
        torch.manual_seed(0)
        pipe = ldmkit.Pipeline(
            autoencoder={"name": "example-tiny", "image_channels": 1},
            denoiser={"name": "example-dit", "patch": 1, "condition_size": 32},
            conditioner={"name": "example-bytes", "hidden_size": 32},
            sampler="example-midpoint",
            schedule=ldmkit.FlowSchedule(),
            prediction="flow",
            defaults={"height": 28, "width": 28, "num_inference_steps": 4, "guidance_scale": 1.0},
        )
        for parameter in pipe.denoiser.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return pipe.save_pretrained(Path(_kept[-1].name) / "digits")
