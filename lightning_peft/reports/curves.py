"""The picture of a run's metrics: loss, accuracy and rank over optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_peft.errors import UserError
from lightning_peft.reports.figures import save_figure
from lightning_peft.reports.records import Metrics, read_metrics, series, source

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Title of each panel and the metrics in it.
_PANELS = {
    "loss": ("train_loss", "val_loss"),
    "validation accuracy": ("val_accuracy",),
    "mean rank": ("rank",),
}


def draw_curves(rows: Sequence[Metrics], title: str = "") -> Figure:
    """Draw training and validation loss, validation accuracy and mean rank over steps.

    Args:
        rows: Of ``metrics.csv``; a row holds some metrics and their ``step``.
        title: Usually the strategy's name.

    Returns:
        The figure; metrics that no row holds have no panel.

    Raises:
        UserError: If no row holds any of them.
    """
    from matplotlib.figure import Figure

    found = {name: series(rows, name) for names in _PANELS.values() for name in names}
    panels = {panel: [n for n in names if found[n]] for panel, names in _PANELS.items()}
    panels = {panel: names for panel, names in panels.items() if names}
    if not panels:
        raise UserError(f"there is none of the metrics {', '.join(found)} to draw.")
    figure = Figure(figsize=(4.4 * len(panels), 3.4), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (panel, names) in zip(axes, panels.items(), strict=True):
        for name in names:
            _draw(ax, name, found[name])
        ax.set(title=panel, xlabel="optimizer step")
        ax.grid(alpha=0.3)
        if len(names) > 1:
            ax.legend(frameon=False, fontsize=8)
        if panel == "mean rank":
            ax.set_ylim(bottom=0)
        if panel == "validation accuracy":
            ax.set_ylim(-0.02, 1.02)
    return figure


def save_curves(folder: str | Path, title: str = "") -> Path:
    """Draw ``curves.png`` from the ``metrics.csv`` of a run's folder.

    Args:
        folder: The run's folder.
        title: Usually the strategy's name.

    Returns:
        The picture's path.

    Raises:
        MissingFile: If there is no ``metrics.csv``.
        UserError: If it holds nothing to draw.
    """
    folder = Path(folder)
    path = source(folder, "metrics.csv", "a fit with a CSVLogger writes it")
    return save_figure(draw_curves(read_metrics(path), title), folder / "curves.png")


def _draw(ax: Axes, name: str, points: list[tuple[float, float]]) -> None:
    steps, values = zip(*points, strict=True)
    few = len(points) < 30
    style = "steps-post" if name == "rank" else "default"
    # Hundreds of noisy training losses stay behind the few validation losses.
    noisy = name == "train_loss" and not few
    ax.plot(
        steps,
        values,
        drawstyle=style,
        marker="o" if few else None,
        ms=3,
        lw=0.8 if noisy else 1.5,
        alpha=0.7 if noisy else 1,
        label=name,
    )
