"""Ranks that grow where several processes train: all decide and draw alike, and resume."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.strategies.elalora import ElaLoRA
from lightning_peft.strategies.increlora import IncreLoRA
from lightning_peft.testing import check_strategy

ENGINES = str(Path(__file__).parents[1] / "engines")
sys.path.insert(0, ENGINES)
# The server of forks is told nothing of sys.path, and preloads nothing that it does not find.
os.environ["PYTHONPATH"] = os.pathsep.join([ENGINES, *filter(None, [os.environ.get("PYTHONPATH")])])
import engine_worker  # noqa: E402

STEPS, SAVED_AFTER = 10, 5
EVERY = {"init_warmup": 1, "incre_interval": 2, "top_h": 4, "lr_warmup": 3}


def in_advance() -> IncreLoRA:
    return IncreLoRA(max_r=4, **EVERY)


def at_once() -> IncreLoRA:
    return IncreLoRA(target_r=3, max_r=4, advance_learn=False, **EVERY)


def exchanging() -> ElaLoRA:
    return ElaLoRA(
        r=3, max_r=6, b=6, init_warmup=1, mask_interval=2, final_warmup=2, total_step=STEPS
    )


@pytest.mark.parametrize("strategy", [in_advance(), at_once(), exchanging()])
def test_two_processes_end_alike(strategy: Any) -> None:
    check_strategy(strategy, processes=2)


def train(name: str, rank: int, folder: Path) -> dict[str, Any]:
    """Whole runs of an engine, each with its resumed second half."""
    done = {}
    for make in (in_advance, at_once, exchanging):
        if make is exchanging and name == "zero2":  # which holds gradients in shares
            continue
        path = folder / f"{name}-{make.__name__}.ckpt"
        fit = functools.partial(engine_worker.fit, name, steps=STEPS)
        done[make.__name__] = fit(make(), folder, save_at=SAVED_AFTER, path=path)
        done[f"{make.__name__}, resumed"] = fit(make(), folder, resume=path)
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param("ddp", marks=pytest.mark.long), "zero2"])
def test_a_resumed_run_ends_bit_for_bit(name: str, tmp_path: Path) -> None:
    if name == "zero2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    one, other = engine_worker.launch(train, name, tmp_path)
    single = engine_worker.launch(train, "single", tmp_path, world=1)[0]
    assert len(one) == (6 if name == "ddp" else 4)
    for kind, run in one.items():
        whole = one[kind.partition(", ")[0]]
        assert run["losses"] == whole["losses"][-len(run["losses"]) :]
        assert run["decisions"] == whole["decisions"] == other[kind]["decisions"]
        assert run["ranks"] == whole["ranks"]
        assert run["dead"] == 0.0
        for tensor, value in whole["state"].items():
            assert torch.equal(run["state"][tensor], value), (kind, tensor)
            assert torch.equal(other[kind]["state"][tensor], value), (kind, tensor)
        # Until ranks change it is the method of one device.
        alone = single[kind]["losses"][:2] if kind in single and run is whole else []
        for loss, expected in zip(run["losses"], alone, strict=False):
            assert math.isclose(loss, expected, rel_tol=1e-5), kind
    total = {kind: sum(run["ranks"].values()) for kind, run in one.items()}
    assert total["in_advance"] == 14 * 2
    assert {d["step"] for d in one["in_advance"]["decisions"]} == {2, 4, 6, 8}
    assert {d["event"] for d in one["at_once"]["decisions"]} == {"added"}
    if name == "ddp":
        assert total["exchanging"] == 14 * 3
        assert one["exchanging"]["decisions"] == single["exchanging"]["decisions"]
