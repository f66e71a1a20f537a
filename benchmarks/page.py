"""The page of results: tables and plots from what the sections saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "speed.md"
TITLES = {
    "steps": "Training steps",
    "pruned": "PrunedLoRA over its life",
    "loradrop": "LoRA-drop at half the parameters",
    "importance": "The importance callback",
    "loss": "The loss at a large vocabulary",
    "packing": "Packing",
    "startup": "Start-up",
    "inference": "Evaluation and generation",
    "life": "Attaching, saving, loading",
    "others": "The other strategies",
    "growth": "Growth",
}
BEGIN, END = "<!-- results -->", "<!-- end of results -->"


def write(folder: Path, target: Path = PAGE) -> None:
    """Put tables and plots into the page, between its two marks; the text around them stays.

    Args:
        folder: Of the sections' files.
        target: The page.
    """
    found = {n: json.loads(p.read_text()) for n in TITLES if (p := folder / f"{n}.json").is_file()}
    parts = []
    for name, section in found.items():
        parts.append(f"### {TITLES[name]}\n\n{_machine(section['machine'])}\n\n{_table(section)}")
        if name in ("steps", "growth"):
            picture = target.parent / "images" / f"speed_{name}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            {"steps": _draw_steps, "growth": _draw_growth}[name](section, picture)
            parts.append(f"![{TITLES[name]}](images/{picture.name})")
    text = target.read_text() if target.is_file() else f"# Speed\n\n{BEGIN}\n{END}\n"
    head, _, rest = text.partition(BEGIN)
    tail = rest.partition(END)[2]
    target.write_text(f"{head}{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}{tail}")


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{n} {machine[n]}" for n in ("torch", "transformers", "peft"))
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} thread(s)"
    return f"{machine['date']}, {where}; {versions}."


def _table(section: dict[str, Any]) -> str:
    lines = ["| measured | got | quartiles | target | |", "|---|---|---|---|---|"]
    for row in section["rows"]:
        quartiles = f"{_number(row['low'])} – {_number(row['high'])}" if "low" in row else ""
        target, sign = row["target"], "≥" if row.get("at_least") else "≤"
        aim = "" if target is None else f"{sign} {_number(target)}"
        verdict = {None: "", True: "met", False: "**not met**"}[row["met"]]
        lines.append(f"| {row['name']} | {_number(row['got'])} | {quartiles} | {aim} | {verdict} |")
    return "\n".join(lines)


def _number(value: float) -> str:
    return (
        f"{value:.1e}"
        if 0 < abs(value) < 1e-3
        else f"{value:,.0f}"
        if value > 100
        else f"{value:.3f}"
    )


def _axes(width: float, count: int = 1) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, count, figsize=(width, 3.6), layout="constrained")


def _draw_steps(section: dict[str, Any], path: Path) -> None:
    rows = [r for r in section["rows"] if r["name"].endswith("/ floor")]
    figure, axes = _axes(8)
    names = [r["name"].removesuffix(" / floor") for r in rows]
    colours = [
        "tab:grey"
        if n in ("floor", "full fine-tuning")
        else "tab:orange"
        if n.startswith("PEFT")
        else "tab:blue"
        for n in names
    ]
    spread = [[r["got"] - r["low"] for r in rows], [r["high"] - r["got"] for r in rows]]
    axes.barh(names, [r["got"] for r in rows], color=colours, xerr=spread)
    axes.invert_yaxis()
    axes.set_xlim(0.95)
    axes.set_xlabel("time of a training step, in steps of the frozen model")
    figure.savefig(path, dpi=120)


def _draw_growth(section: dict[str, Any], path: Path) -> None:
    axes_of = list(dict.fromkeys(r["axis"] for r in section["rows"]))
    figure, all_axes = _axes(11, len(axes_of))
    for axes, axis in zip(all_axes, axes_of, strict=True):
        for case in ("LoRA", "PEFT LoRA"):
            rows = [r for r in section["rows"] if r["axis"] == axis and r["case"] == case]
            axes.plot([r["value"] for r in rows], [r["got"] for r in rows], marker="o", label=case)
        axes.set_xscale("log", base=2)
        axes.set_xlabel(axis)
    all_axes[0].set_ylabel("step, in steps of the frozen model")
    all_axes[0].legend()
    figure.savefig(path, dpi=120)
