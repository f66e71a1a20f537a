"""What all pictures share."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightning_peft.reports.figures import (
    colour_bar,
    label_rows,
    root_scale,
    save_figure,
    shared_panels,
)


@pytest.mark.parametrize(
    ("count", "places", "size", "lowest"),
    [
        (1, 1, (3.0, 2.5), [0]),
        (5, 5, (11.0, 2.5), [0, 1, 2, 3, 4]),
        (7, 10, (11.0, 4.5), [2, 3, 4, 5, 6]),
    ],
)
def test_panels_stand_five_in_a_line_and_spare_places_are_hidden(
    count: int, places: int, size: tuple[float, float], lowest: list[int]
) -> None:
    figure, axes = shared_panels(count, panel=(2.0, 2.0), margin=(1.0, 0.5))
    assert len(axes) == places
    assert tuple(figure.get_size_inches()) == size
    assert [ax.axison for ax in axes] == [True] * count + [False] * (places - count)
    shown = [i for i, ax in enumerate(axes[:count]) if ax.xaxis.get_tick_params()["labelbottom"]]
    assert shown == lowest
    axes[0].set_xlim(0, 3)
    assert {ax.get_xlim() for ax in axes} == {(0, 3)}


def test_panels_have_a_least_width() -> None:
    figure, _ = shared_panels(1, panel=(2.0, 2.0), margin=(0.5, 0.5), narrowest=5.0)
    assert figure.get_size_inches()[0] == 5.5


@pytest.mark.parametrize(("rows", "every"), [(3, 1), (40, 1), (41, 2), (100, 3)])
def test_at_most_forty_rows_are_labelled(rows: int, every: int) -> None:
    ax = Figure().subplots()
    label_rows(ax, [f"r{i}" for i in range(rows)])
    assert list(ax.get_yticks()) == list(range(0, rows, every))
    assert ax.get_yticklabels()[-1].get_text() == f"r{(rows - 1) // every * every}"


def test_colours_go_by_the_root() -> None:
    assert root_scale(4.0)([0.0, 1.0, 4.0]).tolist() == [0.0, 0.5, 1.0]


def test_a_bar_tells_what_the_colours_are() -> None:
    figure = Figure()
    ax = figure.subplots()
    mesh = ax.imshow([[0.0, 2.0]], norm=root_scale(2.0))
    colour_bar(figure, mesh, [ax], "share", shrink=0.5, numbers=6)
    assert figure.axes[1].get_xlabel() == "share"
    assert figure.axes[1].get_xlim() == (0.0, 2.0)


def test_a_picture_is_written_whole(tmp_path: Path) -> None:
    path = save_figure(Figure(figsize=(1, 1)), tmp_path / "a.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [found.name for found in tmp_path.iterdir()] == ["a.png"]
