"""The page of results: tables and plots from what the sections saved."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pictures

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
TITLES = {
    "steps": "Training steps",
    "lora": "LoRA and PEFT's, more rounds",
    "others": "The other strategies",
    "growth": "Growth",
    "pruned": "PrunedLoRA over its life",
    "loradrop": "LoRA-drop at half the parameters",
    "importance": "The importance callback",
    "loss": "The loss at a large vocabulary",
    "packing": "Packing",
    "optimizer": "The optimizer's step",
    "startup": "Start-up",
    "inference": "Evaluation and generation",
    "life": "Attaching, saving, loading",
}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write(folder: Path, target: Path = PAGE) -> None:
    """Put tables and plots into the page, between its two marks; the text around them stays.

    Args:
        folder: Of the sections' files.
        target: The page.
    """
    parts = []
    for name, file, title in _sections(folder):
        section = json.loads(file.read_text())
        parts.append(f"### {title}\n\n{_machine(section['machine'])}\n\n{_table(section)}")
        if name in pictures.DRAWN:
            picture = target.parent / "images" / f"speed_{file.stem.replace('-', '_')}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            pictures.DRAWN[name](section, picture)
            parts.append(f"![{title}](images/{picture.name})")
    text = target.read_text() if target.is_file() else f"# Speed\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    target.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}")


def _sections(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Name, file and title of what was measured; one for each number of threads."""
    for name, title in TITLES.items():
        if (file := folder / f"{name}.json").is_file():
            yield name, file, title
        for file in sorted(folder.glob(f"{name}-*-threads.json")):
            yield name, file, f"{title}, {file.stem.split('-')[1]} threads"


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "transformers", "peft"))
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    return f"{machine['date']}, {where}; {versions}."


def _table(section: dict[str, Any]) -> str:
    peaks = any("memory" in row for row in section["rows"])
    names = ["measured", "got", "quartiles", *(["peak memory"] if peaks else []), "target", ""]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in section["rows"]:
        quartiles = f"{_number(row['low'])} – {_number(row['high'])}" if "low" in row else ""
        target, sign = row["target"], "≥" if row.get("at_least") else "≤"
        aim = "" if target is None else f"{sign} {_number(target)}"
        verdict = {None: "", True: "met", False: "**not met**"}[row["met"]]
        peak = [_number(row["memory"]) if "memory" in row else ""] if peaks else []
        cells = [row["name"], _number(row["got"]), quartiles, *peak, aim, verdict]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return (
        f"{value:.1e}"
        if 0 < abs(value) < 1e-3
        else f"{value:,.0f}"
        if value > 100
        else f"{value:.3f}"
    )
