"""A small task that the embedded model can do, and what trains and tests on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_peft import CausalLMModule
from lightning_peft.datamodules import Example, Protocol, TextDataModule
from lightning_peft.strategies import LoRA

# Prompt and response; the embedded model adds without an error.
RIGHT = (("042+917", "0959"), ("999+001", "1000"), ("123+456", "0579"), ("500+500", "1000"))
WRONG = (("042+917", "0958"), ("042+917", "095"), ("042+917", "09590"), ("007+001", "8"))


class Sums(TextDataModule):
    """Seven records to train on, eight of which half are right to validate and test with."""

    protocols = {
        "greedy": Protocol("greedy", "{instruction}=", "response", 64, 8),
        "sampled": Protocol("sampled", "{instruction}=", "response", 64, 8, temperature=3.0),
    }

    def __init__(self, fails_at: int = -1, tasks: Sequence[str] = ("sums",), **kwargs: Any) -> None:
        given = {"protocol": "greedy", "batch_size": 2, "eval_batch_size": 3, **kwargs}
        super().__init__(data_dir=None, group_by_length=False, **given)
        self.fails_at, self.tasks = fails_at, tasks
        self.judged: list[tuple[str, int]] = []

    def train_examples(self) -> Sequence[Example]:
        return [self.example("1" * (i % 3 + 1), "7" * (i % 4 * 2), "t", i) for i in range(7)]

    def val_examples(self) -> Sequence[Example]:
        return [self.example(*pair, "v", i) for i, pair in enumerate(RIGHT + WRONG)]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        pairs = {"sums": RIGHT + WRONG, "few": RIGHT[:3] + WRONG[:1]}
        return {
            task: [
                self.example(prompt, "", task, i, expected)
                for i, (prompt, expected) in enumerate(pairs[task])
            ]
            for task in self.tasks
        }

    def extract(self, output: str, task: str) -> str | None:
        return output or None

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        if len(self.judged) == self.fails_at:
            raise RuntimeError("the lights went out")
        super().judge(task, rows)
        self.judged += [(task, row["index"]) for row in rows]


def module(adapter: LoRA | None = None, **kwargs: Any) -> CausalLMModule:
    sgd = functools.partial(torch.optim.SGD, lr=0.25)
    options = {"optimizer": sgd, "lr_scheduler_type": "constant", **kwargs}
    return CausalLMModule("tiny_llama", adapter=adapter or LoRA(r=2), **options)


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **kwargs})


def losses_by_hand(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss of each target token, row by row and without padding."""
    losses = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0]
        for position in range(1, length):
            if labels[position] != -100:
                assert labels[position] == ids[position]
                losses.append(-logits[position - 1].log_softmax(-1)[ids[position]])
    return losses
