"""Two processes take the same steps as one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from ldmkit.training import Options, train_diffusion
from tests.training.toy import UNET, diffusion_values, stage_two

pytestmark = pytest.mark.exhaustive  # two processes that each import torch: half a minute on a busy machine


def losses(out: Path) -> np.ndarray:
    return np.array([json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()])


def test_two_processes_equal_one_up_to_rounding(data: Path, autoencoder: Path, tmp_path: Path) -> None:
    changes = {"denoiser": {**UNET, "dropout": 0.0}, "log_every": 1}  # dropout's masks differ between processes
    train_diffusion(stage_two(data, autoencoder, **changes), Options(tmp_path / "one", device="cpu"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(diffusion_values(data, autoencoder, **changes)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "ldmkit.cli", "train", "diffusion", str(tmp_path / "recipe.yaml"), "--device", "cpu"]
    for pieces in (["--max-steps", "5"], []):
        processes = []
        for rank in range(2):
            where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env = {**os.environ, **{key: str(value) for key, value in where.items()}, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen([*command, "--out", str(tmp_path / "two"), *pieces], env=env))
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == len(two) == 8
    # Each step adds the rounding of a mean of means, in the loss and through the weights.
    steps = np.arange(1, 9)
    assert (np.abs(one - two) <= 4 * np.finfo(np.float32).eps * steps * one.max()).all()
