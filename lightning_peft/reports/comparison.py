"""Pictures of a comparison: score by parameters and by seed, and learning curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.reports.figures import NothingToDraw, shared_panels
from lightning_peft.reports.statistics import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#8c8c8c"
Curve = Sequence[tuple[float, float]]


@dataclass
class Drawn:
    """What is drawn of one run.

    Attributes:
        run: Its name.
        scores: By seed.
        parameters: Trainable ones at the end, averaged over seeds; None if unknown.
        curves: By seed, (step, value) in ascending order.
        baseline: The run that it is compared with; its own name for a baseline.
    """

    run: str
    scores: Mapping[int, float]
    parameters: int | None = None
    curves: Mapping[int, Curve] = field(default_factory=dict)
    baseline: str = ""


def draw_by_parameters(runs: Sequence[Drawn], score: str) -> Figure:
    """Draw each run's mean score and its interval over trainable parameters.

    Args:
        runs: Those without a score or a count are left out.
        score: Its name.

    Raises:
        NothingToDraw: If none is left.
    """
    from matplotlib.figure import Figure

    shown = [run for run in runs if run.scores and run.parameters]
    if not shown:
        raise NothingToDraw("no run has a score and a count of parameters yet.")
    figure = Figure(figsize=(8.5, 5.5), layout="constrained")
    ax = figure.subplots()
    colours = _colours(shown)
    for run in shown:
        mean, low, high = _mean(run)
        ends = [[mean - low], [high - mean]]
        style: dict[str, Any] = {"fmt": "o", "ms": 6, "capsize": 3, "lw": 1.2}
        ax.errorbar([run.parameters or 1], [mean], yerr=ends, color=colours[run.run], **style)
    ax.set_xscale("log")
    ax.set(xlabel="trainable parameters at the end", ylabel=f"{score}, mean and 95 % interval")
    counts = [run.parameters or 1 for run in shown]
    ax.set_xlim(min(counts) / 1.5, max(counts) * 3)  # names stand to the right
    ax.grid(alpha=0.3)
    _label(ax, [(math.log10(run.parameters or 1), _mean(run)[0], run.run) for run in shown])
    return figure


def _label(ax: Axes, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name beside its point; names of one place go below one another."""
    low, high = ax.get_ylim()
    left, right = ax.get_xlim()
    width, height = math.log10(right / left), high - low
    placed: list[tuple[float, float]] = []
    for x, y, name in sorted(points, key=lambda point: -point[1]):
        place = y
        while any(
            abs(x - other_x) < 0.16 * width and abs(place - other_y) < 0.035 * height
            for other_x, other_y in placed
        ):
            place -= 0.012 * height
        placed.append((x, place))
        ax.annotate(
            name,
            (10**x, y),
            xytext=(10 ** (x + 0.015 * width), place),
            textcoords="data",
            fontsize=8,
            va="center",
        )


def draw_by_seed(runs: Sequence[Drawn], score: str) -> Figure:
    """Draw a line for each run, with a point for each seed, the mean and its interval.

    Args:
        runs: Those without a score are left out.
        score: Its name.

    Raises:
        NothingToDraw: If none is left.
    """
    from matplotlib.figure import Figure

    shown = [run for run in runs if run.scores]
    if not shown:
        raise NothingToDraw("no run has a score yet.")
    seeds = sorted({seed for run in shown for seed in run.scores})
    figure = Figure(figsize=(8.5, 1.4 + 0.34 * len(shown)), layout="constrained")
    ax = figure.subplots()
    for i, seed in enumerate(seeds):
        spread = 0.18 * (i / max(len(seeds) - 1, 1) - 0.5)
        found = [(r.scores[seed], y + spread) for y, r in enumerate(shown) if seed in r.scores]
        x, height = np.array(found).T
        colour = _colour_map("viridis", i / max(len(seeds) - 1, 1) * 0.9)
        ax.scatter(x, height, s=18, color=[colour], label=f"seed {seed}", zorder=2)
    _draw_means(ax, shown)
    ax.set_yticks(range(len(shown)), [run.run for run in shown], fontsize=9)
    ax.set_ylim(len(shown) - 0.5, -0.5)
    ax.set_xlabel(f"{score}: seeds, mean with 95 % interval; grey: the baseline's mean")
    ax.grid(alpha=0.3, axis="x")
    if len(seeds) <= 12:
        figure.legend(loc="outside upper center", ncols=6, fontsize=8, frameon=False)
    return figure


def _draw_means(ax: Axes, shown: Sequence[Drawn]) -> None:
    """Each run's mean and interval in its line, and in grey the mean of its baseline."""
    for y, run in enumerate(shown):
        mean, low, high = _mean(run)
        ax.plot([low, high], [y, y], color="black", lw=1.2, zorder=3)
        ax.plot([mean], [y], marker="|", ms=13, mew=2, color="black", zorder=4)
        for end in {run.baseline} - {run.run, ""}:
            other = next((r for r in shown if r.run == end), None)
            if other:
                ax.plot([_mean(other)[0]], [y], marker="|", ms=13, mew=1, color=GREY, zorder=1)


def draw_curves_of(runs: Sequence[Drawn], metric: str) -> Figure:
    """Draw a panel for each run: its seeds, their mean, and the baseline's mean behind them.

    Args:
        runs: Those without a curve are left out.
        metric: What is drawn over optimizer steps.

    Raises:
        NothingToDraw: If none is left.
    """
    shown = [run for run in runs if any(run.curves.values())]
    if not shown:
        raise NothingToDraw(f"no run has {metric} in its metrics.csv yet.")
    figure, axes = shared_panels(len(shown), panel=(2.6, 2.1), margin=(0.6, 0.5))
    means = {run.run: _mean_curve(run) for run in shown}
    for ax, run in zip(axes, shown, strict=False):
        for curve in run.curves.values():
            ax.plot(*_columns(curve), color="tab:blue", lw=0.7, alpha=0.45)
        if run.baseline in means and run.baseline != run.run:
            ax.plot(*_columns(means[run.baseline]), color=GREY, lw=1.5, ls="--")
        ax.plot(*_columns(means[run.run]), color="tab:blue", lw=2)
        ax.set_title(run.run, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.grid(alpha=0.3)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel(f"{metric} (dashed: the baseline's mean)", fontsize=9)
    return figure


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [step for step, _ in curve], [value for _, value in curve]


def _mean_curve(run: Drawn) -> Curve:
    """Mean over the seeds that have a value at a step."""
    values: dict[float, list[float]] = {}
    for curve in run.curves.values():
        for step, value in curve:
            values.setdefault(step, []).append(value)
    return [(step, float(np.mean(values[step]))) for step in sorted(values)]


def _mean(run: Drawn) -> tuple[float, float, float]:
    values = list(run.scores.values())
    return (float(np.mean(values)), *bootstrap_interval(values))


def _colours(runs: Sequence[Drawn]) -> dict[str, Any]:
    return {run.run: _colour_map("tab20", (i % 20 + 0.5) / 20) for i, run in enumerate(runs)}


def _colour_map(name: str, place: float) -> Any:
    from matplotlib import colormaps

    return colormaps[name](place)
