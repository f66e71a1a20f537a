"""Training steps that have targets, beside PEFT's equivalent and the floor, in time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from harness import Seconds, interleave, overhead_ratio, ratio, row, save, tensor_peak
from models import Shape, floor, full, ours, peft
from parts import optimizer_step, products

# Of equal steps in one table: ours, what it is held against, and the most that it may take of it.
TARGETS = [
    ("LoRA", "PEFT LoRA", 0.75),
    ("LoRA, dropout 0.05", "PEFT LoRA, dropout 0.05", 0.8),
    ("LoRA, shared dropout 0.05", "PEFT LoRA, dropout 0.05", 0.6),
    ("DropLoRA batch, r = 128", "LoRA, r = 128", 0.7),
    ("DropLoRA step, r = 128", "LoRA, r = 128", 0.7),
    ("DoRA", "PEFT DoRA", 0.75),
]
# The same of peak memory.
MEMORY = [
    ("LoRA", "PEFT LoRA", None),
    ("LoRA, dropout 0.05", "PEFT LoRA, dropout 0.05", 0.8),
    ("LoRA, shared dropout 0.05", "PEFT LoRA, dropout 0.05", None),
    ("DoRA", "PEFT DoRA", None),
]


PRODUCTS, ADAMW = "products with A and B alone", "AdamW alone"
DROPPED = "products and shared dropout's passes alone"


def run(shape: Shape, rounds: int, **folder: Any) -> None:
    """Measure and save ``steps.json``."""
    wide = shape.but(r=4 * shape.r)
    cases = {
        "floor": floor(shape),
        "full fine-tuning": full(shape),
        "LoRA": ours(shape),
        "PEFT LoRA": peft(shape),
        "LoRA, dropout 0.05": ours(shape, lora_dropout=0.05),
        "LoRA, shared dropout 0.05": ours(shape, lora_dropout=0.05, share_dropout=True),
        "PEFT LoRA, dropout 0.05": peft(shape, lora_dropout=0.05),
        "DropLoRA token": ours(shape, "DropLoRA", p=0.5),
        "LoRA, r = 128": ours(wide),
        "DropLoRA batch, r = 128": ours(wide, "DropLoRA", p=0.5, mask="batch"),
        "DropLoRA step, r = 128": ours(wide, "DropLoRA", p=0.5, mask="step"),
        "DoRA": ours(shape, "DoRA"),
        "PEFT DoRA": peft(shape, use_dora=True),
    }
    parts = {
        PRODUCTS: products(shape),
        DROPPED: products(shape, dropout=True),
        ADAMW: optimizer_step(shape),
    }
    seconds = interleave({**cases, **parts}, rounds, warmup=1)
    memory = peaks(cases)
    rows = above_floor({name: seconds[name] for name in cases}, memory)
    rows += [
        row(f"overhead: {name} / {peer}", overhead_ratio(seconds, name, peer, "floor"), most)
        for name, peer, most in TARGETS
    ]
    token = ratio(seconds, "DropLoRA token", "LoRA")
    rows.append(row("step: DropLoRA token / LoRA", token.pop("median"), 1.03, **token))
    rows += memory_rows(memory, MEMORY)
    rows += [row(f"{name} / floor", ratio(seconds, name, "floor")["median"]) for name in parts]
    for part, peer in ((PRODUCTS, "PEFT LoRA"), (DROPPED, "PEFT LoRA, dropout 0.05")):
        least = statistics.median(map(sum, zip(seconds[part], seconds[ADAMW], strict=True)))
        peers = zip(seconds[peer], seconds["floor"], strict=True)
        above = statistics.median(step - floor for step, floor in peers)
        rows.append(row(f"{part}, and {ADAMW} / overhead of {peer}", least / above))
    save("steps", rows, seconds=seconds, memory=memory, shape=repr(shape), **folder)


def close(shape: Shape, rounds: int, **folder: Any) -> None:
    """The smallest of these differences, with nothing beside it and more rounds: ``lora.json``."""
    cases = {"floor": floor(shape), "LoRA": ours(shape), "PEFT LoRA": peft(shape)}
    seconds = interleave(cases, rounds, warmup=2)
    rows = above_floor(seconds, peaks(cases))
    name, peer, most = TARGETS[0]
    title = f"overhead: {name} / {peer}"
    rows.append(row(title, overhead_ratio(seconds, name, peer, "floor"), most))
    save("lora", rows, seconds=seconds, shape=repr(shape), **folder)


def peaks(cases: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Peak memory of each case, in bytes."""
    return {name: tensor_peak(case) for name, case in cases.items()}


def above_floor(seconds: Seconds, memory: dict[str, int]) -> list[dict[str, Any]]:
    """Every case's step in steps of the frozen model, and its peak memory in that of one."""
    rows = []
    for name in seconds:
        got, peak = ratio(seconds, name, "floor"), memory[name] / memory["floor"]
        rows.append(row(f"{name} / floor", got.pop("median"), memory=peak, **got))
    return rows


def memory_rows(
    memory: dict[str, int], pairs: Iterable[tuple[str, str, float | None]]
) -> list[dict[str, Any]]:
    """Peak memory of one case over that of another."""
    return [
        row(f"peak memory: {name} / {peer}", memory[name] / memory[peer], most)
        for name, peer, most in pairs
    ]
