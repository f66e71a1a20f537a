"""What a comparison's runs left behind, gathered for its pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lightning_peft.comparison.outcomes import Outcome, Outcomes
from lightning_peft.comparison.rows import scores_of
from lightning_peft.reports.by_layer import draw_by_layer
from lightning_peft.reports.comparison import (
    Curve,
    Drawn,
    draw_by_parameters,
    draw_by_seed,
    draw_curves_of,
)
from lightning_peft.reports.figures import NothingToDraw, save_figure
from lightning_peft.reports.grids import make_grids
from lightning_peft.reports.ranks_over_steps import (
    RankHistory,
    draw_ranks_over_steps,
    ranks_over_steps,
)
from lightning_peft.reports.records import DECISIONS, IMPORTANCE, Row, read_metrics, read_table


def save_pictures(outcomes: Outcomes, folder: Path) -> list[Path]:
    """Draw what there is to draw.

    Args:
        outcomes: Of the comparison's jobs.
        folder: Where pictures go.

    Returns:
        The pictures; one for which no run has left anything is left out.
    """
    score, curve = outcomes.plan.score, str(outcomes.plan.comparison.curve)
    runs = [_drawn(outcomes, run) for run in outcomes.plan.trees]
    shares, ranks = _by_layer(outcomes)
    pictures: dict[str, Callable[[], Any]] = {
        "score_by_parameters.png": lambda: draw_by_parameters(runs, score),
        "score_by_seed.png": lambda: draw_by_seed(runs, score),
        "curves.png": lambda: draw_curves_of(runs, curve),
        "importance_by_layer.png": lambda: draw_by_layer(
            shares, "share of importance within the module kind, % (mean over seeds)"
        ),
        "rank_by_layer.png": lambda: draw_by_layer(ranks, "rank at the end (mean over seeds)", 3),
        "rank_over_steps.png": lambda: draw_ranks_over_steps(*_over_steps(outcomes, runs)),
    }
    saved = []
    for name, draw in pictures.items():
        try:
            saved.append(save_figure(draw(), folder / name))
        except NothingToDraw:
            (folder / name).unlink(missing_ok=True)
    return saved


def _done(outcomes: Outcomes, run: str) -> Iterator[tuple[int, Outcome, Path]]:
    """Seed, outcome and folder of each job that a run is judged by."""
    for job in outcomes.chosen(run):
        outcome = outcomes.found.get(job)
        if outcome is not None and outcome.folder is not None and outcomes.ok(job):
            yield job.seed, outcome, outcome.folder


def _drawn(outcomes: Outcomes, run: str) -> Drawn:
    done = list(_done(outcomes, run))
    counts = [outcome.end for _, outcome, _ in done if outcome.end is not None]
    metric = str(outcomes.plan.comparison.curve)
    curves = {seed: _curve(folder, metric) for seed, _, folder in done}
    return Drawn(
        run,
        scores_of(outcomes, run, outcomes.plan.score),
        round(float(np.mean(counts))) if counts else None,
        curves,
        outcomes.plan.baseline_of(run),
    )


def _curve(folder: Path, metric: str) -> Curve:
    path = folder / "metrics.csv"
    rows = read_metrics(path) if path.is_file() else []
    return sorted((row["step"], row[metric]) for row in rows if metric in row and "step" in row)


def _by_layer(outcomes: Outcomes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Share of importance and rank at the last measured step, averaged over seeds."""
    shares: dict[str, Any] = {}
    ranks: dict[str, Any] = {}
    for run in outcomes.plan.trees:
        share: dict[tuple[str, str], list[float]] = {}
        rank: dict[tuple[str, str], list[float]] = {}
        for _, _, folder in _done(outcomes, run):
            for place, found_share, found_rank in _layers(folder):
                share.setdefault(place, []).append(found_share)
                rank.setdefault(place, []).append(found_rank)
        shares[run] = {place: 100 * float(np.mean(values)) for place, values in share.items()}
        ranks[run] = {place: float(np.mean(values)) for place, values in rank.items()}
        shares[run] = {p: value for p, value in shares[run].items() if np.isfinite(value)}
    return shares, ranks


def _over_steps(
    outcomes: Outcomes, runs: list[Drawn]
) -> tuple[dict[str, RankHistory], dict[str, str]]:
    """Ranks of each run's first seed that has them, and the mean score of all."""
    histories = {}
    for run in outcomes.plan.trees:
        found = (ranks_over_steps(*_tables(folder)) for _, _, folder in _done(outcomes, run))
        if history := next((each for each in found if each.steps), None):
            histories[run] = history
    means = {run.run: list(run.scores.values()) for run in runs if run.scores}
    score = outcomes.plan.score
    return histories, {run: f"{score} {np.mean(values):#.3g}" for run, values in means.items()}


def _tables(folder: Path) -> tuple[list[Row], list[Row]]:
    """A run's measurements and decisions; none where its record holds none."""
    measured, decided = folder / "importance.csv", folder / "decisions.csv"
    rows = read_table(measured, IMPORTANCE) if measured.is_file() else []
    return rows, read_table(decided, DECISIONS) if decided.is_file() else []


def _layers(folder: Path) -> Iterator[tuple[tuple[str, str], float, float]]:
    """Kind and label, share and rank of each layer of a run at its end."""
    rows, decisions = _tables(folder)
    for grid in make_grids(rows, decisions) if rows else []:
        for label, shares, rank in zip(grid.labels, grid.share, grid.ranks, strict=True):
            yield (grid.kind, label), float(shares[-1]), float(rank)
