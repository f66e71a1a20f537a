"""Rows of importance.csv arranged by kind."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_peft.reports.grids import make_grids

Row = dict[str, Any]


def row(step: int, layer: str, share: float = 0.5, rank: int = 8) -> Row:
    kind = layer.rsplit(".", 1)[-1]
    return {
        **{"step": step, "layer": layer, "kind": kind, "rank": rank},
        **{"importance": 2 * share, "share": share, "measure": "output"},
    }


def decision(step: int, layer: str, event: str, rank: int) -> Row:
    return {"step": step, "layer": layer, "event": event, "rank": rank}


def test_a_kind_is_a_grid_of_layers_by_steps() -> None:
    rows = [row(0, "m.0.q", 0.25), row(0, "m.1.q", 0.75), row(0, "m.0.v"), row(5, "m.1.q", 1.0)]
    q, v = make_grids(rows, [])
    assert (q.kind, v.kind) == ("q", "v")
    assert q.layers == ["m.0.q", "m.1.q"]
    assert q.labels == ["0", "1"]
    assert q.steps == v.steps == [0, 5]
    assert np.array_equal(q.share, [[0.25, np.nan], [0.75, 1.0]], equal_nan=True)
    assert np.array_equal(v.importance, [[1.0, np.nan]], equal_nan=True)
    assert (q.ranks, q.roles, q.marks) == ([8, 8], ["", ""], {})


def test_layers_stand_in_depth_order_also_those_that_only_decisions_name() -> None:
    rows = [row(0, f"m.{i}.q") for i in (0, 2, 10)]
    (grid,) = make_grids(rows, [decision(0, "m.1.q", "removed", 0)])
    assert grid.labels == ["0", "1", "2", "10"]
    assert grid.roles == ["kept", "removed", "kept", "kept"]
    assert grid.ranks == [8, 0, 8, 8]
    assert np.isnan(grid.share[1]).all()


def test_the_last_of_rows_and_decisions_gives_the_rank() -> None:
    rows = [row(0, "m.0.q", rank=8), row(4, "m.0.q", rank=6), row(0, "m.1.q"), row(4, "m.1.q")]
    decisions = [decision(2, "m.0.q", "removed", 7), decision(4, "m.1.q", "removed", 5)]
    (grid,) = make_grids(rows, decisions)
    assert grid.ranks == [6, 5]
    assert grid.marks == {"removed": [(2, 0), (4, 1)]}


def test_a_shared_layer_has_a_role_and_no_mark() -> None:
    rows = [row(0, "m.0.q"), row(0, "m.1.q")]
    (grid,) = make_grids(rows, [decision(0, "m.1.q", "shared", 4)])
    assert grid.roles == ["kept", "shared"]
    assert grid.ranks == [8, 4]
    assert grid.marks == {}


def test_labels_are_names_where_numbers_are_ambiguous() -> None:
    names = ["enc.0.attention.out", "enc.0.out", "enc.1.attention.out"]
    (grid,) = make_grids([row(0, name) for name in names], [])
    assert sorted(grid.labels) == ["0", "0.attention", "1.attention"]
    (head,) = make_grids([row(0, "lm_head")], [])
    assert head.labels == ["lm_head"]
