"""What an interactive session shows of a pipeline and of what it gives: lines, not pages of numbers."""

from __future__ import annotations

from pathlib import Path

from tests.conditions import tiny_pipeline


def test_a_line_or_two_of_each(tmp_path: Path) -> None:
    pipe = tiny_pipeline(tmp_path, sampler={"name": "ddim", "eta": 0.5}, schedule={"timestep_spacing": "trailing"})
    output = pipe("a pear", seed=1, return_trajectory=True)
    assert repr(pipe) == (
        "Pipeline(KLAutoencoder, UNet, BertConditioner, DDIMSampler(eta=0.5), NoiseSchedule(timestep_spacing='trailing'), "
        "predicts epsilon; float32 on cpu)"
    )
    assert repr(output).startswith(
        "PipelineOutput(images=[RGB 32x32], seed=1, state=RunState(state=SamplerState(x=float32(1, 4, 16"
    )
    assert "step=4, denoised=float32(1, 4, 16, 16)" in repr(output.state)
    assert output.trajectory is not None
    assert "sampler=DDIMSampler(eta=0.5), guided=<partial>" in repr(output.trajectory)
    assert ": 5], sampler=" in repr(output.trajectory)
    assert repr(output.trajectory.states[1].laws[0]).startswith("Transition(mean=float32(1, 4, 16, 16), std=0.")
    assert pipe.conditioner is not None
    assert repr(pipe.conditioner(["a"])) == "Condition(tokens_BLC=float32(1, 12, 32), mask_BL=bool(1, 12))"
    assert all(len(repr(shown)) < 2500 for shown in (output, output.state, output.trajectory))
