from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_peft.reports import draw_importance, save_importance

Row = dict[str, Any]


def rows_for(steps: list[int], layers: int = 3, scale: float = 1.0) -> list[Row]:
    rng, rows = np.random.default_rng(0), []
    for step in steps:
        for kind, count in (("q_proj", layers), ("lm_head", 1)):
            values = scale * rng.random(count)
            for i, value in enumerate(values):
                name = f"model.layers.{i}.self_attn.{kind}" if count > 1 else kind
                total = values.sum() or 1.0
                row = {"importance": value, "share": value / total, "measure": "output"}
                rows.append({"step": step, "layer": name, "kind": kind, "rank": 8 - i, **row})
    return rows


def axes_of(figure: Any) -> list[Any]:
    return [ax for part in figure.subfigs for ax in part.axes]


def artist(figure: Any, gid: str) -> Any:
    found = [a for ax in axes_of(figure) for a in ax.get_children() if a.get_gid() == gid]
    assert len(found) == 1, gid
    return found[0]


def panel(figure: Any, title: str) -> Any:
    return next(ax for ax in axes_of(figure) if ax.get_title() == title)


def decision(step: int, layer: int, event: str, rank: int) -> Row:
    name = f"model.layers.{layer}.self_attn.q_proj"
    return {"step": step, "layer": name, "event": event, "rank": rank}


def test_colours_are_the_shares_and_numbers_are_the_ranks() -> None:
    rows = rows_for([0, 50, 100])
    figure = draw_importance(rows, [], "LoRA")
    shares = [
        [r["share"] for r in rows if r["layer"].endswith(f".{i}.self_attn.q_proj")]
        for i in range(3)
    ]
    mesh = artist(figure, "share:q_proj")
    assert np.allclose(mesh.get_array(), shares)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 50, 100, 150]
    assert [t.get_text() for t in panel(figure, "q_proj").get_yticklabels()] == ["0", "1", "2"]
    ranks = artist(figure, "rank").get_array()
    assert ranks[:3, 0].tolist() == [8, 7, 6]
    assert ranks[3, 1] == 8
    assert ranks.mask[3, 0]
    assert "LoRA" in figure.get_suptitle()


def test_removals_are_marked_at_their_step_and_layer_and_give_the_final_rank() -> None:
    decisions = [decision(10, 2, "removed", 5), decision(60, 0, "removed", 4)]
    figure = draw_importance(rows_for([0, 50]), decisions, "PrunedLoRA")
    marks = artist(figure, "removed:q_proj")
    assert marks.get_offsets().tolist() == [[10, 2], [60, 0]]
    ax = panel(figure, "q_proj")
    assert ax.get_xlim()[1] >= 60
    # The removal at step 10 is older than the rank measured at 50, the one at 60 is newer.
    assert artist(figure, "rank").get_array()[:3, 0].tolist() == [4, 7, 6]


def test_roles_stand_beside_their_layers() -> None:
    figure = draw_importance(rows_for([0]), [decision(0, 1, "shared", 7)], "LoRADrop")
    texts = {t.get_position()[1]: t.get_text() for t in panel(figure, "q_proj").texts}
    assert texts == {0: "kept", 1: "shared", 2: "kept"}
    cells = [t.get_text() for t in panel(figure, "rank at the end (s: shared)").texts]
    assert "7s" in cells


def test_a_layer_without_adapter_is_a_hatched_row_in_its_place() -> None:
    rows = [r for r in rows_for([0, 50]) if ".1." not in r["layer"]]
    figure = draw_importance(rows, [decision(0, 1, "removed", 0)], "LoRADrop")
    shares = artist(figure, "share:q_proj").get_array()
    assert shares.mask.all(axis=1).tolist() == [False, True, False]
    ax = panel(figure, "q_proj")
    assert [t.get_text() for t in ax.texts] == ["kept", "removed", "kept"]
    hatched = [c for c in ax.collections if c.get_hatch()]
    assert len(hatched) == 1
    assert hatched[0].get_paths()[0].get_extents().y0 == 0.5
    assert artist(figure, "rank").get_array()[1, 0] == 0


@pytest.mark.parametrize(
    ("steps", "layers", "scale"), [([0], 3, 0.0), ([7], 3, 1.0), ([0, 3, 50], 100, 1.0)]
)
def test_edge_cases_are_drawn(tmp_path: Path, steps: list[int], layers: int, scale: float) -> None:
    lines = ["step,layer,kind,rank,importance,share,measure"]
    lines += [",".join(map(str, row.values())) for row in rows_for(steps, layers, scale)]
    (tmp_path / "importance.csv").write_text("\n".join(lines) + "\n")
    assert save_importance(tmp_path).stat().st_size > 5_000


def test_names_tell_layers_apart_that_have_kind_and_number_in_common() -> None:
    names = ["enc.0.attention.output.dense", "enc.0.output.dense", "enc.1.attention.output.dense"]
    rows = [
        {
            **{"step": 0, "layer": n, "kind": "dense", "rank": 2},
            **{"importance": 1.0, "share": 1 / 3, "measure": "output"},
        }
        for n in names
    ]
    labels = [t.get_text() for t in panel(draw_importance(rows, [], ""), "dense").get_yticklabels()]
    assert sorted(labels) == ["0.attention.output", "0.output", "1.attention.output"]


def test_nothing_to_draw_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"importance\.csv.*LayerImportance"):
        save_importance(tmp_path)
    (tmp_path / "importance.csv").write_text("step,layer,kind,rank,importance,share\n")
    with pytest.raises(ValueError, match="no rows yet"):
        save_importance(tmp_path)
