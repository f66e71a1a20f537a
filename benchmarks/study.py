"""The study: every method's row at its best learning rate, ten seeds, paired differences.

    python benchmarks/study_base.py        # the base model, a few minutes, once
    python benchmarks/study.py             # all runs, resumable; two processes of one thread
    python benchmarks/study_table.py       # the table of what is there

Every row of :data:`ROWS` is trained at three learning rates with the first seed; the rate with the
best validation accuracy is kept, and trained with all ten seeds. Reported is the accuracy on test
problems, which no run trains on and no choice is made by. Seeds fix the adapters' initialisation,
masks and the order of data; test problems are the same for all, so differences are paired over
seeds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from lightning_peft.adapters import trainable_parameters
from lightning_peft.datamodules import ArithmeticDataModule, Example
from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA, LoRADrop, PrunedLoRA

RATES = (2.5e-3, 5e-3, 1e-2)
SEEDS = tuple(range(10))
CHOOSING = SEEDS[:1]
STEPS, BATCH, WARMUP = 240, 128, 20
TARGETS = "all-linear"
SHARED: dict[str, Any] = {"target_modules": TARGETS}
PROBE = STEPS // 10
REGIMES = {"stream": {"regime": "stream"}, "fixed": {"regime": "fixed", "train_size": 2000}}
BASE = Path("runs/study/base")
RESULTS = Path(__file__).parent / "results" / "study"


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: As printed.
        regime: Of the data: ``stream`` or ``fixed``.
        baseline: Name of the row that differences are taken to.
        make: Makes the strategy.
    """

    name: str
    regime: str
    baseline: str
    make: Callable[[], AdapterStrategy]


def _pruned(**arguments: Any) -> Callable[[], AdapterStrategy]:
    schedule = {"r": 32, "target_r": 8, "start_step": 50, "prune_every": 10, "prune_count": 2}
    return lambda: PrunedLoRA(**{**schedule, **SHARED, **arguments})


def rows() -> dict[str, Row]:
    """All rows by key."""
    made: list[Row] = []
    for regime in REGIMES:
        lora = f"LoRA r=32, {regime}"
        made.append(Row(f"LoRA r=8, {regime}", regime, lora, lambda: LoRA(8, **SHARED)))
        made.append(Row(lora, regime, lora, lambda: LoRA(32, **SHARED)))
        for mask in ("token", "sample", "batch", "step", "learned"):
            for p in (0.1, 0.3) if mask != "learned" else (0.0,):
                name = f"DropLoRA {mask}" + (f" p={p}" if p else "")
                made.append(
                    Row(
                        f"{name}, {regime}",
                        regime,
                        lora,
                        lambda p=p, m=mask: DropLoRA(32, p, m, **SHARED),
                    )
                )
    small = "LoRA r=8, stream"
    for criterion in (
        "gradient",
        "llm_pruner_element1",
        "llm_pruner_element2",
        "llm_pruner_taylor2",
    ):
        made.append(Row(f"PrunedLoRA {criterion}", "stream", small, _pruned(criterion=criterion)))
    for criterion in ("wanda", "magnitude", "random"):
        made.append(Row(f"PrunedLoRA {criterion}", "stream", small, _pruned(criterion=criterion)))
    sparsegpt = _pruned(criterion="sparsegpt", recovery="activation")
    made.append(Row("PrunedLoRA sparsegpt + its recovery", "stream", small, sparsegpt))
    for recovery in ("gradient", "activation"):
        name = f"PrunedLoRA gradient, {recovery} recovery"
        made.append(Row(name, "stream", small, _pruned(recovery=recovery)))
    for ablation in (None, "without_share", "inverse", "random", "top_k"):
        name = "LoRA-drop T=0.9" + (f", {ablation}" if ablation else "")
        made.append(Row(name, "stream", small, lambda a=ablation: _lora_drop(a)))
    return {row.name: row for row in made}


def _lora_drop(ablation: Any) -> AdapterStrategy:
    # A tenth of a stream has no end: the probe is a tenth of the run's updates instead.
    return LoRADrop(r=8, threshold=0.9, max_probe_steps=PROBE, ablation=ablation, **SHARED)


ROWS = rows()


def train(row: Row, rate: float, seed: int, base: torch.nn.Module) -> dict[str, Any]:
    """One run.

    Args:
        row: What to train.
        rate: Peak learning rate; 20 steps of warm-up, then linear to zero.
        seed: Of initialisation, masks and data order.
        base: The base model, left as it is.

    Returns:
        Validation and test accuracy, parameters, processor seconds of training (``cpu_seconds``).
    """
    torch.manual_seed(seed)
    model, strategy, data = copy.deepcopy(base).train(), row.make(), data_of(row, seed)
    strategy.attach(model)
    start = trainable_parameters(model)
    began = time.process_time()
    last = run_steps(model, strategy, data, rate)
    seconds = time.process_time() - began
    val, test = score(model, data.val_dataloader()), score(model, test_batches(data))
    return {
        "val": val[0],
        "test": test[0],
        "val_loss": val[1],
        "test_loss": test[1],
        "start": start,
        "parameters": trainable_parameters(model),
        "cpu_seconds": round(seconds, 2),
        "loss": last,
    }


def data_of(row: Row, seed: int) -> ArithmeticDataModule:
    """The data of a row, in the order of a seed."""
    data = ArithmeticDataModule(
        task="subtraction",
        tokenizer=str(BASE),
        batch_size=BATCH,
        eval_batch_size=1000,
        seed=seed,
        **REGIMES[row.regime],
    )
    data.setup()
    return data


def run_steps(
    model: torch.nn.Module, strategy: AdapterStrategy, data: ArithmeticDataModule, rate: float
) -> float:
    """Train an adapted model by hand until a loss is not finite, and return the last one."""

    def loss(batch: dict[str, Any]) -> torch.Tensor:
        logits, targets = target_logits(model, batch)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def adamw(params: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, lr=rate, weight_decay=0.0, fused=True)

    strategy.prepare(model, lambda ratio: Sample(data, ratio), loss, adamw)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = adamw(trained)
    batches = endless(data)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / WARMUP, (STEPS - step) / (STEPS - WARMUP))
        value = loss(next(batches)) + strategy.penalty(model)
        if not math.isfinite(value.item()):
            break
        value.backward()
        strategy.before_step(model, optimizer, step)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
    return value.item()


class Sample:
    """Batches of a share of the training set, to iterate again and again."""

    def __init__(self, data: ArithmeticDataModule, ratio: float) -> None:
        self.loader = data.probe_dataloader(ratio)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i, batch in enumerate(self.loader):
            if i == PROBE:
                return
            yield batch


def endless(data: ArithmeticDataModule) -> Iterator[dict[str, Any]]:
    """Training batches, epoch after epoch."""
    loader = data.train_dataloader()
    while True:
        yield from loader


def target_logits(
    model: torch.nn.Module, batch: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (batch, answer, vocabulary) and targets (batch, answer) of the answers."""
    labels = batch["labels"][:, 1:]
    positions = (labels != -100).any(0).nonzero()[:, 0]
    output = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=positions)
    return output.logits, labels[:, positions]


@torch.inference_mode()
def score(model: torch.nn.Module, batches: Any) -> tuple[float, float]:
    """Share of answers right to the letter (greedy, by teacher forcing), and mean loss."""
    model.eval()
    right, losses = [], []
    for batch in batches:
        logits, targets = target_logits(model, batch)
        right.append((logits.argmax(-1) == targets).all(-1).float())
        losses.append(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none"))
    model.train()
    return torch.cat(right).mean().item(), torch.cat(losses).mean().item()


def test_batches(data: ArithmeticDataModule) -> list[dict[str, torch.Tensor]]:
    """The test problems with their answers."""
    batches = []
    for batch in data.test_dataloader()[0]:
        asked = zip(batch["prompt"], batch["expected"], strict=True)
        examples = [Example(prompt, answer, "", i) for i, (prompt, answer) in enumerate(asked)]
        columns = data.encoder.encode(examples, with_response=True)
        ids = torch.tensor(columns["tokens"])  # all problems have one length
        labels = ids.clone()
        labels[:, : columns["prompt_length"][0]] = -100
        batches.append({"input_ids": ids, "labels": labels})
    return batches


# Which runs are due, and doing them.

Key = tuple[str, float, int]


def read(folder: Path) -> dict[Key, dict[str, Any]]:
    """All finished runs."""
    done = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            if line.endswith("}"):
                run = json.loads(line)
                done[run["row"], run["rate"], run["seed"]] = run
    return done


def best_rate(name: str, done: dict[Key, dict[str, Any]]) -> float | None:
    """The rate that is best on validation for the first seeds; None while runs are due."""
    means = {}
    for rate in RATES:
        runs = [done.get((name, rate, seed)) for seed in CHOOSING]
        if not all(runs):
            return None
        means[rate] = np.mean([run["val"] for run in runs if run])
    return max(means, key=lambda rate: means[rate])


def due(done: dict[Key, dict[str, Any]]) -> list[Key]:
    """The runs that are left, as far as they are known: rates first, then the seeds at the best."""
    keys = [(name, rate, seed) for name in ROWS for seed in CHOOSING for rate in RATES]
    for name in ROWS:
        rate = best_rate(name, done)
        if rate is not None:
            keys += [(name, rate, seed) for seed in SEEDS]
    return [key for key in dict.fromkeys(keys) if key not in done]


def work(part: int, parts: int, folder: Path) -> None:
    """Do one process's share of the runs, one line each as they end."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(BASE)
    with (folder / f"runs-{part}.jsonl").open("a", buffering=1) as file:
        while True:
            mine = [k for k in due(read(folder)) if list(ROWS).index(k[0]) % parts == part]
            if not mine:
                return
            name, rate, seed = mine[0]
            result = train(ROWS[name], rate, seed, base)
            file.write(json.dumps({"row": name, "rate": rate, "seed": seed, **result}) + "\n")


def main() -> None:
    """Run what is due."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=RESULTS)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    n = options.processes
    arguments = [(i, n, options.folder) for i in range(n)]
    # Daemons end with this process when it ends by itself, which a signal has to be told.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; start again to go on."))
    workers = [context.Process(target=work, args=a, daemon=True) for a in arguments]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        raise SystemExit("a process failed; what it finished is kept, so start again to go on.")


if __name__ == "__main__":
    main()
