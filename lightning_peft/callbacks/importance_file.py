"""The rows of ``importance.csv``, and the file itself."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lightning_peft.adapters.attach import kind_of
from lightning_peft.atomic import append_text, write_text
from lightning_peft.callbacks.measurement import Seen
from lightning_peft.pruning.importance import shares_by_kind
from lightning_peft.reports.records import IMPORTANCE, Row, csv_text, read_if_there


def importance_rows(step: int, seen: Mapping[str, Seen], measure: str = "output") -> list[Row]:
    """Rows of ``importance.csv`` for one step.

    Args:
        step: Optimizer step.
        seen: By layer, in the model's order.
        measure: What was summed, one of ``MEASURES``.

    Returns:
        A row for each layer; shares are NaN where an importance is not finite.
    """
    device = next(iter(seen.values())).total.device
    # One transfer for all layers: each would otherwise make the host wait.
    means = torch.stack([s.total.to(device) / max(s.tokens, 1) for s in seen.values()])
    importance = dict(zip(seen, means.tolist(), strict=True))
    if all(math.isfinite(value) for value in importance.values()):
        share = shares_by_kind(importance, kind_of)
    else:
        share = dict.fromkeys(importance, math.nan)
    return [
        {
            "step": step,
            "layer": name,
            "kind": kind_of(name),
            "rank": found.rank,
            "importance": importance[name],
            "share": share[name],
            "measure": measure,
        }
        for name, found in seen.items()
    ]


def begin_file(path: Path, global_step: int) -> None:
    """Start ``importance.csv``, or keep of an earlier one what a resumed run does not measure.

    Args:
        path: The file.
        global_step: Optimizer steps made already; 0 starts anew.
    """
    kept = read_if_there(path, IMPORTANCE) if global_step > 0 else []
    rows = [row for row in kept if row["step"] < global_step]
    write_text(path, ",".join(IMPORTANCE) + "\n" + csv_text(rows, IMPORTANCE))


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write the rows of one step at the end of ``importance.csv``."""
    append_text(path, csv_text(rows, IMPORTANCE))
