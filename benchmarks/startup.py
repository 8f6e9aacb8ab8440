"""Starting up: `import ldmkit` and `ldmkit --help`, each in a fresh process, against `import diffusers`.

A process that does nothing is timed beside them; less its time is what an import itself costs. The command line is run as
`python -m ldmkit.cli`, which is what the script `ldmkit` does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from benchmarks import common
from benchmarks.common import ROOT, Run, Spread, difference, ratio

COMMANDS = {
    "nothing": ["-c", "pass"],
    "import ldmkit": ["-c", "import ldmkit"],
    "ldmkit --help": ["-m", "ldmkit.cli", "--help"],
    "import diffusers": ["-c", "import diffusers"],
}
PEER = "import diffusers"


def process(arguments: list[str], threads: int) -> Run:
    """A run that starts Python with these arguments and waits for its end."""
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def run() -> None:
        subprocess.run([sys.executable, *arguments], cwd=ROOT, env=variables, check=True, stdout=subprocess.DEVNULL)

    return run


def main() -> None:
    """Measure, print, write."""
    chosen = common.options(common.parser(__doc__ or "").parse_args())
    record = common.environment(peers=["diffusers"])
    runs = {name: process(arguments, chosen.threads) for name, arguments in COMMANDS.items()}
    times = common.interleave(runs, **chosen.timing)
    cases: list[dict[str, Any]] = [
        {
            "case": {"command": name},
            "seconds": {name: Spread.of(times[name])},
            "own_seconds": difference(times, name, "nothing"),
            "ratios": {f"{PEER}/{name}": ratio(times, peer=PEER, ours=name)},
        }
        for name in COMMANDS
        if name != "nothing"
    ]
    head = ["process", "wall, ms", "over a bare process, ms", f"{PEER}/this"]
    rows = [["nothing", Spread.of(times["nothing"]).text(1, 1e3), "", ""]]
    for case in cases:
        name, (peers_ratio,) = case["case"]["command"], case["ratios"].values()
        rows.append([name, case["seconds"][name].text(1, 1e3), case["own_seconds"].text(1, 1e3), peers_ratio.text()])
    common.print_table(record, head, rows)
    common.report("startup", __doc__ or "", chosen, record, cases=cases, summary={"nothing": Spread.of(times["nothing"])})


if __name__ == "__main__":
    main()
