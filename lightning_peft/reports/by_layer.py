"""A panel of layers × module kinds for each run: importance, or rank, at the end of training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_peft.reports.figures import (
    NothingToDraw,
    colour_bar,
    label_rows,
    root_scale,
    shared_panels,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Value by kind and place among the layers of that kind.
Values = Mapping[tuple[str, str], float]


def draw_by_layer(runs: Mapping[str, Values], label: str, digits: int = 2) -> Figure:
    """Draw a panel for each run, all in one scale of colours.

    Args:
        runs: By run, its values by kind (``q_proj``) and label of the layer (``3``).
        label: What the values are.
        digits: Significant ones with which each is written into its cell.

    Returns:
        The figure; layers without a value are hatched.

    Raises:
        NothingToDraw: If there are no values.
    """
    runs = {run: values for run, values in runs.items() if values}
    if not runs:
        raise NothingToDraw("no run has values by layer yet.")
    kinds = list(dict.fromkeys(kind for values in runs.values() for kind, _ in values))
    layers = sorted({layer for values in runs.values() for _, layer in values}, key=depth)
    width, height = max(1.6, 0.36 * len(kinds)) + 0.4, min(max(0.26 * len(layers), 1.0), 7) + 0.5
    figure, axes = shared_panels(len(runs), panel=(width, height), margin=(0.6, 1.1), narrowest=5.0)
    norm = root_scale(max(max(values.values()) for values in runs.values()) or 1.0)
    for ax, (run, values) in zip(axes, runs.items(), strict=False):
        mesh = _draw_run(ax, values, kinds, layers, norm, digits)
        ax.set_title(run, fontsize=9)
    figure.supylabel("layer", fontsize=9)
    colour_bar(figure, mesh, axes, label, shrink=0.6, numbers=7)
    return figure


def _draw_run(
    ax: Axes,
    values: Values,
    kinds: Sequence[str],
    layers: Sequence[str],
    norm: PowerNorm,
    digits: int,
) -> AxesImage:
    """One run: a row for each layer and a column for each kind."""
    grid = np.array([[values.get((kind, layer), math.nan) for kind in kinds] for layer in layers])
    mesh = ax.imshow(np.ma.masked_invalid(grid), cmap="viridis", norm=norm, aspect="auto")
    ax.set_facecolor("#e4e4e4")
    short = [kind.removesuffix("_proj") for kind in kinds]
    ax.set_xticks(range(len(kinds)), short, rotation=90, fontsize=7)
    label_rows(ax, layers, fontsize=7)
    if len(layers) <= 32:
        _write(ax, grid, norm, digits)
    return mesh


def _write(ax: Axes, grid: np.ndarray, norm: PowerNorm, digits: int) -> None:
    """Each value in its cell."""
    for (y, x), value in np.ndenumerate(grid):
        if math.isfinite(value):
            colour = "white" if norm(value) < 0.6 else "black"
            style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 6}
            ax.text(x, y, f"{value:.{digits}g}", color=colour, **style)


def depth(label: str) -> tuple[float, str]:
    """Sorts labels of layers: numbers by value, then names."""
    return (float(label), "") if label.isdigit() else (math.inf, label)
