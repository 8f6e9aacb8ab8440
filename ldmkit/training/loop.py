"""The one training loop: steps, averages, logs, previews, checkpoints, resuming and stopping, for both stages."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from tqdm.auto import tqdm

from ldmkit.checkpoints.files import check_writable, write_json
from ldmkit.errors import ConfigError, NumericalError, OutputError
from ldmkit.training import state as states
from ldmkit.training.draws import Batches
from ldmkit.training.logs import Log, Meter
from ldmkit.training.optim import EMA, lr_factor, make_optimizer
from ldmkit.training.recipes import AdversarialConfig, Recipe
from ldmkit.training.stage import Share, Stage
from ldmkit.training.starting import Start, checkpoint_to_resume, make_accelerator


@dataclasses.dataclass(frozen=True)
class Options:
    """How this process runs a recipe: none of it changes what the run becomes.

    Attributes:
        out: the run's folder.
        start: "auto" resumes where the folder has a checkpoint, "resume" demands one, "fresh" deletes what is there.
        max_steps, max_minutes: stop after so many steps or minutes of this process, with a checkpoint and an export.
        device: "auto", "cpu" or "cuda".
        say: receives lines for the user.
        should_stop: asked after each step; True stops as `max_steps` does.
    """

    out: Path
    start: Start = "auto"
    max_steps: int | None = None
    max_minutes: float | None = None
    device: str = "auto"
    progress: bool = False
    say: Callable[[str], None] = lambda line: None
    should_stop: Callable[[], bool] = lambda: False


@dataclasses.dataclass(frozen=True)
class Result:
    """Where a run stands when its process ends: steps done, whether it is finished, and the exported folder."""

    step: int
    finished: bool
    exported: Path


def run(recipe: Recipe, options: Options, make_stage: Callable[[torch.device], Stage]) -> Result:
    """Train until the recipe's last step, or until told to stop.

    Args:
        make_stage: builds the stage; called with torch's random state seeded by the recipe. The caller's own is not touched.

    Raises:
        OutputError: where the folder cannot be written, before any work. ConfigError, DataError: from the recipe and its data.
        NumericalError: when a loss is NaN or infinite.
    """
    check_writable(options.out)
    resumed = checkpoint_to_resume(recipe, options.out, options.start, options.say)
    accelerator = make_accelerator(recipe, options.device)
    if recipe.batch_size % accelerator.num_processes:
        raise ConfigError(f"batch_size = {recipe.batch_size} is not a multiple of the {accelerator.num_processes} processes")
    cuda = [accelerator.device] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(recipe.seed)
        with accelerator.main_process_first():  # which encodes the data, if that is to be done, for all
            stage = make_stage(accelerator.device)
        torch.manual_seed(recipe.seed + accelerator.process_index)  # dropout differs between processes
        return _Run(recipe, options, accelerator, stage, resumed)()


class _Run:
    """One process's part of a run."""

    def __init__(self, recipe: Recipe, options: Options, accelerator: Any, stage: Stage, resumed: Path | None) -> None:
        self.recipe, self.options, self.accelerator, self.stage = recipe, options, accelerator, stage
        self.resumed = resumed
        self.device: torch.device = accelerator.device
        self.share = Share(accelerator.process_index, accelerator.num_processes)
        self.checkpoints = options.out / "checkpoints"
        for network in stage.networks.values():
            network.to(self.device)
            if recipe.channels_last:
                network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizers = {name: make_optimizer(stage.learning_rates(name), recipe.optimizer) for name in stage.objectives}
        self.ema = EMA({name: stage.networks[name] for name in stage.averaged}, recipe.ema)
        self.meter = Meter()
        self.step = 0

    def __call__(self) -> Result:
        self._prepare_folder()
        self._wrap()
        if self.resumed is not None:
            self._restore(self.resumed)
        log = Log(self.options.out, self.step) if self.accelerator.is_main_process else None
        try:
            self._train(log)
        finally:
            if log is not None:
                log.close()
        exported = self._export()
        return Result(self.step, self.step >= self.recipe.steps, exported)

    # ------------------------------------------------------------------------------------------------------------- the loop

    def _train(self, log: Log | None) -> None:
        recipe, first, began = self.recipe, self.step, time.monotonic()
        shown = self.options.progress and self.accelerator.is_main_process
        window_began, window_first = began, first
        with (
            tqdm(total=recipe.steps, initial=first, unit="step", disable=not shown, dynamic_ncols=True) as bar,
            Batches(lambda step: self.stage.batch(step, self.share)) as batches,
        ):
            while self.step < recipe.steps and not self._time_is_up(first, began):
                self._update(self.step, batches(self.step))
                self.step += 1
                bar.update()
                if self.step % recipe.log_every == 0:
                    now = time.monotonic()
                    speed = (self.step - window_first) * recipe.batch_size / max(now - window_began, 1e-9)
                    window_began, window_first = now, self.step
                    self._report(log, bar, speed)
                if self.step % recipe.sample_every == 0:
                    self._preview()
                if self.step % recipe.checkpoint_every == 0:
                    self._checkpoint()
        self._checkpoint()

    def _update(self, step: int, batch: Any) -> None:
        for name, loss, values in self.stage.losses(step, batch, self.device):
            optimizer, wrapped = self.optimizers[name], self.wrapped_optimizers[name]
            rate = self._base_lr(name) * lr_factor(self.recipe.optimizer, step, self.recipe.steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            self.accelerator.backward(loss)
            values = {name: value.detach() for name, value in values.items()}
            if self.recipe.gradient_clip is not None:
                self.accelerator.unscale_gradients(wrapped)
                parameters = [p for group in optimizer.param_groups for p in group["params"]]
                values[f"{name}_grad_norm"] = nn.utils.clip_grad_norm_(parameters, self.recipe.gradient_clip)
            wrapped.step()
            optimizer.zero_grad(set_to_none=True)
            self.meter.add(values)
        self.ema.update(step)

    def _base_lr(self, name: str) -> float:
        adversarial: AdversarialConfig | None = getattr(getattr(self.recipe, "loss", None), "adversarial", None)
        if name == "discriminator" and adversarial is not None and adversarial.lr is not None:
            return adversarial.lr
        return self.recipe.optimizer.lr

    def _time_is_up(self, first: int, began: float) -> bool:
        options = self.options
        stop = options.max_steps is not None and self.step - first >= options.max_steps
        late = options.max_minutes is not None and time.monotonic() - began >= 60 * options.max_minutes
        stop = stop or late or options.should_stop()
        if self.accelerator.num_processes > 1:  # all stop at the same step
            flag = torch.tensor([float(stop)], device=self.device)
            stop = bool(self.accelerator.gather(flag).sum() > 0)
        return stop

    def _report(self, log: Log | None, bar: Any, speed: float) -> None:
        means = self.meter.take()
        if self.accelerator.num_processes > 1:
            values = torch.tensor(list(means.values()), device=self.device)
            means = dict(zip(means, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True))
        _check_finite(means, self.step)
        means["lr"] = self.recipe.optimizer.lr * lr_factor(self.recipe.optimizer, self.step - 1, self.recipe.steps)
        if log is not None:
            log.write(self.step, {**means, "images_per_second": round(speed, 2)})
        bar.set_postfix_str(f"loss {means['loss']:.4g}, {speed:.0f} images/s", refresh=False)

    # ------------------------------------------------------------------------------------------------- previews and exports

    @contextmanager
    def _averages(self) -> Iterator[None]:
        """The averages in place of the weights, evaluation mode, and no trace left in the random state or the modes."""
        modes = {module: module.training for network in self.stage.networks.values() for module in network.modules()}
        self.ema.swap()
        try:
            with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []), torch.no_grad():
                for network in self.stage.networks.values():
                    network.eval()
                yield
        finally:
            self.ema.swap()
            for module, mode in modes.items():
                module.training = mode

    def _preview(self) -> None:
        if self.accelerator.is_main_process:
            samples = self.options.out / "samples"
            with self._averages():
                check_writable(samples)
                try:
                    self.stage.preview(samples / f"step-{self.step:08d}.png", self.device)
                except OSError as error:
                    raise OutputError(f"cannot write previews to {samples}: {error}") from error
        self.accelerator.wait_for_everyone()

    def _export(self) -> Path:
        folder = self.options.out
        if self.accelerator.is_main_process:
            with self._averages():
                folder = self.stage.export(self.options.out, self.device)
            self.options.say(f"exported to {folder}")
        self.accelerator.wait_for_everyone()
        return folder

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def _checkpoint(self) -> None:
        _check_finite({name: total for name, (total, _) in self.meter.peek().items()}, self.step)
        rng = {f"cpu.{self.share.rank}": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng[f"cuda.{self.share.rank}"] = torch.cuda.get_rng_state(self.device)
        meters = {str(self.share.rank): self.meter.peek()}
        if self.accelerator.num_processes > 1:
            from accelerate.utils import gather_object

            rng = dict(gather_object(list(rng.items())))
            meters = dict(gather_object(list(meters.items())))
        if self.accelerator.is_main_process:
            from ldmkit import __version__

            scaler = self.accelerator.scaler
            extra = {
                "ldmkit_version": __version__,
                "torch_version": torch.__version__,
                "recipe_kind": type(self.recipe).__name__,
                "processes": self.accelerator.num_processes,
                "scaler": None if scaler is None else scaler.state_dict(),
                "meters": meters,
                "recipe": self.recipe.to_dict(),
            }
            states.write(self.checkpoints, self.step, self._state(), rng, extra, keep=self.recipe.keep)
        self.accelerator.wait_for_everyone()

    def _state(self) -> states.TrainingState:
        return states.TrainingState(self.stage.networks, self.ema.averages, self.optimizers)

    def _prepare_folder(self) -> None:
        """Clear away what a killed writer left and, for a new run, all of an old one."""
        out, say, resumed = self.options.out, self.options.say, self.resumed
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            states.sweep(self.checkpoints)
            if resumed is None:
                for name in ("checkpoints", "samples", "tensorboard"):
                    shutil.rmtree(out / name, ignore_errors=True)
                (out / "log.jsonl").unlink(missing_ok=True)
            check_writable(self.checkpoints)
            write_json(out / "recipe.json", self.recipe.to_dict())
        self.accelerator.wait_for_everyone()
        say(f"starting in {out}" if resumed is None else f"resuming from {resumed}; --fresh would start over")

    def _wrap(self) -> None:
        self.wrapped_optimizers = {name: self.accelerator.prepare(o) for name, o in self.optimizers.items()}
        for name, objective in list(self.stage.objectives.items()):
            wrapped = self.accelerator.prepare(objective)
            self.stage.objectives[name] = cast(nn.Module, torch.compile(wrapped)) if self.recipe.compile else wrapped

    def _restore(self, folder: Path) -> None:
        info = states.read_info(folder)
        if info["processes"] != self.accelerator.num_processes:
            self.options.say(f"{info['processes']} processes before, {self.accelerator.num_processes} now: bits will differ")
        rng = states.read(folder, self._state())
        rank = self.share.rank
        if f"cpu.{rank}" in rng:
            torch.set_rng_state(rng[f"cpu.{rank}"])
        if f"cuda.{rank}" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng[f"cuda.{rank}"], self.device)
        if str(rank) in info["meters"]:
            self.meter.restore({k: (float(t), int(n)) for k, (t, n) in info["meters"][str(rank)].items()}, self.device)
        if info["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(info["scaler"])
        self.step = info["step"]


def _check_finite(values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        if "grad_norm" not in name and not math.isfinite(value):  # a skipped fp16 step may have an infinite gradient
            raise NumericalError(
                f"{name} became {value} by step {step}; lower optimizer.lr, warm up longer, use mixed_precision bf16 or no, "
                "and resume from the last checkpoint, which is from before"
            )
