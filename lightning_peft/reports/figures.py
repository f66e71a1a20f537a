"""What all pictures share: grids of panels, labels of rows, and writing the file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_peft.atomic import write_atomically
from lightning_peft.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

MOST_COLUMNS = 5
MOST_LABELS = 40


class NothingToDraw(UserError):
    """No run has left what a picture shows."""


def shared_panels(
    count: int, panel: tuple[float, float], margin: tuple[float, float], narrowest: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure of panels with common axes, at most five in a line.

    Args:
        count: Panels.
        panel: Width and height of each, in inches.
        margin: What the figure has beside them, in inches.
        narrowest: Least width of all panels together, in inches.

    Returns:
        The figure, and the axes line by line: those behind ``count`` are hidden.
    """
    from matplotlib.figure import Figure

    columns = min(MOST_COLUMNS, count)
    lines = math.ceil(count / columns)
    size = (max(panel[0] * columns, narrowest) + margin[0], panel[1] * lines + margin[1])
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten())
    for ax in axes[max(count - columns, 0) : count]:  # the lowest of each column
        ax.tick_params(labelbottom=True)
    hide(axes[count:])
    return figure, axes


def hide(axes: Sequence[Axes]) -> None:
    """Leave the places of panels empty."""
    for ax in axes:
        ax.set_axis_off()


def label_rows(ax: Axes, labels: Sequence[str], **style: Any) -> None:
    """Write a label beside each row; with more than forty rows, beside every second, third, …."""
    every = math.ceil(len(labels) / MOST_LABELS)
    ax.set_yticks(range(0, len(labels), every), labels[::every], **style)


def root_scale(top: float) -> PowerNorm:
    """Colours by the square root, from 0 to ``top``.

    With one layer far ahead of the others, these would all look alike on a linear scale.
    """
    from matplotlib.colors import PowerNorm

    return PowerNorm(0.5, 0, top)


def colour_bar(
    figure: Any, mesh: Any, axes: Sequence[Axes], label: str, shrink: float, numbers: int
) -> None:
    """Draw a long bar of colours below all panels.

    Args:
        figure: The figure, or a part of it.
        mesh: Whose colours.
        axes: All panels.
        label: What the colours are.
        shrink: Its length, as a share of the panels' width.
        numbers: Size of its numbers, in points.
    """
    place = {"location": "bottom", "aspect": 50, "pad": 0.02, "shrink": shrink}
    bar = figure.colorbar(mesh, ax=list(axes), **place)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=numbers)


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
