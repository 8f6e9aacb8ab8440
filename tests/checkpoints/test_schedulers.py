"""diffusers' scheduler configs read as ours and written again: the same settings, or an error that says what differs."""

import importlib
import json
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import NoiseSchedule, Prediction, Sampler, build
from ldmkit.checkpoints.scheduler_classes import CLASSES, UNSERVED
from ldmkit.checkpoints.schedulers import read_scheduler, write_scheduler
from ldmkit.continuous import make_schedule
from ldmkit.errors import ConfigError
from tests.peers import in_float64
from tests.smooth import Draws, run_ours, run_peer, smooth

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in diffusers, with numpy 2

CLIPPING = ("DDPMScheduler", "DDPMParallelScheduler", "DDIMScheduler", "DDIMParallelScheduler", "DDIMInverseScheduler")
SERVED: dict[str, dict[str, Any]] = {name: {"clip_sample": False} for name in CLIPPING}
"""Without these, diffusers' own defaults ask for what only pixel models use."""
NEED_TORCHSDE = {"DPMSolverSDEScheduler": "scheduling_dpmsolver_sde"}
"""Classes in modules that import it; here it stands in with no motion at all."""


@pytest.fixture(autouse=True, scope="module")
def _still_torchsde() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        still = types.SimpleNamespace(BrownianInterval=lambda size, **_: lambda t0, t1: torch.zeros(size))
        patch.setitem(sys.modules, "torchsde", still)
        yield


def peer_class(name: str) -> Any:
    module = NEED_TORCHSDE.get(name)
    return getattr(importlib.import_module(f"diffusers.schedulers.{module}") if module else diffusers, name)


def made(values: dict[str, Any]) -> Sampler:
    rest = dict(values)
    sampler: Sampler = build("sampler", rest.pop("name"), **rest)
    return sampler


@pytest.mark.parametrize("model", ["sd14", "sd15", "sd21-base", "sdxl-base"])
def test_published_configs(shared: Path, model: str) -> None:
    values = json.loads((shared / f"data/checkpoints/{model}/scheduler/scheduler_config.json").read_text())
    read = read_scheduler(values)
    assert read["prediction"] == {"type": "epsilon"}
    assert read["sampler"]["name"] == ("euler" if model == "sdxl-base" else "plms")
    assert NoiseSchedule.Config.parse(read["schedule"]).to_dict() == {
        **NoiseSchedule.Config().to_dict(),
        "set_alpha_to_one": model == "sdxl-base",  # not a setting of Euler's, whatever the file says
    }


@pytest.mark.parametrize("name", sorted(name for name in dir(diffusers.schedulers) if name.endswith("Scheduler")))
def test_every_class_of_diffusers_is_served_or_refused_for_a_reason(name: str) -> None:
    """And our defaults for what a file leaves out are theirs."""
    if name in UNSERVED:
        assert name not in CLASSES
        with pytest.raises(ConfigError, match=f"'{name}' is not supported .*{re.escape(UNSERVED[name])}.*; known are DDPM"):
            read_scheduler({"_class_name": name})
        return
    peer = peer_class(name)(**SERVED.get(name, {}))
    full = json.loads(peer.to_json_string())
    read = read_scheduler(full)
    assert read == read_scheduler({"_class_name": name, **SERVED.get(name, {})})
    made(read["sampler"])
    schedule = make_schedule(read["schedule"])
    Prediction.Config.parse(read["prediction"])
    if isinstance(schedule, NoiseSchedule):
        assert float(peer.betas[-1]) == pytest.approx(schedule.betas[-1])


RUNS: list[tuple[str, dict[str, Any]]] = [
    ("DDPMScheduler", {"variance_type": "fixed_large"}),
    ("DDPMParallelScheduler", {}),
    ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIMParallelScheduler", {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("PNDMScheduler", {}),
    ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    ("EulerDiscreteScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "leading"}),
    ("EulerDiscreteScheduler", {"use_beta_sigmas": True, "timestep_spacing": "trailing"}),
    ("EulerAncestralDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
    ("HeunDiscreteScheduler", {"use_beta_sigmas": True}),
    ("KDPM2DiscreteScheduler", {"use_exponential_sigmas": True}),
    ("KDPM2AncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverSDEScheduler", {}),
    ("DPMSolverSDEScheduler", {"use_karras_sigmas": True, "prediction_type": "v_prediction", "timestep_spacing": "leading"}),
    ("DPMSolverSinglestepScheduler", {}),
    ("DPMSolverSinglestepScheduler", {"solver_order": 3, "use_karras_sigmas": True, "solver_type": "heun"}),
    (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "lower_order_final": True},
    ),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"use_exponential_sigmas": True, "timestep_spacing": "leading", "steps_offset": 1}),
    ("DPMSolverMultistepScheduler", {"use_beta_sigmas": True, "timestep_spacing": "trailing", "euler_at_final": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True, "solver_type": "heun"}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "deis", "solver_type": "logrho", "final_sigmas_type": "sigma_min"}),
    ("DPMSolverMultistepScheduler", {"lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 1, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun", "final_sigmas_type": "sigma_min"}),
    ("DEISMultistepScheduler", {"solver_order": 3, "use_karras_sigmas": True, "solver_type": "midpoint"}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "use_exponential_sigmas": True, "solver_type": "midpoint"}),
    ("LCMScheduler", {}),
    ("TCDScheduler", {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
    ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
    ("FlowMatchLCMScheduler", {"shift": 2.0}),
    ("EDMEulerScheduler", {}),
    ("EDMEulerScheduler", {"sigma_schedule": "exponential", "sigma_max": 20.0}),
    ("EDMDPMSolverMultistepScheduler", {"rho": 5.0, "sigma_data": 1.0}),
    ("EDMDPMSolverMultistepScheduler", {"solver_order": 3, "sigma_schedule": "exponential"}),
    ("EDMDPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}),
]
"""DDIMInverseScheduler starts from an image; tests/plugins/test_samplers_family.py runs it."""


def still(x: torch.Tensor, t: Any) -> torch.Tensor:
    """A network that does not look at t: diffusers rounds the times of these rules, which ours does not."""
    return smooth(x, 0)


@pytest.mark.parametrize("n", [5, 20])
@pytest.mark.parametrize(("name", "changes"), RUNS)
def test_a_config_draws_what_it_does_in_diffusers(name: str, changes: dict[str, Any], n: int) -> None:
    config = {"_class_name": name, "beta_schedule": "scaled_linear", **SERVED.get(name, {}), **changes}
    read = read_scheduler(config)
    rounded = name.startswith(("DPMSolverM", "DPMSolverSi", "DEIS", "UniPC")) and any("use_" in key for key in changes)
    network = still if rounded else smooth
    peers = peer_class(name)
    options: dict[str, Any] = {"s_noise": 0.0} if name == "DPMSolverSDEScheduler" else {}
    scale = config.get("sigma_max", 80.0) if name == "EDMEulerScheduler" else None  # the paper's
    with in_float64(peers):
        peer = peers.from_config({key: value for key, value in config.items() if key != "_class_name"})
        theirs = run_peer(peer, n, Draws(1), network, scale=scale, **options)
    sampler = made({**read["sampler"], **options})
    ours = run_ours(
        sampler,
        make_schedule(read["schedule"]),
        Prediction(Prediction.Config.parse(read["prediction"])),
        n,
        Draws(1),
        network,
    )
    assert float((ours - theirs).abs().max()) <= 1e-9 * float(theirs.std())


SHARED_SETTINGS = {"DDPMParallelScheduler", "DDIMParallelScheduler"}
"""Read as the classes they are variants of, and written as these."""


def write(sampler: Sampler, name: str, schedule: dict[str, Any], prediction: dict[str, Any]) -> dict[str, Any]:
    return write_scheduler(name, sampler.config.to_dict(), type(sampler.config)().to_dict(), schedule, prediction)


@given(name=st.sampled_from(sorted(name for name in CLASSES if CLASSES[name].kind == "ddpm")), data=st.data())
def test_written_and_read_again(name: str, data: st.DataObject) -> None:
    """Ours -> diffusers' file -> their scheduler -> their file -> ours."""
    plain, reads = read_scheduler({"_class_name": name, **SERVED.get(name, {})}), CLASSES[name].reads
    schedule = {
        "beta_schedule": data.draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "num_train_timesteps": data.draw(st.sampled_from([100, 1000])),
        "steps_offset": data.draw(st.sampled_from([0, 1])) if "steps_offset" in reads else 0,
        "timestep_spacing": data.draw(st.sampled_from(["leading", "trailing", "linspace"])),
        "set_alpha_to_one": plain["schedule"]["set_alpha_to_one"],
    }
    if "timestep_spacing" not in reads:
        schedule["timestep_spacing"] = plain["schedule"]["timestep_spacing"]
    kind = data.draw(st.sampled_from(CLASSES[name].only.get("prediction_type", ("epsilon", "v_prediction"))))
    sampler = dict(plain["sampler"])
    if "use_karras_sigmas" in reads:
        sampler["sigma_schedule"] = data.draw(st.sampled_from([None, "karras", "exponential", "beta-sigmas"]))
    part = made(sampler)
    whole = NoiseSchedule.Config.parse(schedule).to_dict()
    written = write(part, sampler["name"], whole, {"type": kind})
    assert written["_class_name"] == name or name in SHARED_SETTINGS
    peer = peer_class(written["_class_name"]).from_config(written)
    read = read_scheduler(json.loads(peer.to_json_string()))
    assert NoiseSchedule.Config.parse(read["schedule"]).to_dict() == whole
    assert read["prediction"] == {"type": kind}
    again = made(read["sampler"]).config.to_dict()
    assert {**again, "timestep_spacing": None} == {**part.config.to_dict(), "timestep_spacing": None}


@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "dpm-singlestep", "order": 1, "final_sigmas_type": "sigma_min"},
        {"name": "dpm-singlestep", "order": 3, "timestep_spacing": "linspace", "algorithm_type": "dpmsolver"},
        {"name": "dpm++-3m", "solver_type": "heun"},
        {"name": "dpm++-2m-sde", "sigma_schedule": "karras"},
        {"name": "pndm"},
        {"name": "deis", "order": 3},
    ],
)
def test_samplers_that_share_a_class_are_told_apart(sampler: dict[str, Any]) -> None:
    sampler = {**sampler, **({"final_sigmas_type": "sigma_min"} if sampler.get("algorithm_type") == "dpmsolver" else {})}
    part = made(sampler)
    written = write(part, sampler["name"], NoiseSchedule.Config(timestep_spacing="leading").to_dict(), {"type": "epsilon"})
    peer = getattr(diffusers, written["_class_name"]).from_config(written)
    read = read_scheduler(json.loads(peer.to_json_string()))["sampler"]
    assert read["name"] == sampler["name"]
    assert {**made(read).config.to_dict(), "timestep_spacing": sampler.get("timestep_spacing")} == part.config.to_dict()


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
@pytest.mark.parametrize("rule", ["karras", "exponential"])
def test_edm_is_written_and_read_again(name: str, rule: str) -> None:
    values = {"_class_name": name, "sigma_max": 20.0, "sigma_data": 1.0, "sigma_schedule": rule}
    read = read_scheduler(values)
    part = made(read["sampler"])
    written = write(part, read["sampler"]["name"], read["schedule"], read["prediction"])
    assert written.items() >= values.items()
    assert read_scheduler(json.loads(getattr(diffusers, name).from_config(written).to_json_string())) == read


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the scheduler None is not supported; known are DDPM"),
        ({"_class_name": []}, r"the scheduler \[\] is not supported; known are DDPM"),
        ({"_class_name": "FineScheduler"}, "'FineScheduler' is not supported; known are DDPM"),
        ({"_class_name": "DDIMScheduler"}, r"clip_sample = True \(only False can be served\)"),
        ({"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1]}, r"trained_betas = \[0.1\]"),
        ({"_class_name": "EulerDiscreteScheduler", "shiny": 3}, r"unknown key 'shiny' \(= 3\)"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow"}, "prediction_type = 'flow'"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 4}, "solver_order = 4"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
            r"solver_order = 3 of sde-dpmsolver\+\+ \(only 2",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_type": ["x"]}, r"solver_type = \['x'\]"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas = True"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "lower_order_final": False},
            "lower_order_final = False",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "final_sigmas_type": "sigma_min", "euler_at_final": True},
            "euler_at_final = True",
        ),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "final_sigmas_type": "sigma_min"},
            "lower_order_final = False with final_sigmas_type 'sigma_min'",
        ),
        ({"_class_name": "DPMSolverSDEScheduler", "noise_sampler_seed": 3}, "noise_sampler_seed = 3"),
        ({"_class_name": "DEISMultistepScheduler", "solver_type": "shiny"}, "solver_type = 'shiny'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting = True"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_karras_sigmas": True}, "use_karras_sigmas = True"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "prediction_type = 'v_prediction'"),
        ({"_class_name": "EDMEulerScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
    ],
)
def test_what_cannot_be_served_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scheduler(values)


def test_what_diffusers_cannot_express_is_named() -> None:
    schedule = NoiseSchedule.Config().to_dict()
    with pytest.raises(ConfigError, match=r"no scheduler for the sampler 'restart' .*; assign one of ddpm"):
        write_scheduler("restart", {}, {}, schedule, {"type": "epsilon"})
    with pytest.raises(
        ConfigError, match=r"sampler 'ddim': timestep_spacing 'quadratic'; eta = 0.5; prediction \{'type': 'flow'\}"
    ):
        write_scheduler("ddim", {"eta": 0.5}, {"eta": 0.0}, {**schedule, "timestep_spacing": "quadratic"}, {"type": "flow"})
    with pytest.raises(ConfigError, match="sigma_schedule = 'ays-sd15'"):
        write_scheduler("euler", {"sigma_schedule": "ays-sd15"}, {}, schedule, {"type": "epsilon"})
    with pytest.raises(ConfigError, match="cannot run its flow-matching schedulers"):
        write_scheduler("euler", {}, {}, {"kind": "flow"}, {"type": "flow"})
    with pytest.raises(ConfigError, match="'ddim' with a schedule of the kind 'edm'; assign one of euler"):
        write_scheduler("ddim", {}, {}, {"kind": "edm"}, {"type": "edm"})
    with pytest.raises(ConfigError, match="schedule timestep_spacing = 'leading'"):
        write_scheduler("dpm-singlestep", {"order": 2}, {"order": 2}, schedule, {"type": "epsilon"})
    with pytest.raises(ConfigError, match="algorithm_type 'dpmsolver' with final_sigmas_type 'zero'"):
        write(build("sampler", "dpm-singlestep", algorithm_type="dpmsolver"), "dpm-singlestep", schedule, {"type": "epsilon"})
