"""Whole runs on toys: they learn, resume to the same bits, and refuse what cannot be."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ldmkit.training.logs as logs
from ldmkit import Pipeline
from ldmkit.checkpoints.parts import load_part
from ldmkit.errors import ArchitectureMismatchError, ConfigError, InputError, NumericalError, OutputError
from ldmkit.training import AutoencoderRecipe, Options, Result, load_recipe, losses, train_autoencoder, train_diffusion
from ldmkit.training import state as states
from ldmkit.training.diffusion import DiffusionStage
from ldmkit.training.draws import Draw, Order, normal
from ldmkit.training.latents import encode_all
from ldmkit.training.recipes import Recipe
from ldmkit.training.stage import Share
from tests.training.toy import UNET, autoencoder_values, squares, stage_one, stage_two

Train = Callable[[Options], Result]
ADVERSARIAL = {"adversarial": {"start": 3, "channels": 4, "layers": 1}}


@pytest.fixture(params=["autoencoder", "diffusion", "diffusion in bf16"])
def train(request: pytest.FixtureRequest, data: Path, autoencoder: Path) -> Train:
    """A whole run of 8 steps, given its options."""
    if request.param == "autoencoder":
        return lambda options: train_autoencoder(stage_one(data, loss=ADVERSARIAL, data=_flipped(data)), options)
    changes: dict[str, Any] = {}
    if request.param == "diffusion in bf16":
        conditioner = {"name": "bert", "vocab": "vocab.txt", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        changes = {
            "mixed_precision": "bf16",
            "channels_last": True,
            "cache_latents": False,
            "conditioner": {**conditioner, "intermediate_size": 16, "max_length": 6, "dropout": 0.1},
            "data": {**_flipped(data), "condition_key": "text"},
            "preview": {"inputs": ["a red square"], "num_inference_steps": 2},
            "prediction": {"type": "v_prediction"},
            "weighting": {"name": "min_snr"},
        }
    return lambda options: train_diffusion(stage_two(data, autoencoder, **changes), options, base=data)


def _flipped(data: Path) -> dict[str, Any]:
    return {"npz": str(data / "squares.npz"), "size": 16, "flip": True}


def bits(out: Path) -> dict[str, bytes]:
    """Every byte of the last checkpoint and of the export, and the log without its timings."""
    latest = states.find(out / "checkpoints")[-1]
    exported = [*(out / "autoencoder").rglob("*"), *(out / "pipeline").rglob("*")]
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in (*latest.iterdir(), *exported) if path.is_file()}
    return files | {"log": json.dumps(log(out)).encode()}


def log(out: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "images_per_second"} for row in rows]


# ---------------------------------------------------------------------------------------------------------------- learning


def test_stage_one_learns(data: Path, tmp_path: Path) -> None:
    recipe = stage_one(data, steps=60, log_every=10, sample_every=60, optimizer={"lr": 1e-2, "warmup_steps": 5})
    result = train_autoencoder(recipe, Options(tmp_path, device="cpu"))
    seen = [row["pixel"] for row in log(tmp_path)]
    assert seen[-1] < 0.75 * seen[0]
    assert result == Result(60, True, tmp_path / "autoencoder")
    assert load_part(result.exported, kind="autoencoder").latent_channels == 3
    assert (tmp_path / "samples/step-00000060.png").is_file()
    assert list((tmp_path / "tensorboard").iterdir())


def test_stage_two_learns_and_draws(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    recipe = stage_two(data, autoencoder, steps=80, log_every=20, sample_every=80, defaults={"height": 16, "width": 16})
    result = train_diffusion(recipe, Options(tmp_path, device="cpu"))
    seen = [row["loss"] for row in log(tmp_path)]
    assert seen[-1] < 0.85 * seen[0]
    pipe = Pipeline.from_pretrained(result.exported)
    images = pipe(class_labels=[0, 2], num_inference_steps=2, guidance_scale=2.0, seed=1, progress=False).images
    assert [image.size for image in images] == [(16, 16)] * 2
    assert (tmp_path / "samples/step-00000080.png").is_file()


def test_the_export_has_the_averages(data: Path, tmp_path: Path) -> None:
    exported = train_autoencoder(stage_one(data), Options(tmp_path, device="cpu")).exported
    averages = states.read_weights(states.find(tmp_path / "checkpoints")[-1], stem="ema")
    part = load_part(exported)
    assert all(torch.equal(averages[f"autoencoder.{name}"], p) for name, p in part.named_parameters())


@pytest.mark.parametrize("source", [{"folder": "squares"}, {"npz": "squares.npz"}], ids=str)
def test_paths_in_a_recipe_are_relative_to_its_folder(data: Path, tmp_path: Path, source: dict[str, str]) -> None:
    recipe = stage_one(data, data={**source, "size": 16}, steps=1)
    assert train_autoencoder(recipe, Options(tmp_path, device="cpu"), base=data).finished


def test_an_unconditional_model(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    denoiser = {**UNET, "cross_attention_dim": None}
    preview = {"num_inference_steps": 2}
    recipe = stage_two(data, autoencoder, denoiser=denoiser, conditioner=None, preview=preview, steps=4)
    exported = train_diffusion(recipe, Options(tmp_path, device="cpu")).exported
    assert Pipeline.from_pretrained(exported).conditioner is None
    assert (tmp_path / "samples/step-00000004.png").is_file()
    with pytest.raises(ConfigError, match="guidance_scale = 3 has no effect without a conditioner"):
        stage_two(data, autoencoder, denoiser=denoiser, conditioner=None, preview={**preview, "guidance_scale": 3.0})


def test_a_frozen_conditioner_stays_as_it_is(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    first = train_diffusion(stage_two(data, autoencoder, steps=2), Options(tmp_path / "a", device="cpu")).exported
    stored = first / "conditioner"
    recipe = stage_two(data, autoencoder, steps=3, freeze_conditioner=True, conditioner_weights=str(stored), seed=5)
    second = train_diffusion(recipe, Options(tmp_path / "b", device="cpu")).exported
    assert (second / "conditioner/model.safetensors").read_bytes() == (stored / "model.safetensors").read_bytes()


def test_a_run_starts_from_the_weights_of_another(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    first = train_diffusion(stage_two(data, autoencoder, steps=2), Options(tmp_path / "a", device="cpu")).exported
    start = {"denoiser_weights": str(first / "denoiser"), "conditioner_weights": str(first / "conditioner")}
    still = {"optimizer": {"lr": 1e-30, "weight_decay": 0}, "seed": 5, "steps": 1}
    second = train_diffusion(stage_two(data, autoencoder, **start, **still), Options(tmp_path / "b", device="cpu")).exported
    for part in ("denoiser", "conditioner"):
        old, new = (load_part(folder / part).state_dict() for folder in (first, second))
        assert all(bool((new[name] - value).abs().max() < 1e-20) for name, value in old.items()), "one step of 1e-30"
    other = stage_two(data, autoencoder, denoiser_weights=str(first / "denoiser"), denoiser={**UNET, "layers_per_block": 2})
    with pytest.raises(ArchitectureMismatchError, match="denoiser_weights"):
        train_diffusion(other, Options(tmp_path / "c", device="cpu"))


# ---------------------------------------------------------------------------------------------------------------- resuming


def test_a_run_in_pieces_equals_a_whole_one_bit_for_bit(train: Train, tmp_path: Path) -> None:
    train(Options(tmp_path / "whole", device="cpu"))
    for piece in (1, 4, 2, 9):
        torch.manual_seed(piece)  # the caller's random state is no part of it
        train(Options(tmp_path / "pieces", device="cpu", max_steps=piece))
    assert bits(tmp_path / "pieces") == bits(tmp_path / "whole")


def test_previews_and_checkpoints_leave_no_trace(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(Options(tmp_path / "quiet", device="cpu"))
    parse = Recipe.model_copy
    changed: list[Recipe] = []
    run = "ldmkit.training.autoencoder.run", "ldmkit.training.diffusion.run"
    from ldmkit.training.loop import run as loop

    def busy(recipe: Recipe, *args: Any) -> Result:
        changed.append(parse(recipe, update={"sample_every": 1, "checkpoint_every": 1, "keep": 1}))
        return loop(changed[0], *args)

    for name in run:
        monkeypatch.setattr(name, busy)
    train(Options(tmp_path / "busy", device="cpu"))
    assert changed
    assert len(list((tmp_path / "busy/samples").iterdir())) == 8
    quiet, busy_bits = bits(tmp_path / "quiet"), bits(tmp_path / "busy")
    different = {name for name in quiet if quiet[name] != busy_bits[name]}
    assert {Path(name).name for name in different} == {"state.json"}  # which holds the recipe


def test_the_callers_random_state_is_untouched(train: Train, tmp_path: Path) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    train(Options(tmp_path, device="cpu", max_steps=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_failure_between_checkpoints_resumes_to_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is ahead of the checkpoint then, and is cut back."""
    train(Options(tmp_path / "whole", device="cpu"))
    write = logs.Log.write

    def dies(self: logs.Log, step: int, values: dict[str, Any]) -> None:
        write(self, step, values)
        if step == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(logs.Log, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        train(Options(tmp_path / "cut", device="cpu"))
    monkeypatch.undo()
    assert [row["step"] for row in log(tmp_path / "cut")] == [3, 6]
    with (tmp_path / "cut/log.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # half a line
    said: list[str] = []
    train(Options(tmp_path / "cut", device="cpu", say=said.append))
    assert "resuming from" in said[0]
    assert "step-00000004" in said[0]
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole")


def test_sigkill_at_random_moments(data: Path, tmp_path: Path) -> None:
    """The real thing: the command line, killed twice in the midst of writing checkpoints, then left to finish."""
    values = autoencoder_values(data, steps=40, checkpoint_every=1, sample_every=20, loss=ADVERSARIAL)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "ldmkit.cli", "train", "autoencoder", "recipe.yaml", "--device", "cpu", "--out", "killed"]
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    rng = random.Random(os.getpid())
    for _ in range(2):
        before = states.find(tmp_path / "killed/checkpoints")[-1:]
        with (tmp_path / "output").open("w") as output:
            process = subprocess.Popen(command, cwd=tmp_path, env=os.environ | threads, stdout=output, stderr=output)
        while states.find(tmp_path / "killed/checkpoints")[-1:] == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output").read_text()
    recipe = load_recipe(AutoencoderRecipe, tmp_path / "recipe.yaml")
    for out in ("killed", "whole"):
        train_autoencoder(recipe, Options(tmp_path / out, device="cpu"))
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")


def test_a_full_disk_in_mid_run_loses_no_checkpoint(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_autoencoder(stage_one(data), Options(tmp_path / "whole", device="cpu"))
    write_weights = states.write_weights

    def full(folder: Path, tensors: Any, **options: Any) -> None:
        if "step-00000008" in folder.name and options.get("stem") == "optimizer":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_weights(folder, tensors, **options)

    monkeypatch.setattr(states, "write_weights", full)
    with pytest.raises(OutputError, match="No space left on device"):
        train_autoencoder(stage_one(data), Options(tmp_path / "full", device="cpu"))
    monkeypatch.undo()
    assert [path.name for path in states.find(tmp_path / "full/checkpoints")] == ["step-00000004"]
    train_autoencoder(stage_one(data), Options(tmp_path / "full", device="cpu"))
    assert bits(tmp_path / "full") == bits(tmp_path / "whole")


# ------------------------------------------------------------------------------------------------- starting, stopping, changing


def test_stopping_by_time_and_by_request(data: Path, tmp_path: Path) -> None:
    recipe = stage_one(data)
    assert train_autoencoder(recipe, Options(tmp_path / "a", device="cpu", max_minutes=1e-9)).step == 0
    asked = iter([False, False, True])
    result = train_autoencoder(recipe, Options(tmp_path / "b", device="cpu", should_stop=lambda: next(asked)))
    assert result == Result(2, False, tmp_path / "b/autoencoder")
    assert states.find(tmp_path / "b/checkpoints")[-1].name == "step-00000002"


def test_resume_demands_a_checkpoint_and_fresh_deletes_it(data: Path, tmp_path: Path) -> None:
    recipe = stage_one(data, steps=3)
    with pytest.raises(InputError, match="there is no checkpoint to resume"):
        train_autoencoder(recipe, Options(tmp_path, start="resume", device="cpu"))
    with pytest.raises(InputError, match=r"start = 'anew': must be 'auto', 'resume', 'fresh'"):
        train_autoencoder(recipe, Options(tmp_path, start="anew", device="cpu"))
    train_autoencoder(recipe, Options(tmp_path, device="cpu"))
    first = bits(tmp_path)
    assert train_autoencoder(recipe, Options(tmp_path, start="resume", device="cpu")).finished
    other = stage_one(data, steps=3, seed=1)
    train_autoencoder(other, Options(tmp_path, start="fresh", device="cpu"))
    assert [row["step"] for row in log(tmp_path)] == [3]
    assert bits(tmp_path)["log"] != first["log"]


def test_changes_of_the_recipe_are_said_or_refused(data: Path, tmp_path: Path) -> None:
    train_autoencoder(stage_one(data), Options(tmp_path, device="cpu", max_steps=2))
    said: list[str] = []
    changed = stage_one(data, batch_size=6)
    train_autoencoder(changed, Options(tmp_path, device="cpu", max_steps=1, say=said.append))
    assert "the recipe has changed since: batch_size: 4 -> 6" in said
    wider = stage_one(data, autoencoder={"name": "kl", "block_out_channels": [64, 64]})
    with pytest.raises(ConfigError, match=r"trained with other parts .*block_out_channels.*--fresh"):
        train_autoencoder(wider, Options(tmp_path, device="cpu"))


def test_a_folder_of_the_other_stage_is_refused(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    train_autoencoder(stage_one(data, steps=1), Options(tmp_path, device="cpu"))
    with pytest.raises(ConfigError, match="of a run of AutoencoderRecipe, not DiffusionRecipe"):
        train_diffusion(stage_two(data, autoencoder), Options(tmp_path, device="cpu"))


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_kept(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(99))
    plain = losses.autoencoder_loss

    def breaks(*args: Any, **options: Any) -> Any:
        pixel, kl, made, posterior = plain(*args, **options)
        return pixel * (float("nan") if next(calls) == 5 else 1), kl, made, posterior

    monkeypatch.setattr("ldmkit.training.autoencoder.autoencoder_loss", breaks)
    with pytest.raises(NumericalError, match=r"loss became nan by step 6"):
        train_autoencoder(stage_one(data), Options(tmp_path, device="cpu"))
    assert states.find(tmp_path / "checkpoints")[-1].name == "step-00000004"


# -------------------------------------------------------------------------------------------------------- errors before work


def test_an_unwritable_folder_is_refused_first(tmp_path: Path, data: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = stage_one(data, data={"npz": "absent.npz", "size": 16})  # worse is to come, later
    with pytest.raises(OutputError, match="cannot write to"):
        train_autoencoder(recipe, Options(tmp_path / "file" / "out", device="cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixed_precision": "fp16"}, "'fp16' needs a GPU"),
        ({"data": {"npz": "squares.npz", "size": 15}}, "height 15 is not a multiple of the autoencoder's 2"),
        ({"autoencoder": {"name": "kl", "latent_chanels": 2}}, "did you mean 'latent_channels'"),
    ],
)
def test_stage_one_mistakes(data: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_autoencoder(stage_one(data, **changes), Options(tmp_path, device="cpu"), base=data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preview": {"inputs": []}}, "preview.inputs is empty"),
        ({"preview": {"inputs": [9]}}, "9"),
        ({"schedule": {"rescale_betas_zero_snr": True}}, "starts at zero signal"),
        ({"denoiser": {**UNET, "cross_attention_dim": None}}, "would ignore tokens_BLC"),
        ({"denoiser": {**UNET, "out_channels": 4}}, "denoiser predicts 4 channels"),
        ({"conditioner": {"name": "bert", "vocab": "absent.txt"}}, "conditioner.vocab: .*absent.txt is not a file"),
    ],
)
def test_stage_two_mistakes(data: Path, autoencoder: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        train_diffusion(stage_two(data, autoencoder, **changes), Options(tmp_path, device="cpu"), base=data)


def test_an_unknown_device(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device = 'tpu'"):
        train_autoencoder(stage_one(data), Options(tmp_path, device="tpu"))


# ----------------------------------------------------------------------------------------------------------- what a step is fed


def test_guidance_dropout_replaces_the_given_share(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    """The count of dropped conditions is within five standard deviations of the binomial's mean; 0 drops none and 1 all."""
    found = {}
    for rate in (0.0, 0.1, 1.0):
        recipe = stage_two(data, autoencoder, guidance_dropout=rate, batch_size=50)
        stage = DiffusionStage(recipe, data, Options(tmp_path), torch.device("cpu"))
        inputs = [value for step in range(40) for value in stage.batch(step, Share(0, 1))[3] or []]
        found[rate] = sum(value == 4 for value in inputs)
        assert len(inputs) == 2000
    assert (found[0.0], found[1.0]) == (0, 2000)
    assert abs(found[0.1] - 200) <= 5 * (2000 * 0.1 * 0.9) ** 0.5


def test_shifted_times_are_as_often_noisy_as_the_recipe_says(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    """Half of them are above s / (1 + s), within five standard deviations; the largest shifts end at the last time."""
    drawn = {}
    for shift in (0.5, 1.0, 3.0, 1e18):
        recipe = stage_two(data, autoencoder, time_shift=shift, batch_size=50)
        stage = DiffusionStage(recipe, data, Options(tmp_path), torch.device("cpu"))
        drawn[shift] = torch.cat([stage.batch(step, Share(0, 1))[2] for step in range(40)])
    for shift in (0.5, 1.0, 3.0):
        noisy = int((drawn[shift] >= 1000 * shift / (1 + shift)).sum())
        assert abs(noisy - 1000) <= 5 * 500**0.5
    assert drawn[1e18].unique().tolist() == [999]


def test_conditions_go_with_their_pictures(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    recipe = stage_two(data, autoencoder, guidance_dropout=0.0, seed=3)
    stage = DiffusionStage(recipe, data, Options(tmp_path), torch.device("cpu"))
    x0, _, t, inputs, _ = stage.batch(5, Share(0, 1))
    indices = Order(3, 24, 4)(5)
    assert inputs == squares()[1][indices].tolist()
    cache = encode_all(stage.autoencoder, stage.pictures, folder=tmp_path, dtype=torch.float16, device=torch.device("cpu"))
    assert torch.equal(x0, cache.sample(indices, torch.from_numpy(normal(3, Draw.POSTERIOR, 5, (4, 3, 8, 8)))))
    assert t.dtype == torch.int64
    assert bool(((t >= 0) & (t < 1000)).all())


def test_processes_take_slices_of_the_same_step(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    stage = DiffusionStage(stage_two(data, autoencoder), data, Options(tmp_path), torch.device("cpu"))
    whole, halves = stage.batch(2, Share(0, 1)), [stage.batch(2, Share(rank, 2)) for rank in range(2)]
    for i in range(3):
        assert torch.equal(torch.cat([half[i] for half in halves]), whole[i])
    assert [*(halves[0][3] or []), *(halves[1][3] or [])] == whole[3]
