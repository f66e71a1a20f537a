"""How time and memory of a step grow with rank, layers, length and vocabulary."""

from __future__ import annotations

from typing import Any

from harness import interleave, ratio, row, save
from models import Shape, floor, in_module, ours, peft
from steps import peaks

LARGE: dict[str, list[int]] = {
    "r": [8, 32, 128, 512],
    "layers": [2, 6, 12],
    "tokens": [64, 256, 1024],
    "vocabulary": [1024, 8192, 32768],
}
SMALL: dict[str, list[int]] = {
    "r": [4, 8],
    "layers": [1, 2],
    "tokens": [8, 16],
    "vocabulary": [64, 128],
}


def run(shape: Shape, rounds: int, **folder: Any) -> None:
    """Change one size at a time: ``growth.json``."""
    sweeps = SMALL if shape.tokens < 64 else LARGE
    rows: list[dict[str, Any]] = []
    known: dict[Shape, list[dict[str, Any]]] = {}
    for axis, values in sweeps.items():
        for value in values:
            at = shape.but(**{axis: value})
            if at not in known:  # the shape that all sweeps share is measured once
                known[at] = _at(at, rounds, axis == "vocabulary" or at == shape)
            rows += [
                row(
                    f"{found['case']} / floor at {axis} = {value:,}",
                    **found,
                    axis=axis,
                    value=value,
                )
                for found in known[at]
                if axis == "vocabulary" or found["case"] != CHUNKS
            ]
    save("growth", rows, shape=repr(shape), **folder)


CHUNKS = "LoRA, loss in chunks"


def _at(shape: Shape, rounds: int, chunks: bool) -> list[dict[str, Any]]:
    """What a row of each case takes at one shape."""
    cases = {"floor": floor(shape), "LoRA": ours(shape), "PEFT LoRA": peft(shape)}
    if chunks:
        cases[CHUNKS] = in_module(shape)
    seconds = interleave(cases, rounds, warmup=1)
    memory = peaks(cases)
    found = []
    for name in list(cases)[1:]:
        got = ratio(seconds, name, "floor")
        peak = {"memory": memory[name] / memory["floor"], "peak_bytes": memory[name]}
        found.append({"case": name, "got": got.pop("median"), **got, **peak})
    return found
