"""Training steps: every strategy against PEFT's equivalent and the floor, in time and memory."""

from __future__ import annotations

from typing import Any

from harness import Seconds, interleave, overhead_ratio, ratio, row, save, tensor_peak
from models import Shape, floor, full, ours, peft

# Of equal steps in one table: ours, what it is held against, and the most that it may take of it.
TARGETS = [
    ("LoRA", "PEFT LoRA", 0.75),
    ("LoRA, dropout 0.05", "PEFT LoRA, dropout 0.05", 0.8),
    ("LoRA, shared dropout 0.05", "PEFT LoRA, dropout 0.05", 0.6),
    ("DropLoRA batch, r = 128", "LoRA, r = 128", 0.7),
    ("DropLoRA step, r = 128", "LoRA, r = 128", 0.7),
    ("DoRA", "PEFT DoRA", 0.75),
]


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
    seconds = interleave(cases, rounds, warmup=1)
    memory = {name: tensor_peak(case) for name, case in cases.items()}
    rows = [
        row(f"{name} / floor", ratio(seconds, name, "floor")["median"], **_more(seconds, name))
        for name in cases
    ]
    rows += [
        row(f"overhead: {name} / {peer}", overhead_ratio(seconds, name, peer, "floor"), most)
        for name, peer, most in TARGETS
    ]
    token = ratio(seconds, "DropLoRA token", "LoRA")
    rows.append(row("step: DropLoRA token / LoRA", token.pop("median"), 1.03, **token))
    for name, peer, most in (
        ("LoRA", "PEFT LoRA", None),
        ("LoRA, dropout 0.05", "PEFT LoRA, dropout 0.05", 0.8),
        ("LoRA, shared dropout 0.05", "PEFT LoRA, dropout 0.05", None),
        ("DoRA", "PEFT DoRA", None),
    ):
        rows.append(row(f"peak memory: {name} / {peer}", memory[name] / memory[peer], most))
    save("steps", rows, seconds=seconds, memory=memory, shape=repr(shape), **folder)


def others(shape: Shape, rounds: int, **folder: Any) -> None:
    """The strategies without a target, and PEFT's where it has them: ``others.json``."""
    cases = {
        "floor": floor(shape),
        "LoRA": ours(shape),
        "rsLoRA": ours(shape, use_rslora=True),
        "PiSSA": ours(shape, "PiSSA"),
        "PEFT PiSSA": peft(shape, init_lora_weights="pissa_niter_4"),
        "MiLoRA": ours(shape, "MiLoRA"),
        "SparseAdapter": ours(shape, "SparseAdapter"),
        "AdaLoRA": ours(shape, "AdaLoRA", total_step=10**6, target_r=shape.r // 2),
        "PEFT AdaLoRA": peft(shape, "AdaLoraConfig", init_r=shape.r, total_step=10**6),
        "VeRA": ours(shape, "VeRA", r=8 * shape.r),
        "TiedLoRA": ours(shape, "TiedLoRA"),
        "GaLore": ours(shape, "GaLore"),
    }
    seconds = interleave(cases, rounds, warmup=1)
    memory = {name: tensor_peak(case) for name, case in cases.items()}
    rows = [
        row(f"{name} / floor", ratio(seconds, name, "floor")["median"], **_more(seconds, name))
        for name in cases
    ]
    save("others", rows, seconds=seconds, memory=memory, shape=repr(shape), **folder)


def growth(shape: Shape, rounds: int, **folder: Any) -> None:
    """Steps as rank, layers, length and vocabulary grow: ``growth.json``."""
    small = shape.but(hidden=shape.hidden // 2, intermediate=shape.intermediate // 2)
    tiny = shape.tokens < 64
    sweeps: dict[str, list[Any]] = {
        "r": [8, 32] if tiny else [8, 32, 128, 512],
        "layers": [1, 2] if tiny else [2, 6, 12],
        "tokens": [8, 16] if tiny else [64, 256, 1024],
        "vocabulary": [64, 128] if tiny else [1024, 8192, 32768],
    }
    rows = []
    for axis, values in sweeps.items():
        for value in values:
            at = small.but(**{axis: value})
            cases = {"floor": floor(at), "LoRA": ours(at), "PEFT LoRA": peft(at)}
            seconds = interleave(cases, rounds, warmup=1)
            for name in ("LoRA", "PEFT LoRA"):
                got = ratio(seconds, name, "floor")
                rows.append(
                    row(f"{name} / floor at {axis} = {value}", got.pop("median"), **got)
                    | {"axis": axis, "value": value, "case": name}
                )
    save("growth", rows, shape=repr(small), **folder)


def _more(seconds: Seconds, name: str) -> dict[str, float]:
    got = ratio(seconds, name, "floor")
    return {"low": got["low"], "high": got["high"]}
