"""The pipeline: what calls give, what they refuse, and that a saved one draws the same."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmkit
from ldmkit import Condition, Pipeline
from ldmkit.errors import (
    ArchitectureMismatchError,
    CheckpointError,
    ConfigError,
    InputError,
    InputTypeError,
    NumericalError,
    OutputError,
    UnknownPartError,
)
from tests.conditions import tiny_pipeline


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return tiny_pipeline(tmp_path_factory.mktemp("pipe"))


def picture(size: int = 32) -> Image.Image:
    ramp = np.linspace(0, 255, size, dtype=np.uint8)
    return Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], np.uint8(90)), axis=-1))


def latents_of(pipe: Pipeline, *args: Any, **kwargs: Any) -> torch.Tensor:
    return pipe(*args, output_type="latent", **{"seed": 5, **kwargs}).images


def test_output_types_agree(pipe: Pipeline) -> None:
    drawn = {kind: pipe("a red apple", seed=1, output_type=kind).images for kind in ("pil", "np", "pt", "latent")}
    assert drawn["latent"].shape == (1, 4, 16, 16)
    assert drawn["pt"].shape == (1, 3, 32, 32)
    assert drawn["pt"].min() >= 0
    assert drawn["pt"].max() <= 1
    np.testing.assert_array_equal(drawn["np"], drawn["pt"].permute(0, 2, 3, 1).numpy())
    np.testing.assert_array_equal(np.asarray(drawn["pil"][0]), (drawn["np"][0] * 255).round().astype(np.uint8))


def test_a_picture_depends_on_its_seed_and_number_alone(pipe: Pipeline) -> None:
    for sampler in ("ddpm", "ddim", "euler", "euler-ancestral"):
        pipe.sampler = sampler
        batch = latents_of(pipe, ["a red apple", "a blue pear", "a pear"])
        alone = latents_of(pipe, "a pear", first_image=2)
        scale = batch[2].std()
        assert (
            batch[2] - alone[0]
        ).abs().max() < 1e-4 * scale  # the noise is the same to the bit; matrix products round by batch
        assert (batch[2] - batch[1]).abs().max() > 0.1 * scale
    pipe.sampler = "ddim"


def test_several_pictures_per_prompt_differ_and_are_grouped_by_prompt(pipe: Pipeline) -> None:
    drawn = latents_of(pipe, ["a red apple", "a blue pear"], num_images_per_prompt=2)
    alone = latents_of(pipe, "a blue pear", first_image=2)
    assert drawn.shape[0] == 4
    assert (drawn[2] - alone[0]).abs().max() < 1e-4 * drawn.std()
    assert not torch.equal(drawn[0], drawn[1])


def test_seed_is_reported_and_reproduces(pipe: Pipeline) -> None:
    output = pipe("a pear", output_type="latent")
    assert isinstance(output.seed, int)
    assert torch.equal(latents_of(pipe, "a pear", seed=output.seed), output.images)


def test_the_global_random_state_is_left_alone(pipe: Pipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "p")
    before, numbers = torch.get_rng_state(), np.random.get_state()[1].copy()
    Pipeline.from_pretrained(tmp_path / "p")("a pear", seed=1, progress=False)
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numbers, np.random.get_state()[1])


def test_the_prompt_the_negative_prompt_and_guidance_matter(pipe: Pipeline) -> None:
    plain = latents_of(pipe, "a red apple")
    for change in ({"negative_prompt": "a blue pear"}, {"guidance_scale": 7.0}, {"guidance_rescale": 0.7}):
        assert (latents_of(pipe, "a red apple", **change) - plain).abs().max() > 1e-3
    assert (latents_of(pipe, "a green pear") - plain).abs().max() > 1e-3


def test_the_empty_negative_prompt_is_the_default(pipe: Pipeline) -> None:
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, "a pear", negative_prompt=""))


def test_a_negative_prompt_without_guidance_is_said_to_do_nothing(pipe: Pipeline) -> None:
    with pytest.warns(UserWarning, match="no effect: guidance is off up to guidance_scale = 1"):
        latents_of(pipe, "a pear", negative_prompt="red", guidance_scale=0.5)


def test_embeddings_made_before_give_the_same(pipe: Pipeline) -> None:
    assert pipe.conditioner is not None
    made, none = pipe.conditioner(["a pear"]), pipe.conditioner([""])
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, prompt_embeds=made))
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, prompt_embeds=made, negative_prompt_embeds=none))


def test_given_latents_are_the_starting_noise(pipe: Pipeline) -> None:
    from ldmkit.noise import KeyedNoise

    noise = KeyedNoise(5, [0])((1, 4, 16, 16), step=-1, draw=0)
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, "a pear", latents=noise))


def test_callbacks_see_every_step_and_may_change_the_latents(pipe: Pipeline) -> None:
    seen: list[tuple[int, float, torch.Tensor]] = []

    def watch(_: Pipeline, step: int, t: float, tensors: dict[str, torch.Tensor]) -> None:
        seen.append((step, t, tensors["latents"]))
        assert tensors["denoised"].shape == tensors["latents"].shape

    final = latents_of(pipe, "a pear", callback_on_step_end=watch)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [t for _, t, _ in seen] == [751, 501, 251, 1]
    assert torch.equal(seen[-1][2], final)
    zeros = latents_of(pipe, "a pear", callback_on_step_end=lambda p, i, t, x: {"latents": torch.zeros_like(x["latents"])})
    assert not zeros.any()


@pytest.mark.parametrize("sampler", ["ddim", {"name": "dpm-adaptive", "h_init": 2.0}])
def test_the_progress_bar_ends_at_its_end(pipe: Pipeline, sampler: Any) -> None:
    shown = io.StringIO()
    pipe.sampler = sampler
    pipe.set_progress_bar_config(file=shown)
    try:
        steps = pipe("a pear", seed=1, num_inference_steps=20).state.state.step
    finally:
        pipe.set_progress_bar_config(disable=True)
        pipe.sampler = "ddim"
    assert (steps == 20) == (sampler == "ddim")
    assert re.search(rf"100%\|#+\| {steps}/{steps} \[", shown.getvalue())


def test_eta_timesteps_and_sigmas(pipe: Pipeline) -> None:
    pipe.sampler = "ddim"
    assert not torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, "a pear", eta=1.0))
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(pipe, "a pear", timesteps=[751, 501, 251, 1]))
    pipe.sampler = "euler"
    levels = pipe.sampler.levels(pipe.schedule, 4)
    ours = latents_of(pipe, "a pear", sigmas=[level.ratio for level in levels])
    assert (ours - latents_of(pipe, "a pear")).abs().max() < 1e-4 * ours.std()
    pipe.sampler = "ddim"


def test_image_to_image_at_low_strength_stays_near_the_image(pipe: Pipeline) -> None:
    start = pipe.autoencoder.encode(torch.from_numpy(np.asarray(picture())).permute(2, 0, 1)[None] / 127.5 - 1).mode()
    distance = [
        float((latents_of(pipe, "a pear", image=picture(), strength=s, num_inference_steps=50) - start).square().mean())
        for s in (0.02, 0.5, 1.0)
    ]
    assert distance[0] < distance[1] < distance[2]


def test_inpainting_keeps_what_is_not_masked_to_the_bit(pipe: Pipeline) -> None:
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[8:24, 8:24] = 255
    drawn = latents_of(pipe, "a pear", image=picture(), mask_image=Image.fromarray(mask))
    again = latents_of(pipe, "a red apple", image=picture(), mask_image=Image.fromarray(mask))
    outside = torch.from_numpy(mask[::2, ::2] == 0)
    assert torch.equal(drawn[..., outside], again[..., outside])
    assert (drawn - again)[..., ~outside].abs().max() > 1e-3
    stopped = latents_of(
        pipe, "a pear", image=picture(), mask_image=Image.fromarray(mask), callback_on_step_end=lambda *at: {"stop": at[1] == 1}
    )
    assert torch.equal(drawn[..., outside], stopped[..., outside])


def test_nine_channel_inpainting_is_told_mask_and_masked_image(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, spatial=5)
    mask = np.zeros((32, 32))
    mask[:16] = 1
    seen: list[torch.Tensor] = []
    pipe.denoiser.register_forward_pre_hook(lambda _, args: seen.append(args[2].spatial_BCHW))
    drawn = latents_of(pipe, ["a pear", "a red apple"], image=picture(), mask_image=mask)
    assert drawn.shape == (2, 4, 16, 16)
    assert seen[0].shape == (4, 5, 16, 16)  # two pictures, with and without the prompt
    assert torch.equal(seen[0][0, 0], torch.from_numpy(mask[::2, ::2]).float())
    with pytest.raises(InputError, match="spatial_BCHW"):
        latents_of(pipe, "a pear")


def test_images_masks_and_copies_pair_up(pipe: Pipeline) -> None:
    """Image k's copies have the same start and their own noise, however the noise is made."""
    images, whole = [picture(), picture().rotate(90)], np.ones((32, 32))
    for noise in ({}, {"seed": None, "generator": [torch.Generator().manual_seed(k) for k in range(4)]}):
        drawn = latents_of(pipe, ["a pear", "a red apple"], image=images, num_images_per_prompt=2, **noise)
        assert drawn.shape[0] == 4
        assert not torch.equal(drawn[0], drawn[1])
    alone = latents_of(pipe, "a red apple", image=images[1], first_image=3)
    paired = latents_of(pipe, ["a pear", "a red apple"], image=images, num_images_per_prompt=2)
    assert (paired[3] - alone[0]).abs().max() < 1e-4 * paired.std()
    assert latents_of(pipe, ["a pear"] * 4, image=picture(), mask_image=[whole] * 2).shape[0] == 4
    with pytest.raises(InputError, match="4 masks for 2 images and 4 pictures"):
        latents_of(pipe, ["a pear"] * 4, image=images, mask_image=[whole] * 4)


def test_an_explicit_size_resizes_image_and_mask(pipe: Pipeline) -> None:
    mask = Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 50), (100, 1)))
    large = picture().resize((100, 100))
    drawn = latents_of(pipe, "a pear", image=large, mask_image=mask, height=32, width=32)
    small = picture().resize((100, 100)).resize((32, 32), Image.Resampling.LANCZOS)
    half = Image.fromarray(np.tile(np.repeat(np.uint8([0, 255]), 16), (32, 1)))
    assert torch.equal(drawn, latents_of(pipe, "a pear", image=small, mask_image=half))


def test_numbers_of_numpy_and_torch_are_numbers(pipe: Pipeline) -> None:
    plain = latents_of(pipe, "a pear", guidance_scale=2.5, num_images_per_prompt=2, num_inference_steps=3)
    theirs = latents_of(
        pipe, "a pear", guidance_scale=np.float32(2.5), num_images_per_prompt=np.int64(2), num_inference_steps=np.int32(3),
        height=np.int64(32), width=torch.tensor(32), seed=np.uint8(5),
    )  # fmt: skip
    assert torch.equal(plain, theirs)
    output = pipe(["a", "b"], seed=np.array([1, 2]), output_type="latent")
    assert output.seed == [1, 2]
    assert torch.equal(output.images, pipe(["a", "b"], seed=[1, 2], output_type="latent").images)
    times = [751, 501, 251, 1]
    for given in (np.array(times), torch.tensor(times)):
        assert torch.equal(latents_of(pipe, "a pear", timesteps=times), latents_of(pipe, "a pear", timesteps=given))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (True, InputTypeError, "None or a mapping"),
        ({"latent": 1}, InputError, "'latent'; only 'latents' can be changed"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, InputError, r"shape \(1, 4, 8, 8\); they were \(1, 4, 16, 16\)"),
        ({"latents": np.zeros((1, 4, 16, 16))}, InputTypeError, "latents that are no tensor: ndarray"),
        ({"latents": None}, InputTypeError, "latents that are no tensor: NoneType"),
        (
            {"latents": torch.full((1, 4, 16, 16), torch.nan)},
            NumericalError,
            "^callback_on_step_end produced NaN or infinite values at step 1 of 4",
        ),
    ],
)
def test_a_callback_s_wrong_answer_is_named(pipe: Pipeline, answer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pipe("a pear", callback_on_step_end=lambda *_: answer)


def test_a_callback_s_latents_go_on_in_the_run_s_type(pipe: Pipeline) -> None:
    def change(to: torch.dtype) -> torch.Tensor:
        return latents_of(pipe, "a pear", callback_on_step_end=lambda p, i, t, x: {"latents": x["latents"].round().to(to)})

    assert change(torch.float64).dtype == torch.float32
    assert torch.equal(change(torch.float64), change(torch.float32))


def test_one_negative_embedding_serves_all_prompts(pipe: Pipeline) -> None:
    assert pipe.conditioner is not None
    prompts, one = ["a pear", "a red apple"], pipe.conditioner(["blue"])
    tokens = one.tokens_BLC
    assert tokens is not None
    for given, each in ((one, one.repeat(2)), (tokens, tokens.repeat(2, 1, 1))):
        drawn = latents_of(pipe, prompts, negative_prompt_embeds=given)
        assert torch.equal(drawn, latents_of(pipe, prompts, negative_prompt_embeds=each))


def test_eight_threads_draw_what_one_draws(pipe: Pipeline) -> None:
    pipe.sampler = "euler-ancestral"
    wanted = [latents_of(pipe, "a pear", seed=k) for k in range(8)]
    got: list[Any] = [None] * 8

    def draw(k: int) -> None:
        got[k] = latents_of(pipe, "a pear", seed=k)

    threads = [threading.Thread(target=draw, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    pipe.sampler = "ddim"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shard", [None, 20_000])
def test_saved_and_loaded_draws_the_same_bits(tmp_path: Path, dtype: torch.dtype, shard: int | None) -> None:
    pipe = tiny_pipeline(tmp_path, sampler={"name": "euler", "timestep_spacing": "trailing"}, prediction="v_prediction").to(
        dtype
    )
    folder = pipe.save_pretrained(tmp_path / "saved", max_shard_size=shard)
    (tmp_path / "vocab.txt").unlink()  # the saved pipeline has its own
    loaded = Pipeline.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == dtype
    assert loaded.sampler.config == pipe.sampler.config
    assert loaded.prediction.config == pipe.prediction.config
    assert loaded.schedule.config == pipe.schedule.config
    assert loaded.defaults == pipe.defaults
    for kind, module in pipe.modules.items():
        theirs = loaded.modules[kind].state_dict()
        assert all(torch.equal(value, theirs[key]) for key, value in module.state_dict().items())
    assert torch.equal(latents_of(pipe, "a pear"), latents_of(loaded, "a pear", progress=False))


def test_a_compiled_denoiser_is_one_graph_draws_the_same_and_is_saved(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    drawn = latents_of(pipe, "a pear")
    pipe.denoiser.compile(backend="eager", fullgraph=True)
    assert torch.equal(latents_of(pipe, "a pear"), drawn)
    pipe.save_pretrained(tmp_path / "saved")
    assert torch.equal(latents_of(Pipeline.from_pretrained(tmp_path / "saved"), "a pear"), drawn)


def test_parts_can_be_replaced_at_loading_and_float32_is_the_default(pipe: Pipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p")
    loaded = Pipeline.from_pretrained(folder, sampler="euler", autoencoder=pipe.autoencoder)
    assert type(loaded.sampler).__name__ == "EulerSampler"
    assert loaded.autoencoder is pipe.autoencoder
    assert loaded.dtype == torch.float32
    assert Pipeline.from_pretrained(folder, torch_dtype=torch.float64).dtype == torch.float64


def test_saving_again_over_a_saved_pipeline(pipe: Pipeline, tmp_path: Path) -> None:
    folder = pipe.save_pretrained(tmp_path / "p")
    (folder / "notes.txt").write_text("mine")
    pipe.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert torch.equal(latents_of(Pipeline.from_pretrained(folder), "a pear", progress=False), latents_of(pipe, "a pear"))
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_saving_fewer_shards_over_more_leaves_none_of_the_old(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    folder = tmp_path / "p"
    for shard in (20_000, None, 40_000):
        with torch.no_grad():
            for parameter in pipe.denoiser.parameters():
                parameter.add_(1)
        pipe.save_pretrained(folder, max_shard_size=shard)
        loaded = Pipeline.from_pretrained(folder).denoiser.state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in pipe.denoiser.state_dict().items())
    pipe = Pipeline.from_pretrained(folder)  # its vocabulary is the folder's own
    pipe.save_pretrained(folder)
    assert sorted(path.name for path in (folder / "conditioner").iterdir()) == ["model.safetensors", "part.json", "vocab.txt"]


def test_saving_where_folders_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, which has no O_DIRECTORY."""
    import os

    from ldmkit.checkpoints import files

    really_open = os.open

    def refuse_folders(path: Any, *more: Any, **options: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied")
        return really_open(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse_folders)
    monkeypatch.delattr(os, "O_DIRECTORY")
    with files.atomic_folder(tmp_path / "p") as temporary:
        (temporary / "file").write_text("kept")
    assert (tmp_path / "p" / "file").read_text() == "kept"


def test_a_folder_without_a_pipeline_hides_no_registered_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmkit.checkpoints import pipelines

    class Fake:
        def load(self, kind: str, name: str) -> Any:
            return lambda: tmp_path / "weights"

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "registry", Fake)
    (tmp_path / "emoji").mkdir()
    assert pipelines.resolve("emoji") == tmp_path / "weights"
    (tmp_path / "emoji" / "pipeline.json").touch()
    assert pipelines.resolve("emoji") == Path("emoji")


def test_wrong_arguments_of_loading_are_named_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(InputTypeError, match="no argument 'samplr'; did you mean 'sampler'"):
        Pipeline.from_pretrained(tmp_path, samplr="euler")
    folder = tiny_pipeline(tmp_path).save_pretrained(tmp_path / "p")
    for dtype in ("float16", torch.int8):
        with pytest.raises(InputTypeError, match=r"must be a floating-point torch\.dtype"):
            Pipeline.from_pretrained(folder, dtype=dtype)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"prompt": 3}, InputTypeError, "prompt must be a string or a list of strings, got int"),
        ({"prompt": ["a", 3]}, InputTypeError, "entry 1 is 3"),
        ({"prompt": []}, InputError, "empty"),
        ({"prompt": None}, InputError, "nothing to draw"),
        ({"prompt": "a", "class_labels": 3}, InputError, "prompt and class_labels"),
        ({"height": 33}, InputError, "height = 33: must be a multiple of 4; the nearest are 32 and 36"),
        ({"width": 0}, InputError, "width = 0"),
        ({"width": 32.0}, InputTypeError, "width = 32.0"),
        ({"strength": 0.5}, InputError, "strength = 0.5 was given without image"),
        ({"image": picture(), "strength": 1.5}, InputError, "strength = 1.5: must be a number from 0 to 1"),
        ({"image": picture(), "strength": -0.1}, InputError, "strength = -0.1"),
        ({"image": picture(), "strength": 0.1}, InputError, "leaves none to take"),
        ({"image": picture(30)}, InputError, "height = 30: must be a multiple of 4"),
        ({"image": [picture(), picture(16)]}, InputError, "one size"),
        ({"image": picture(), "mask_image": picture(16)}, InputError, "mask_image is 16 x 16 .* and the image 32 x 32"),
        ({"image": np.full((32, 32, 3), 7.0)}, InputError, r"must be in \[0, 1\]"),
        ({"image": "cat.png"}, InputTypeError, "PIL image"),
        ({"image": picture(), "latents": torch.zeros(1, 4, 16, 16)}, InputError, "latents and image"),
        ({"mask_image": picture()}, InputError, "without image"),
        (
            {"num_inference_steps": 0},
            InputError,
            "num_inference_steps = 0: must be a whole number from 1 to the schedule's 1000",
        ),
        ({"num_inference_steps": 1001}, InputError, "1001"),
        ({"num_inference_steps": 4, "timesteps": [3, 1]}, InputError, "exclude"),
        ({"timesteps": [1, 3]}, InputError, "must fall"),
        ({"guidance_scale": -1}, InputError, "guidance_scale = -1"),
        ({"guidance_rescale": 1.5}, InputError, "guidance_rescale = 1.5"),
        ({"eta": 2.0}, ConfigError, "eta"),
        ({"guidance_scale": float("inf")}, InputError, "guidance_scale = inf: must be a finite number of at least 0"),
        ({"num_images_per_prompt": 0}, InputError, "num_images_per_prompt = 0"),
        ({"height": -8}, InputError, "height = -8: must be a multiple of 4; the nearest is 4"),
        ({"seed": ["1"]}, InputTypeError, "seed = '1': must be a whole number"),
        ({"first_image": -1}, InputError, "first_image = -1: must be a whole number of at least 0"),
        ({"first_image": "1"}, InputError, "first_image = '1'"),
        ({"progress": "no"}, InputTypeError, "progress = 'no': must be True or False"),
        ({"return_trajectory": "no"}, InputTypeError, "return_trajectory = 'no': must be True or False"),
        ({"callback_on_step_end": 5}, InputTypeError, "callback_on_step_end must be a function"),
        ({"guidance_method": 5}, InputTypeError, "guidance-method must be a name or a mapping with 'name', got int"),
        ({"prompt": None, "prompt_embeds": Condition()}, InputError, "prompt_embeds is for no picture: it sets no field"),
        ({"prompt": None, "prompt_embeds": torch.zeros(0, 5, 32)}, InputError, "for no picture: its batch is empty"),
        (
            {"prompt": None, "prompt_embeds": torch.full((1, 5, 32), torch.nan)},
            NumericalError,
            "prompt_embeds holds 160 NaN or infinite values of 160",
        ),
        (
            {"negative_prompt_embeds": torch.zeros(2, 5, 32)},
            InputError,
            "negative_prompt_embeds are for 2 pictures, and there are 1 prompts",
        ),
        ({"seed": -1}, InputError, "seed = -1"),
        ({"seed": [1, 2]}, InputError, "2 seeds for 1 images"),
        ({"seed": 1, "generator": torch.Generator()}, InputError, "seed and generator"),
        ({"generator": 42}, InputTypeError, "a number is given as seed="),
        ({"timesteps": 751}, InputTypeError, "timesteps must be a list of numbers, got 751"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 5, 3)},
            InputError,
            r"tokens_BLC must have 32 channels, got \(1, 5, 3\)",
        ),
        ({"generator": [torch.Generator(), torch.Generator()]}, InputError, "2 generators for a batch of 1"),
        (
            {"latents": torch.zeros(1, 4, 8, 8)},
            InputError,
            r"latents have shape \(1, 4, 8, 8\); this call needs \(1, 4, 16, 16\)",
        ),
        ({"latents": torch.full((1, 4, 16, 16), torch.nan)}, NumericalError, "before step 1"),
        ({"output_type": "jpeg"}, InputError, "output_type = 'jpeg'"),
        ({"clip_skip": 1}, InputError, "does not take it"),
        ({"first_image": 2, "generator": torch.Generator()}, InputError, "first_image = 2 was given with generator"),
        ({"negative_prompt": ["a", "b"]}, InputError, "2 negative prompts for 1 prompts"),
        ({"negative_prompt": 3}, InputTypeError, "negative_prompt"),
    ],
)
def test_bad_arguments_are_named_before_any_work(
    pipe: Pipeline, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    def work(*_: Any) -> None:
        pytest.fail("the denoiser ran before the argument was refused")

    handle = pipe.denoiser.register_forward_pre_hook(work)
    try:
        with pytest.raises(error, match=message):
            pipe(**{"prompt": "a pear", **arguments})
    finally:
        handle.remove()


def test_nan_names_the_part_and_the_step(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    calls = iter(range(100))
    pipe.denoiser.register_forward_hook(lambda m, args, out: out * (torch.nan if next(calls) == 2 else 1))
    with pytest.raises(NumericalError, match=r"the denoiser UNet produced .* at step 3 of 4"):
        pipe("a pear")
    pipe = tiny_pipeline(tmp_path)
    torch.nn.init.constant_(pipe.autoencoder.decoder.conv_out.bias, torch.inf)
    with pytest.raises(NumericalError, match=r"the autoencoder produced .* at decoding"):
        pipe("a pear")


def test_an_unconditional_pipeline_says_that_it_is(recwarn: pytest.WarningsRecorder) -> None:
    unet = {"block_out_channels": [8], "layers_per_block": 1, "transformer_layers_per_block": [0], "norm_num_groups": 4}
    denoiser = {"name": "unet", "in_channels": 3, "out_channels": 3, "cross_attention_dim": None, **unet}
    pipe = Pipeline(autoencoder={"name": "identity", "channels": 3}, denoiser=denoiser, defaults={"height": 8, "width": 8})
    for options, message in (
        ({"guidance_rescale": 0.5}, "no effect where this pipeline is unconditional"),
        ({"guidance_scale": 3.0}, "unconditional; leave it out, or take pag_scale="),
        ({"clip_skip": 1}, "clip_skip = 1 was given, but this pipeline has no conditioner that could take it"),
        ({"negative_prompt": "a"}, "negative_prompt was given, but this pipeline has no conditioner"),
        ({"prompt": "a"}, "it is unconditional"),
    ):
        with pytest.raises(InputError, match=message):
            pipe(**options)
    assert not recwarn.list


@pytest.mark.parametrize("size", ["5GB", 0])
def test_shards_have_a_number_of_bytes(pipe: Pipeline, tmp_path: Path, size: Any) -> None:
    with pytest.raises(InputError, match=rf"max_shard_size \(bytes\) = {size!r}: must be a whole number of at least 1"):
        pipe.save_pretrained(tmp_path / "saved", max_shard_size=size)


def test_parts_that_do_not_fit(pipe: Pipeline) -> None:
    with pytest.raises(UnknownPartError, match="did you mean 'euler'"):
        pipe.sampler = "eular"
    with pytest.raises(ConfigError, match="did you mean 'eta'"):
        pipe.sampler = {"name": "ddim", "etha": 1.0}
    with pytest.raises(InputTypeError, match="sampler must be a Sampler"):
        pipe.sampler = 3
    with pytest.raises(ConfigError, match="predicts 4 channels and the autoencoder's latents have 8"):
        Pipeline(
            autoencoder=ldmkit.build("autoencoder", "kl", latent_channels=8, block_out_channels=[32]), denoiser=pipe.denoiser
        )


def counted(message: str, sort: str = "") -> int:
    """How many keys the lines of a report name: one each, or as many as they say."""
    lines = [line for line in message.splitlines()[1:] if sort in line]
    return sum(int(found[1]) if (found := re.search(r"\((\d+) keys\)", line)) else 1 for line in lines)


def test_missing_truncated_corrupt_and_foreign_weights(pipe: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UnknownPartError, match="'no-such-model' is not a folder"):
        Pipeline.from_pretrained("no-such-model")
    folder = pipe.save_pretrained(tmp_path / "p")
    weights = folder / "denoiser" / "model.safetensors"
    whole = weights.read_bytes()

    weights.write_bytes(whole[: len(whole) - 100])
    with pytest.raises(CheckpointError, match=r"denoiser/model.safetensors is truncated: .* the first being '[\w.]+'"):
        Pipeline.from_pretrained(folder)
    weights.write_bytes(whole[:5])
    with pytest.raises(CheckpointError, match="truncated within its header"):
        Pipeline.from_pretrained(folder)
    weights.write_bytes(whole[:8] + b"?" + whole[9:])
    with pytest.raises(CheckpointError, match="header is corrupt"):
        Pipeline.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"denoiser/model.safetensors is missing"):
        Pipeline.from_pretrained(folder)
    weights.write_bytes((folder / "autoencoder" / "model.safetensors").read_bytes())
    with pytest.raises(ArchitectureMismatchError) as caught:
        Pipeline.from_pretrained(folder)
    names = set(pipe.denoiser.state_dict()) | set(pipe.autoencoder.state_dict())
    assert counted(str(caught.value)) == len(names)
    (folder / "pipeline.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        Pipeline.from_pretrained(folder)


def test_misshapen_weights_list_every_key(pipe: Pipeline, tmp_path: Path) -> None:
    from ldmkit.checkpoints.weights import load_weights

    tensors = {key: value[..., None] for key, value in pipe.denoiser.state_dict().items()}
    with pytest.raises(ArchitectureMismatchError) as caught:
        load_weights(pipe.denoiser, tensors, source="here")
    assert counted(str(caught.value), "shape ") == len(tensors)


def test_a_full_disk_leaves_the_saved_pipeline_as_it_was(
    pipe: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from ldmkit.checkpoints import weights

    folder = pipe.save_pretrained(tmp_path / "p")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_bytes", full)
    with pytest.raises(OutputError, match="No space left on device"):
        pipe.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_unwritable_place_is_named(pipe: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot write"):
        pipe.save_pretrained(tmp_path / "file" / "p")


def test_clip_skip_of_an_encoded_prompt_is_refused(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pipe.conditioner is not None
    made = pipe.conditioner(["a pear"])

    def takes_it(inputs: list[str], *, clip_skip: int | None = None) -> None:
        pytest.fail("the prompt was encoded")

    monkeypatch.setattr(pipe.conditioner, "forward", takes_it)
    with pytest.raises(InputError, match="clip_skip = 1 was given with prompt_embeds"):
        pipe(prompt_embeds=made, clip_skip=1)


def test_a_conditioner_that_does_not_fit_is_named_before_it_runs(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path)
    pipe.conditioner = ldmkit.build("conditioner", "class-label", num_classes=3, mode="labels")
    pipe.conditioner.register_forward_pre_hook(lambda *_: pytest.fail("the conditioner ran"))
    with pytest.raises(InputError, match="would ignore labels_B"):
        pipe(class_labels=1)
