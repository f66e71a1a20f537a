"""The loss at a large vocabulary, and packing on the commonsense records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import interleave, ratio, row, save, tensor_peak
from models import Shape, llama
from torch import nn
from torch.nn import functional as F

from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.packing import packed_batch, packs_of
from lightning_peft.datamodules.loading.samplers import (
    LengthGroupedBatchSampler,
    RandomBatchSampler,
)
from lightning_peft.models.loss import chunked_loss
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.strategies import LoRA

RECORDS = Path(__file__).parents[2] / "shared" / "data" / "commonsense"
BYTES_A_TOKEN = 4  # about what LLaMA's tokenizer makes of English; only lengths matter here


def loss(shape: Shape, rounds: int, **folder: Any) -> None:
    """Logits and cross-entropy against chunks: ``loss.json``."""
    vocabulary, rows = (512, 256) if shape.tokens < 64 else (128_256, 2048)
    torch.manual_seed(0)
    head = nn.Linear(shape.hidden, vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(rows, shape.hidden, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,))

    def plain() -> None:
        F.cross_entropy(head(hidden), targets, reduction="sum").backward()
        finish()

    def chunks() -> None:
        chunked_loss(hidden, head, targets).backward()
        finish()

    def finish() -> None:
        assert hidden.grad is not None
        assert hidden.grad.norm() > 0
        hidden.grad = None

    cases = {"logits": plain, "chunks": chunks}
    seconds = interleave(cases, rounds, warmup=1)
    time = ratio(seconds, "chunks", "logits")
    memory = {name: tensor_peak(case) for name, case in cases.items()}
    size = f"vocabulary {vocabulary}, {rows} tokens"
    save(
        "loss",
        [
            row(f"loss in chunks, {size}: peak memory", memory["chunks"] / memory["logits"], 0.1),
            row(f"loss in chunks, {size}: time", time.pop("median"), 1.0, **time),
        ],
        seconds=seconds,
        memory=memory,
        **folder,
    )


def _lengths(files: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompts and of the responses of commonsense records."""
    found = sorted(RECORDS.glob(files))
    records = [r for file in found for r in json.loads(file.read_text())]
    if not records:  # without the records: lengths like theirs
        rng = np.random.default_rng(0)
        drawn = rng.lognormal(4.5, 0.5, 2000).astype(int) + 20
        return drawn, np.full(2000, 8)
    preamble = 150  # bytes of the instruction around each
    prompt = [(len(r["instruction"].encode()) + preamble) // BYTES_A_TOKEN for r in records]
    answer = [max(len(r["output"].encode()) // BYTES_A_TOKEN, 2) for r in records]
    return np.array(prompt), np.array(answer)


LONGEST, BATCH, GROUPED = (
    "padded to the longest record",
    "padded to the longest of the batch",
    "grouped by length, padded",
)


def packing(shape: Shape, rounds: int, **folder: Any) -> None:
    """Useful tokens a second, packed and padded in three ways: ``packing.json``."""
    at = shape.but(hidden=shape.hidden // 2, intermediate=shape.intermediate // 2, layers=2)
    rows, raw = [], {}
    for what, files, least in (
        ("records of all eight tasks", "*/*.json", 2.5),
        ("records of the four training files", "*/train.json", None),
    ):
        lengths = _lengths(files)
        kinds = _batches(at, *lengths)
        cases = {name: _training(at, made) for name, made in kinds.items()}
        seconds = interleave(cases, rounds, warmup=1)
        useful = {n: sum(int(b["attention_mask"].sum()) for b in m) for n, m in kinds.items()}
        rate = {name: [useful[name] / s for s in seconds[name]] for name in cases}
        for name, target in ((LONGEST, least), (BATCH, None), (GROUPED, None)):
            got = ratio(rate, "packed", name)
            title = f"{what}: packed / {name}"
            rows.append(row(title, got.pop("median"), target, at_least=True, **got))
        for name, made in kinds.items():
            cells = sum(b["input_ids"].numel() for b in made)
            rows.append(row(f"{what}: {name}, share of useful tokens", useful[name] / cells))
        raw[what] = {"seconds": seconds, "longest": int(sum(lengths).max())}
    save("packing", rows, raw=raw, shape=repr(at), **folder)


def _batches(
    shape: Shape, prompts: np.ndarray, answers: np.ndarray
) -> dict[str, list[dict[str, Any]]]:
    """Random records padded, batches of records of like length, and random packs.

    As the loaders make them: lengths are grouped, and packs put together, over the whole set.
    """
    size, count = 16, 4
    if shape.tokens < 64:
        size, count, prompts = 4, 1, np.minimum(prompts, 24)
    total = prompts + answers
    longest = int(total.max())
    rng = np.random.default_rng(1)

    def rows_of(indices: Any) -> list[Any]:
        return [
            (
                rng.integers(3, shape.vocabulary, total[i]).tolist(),
                [int(prompts[i]), int(total[i])],
            )
            for i in indices
        ]

    def widest(rows: list[Any]) -> dict[str, Any]:
        filler = ([0] * longest, [])
        return {k: v[:-1] for k, v in training_batch([*rows, filler], 0).items()}

    # The first batch of the grouped ones is that of the longest record.
    random = RandomBatchSampler(len(total), size).batches()[:count]
    grouped = LengthGroupedBatchSampler(total, size).batches()[1 : count + 1]
    drawn, alike = [rows_of(i) for i in random], [rows_of(i) for i in grouped]
    # As many packs as the drawn records take, in steps of as many tokens.
    packs = packs_of(total, longest)
    rows = max(round(size * count * total.mean() / longest), 1)
    mine = [rows_of(packs[i]) for i in rng.permutation(len(packs))[:rows]]
    steps = np.array_split(np.arange(rows), min(count, rows))
    return {
        LONGEST: [widest(rows) for rows in drawn],
        BATCH: [training_batch(rows, 0) for rows in drawn],
        GROUPED: [training_batch(rows, 0) for rows in alike],
        "packed": [packed_batch([mine[i] for i in step]) for step in steps],
    }


def _training(shape: Shape, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """A pass over some batches, with the loss and the inputs of the package's module."""
    module = CausalLMModule("tiny_llama", adapter=LoRA(r=shape.r))
    model = llama(shape.but(tokens=4096))
    module.adapter.attach(model)
    module.model = model
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)

    def step() -> None:
        for batch in batches:
            total, count = module.target_loss(batch)
            (total / count).backward()
            assert max(float(p.grad.norm()) for p in parameters[-2:] if p.grad is not None) > 0
            optimizer.step()
            optimizer.zero_grad()

    return step
