"""The family of deterministic and ancestral samplers: against diffusers, step by step on a smooth network, in float64."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldmkit import NoiseSchedule, Prediction, build
from tests.peers import in_float64, scheduler
from tests.smooth import Draws, run_ours, run_peer, smooth

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in diffusers, with numpy 2

NOT_COMPARED = {
    ("plms, pndm", "n not dividing T, or linspace"): "diffusers goes from t to t - T // n, which is not the next time there",
    (
        "pndm",
        "T / n odd",
    ): "diffusers' middle of the times is one for x, and the next one for the network",
    ("pndm", "under 4 steps"): "diffusers' times for its Runge-Kutta part are then not those of the run",
    ("dpm-singlestep", "leading, trailing"): "diffusers has its own times only, those of linspace",
    ("dpm-singlestep", "dpmsolver onto the clean image"): "diffusers refuses; ours is DDIM's step",
    (
        "ddim-inverse",
        "v_prediction, sample",
    ): "diffusers reads the output, made for one level, as one at the level below",
    ("dpm++-2m, deis, unipc", "karras"): "diffusers rounds the fractional times that it tells the network",
    ("plms, pndm", "v_prediction"): "diffusers averages raw outputs, made at different x; PNDM averages the noise",
    ("dpm-2, dpm-2-ancestral", "sample"): "not in diffusers",
    ("unipc", "bh1 onto the clean image"): "diffusers multiplies infinity by zero",
    ("all", "zero terminal SNR"): "diffusers replaces the last alpha-bar by a small number; ours starts at 0",
}
"""Settings in which the peer differs, and why."""


CASES = {
    "plms": ({}, {}),
    "pndm": ({}, {}),
    "dpm-singlestep": (
        {
            "order": st.integers(1, 3),
            "algorithm_type": st.sampled_from(["dpmsolver++", "dpmsolver"]),
            "solver_type": st.sampled_from(["midpoint", "heun"]),
            "final_sigmas_type": st.sampled_from(["zero", "sigma_min"]),
        },
        {},
    ),
    "heun": ({}, {}),
    "dpm-2": ({}, {}),
    "dpm-2-ancestral": ({}, {}),
    "lms": ({}, {}),
    "dpm++-2m": (
        {"solver_type": st.sampled_from(["midpoint", "heun"]), "final_sigmas_type": st.sampled_from(["zero", "sigma_min"])},
        {"algorithm_type": "dpmsolver++"},
    ),
    "dpm++-3m": (
        {"solver_type": st.sampled_from(["midpoint", "heun"]), "final_sigmas_type": st.sampled_from(["zero", "sigma_min"])},
        {"algorithm_type": "dpmsolver++", "solver_order": 3},
    ),
    "dpm++-2m-sde": (
        {"solver_type": st.sampled_from(["midpoint", "heun"]), "final_sigmas_type": st.just("zero")},
        {"algorithm_type": "sde-dpmsolver++"},
    ),
    "lcm": ({"original_inference_steps": st.sampled_from([25, 50])}, {}),
    "tcd": ({"original_inference_steps": st.sampled_from([25, 50])}, {}),
    "deis": ({"order": st.integers(1, 3)}, {}),
    "unipc": ({"order": st.integers(1, 3), "solver_type": st.sampled_from(["bh1", "bh2"])}, {}),
}
"""What is drawn of our config, and what the peer is told besides."""
KINDS = {
    "plms": ["epsilon"],
    "pndm": ["epsilon"],
    "dpm-2": ["epsilon", "v_prediction"],
    "dpm-2-ancestral": ["epsilon", "v_prediction"],
}
SPACINGS = {"plms": ["leading"], "pndm": ["leading"], "dpm-singlestep": ["linspace"]}
STEPS = {"pndm": [4, 5, 10, 20, 25], "dpm-singlestep": [1, 2, 3, 4, 5, 6, 7, 10, 20, 25]}
PEERS_NAME = {(name, "order"): "solver_order" for name in ("deis", "dpm-singlestep", "unipc")}


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
def test_latents_are_those_of_diffusers(name, data):
    drawn, told = CASES[name]
    config = {key: data.draw(strategy, key) for key, strategy in drawn.items()}
    if config.get("algorithm_type") == "dpmsolver":
        config["final_sigmas_type"] = "sigma_min"
    n = data.draw(st.sampled_from(STEPS.get(name, [2, 4, 5, 10, 20, 25])), "steps")
    spacing = data.draw(st.sampled_from(SPACINGS.get(name, ["leading", "trailing", "linspace"])), "spacing")
    betas = data.draw(st.sampled_from(["linear", "scaled_linear"]), "betas")
    kind = data.draw(st.sampled_from(KINDS.get(name, ["epsilon", "v_prediction", "sample"])), "prediction")
    karras = name in ("heun", "lms") and data.draw(st.booleans(), "karras")
    schedule = NoiseSchedule(NoiseSchedule.Config.parse({"timestep_spacing": spacing, "beta_schedule": betas}))
    sampler = build("sampler", name, **config, **({"sigma_schedule": "karras"} if karras else {}))
    if config.get("solver_type") == "bh1":
        sampler = build("sampler", name, **config, final_sigmas_type="sigma_min")
        config["final_sigmas_type"] = "sigma_min"
    options = {PEERS_NAME.get((name, key), key): value for key, value in config.items()} | told
    with in_float64():
        peer = scheduler(name, schedule.config, kind, **options, **({"use_karras_sigmas": True} if karras else {}))
        theirs = run_peer(peer, n, Draws(1))
    ours = run_ours(sampler, schedule, Prediction(Prediction.Config(type=kind)), n, Draws(1))
    assert float((ours - theirs).abs().max()) <= 1e-9 * float(theirs.std())


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("n", [4, 10, 25])
def test_ddim_inversion_is_that_of_diffusers(spacing, to_one, n):
    schedule = NoiseSchedule(NoiseSchedule.Config(timestep_spacing=spacing, set_alpha_to_one=to_one))
    sampler, image = build("sampler", "ddim-inverse"), Draws(1)()
    levels = sampler.levels(schedule, n)
    with in_float64():
        peer = scheduler("ddim-inverse", schedule.config, "epsilon")
        peer.set_timesteps(n)
        theirs = image
        for t in peer.timesteps:
            theirs = peer.step(smooth(theirs, t), t, theirs).prev_sample
    state, prediction = sampler.init(image, levels, start=image), Prediction()
    while not state.done:
        state = sampler.step(lambda x, level: prediction.to_x0(smooth(x, level.t), x, level), state, None)
    assert [level.t for level in levels[1:]] == peer.timesteps.tolist()
    assert float((state.x - theirs).abs().max()) <= 1e-9 * float(theirs.std())
