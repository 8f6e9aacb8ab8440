"""Recipes: strict, named errors, YAML as people write it, overrides."""

from pathlib import Path

import pytest

from ldmkit.errors import ConfigError
from ldmkit.training import AutoencoderRecipe, DiffusionRecipe, load_recipe
from ldmkit.training.recipe_files import differences

RECIPE = """
autoencoder: {name: kl}
data: {npz: x.npz, size: 16}
batch_size: 4
steps: 8
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_numbers_and_words_are_read_as_written(tmp_path: Path) -> None:
    recipe = load_recipe(
        AutoencoderRecipe,
        write(tmp_path, RECIPE + "mixed_precision: no\noptimizer: {lr: 1e-4, eps: 1E-7}\nchannels_last: true"),
    )
    assert (recipe.mixed_precision, recipe.optimizer.lr, recipe.optimizer.eps) == ("no", 1e-4, 1e-7)
    assert recipe.channels_last is True
    assert (recipe.data.height_width, recipe.steps) == ((16, 16), 8)


def test_a_recipe_round_trips(tmp_path: Path) -> None:
    text = RECIPE.replace("{npz: x.npz, size: 16}", "{folder: pictures, size: [16, 32], fit: exact}")
    recipe = load_recipe(AutoencoderRecipe, write(tmp_path, text + "loss: {adversarial: {start: 5}, kl_weight: 1e-5}\n"))
    assert recipe.data.height_width == (16, 32)
    assert AutoencoderRecipe.parse_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("stepz: 3", "unknown key 'stepz' (= 3); did you mean 'steps'"),
        ("optimizer: {learning_rate: 1e-4}", "unknown key 'optimizer.learning_rate'"),
        ("optimizer: {warmup_step: 1}", "did you mean 'warmup_steps'"),
        ("optimizer: {warmup_steps: 9}", "optimizer.warmup_steps = 9 is above steps = 8"),
        ("optimizer: {betas: [0.9, 1.0]}", "each must be at least 0 and below 1"),
        ("mixed_precision: bf17", "mixed_precision = 'bf17'"),
        ("seed: -1", "seed = -1"),
        ("log_every: 0", "log_every = 0"),
        ("keep: two", "keep = 'two'"),
        ("loss: {perceptual: {weight: 1.0}}", "key 'loss.perceptual.weights' is required"),
        ("steps: 9", "the key 'steps' is given twice"),
        ("a: [", "not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(AutoencoderRecipe, write(tmp_path, RECIPE + line + "\n"))
    assert message in str(error.value)
    assert "recipe.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("{size: 16}", "exactly one of npz, folder, dataset, source; got none"),
        ("{npz: a, folder: b, size: 16}", "got npz, folder"),
        ("{npz: a, size: 0}", "data.size"),
        ("{npz: a}", "key 'data.size' is required"),
    ],
)
def test_data_mistakes(tmp_path: Path, values: str, message: str) -> None:
    with pytest.raises(ConfigError, match=r"recipe\.yaml") as error:
        load_recipe(AutoencoderRecipe, write(tmp_path, RECIPE.replace("{npz: x.npz, size: 16}", values)))
    assert message in str(error.value)


def test_a_part_needs_a_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'name' is missing"):
        load_recipe(AutoencoderRecipe, write(tmp_path, RECIPE.replace("{name: kl}", "{latent_channels: 4}")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("data: {npz: x.npz, size: 16, flip: true}", "data.flip and cache_latents exclude one another"),
        ("freeze_conditioner: true", "need a conditioner"),
        ("guidance_dropout: 1.5", "guidance_dropout = 1.5"),
        ("weighting: {name: min_sn}", "'uniform' or 'min_snr'"),
        ("prediction: {type: eps}", "prediction.type = 'eps'"),
        ("schedule: {beta_begin: 0.1}", "did you mean 'beta_end'"),
    ],
)
def test_diffusion_mistakes(tmp_path: Path, line: str, message: str) -> None:
    text = RECIPE.replace("autoencoder: {name: kl}", "autoencoder: runs/ae\ndenoiser: {name: unet}")
    if line.startswith("data"):
        text = text.replace("data: {npz: x.npz, size: 16}\n", "")
    with pytest.raises(ConfigError) as error:
        load_recipe(DiffusionRecipe, write(tmp_path, text + line + "\n"))
    assert message in str(error.value)


def test_overrides(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    recipe = load_recipe(
        AutoencoderRecipe, path, ["optimizer.lr=1e-5", "data.flip=true", "autoencoder.latent_channels=8", "steps=3"]
    )
    assert (recipe.optimizer.lr, recipe.data.flip, recipe.steps) == (1e-5, True, 3)
    assert recipe.autoencoder == {"name": "kl", "latent_channels": 8}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "key=value"),
        ("=3", "key=value"),
        ("steps.more=3", "has no keys of its own"),
        ("optimizer.lrr=3.0", "did you mean 'lr'"),
        ("steps=[", "not valid YAML"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_recipe(AutoencoderRecipe, write(tmp_path, RECIPE), [override])
    assert message in str(error.value)


def test_a_missing_recipe_and_one_that_is_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the recipe"):
        load_recipe(AutoencoderRecipe, tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_recipe(AutoencoderRecipe, write(tmp_path, "- 1\n- 2\n"))


def test_differences() -> None:
    old = {"a": 1, "b": {"c": 2, "d": 3}, "e": None}
    new = {"a": 1, "b": {"c": 5, "d": 3}, "e": {"f": 1}}
    assert differences(old, new) == {"b.c": (2, 5), "e": (None, {"f": 1})}
    assert differences(old, old) == {}
