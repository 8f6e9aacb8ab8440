"""The gallery: plugins of every kind, each a distribution of its own, installed by pip and used by name."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ldmkit
import ldmkit.plugin.registry as module
from ldmkit import (
    CheckpointError,
    Condition,
    ConfigError,
    DataError,
    FlowSchedule,
    InputError,
    Level,
    Pipeline,
    PluginError,
    UnknownPartError,
)
from ldmkit.kernels import backends, geglu, third_party
from ldmkit.plugin.manager import Plugin, discover
from ldmkit.plugin.registry import Registry
from ldmkit.plugin.spec import EXTENSIONS, CheckpointFormat
from ldmkit.testing import conformance
from ldmkit.training import DiffusionRecipe, Options, train_diffusion
from ldmkit.training.data import StoredPictures, open_pictures
from ldmkit.training.recipes import DataConfig
from tests.plugin.wheels import install, wheel_of

GALLERY = Path(__file__).resolve().parent.parent / "example_plugins"
PROJECTS = sorted(path.parent.name for path in GALLERY.glob("*/pyproject.toml"))
OFFERED = {
    ("denoiser", "example-dit"),
    ("sampler", "example-midpoint"),
    ("sampler", "renoise"),
    ("autoencoder", "example-tiny"),
    ("conditioner", "example-bytes"),
    ("pipeline", "example-digits"),
}

EXTRAS = {
    "task": "variations",
    "checkpoint-format": "zipped",
    "training-loss": "pseudo-huber",
    "data-source": "discs",
    "guidance-method": "rising",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that pip installed all of them into."""
    folder = tmp_path_factory.mktemp("wheels")
    return install(tmp_path_factory.mktemp("gallery"), *(wheel_of(GALLERY / name, folder) for name in PROJECTS))


@pytest.fixture(scope="module", autouse=True)
def installed(site) -> Iterator[None]:
    """They are installed in this process, too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        invalidate_caches()
        patch.setattr(module, "_registry", Registry(discover()))
        patch.setattr(backends, "_implementations", {op: dict(kept) for op, kept in backends._implementations.items()})
        third_party.discover.cache_clear()
        yield
    third_party.discover.cache_clear()
    for name in [name for name in sys.modules if name.startswith("ldmkit_example")]:
        del sys.modules[name]


def test_they_are_listed(site):
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-m", "ldmkit.cli", "plugins", "--json"]
    listed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=True, capture_output=True, text=True)
    ours = [plugin for plugin in json.loads(listed.stdout)["plugins"] if plugin["distribution"].startswith("ldmkit-example")]
    assert {plugin["entry_point"]: plugin["error"] for plugin in ours if plugin["state"] != "ok"} == {}
    assert len(ours) == len(PROJECTS)
    assert {(c["kind"], c["name"]) for plugin in ours for c in plugin["components"]} == OFFERED
    assert [kernel["backend"] for plugin in ours for kernel in plugin["kernels"]] == ["example-wide"]
    assert {e["kind"]: e["name"] for plugin in ours for e in plugin["extensions"]} == EXTRAS


@pytest.mark.parametrize(("kind", "name"), sorted(OFFERED - {("pipeline", "example-digits")}))
def test_each_is_built_by_name_with_a_strict_config(kind, name):
    part = ldmkit.build(kind, name)
    assert type(part.config).parse_json(part.config.to_json()) == part.config
    with pytest.raises(ConfigError, match="unknown key 'nonsense'"):
        ldmkit.build(kind, name, nonsense=1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("kind", "name"), sorted(OFFERED))
def test_each_passes_the_conformance_suite(kind, name):
    subject = conformance.pipeline(name) if kind == "pipeline" else conformance.subject(kind, name)
    report = conformance.check(subject, examples=3)
    assert report.passed, report.table()


@pytest.mark.exhaustive
def test_the_kernel_passes_the_contract():
    report = conformance.check(conformance.kernel("geglu", backend="example-wide"))
    assert report.passed, report.table()


# ------------------------------------------------------------------------------------------------------------------ the parts


def test_the_transformer_learns_digits(shared):
    """Forty steps of flow matching on MNIST, from a loss of predicting nothing."""
    pictures = np.load(shared / "data" / "mnist" / "train.npz")["x"][:2048]
    x0_BCHW = F.avg_pool2d(torch.from_numpy(pictures)[:, None].float() / 127.5 - 1, 2)  # 14 x 14
    draws = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dit = ldmkit.build("denoiser", "example-dit", in_channels=1, width=64, depth=2)
    optimizer = torch.optim.AdamW(dit.parameters(), lr=3e-3)

    def loss(chosen: torch.Tensor) -> torch.Tensor:
        noise = torch.randn(chosen.shape, generator=draws)
        s_B = torch.rand(len(chosen), generator=draws)
        x = (1 - s_B.view(-1, 1, 1, 1)) * chosen + s_B.view(-1, 1, 1, 1) * noise
        return F.mse_loss(dit(x, 1000 * s_B, Condition()), noise - chosen)

    with torch.no_grad():
        start = float(loss(x0_BCHW[-512:]))
    for step in range(40):
        optimizer.zero_grad()
        loss(x0_BCHW[32 * step : 32 * (step + 1)]).backward()
        optimizer.step()
    with torch.no_grad():
        end = float(loss(x0_BCHW[-512:]))
    assert start > 1  # the noise's own variance is 1
    assert end < start / 2


def test_the_transformer_is_told_by_its_tokens_but_not_by_what_is_masked():
    dit = ldmkit.build("denoiser", "example-dit", condition_size=8)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    draws = torch.Generator().manual_seed(0)
    x, t, tokens = torch.randn(2, 4, 6, 4, generator=draws), torch.tensor([3.0, 700.0]), torch.randn(2, 3, 8, generator=draws)
    told = dit(x, t, Condition(tokens_BLC=tokens))
    assert told.shape == x.shape
    assert not torch.allclose(told, dit(x, t, Condition(tokens_BLC=tokens.flip(0))), rtol=1e-2)
    padded = F.pad(tokens, (0, 0, 0, 2), value=5.0)
    mask = F.pad(torch.ones(2, 3, dtype=torch.bool), (0, 2))
    torch.testing.assert_close(dit(x, t, Condition(tokens_BLC=padded, mask_BL=mask)), told)
    with pytest.raises(InputError, match="needs tokens_BLC"):
        dit(x, t, Condition())
    with pytest.raises(ConfigError, match="width = 66 must be a multiple of 4"):
        ldmkit.build("denoiser", "example-dit", width=66)


def test_the_sampler_is_of_second_order():
    """On two points, +1 and -1, whose D is tanh(alpha x / sigma^2); on a Gaussian it happens to be of third."""
    sampler, schedule = ldmkit.build("sampler", "example-midpoint"), FlowSchedule()
    noise = torch.tensor([[[[0.3]]]], dtype=torch.float64)

    def posterior_mean(x: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.tanh(level.alpha * x / level.sigma**2)

    def half_way(steps: int) -> float:
        state = sampler.init(noise, sampler.levels(schedule, steps)[: steps // 2 + 1])
        while not state.done:
            state = sampler.step(posterior_mean, state, None)
        return float(state.x)

    exact = half_way(1024)
    assert np.log2((half_way(32) - exact) / (half_way(64) - exact)) == pytest.approx(2, abs=0.1)


def test_the_conditioner_takes_any_text_and_masks_what_is_padded():
    bytes_ = ldmkit.build("conditioner", "example-bytes", hidden_size=8, max_bytes=6)
    condition = bytes_(["a", "", "né🙂"[:2]])
    assert condition.tokens_BLC.shape == (3, 4, 8)
    assert condition.mask_BL.tolist() == [[True, True, False, False], [True, False, False, False], [True, True, True, True]]
    torch.testing.assert_close(condition.tokens_BLC[:1, :2], bytes_(["a"]).tokens_BLC)
    assert not condition.tokens_BLC[~condition.mask_BL].any()
    with pytest.raises(InputError, match="a text of 7 bytes is longer than max_bytes = 6"):
        bytes_(["seventh"])


def test_the_kernel_runs_where_it_is_named_and_is_as_exact_as_can_be():
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = x.detach().double().requires_grad_()
    value, gate = exact.chunk(2, dim=-1)
    want = value * F.gelu(gate)
    got = geglu(x, backend="example-wide")
    torch.testing.assert_close(got, want.float(), rtol=torch.finfo(torch.float32).eps, atol=0)
    for made, expected in zip(torch.autograd.grad(got.sum(), x), torch.autograd.grad(want.sum(), exact), strict=True):
        torch.testing.assert_close(made, expected.float(), rtol=torch.finfo(torch.float32).eps, atol=1e-12)


# --------------------------------------------------------------------------------------------------------------- the pipeline


def test_the_pipeline_bundles_them(tmp_path):
    before = torch.random.get_rng_state()
    pipe = Pipeline.from_pretrained("example-digits")
    assert torch.equal(torch.random.get_rng_state(), before)
    drawn = [p(["seven", "a three"], seed=1, output_type="pt", progress=False).images for p in (pipe, pipe)]
    assert drawn[0].shape == (2, 1, 28, 28)
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0], pipe(["four", "nine"], seed=1, output_type="pt", progress=False).images)
    saved = pipe.save_pretrained(tmp_path / "digits")
    makers = [json.loads((saved / kind / "part.json").read_text())["distribution"] for kind in pipe.modules]
    assert makers == ["ldmkit-example-tiny", "ldmkit-example-dit", "ldmkit-example-bytes"]
    again = Pipeline.from_pretrained(saved)
    assert torch.equal(again(["seven", "a three"], seed=1, output_type="pt", progress=False).images, drawn[0])


# ----------------------------------------------------------------------------------------------------------------- extensions


@pytest.fixture(scope="module")
def digits(installed) -> Pipeline:
    return Pipeline.from_pretrained("example-digits")


def test_a_task_runs_by_name(digits):
    image = torch.full((1, 1, 28, 28), 0.5)
    options = {"prompt": "a three", "seed": 2, "output_type": "pt", "progress": False}
    made = digits.run_task("variations", image, count=3, strength=0.5, **options).images
    assert made.shape == (3, 1, 28, 28)
    assert torch.equal(made, digits(image=image, strength=0.5, num_images_per_prompt=3, **options).images)
    with pytest.raises(UnknownPartError, match=r"no task is called 'variation'; did you mean 'variations'\?"):
        digits.run_task("variation", image)
    with pytest.raises(InputError, match="a task is loaded, not built"):
        ldmkit.build("task", "variations")


def test_a_checkpoint_format_is_recognised_and_read(digits, tmp_path, monkeypatch):
    folder = digits.save_pretrained(tmp_path / "digits")
    file = Path(shutil.make_archive(str(tmp_path / "model"), "zip", folder))
    draw = {"seed": 1, "output_type": "pt", "progress": False}
    wanted = digits("two", **draw).images
    assert torch.equal(Pipeline.from_pretrained(file)("two", **draw).images, wanted)
    monkeypatch.chdir(tmp_path)
    assert torch.equal(Pipeline.from_pretrained("model.zip")("two", **draw).images, wanted)
    small = Pipeline.from_pretrained(file, dtype=torch.bfloat16, sampler="euler")
    assert (small.dtype, type(small.sampler).__module__) == (torch.bfloat16, "ldmkit_samplers.euler")
    assert torch.equal(Pipeline.from_single_file(file)("two", **draw).images, wanted)
    with pytest.raises(InputError, match=r"model\.zip is read by a plugin's checkpoint format"):
        Pipeline.from_single_file(file, ema=True)
    (tmp_path / "other.bin").write_bytes(b"something else")
    with pytest.raises(CheckpointError, match=r"other\.bin is not a folder, and no plugin's checkpoint format recognises it"):
        Pipeline.from_pretrained(tmp_path / "other.bin")
    zipped = ldmkit.part_class("checkpoint-format", "zipped")
    monkeypatch.setattr(zipped, "detect", staticmethod(lambda path: 7))
    with pytest.raises(PluginError, match=r"'zipped' answered 7 for .* it must be from 0 to 1, or None"):
        Pipeline.from_pretrained(file)


def test_two_formats_as_sure_are_an_error(tmp_path, monkeypatch):
    rows = [CheckpointFormat(name=name, target="both:Both") for name in ("one", "two")]
    plugins = [Plugin(entry_point=row.name, module="both", distribution=row.name, extensions=(row,)) for row in rows]
    monkeypatch.setattr(module, "_registry", Registry(plugins))
    both = SimpleNamespace(detect=lambda path: 0.5, load=lambda path: {})
    monkeypatch.setitem(sys.modules, "both", SimpleNamespace(Both=both))
    with pytest.raises(CheckpointError, match=r"formats 'one' and 'two' are equally sure \(0\.5\)"):
        Pipeline.from_pretrained(tmp_path)


def test_a_guidance_method_takes_the_place_of_classifier_free(digits):
    draw = {"seed": 1, "output_type": "latent", "progress": False, "guidance_scale": 3.0}
    ordinary, level = (
        digits("two", **draw).images,
        digits("two", guidance_method={"name": "rising", "power": 0.0}, **draw).images,
    )
    torch.testing.assert_close(level, ordinary)
    rising = digits("two", guidance_method="rising", **draw).images
    assert not torch.allclose(rising, ordinary)
    with pytest.raises(InputError, match="guidance_method takes the place of classifier-free guidance"):
        digits("two", guidance_method="rising", guidance_rescale=0.5, **draw)
    with pytest.raises(ConfigError, match="unknown key 'powr'"):
        digits("two", guidance_method={"name": "rising", "powr": 1.0}, **draw)


def test_a_loss_and_a_data_source_train(tmp_path):
    """A recipe that names both; the pseudo-Huber loss is the squared error where delta is large."""
    ldmkit.save_part(ldmkit.build("autoencoder", "example-tiny"), tmp_path / "autoencoder")
    recipe = {
        "data": {"source": {"name": "discs", "count": 8}, "size": 16},
        "autoencoder": "autoencoder",
        "denoiser": {"name": "example-dit", "condition_size": 8},
        "conditioner": {"name": "example-bytes", "hidden_size": 8},
        "batch_size": 4,
        "steps": 2,
        "log_every": 1,
        "mixed_precision": "no",
    }

    def train(name: str, **more: object) -> dict[str, torch.Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            train_diffusion(
                DiffusionRecipe.parse(recipe | more), Options(out=tmp_path / name, device="cpu", progress=False), base=tmp_path
            )
        return Pipeline.from_pretrained(tmp_path / name / "pipeline").denoiser.state_dict()

    def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
        return max(float((one[key] - other[key]).abs().max()) for key in one)

    squared = train("squared")
    near, far = (train(name, loss={"name": "pseudo-huber", "delta": delta}) for name, delta in (("near", 100.0), ("far", 0.01)))
    assert apart(squared, near) < apart(squared, far)
    with pytest.raises(ConfigError, match="unknown key 'delt'"):
        train("wrong", loss={"name": "pseudo-huber", "delt": 1.0})
    with pytest.raises(ConfigError, match="exactly one of npz, folder, dataset, source; got npz, source"):
        train("both", data=recipe["data"] | {"npz": "x.npz"})


def made_of(*shape: int, conditions: list[str] | None = None) -> StoredPictures:
    return StoredPictures(np.zeros(shape, np.uint8), conditions)


@pytest.mark.parametrize(
    ("pictures", "told"),
    [
        ([], "must open ldmkit.training.data.Pictures"),
        (made_of(0, 16, 16, 3), "at least one"),
        (made_of(2, 8, 16, 3), "must read uint8 (1, 16, 16, 3), and read uint8 (1, 8, 16, 3)"),
        (made_of(2, 16, 16, 3, conditions=["a"]), "one condition for each of its 2 pictures"),
    ],
)
def test_a_source_that_breaks_its_word_is_an_error(monkeypatch, tmp_path, pictures, told):
    monkeypatch.setattr(ldmkit.part_class("data-source", "discs"), "open", lambda *_, **__: pictures)
    config = DataConfig(source={"name": "discs"}, size=16)
    with pytest.raises(DataError, match=re.escape(told)):
        open_pictures(config, tmp_path, channels=3, conditioned=True)


WRONG = {
    "task": ("number = 3", "lacks __call__"),
    "checkpoint-format": ("class number: detect = print", "lacks load, which a checkpoint-format must have"),
    "training-loss": ("class number: Config = 3", "must be a class with __call__ and a nested class Config"),
    "data-source": ("import ldmkit\nclass number:\n class Config(ldmkit.Config): ...", "must be a class with open"),
    "guidance-method": ("def number(): ...", "must be a class with __call__"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_target_that_is_not_what_its_hook_demands(kind, tmp_path, monkeypatch):
    source, told = WRONG[kind]
    name = f"wrong_target_{kind.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (cls,) = (cls for cls in EXTENSIONS.values() if cls.kind == kind)
    row = cls(name="wrong", target=f"{name}:number")
    plugin = Plugin(entry_point="wrong", module="m", distribution="wrong", extensions=(row,))
    with pytest.raises(PluginError, match=re.escape(told)):
        Registry([plugin]).load(kind, "wrong")
