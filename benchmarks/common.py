"""What all benchmarks share: interleaved timing, medians with quartiles, ratios pair by pair, the machine's record, JSON."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Run = Callable[[], object]
Times = Mapping[str, Sequence[float]]
"""Seconds a call took, by what ran, one entry per round."""


# ------------------------------------------------------------------------------------------------------------------- measuring


def interleave(
    runs: Mapping[str, Run], *, rounds: int, least_seconds: float = 0.0, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time several runs in turn, A B A B ..., so that a machine that drifts drifts under all of them alike.

    Every run is called first, untimed, to warm up.

    Args:
        rounds: samples of each run.
        least_seconds: a sample repeats its call until it lasts about this long.

    Returns:
        seconds per call, by run; entries of one index were taken side by side.
    """
    calls = {}
    for name, run in runs.items():
        run()
        calls[name] = math.ceil(least_seconds / _seconds_per_call(run, 1, clock)) if least_seconds else 1
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(_seconds_per_call(run, calls[name], clock))
    return times


def _seconds_per_call(run: Run, calls: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


@dataclasses.dataclass(frozen=True)
class Spread:
    """The middle and the quartiles of some samples."""

    median: float
    low: float
    high: float
    count: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Quartiles are interpolated between samples; one sample is its own quartiles."""
        low, median, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [*samples] * 3
        return cls(median, low, high, len(samples))

    def text(self, digits: int = 2, factor: float = 1.0) -> str:
        """For tables: median [low, high]."""
        median, low, high = (f"{value * factor:.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} [{low}, {high}]"


def ratio(times: Times, peer: str, ours: str) -> Spread:
    """How many times as long the peer takes as ours, pair by pair: above 1, ours is faster."""
    return Spread.of([a / b for a, b in zip(times[peer], times[ours], strict=True)])


def difference(times: Times, whole: str, part: str) -> Spread:
    """Seconds by which one run is longer than another, pair by pair."""
    return Spread.of([a - b for a, b in zip(times[whole], times[part], strict=True)])


def geometric_mean(values: Iterable[float]) -> float:
    """Of ratios; the mean that does not depend on which side is the denominator."""
    return statistics.geometric_mean(values)


def over_cases(cases: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The ratios' medians over some cases, by peer: how many cases have it, their geometric mean, and the least."""
    peers = dict.fromkeys(peer for case in cases for peer in case["ratios"])
    medians = {peer: [case["ratios"][peer].median for case in cases if peer in case["ratios"]] for peer in peers}
    return {
        "cases": {peer: len(ratios) for peer, ratios in medians.items()},
        "geometric_mean": {peer: geometric_mean(ratios) for peer, ratios in medians.items()},
        "least": {peer: min(ratios) for peer, ratios in medians.items()},
    }


def judge(times: Times, chosen: str, rivals: Sequence[str]) -> str:
    """Was the automatic choice right? "right" or "wrong" where the quartiles of the pairs agree, "even" where they do not."""
    ratios = [ratio(times, peer=other, ours=chosen) for other in rivals if other != chosen]
    if any(rival.high < 1 for rival in ratios):
        return "wrong"
    return "right" if all(rival.low >= 1 for rival in ratios) else "even"


def no_compiler(device: str = "cpu") -> str | None:
    """Why torch.compile cannot serve here (it needs a C++ compiler, or Triton); None where it can."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


# ----------------------------------------------------------------------------------------------------------------- command line


QUICK = {"rounds": 2, "least_seconds": 0.0}


@dataclasses.dataclass(frozen=True)
class Options:
    """What every benchmark can be told."""

    quick: bool
    threads: int
    folder: Path

    @property
    def timing(self) -> dict[str, Any]:
        """Arguments for `interleave`, which follow from `quick`."""
        return QUICK if self.quick else {"rounds": 15, "least_seconds": 0.05}

    @property
    def timing_of_many(self) -> dict[str, Any]:
        """The same for a script with dozens of cases."""
        return QUICK if self.quick else {"rounds": 9, "least_seconds": 0.02}


def parser(doc: str) -> argparse.ArgumentParser:
    """The options all benchmarks have; a script may add its own."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: to see that it runs, not to quote")
    made.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: as torch has it)")
    made.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="default: benchmarks/results, with --quick out/")
    return made


def options(arguments: argparse.Namespace) -> Options:
    """Parsed arguments => options; sets the number of torch's threads."""
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = arguments.output or (ROOT / "out" if arguments.quick else RESULTS)
    return Options(quick=arguments.quick, threads=torch.get_num_threads(), folder=folder)


# -------------------------------------------------------------------------------------------------------------------- reporting


def environment(peers: Sequence[str] = ()) -> dict[str, Any]:
    """The machine and the versions. `load` is the load average of the last minute, before measuring: 0 on a quiet machine."""
    packages = ("ldmkit", "torch", *peers)
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), flags=re.M) if cpuinfo.exists() else None
    return found[1].strip() if found else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit measured, with "-dirty" where files differ from it; None outside a git checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def machine_name(record: Mapping[str, Any]) -> str:
    """A file name's part that tells runs apart: CPU, instruction set, threads."""
    words = f"{record['cpu']} {record['instructions']} {record['threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def report(
    name: str,
    doc: str,
    chosen: Options,
    record: Mapping[str, Any],
    *,
    cases: Sequence[Mapping[str, Any]],
    summary: Mapping[str, Any],
    timing: Mapping[str, Any] | None = None,
) -> Path:
    """Write `<name>-<machine>.json` (whole or not at all) and say where. `record` was taken before measuring; `timing` is given
    where it was not that of `chosen`.
    """
    result = {
        "benchmark": name,
        "claim": doc.strip().splitlines()[0],
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": chosen.quick,
        "timing": chosen.timing if timing is None else timing,
        "environment": record,
        "cases": cases,
        "summary": summary,
    }
    path = chosen.folder / f"{name}-{machine_name(record)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps(result, indent=1, default=dataclasses.asdict, allow_nan=False) + "\n")
    unfinished.replace(path)
    print(f"\nwritten: {path}")
    return path


def print_table(record: Mapping[str, Any], head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The machine in one line, then the rows, in columns."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    print(f"{record['cpu']}, {record['instructions']}, {record['threads']} of {record['cores']} cores; {versions}")
    print("median [quartiles]\n")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
