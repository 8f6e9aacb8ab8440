"""What `ldmkit kernels` prints: which implementations of each op this machine has, which is chosen, and why not the others."""

from __future__ import annotations

from typing import Any

import torch

import ldmkit.kernels  # noqa: F401  (registers the ops)
from ldmkit.kernels.backends import BACKENDS, OPS, automatic, forced_backend, implementations
from ldmkit.kernels.compiled import ABSENT, build_info

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe() -> dict[str, Any]:
    """The report as plain data.

    Returns:
        torch: its version; devices: the device types here; compiled: how ldmkit._C was built, or null; absent: why it is not
        there, or null; ops: for each op what is `forced` (by `use` or LDMKIT_KERNELS; null is nothing), and for each backend
        whether it is `available` here, `why_not`, and what it is `chosen_for`, as "device dtype".
    """
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {
        "torch": torch.__version__,
        "devices": devices,
        "compiled": None if ABSENT else build_info(),
        "absent": ABSENT,
        "ops": {op: {"forced": forced_backend(op), "backends": _backends(op, devices)} for op in OPS},
    }


def _backends(op: str, devices: list[str]) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for backend in BACKENDS:
        implementation = implementations(op).get(backend)
        why_not = "not in this version" if implementation is None else implementation.missing
        rows[backend] = {"available": why_not is None, "why_not": why_not, "chosen_for": []}
    for device in devices:
        for dtype in DTYPES:
            forced = forced_backend(op)
            chosen = automatic(op, device, dtype) if forced in (None, "auto") else forced
            implementation = implementations(op).get(chosen)
            if implementation is not None and implementation.refusal(device, dtype) is None:
                rows[chosen]["chosen_for"].append(f"{device} {str(dtype).removeprefix('torch.')}")
    return rows


def table() -> str:
    """The report as a table for people."""
    report = describe()
    compiled = report["compiled"]
    built = (
        f"built with torch {compiled['torch']}, {'CPU and CUDA' if compiled['cuda'] else 'CPU only'}" if compiled else "absent"
    )
    rows = [("op", "backend", "state", "chosen for, or why not")]
    for op, entry in report["ops"].items():
        for backend, row in entry["backends"].items():
            forced = " (forced)" if backend == entry["forced"] else ""
            chosen = ", ".join(row["chosen_for"]) or "nothing by itself; backend= or LDMKIT_KERNELS forces it"
            # The reason that all compiled kernels share is told once, below.
            why_not = (
                "the compiled kernels are absent, see below"
                if report["absent"] and row["why_not"] == report["absent"]
                else row["why_not"]
            )
            rows.append(
                (op, backend, "available" if row["available"] else "-", chosen + forced if row["available"] else why_not)
            )
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
    head = f"torch {report['torch']}; devices: {', '.join(report['devices'])}; compiled kernels: {built}"
    tail = ["", report["absent"]] if report["absent"] else [f"(the CPU's instruction set in use: {compiled['cpu']})"]
    return "\n".join([head, "", *lines, *tail])
