"""The house is drawn from the imports, and nothing in it points upward."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import draw_house  # noqa: E402

LAYERS = [["top"], ["left", "right"], ["middle"], ["errors"]]
SOURCES = {
    "__init__.py": "from lightning_peft.top import main\n",
    "top.py": "import lightning_peft.left.a\nfrom lightning_peft import middle, right\n",
    "left/__init__.py": "",
    "left/a.py": "import torch\n\ndef f():\n    from lightning_peft.middle import x, y\n",
    "left/b.py": "from lightning_peft.left.a import f\nfrom lightning_peft.errors import E\n",
    "right/__init__.py": "from lightning_peft.middle import x\n",
    "middle.py": "from lightning_peft.errors import E\n",
    "errors.py": "class E: ...\n",
}


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A small repository with a contract."""
    for name, text in SOURCES.items():
        path = tmp_path / "lightning_peft" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "pyproject.toml").write_text(
        '[[tool.importlinter.contracts]]\ntype = "layers"\n'
        'layers = ["top", "left | right", "middle", "errors"]\n'
    )
    return tmp_path


def test_layers_are_those_of_the_contract(house: Path) -> None:
    assert draw_house.read_layers(house / "pyproject.toml") == LAYERS


def test_boxes_have_the_files_and_lines_of_their_source(house: Path) -> None:
    boxes = draw_house.read_boxes(house / "lightning_peft")
    assert {name: (box.files, box.lines) for name, box in boxes.items()} == {
        "top": (1, 2),
        "left": (3, 6),
        "right": (1, 1),
        "middle": (1, 1),
        "errors": (1, 1),
    }


def test_arrows_are_the_imports_also_those_in_functions(house: Path) -> None:
    assert draw_house.read_arrows(house / "lightning_peft") == Counter(
        {
            ("top", "left"): 1,
            ("top", "middle"): 1,
            ("top", "right"): 1,
            ("left", "middle"): 1,
            ("left", "errors"): 1,
            ("right", "middle"): 1,
            ("middle", "errors"): 1,
        }
    )


def test_an_arrow_that_others_imply_or_that_leads_to_the_ground_is_not_drawn(house: Path) -> None:
    arrows = draw_house.read_arrows(house / "lightning_peft")
    assert draw_house.drawn(arrows, LAYERS) == [
        ("left", "middle"),
        ("right", "middle"),
        ("top", "left"),
        ("top", "right"),
    ]


def test_only_a_lower_layer_may_be_imported() -> None:
    arrows = {("top", "left"): 1, ("left", "right"): 2, ("errors", "top"): 1}
    assert draw_house.upward(arrows, LAYERS) == [("errors", "top"), ("left", "right")]


def test_boxes_stand_in_their_bands_beside_each_other_and_as_wide_as_they_are_long() -> None:
    boxes = {name: draw_house.Box(1, 10) for layer in LAYERS for name in layer}
    boxes["left"] = draw_house.Box(20, 4000)
    places = draw_house.arrange(boxes, LAYERS, [("top", "left")])
    assert [places[name].band for name in ("top", "left", "right", "errors")] == [0, 1, 1, 3]
    assert places["left"].width == pytest.approx(4000 * draw_house.LINES)
    assert places["top"].width == draw_house.NARROWEST
    left, right = sorted((places["left"], places["right"]), key=lambda place: place.x)
    assert left.x + left.width / 2 < right.x - right.width / 2
    assert places["top"].bottom > places["left"].top


def test_an_arrow_goes_past_the_boxes_between() -> None:
    place = draw_house.Place
    places = {"a": place(5, 2, 0), "b": place(5, 2, 1), "c": place(5, 2, 2)}
    taken: set[tuple[float, float]] = set()
    first = draw_house.route(("a", "c"), (5, 5), places, taken)
    second = draw_house.route(("a", "c"), (5, 5), places, taken)
    assert first[0] == (5, places["a"].bottom)
    assert first[-1] == (5, places["c"].top)
    assert abs(first[1][0] - 5) > 1
    assert first[1] != second[1]


def test_the_picture_has_every_box_and_arrow(house: Path) -> None:
    boxes = draw_house.read_boxes(house / "lightning_peft")
    arrows = draw_house.read_arrows(house / "lightning_peft")
    (ax,) = draw_house.draw(boxes, arrows, LAYERS).axes
    found = {patch.get_gid() for patch in ax.patches} - {None}
    lines = {" -> ".join(arrow) for arrow in draw_house.drawn(arrows, LAYERS)}
    assert found == boxes.keys() | lines
    texts = [text.get_text() for text in ax.texts]
    assert {"left", "3 files, 6 lines", "errors", "1 lines"} <= set(texts)


def test_an_upward_import_is_said_drawn_red_and_ends_with_one(
    house: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--root", str(house), "--output", str(house / "house.png")]
    assert draw_house.main(words) == 0
    assert (house / "house.png").stat().st_size > 10_000
    (house / "lightning_peft/middle.py").write_text("import lightning_peft.top\n")
    assert draw_house.main(words) == 1
    assert capsys.readouterr().out == (
        "middle imports top, which does not stand below it (1 imports)\n"
    )
    arrows = draw_house.read_arrows(house / "lightning_peft")
    boxes = draw_house.read_boxes(house / "lightning_peft")
    (ax,) = draw_house.draw(boxes, arrows, LAYERS).axes
    (red,) = [patch for patch in ax.patches if patch.get_gid() == "middle -> top"]
    assert red.get_linewidth() == 1.8


def test_a_package_in_no_layer_is_named(house: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (house / "lightning_peft/attic.py").write_text("")
    assert draw_house.main(["--root", str(house)]) == 1
    assert capsys.readouterr().out == "in no layer of pyproject.toml: attic\n"


def test_every_package_of_ours_has_its_layer() -> None:
    layers = draw_house.read_layers(ROOT / "pyproject.toml")
    names = [name for layer in layers for name in layer]
    assert sorted(names) == sorted(draw_house.read_boxes(ROOT / "lightning_peft"))


def test_nothing_of_ours_imports_upward() -> None:
    layers = draw_house.read_layers(ROOT / "pyproject.toml")
    assert draw_house.upward(draw_house.read_arrows(ROOT / "lightning_peft"), layers) == []
