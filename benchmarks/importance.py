"""What watching every layer's importance costs."""

from __future__ import annotations

import statistics
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from harness import clock, interleave, ratio, row, save
from lightning.pytorch import Callback, Trainer
from models import TARGETS, Shape, batch_of, llama, loss_of, ours
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.adapters import observe_inputs
from lightning_peft.callbacks import LayerImportance
from lightning_peft.callbacks.importance_file import append_rows, importance_rows
from lightning_peft.callbacks.measurement import LayerWatch
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.strategies import LoRA

NEIGHBOURS = 10  # unwatched steps before and after a watched one, that it is held against


def run(shape: Shape, rounds: int, **folder: Any) -> None:
    """What the callback adds to a step and to a run, and its error: ``importance.json``."""
    plain, watched = ours(shape), ours(shape)
    model = watched.model  # type: ignore[attr-defined]
    with TemporaryDirectory() as place:
        path = Path(place) / "importance.csv"

        def step() -> None:
            watch = LayerWatch(model)
            watch.start()
            watched()
            watch.stop()
            append_rows(path, importance_rows(0, watch.seen))

        seconds = interleave({"LoRA": plain, "watched": step}, rounds, warmup=1)
    every = ratio(seconds, "watched", "LoRA")
    extra, more = every["median"] - 1, {k: every[k] - 1 for k in ("low", "high")}
    steps, interval = (7, 3) if shape.tokens < 64 else (161, 50)
    times = _fit(shape, steps, interval)
    rows = [
        row("importance at every step, share of the step", extra, 0.08, **more),
        row(
            f"importance every {interval} steps, share of a run of {steps}",
            _added(times, interval) / sum(times[1:]),
            0.01,
        ),
        row(
            "importance against the naive computation, relative", _against_naive(model, shape), 1e-5
        ),
    ]
    save("importance", rows, seconds=seconds, fit=times, shape=repr(shape), **folder)


class _Steps(Callback):
    """When each batch of a fit began."""

    def __init__(self) -> None:
        self.began: list[float] = []

    def on_train_batch_start(self, *of_a_batch: Any) -> None:
        """Remember when."""
        self.began.append(clock())


class _Random(CausalLMModule):
    """The module around the benchmark's model."""

    shape: Shape

    def load_base(self) -> Any:
        """Make it."""
        return llama(self.shape)


def _fit(shape: Shape, steps: int, every: int) -> list[float]:
    """Seconds of the steps of a fit that the callback watches at times."""
    batch = batch_of(shape)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    module = _Random("tiny_llama", adapter=LoRA(r=shape.r, target_modules=TARGETS))
    module.shape = shape
    clocked = _Steps()
    with TemporaryDirectory() as place, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning, on workers and loggers
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            max_steps=steps + 1,  # a step ends where the next begins
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=place,
            callbacks=[clocked, LayerImportance(every)],
        )
        trainer.fit(module, DataLoader([batch] * (steps + 1), batch_size=None))
        written = (Path(place) / "importance.csv").read_text().splitlines()
    assert len({line.split(",")[0] for line in written[1:]}) == -(-(steps + 1) // every)
    return [b - a for a, b in zip(clocked.began, clocked.began[1:], strict=False)]


def _added(times: list[float], every: int) -> float:
    """What watched steps took above the median of the unwatched around each; but for the first."""
    total = 0.0
    for at in range(every, len(times), every):
        around = range(max(at - NEIGHBOURS, 1), min(at + NEIGHBOURS + 1, len(times)))
        total += times[at] - statistics.median(times[i] for i in around if i % every)
    return total


@torch.no_grad()
def _against_naive(model: Any, shape: Shape) -> float:
    """Largest relative difference from mean ‖ΔW x‖² with a dense ΔW in float64."""
    worst = 0.0

    def compare(name: str, layer: Any, x: Tensor) -> None:
        nonlocal worst
        naive = (x.double() @ layer.delta_weight().double().T).square().sum(-1).mean()
        got = layer.delta_sq_norm(x).float().sum() / len(x)
        worst = max(worst, float((got.double() - naive).abs() / naive))

    with observe_inputs(model, compare):
        loss_of(model, batch_of(shape))
    return worst
