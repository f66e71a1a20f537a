"""A training step makes the host wait for the device once, where its loss is read, and not else.

On a GPU torch itself says where the host waits. On a CPU no one does, but the operations that would
wait are known: those that read a value, or whose result has a size that only the values tell.
"""

from __future__ import annotations

import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engine_worker
import pytest
import torch
from every_strategy import STRATEGIES
from lightning.pytorch import Callback, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.strategies import StepMask

FIRST, LAST = 8, 28  # micro-batches that are watched, between PrunedLoRA's removals
STEPS = (LAST - FIRST) // engine_worker.ACCUMULATE
ATEN: Any = torch.ops.aten
WAIT = {
    ATEN._local_scalar_dense.default,
    ATEN.nonzero.default,
    ATEN.masked_select.default,
    ATEN.equal.default,
    ATEN._unique2.default,
}
# What works on tensors of the host on a GPU too: the loader, draws of masks and of seeds, the
# optimizers' counts of steps, what Lightning logs and the worker's own callback reads of it.
OF_THE_HOST = {"loader.py", "droplora.py", "dropout.py", "adam.py", "optimizer.py", "apply_func.py"}
OF_THE_HOST |= {"engine_worker.py"}
# Where a step may wait. transformers asks whether a batch has padding; the loss asks at batches 1,
# 2, 4, 8, … whether the output layer's output is the logits, of those that are watched at one.
NAMED = {"window.py", "masking_utils.py", "loss.py"}
# And where a method decides: AdaLoRA by the scores of all layers, sparsegpt by what layers are fed.
DECIDES = {"AdaLoRA": {"adalora.py"}, "PrunedLoRA, sparsegpt": {"observe.py"}}
ON_A_CPU = ("LoRA, shared dropout", "DropLoRA, step", "PrunedLoRA")


class Reads(TorchDispatchMode):
    """Counts operations that would wait, by the innermost file that is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func is ATEN.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if func in WAIT or by_mask:
            files = [Path(frame.filename) for frame in traceback.extract_stack()[:-1]]
            inner = [
                file.name
                for file in files
                if "torch" not in file.parts or file.parent.name == "optim"
            ]
            if not OF_THE_HOST & set(inner[-3:]):
                self.found[inner[-1]] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched(device: torch.device) -> Iterator[Counter[str]]:
    """Counts by file where the host waits for the device."""
    if device.type == "cpu":
        with Reads() as reads:
            yield reads.found
        return
    found: Counter[str] = Counter()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)
    found.update(Path(w.filename).name for w in caught if "synchronizing" in str(w.message))


class Watch(Callback):
    """Watches some micro-batches of a fit."""

    def __init__(self, device: torch.device) -> None:
        self.context = watched(device)
        self.found: Counter[str] = Counter()

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, index: int) -> None:
        if index == FIRST:
            self.found = self.context.__enter__()

    def on_train_batch_end(self, *args: Any) -> None:
        if args[-1] == LAST - 1:
            self.context.__exit__(None, None, None)


def test_what_waits_is_found(device: torch.device) -> None:
    values = torch.tensor([0.0, 1.0], device=device)
    with watched(device) as found:
        values.nonzero()
        float(values.sum())
    assert found == {"test_waits.py": 2}


def test_the_components_of_a_step_are_known_without_waiting(device: torch.device) -> None:
    gate = StepMask(8, p=0.5).to(device).train()
    gate.new_step()
    with watched(device) as found:
        chosen = gate.choose(8)
    assert not found
    assert chosen is not None
    assert torch.equal(chosen[0], gate.mask.nonzero()[:, 0])


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_step_waits_where_its_loss_is_read_and_not_else(
    name: str, tmp_path: Path, device: torch.device
) -> None:
    if device.type == "cpu" and name not in ON_A_CPU:
        pytest.skip("the other methods share these paths")
    watch = Watch(device)
    engine_worker.fit(
        "single",
        STRATEGIES[name](),
        tmp_path,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        callbacks=[watch],
    )
    print(name, dict(watch.found))
    assert watch.found  # transformers' question at least
    assert set(watch.found) <= NAMED | DECIDES.get(name, set())
    assert watch.found["window.py"] <= STEPS
    assert watch.found["loss.py"] <= 1
