"""How things are measured: side by side, interleaved, in one process, with their spread.

Timings of two programs that ran at different times differ by what else the machine did. Here all
cases of a comparison take turns, once in each round, in an order that is drawn anew for each, and
what is reported is the median over rounds of ratios *within* a round.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import random
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "lightning", "lightning-peft")

# Of the wall's time with several threads: what others may take of it, and how often to try.
DISTURBED, TRIES = 0.1, 4

Case = Callable[[], Any]
Seconds = dict[str, list[float]]


def clock() -> float:
    """Seconds: of the wall on a GPU or with several threads, else of the processor.

    With one thread on a CPU the processor's time is what the step takes on a machine that does
    nothing else, however busy this one is.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def others() -> float:
    """Seconds of all processors that went to others than this process, so far; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def timed(case: Case) -> float:
    """Seconds of a case; by the wall's clock again where others have used the processors."""
    took = 0.0
    for _ in range(TRIES):
        busy, begin = others(), clock()
        case()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            return clock() - begin
        took = clock() - begin
        if torch.get_num_threads() == 1 or others() - busy < DISTURBED * took:
            break
    return took


def interleave(cases: Mapping[str, Case], rounds: int, warmup: int = 2, seed: int = 0) -> Seconds:
    """Time every case once in each round.

    Args:
        cases: What to time, by name.
        rounds: How many times each is timed.
        warmup: Rounds before, not counted.
        seed: Of the orders.

    Returns:
        Seconds of every round, by case; see :func:`clock`.
    """
    seconds: Seconds = {name: [] for name in cases}
    order = list(cases)
    shuffle = random.Random(seed).shuffle
    for i in range(warmup + rounds):
        shuffle(order)
        for name in order:
            took = timed(cases[name])
            if i >= warmup:
                seconds[name].append(took)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles.

    Args:
        values: At least one.
    """
    if len(values) < 2:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


def ratio(seconds: Seconds, case: str, to: str) -> dict[str, float]:
    """Spread of the ratio of two cases, taken within each round."""
    return spread([a / b for a, b in zip(seconds[case], seconds[to], strict=True)])


def overhead_ratio(seconds: Seconds, case: str, to: str, floor: str) -> float:
    """What one case adds to the floor, over what another adds: medians of differences in a round.

    The quotient is taken last, since a small difference in a single round may have any sign.
    """
    above = [
        statistics.median(s - f for s, f in zip(seconds[name], seconds[floor], strict=True))
        for name in (case, to)
    ]
    return above[0] / above[1]


def tensor_peak(case: Case) -> int:
    """The most bytes of tensors that were alive at once beyond those alive before.

    On a GPU the allocator says so; on a CPU every allocation and release of the allocator is
    recorded and added up, temporary ones inside operators too.

    Args:
        case: What to run, once.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        case()
        return torch.cuda.max_memory_allocated() - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case()
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    alive = peak = 0
    for _, change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def process_peak() -> float:
    """The most memory that this process held so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> dict[str, Any]:
    """Where and with what the figures came about."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models[0].split(":", 1)[1].strip() if models else cpu
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
    }


def row(name: str, got: float | None, target: float | None = None, **more: Any) -> dict[str, Any]:
    """One line of a table.

    Args:
        name: What was measured.
        got: The figure.
        target: What it should be at most (or, with ``at_least=True``, at least); None where it is
            only reported.
        more: Spread, unit, and whatever else belongs to it.
    """
    met = None
    if target is not None and got is not None:
        met = got >= target if more.get("at_least") else got <= target
    return {"name": name, "got": got, "target": target, "met": met, **more}


def save(section: str, rows: list[dict[str, Any]], folder: Path = RESULTS, **more: Any) -> Path:
    """Write a section's rows with the machine they came from.

    Args:
        section: Name of the file; with several threads their number is part of it.
        rows: What :func:`row` made.
        folder: Where to.
        more: Raw timings, shapes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    path = folder / f"{section if threads == 1 else f'{section}-{threads}-threads'}.json"
    text = json.dumps({"section": section, "machine": machine(), "rows": rows, **more}, indent=1)
    path.write_text(text + "\n")
    return path
