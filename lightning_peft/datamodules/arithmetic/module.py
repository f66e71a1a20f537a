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

import copy
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.datamodules.arithmetic.problems import (
    ANSWER_LENGTH,
    BASE,
    NAMES,
    PAIRS,
    PROMPT_LENGTH,
    answer_text,
    answers,
    characters,
    split_pairs,
    write_examples,
)
from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.loading.arguments import at_least, known
from lightning_peft.datamodules.loading.batches import (
    IGNORED,
    PromptDataset,
    Subset,
    TrainingData,
    training_batch,
)
from lightning_peft.datamodules.loading.examples import Encoder, Example
from lightning_peft.datamodules.loading.samplers import fixed_sample
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.errors import UserError

TASKS = {"subtraction": "-", "operators": "-%&^"}
MOST_HELD_OUT = 100_000
# Prompt, answer and EOS, in characters.
LENGTH = PROMPT_LENGTH + ANSWER_LENGTH + 1


class ArithmeticDataset(Dataset[Any]):
    """Problems that become token ids a batch at a time, with loss on the answer.

    With a tokenizer that takes every character by itself (the embedded model's), ids are looked up
    in a table; with any other, the batch's texts are tokenized.

    Args:
        encoder: The encoder.
        operators: The task's operators.
        pairs: Pair numbers; every operator is asked about each.
    """

    def __init__(self, encoder: Encoder, operators: str, pairs: np.ndarray) -> None:
        self.encoder, self.operators, self.pairs = encoder, operators, pairs
        # All answers there are; with their lengths, windows are weighed without encoding problems.
        texts = encoder.texts([answer_text(a) for a in range(1 - BASE, BASE)])
        self._answer_targets = np.array([len(ids) + 1 for ids in texts])
        self.table = self._character_table()

    def __len__(self) -> int:
        """Return the number of problems."""
        return len(self.operators) * len(self.pairs)

    def over(self, pairs: np.ndarray) -> ArithmeticDataset:
        """Return the same data set over other pairs, without looking at the tokenizer again."""
        other = copy.copy(self)
        other.pairs = pairs
        return other

    def problems(self, indices: Sequence[int]) -> np.ndarray:
        """Return the problem numbers of rows."""
        operator, pair = np.divmod(np.asarray(indices, dtype=np.int64), len(self.pairs))
        return operator * PAIRS + self.pairs[pair]

    def examples(self, indices: Sequence[int]) -> list[Example]:
        """Write problems as text."""
        return write_examples(self.operators, self.problems(indices), indices)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of rows; it is made at once, since rows are not made one by one."""
        if self.table is not None:
            return self._looked_up(self.problems(indices), self.table)
        columns = self.encoder.encode(self.examples(indices), True)
        rows = zip(columns["tokens"], columns["prompt_length"], strict=True)
        spans = [(tokens, [first, len(tokens)]) for tokens, first in rows]
        return training_batch(spans, self.encoder.pad_id)

    def collate(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the batch as it is."""
        return rows

    def count_targets(self, indices: Sequence[int]) -> int:
        """Count the tokens of the rows' answers, EOS included."""
        found = answers(self.operators, self.problems(indices))
        return int(self._answer_targets[found + BASE - 1].sum())

    def lengths(self) -> None:
        """Return None: all problems have one form."""
        return

    def strata(self) -> np.ndarray:
        """Return every row's operator."""
        return np.repeat(np.arange(len(self.operators), dtype=np.int8), len(self.pairs))

    def _looked_up(self, problems: np.ndarray, table: Tensor) -> dict[str, Tensor]:
        ids = table[torch.from_numpy(characters(self.operators, problems))]  # (n, 12)
        before, after = (
            torch.tensor([special]).expand(len(ids), -1)
            for special in (self.encoder.prefix, [self.encoder.eos_id])
        )
        tokens = torch.cat([before.long(), ids, after], dim=1)
        labels = tokens.clone()
        labels[:, : before.shape[1] + PROMPT_LENGTH] = IGNORED
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": labels}

    def _character_table(self) -> Tensor | None:
        """Map ASCII codes to ids, if the tokenizer takes each character by itself."""
        used = sorted({*"0123456789-=", *self.operators})
        ids = self.encoder.texts(used)
        too_long = len(self.encoder.prefix) + LENGTH > self.encoder.max_length
        if (
            too_long
            or any(len(i) != 1 for i in ids)
            or (self._answer_targets != ANSWER_LENGTH + 1).any()
        ):
            return None
        table = torch.zeros(128, dtype=torch.long)
        table[[ord(character) for character in used]] = torch.tensor(ids)[:, 0]
        # The tokenizer might still join characters in some problems: look at a few hundred.
        rows = np.linspace(0, len(self) - 1, num=min(len(self), 256), dtype=np.int64)
        columns = self.encoder.encode(self.examples(rows.tolist()), True)
        if any(len(t) != len(self.encoder.prefix) + LENGTH for t in columns["tokens"]):
            return None
        same = self._looked_up(self.problems(rows.tolist()), table)["input_ids"]
        return table if same.tolist() == columns["tokens"] else None


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
