"""The table of a comparison: each run over its seeds, and its difference to the baseline."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.atomic import write_atomically
from lightning_peft.comparison.outcomes import Outcomes
from lightning_peft.comparison.plan import Job
from lightning_peft.reports.statistics import bootstrap_interval, is_noise


@dataclass
class Row:
    """One run over its seeds; the last two columns are measured, and differ at every repetition.

    Attributes:
        run: Its name.
        score: Name of the metric.
        rate: The chosen value of ``rates.key``; None without a sweep.
        seeds: With a score.
        failed: Seeds without one.
        mean: Of the score.
        std: Standard deviation over seeds (n - 1); None for one seed.
        low: Lower end of the 95 % interval of the mean.
        high: Its upper end.
        baseline: The run that the difference is taken to; empty for a baseline itself.
        pairs: Seeds that both have.
        difference: Mean over them of this run's score less the baseline's.
        difference_low: Lower end of its 95 % interval.
        difference_high: Its upper end.
        inside_noise: Whether that interval holds zero; None for a baseline, and below five pairs.
        parameters_start: Trainable parameters at the start, averaged over seeds.
        parameters_end: The same at the end.
        adapter_bytes: Size of the adapter's weights on the disk.
        seconds_per_step: Of training, median over seeds.
        peak_memory_mb: Likewise.
    """

    run: str
    score: str
    rate: float | None
    seeds: int
    failed: int
    mean: float | None = None
    std: float | None = None
    low: float | None = None
    high: float | None = None
    baseline: str = ""
    pairs: int | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    inside_noise: bool | None = None
    parameters_start: int | None = None
    parameters_end: int | None = None
    adapter_bytes: int | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None


MEASURED = ("seconds_per_step", "peak_memory_mb")


def make_rows(outcomes: Outcomes, score: str) -> list[Row]:
    """Judge every run by one metric.

    Args:
        outcomes: Of the comparison's jobs.
        score: Name of the metric.

    Returns:
        A row for each run, in the order of the comparison.
    """
    return [_row(outcomes, run, score) for run in outcomes.plan.trees]


def scores_of(outcomes: Outcomes, run: str, score: str) -> dict[int, float]:
    """A run's score by seed.

    Args:
        outcomes: Of the comparison's jobs.
        run: Its name.
        score: Name of the metric.
    """
    found = {job.seed: outcomes.score(job, score) for job in outcomes.chosen(run)}
    return {seed: score for seed, score in found.items() if score is not None}


def _row(outcomes: Outcomes, run: str, score: str) -> Row:
    jobs, scores = outcomes.chosen(run), scores_of(outcomes, run, score)
    settled, rate = outcomes.choice(run)
    # Without a rate that could be trained there is no job to count.
    lost = settled and not jobs
    failed = len(outcomes.plan.comparison.seeds) if lost else _count_failed(outcomes, jobs)
    row = Row(run, score, rate, len(scores), failed)
    baseline = outcomes.plan.baseline_of(run)
    if scores:
        values = list(scores.values())
        row.mean = float(np.mean(values))
        row.std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        row.low, row.high = bootstrap_interval(values)
    if run != baseline:
        row.baseline = baseline
        _compare(row, scores, scores_of(outcomes, baseline, score))
    done = [outcomes.found[job] for job in jobs if job.seed in scores]
    for name, attribute in (("start", "parameters_start"), ("end", "parameters_end")):
        setattr(row, attribute, _mean([getattr(outcome, name) for outcome in done]))
    row.adapter_bytes = _mean([outcome.adapter_bytes for outcome in done])
    for name in MEASURED:
        found = [getattr(outcome, name) for outcome in done if getattr(outcome, name) is not None]
        setattr(row, name, float(np.median(found)) if found else None)
    return row


def _count_failed(outcomes: Outcomes, jobs: Sequence[Job]) -> int:
    return sum(1 for job in jobs if outcomes.failure(job))


def _compare(row: Row, scores: dict[int, float], others: dict[int, float]) -> None:
    gaps = [scores[seed] - others[seed] for seed in scores if seed in others]
    row.pairs = len(gaps)
    if gaps:
        interval = bootstrap_interval(gaps)
        row.difference = float(np.mean(gaps))
        row.difference_low, row.difference_high = interval
        row.inside_noise = is_noise(interval, len(gaps))


def _mean(values: Sequence[int | None]) -> int | None:
    found = [value for value in values if value is not None]
    return round(float(np.mean(found))) if found else None


# Writing.


def write_table(outcomes: Outcomes, folder: Path) -> str:
    """Write ``results.csv``, ``results.md``, ``results.tex`` and ``seeds.csv``.

    Args:
        outcomes: Of the comparison's jobs.
        folder: Where they go.

    Returns:
        The Markdown.
    """
    comparison = outcomes.plan.comparison
    scores = dict.fromkeys((comparison.score, *comparison.also))
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
        write_atomically(folder / name, lambda part, text=text: part.write_text(text))  # type: ignore[misc]
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
    columns = ["run", "rate", "seed", "judged", "score", rates.choose_by if rates else "val_loss"]
    columns += ["parameters_start", "parameters_end", "adapter_bytes", "reason", *MEASURED]
    rows = []
    for job in outcomes.all_jobs(outcomes.plan):
        outcome = outcomes.found.get(job)
        if outcome is None:
            continue
        values = [job.run, job.rate, job.seed, job in outcomes.chosen(job.run)]
        values += [outcomes.score(job), outcome.metrics.get(columns[5])]
        values += [outcome.start, outcome.end, outcome.adapter_bytes, outcomes.failure(job)]
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
        _number(row.parameters_end, ",d"),
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
            f"seed {chosen_on}; nothing was chosen by {comparison.score}."
        )
    notes.append(
        "Intervals are 95 % bootstrap intervals over seeds (expanded percentile); differences are "
        "paired by seed, and inside the noise where their interval holds zero; fewer than five "
        "seeds cannot tell."
    )
    failures = [
        f"- {job.label}: {outcomes.failure(job)}" for job in outcomes.found if outcomes.failure(job)
    ]
    if failures:
        notes.append("\n".join(["Failed:\n", *failures]))
    return notes
