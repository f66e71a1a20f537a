"""Problems that become token ids a batch at a time."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.datamodules.arithmetic.problems import (
    ANSWER_LENGTH,
    BASE,
    PAIRS,
    PROMPT_LENGTH,
    answer_text,
    answers,
    characters,
    write_examples,
)
from lightning_peft.datamodules.loading.batches import IGNORED, training_batch
from lightning_peft.datamodules.loading.examples import Encoder, Example

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
