"""Finding installed plugins costs the same for each, however many there are, and imports nothing heavy.

Distributions with one light module and ten parts each are written into a folder, as pip would leave them; a fresh process finds
them all and builds the table of parts. A process that finds only the built-in ones is timed beside it; less its time, and
divided by their number, is what a plugin costs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, Run, Spread, difference, ratio

COUNTS, QUICK_COUNTS = (0, 50, 100, 200), (0, 2, 4)
FIND = """
import sys
from ldmkit.plugin.registry import registry
assert sum(plugin.state == "ok" for plugin in registry().plugins) >= {count}
assert len(registry().available("sampler")) >= {count} * 10
heavy = [name for name in ("torch", "transformers", "numpy", "fake_part") if name in sys.modules]
assert not heavy, heavy
"""
MODULE = """
from ldmkit.plugin.spec import Component, hookimpl

@hookimpl
def ldmkit_components():
    return [Component(kind="sampler", name=f"fake-{number}-{{i}}", target="fake_part:Part") for i in range(10)]
"""


def install(folder: Path, count: int) -> Path:
    """Write that many distributions."""
    for number in range(count):
        info = folder / f"fake_{number}-1.0.dist-info"
        info.mkdir(parents=True)
        (folder / f"fake_{number}.py").write_text(MODULE.format(number=number))
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fake-{number}\nVersion: 1.0\nRequires-Dist: ldmkit\n")
        (info / "entry_points.txt").write_text(f"[ldmkit]\nfake-{number} = fake_{number}\n")
    return folder


def process(site: Path, count: int) -> Run:
    """A run that finds the plugins in a fresh process."""
    path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))

    def run() -> None:
        command = [sys.executable, "-c", FIND.format(count=count)]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)

    return run


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    record = common.environment()
    counts = QUICK_COUNTS if chosen.quick else COUNTS
    with tempfile.TemporaryDirectory() as folder:
        runs = {str(n): process(install(Path(folder) / str(n), n), n) for n in counts}
        times = common.interleave(runs, **chosen.timing)
    cases: list[dict[str, Any]] = []
    for n in counts[1:]:
        own = difference(times, str(n), "0")
        each = Spread(own.median / n, own.low / n, own.high / n, own.count)
        name = str(n)
        cases.append(
            {
                "case": {"plugins": n},
                "seconds": {name: Spread.of(times[name])},
                "seconds_each": each,
                "ratios": {f"none/{n}": ratio(times, peer="0", ours=name)},
            }
        )
    rows = [["0", Spread.of(times["0"]).text(1, 1e3), ""]]
    rows += [[k, s.text(1, 1e3), case["seconds_each"].text(3, 1e3)] for case in cases for k, s in case["seconds"].items()]
    common.print_table(record, ["plugins", "process, ms", "each, ms"], rows)
    common.report("plugins_startup", __doc__ or "", chosen, record, cases=cases, summary={"none": Spread.of(times["0"])})


if __name__ == "__main__":
    main()
