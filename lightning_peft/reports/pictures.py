"""The picture of a run's layers: importance over steps for each module kind, and rank by layer.

Colour is the share of the kind's importance: LoRA-drop decides by it, and it compares layers at
every step alike. How large the change itself grows, over decades, is a line for each kind.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.errors import UserError
from lightning_peft.reports.figures import colour_bar, hide, save_figure
from lightning_peft.reports.grids import Grid, make_grids
from lightning_peft.reports.panels import MISSING, draw_grid, draw_magnitude, draw_ranks, markers
from lightning_peft.reports.records import (
    DECISIONS,
    IMPORTANCE,
    MEASURES,
    Row,
    read_if_there,
    read_table,
    source,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_importance(rows: Sequence[Row], decisions: Sequence[Row], title: str) -> Figure:
    """Draw layers × steps for each module kind, the magnitude of each kind, and rank by layer.

    Args:
        rows: Of ``importance.csv``: step, layer, kind, rank, importance, share.
        decisions: Of the strategy: step, layer, event, rank.
        title: Usually the strategy's name.

    Returns:
        The figure.

    Raises:
        UserError: If there are no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise UserError("there are no measured steps to draw.")
    grids = make_grids(rows, decisions)
    depth = max(len(grid.layers) for grid in grids)
    lines = math.ceil(len(grids) / 4)
    columns = math.ceil(len(grids) / lines)
    height = max(lines * (0.75 + min(max(0.17 * depth, 1.3), 12)) + 1.2, 5.6)
    widths = [max(2.6 * columns, 3.2) + 0.4, max(3.6, 1.0 + 0.45 * len(grids))]
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    measure = rows[0]["measure"]
    what = "how much each layer changes" + (" its output" if measure == "output" else "")
    figure.suptitle(f"{title}: {what}" if title else what.capitalize())
    parts: Any = figure.subfigures(1, 2, width_ratios=widths)
    left, right = parts
    top = max((row["share"] for row in rows if math.isfinite(row["share"])), default=0) or 1.0
    _draw_shares(left, grids, (lines, columns), top, MEASURES[measure])
    ranks, magnitude = right.subplots(2, 1, height_ratios=[1.6, 1])
    draw_ranks(ranks, grids, row_height=72 * 0.5 * height / depth)
    draw_magnitude(magnitude, grids, MEASURES[measure])
    right.legend(loc="outside lower center", fontsize=7, ncols=4, frameon=False)
    return figure


def _draw_shares(
    figure: Any, grids: list[Grid], size: tuple[int, int], top: float, measure: str
) -> None:
    """A panel for each kind in ``size`` (lines, columns), with their colours and marks below."""
    columns = size[1]
    axes = figure.subplots(*size, squeeze=False).flatten()
    for i, (ax, grid) in enumerate(zip(axes, grids, strict=False)):
        mesh = draw_grid(ax, grid, markers(grids), top)
        ax.set_ylabel("layer" if i % columns == 0 else "")
        ax.set_xlabel("optimizer step" if i + columns >= len(grids) else "")
    hide(axes[len(grids) :])
    colour_bar(figure, mesh, axes, f"share of {measure} within the kind", shrink=0.8, numbers=8)
    _legend(figure, grids)


def save_importance(folder: str | Path, title: str = "") -> Path:
    """Draw ``importance.png`` from the ``importance.csv`` and ``decisions.csv`` of a run's folder.

    Args:
        folder: The run's folder.
        title: Usually the strategy's name.

    Returns:
        The picture's path.

    Raises:
        MissingFile: If there is no ``importance.csv``.
        UserError: If it has no rows, or a file is not as written by the callback.
    """
    folder = Path(folder)
    path = source(folder, "importance.csv", "a fit with the callback LayerImportance writes it")
    rows = read_table(path, IMPORTANCE)
    if not rows:
        raise UserError(f"{path} has no rows yet: no optimizer step was measured.")
    decisions = read_if_there(folder / "decisions.csv", DECISIONS)
    return save_figure(draw_importance(rows, decisions, title), folder / "importance.png")


def _legend(figure: Any, grids: list[Grid]) -> None:
    """What marks and hatching mean, where there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    stroke = [withStroke(linewidth=2.8, foreground="black")]
    handles: list[Any] = [
        Line2D([], [], ls="", marker=marker, color="white", label=event, path_effects=stroke)
        for event, marker in markers(grids).items()
    ]
    if any(np.isnan(grid.share).any() for grid in grids):
        removed = any("removed" in grid.roles for grid in grids)
        handles.append(Patch(label="no adapter" if removed else "no value", **MISSING))
    if handles:
        figure.legend(
            handles=handles, loc="outside upper right", ncols=4, fontsize=8, frameon=False
        )
