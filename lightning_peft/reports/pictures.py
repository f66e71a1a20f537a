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

from lightning_peft.atomic import write_atomically
from lightning_peft.reports.grids import Grid, make_grids
from lightning_peft.reports.records import DECISIONS, IMPORTANCE, Row, read_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

_MISSING: dict[str, Any] = {
    "facecolor": "#e4e4e4",
    "edgecolor": "#b0b0b0",
    "hatch": "////",
    "linewidth": 0,
}
_MARKERS = "|x+.1"


def draw_importance(rows: Sequence[Row], decisions: Sequence[Row], title: str) -> Figure:
    """Draw layers × steps for each module kind, the magnitude of each kind, and rank by layer.

    Args:
        rows: Of ``importance.csv``: step, layer, kind, rank, importance, share.
        decisions: Of the strategy: step, layer, event, rank.
        title: Usually the strategy's name.

    Returns:
        The figure.

    Raises:
        ValueError: If there are no rows.
    """
    from matplotlib.figure import Figure

    if not rows:
        raise ValueError("there are no measured steps to draw.")
    grids = make_grids(rows, decisions)
    lines = math.ceil(len(grids) / 4)
    columns = math.ceil(len(grids) / lines)
    depth = max(len(grid.layers) for grid in grids)
    height = max(lines * (0.75 + min(max(0.17 * depth, 1.3), 12)) + 1.2, 5.6)
    widths = [max(2.6 * columns, 3.2) + 0.4, max(3.6, 1.0 + 0.45 * len(grids))]
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    what = "how much each layer changes its output"
    figure.suptitle(f"{title}: {what}" if title else what.capitalize())
    parts: Any = figure.subfigures(1, 2, width_ratios=widths)
    left, right = parts
    axes = left.subplots(lines, columns, squeeze=False).flatten()
    top = max((row["share"] for row in rows if math.isfinite(row["share"])), default=0) or 1.0
    for i, (ax, grid) in enumerate(zip(axes, grids, strict=False)):
        mesh = _draw_grid(ax, grid, top)
        ax.set_ylabel("layer" if i % columns == 0 else "")
        ax.set_xlabel("optimizer step" if i + columns >= len(grids) else "")
    for ax in axes[len(grids) :]:
        ax.set_axis_off()
    bar = left.colorbar(mesh, ax=list(axes), location="bottom", aspect=50, shrink=0.8, pad=0.02)
    bar.set_label("share of mean ‖ΔWx‖² per token within the kind", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    _legend(left, grids)
    ranks, magnitude = right.subplots(2, 1, height_ratios=[1.6, 1])
    _draw_ranks(ranks, grids, row_height=72 * 0.5 * height / depth)
    _draw_magnitude(magnitude, grids)
    right.legend(loc="outside lower center", fontsize=7, ncols=4, frameon=False)
    return figure


def save_importance(folder: str | Path, title: str = "") -> Path:
    """Draw ``importance.png`` from the ``importance.csv`` and ``decisions.csv`` of a run's folder.

    Args:
        folder: The run's folder.
        title: Usually the strategy's name.

    Returns:
        The picture's path.

    Raises:
        FileNotFoundError: If there is no ``importance.csv``.
        ValueError: If it has no rows, or a file is not as written by the callback.
    """
    folder = Path(folder)
    source, decided = folder / "importance.csv", folder / "decisions.csv"
    if not source.is_file():
        raise FileNotFoundError(
            f"{source} does not exist; a fit with the callback LayerImportance writes it."
        )
    rows = read_table(source, IMPORTANCE)
    if not rows:
        raise ValueError(f"{source} has no rows yet: no optimizer step was measured.")
    decisions = read_table(decided, DECISIONS) if decided.is_file() else []
    return save_figure(draw_importance(rows, decisions, title), folder / "importance.png")


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file, whole or not at all.

    Args:
        figure: The figure.
        path: The file.

    Returns:
        ``path``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    write_atomically(path, lambda part: canvas.print_figure(part, format="png", dpi=130))
    return path


def _edges(steps: list[int]) -> list[int]:
    """A measurement stands for the steps until the next one."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return [*steps, steps[-1] + last]


def _draw_grid(ax: Axes, grid: Grid, top: float) -> QuadMesh:
    """One kind: colour for share, marks for events, words for roles."""
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import MaxNLocator

    depth, edges = len(grid.layers), _edges(grid.steps)
    _hatch(ax, edges[0], edges[-1], [i for i in range(depth) if np.isnan(grid.share[i]).any()])
    mesh = ax.pcolormesh(
        np.array(edges),
        np.arange(depth + 1) - 0.5,
        np.ma.masked_invalid(grid.share),
        cmap="viridis",
        # With one layer far ahead of the others, these would all be black on a linear scale.
        norm=PowerNorm(0.5, vmin=0, vmax=top),
    )
    mesh.set_gid(f"share:{grid.kind}")
    _draw_marks(ax, grid)
    last_mark = max((step for marks in grid.marks.values() for step, _ in marks), default=0)
    ax.set_xlim(edges[0], max(edges[-1], last_mark))
    ax.set_ylim(depth - 0.5, -0.5)
    ax.set_title(grid.kind, fontsize=10)
    every = math.ceil(depth / 40)
    ax.set_yticks(range(0, depth, every), grid.labels[::every])
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.tick_params(labelsize=7)
    if depth <= 80:
        for i, role in enumerate(grid.roles):
            weight = {"kept": "bold"}.get(role, "normal")
            place: dict[str, Any] = {"transform": ax.get_yaxis_transform(), "va": "center"}
            ax.text(1.02, i, role, fontsize=6.5, fontweight=weight, color="#333333", **place)
    return mesh


def _hatch(ax: Axes, left: float, right: float, rows: Sequence[int]) -> None:
    for row in rows:
        ax.fill_between([left, right], row - 0.5, row + 0.5, zorder=0, **_MISSING)


def _draw_marks(ax: Axes, grid: Grid) -> None:
    from matplotlib.patheffects import withStroke

    size = min(40.0, max(8.0, 900 / len(grid.layers)))
    for (event, marks), marker in zip(sorted(grid.marks.items()), _MARKERS * 9, strict=False):
        steps, layers = zip(*marks, strict=True)
        ax.scatter(
            steps,
            layers,
            s=size,
            marker=marker,
            color="white",
            linewidths=1.4,
            path_effects=[withStroke(linewidth=2.8, foreground="black")],
            gid=f"{event}:{grid.kind}",
            clip_on=False,
        )


def _legend(figure: Any, grids: list[Grid]) -> None:
    """What marks and hatching mean, where there are any."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.patheffects import withStroke

    stroke = [withStroke(linewidth=2.8, foreground="black")]
    events = sorted({event for grid in grids for event in grid.marks})
    handles: list[Any] = [
        Line2D([], [], ls="", marker=marker, color="white", label=event, path_effects=stroke)
        for event, marker in zip(events, _MARKERS * 9, strict=False)
    ]
    if any(np.isnan(grid.share).any() for grid in grids):
        handles.append(Patch(label="no adapter", **_MISSING))
    if handles:
        figure.legend(
            handles=handles, loc="outside upper right", ncols=4, fontsize=8, frameon=False
        )


def _draw_ranks(ax: Axes, grids: list[Grid], row_height: float) -> None:
    """Rank at the end, layers × kinds, as colour and number."""
    labels = list(dict.fromkeys(label for grid in grids for label in grid.labels))
    ranks = np.full((len(labels), len(grids)), np.nan)
    roles = {}
    for column, grid in enumerate(grids):
        for label, rank, role in zip(grid.labels, grid.ranks, grid.roles, strict=True):
            ranks[labels.index(label), column] = rank
            roles[labels.index(label), column] = role
    highest = max(np.nanmax(ranks), 1)
    # The darkest blue is left out, so that constant ranks do not make a dark wall.
    image = ax.imshow(
        np.ma.masked_invalid(ranks), cmap="Blues", vmin=0, vmax=2 * highest, aspect="auto"
    )
    image.set_gid("rank")
    font = min(8.0, 0.75 * row_height)
    for (row, column), role in roles.items():
        rank = int(ranks[row, column])
        if role == "removed":
            _hatch_cell(ax, row, column)
        if font >= 4:
            text = f"{rank}s" if role == "shared" else f"{rank}"
            ax.text(column, row, text, ha="center", va="center", fontsize=font)
    shared = any(role == "shared" for role in roles.values())
    ax.set_title("rank at the end" + (" (s: shared)" if shared else ""), fontsize=10)
    ax.set_xticks(range(len(grids)), [grid.kind for grid in grids], rotation=35, ha="right")
    every = math.ceil(len(labels) / 40)
    ax.set_yticks(range(0, len(labels), every), labels[::every])
    ax.set_ylabel("layer")
    ax.tick_params(labelsize=7)
    if font < 4:
        ax.figure.colorbar(image, ax=ax, label="rank")


def _hatch_cell(ax: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **_MISSING))


def _draw_magnitude(ax: Axes, grids: list[Grid]) -> None:
    """Mean ‖ΔWx‖² of each kind over steps; on a log scale unless all is zero."""
    highest = 0.0
    for i, grid in enumerate(grids):
        values = grid.importance[~np.isnan(grid.importance).all(axis=1)]
        if not len(values):
            continue
        mean = np.nanmean(values, axis=0)
        marker = "o" if len(grid.steps) < 4 else None
        style: dict[str, Any] = {
            "color": f"C{i % 10}",
            "ls": "-" if i < 10 else "--",
            "marker": marker,
        }
        ax.plot(
            grid.steps, np.where(mean > 0, mean, np.nan), lw=1.3, ms=3, label=grid.kind, **style
        )
        highest = max(highest, np.nanmax(mean, initial=0))
    if highest > 0:
        ax.set_yscale("log")
    else:
        ax.set_yticks([0])
        ax.text(0.5, 0.6, "zero so far", transform=ax.transAxes, ha="center", va="center")
    ax.set_title("mean ‖ΔWx‖² per token, mean over layers", fontsize=10)
    ax.set_xlabel("optimizer step")
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
    ax.legend(
        fontsize=7,
        ncols=4,
        columnspacing=1.2,
        loc="upper left",
        bbox_to_anchor=(0, -0.25),
        frameon=False,
    )
