"""The strategies that test_engines.py leaves out, on every engine that is said to run them."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch

from lightning_peft.engines import ENGINES, WEIGHTS_AT_ATTACH
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DoRA,
    DyLoRA,
    FullFineTuning,
    GaLore,
    LayerRemoval,
    LoRAFA,
    LoRAPlus,
    MiLoRA,
    PiSSA,
    SparseAdapter,
    TiedLoRA,
    VeRA,
)

STEPS, SAVED_AFTER = 10, 5
NAMES = {"single": "one device", "ddp": "DDP", "zero2": "DeepSpeed ZeRO-2"}
NAMES |= {"zero3": "DeepSpeed ZeRO-3", "fsdp": "FSDP2"}
MADE: dict[str, Callable[[], AdapterStrategy]] = {
    "AdaLoRA": lambda: AdaLoRA(r=4, target_r=2, tinit=1, tfinal=3, deltaT=2, total_step=STEPS),
    "DoRA": lambda: DoRA(r=4),
    "DyLoRA": lambda: DyLoRA(r=4, frozen=True),
    "FullFineTuning": lambda: FullFineTuning(),
    "GaLore": lambda: GaLore(r=4, update_proj_gap=3),
    "LayerRemoval": lambda: LayerRemoval(r=2, every=3, count=4),
    "LoRAFA": lambda: LoRAFA(r=4),
    "LoRAPlus": lambda: LoRAPlus(r=4, lr_ratio=2.0),
    "MiLoRA": lambda: MiLoRA(r=4),
    "PiSSA": lambda: PiSSA(r=4),
    "SparseAdapter": lambda: SparseAdapter(r=4, start_step=3),
    "TiedLoRA": lambda: TiedLoRA(r=4),
    "VeRA": lambda: VeRA(r=16),
}


def train(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Whole runs, each of which its resumed second half equals bit for bit.

    SGD, which tells small differences of gradients; AdaLoRA's budget falls under AdamW.
    """
    done = {}
    for kind, make in MADE.items():
        if make().needs - {WEIGHTS_AT_ATTACH} <= ENGINES[NAMES[name]]:
            optimizer = "AdamW" if kind in ("AdaLoRA", "GaLore") else "SGD"
            path = folder / f"{name}-{kind}.ckpt"
            fit = functools.partial(engine_worker.fit, name, steps=STEPS)
            done[kind] = fit(make(), folder, optimizer, SAVED_AFTER, path=path)
            resumed = fit(make(), folder, optimizer, resume=path)
            for tensor, value in done[kind]["state"].items():
                assert torch.equal(resumed["state"][tensor], value), (name, kind, tensor)
    return done


@pytest.mark.slow
def test_other_strategies_train_as_on_one_device(tmp_path: Path) -> None:
    single = engine_worker.launch(train, "single", tmp_path, world=1)[0]
    assert single.keys() == MADE.keys()
    names = ["ddp", "fsdp"]
    names += ["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else []
    for name in names:
        for process in engine_worker.launch(train, name, tmp_path):
            for kind, run in process.items():
                reference = single[kind]
                for loss, expected in zip(run["losses"], reference["losses"], strict=True):
                    assert math.isclose(loss, expected, rel_tol=1e-5), (name, kind)
                assert run["decisions"] == reference["decisions"], (name, kind)
                assert run["state"].keys() == reference["state"].keys(), (name, kind)
                for tensor, value in reference["state"].items():
                    # Masks are equal, values to rounding.
                    found, value = run["state"][tensor].double(), value.double()
                    distance = float((found - value).norm())
                    limit = 1e-4 * max(float(value.norm()), 1e-3)
                    assert distance <= limit, (name, kind, tensor, distance)
                    assert torch.isfinite(value).all()
