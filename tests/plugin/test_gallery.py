"""The gallery: plugins of every kind, each a distribution of its own, installed by pip and used by name."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import ldmkit
import ldmkit.plugin.registry as module
from ldmkit import Condition, ConfigError, FlowSchedule, InputError, Level, NoiseSchedule, Pipeline
from ldmkit.kernels import backends, geglu, third_party
from ldmkit.plugin.manager import discover
from ldmkit.plugin.registry import Registry
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


@pytest.mark.parametrize(("kind", "name"), sorted(OFFERED - {("pipeline", "example-digits")}))
def test_each_is_built_by_name_with_a_strict_config(kind, name):
    part = ldmkit.build(kind, name)
    assert type(part.config).parse_json(part.config.to_json()) == part.config
    with pytest.raises(ConfigError, match="unknown key 'nonsense'"):
        ldmkit.build(kind, name, nonsense=1)


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
    with pytest.raises(InputError, match=r"alpha \+ sigma = 1"):
        sampler.levels(NoiseSchedule(), 4)


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
