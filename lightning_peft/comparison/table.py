"""The table of a comparison: each run over its seeds, as csv, Markdown and LaTeX."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning_peft.atomic import write_text
from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.rows import MEASURED, Row, make_rows


def write_table(outcomes: Outcomes, folder: Path) -> str:
    """Write ``results.csv``, ``results.md``, ``results.tex`` and ``seeds.csv``.

    Args:
        outcomes: Of the comparison's jobs.
        folder: Where they go.

    Returns:
        The Markdown.
    """
    scores = dict.fromkeys((outcomes.plan.score, *outcomes.plan.comparison.also))
    rows = {score: make_rows(outcomes, score) for score in scores}
    columns = [column.name for column in fields(Row)]
    flat = [row for found in rows.values() for row in found]
    table = [[_plain(value) for value in asdict(row).values()] for row in flat]
    cells = {score: [_cells(row) for row in found] for score, found in rows.items()}
    shown = [_markdown(score, found) for score, found in cells.items()]
    markdown = "\n\n".join([*shown, *_notes(outcomes)]) + "\n"
    files = {
        "results.csv": _csv(columns, table),
        "results.md": markdown,
        "results.tex": "\n".join(_latex(score, found) for score, found in cells.items()),
        "seeds.csv": _csv(*_seeds(outcomes)),
    }
    for name, text in files.items():
        write_text(folder / name, text)
    return markdown


def _plain(value: Any) -> Any:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.9g}" if isinstance(value, float) else "" if value is None else value


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([columns, *rows])
    return text.getvalue()


def _seeds(outcomes: Outcomes) -> tuple[list[str], list[list[Any]]]:
    """Every job: what it came to, and whether the run is judged by it."""
    rates = outcomes.plan.comparison.rates
    chosen_by = str(rates.choose_by) if rates else "val_loss"
    columns = ["run", "rate", "seed", "judged", "score", chosen_by, "parameters_start"]
    columns += ["parameters_end", "off_budget", "adapter_bytes", "reason", *MEASURED]
    rows = []
    for job in outcomes.all_jobs(outcomes.plan):
        outcome = outcomes.found.get(job)
        if outcome is None:
            continue
        values = [job.run, job.rate, job.seed, job in outcomes.chosen(job.run)]
        values += [outcomes.score(job), outcome.metrics.get(chosen_by), outcome.start]
        values += [outcome.end, outcomes.off_budget(job), outcome.adapter_bytes]
        values += [outcomes.failure(job)]
        values += [getattr(outcome, name) for name in MEASURED]
        rows.append([_plain(value) for value in values])
    return columns, rows


HEAD = (
    "run",
    "rate",
    "seeds",
    "",  # the score's name
    "95 % interval",
    "difference to the baseline",
    "parameters at start",
    "at end",
    "adapter, kB",
    "s / step",
    "peak, MB",
)


def _cells(row: Row) -> list[str]:
    gap = "baseline"
    if row.baseline:
        gap = "" if row.difference is None else _gap(row)
    spread = "" if row.std is None else f" ± {row.std:.3f}"
    return [
        row.run,
        "" if row.rate is None else f"{row.rate:g}",
        f"{row.seeds}" + (f" ({row.failed} failed)" if row.failed else ""),
        "" if row.mean is None else f"{row.mean:.3f}{spread}",
        "" if row.low is None or row.high is None else f"{row.low:.3f} to {row.high:.3f}",
        gap,
        _number(row.parameters_start, ",d"),
        _number(row.parameters_end, ",d") + (" (outside the budget)" if row.off_budget else ""),
        _number(None if row.adapter_bytes is None else row.adapter_bytes / 1000, ",.0f"),
        _number(row.seconds_per_step, ".3f"),
        _number(row.peak_memory_mb, ",.0f"),
    ]


def _gap(row: Row) -> str:
    text = f"{row.difference:+.3f} ({row.difference_low:+.3f} to {row.difference_high:+.3f})"
    if row.inside_noise is None:
        return f"{text}, too few seeds to tell"
    return f"{text}, inside the noise" if row.inside_noise else text


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _head(score: str) -> list[str]:
    return [name or f"{score}, mean ± standard deviation" for name in HEAD]


def _markdown(score: str, cells: Sequence[Sequence[str]]) -> str:
    head = _head(score)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _latex(score: str, cells: Sequence[Sequence[str]]) -> str:
    lines = [_head(score), *cells]
    rows = [" & ".join(_escape(cell) for cell in line) + r" \\" for line in lines]
    begin = rf"\begin{{tabular}}{{l{'r' * (len(HEAD) - 1)}}}"
    parts = [begin, r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule", r"\end{tabular}"]
    return "% needs the package booktabs\n" + "\n".join(parts) + "\n"


def _escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, rf"\{character}")
    return text.replace("±", r"$\pm$").replace("~", r"\textasciitilde{}").replace("^", r"\^{}")


def _notes(outcomes: Outcomes) -> list[str]:
    """What a reader has to know beside the numbers."""
    comparison, notes = outcomes.plan.comparison, []
    if comparison.rates:
        rates = comparison.rates
        tried = ", ".join(f"{value:g}" for value in rates.values)
        for run, values in rates.values_of.items():
            tried += f" ({run}: {', '.join(f'{value:g}' for value in values)})"
        chosen_on = ", ".join(map(str, rates.seeds or comparison.seeds[:1]))
        notes.append(
            f"rate: the one of {tried} ({rates.key}) with the {rates.best} {rates.choose_by} on "
            f"seed {chosen_on}; nothing was chosen by {outcomes.plan.score}."
        )
    notes.append(
        "Intervals are 95 % bootstrap intervals over seeds (expanded percentile); differences are "
        "paired by seed, and inside the noise where their interval holds zero; fewer than five "
        "seeds cannot tell."
    )
    notes += outcomes.plan.notes
    off = [f"- {job.label}: {said}" for job in outcomes.found if (said := outcomes.off_budget(job))]
    if off:
        notes.append("\n".join(["Outside the budget, so not comparable at an equal one:\n", *off]))
    failures = [
        f"- {job.label}: {outcomes.failure(job)}" for job in outcomes.found if outcomes.failure(job)
    ]
    if failures:
        notes.append("\n".join(["Failed:\n", *failures]))
    return notes
