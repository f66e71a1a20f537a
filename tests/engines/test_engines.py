"""Every strategy on two processes, under every engine: the same method as on one device."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch

from lightning_peft.runs import read_checkpoint
from lightning_peft.strategies import DropLoRA, LoRA, LoRADrop, PrunedLoRA

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("zero3", "fsdp")]
ENGINES = ["ddp", "zero2", *SLOW, pytest.param("zero1", marks=pytest.mark.long)]
SAVED_AFTER, FUSED = 10, "fused AdamW"
Results = dict[str, dict[str, Any]]


def pruned(**changes: Any) -> PrunedLoRA:
    schedule = {"r": 8, "target_r": 2, "start_step": 2, "prune_every": 5, "prune_count": 2}
    return PrunedLoRA(**{**schedule, **changes})


def recovered() -> PrunedLoRA:
    return pruned(recovery="activation")


def every_strategy(name: str, rank: int, folder: Path) -> Results:
    """What one process of an engine does in this file, in one launch."""
    fit, before = engine_worker.fit, folder / "single-pruned.ckpt"
    layout = str(folder / "layout.json") if name == "zero3" else None
    drop: dict[str, Any] = {"r": 4, "p": 0.5, "mask": "step" if name == "ddp" else "token"}
    saved = folder / f"{name}-pruned.ckpt"
    masked = folder / f"{name}-masked.ckpt"
    done = {
        "lora": fit(name, LoRA(r=4), folder, "SGD"),
        "pruned, SGD": fit(name, pruned(), folder, "SGD"),
        "droplora, p = 0": fit(name, DropLoRA(r=4, p=0.0), folder),
        "loradrop": fit(name, LoRADrop(r=4, threshold=0.6, probe_epochs=1, layout=layout), folder),
        "pruned": fit(name, recovered(), folder, FUSED, save_at=SAVED_AFTER, path=saved),
        "masked": fit(name, DropLoRA(**drop), folder, save_at=SAVED_AFTER, path=masked),
    }
    if name == "zero3":
        try:
            fit(name, LoRADrop(r=4), folder)
        except ValueError as error:
            done["refused"] = {"sentence": str(error)}
    if name == "single":
        roles = done["loradrop"]["layout"]
        (folder / "layout.json").write_text(json.dumps(roles))
        return done
    return {
        **done,
        "pruned, resumed": fit(name, recovered(), folder, FUSED, resume=saved),
        "pruned, moved": fit(name, recovered(), folder, FUSED, resume=before),
        "masked, resumed": fit(name, DropLoRA(**drop), folder, resume=masked),
    }


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def single(folder: Path) -> Results:
    return engine_worker.launch(every_strategy, "single", folder, world=1)[0]


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two sets of matrices."""
    assert one.keys() == other.keys()
    return max(float((one[n] - other[n]).norm() / one[n].norm()) for n in one)


def assert_same_training(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    losses = list(zip(one["losses"][-len(other["losses"]) :], other["losses"], strict=True))
    assert max(abs(a - b) / a for a, b in losses) < 1e-5
    assert difference(one["deltas"], other["deltas"]) < tolerance
    assert one["decisions"] == other["decisions"]
    assert one["steps"] == other["steps"] == engine_worker.STEPS


@pytest.mark.parametrize("name", ENGINES)
def test_two_processes_train_as_one_device_does(name: str, folder: Path, single: Results) -> None:
    if name.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    one, other = engine_worker.launch(every_strategy, name, folder)
    refused = one.pop("refused", {"sentence": ""})["sentence"]
    for run in one:
        for key in ("state", "deltas"):
            for tensor, value in one[run][key].items():
                same = torch.equal(value, other[run][key][tensor])
                assert same or tensor.endswith("gate.mask"), (run, tensor)
        assert one[run]["decisions"] == other[run]["decisions"]
    for run in ("lora", "pruned, SGD"):
        assert_same_training(single[run], one[run], 1e-6)
    for run in ("droplora, p = 0", "loradrop", "pruned", "pruned, moved"):
        reference = single[run.partition(", moved")[0]]
        assert_same_training(reference, one[run], 1e-4)
    # Removal: sizes stay, survivors stand in front, nothing behind them comes back.
    assert {d["step"] for d in one["pruned"]["decisions"]} == {2, 7, 12}
    assert set(single["pruned"]["shapes"].values()) <= {(2, 32), (2, 48)}
    assert set(one["pruned"]["shapes"].values()) <= {(8, 32), (8, 48)}
    assert set(one["pruned"]["ranks"].values()) == {2}
    assert one["pruned"]["dead"] == one["pruned, SGD"]["dead"] == 0.0
    if name == "zero3":
        assert "give model.adapter.layout the layout.json of an earlier probe" in refused
    if name == "ddp":  # whose masks hold for a step
        masks = [
            {n: m for n, m in x["masked"]["state"].items() if "mask" in n} for x in (one, other)
        ]
        assert any(not torch.equal(mask, masks[1][n]) for n, mask in masks[0].items())
    # Masks differ between processes, and a resumed run draws the same ones: it ends bit for bit.
    assert one["masked"]["draw"][0] != one["masked"]["draw"][1]
    for run in ("pruned", "masked"):
        resumed = one[f"{run}, resumed"]
        assert resumed["losses"] == one[run]["losses"][SAVED_AFTER:]
        for tensor, value in one[run]["state"].items():
            assert torch.equal(value, resumed["state"][tensor]), (run, tensor)
        assert resumed["draw"] == one[run]["draw"]
    assert_same_checkpoint(folder / "single-pruned.ckpt", folder / f"{name}-pruned.ckpt")


def assert_same_checkpoint(one: Path, other: Path) -> None:
    """The files of two engines hold the same tensors by name, and nothing of the base."""
    first, second = read_checkpoint(one), read_checkpoint(other)
    assert all("lora_" in key and ".base." not in key for key in second["state_dict"])
    shapes = [{k: v.shape for k, v in c["state_dict"].items()} for c in (first, second)]
    assert shapes[0] == shapes[1]
    for key, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][key], value, rtol=1e-3, atol=1e-5)
    moments = [named_moments(c) for c in (first, second)]
    assert moments[0].keys() == moments[1].keys()
    for key, value in moments[0].items():
        torch.testing.assert_close(moments[1][key], value, rtol=1e-3, atol=1e-5)
    assert abs(os.path.getsize(one) - os.path.getsize(other)) < 60_000  # random states, names


def named_moments(checkpoint: dict[str, Any]) -> dict[tuple[str, str], torch.Tensor]:
    names = checkpoint["optimizer_names"][0]
    state = checkpoint["optimizer_states"][0]["state"]
    found = {(names[i], k): torch.as_tensor(v) for i, e in state.items() for k, v in e.items()}
    assert {key for _, key in found} == {"step", "exp_avg", "exp_avg_sq"}
    return found
