"""Draws the house: which package of lightning_peft stands on which.

    python scripts/draw_house.py        # writes docs/images/house.png

The bands are the layers of the contract "layers" in pyproject.toml, which import-linter checks; the
boxes and arrows are read from the source. An arrow is left out where others lead the same way, and
to the lowest layer, which all others use. One that does not point downward is red, and the script
then ends with 1.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.path import Path as Line

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # import-linter brings it along

ROOT = Path(__file__).parents[1]
PACKAGE = "lightning_peft"

Layers = Sequence[Sequence[str]]
Arrow = tuple[str, str]
Point = tuple[float, float]


# What stands in the source.


@dataclass(frozen=True)
class Box:
    """One package, or one file beside the packages.

    Attributes:
        files: How many files of Python it has.
        lines: How many lines these have.
    """

    files: int
    lines: int


def read_layers(pyproject: Path) -> list[list[str]]:
    """The layers of import-linter's contract, from the top down, and the packages of each.

    Args:
        pyproject: The file with the contract.
    """
    contracts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers = next(c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def read_boxes(folder: Path) -> dict[str, Box]:
    """Every package and file directly in a package's folder, but ``__init__`` and ``__main__``."""
    files: dict[str, list[int]] = {}
    for name, path in _files(folder):
        files.setdefault(name, []).append(len(path.read_text(encoding="utf-8").splitlines()))
    return {name: Box(len(lines), sum(lines)) for name, lines in files.items()}


def read_arrows(folder: Path) -> Counter[Arrow]:
    """How many import statements of each box name another one, also inside functions."""
    found: Counter[Arrow] = Counter()
    boxes = {name for name, _ in _files(folder)}
    for name, path in _files(folder):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found.update((name, other) for other in _named(node, folder.name) & boxes - {name})
    return found


def _files(folder: Path) -> Iterator[tuple[str, Path]]:
    """Name of the box and path of every source file."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).with_suffix("").parts[0]
        if not name.startswith("__"):
            yield name, path


def _named(node: ast.AST, package: str) -> set[str]:
    """What an import statement names directly under a package; the sources import absolutely."""
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        modules = [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [module.split(".") for module in modules]
    return {part[1] for part in parts if part[0] == package and len(part) > 1}


# What follows from it.


def upward(arrows: Mapping[Arrow, int], layers: Layers) -> list[Arrow]:
    """Arrows that do not point to a lower layer."""
    level = {name: i for i, layer in enumerate(layers) for name in layer}
    return sorted((a, b) for a, b in arrows if level[a] >= level[b])


def drawn(arrows: Mapping[Arrow, int], layers: Layers) -> list[Arrow]:
    """The downward arrows that no path over lower layers implies, but for those to the ground.

    Args:
        arrows: Between boxes.
        layers: Of all boxes, from the top down.
    """
    wrong, ground = set(upward(arrows, layers)), set(layers[-1])
    down = {(a, b) for a, b in arrows if (a, b) not in wrong and b not in ground}
    reach: dict[str, set[str]] = {}
    for name in [name for layer in reversed(layers) for name in layer]:
        direct = {b for a, b in down if a == name}
        reach[name] = direct.union(*(reach[b] for b in direct))
    return sorted((a, b) for a, b in down if not any(b in reach[c] for x, c in down if x == a))


# The picture.

WIDTH, HEIGHT, AIR = 15.0, 0.52, 0.45  # of the bands and the boxes, and between bands
GAP = 1.4  # between boxes, at most
LINES = 8.2 / 6000  # inches of a box's width for each line of its source
NARROWEST = 1.25
BAND, FILL, EDGE, ARROW, WRONG = "#f4f6f8", "#dbe7f3", "#4a6f96", "#9aa3ad", "#c62828"


@dataclass
class Place:
    """Where a box stands.

    Attributes:
        x: Its middle, in inches from the left.
        width: In inches.
        band: Its layer, 0 at the top.
    """

    x: float
    width: float
    band: int

    @property
    def top(self) -> float:
        """Height of its upper edge."""
        return -self.band * (HEIGHT + AIR)

    @property
    def bottom(self) -> float:
        """Height of its lower edge."""
        return self.top - HEIGHT


def arrange(boxes: Mapping[str, Box], layers: Layers, arrows: Sequence[Arrow]) -> dict[str, Place]:
    """Place the boxes of each layer side by side, near those that import them.

    Args:
        boxes: By name.
        layers: From the top down.
        arrows: That are drawn.
    """
    places: dict[str, Place] = {}
    for band, layer in enumerate(layers):
        names = [name for name in layer if name in boxes]
        above = {n: [places[a].x for a, b in arrows if b == n and a in places] for n in names}
        names.sort(key=lambda n: sum(above[n]) / len(above[n]) if above[n] else WIDTH / 2)
        widths = [max(NARROWEST, LINES * boxes[name].lines) for name in names]
        gap = min(GAP, (WIDTH - sum(widths)) / (len(names) + 1))
        left = (WIDTH - sum(widths) - gap * (len(names) - 1)) / 2
        for name, width in zip(names, widths, strict=True):
            places[name] = Place(left + width / 2, width, band)
            left += width + gap
    return places


def route(arrow: Arrow, ends: Point, places: Mapping[str, Place], taken: set[Point]) -> list[Point]:
    """Where an arrow runs: down from its box, past the boxes of each band between, to its target.

    Args:
        arrow: From and to.
        ends: Where it leaves and where it arrives, from the left.
        places: Of all boxes.
        taken: Places in bands that earlier arrows pass; this one's are added.
    """
    start, end = places[arrow[0]], places[arrow[1]]
    points = [(ends[0], start.bottom)]
    for band in range(start.band + 1, end.band):
        there = [p for p in places.values() if p.band == band]
        done = (band - start.band) / (end.band - start.band)
        wanted = points[-1][0] + (ends[1] - points[-1][0]) * min(1.0, done + 0.25)
        free = [0.1 * i for i in range(1, int(10 * WIDTH))]
        free = [x for x in free if all(abs(x - p.x) > p.width / 2 + 0.08 for p in there)]
        free = [x for x in free if (round(x, 1), band) not in taken]
        x = min(free, key=lambda place: abs(place - wanted))
        taken.add((round(x, 1), band))
        points += [(x, there[0].top), (x, there[0].bottom)]
    return [*points, (ends[1], end.top)]


def spread(arrows: Sequence[Arrow], places: Mapping[str, Place]) -> dict[Arrow, Point]:
    """Where each arrow leaves and arrives: side by side, in the order in which they come."""
    found: dict[Arrow, list[float]] = {arrow: [0.0, 0.0] for arrow in arrows}
    for side in (0, 1):
        for name, place in places.items():
            own = [arrow for arrow in arrows if arrow[side] == name]
            own.sort(key=lambda arrow: places[arrow[1 - side]].x)
            for i, arrow in enumerate(own):
                share = (i + 1) / (len(own) + 1) - 0.5
                found[arrow][side] = place.x + share * min(place.width, 0.5 * (len(own) + 1))
    return {arrow: (leaves, arrives) for arrow, (leaves, arrives) in found.items()}


def curve(points: Sequence[Point]) -> Line:
    """A smooth line: straight through a band, and swinging between two."""
    vertices, codes = [points[0]], [Line.MOVETO]
    for (x, y), (to_x, to_y) in zip(points[::2], points[1::2], strict=True):
        middle = (y + to_y) / 2
        if (x, y) != vertices[-1]:
            vertices.append((x, y))
            codes.append(Line.LINETO)
        vertices += [(x, middle), (to_x, middle), (to_x, to_y)]
        codes += [Line.CURVE4] * 3
    return Line(vertices, codes)


def draw(boxes: Mapping[str, Box], arrows: Mapping[Arrow, int], layers: Layers) -> Figure:
    """Draw the house.

    Args:
        boxes: By name.
        arrows: Between boxes.
        layers: From the top down.
    """
    kept, wrong = drawn(arrows, layers), upward(arrows, layers)
    places = arrange(boxes, layers, kept)
    low = -len(layers) * (HEIGHT + AIR)
    figure = Figure(figsize=(WIDTH, 0.35 - low))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, WIDTH), ylim=(low, 0.35))
    ax.set_axis_off()
    for band in range(len(layers)):
        place = Place(0, 0, band)
        across = (0.1, place.bottom - 0.1), WIDTH - 0.2, HEIGHT + 0.2
        ax.add_patch(Rectangle(*across, facecolor=BAND, edgecolor="none", zorder=0))
    taken: set[Point] = set()
    ends = spread(kept, places)
    for arrow in sorted(kept, key=lambda a: places[a[1]].band - places[a[0]].band):
        _add_arrow(ax, arrow, curve(route(arrow, ends[arrow], places, taken)), ARROW)
    for a, b in wrong:
        up = Line([(places[a].x, places[a].top), (places[b].x, places[b].bottom)])
        _add_arrow(ax, (a, b), up, WRONG)
    for name, place in places.items():
        _add_box(ax, name, boxes[name], place)
    note = f"{PACKAGE}: a box is as wide as its source is long; arrows say what imports what"
    note += ", but for those that others imply and those to the lowest layer"
    ax.text(0.15, 0.2, note, fontsize=9, color="#555555")
    return figure


def _add_arrow(ax: Any, arrow: Arrow, line: Line, colour: str) -> None:
    width = 1.8 if colour == WRONG else 0.9
    patch = FancyArrowPatch(
        path=line, arrowstyle="-|>", mutation_scale=9, color=colour, lw=width, zorder=1
    )
    patch.set(facecolor=colour, gid=" -> ".join(arrow))
    ax.add_patch(patch)


def _add_box(ax: Any, name: str, box: Box, place: Place) -> None:
    corner = (place.x - place.width / 2 + 0.06, place.bottom + 0.06)
    size = (place.width - 0.12, HEIGHT - 0.12)
    colours: dict[str, Any] = {"facecolor": FILL, "edgecolor": EDGE}
    ax.add_patch(FancyBboxPatch(corner, *size, "round,pad=0.06", zorder=2, gid=name, **colours))
    middle: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 3}
    ax.text(place.x, place.top - 0.19, name, fontsize=10.5, fontweight="bold", **middle)
    files = f"{box.files} files, " if box.files > 1 else ""
    ax.text(place.x, place.top - 0.38, f"{files}{box.lines:,} lines", fontsize=7.5, **middle)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the house, and say which imports do not point downward."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--root", type=Path, default=ROOT, help="the repository")
    parser.add_argument("--output", type=Path, help="docs/images/house.png by default")
    options = parser.parse_args(arguments)
    layers = read_layers(options.root / "pyproject.toml")
    boxes, arrows = read_boxes(options.root / PACKAGE), read_arrows(options.root / PACKAGE)
    homeless = sorted(boxes.keys() - {name for layer in layers for name in layer})
    if homeless:
        print(f"in no layer of pyproject.toml: {', '.join(homeless)}")
        return 1
    output = options.output or options.root / "docs" / "images" / "house.png"
    output.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(draw(boxes, arrows, layers)).print_figure(output, dpi=130)
    wrong = upward(arrows, layers)
    for a, b in wrong:
        print(f"{a} imports {b}, which does not stand below it ({arrows[a, b]} imports)")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
