"""diffusers' scheduler configs read as ours and written again: the same settings, or an error that says what differs."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import NoiseSchedule, Sampler, build
from ldmkit.checkpoints.schedulers import CLASSES, read_scheduler, write_scheduler
from ldmkit.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning")  # in diffusers, with numpy 2

SERVED = {
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True},
}
"""Without these, diffusers' own defaults ask for what only pixel models use."""


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


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_reads_what_diffusers_writes(name: str) -> None:
    """And our defaults for what a file leaves out are theirs."""
    peer = getattr(diffusers, name)(**SERVED.get(name, {}))
    full = json.loads(peer.to_json_string())
    read = read_scheduler(full)
    assert read == read_scheduler({"_class_name": name, **SERVED.get(name, {})})
    made(read["sampler"])
    assert float(peer.betas[-1]) == pytest.approx(NoiseSchedule(NoiseSchedule.Config.parse(read["schedule"])).betas[-1])


@given(name=st.sampled_from(sorted(CLASSES)), data=st.data())
def test_written_and_read_again(name: str, data: st.DataObject) -> None:
    """Ours -> diffusers' file -> their scheduler -> their file -> ours."""
    schedule = {
        "beta_schedule": data.draw(st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"])),
        "num_train_timesteps": data.draw(st.sampled_from([100, 1000])),
        "steps_offset": data.draw(st.sampled_from([0, 1])),
        "timestep_spacing": data.draw(st.sampled_from(["leading", "trailing", "linspace"])),
        "set_alpha_to_one": read_scheduler({"_class_name": name, **SERVED.get(name, {})})["schedule"]["set_alpha_to_one"],
    }
    kind = data.draw(st.sampled_from(["epsilon", "v_prediction"]))
    sampler = dict(read_scheduler({"_class_name": name, **SERVED.get(name, {})})["sampler"])
    if "use_karras_sigmas" in CLASSES[name].reads and data.draw(st.booleans()):
        sampler["sigma_schedule"] = "karras"
    part = made(sampler)
    whole = NoiseSchedule.Config.parse(schedule).to_dict()
    defaults = type(part.config)().to_dict()
    written = write_scheduler(sampler["name"], part.config.to_dict(), defaults, whole, {"type": kind})
    peer = getattr(diffusers, written["_class_name"]).from_config(written)
    read = read_scheduler(json.loads(peer.to_json_string()))
    assert NoiseSchedule.Config.parse(read["schedule"]).to_dict() == whole
    assert read["prediction"] == {"type": kind}
    again = made(read["sampler"]).config.to_dict()
    assert {**again, "timestep_spacing": None} == {**part.config.to_dict(), "timestep_spacing": None}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "the scheduler None is not supported"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler"},
            "'FlowMatchEulerDiscreteScheduler' is not supported; known are DDPM",
        ),
        ({"_class_name": "DDIMScheduler"}, r"clip_sample = True \(only False can be served\)"),
        ({"_class_name": "PNDMScheduler"}, "skip_prk_steps = False"),
        ({"_class_name": "EulerDiscreteScheduler", "trained_betas": [0.1]}, r"trained_betas = \[0.1\]"),
        ({"_class_name": "EulerDiscreteScheduler", "shiny": 3}, r"unknown key 'shiny' \(= 3\)"),
        ({"_class_name": "EulerDiscreteScheduler", "beta_schedule": "sigmoid"}, "beta_schedule = 'sigmoid'"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow"}, "prediction_type = 'flow'"),
        ({"_class_name": "EulerDiscreteScheduler", "final_sigmas_type": "sigma_min"}, "final_sigmas_type = 'sigma_min'"),
        ({"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "karras and beta"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "solver_order = 3"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "algorithm_type = 'dpmsolver'"),
        ({"_class_name": "DEISMultistepScheduler", "solver_type": "bh1"}, "solver_type = 'bh1'"),
    ],
)
def test_what_cannot_be_served_is_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_scheduler(values)


def test_what_diffusers_cannot_express_is_named() -> None:
    schedule = NoiseSchedule.Config().to_dict()
    with pytest.raises(ConfigError, match="no scheduler for the sampler 'restart'; assign one of ddpm"):
        write_scheduler("restart", {}, {}, schedule, {"type": "epsilon"})
    with pytest.raises(
        ConfigError, match=r"sampler 'ddim': timestep_spacing 'quadratic'; eta = 0.5; prediction \{'type': 'flow'\}"
    ):
        write_scheduler("ddim", {"eta": 0.5}, {"eta": 0.0}, {**schedule, "timestep_spacing": "quadratic"}, {"type": "flow"})
    with pytest.raises(ConfigError, match="sigma_schedule = 'ays-sd15'"):
        write_scheduler("euler", {"sigma_schedule": "ays-sd15"}, {}, schedule, {"type": "epsilon"})
    with pytest.raises(ConfigError, match="a schedule that has no betas"):
        write_scheduler("euler", {}, {}, {"kind": "flow"}, {"type": "epsilon"})
