"""Whether the layers that matter are the same ones over seeds, tasks and methods.

    python benchmarks/agreement.py small_loradrop_sst2 [NAME ...]

Of the runs that ``benchmarks/pretrained.py`` has packed. Each run's importance at its end is taken
within each kind of layer (‖ΔWx‖² per token, the last step of ``importance.csv``), and runs are
compared by Spearman's rank correlation over layers, averaged over kinds. The interval is a
bootstrap's over seeds: pairs that share a seed are not independent.
"""

from __future__ import annotations

import argparse
import csv
import io
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import spearmanr

RESULTS = Path(__file__).parent / "results" / "pretrained"
DRAWS = 2000
Importance = dict[str, dict[str, float]]


def importance_of(text: str) -> Importance:
    """By kind and layer, the last step of an ``importance.csv`` at which each was measured."""
    found: Importance = defaultdict(dict)
    for row in csv.DictReader(io.StringIO(text)):
        if row["importance"]:
            found[row["kind"]][row["layer"]] = float(row["importance"])
    return dict(found)


def correlation(one: Importance, other: Importance) -> float:
    """Spearman's correlation over layers that both have, averaged over kinds; NaN without any."""
    values = []
    for kind in one.keys() & other.keys():
        layers = sorted(one[kind].keys() & other[kind].keys())
        if len(layers) > 2:
            pair = ([importance[kind][layer] for layer in layers] for importance in (one, other))
            values.append(float(spearmanr(*pair).statistic))
    return float(np.mean(values)) if values else float("nan")


def between_seeds(runs: Mapping[int, Importance]) -> tuple[float, float, float]:
    """The mean correlation of two seeds, and its interval.

    Args:
        runs: By seed.
    """
    return _interval({(a, b): correlation(runs[a], runs[b]) for a, b in _pairs(runs)}, list(runs))


def between_rows(
    one: Mapping[int, Importance], other: Mapping[int, Importance]
) -> tuple[float, float, float]:
    """The mean correlation of two rows at different seeds, and its interval.

    Args:
        one: By seed.
        other: By seed; the same seed is left out, since it has the same start and order of data.
    """
    seeds = sorted(one.keys() & other.keys())
    found = {
        (a, b): (correlation(one[a], other[b]) + correlation(one[b], other[a])) / 2
        for a, b in _pairs(seeds)
    }
    return _interval(found, seeds)


def _pairs(seeds: Iterable[int]) -> list[tuple[int, int]]:
    return list(itertools.combinations(sorted(seeds), 2))


def _interval(pairs: dict[tuple[int, int], float], seeds: list[int]) -> tuple[float, float, float]:
    rng = np.random.default_rng(0)
    means = []
    for _ in range(DRAWS):
        drawn = rng.choice(seeds, len(seeds))
        values = [pairs[a, b] for a, b in _pairs(drawn.tolist()) if a != b]
        if values:
            means.append(np.mean(values))
    low, high = np.quantile(means, (0.025, 0.975))
    return float(np.mean(list(pairs.values()))), float(low), float(high)


def rows_of(name: str) -> dict[str, dict[int, Importance]]:
    """By row, the importance of each seed's tested run in a packed comparison."""
    found: dict[str, dict[int, Importance]] = defaultdict(dict)
    for line in (RESULTS / f"{name}.jsonl").read_text().splitlines():
        run: dict[str, Any] = json.loads(line)
        if run["result"]["status"] == "done" and "importance.csv" in run["files"]:
            row, seed = run["run"].split("/")[0], int(run["run"].rsplit("seed=", 1)[1])
            found[row][seed] = importance_of(run["files"]["importance.csv"])
    return dict(found)


def main() -> None:
    """Print a table of each comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+")
    for name in parser.parse_args().names:
        rows = {row: runs for row, runs in rows_of(name).items() if len(runs) > 2}
        print(f"\n{name}: rank correlation of layers' importance (95 % over seeds)\n")
        print("| row | seeds | between its seeds | with the first row |\n|---|---|---|---|")
        first = next(iter(rows), None)
        for row, runs in rows.items():
            own = "{:.2f} ({:.2f} to {:.2f})".format(*between_seeds(runs))
            other = ""
            if row != first and len(rows[first].keys() & runs.keys()) > 2:  # type: ignore[index]
                other = "{:.2f} ({:.2f} to {:.2f})".format(*between_rows(rows[first], runs))  # type: ignore[index]
            print(f"| {row} | {len(runs)} | {own} | {other} |")


if __name__ == "__main__":
    main()
