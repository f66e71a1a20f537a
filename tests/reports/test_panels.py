"""Single panels of the picture of a run's layers."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from lightning_peft.reports.grids import Grid
from lightning_peft.reports.panels import draw_grid, draw_magnitude, draw_ranks, markers


def grid(kind: str, layers: int = 2, scale: float = 1.0, **more: object) -> Grid:
    names = [f"m.{i}.{kind}" for i in range(layers)]
    share = np.linspace(0.1, 0.9, 2 * layers).reshape(layers, 2)
    values = {
        **{"kind": kind, "layers": names, "labels": [str(i) for i in range(layers)]},
        **{"steps": [0, 10], "share": share, "importance": scale * share},
        **{"ranks": [8 - i for i in range(layers)], "roles": [""] * layers, "marks": {}},
    }
    return Grid(**{**values, **more})  # type: ignore[arg-type]


def test_an_event_has_one_marker_in_all_panels() -> None:
    grids = [grid("q", marks={"removed": [(1, 0)]}), grid("v", marks={"added": [(2, 1)]})]
    found = markers(grids)
    assert list(found) == ["added", "removed"]
    assert len(set(found.values())) == 2
    assert markers([grid("q")]) == {}


def test_a_measurement_stands_until_the_next_and_marks_widen_the_panel() -> None:
    ax = Figure().subplots()
    drawn = grid("q", marks={"removed": [(33, 1)]}, roles=["kept", "removed"])
    mesh = draw_grid(ax, drawn, {"removed": "x"}, top=0.9)
    assert mesh.get_coordinates()[0, :, 0].tolist() == [0, 10, 20]
    assert np.allclose(mesh.get_array(), drawn.share)
    assert mesh.norm.vmax == 0.9
    assert ax.get_xlim() == (0, 33)
    assert [text.get_text() for text in ax.texts] == ["kept", "removed"]


def test_ranks_stand_by_layer_and_kind() -> None:
    ax = Figure().subplots()
    draw_ranks(ax, [grid("q", 3), grid("v", 2, roles=["", "shared"])], row_height=20)
    image = ax.images[0].get_array()
    assert image[:, 0].tolist() == [8, 7, 6]
    assert image[:2, 1].tolist() == [8, 7]
    assert image.mask[2, 1]
    assert [text.get_text() for text in ax.texts] == ["8", "7", "6", "8", "7s"]
    assert ax.get_title() == "rank at the end (s: shared)"


def test_numbers_that_would_be_too_small_give_way_to_a_bar() -> None:
    figure = Figure()
    ax = figure.subplots()
    draw_ranks(ax, [grid("q", 60)], row_height=4)
    assert not ax.texts
    assert figure.axes[1].get_ylabel() == "rank"


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_magnitude_is_the_mean_over_layers_and_zero_is_said(scale: float) -> None:
    ax = Figure().subplots()
    draw_magnitude(ax, [grid("q", scale=scale)], "size")
    (line,) = ax.lines
    if scale:
        assert np.allclose(line.get_ydata(), grid("q").share.mean(0))
        assert ax.get_yscale() == "log"
    else:
        assert np.isnan(line.get_ydata()).all()
        assert [text.get_text() for text in ax.texts] == ["zero so far"]
    assert ax.get_title() == "size, mean over layers"
