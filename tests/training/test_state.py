"""Training checkpoints: bit-exact, whole or absent, whatever stops the writer."""

import errno
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ldmkit.checkpoints.weights as weights_module
from ldmkit.errors import ArchitectureMismatchError, CheckpointError, OutputError
from ldmkit.training import state as states
from ldmkit.training.optim import EMA, make_optimizer
from ldmkit.training.recipes import EMAConfig, OptimizerConfig


def live(seed: int = 0, width: int = 3) -> states.TrainingState:
    """A little network that has taken two steps."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Conv2d(2, width, 3), nn.BatchNorm2d(width)).to(memory_format=torch.channels_last)
        optimizer = make_optimizer([(network, 1.0)], OptimizerConfig())
        ema = EMA({"network": network}, EMAConfig())
        for n in range(2):
            network(torch.randn(2, 2, 5, 5)).square().mean().backward()
            optimizer.step()
            ema.update(n)
    return states.TrainingState({"network": network}, ema.averages, {"main": optimizer})


def contents(state: states.TrainingState) -> dict[str, Tensor]:
    """Everything in it, by name."""
    (network,), (optimizer,) = state.modules.values(), state.optimizers.values()
    inner = {f"{i}.{k}": v for i, p in enumerate(network.parameters()) for k, v in optimizer.state[p].items()}
    return {**network.state_dict(), **state.averages, **inner}


def test_what_is_written_is_read_back_bit_for_bit(tmp_path: Path) -> None:
    written, read = live(seed=0), live(seed=1)
    rng = {"cpu.0": torch.get_rng_state()}
    folder = states.write(tmp_path, 12, written, rng, {"note": [1.5, "x"]}, keep=2)
    assert folder.name == "step-00000012"
    assert states.read_info(folder)["note"] == [1.5, "x"]
    assert torch.equal(states.read(folder, read)["cpu.0"], rng["cpu.0"])
    a, b = contents(written), contents(read)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].stride() == b[key].stride() for key in a)


def test_only_json_and_safetensors(tmp_path: Path) -> None:
    folder = states.write(tmp_path, 1, live(), {}, {}, keep=1)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_the_latest_few_are_kept(tmp_path: Path) -> None:
    for step in (5, 100, 20_000_000, 300_000_000):
        states.write(tmp_path, step, live(), {}, {}, keep=2)
    assert [path.name for path in states.find(tmp_path)] == ["step-20000000", "step-300000000"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-20000000", "step-300000000"]


def test_another_network_is_refused(tmp_path: Path) -> None:
    folder = states.write(tmp_path, 1, live(), {}, {}, keep=1)
    with pytest.raises(ArchitectureMismatchError, match=r"0.weight: file \(3, 2, 3, 3\), model \(4, 2, 3, 3\)"):
        states.read(folder, live(width=4))
    other = live()
    with pytest.raises(ArchitectureMismatchError, match="judge, network"):
        states.read(folder, states.TrainingState({"judge": other.modules["network"]}, other.averages, other.optimizers))


def test_parameters_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = states.write(tmp_path, 1, live(), {}, {}, keep=1)
    other = live()
    other.optimizers["main"].param_groups.reverse()
    with pytest.raises(ArchitectureMismatchError, match="groups parameters otherwise than the run did"):
        states.read(folder, other)


def test_damage_is_named(tmp_path: Path) -> None:
    folder = states.write(tmp_path, 1, live(), {}, {}, keep=1)
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"optimizer.safetensors is truncated"):
        states.read(folder, live())
    (folder / "state.json").write_text('{"format": 99, "step": 1}')
    with pytest.raises(CheckpointError, match="format 99"):
        states.read_info(folder)
    (folder / "state.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a training checkpoint's"):
        states.read_info(folder)


@pytest.mark.parametrize("failing", [0, 1, 2, 3], ids=["model", "ema", "optimizer", "rng"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    state = live()
    before = states.write(tmp_path, 1, state, {"cpu.0": torch.get_rng_state()}, {}, keep=1)
    calls = iter(range(99))
    write_bytes = weights_module.write_bytes

    def full(path: Path, data: bytes) -> None:
        if next(calls) == failing:
            with path.open("wb") as file:
                file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_bytes(path, data)

    monkeypatch.setattr(weights_module, "write_bytes", full)
    with pytest.raises(OutputError, match=r"step-00000002: No space left on device; what was there before is untouched"):
        states.write(tmp_path, 2, state, {"cpu.0": torch.get_rng_state()}, {}, keep=1)
    monkeypatch.undo()
    assert states.find(tmp_path) == [before]
    assert [path.name for path in tmp_path.iterdir()] == [before.name]
    states.read(before, live(seed=1))
    assert states.find(tmp_path)[-1] != states.write(tmp_path, 2, state, {}, {}, keep=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_writer_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Children write checkpoints, one after the other, until SIGKILL; what is found next is always whole and of one step."""
    state, rng = live(), random.Random(0)
    states.write(tmp_path, 0, _stamped(state, 0), _stamp(0), {}, keep=2)
    progressed = 0
    for _ in range(12):
        first = states.read_info(states.find(tmp_path)[-1])["step"] + 1
        child = os.fork()
        if child == 0:
            _write_for_ever(tmp_path, state, first)
        time.sleep(rng.uniform(0.005, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        states.sweep(tmp_path)
        assert all(path.name.startswith("step-") for path in tmp_path.iterdir())
        latest = states.find(tmp_path)[-1]
        step = states.read_info(latest)["step"]
        restored = live(seed=1)
        assert states.read(latest, restored)["cpu.0"].tolist() == _stamp(step)["cpu.0"].tolist()
        assert set(contents(restored)["network.0.bias"].tolist()) == {float(step)}
        progressed += step >= first
    assert progressed, "no child lived long enough to write anything"


def _stamp(step: int) -> dict[str, Tensor]:
    return {"cpu.0": torch.tensor(list(step.to_bytes(4)), dtype=torch.uint8)}


def _stamped(state: states.TrainingState, step: int) -> states.TrainingState:
    state.averages["network.0.bias"].fill_(step)
    return state


def _write_for_ever(folder: Path, state: states.TrainingState, step: int) -> Any:
    try:
        while True:
            states.write(folder, step, _stamped(state, step), _stamp(step), {}, keep=2)
            step += 1
    finally:
        os._exit(1)
