"""Generated arithmetic: the task of the embedded model, and one on which rank matters.

The embedded LLaMA was pre-trained on sums, ``042+917=`` -> ``0959``. Fine-tuning teaches it other
operators in the same form: operands of three digits, answers of four characters.

* ``subtraction``: ``042-917=`` -> ``-875``.
* ``operators``: four at once, which asks more of an adapter than one does: ``-`` the difference,
  ``%`` the reversed difference b - a, ``&`` the smaller of each pair of digits, ``^`` each pair's
  sum modulo 10, without carry.

Test and validation pairs never occur in training: neither in their own nor in the reversed order,
under no operator. They depend on ``split_seed`` alone, so that every seed is tested on the same
problems. Problems are numbers here, ``operator · 10⁶ + a · 10³ + b``, and become text or token ids
only in a batch.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import numpy as np

from lightning_peft.datamodules.arithmetic.dataset import ArithmeticDataset
from lightning_peft.datamodules.arithmetic.problems import (
    NAMES,
    PAIRS,
    split_pairs,
    write_examples,
)
from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.loading.arguments import at_least, known
from lightning_peft.datamodules.loading.batches import PromptDataset, Subset, TrainingData
from lightning_peft.datamodules.loading.samplers import fixed_sample
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.errors import UserError

TASKS = {"subtraction": "-", "operators": "-%&^"}
MOST_HELD_OUT = 100_000


class ArithmeticDataModule(TextDataModule):
    """Generated problems, as an endless stream or as a small set over many epochs.

    Args:
        task: ``subtraction``, or the harder ``operators``.
        regime: ``stream``: an epoch is every problem that is not held out (about a million for each
            operator), so that training hardly ever meets one twice; ``fixed``: an epoch is
            ``train_size`` problems, which ``seed`` draws.
        train_size: Training problems of the ``fixed`` regime.
        val_size: Validation pairs, the same for every seed; each operator is asked about each.
        test_size: Test pairs, likewise.
        split_seed: Fixes which pairs are held out.
        **kwargs: The arguments of `TextDataModule` that are not fixed here.
    """

    protocols = {
        "arithmetic-ours": Protocol(
            "arithmetic-ours",
            "{instruction}",
            "response",
            max_length=32,
            max_new_tokens=6,
            extraction="the first four characters, if they have the form of an answer",
        )
    }

    def __init__(
        self,
        task: Literal["subtraction", "operators"] = "subtraction",
        regime: Literal["stream", "fixed"] = "stream",
        train_size: int = 1000,
        val_size: int = 1000,
        test_size: int = 1000,
        split_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir=None, protocol="arithmetic-ours", val_size=val_size, **kwargs)
        self.operators = TASKS[known("task", task, TASKS)]
        self.regime = known("regime", regime, ("stream", "fixed"))
        self.train_size = at_least(1, "train_size", train_size)
        self.test_size = at_least(1, "test_size", test_size)
        if test_size + val_size > MOST_HELD_OUT:
            raise UserError(
                f"data.test_size and data.val_size are {test_size + val_size} pairs together; "
                f"at most {MOST_HELD_OUT} can be held out."
            )
        self.split_seed = at_least(0, "split_seed", split_seed)
        self.test_tasks = [NAMES[operator] for operator in self.operators]

    def training_sets(self) -> tuple[TrainingData, TrainingData]:
        """Make the training and the validation set."""
        _, val, train = split_pairs(self.split_seed, self.test_size, self.val_size)
        stream = ArithmeticDataset(self.encoder, self.operators, train)
        sizes = [len(stream), self.limits["train"] or len(stream)]
        size = min([*sizes, self.train_size] if self.regime == "fixed" else sizes)
        rng = np.random.default_rng(self.seed)
        drawn = rng.choice(len(stream), size, replace=False) if size < len(stream) else None
        held_out = stream.over(val)
        rows = fixed_sample(len(held_out), self.limits["val"])
        self.counts |= {"train": size, "val": len(rows)}
        return stream if drawn is None else Subset(stream, drawn), Subset(held_out, rows)

    def test_sets(self) -> dict[str, PromptDataset]:
        """Make each operator's test set."""
        pairs = split_pairs(self.split_seed, self.test_size, self.val_size)[0]
        rows = fixed_sample(len(pairs), self.limits["test"])
        self.counts["test"] = dict.fromkeys(self.test_tasks, len(rows))
        sets = {}
        for number, task in enumerate(self.test_tasks):
            numbers = number * PAIRS + pairs[rows]
            examples = write_examples(self.operators, numbers, rows)
            tokens = self.encoder.encode(examples, False)["tokens"]
            sets[task] = PromptDataset(tokens, examples, self.encoder.pad_id)
        return sets

    def extract(self, output: str, task: str) -> str | None:
        """Take the first four characters, if they have the form of an answer."""
        found = re.match(r"\s*(-\d{3}|\d{4})", output)
        return found.group(1) if found else None
