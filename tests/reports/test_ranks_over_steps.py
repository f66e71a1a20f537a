"""Ranks of a run's layers over its steps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_peft.reports.figures import NothingToDraw
from lightning_peft.reports.ranks_over_steps import draw_ranks_over_steps, ranks_over_steps

Row = dict[str, Any]


def row(step: int, layer: str, rank: int) -> Row:
    kind = layer.rsplit(".", 1)[-1]
    return {
        **{"step": step, "layer": layer, "kind": kind, "rank": rank},
        **{"importance": 1.0, "share": 0.5, "measure": "output"},
    }


def decision(step: int, layer: str, rank: int) -> Row:
    return {"step": step, "layer": layer, "event": "removed", "rank": rank}


def test_a_rank_stays_until_a_decision_and_holds_from_the_next_step() -> None:
    rows = [row(step, name, 8) for step in (0, 4) for name in ("m.0.q", "m.1.q", "m.0.v")]
    found = ranks_over_steps(rows, [decision(1, "m.1.q", 6), decision(4, "m.0.v", 0)])
    # What is measured wins over what was said before.
    assert found.layers == [("q", "0"), ("q", "1"), ("v", "0")]
    assert found.steps == [0, 2, 4, 5]
    assert np.array_equal(found.ranks, [[8, 8, 8, 8], [8, 6, 8, 8], [8, 8, 8, 0]])
    assert found.moves


def test_what_is_not_known_yet_is_no_move() -> None:
    found = ranks_over_steps([row(0, "m.0.q", 4), row(3, "m.1.q", 4)], [])
    assert np.array_equal(found.ranks, [[4, 4], [np.nan, 4]], equal_nan=True)
    assert not found.moves


def test_each_run_is_a_panel_with_its_score_in_one_scale_and_one_order_of_layers() -> None:
    falls = ranks_over_steps([row(0, "m.0.q_proj", 8)], [decision(2, "m.0.q_proj", 2)])
    names = ("m.10.q_proj", "m.2.q_proj", "m.0.q_proj", "m.2.up")
    ranks = {name: 5 if name.endswith("up") else 4 for name in names}
    stays = ranks_over_steps([row(s, name, r) for s in (0, 6) for name, r in ranks.items()], [])
    one = ranks_over_steps([row(0, "m.0.q_proj", 64)], [])  # of one rank: not drawn
    runs = {"falls": falls, "one": one, "stays": stays}
    figure = draw_ranks_over_steps(runs, {"falls": "test/loss 1.2"})
    first, second, bar = figure.axes
    assert (first.get_title(), second.get_title()) == ("falls\ntest/loss 1.2", "stays")
    gone = np.nan
    expected = [[8, 2], [gone, gone], [gone, gone], [gone, gone]], [[4, 4]] * 3 + [[5, 5]]
    for ax, values in zip((first, second), expected, strict=True):
        mesh = ax.collections[0]
        assert np.array_equal(mesh.get_array().filled(np.nan), values, equal_nan=True)
        assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 8)
        assert ax.get_yticks().tolist() == [1.5, 3.5]  # the middle of q's three, and up's one
        assert ax.get_ylim() == (4, 0)
    assert [label.get_text() for label in first.get_yticklabels()] == ["q", "up"]
    assert bar.get_xlabel() == "rank (of one seed)"


def test_a_comparison_in_which_no_rank_moves_has_no_such_picture() -> None:
    stays = ranks_over_steps([row(0, "m.0.q", 4)], [])
    with pytest.raises(NothingToDraw, match="no run's ranks move"):
        draw_ranks_over_steps({"stays": stays}, {})
