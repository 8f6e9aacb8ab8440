"""Keys and values of the prompt: computed once a run instead of at every step, with the same result."""

from collections import Counter

import pytest
import torch

from ldmkit.testing.accuracy import assert_as_accurate
from tests.conditions import tiny_pipeline

STEPS = 30


def count_projections(pipe):
    """Counts calls of the projections from the prompt to keys and values, by layer."""
    calls = Counter()
    for name, module in pipe.denoiser.named_modules():
        if name.endswith(("attn2.to_k", "attn2.to_v")):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def draw(pipe, calls, *, guidance_scale):
    """The latents of a run, and how often each layer projected the prompt during it."""
    calls.clear()
    options = {"num_inference_steps": STEPS, "guidance_scale": guidance_scale, "progress": False}
    latents = pipe("a red apple", seed=3, output_type="latent", **options).images
    return latents, dict(calls)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_thirty_steps_project_the_prompt_once(tmp_path, guidance_scale):
    """The conditional half, and with guidance the unconditional half in the same call."""
    pipe = tiny_pipeline(tmp_path)
    calls = count_projections(pipe)
    layers = sum(name.endswith("attn2.to_k") for name, _ in pipe.denoiser.named_modules())
    assert layers > 1

    reused, counted = draw(pipe, calls, guidance_scale=guidance_scale)
    assert len(counted) == 2 * layers
    assert set(counted.values()) == {1}

    pipe.denoiser.config = pipe.denoiser.config.model_copy(update={"cache_context": False})
    plain, counted = draw(pipe, calls, guidance_scale=guidance_scale)
    assert len(counted) == 2 * layers
    assert set(counted.values()) == {STEPS}

    exact, _ = draw(pipe.to(torch.float64), calls, guidance_scale=guidance_scale)
    assert_as_accurate(reused, plain, exact)
