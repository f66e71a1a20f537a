"""The study's tables, from the runs that are there.

python benchmarks/study_table.py                     the table of the README
python benchmarks/study_table.py --beside FOLDER     differences of two whole studies, and of both
taken together
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from study import RESULTS, ROWS, SEEDS, Key, best_rate, read

from lightning_peft.reports.statistics import bootstrap_interval, is_noise

Runs = dict[int, dict[str, Any]]
# Beside the rows' baselines: what the papers themselves compare.
SCORE, SHARING = "PrunedLoRA gradient", "LoRA-drop T=0.9"
CRITERIA = ("llm_pruner_element1", "llm_pruner_element2", "llm_pruner_taylor2")
CRITERIA += ("wanda", "magnitude", "random", "sparsegpt + its recovery")
PAIRS = [
    (SCORE, "LoRA r=32, stream"),
    *((SCORE, f"PrunedLoRA {criterion}") for criterion in CRITERIA),
    *((f"{SCORE}, {recovery} recovery", SCORE) for recovery in ("gradient", "activation")),
    *((SHARING, f"{SHARING}, {a}") for a in ("without_share", "inverse", "random", "top_k")),
]


def at_best_rate(name: str, done: dict[Key, dict[str, Any]]) -> Runs:
    """A row's runs at its best rate, by seed."""
    rate = best_rate(name, done)
    return {seed: run for (row, r, seed), run in done.items() if (row, r) == (name, rate)}


def gaps(name: str, baseline: str, done: dict[Key, dict[str, Any]]) -> list[float]:
    """Differences in test accuracy of two rows, one for each seed that both have."""
    own, other = at_best_rate(name, done), at_best_rate(baseline, done)
    return [own[s]["test"] - other[s]["test"] for s in SEEDS if s in own and s in other]


def difference(found: list[float], to: str = "") -> str:
    """Mean and interval, the baseline, and whether it may as well be none."""
    low, high = bootstrap_interval(found)
    mark = ", inside the noise" if is_noise((low, high), len(found)) else ""
    return f"{np.mean(found):+.3f} ({low:+.3f} to {high:+.3f}){to and f' to {to}'}{mark}"


def table(done: dict[Key, dict[str, Any]]) -> str:
    """The markdown table."""
    lines = [
        "| row | rate | seeds | test accuracy (95 % interval) | lowest to highest | loss "
        "| difference in accuracy (paired) | parameters at the end | seconds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in ROWS.items():
        runs = list(at_best_rate(name, done).values())
        if not runs:
            continue
        scores = [run["test"] for run in runs]
        low, high = bootstrap_interval(scores)
        gap, baseline = gaps(name, row.baseline, done), row.baseline.split(",")[0]
        told = "baseline" if name == row.baseline or not gap else difference(gap, baseline)
        parameters = np.mean([run["parameters"] for run in runs])
        loss = np.mean([run["test_loss"] for run in runs])
        seconds = np.median([run["cpu_seconds"] for run in runs])
        lines.append(
            f"| {name} | {best_rate(name, done):g} | {len(runs)} | {np.mean(scores):.3f} "
            f"({low:.3f} to {high:.3f}) | {min(scores):.3f} to {max(scores):.3f} | {loss:.2f} "
            f"| {told} | {parameters:,.0f} | {seconds:.1f} |"
        )
    return "\n".join(lines)


def replication(done: dict[Key, dict[str, Any]], other: dict[Key, dict[str, Any]]) -> str:
    """Differences of two studies beside each other, and over the seeds of both."""
    lines = [
        "| row | baseline | first study | second study | both, 20 seeds |",
        "|---|---|---|---|---|",
    ]
    pairs = [(name, row.baseline) for name, row in ROWS.items() if name != row.baseline]
    for name, baseline in pairs + PAIRS:
        first, second = gaps(name, baseline, other), gaps(name, baseline, done)
        if first and second:
            told = (difference(first), difference(second), difference(first + second))
            lines.append(f"| {name} | {baseline} | {' | '.join(told)} |")
    return "\n".join(lines)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--beside", type=Path, help="the results of an earlier study")
    options = parser.parse_args()
    done = read(options.folder)
    print(table(done) if options.beside is None else replication(done, read(options.beside)))


if __name__ == "__main__":
    main()
