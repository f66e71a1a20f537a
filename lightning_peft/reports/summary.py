"""The page of one run: what ran, what came out, which layers mattered."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_peft.atomic import write_text
from lightning_peft.errors import MissingFile, UserError
from lightning_peft.reports.curves import save_curves
from lightning_peft.reports.pictures import save_importance
from lightning_peft.reports.records import (
    IMPORTANCE,
    MEASURES,
    Metrics,
    Row,
    read_metrics,
    read_table,
    source,
)


def report(folder: Path) -> str:
    """Draw a run's pictures again and put its record into words.

    Writes ``report.md``, ``curves.png`` and, if there is an ``importance.csv``, ``importance.png``.

    Args:
        folder: The run's folder, with ``run.json`` and ``metrics.csv``.

    Returns:
        The text, in Markdown.

    Raises:
        MissingFile: If the folder or one of the two files is missing.
        UserError: If a file is not what a run writes.
    """
    folder = Path(folder)
    run = _read_run(folder)
    made = "a fit with a CSVLogger as trainer.logger writes it"
    metrics = read_metrics(source(folder, "metrics.csv", made))
    name = str(run.get("strategy") or "")
    parts = [f"# {name or 'Run'} in {folder.name}", _facts(run), _metrics_table(run, metrics)]
    save_curves(folder, name)
    parts.append("![curves](curves.png)")
    if (folder / "importance.csv").is_file():
        rows = read_table(folder / "importance.csv", IMPORTANCE)
        if rows:
            save_importance(folder, name)
            parts += [_layers_table(rows), "![importance](importance.png)"]
    else:
        parts.append("No importance.csv: the callback LayerImportance was not among the trainer's.")
    text = "\n\n".join(part for part in parts if part) + "\n"
    write_text(folder / "report.md", text)
    return text


def _read_run(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise MissingFile(f"{folder} is not a folder; give the log folder of a run.")
    path = source(folder, "run.json", "lightning-peft fit writes it as it ends")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(run, dict):
        raise UserError(f"{path} does not hold a JSON object; lightning-peft fit writes one.")
    return run


def _facts(run: Mapping[str, Any]) -> str:
    """A line for each thing that the record tells."""
    parameters = run.get("parameters") or {}
    start, end, total = (parameters.get(key) for key in ("start", "end", "total"))
    lines = {
        "strategy": run.get("strategy"),
        "arguments": _pairs(run.get("arguments")),
        "protocol": run.get("protocol"),
        "seed": run.get("seed"),
        "status": run.get("status"),
        "parameters": _counts(start, end, total),
        "ranks": _ranks(run.get("ranks")),
        "seconds": _number(run.get("seconds")),
        "peak memory, MB": _number(run.get("peak_memory_mb")),
        "versions": _pairs(run.get("versions")),
        "commit": run.get("commit"),
    }
    return "\n".join(f"- {key}: {value}" for key, value in lines.items() if value not in (None, ""))


def _pairs(values: Any) -> str:
    if not isinstance(values, Mapping):
        return "" if values is None else str(values)
    return ", ".join(f"{key} {value}" for key, value in values.items())


def _counts(start: int | None, end: int | None, total: int | None) -> str:
    if start is None and end is None:
        return ""
    shown = [f"{count:,}" for count in (start, end) if count is not None]
    text = " at the start, ".join(shown) + (" at the end" if len(shown) == 2 else "")
    return text + (f", of {total:,} in all" if total is not None else "")


def _ranks(ranks: Mapping[str, int] | None) -> str:
    if not ranks:
        return ""
    low, high = min(ranks.values()), max(ranks.values())
    mean = sum(ranks.values()) / len(ranks)
    span = f"{low}" if low == high else f"{low} to {high}, mean {mean:.3g}"
    return f"{span} in {len(ranks)} layers"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _metrics_table(run: Mapping[str, Any], metrics: list[Metrics]) -> str:
    """Final metrics, of the record or else the last of each in ``metrics.csv``."""
    final: dict[str, Any] = {}
    for row in metrics:
        final.update({name: value for name, value in row.items() if name not in ("step", "epoch")})
    final = run.get("metrics") or final
    if not final:
        return ""
    lines = [f"| {name} | {_number(value)} |" for name, value in final.items()]
    return "\n".join(["| metric | at the end |", "|---|---|", *lines])


def _layers_table(rows: list[Row]) -> str:
    """Most and least important layer of each kind at the last measured step."""
    step = max(row["step"] for row in rows)
    kinds: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["step"] == step and math.isfinite(row["share"]):
            kinds[row["kind"]].append(row)
    lines = [
        f"Importance at step {step}, as a share of the kind's {MEASURES[rows[0]['measure']]}:\n",
        "| kind | layers | most important | least important |",
        "|---|---|---|---|",
    ]
    for kind, members in kinds.items():
        ends = [f(members, key=lambda row: row["share"]) for f in (max, min)]
        cells = [f"{row['layer']} ({row['share']:.1%}, rank {row['rank']})" for row in ends]
        lines.append(f"| {kind} | {len(members)} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)
