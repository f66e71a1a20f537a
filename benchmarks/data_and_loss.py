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

from lightning_peft.datamodules.batches import packed_batch, pad, training_batch
from lightning_peft.datamodules.samplers import LengthGroupedBatchSampler, RandomBatchSampler
from lightning_peft.modules.causal_lm import CausalLMModule
from lightning_peft.modules.loss import chunked_loss
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


def _lengths(limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompts and of responses of the commonsense records, in random order."""
    files = sorted(RECORDS.glob("*/train*.json"))
    records = [r for file in files for r in json.loads(file.read_text())]
    if not records:  # without the records: lengths like theirs
        rng = np.random.default_rng(0)
        drawn = rng.lognormal(4.5, 0.5, limit).astype(int) + 20
        return drawn, np.full(limit, 8)
    order = np.random.default_rng(0).permutation(len(records))[:limit]
    preamble = 150  # bytes of the instruction around each
    texts = [(records[i]["instruction"], records[i]["output"]) for i in order]
    prompt = np.array([(len(p.encode()) + preamble) // BYTES_A_TOKEN for p, _ in texts])
    return prompt, np.array([max(len(a.encode()) // BYTES_A_TOKEN, 2) for _, a in texts])


def packing(shape: Shape, rounds: int, **folder: Any) -> None:
    """Useful tokens a second, packed and padded in three ways: ``packing.json``."""
    size, batches = (4, 2) if shape.tokens < 64 else (16, 6)
    at = shape.but(hidden=shape.hidden // 2, intermediate=shape.intermediate // 2, layers=4)
    prompts, answers = _lengths(20_000)
    if shape.tokens < 64:
        prompts = np.minimum(prompts, 24)
        at = shape
    total = prompts + answers
    longest = int(total.max())
    rng = np.random.default_rng(1)

    def rows_of(indices: Any) -> list[Any]:
        ids = [rng.integers(3, at.vocabulary, total[i]).tolist() for i in indices]
        return [
            (tokens, [int(prompts[i]), int(total[i])])
            for tokens, i in zip(ids, indices, strict=True)
        ]

    random = RandomBatchSampler(len(total), size).batches()[1 : batches + 1]
    grouped = LengthGroupedBatchSampler(total, size).batches()[1 : batches + 1]
    drawn = [rows_of(indices) for indices in random]
    alike = [rows_of(indices) for indices in grouped]

    def widest(rows: list[Any]) -> dict[str, Any]:
        filler = ([0] * longest, [])
        batch = training_batch([*rows, filler], 0)
        out = {key: value[:-1] for key, value in batch.items()}
        out["attention_mask"] = pad([[1] * len(r[0]) for r in [*rows, filler]], 0)[:-1]
        return out

    kinds: dict[str, list[dict[str, Any]]] = {
        "padded to the longest record": [widest(rows) for rows in drawn],
        "padded to the longest of the batch": [training_batch(rows, 0) for rows in drawn],
        "grouped by length, padded": [training_batch(rows, 0) for rows in alike],
        "packed": [packed_batch(rows, 0) for rows in drawn],
        "grouped by length, packed": [packed_batch(rows, 0) for rows in alike],
    }
    cases = {name: _training(at, made) for name, made in kinds.items()}
    useful = {n: sum(int(b["attention_mask"].sum()) for b in made) for n, made in kinds.items()}
    seconds = interleave(cases, rounds, warmup=1)
    rate = {name: [useful[name] / s for s in seconds[name]] for name in cases}
    rows = []
    for name, least in (
        ("padded to the longest record", 2.5),
        ("padded to the longest of the batch", None),
        ("grouped by length, padded", None),
    ):
        got = ratio(rate, "packed", name)
        rows.append(row(f"packed / {name}", got.pop("median"), least, at_least=True, **got))
    got = ratio(rate, "grouped by length, packed", "grouped by length, padded")
    rows.append(row("grouped and packed / grouped by length, padded", got.pop("median"), **got))
    for name, made in kinds.items():
        cells = sum(b["input_ids"].numel() for b in made)
        rows.append(row(f"{name}: share of useful tokens", useful[name] / cells))
    lengths = {"mean": float(total.mean()), "longest": longest}
    save("packing", rows, seconds=seconds, lengths=lengths, shape=repr(at), **folder)


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
