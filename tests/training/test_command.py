"""`ldmkit train`: arguments, exit codes, one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ldmkit.cli import main
from ldmkit.training import state as states
from tests.training.toy import autoencoder_values, diffusion_values


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(autoencoder_values(data)))
    return path


def test_a_run_stops_and_goes_on(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "autoencoder", str(recipe), "--max-steps", "3", "--device", "cpu"]) == 0
    out = recipe.parent / "runs" / "tiny"
    captured = capsys.readouterr()
    assert captured.out.strip() == f"stopped; run the same command to go on after step 3: {out / 'autoencoder'}"
    assert f"starting in {out}" in captured.err
    assert main(["train", "autoencoder", str(recipe), "--device", "cpu", "--resume", "--set", "keep=5"]) == 0
    captured = capsys.readouterr()
    assert captured.out.strip() == f"finished after step 8: {out / 'autoencoder'}"
    assert f"resuming from {out / 'checkpoints/step-00000003'}" in captured.err
    assert "keep: 2 -> 5" in captured.err
    assert [path.name for path in states.find(out / "checkpoints")] == ["step-00000003", "step-00000004", "step-00000008"]


def test_stage_two(data: Path, autoencoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(diffusion_values(data, autoencoder, steps=2)))
    assert main(["train", "diffusion", str(path), "--out", str(tmp_path / "out"), "--device", "cpu", "--fresh"]) == 0
    assert "finished after step 2" in capsys.readouterr().out
    assert (tmp_path / "out/pipeline/pipeline.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "stepz=3"], "unknown key 'stepz'"),
        (["--max-steps", "0"], "--max-steps 0: must be above 0"),
        (["--max-minutes", "-1"], "--max-minutes -1.0: must be above 0"),
        (["--resume"], "no checkpoint to resume"),
        (["--set", "data.npz=absent.npz"], "absent.npz is missing"),
        (["--set", "autoencoder.name=kk"], "no autoencoder is called 'kk'"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", "autoencoder", str(recipe), "--device", "cpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_resume_and_fresh_exclude_one_another(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "autoencoder", str(recipe), "--resume", "--fresh"])
    assert "not allowed with" in capsys.readouterr().err


def test_arguments_need_no_torch() -> None:
    code = "import sys; from ldmkit.commands import train; import argparse; train.add_arguments(argparse.ArgumentParser())"
    found = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "False"
