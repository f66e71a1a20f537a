"""The parts of the picture of a run's layers; each draws into axes that are given to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.reports.figures import label_rows, root_scale
from lightning_peft.reports.grids import Grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh

MISSING: dict[str, Any] = {
    "facecolor": "#e4e4e4",
    "edgecolor": "#b0b0b0",
    "hatch": "////",
    "linewidth": 0,
}
_MARKERS = "|x+.1"


def markers(grids: Sequence[Grid]) -> dict[str, str]:
    """A marker for each event, the same in every panel."""
    events = sorted({event for grid in grids for event in grid.marks})
    return {event: _MARKERS[i % len(_MARKERS)] for i, event in enumerate(events)}


def _edges(steps: list[int]) -> list[int]:
    """A measurement stands for the steps until the next one."""
    last = steps[-1] - steps[-2] if len(steps) > 1 else 1
    return [*steps, steps[-1] + last]


def draw_grid(ax: Axes, grid: Grid, marker_of: dict[str, str], top: float) -> QuadMesh:
    """One kind: colour for share, marks for events, words for roles."""
    from matplotlib.ticker import MaxNLocator

    depth, edges = len(grid.layers), _edges(grid.steps)
    _hatch(ax, edges[0], edges[-1], [i for i in range(depth) if np.isnan(grid.share[i]).any()])
    mesh = ax.pcolormesh(
        np.array(edges),
        np.arange(depth + 1) - 0.5,
        np.ma.masked_invalid(grid.share),
        cmap="viridis",
        norm=root_scale(top),
    )
    mesh.set_gid(f"share:{grid.kind}")
    _draw_marks(ax, grid, marker_of)
    last_mark = max((step for marks in grid.marks.values() for step, _ in marks), default=0)
    ax.set_xlim(edges[0], max(edges[-1], last_mark))
    ax.set_ylim(depth - 0.5, -0.5)
    ax.set_title(grid.kind, fontsize=10)
    label_rows(ax, grid.labels)
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
        ax.fill_between([left, right], row - 0.5, row + 0.5, zorder=0, **MISSING)


def _draw_marks(ax: Axes, grid: Grid, marker_of: dict[str, str]) -> None:
    from matplotlib.patheffects import withStroke

    size = min(40.0, max(8.0, 900 / len(grid.layers)))
    for event, marks in grid.marks.items():
        steps, layers = zip(*marks, strict=True)
        ax.scatter(
            steps,
            layers,
            s=size,
            marker=marker_of[event],
            color="white",
            linewidths=1.4,
            path_effects=[withStroke(linewidth=2.8, foreground="black")],
            gid=f"{event}:{grid.kind}",
            clip_on=False,
        )


def draw_ranks(ax: Axes, grids: list[Grid], row_height: float) -> None:
    """Rank at the end, layers × kinds, as colour and number."""
    labels = _all_labels(grids)
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
    label_rows(ax, labels)
    ax.set_ylabel("layer")
    ax.tick_params(labelsize=7)
    if font < 4:
        ax.figure.colorbar(image, ax=ax, label="rank")


def _all_labels(grids: list[Grid]) -> list[str]:
    """Labels of all kinds, numbered ones first and by number: a kind may lack some layers."""
    labels = dict.fromkeys(label for grid in grids for label in grid.labels)
    numbered = [label for label in labels if label.replace(".", "").isdigit()]
    numbered.sort(key=lambda label: [int(part) for part in label.split(".")])
    return [*numbered, *(label for label in labels if label not in numbered)]


def _hatch_cell(ax: Axes, row: int, column: int) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, **MISSING))


def draw_magnitude(ax: Axes, grids: list[Grid], measure: str) -> None:
    """Mean importance of each kind over steps; on a log scale unless all is zero."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    drawn: list[float] = []
    for i, grid in enumerate(grids):
        mean = np.ma.masked_invalid(grid.importance).mean(axis=0).filled(np.nan)
        marker = "o" if len(grid.steps) < 4 else None
        style: dict[str, Any] = {
            "color": f"C{i % 10}",
            "ls": "-" if i < 10 else "--",
            "marker": marker,
        }
        ax.plot(
            grid.steps, np.where(mean > 0, mean, np.nan), lw=1.3, ms=3, label=grid.kind, **style
        )
        drawn += mean[mean > 0].tolist()
    if drawn:
        ax.set_yscale("log")
        few = max(drawn) < 100 * min(drawn)  # powers of ten alone would be one label, or none
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_yticks([0])
        ax.text(0.5, 0.6, "zero so far", transform=ax.transAxes, ha="center", va="center")
    ax.set_title(f"{measure}, mean over layers", fontsize=10)
    ax.set_xlabel("optimizer step")
    if len(grids[0].steps) > 1:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    else:
        ax.set_xticks(grids[0].steps)
    ax.tick_params(labelsize=7)
    ax.grid(alpha=0.3)
