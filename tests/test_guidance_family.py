"""Each kind of guidance against its formula, its paper's closed form, or diffusers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ldmkit import And, Condition, Level, Model, Pipeline, Prediction, build, classifier_guided, combined, thresholded, unguided
from ldmkit.errors import InputError, InputTypeError
from ldmkit.guidance import perturb, within
from ldmkit.schedule import vp_level
from ldmkit_unet.diffusers_config import convert_diffusers_config
from tests.conditions import randomise, tiny_pipeline
from tests.network_peers import UNETS, unet_inputs, unet_pair
from tests.test_guidance import EPS, Shifted, conditions, levels, normal

numbers = st.floats(-2, 2)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


def drawn(pipe: Pipeline, prompt: Any = "a red apple", **options: Any) -> Tensor:
    latents: Tensor = pipe(prompt, seed=3, output_type="latent", **options).images
    return latents


def passes_of(pipe: Pipeline, prompt: Any = "a red apple", **options: Any) -> list[int]:
    """Batch size of each pass through the denoiser."""
    seen: list[int] = []
    handle = pipe.denoiser.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        drawn(pipe, prompt, **options)
    finally:
        handle.remove()
    return seen


# -------------------------------------------------------------------------------------------------------------- composition


@given(levels, numbers, numbers, st.floats(1, 8), st.booleans())
def test_several_conditions_add_up_as_in_composable_diffusion(
    level: Level, first: float, second: float, scale: float, batched: bool
) -> None:
    """Liu et al. 2022, algorithm 1, on the noise itself; per image, in one pass or in three."""
    model, x, (one, other) = Model(Shifted(), Prediction()), normal(), conditions()
    negative = Condition(vector_BC=torch.full((3, 1), 0.3, dtype=torch.float64))
    per_image = torch.tensor([second, 0.0, 1.0], dtype=torch.float64)
    mine = combined(model, [one, other], weights=[first, per_image], negative=negative, scale=scale, batched=batched)(x, level)
    eps = [torch.tanh(x / level.scale + c.vector_BC.view(-1, 1, 1, 1)) for c in (negative, one, other)]
    mixed = eps[0] + scale * (first * (eps[1] - eps[0]) + per_image.view(-1, 1, 1, 1) * (eps[2] - eps[0]))
    expected = (x - level.sigma * mixed) / level.alpha
    size = float(x.abs().max() + level.sigma * scale * 9) / level.alpha
    torch.testing.assert_close(mine, expected, rtol=0, atol=64 * EPS * size)


def test_what_has_no_share_costs_no_pass() -> None:
    network, (one, other) = Shifted(), conditions()
    model, level = Model(network, Prediction()), vp_level(1.0, 1.0)

    def passes(*asked: Condition, **options: Any) -> list[int]:
        network.batches.clear()
        combined(model, asked, **options)(normal(), level)
        return list(network.batches)

    assert passes(one, negative=other, scale=1.0) == [3]
    assert passes(one, negative=other, scale=1.0, rescale=0.7) == [3]
    assert passes(one, negative=other, scale=2.0) == [6]
    assert passes(one, other, one, weights=(0.7, 0.2, 0.1)) == [9]
    assert passes(one, other, weights=(0.7, 0.2), negative=other) == [9]
    with pytest.raises(InputError, match=r"at scale 1 of weights 0.7, 0.2 needs a negative condition"):
        combined(model, [one, other], weights=(0.7, 0.2))
    with pytest.raises(InputError, match="1 weights for 2 conditions"):
        combined(model, [one, other])


def test_prompts_joined_by_and(pipe: Pipeline) -> None:
    plain = drawn(pipe)
    assert torch.equal(drawn(pipe, And("a red apple")), plain)
    twice = drawn(pipe, And(("a red apple", 0.5), ("a red apple", 0.5)))
    assert (twice - plain).abs().max() < 1e-4 * plain.std()
    assert (drawn(pipe, And("a red apple", ("a pear", 0.5))) - plain).abs().max() > 1e-3
    mixed = drawn(pipe, [And("a red apple", ("a pear", 0.5)), "a blue pear"], num_images_per_prompt=2)
    assert (mixed[:1] - drawn(pipe, And("a red apple", ("a pear", 0.5)))).abs().max() < 1e-4 * plain.std()
    with pytest.raises(InputError, match=r"And: \('a', 'b'\) is no pair"):
        And(("a", "b"))
    with pytest.raises(InputTypeError, match="weights may be negative"):
        drawn(pipe, negative_prompt=And("a", "b"))


# ------------------------------------------------------------------------------------------------------- interval, classifier


def test_guidance_within_an_interval_only(pipe: Pipeline) -> None:
    ratios = [level.ratio for level in pipe.sampler.levels(pipe.schedule, 4)]
    inside = (ratios[2], ratios[1])  # the upper end belongs to it
    assert passes_of(pipe, guidance_interval=inside) == [1, 2, 1, 1]
    assert passes_of(pipe, guidance_interval=(0, 1e9)) == [2] * 4
    assert torch.equal(drawn(pipe, guidance_interval=(0, 1e9)), drawn(pipe))
    assert torch.equal(drawn(pipe, guidance_interval=(1e8, 1e9)), drawn(pipe, guidance_scale=1.0))
    with pytest.raises(InputError, match=r"\(2, 1\): needs 0 <= low < high"):
        within(lambda x, level: x, lambda x, level: x, 2, 1)


@given(levels, st.floats(0.1, 3), numbers)
def test_an_exact_classifier_gives_the_exact_posterior(level: Level, tau: float, y: float) -> None:
    """x0 ~ N(0, 1) and y = x0 + tau noise: then p(y | x) and E[x0 | x, y] are known."""
    mean, var = level.alpha / level.scale**2, (level.sigma / level.scale) ** 2

    def log_prob_B(x: Tensor, at: Level) -> Tensor:
        return (-0.5 * (y - mean * x) ** 2 / (var + tau**2)).flatten(1).sum(dim=1)

    x = normal()
    guided = classifier_guided(lambda x, at: mean * x, log_prob_B)(x, level)
    exact = (mean * x / var + y / tau**2) / (1 / var + 1 / tau**2)
    slack = 64 * EPS * (1 + var / tau**2) * (1 + level.ratio) * (x.abs().max() + abs(y))
    assert (guided - exact).abs().max() <= slack


def test_a_classifier_in_the_pipeline(pipe: Pipeline) -> None:
    def brighter(x: Tensor, level: Level) -> Tensor:
        return x[:, 0].flatten(1).sum(dim=1)

    plain = drawn(pipe)
    raised = [drawn(pipe, classifier=brighter, classifier_scale=s)[:, 0].mean() - plain[:, 0].mean() for s in (0.01, 0.02)]
    assert 0 < raised[0] < raised[1]
    for wrong, error, message in (
        (lambda x, at: 1.0, InputTypeError, "must return a tensor"),
        (lambda x, at: x.sum(), InputError, r"per image, \(1,\), got shape \(\)"),
        (lambda x, at: x.detach().flatten(1).sum(dim=1), InputError, "is there a no_grad in it"),
        ("resnet", InputTypeError, "classifier must be a function"),
    ):
        with pytest.raises(error, match=message):
            drawn(pipe, classifier=wrong)
    with pytest.raises(InputError, match="at zero signal"):
        classifier_guided(lambda x, at: x, brighter)(normal(), Level(0.0, 1.0, 999.0))


# -------------------------------------------------------------------------------------------------------- perturbed attention


@pytest.mark.parametrize("layer", ["mid", "up_blocks.1.attentions.0"])
def test_perturbed_attention_is_diffusers(layer: str) -> None:
    (ours, peer), block = unet_pair("sd1"), {"mid": "mid_block"}.get(layer, layer)
    ours, peer = ours.double(), peer.double()
    x, t, condition = (value.to(dtype=torch.float64) for value in unet_inputs(ours))
    peer.set_attn_processor(
        {
            name: PAGIdentitySelfAttnProcessor2_0() if name.startswith(block) and "attn1" in name else processor
            for name, processor in peer.attn_processors.items()
        }
    )
    both = [torch.cat([value, value]) for value in (x, t, condition.tokens_BLC)]
    theirs = peer(both[0], both[1], encoder_hidden_states=both[2]).sample.chunk(2)
    plain, worse = (ours(x, t, perturb(ours, Condition(tokens_BLC=condition.tokens_BLC), [layer], on)) for on in (False, True))
    rounding = 1e-6 * theirs[0].std()  # time embeddings are formed in float32 on both sides
    assert (plain - theirs[0]).abs().max() <= rounding
    assert (worse - theirs[1]).abs().max() <= rounding
    assert (worse - plain).abs().max() > 1e3 * rounding


def test_perturbed_attention_with_and_without_other_guidance(pipe: Pipeline) -> None:
    assert passes_of(pipe, pag_scale=2.0, guidance_scale=1.0) == [2] * 4
    assert passes_of(pipe, pag_scale=2.0) == [3] * 4
    assert passes_of(pipe, pag_scale=2.0, guidance_batched=False) == [1] * 12
    one, three = (drawn(pipe, pag_scale=2.0, guidance_batched=batched) for batched in (True, False))
    assert (one - three).abs().max() < 1e-4 * one.std()
    model, x, level = Model(pipe.denoiser, pipe.prediction), torch.randn(2, 4, 16, 16), vp_level(1.0, 500.0)
    made = pipe.conditioner(["a red apple", "a pear"])
    with torch.no_grad():
        plain, worse = (unguided(model, c)(x, level) for c in (made, perturb(pipe.denoiser, made, ["mid"], True)))
        guided = combined(model, [made], pag_scale=2.0, pag_layers=["mid"])(x, level)
    assert (guided - (plain + 2.0 * (plain - worse))).abs().max() < 1e-4 * plain.std()


@pytest.mark.parametrize("block", ["plain", "transformer"])
def test_perturbed_attention_guides_without_any_condition(block: str) -> None:
    unet = build(
        "denoiser", "unet", in_channels=3, out_channels=3, block_out_channels=[8, 16], layers_per_block=1,
        transformer_layers_per_block=[0, 1], num_attention_heads=2, attention_block=block, cross_attention_dim=None,
        norm_num_groups=4,
    )  # fmt: skip
    randomise(unet, std=0.3)
    pipe = Pipeline(autoencoder={"name": "identity"}, denoiser=unet, defaults={"height": 8, "width": 8})
    options = {"num_inference_steps": 2, "progress": False, "num_images_per_prompt": 3}
    one, two = (drawn(pipe, None, pag_scale=3.0, guidance_batched=batched, **options) for batched in (True, False))
    assert (one - two).abs().max() < 1e-4 * one.std()
    assert (one - drawn(pipe, None, **options)).abs().max() > 1e-3 * one.std()
    with pytest.raises(InputError, match="guidance_scale = 5 has no effect: this pipeline is unconditional"):
        drawn(pipe, None, guidance_scale=5.0, **options)


# ----------------------------------------------------------------------------------------------- scale as an input, threshold


def test_a_denoiser_told_the_scale_is_diffusers_and_makes_one_pass(tmp_path: Path) -> None:
    style = {**UNETS["sd1"], "time_cond_proj_dim": 32}
    peer = diffusers.UNet2DConditionModel(**style).double().eval()
    randomise(peer)
    ours = build("denoiser", "unet", **convert_diffusers_config(style)).double().eval()
    ours.load_state_dict(peer.state_dict())
    x, t, condition = (value.to(dtype=torch.float64) for value in unet_inputs(unet_pair("sd1")[0]))
    scale = torch.tensor([1.0, 4.0, 7.5])
    embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
    told = embed(None, scale - 1, embedding_dim=32).double()
    theirs = peer(x, t, encoder_hidden_states=condition.tokens_BLC, timestep_cond=told).sample
    mine = ours(x, t, Condition(tokens_BLC=condition.tokens_BLC, guidance_B=scale))
    angles = 1000 * (scale - 1)  # in float32 on both sides
    assert ((mine - theirs).abs().amax(dim=(1, 2, 3)) <= (1e-6 + 2.0**-23 * angles) * theirs.std()).all()

    pipe = tiny_pipeline(tmp_path)
    pipe.denoiser = build("denoiser", "unet", **{**pipe.denoiser.config.to_dict(), "guidance_dim": 16})
    randomise(pipe.denoiser)
    assert passes_of(pipe, guidance_scale=8.0) == [1] * 4
    assert (drawn(pipe, guidance_scale=8.0) - drawn(pipe, guidance_scale=2.0)).abs().max() > 1e-3
    for options in ({"negative_prompt": "red"}, {"guidance_rescale": 0.5}, {"guidance_interval": (0, 1)}):
        with pytest.raises(InputError, match=r"no effect .* told the"):
            drawn(pipe, **options)


@given(st.floats(0.5, 1), st.floats(0.1, 4))
def test_dynamic_thresholding_is_diffusers(ratio: float, size: float) -> None:
    scheduler = diffusers.DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=1e9)
    x0 = size * normal()
    mine = thresholded(lambda x, level: x, ratio)(x0, vp_level(1.0, 1.0))
    torch.testing.assert_close(mine, scheduler._threshold_sample(x0), rtol=1e-13, atol=0)
    torch.testing.assert_close(thresholded(lambda x, level: x, ratio, 2.0)(2 * x0, vp_level(1.0, 1.0)), 2 * mine)


# --------------------------------------------------------------------------------------------------- memory, what has no effect


def test_a_device_that_runs_out_of_memory_gets_one_pass_each(pipe: Pipeline) -> None:
    wanted = drawn(pipe, guidance_batched=False)

    def full(_: Any, args: Any) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("out of memory")

    handle = pipe.denoiser.register_forward_pre_hook(full)
    try:
        with pytest.warns(UserWarning, match="no memory for 2 conditions in one pass"):
            assert torch.equal(drawn(pipe), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(drawn(pipe, guidance_batched=False), wanted)
        with pytest.raises(torch.OutOfMemoryError):
            drawn(pipe, guidance_batched=True)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_rescale": 0.5, "guidance_scale": 1.0}, "guidance_rescale = 0.5 has no effect where there is no guidance"),
        ({"guidance_interval": (0, 1), "guidance_scale": 0.5}, "guidance_interval = .* has no effect"),
        ({"guidance_interval": (3, 1)}, r"guidance_interval = \(3, 1\): low must be below high"),
        ({"guidance_interval": 3}, "must be a pair"),
        ({"pag_layers": "mid"}, "pag_layers = 'mid' has no effect without pag_scale"),
        ({"pag_scale": 1.0, "pag_layers": "middle"}, "'middle' is no self-attention layer of UNet; there are down_blocks.0"),
        ({"pag_scale": 1.0, "pag_layers": []}, "pag_layers is empty"),
        ({"pag_scale": 1.0, "pag_layers": 5}, "pag_layers = 5: must be the name of a self-attention layer"),
        ({"pag_scale": 1.0, "pag_layers": [5]}, r"pag_layers = \[5\]: must be the name"),
        ({"pag_scale": -1.0}, "pag_scale = -1"),
        ({"pag_scale": float("inf")}, "pag_scale = inf: must be a finite number of at least 0"),
        ({"guidance_batched": "no"}, "guidance_batched = 'no': must be True, False or None"),
        ({"classifier": len, "classifier_scale": float("inf")}, "classifier_scale = inf: must be a finite number$"),
        ({"pag_scale": 1.0, "prompt": And("a", "b")}, "defined for one condition, not 2"),
        ({"classifier_scale": 2.0}, "classifier_scale = 2.0 has no effect without classifier"),
        ({"dynamic_thresholding_limit": 2.0}, "no effect without dynamic_thresholding_ratio"),
        ({"dynamic_thresholding_ratio": 0.0}, "dynamic_thresholding_ratio = 0.0: must be above 0"),
    ],
)
def test_guidance_that_cannot_be_is_named(pipe: Pipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, InputTypeError), match=message):
        drawn(pipe, **options)


def test_embeddings_that_do_not_fit_are_noticed_before_the_picture_is_encoded(pipe: Pipeline) -> None:
    handle = pipe.autoencoder.register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    pipe.autoencoder.encode, kept = lambda *_: pytest.fail("the picture was encoded"), pipe.autoencoder.encode
    try:
        for wrong in ({"prompt_embeds": torch.zeros(1, 5, 3)}, {"prompt": "a", "negative_prompt_embeds": torch.zeros(1, 5, 3)}):
            with pytest.raises(InputError, match="tokens_BLC must have 32 channels"):
                pipe(**wrong, image=torch.zeros(1, 3, 32, 32))
    finally:
        pipe.autoencoder.encode = kept
        handle.remove()
