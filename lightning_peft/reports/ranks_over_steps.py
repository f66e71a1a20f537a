"""Rank by layer over the steps of a run: a panel for each run of a comparison."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from lightning_peft.reports.by_layer import depth
from lightning_peft.reports.figures import NothingToDraw, colour_bar, shared_panels
from lightning_peft.reports.grids import make_grids
from lightning_peft.reports.records import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

Place = tuple[str, str]  # kind and label of a layer


@dataclass
class RankHistory:
    """Ranks of a run's layers, as they were measured and decided.

    Attributes:
        layers: Kind and label of each, kind by kind and in depth order.
        steps: Optimizer steps at which a rank is known, ascending.
        ranks: (layers, steps); NaN where a rank is not known.
    """

    layers: list[Place]
    steps: list[int]
    ranks: NDArray[np.float64]

    @property
    def varies(self) -> bool:
        """Whether a rank differs from another one, of whatever layer and step."""
        return len(np.unique(self.ranks[np.isfinite(self.ranks)])) > 1

    @property
    def moves(self) -> bool:
        """Whether a layer has another rank at one step than at another."""
        first = self.ranks[:, :1]
        return bool(((self.ranks != first) & np.isfinite(self.ranks) & np.isfinite(first)).any())


def ranks_over_steps(rows: Sequence[Row], decisions: Sequence[Row]) -> RankHistory:
    """Put together what was measured and what was decided; between them a rank stays.

    Args:
        rows: Of ``importance.csv``.
        decisions: Of ``decisions.csv``. One of step t holds from t + 1 on, since it comes after the
            forward pass of its step.
    """
    grids = make_grids(rows, decisions)
    row_of = {name: i for i, name in enumerate(name for grid in grids for name in grid.layers)}
    known = [(row["step"] + 1, row["layer"], row["rank"]) for row in decisions]
    known += [(row["step"], row["layer"], row["rank"]) for row in rows]
    steps = sorted({step for step, _, _ in known})
    column = {step: i for i, step in enumerate(steps)}
    ranks = np.full((len(row_of), len(steps)), np.nan)
    for step, layer, rank in sorted(known, key=lambda item: item[0]):
        ranks[row_of[layer], column[step] :] = rank
    layers = [(grid.kind, label) for grid in grids for label in grid.labels]
    return RankHistory(layers, steps, ranks)


def draw_ranks_over_steps(runs: Mapping[str, RankHistory], scores: Mapping[str, str]) -> Figure:
    """Draw a panel for each run but those of one rank throughout, in one scale of colours.

    Args:
        runs: By run, the history of one of its seeds.
        scores: What stands below a run's name, such as its score.

    Returns:
        The figure; what is not known is grey.

    Raises:
        NothingToDraw: If no rank moves in any run.
    """
    from matplotlib.colors import Normalize

    if not any(history.moves for history in runs.values()):
        raise NothingToDraw("no run's ranks move.")
    runs = {run: history for run, history in runs.items() if history.varies}
    places = sorted(
        {place for history in runs.values() for place in history.layers},
        key=_order([kind for history in runs.values() for kind, _ in history.layers]),
    )
    norm = Normalize(0, max(np.nanmax(history.ranks) for history in runs.values()))
    height = min(max(0.06 * len(places), 1.3), 4.5) + 0.5
    figure, axes = shared_panels(len(runs), panel=(2.3, height), margin=(0.6, 1.0))
    end = max(history.steps[-1] for history in runs.values()) + 1
    for ax, (run, history) in zip(axes, runs.items(), strict=False):
        mesh = _draw_run(ax, history, places, norm, end)
        ax.set_title("\n".join(filter(None, (run, scores.get(run, "")))), fontsize=9)
    axes[len(runs) - 1].set_xlabel("optimizer step", fontsize=9)
    figure.supylabel("layers of each kind, the first on top", fontsize=9)
    colour_bar(figure, mesh, axes, "rank (of one seed)", shrink=0.6, numbers=7)
    return figure


def _order(kinds: Sequence[str]) -> Callable[[Place], Any]:
    """Kinds as they come, layers of a kind by depth."""
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    return lambda place: (order[place[0]], depth(place[1]))


def _draw_run(
    ax: Axes, history: RankHistory, places: list[Place], norm: Normalize, end: int
) -> QuadMesh:
    """One run: a row for each layer, a white line between kinds; ranks stay until the end."""
    ranks = np.full((len(places), len(history.steps)), np.nan)
    for place, values in zip(history.layers, history.ranks, strict=True):
        ranks[places.index(place)] = values
    mesh = ax.pcolormesh(
        np.array([*history.steps, end]),
        np.arange(len(places) + 1),
        np.ma.masked_invalid(ranks),
        cmap="viridis",
        norm=norm,
    )
    ax.set_facecolor("#e4e4e4")
    counts = Counter(kind for kind, _ in places)
    ends = np.cumsum([0, *counts.values()])
    for end in ends[1:-1]:
        ax.axhline(end, color="white", lw=0.8)
    names = [kind.removesuffix("_proj") for kind in counts]
    ax.set_yticks((ends[:-1] + ends[1:]) / 2, names, fontsize=7)
    ax.set_ylim(len(places), 0)
    ax.tick_params(labelsize=7)
    return mesh
