"""A panel of layers × module kinds for each run: importance, or rank, at the end of training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Value by kind and place among the layers of that kind.
Values = Mapping[tuple[str, str], float]


def draw_by_layer(runs: Mapping[str, Values], label: str, whole: bool = False) -> Figure:
    """Draw a panel for each run, all in one scale of colours.

    Args:
        runs: By run, its values by kind (``q_proj``) and label of the layer (``3``).
        label: What the values are.
        whole: Whether they are counts, drawn on a linear scale and written to three digits.

    Returns:
        The figure; layers without a value are hatched.

    Raises:
        ValueError: If there are no values.
    """
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    runs = {run: values for run, values in runs.items() if values}
    if not runs:
        raise ValueError("no run has values by layer yet.")
    kinds = list(dict.fromkeys(kind for values in runs.values() for kind, _ in values))
    layers = sorted({layer for values in runs.values() for _, layer in values}, key=_depth)
    columns = min(5, len(runs))
    lines = math.ceil(len(runs) / columns)
    width, height = max(1.6, 0.36 * len(kinds)) + 0.4, min(max(0.26 * len(layers), 1.0), 7) + 0.5
    size = (max(width * columns, 5.0) + 0.6, height * lines + 1.1)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    top = max(value for values in runs.values() for value in values.values()) or 1.0
    norm = Normalize(0, top) if whole else PowerNorm(0.5, 0, top)
    for ax, (run, values) in zip(axes, runs.items(), strict=False):
        grid = np.array(
            [[values.get((kind, layer), math.nan) for kind in kinds] for layer in layers]
        )
        mesh = ax.imshow(np.ma.masked_invalid(grid), cmap="viridis", norm=norm, aspect="auto")
        ax.set_facecolor("#e4e4e4")
        ax.set_title(run, fontsize=9)
        ax.set_xticks(range(len(kinds)), [_short(kind) for kind in kinds], rotation=90, fontsize=7)
        every = math.ceil(len(layers) / 40)
        ax.set_yticks(range(0, len(layers), every), layers[::every], fontsize=7)
        if len(layers) <= 32:
            _write(ax, grid, norm, whole)
    for ax in axes[len(runs) :]:
        ax.set_axis_off()
    figure.supylabel("layer", fontsize=9)
    bar = figure.colorbar(mesh, ax=list(axes), location="bottom", aspect=50, shrink=0.6, pad=0.02)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=7)
    return figure


def _write(ax: object, grid: np.ndarray, norm: object, whole: bool) -> None:
    """Each value in its cell."""
    for (y, x), value in np.ndenumerate(grid):
        if math.isfinite(value):
            text = f"{value:.3g}" if whole else f"{value:.0f}"
            colour = "white" if norm(value) < 0.6 else "black"  # type: ignore[operator]
            style = {"ha": "center", "va": "center", "fontsize": 6, "color": colour}
            ax.text(x, y, text, **style)  # type: ignore[attr-defined]


def _short(kind: str) -> str:
    return kind.removesuffix("_proj")


def _depth(label: str) -> tuple[float, str]:
    return (float(label), "") if label.isdigit() else (math.inf, label)
