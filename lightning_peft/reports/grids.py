"""Rows of ``importance.csv`` as one grid of layers × steps for each module kind."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_peft.reports.records import Row


@dataclass
class Grid:
    """What was measured of one module kind, and decided about it.

    Attributes:
        kind: Last part of the layers' names.
        layers: Full names, in depth order.
        labels: What tells the layers of this kind apart: ``3`` of ``model.layers.3.mlp.up_proj``.
        steps: Measured optimizer steps, ascending.
        share: Share of the kind's importance, (layers, steps); NaN where there is no row.
        importance: Mean ‖ΔWx‖² per token or ‖ΔW‖_F, (layers, steps); NaN where there is no row.
        ranks: Of each layer at the end.
        roles: Of each layer: ``shared``, ``removed`` (no adapter and no row), ``kept`` beside such
            layers, or empty.
        marks: For each further event its steps and rows.
    """

    kind: str
    layers: list[str]
    labels: list[str]
    steps: list[int]
    share: NDArray[np.float64]
    importance: NDArray[np.float64]
    ranks: list[int]
    roles: list[str]
    marks: dict[str, list[tuple[int, int]]]


def make_grids(rows: Sequence[Row], decisions: Sequence[Row]) -> list[Grid]:
    """Arrange rows and decisions by module kind.

    Args:
        rows: Of ``importance.csv``.
        decisions: Of ``decisions.csv``.

    Returns:
        A grid for each kind, in the model's order; kinds that only decisions name come last.
    """
    kinds = {row["layer"]: row["kind"] for row in rows}
    for decision in decisions:
        kinds.setdefault(decision["layer"], decision["layer"].rsplit(".", 1)[-1])
    roles = _roles(rows, decisions)
    members: dict[str, list[str]] = defaultdict(list)
    for name in _in_depth_order(kinds):
        members[kinds[name]].append(name)
    steps = sorted({row["step"] for row in rows})
    order = {kind: i for i, kind in enumerate(dict.fromkeys(kinds.values()))}
    return [
        _grid(kind, members[kind], steps, rows, decisions, roles)
        for kind in sorted(members, key=order.__getitem__)
    ]


def _grid(
    kind: str,
    layers: list[str],
    steps: list[int],
    rows: Sequence[Row],
    decisions: Sequence[Row],
    roles: dict[str, str],
) -> Grid:
    row_of = {name: i for i, name in enumerate(layers)}
    column = {step: i for i, step in enumerate(steps)}
    share, importance = np.full((2, len(layers), len(steps)), np.nan)
    ranks, measured = [0] * len(layers), [-1] * len(layers)
    for row in rows:
        if (i := row_of.get(row["layer"])) is not None:
            share[i, column[row["step"]]] = row["share"]
            importance[i, column[row["step"]]] = row["importance"]
            if row["step"] >= measured[i]:
                ranks[i], measured[i] = row["rank"], row["step"]
    marks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for decision in decisions:
        if (i := row_of.get(decision["layer"])) is not None:
            # A decision falls after the forward pass in which its step is measured.
            if decision["step"] >= measured[i]:
                ranks[i], measured[i] = decision["rank"], decision["step"]
            if decision["event"] != roles.get(decision["layer"]):
                marks[decision["event"]].append((decision["step"], i))
    return Grid(
        kind=kind,
        layers=layers,
        labels=_labels(layers, kind),
        steps=steps,
        share=share,
        importance=importance,
        ranks=ranks,
        roles=[roles.get(name, "kept" if roles else "") for name in layers],
        marks=dict(marks),
    )


def _roles(rows: Sequence[Row], decisions: Sequence[Row]) -> dict[str, str]:
    """What holds for a layer throughout the run; anything else happens to it at a step."""
    measured = {row["layer"] for row in rows}
    return {
        decision["layer"]: decision["event"]
        for decision in decisions
        if decision["event"] == "shared" or decision["layer"] not in measured
    }


def _numbers(name: str) -> tuple[int, ...]:
    return tuple(int(part) for part in name.split(".") if part.isdigit())


def _in_depth_order(names: Iterable[str]) -> list[str]:
    """As they come, but numbered layers of one pattern by number.

    Layers that only decisions name come after the measured ones, and belong between them.
    """
    names = list(names)
    patterns = {name: re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names}
    order = {pattern: i for i, pattern in enumerate(dict.fromkeys(patterns.values()))}
    return sorted(names, key=lambda name: (order[patterns[name]], _numbers(name)))


def _labels(layers: list[str], kind: str) -> list[str]:
    """Layer numbers; where these are ambiguous, names without what all have in common."""
    labels = [".".join(map(str, _numbers(name))) or name for name in layers]
    if max(Counter(labels).values()) == 1:
        return labels
    stems = [name.removesuffix(f".{kind}").split(".") for name in layers]
    common = len(os.path.commonprefix(stems))
    return [".".join(stem[common:]) or kind for stem in stems]
