"""What `ldmkit kernels` prints: which implementations of each op are here, why not the others, and the automatic choice."""

from __future__ import annotations

from typing import Any

import torch

import ldmkit.kernels
from ldmkit.kernels.backends import OPS, forced_backend, implementations, names
from ldmkit.kernels.compiled import ABSENT, build_info
from ldmkit.kernels.rules import rules


def describe() -> dict[str, Any]:
    """The report as plain data.

    Returns:
        torch: its version; devices: the device types here; compiled: how ldmkit._C was built, or null; absent: why it is not
        there, or null; ops: for each op what is `forced` (by `use` or LDMKIT_KERNELS; null is nothing), for each backend
        whether it is `available` here and `why_not`, and the `rules` of the automatic choice that hold on this machine.
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "ldmkit": ldmkit.__version__,
        "torch": torch.__version__,
        "devices": devices,
        "compiled": None if ABSENT else build_info(),
        "absent": ABSENT,
        "ops": {op: _describe(op, devices) for op in OPS},
    }


def _describe(op: str, devices: list[str]) -> dict[str, Any]:
    backends: dict[str, dict[str, Any]] = {"reference": {"available": True, "why_not": None}}
    for name in names()[1:]:
        implementation = implementations(op).get(name)
        if implementation is not None:
            backends[name] = {"available": implementation.missing is None, "why_not": implementation.missing}
    applicable = [
        {"backend": rule.backend, "for": rule.describe(), "measured": rule.measured}
        for rule in rules(op)
        if rule.device in devices and rule.on_this_machine() and backends.get(rule.backend, {}).get("available")
    ]
    return {"forced": forced_backend(op), "backends": backends, "rules": applicable}


def table() -> str:
    """The report as tables for people."""
    report = describe()
    compiled = report["compiled"]
    built = (
        f"built with torch {compiled['torch']}, {'CPU and CUDA' if compiled['cuda'] else 'CPU only'}" if compiled else "absent"
    )
    rows = [("op", "backend", "state", "chosen, or why not")]
    for op, entry in report["ops"].items():
        for backend, row in entry["backends"].items():
            rows.append((op, backend, "available" if row["available"] else "-", _remark(backend, row, entry, report["absent"])))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
    head = f"torch {report['torch']}; devices: {', '.join(report['devices'])}; compiled kernels: {built}"
    choice = ["", "the automatic choice on this machine, the first line that fits; else the reference"]
    for op, entry in report["ops"].items():
        choice += [f"  {op}: {rule['backend']} for {rule['for']}" for rule in entry["rules"]]
    tail = ["", report["absent"]] if report["absent"] else ["", f"(the CPU's instruction set in use: {compiled['cpu']})"]
    return "\n".join([head, "", *lines, *choice, *tail])


def _remark(backend: str, row: dict[str, Any], entry: dict[str, Any], absent: str | None) -> str:
    if not row["available"]:  # the reason that all compiled kernels share is told once, below
        return "the compiled kernels are absent, see below" if absent and row["why_not"] == absent else str(row["why_not"])
    if entry["forced"] == backend:
        return "forced"
    if entry["forced"] not in (None, "auto"):
        return f"{entry['forced']} is forced"
    if backend == "reference":
        return "wherever no rule below says otherwise"
    chosen = any(rule["backend"] == backend for rule in entry["rules"])
    return "by the rules below" if chosen else "nothing by itself; backend= or LDMKIT_KERNELS forces it"
