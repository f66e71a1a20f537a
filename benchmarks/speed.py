"""Measure everything, side by side, and write the page: ``make bench``.

    python benchmarks/speed.py                  all sections, then docs/speed.md
    python benchmarks/speed.py steps loss       some of them
    python benchmarks/speed.py steps --threads 2
    python benchmarks/speed.py --tiny --folder runs/bench    a shape that takes seconds, for tests

On a CPU one thread computes, and its processor's time is what is reported, so that a busy machine
gives the same figures. Training steps are measured on all cores too, by the wall's clock, which
wants a machine that does nothing else. On a GPU it is the wall's.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

import around
import data_and_loss
import growth
import importance
import page
import pruning
import steps
import strategies
from harness import RESULTS
from models import TINY, Shape

# By name: what measures it, and in how many rounds.
SECTIONS = {
    "steps": (steps.run, 17),
    "lora": (steps.close, 41),
    "startup": (around.startup, 3),
    "loss": (data_and_loss.loss, 2),
    "packing": (data_and_loss.packing, 3),
    "importance": (importance.run, 9),
    "pruned": (pruning.life, 5),
    "loradrop": (pruning.drop, 5),
    "inference": (around.inference, 5),
    "life": (around.life, 3),
    "others": (strategies.run, 5),
    "optimizer": (strategies.optimizers, 9),
    "growth": (growth.run, 3),
}
ON_ALL_CORES = {"steps", "lora"}


def threads_of(section: str, given: int | None) -> list[int]:
    """With how many threads a section is measured."""
    cores = os.cpu_count() or 1
    several = section in ON_ALL_CORES and cores > 1 and not torch.cuda.is_available()
    return [given] if given else [1, cores] if several else [1]


def main() -> None:
    """Run the sections that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--tiny", action="store_true", help="a shape that takes seconds")
    parser.add_argument("--rounds", type=int, help="instead of each section's own")
    parser.add_argument("--threads", type=int, help="instead of each section's own")
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, help="where the page goes; docs/speed.md by default")
    args = parser.parse_args()
    unknown = [name for name in args.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"{unknown[0]} is no section; there are {', '.join(SECTIONS)}")
    for name in args.sections or SECTIONS:
        measure, rounds = SECTIONS[name]
        for threads in threads_of(name, args.threads):
            torch.set_num_threads(threads)
            begin = time.perf_counter()
            measure(TINY if args.tiny else Shape(), args.rounds or rounds, folder=args.folder)
            print(f"{name}: {time.perf_counter() - begin:.0f} s, threads: {threads}", flush=True)
    if not args.tiny or args.page:
        page.write(args.folder, args.page or page.PAGE)


if __name__ == "__main__":
    main()
