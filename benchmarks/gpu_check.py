"""Everything that takes a GPU, in one command: build, tests, the contract, the sanitizer, benchmarks; a short table last.

A step that fails is shown, makes the exit code 1, and stops nothing that comes after it. Steps that passed are not run again
until a source file changes (--fresh runs all; the build always runs), so that a lease that ends too early can go on where it
stopped; --minutes ends one in time. Logs and state are in out/gpu-check, figures in benchmarks/results/gpu (with --quick in
out/gpu); all of it is written after every step, to --archive too, which unpacked in a fresh checkout goes on there.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from benchmarks.common import RESULTS, ROOT

FOLDER = ROOT / "out" / "gpu-check"
PASSED, FAILED, TIMED_OUT, SKIPPED, KEPT, LATE = "passed", "failed", "timed out", "skipped", "passed before", "no time left"
OPS = ("geglu", "group_norm_silu", "geglu_linear", "cross_attention")
TOOLS = ("memcheck", "synccheck", "racecheck", "initcheck")
TINY = """
import sys
from ldmkit.testing import contract
report = contract.check(sys.argv[1], backend="cuda", only=[14], tiny=True)
print(report.table())
sys.exit(not report.passed)
"""
"""The contract's named sizes, small ones alone: a sanitizer slows kernels a hundredfold."""
TAIL = 15
"""Lines of a failed step's log that are shown."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A command. `skip` says why it cannot run here; `always`: though it passed before.

    `proof` is what the last line must have in it: tests that were all skipped prove nothing.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    skip: str | None = None
    always: bool = False
    proof: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a step ended, and the last line that it printed."""

    name: str
    verdict: str
    seconds: float
    last: str

    @property
    def bad(self) -> bool:
        return self.verdict in (FAILED, TIMED_OUT, LATE)


# ------------------------------------------------------------------------------------------------------------------- the steps


def steps(*, quick: bool) -> list[Step]:
    """All of them, in the order of what they are worth. Each is small: a fault of the device spoils the rest of its process."""
    python, hurry = sys.executable, ["--quick"] if quick else []
    pytest = [python, "-m", "pytest", "-q", *workers()]
    kernel_tests = sorted(path.relative_to(ROOT) for path in (ROOT / "tests" / "kernels").glob("test_*triton*.py"))
    return [
        Step(
            "build", [python, "setup.py", *registration(), "build_ext", "--inplace"], 400, {"LDMKIT_BUILD": "cuda"}, always=True
        ),
        *(Step(f"verify cuda {op}", [*verify(op), "cuda"], 200) for op in OPS),
        *(Step(f"verify triton {op}", [*verify(op), "triton"], 400) for op in OPS),
        Step("tests that need a GPU", [*pytest, "-m", "gpu and not exhaustive", "tests/kernels"], 300, proof=" passed"),
        *(Step(f"tests: {path.stem}", [*pytest, str(path)], 400, proof=" passed") for path in kernel_tests),
        *(
            Step(f"benchmark: {' '.join(call)}", [python, "-m", f"benchmarks.{call[0]}", *call[1:], *hurry], 400)
            for call in benchmarks()
        ),
        *(sanitized(tool, op, quick=quick) for tool in TOOLS for op in OPS),
    ]


def verify(op: str) -> list[str]:
    """The command that checks an op against the contract, but for its backend."""
    return [sys.executable, "-m", "ldmkit.cli", "verify", op, "--backend"]


def sanitized(tool: str, op: str, *, quick: bool) -> Step:
    """An op's CUDA kernels under a tool of compute-sanitizer."""
    sanitizer = shutil.which("compute-sanitizer")
    # torch's own kernels are left alone, but for initcheck, which must see who writes.
    command = [sanitizer or "compute-sanitizer", "--tool", tool, "--error-exitcode", "1"]
    command += [] if tool == "initcheck" else ["--kernel-name", "kns=ldmkit"]
    called = [sys.executable, "-c", TINY, op] if quick else [*verify(op), "cuda", "--only", "14", "--only", "11"]
    return Step(
        f"sanitizer: {tool} {op}",
        [*command, *called],
        120 if quick else 580,
        {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that out of bounds of a tensor is out of bounds of an allocation
        skip=None if sanitizer else "compute-sanitizer is not on PATH",
    )


def workers() -> list[str]:
    """pytest's option for several processes, where it has one: most of the time is the compiling of Triton's kernels."""
    return ["-n", str(min(8, os.cpu_count() or 1))] if importlib.util.find_spec("xdist") else []


def registration() -> list[str]:
    """What setup.py is told beside, in a checkout that is not installed: its plugins are found by the metadata this writes."""
    try:
        importlib.metadata.version("ldmkit")
    except importlib.metadata.PackageNotFoundError:
        return ["egg_info"]
    return []


def benchmarks() -> list[list[str]]:
    """Module and options of those in benchmarks/gpu, and of those beside it that have an option for a GPU."""
    folder = ROOT / "benchmarks"
    found = [[f"gpu.{path.stem}"] for path in sorted((folder / "gpu").glob("*.py")) if path.stem not in ("__init__", "timing")]
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        for option, arguments in (('"--gpu"', ["--gpu"]), ('"--device"', ["--device", "cuda"])):
            if f"add_argument({option}" in text:
                found.append([path.stem, *arguments])
    return found


# --------------------------------------------------------------------------------------------------------------------- running


def run(step: Step, log: Path) -> Outcome:
    """Runs a step to its end or its limit; its output goes to the log."""
    if step.skip is not None:
        return Outcome(step.name, SKIPPED, 0.0, step.skip)
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "plugins"), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environment}
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with log.open("w") as out:
        try:
            code = _exit_code(step, environment, out)
        except OSError as error:
            out.write(str(error))
            code = 127
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    verdict = TIMED_OUT if code is None else PASSED if code == 0 and step.proof in last else FAILED
    return Outcome(step.name, verdict, time.monotonic() - start, last)


def _exit_code(step: Step, environment: dict[str, str], out: TextIO) -> int | None:
    """None past the limit. What the command started ends with it: a process left behind would keep the device busy."""
    process = subprocess.Popen(
        step.command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        return process.wait(step.seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(
    chosen: Sequence[Step],
    state: Path,
    key: str,
    budget: float = math.inf,
    note: Callable[[Sequence[Outcome]], None] = lambda outcomes: None,
) -> list[Outcome]:
    """Runs what has not passed before under this key, for `budget` seconds. The state is written after every step, which
    `note` is told.
    """
    end = time.monotonic() + budget
    known = json.loads(state.read_text()) if state.exists() else {}
    passed: dict[str, str] = known.get("passed", {}) if known.get("key") == key else {}
    outcomes: list[Outcome] = []
    for step in chosen:
        if step.name in passed and not step.always:
            outcome = Outcome(step.name, KEPT, 0.0, passed[step.name])
        elif (left := end - time.monotonic()) <= 0:
            outcome = Outcome(step.name, LATE, 0.0, "run the same command again to go on")
        else:
            print(f"--- {step.name}", flush=True)
            log = state.parent / f"{re.sub(r'[^a-z0-9]+', '-', step.name.lower())}.log"
            outcome = run(dataclasses.replace(step, seconds=min(step.seconds, left)), log)
            if outcome.bad:
                print("\n".join(log.read_text(errors="replace").splitlines()[-TAIL:]))
            elif outcome.verdict == PASSED:
                passed[step.name] = outcome.last
                state.parent.mkdir(parents=True, exist_ok=True)
                state.write_text(json.dumps({"key": key, "passed": passed}, indent=1))
            print(f"    {outcome.verdict} in {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        if outcome.verdict not in (KEPT, LATE):
            note(outcomes)
    note(outcomes)
    return outcomes


def sources_key(extra: str) -> str:
    """Of all that a step depends on: the text of the sources, and `extra`."""
    digest = hashlib.sha256(extra.encode())
    folders = ("csrc", "ldmkit", "plugins", "tests", "benchmarks")
    files = [ROOT / "setup.py", *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    for path in sorted(files):
        if path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h", ".json") and RESULTS not in path.parents:
            digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# ------------------------------------------------------------------------------------------------------------------- reporting


def table(outcomes: Sequence[Outcome]) -> str:
    """What `make gpu-check` prints last."""
    rows = [(o.name, o.verdict, f"{o.seconds:.0f} s", o.last[:70]) for o in outcomes]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]).rstrip() for row in rows
    )


def device() -> dict[str, Any] | None:
    """The GPU and the versions; None without one. Asked in another process: this one holds no memory of the device."""
    ask = (
        "import json, torch; p = torch.cuda.get_device_properties(0); print(json.dumps({'gpu': p.name,"
        " 'capability': f'{p.major}.{p.minor}', 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
    )
    done = subprocess.run([sys.executable, "-c", ask], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return None
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return found


def record(outcomes: Sequence[Outcome], here: dict[str, Any], *, quick: bool) -> dict[str, Any]:
    """What goes to the JSON."""
    return {
        "check": "gpu-check",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "device": here,
        "steps": [dataclasses.asdict(outcome) for outcome in outcomes],
    }


def pack(archive: Path, folders: Sequence[Path]) -> None:
    """Writes a .tar.gz of the folders, whole or not at all, with names that begin at the checkout."""
    unfinished = archive.with_name(f".{archive.name}")
    with tarfile.open(unfinished, "w:gz") as tar:
        for folder in folders:
            if folder.exists():
                tar.add(folder, folder.relative_to(ROOT))
    unfinished.replace(archive)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if every step that can run here passed, 1 if one did not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small benchmarks, short sanitizer runs")
    parser.add_argument("--fresh", action="store_true", help="run again what passed before")
    parser.add_argument("--minutes", type=float, default=math.inf, metavar="N", help="start nothing after, and go on next time")
    parser.add_argument("--only", metavar="WORD", help="only steps whose name has this in it")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="a .tar.gz of logs, state and figures, after every step")
    options = parser.parse_args(arguments)
    here = device()
    if here is None:
        print("gpu-check needs a CUDA device that torch can use; `python -c 'import torch; torch.zeros(1).cuda()'` says more")
        return 2
    chosen = [step for step in steps(quick=options.quick) if options.only is None or options.only in step.name]
    if not chosen:
        print(f"no step has {options.only!r} in its name; there are {', '.join(s.name for s in steps(quick=options.quick))}")
        return 2
    state = FOLDER / "state.json"
    if options.fresh:
        state.unlink(missing_ok=True)
    folder = (ROOT / "out" if options.quick else RESULTS) / "gpu"
    path = folder / f"gpu-check-{re.sub(r'[^a-z0-9]+', '-', here['gpu'].lower())}.json"

    def note(outcomes: Sequence[Outcome]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record(outcomes, here, quick=options.quick), indent=1) + "\n")
        if options.archive is not None:
            pack(options.archive, [FOLDER, folder])

    key = sources_key(f"{here} {options.quick}")
    outcomes = run_all(chosen, state, key, 60 * options.minutes, note)
    bad = sum(outcome.bad for outcome in outcomes)
    print(f"\n{', '.join(f'{name} {value}' for name, value in here.items())}\n{table(outcomes)}")
    print(f"\n{bad} of {len(outcomes)} steps failed; written: {path}" if bad else f"\nnothing failed; written: {path}")
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends with this process
    raise SystemExit(main())
