"""The pictures of the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Section = dict[str, Any]
OWN, PEERS, ALONE = "tab:blue", "tab:orange", "tab:grey"
_LABELS = {
    "r": "rank",
    "layers": "layers",
    "tokens": "tokens in a row (4 rows)",
    "vocabulary": "vocabulary",
}


def _figure(rows: int, columns: int, size: tuple[float, float], **more: Any) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, layout="constrained", **more)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def steps(section: Section, path: Path) -> None:
    """Time above the floor and peak memory, one bar for each case."""
    rows = [r for r in section["rows"] if r["name"].endswith("/ floor") and "memory" in r][1:]
    names = [r["name"].removesuffix(" / floor") for r in rows]
    figure, (time, memory) = _figure(1, 2, (10, 0.8 + 0.27 * len(rows)), sharey=True)
    colours = [_colour(name) for name in names]
    spread = [[r["got"] - r["low"] for r in rows], [r["high"] - r["got"] for r in rows]]
    time.barh(names, [r["got"] - 1 for r in rows], color=colours, xerr=spread)
    time.invert_yaxis()
    time.set_xlim(left=0)
    time.set_xlabel("time above the floor, in steps of the frozen model")
    memory.barh(names, [r["memory"] for r in rows], color=colours)
    memory.axvline(1, color="black", linewidth=0.8)
    memory.set_xlabel("peak memory of a step, in that of the frozen model")
    for axes in (time, memory):
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
    _save(figure, path)


def _colour(name: str) -> str:
    if name.startswith(("PEFT", "galore_torch")):
        return PEERS
    return ALONE if name == "full fine-tuning" else OWN


def growth(section: Section, path: Path) -> None:
    """Time and peak memory along each axis."""
    axes_of = list(dict.fromkeys(r["axis"] for r in section["rows"]))
    figure, grid = _figure(2, len(axes_of), (11, 5.6), sharex="col")
    cases = dict.fromkeys(r["case"] for r in section["rows"])
    styles = {"LoRA": (OWN, "o", "-"), "PEFT LoRA": (PEERS, "s", "--")}
    for column, axis in enumerate(axes_of):
        time, memory = grid[0][column], grid[1][column]
        for case in cases:
            rows = [r for r in section["rows"] if r["axis"] == axis and r["case"] == case]
            if not rows:
                continue
            colour, marker, line = styles.get(case, ("tab:green", "^", ":"))
            style = {"color": colour, "marker": marker, "linestyle": line, "markersize": 4}
            values = [r["value"] for r in rows]
            time.plot(values, [r["got"] for r in rows], label=case, **style)
            memory.plot(values, [r["peak_bytes"] / 2**20 for r in rows], label=case, **style)
        ticks = sorted({r["value"] for r in section["rows"] if r["axis"] == axis})
        for axes in (time, memory):
            axes.set_xscale("log", base=2)
            axes.grid(alpha=0.3)
        time.axhline(1, color="black", linewidth=0.8)
        memory.set_ylim(0, 1.05 * memory.get_ylim()[1])
        memory.yaxis.set_major_formatter("{x:,.0f}")
        memory.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        memory.minorticks_off()
        memory.set_xlabel(_LABELS[axis])
    grid[0][0].set_ylabel("step, in steps\nof the frozen model")
    grid[1][0].set_ylabel("peak memory of a step,\nMiB beyond the weights")
    handles = grid[0][-1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=len(cases))
    _save(figure, path)


def life(section: Section, path: Path) -> None:
    """Each step of PrunedLoRA's life, and the rank that falls."""
    whole = section["life"]
    first = sorted(whole["seconds"][1:10])[4]
    times = [s / first for s in whole["seconds"]]
    figure, axes = _figure(1, 1, (8, 3.2))
    axes.plot(times, ".", color=OWN, markersize=4, label="step (left)")
    ends = section["seconds"]
    plain = [name for name in ends if name.startswith("LoRA r")]
    # Where no step is: the lower rank's at the beginning, the higher one's at the end.
    for name, x, side in zip(plain, (0, len(times)), ("left", "right"), strict=True):
        at = sorted(ends[name])[len(ends[name]) // 2] / first
        axes.axhline(at, color=ALONE, linewidth=0.8)
        axes.annotate(name, (x, at), textcoords="offset points", xytext=(0, 3), ha=side)
    axes.set_ylim(bottom=0, top=1.15 * max(sorted(times)[: -len(times) // 50 or None]))
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("step, in the first steps' time")
    right = axes.twinx()
    right.step(range(len(times)), whole["ranks"], where="mid", color=PEERS, label="rank (right)")
    right.set_ylim(bottom=0)
    right.set_ylabel("rank")
    handles, names = axes.get_legend_handles_labels()
    more, more_names = right.get_legend_handles_labels()
    axes.legend(handles + more, names + more_names, loc="lower left")
    _save(figure, path)


# By section.
DRAWN: dict[str, Callable[[Section, Path], None]] = {
    "steps": steps,
    "others": steps,
    "growth": growth,
    "pruned": life,
}
