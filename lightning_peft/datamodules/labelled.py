"""The base of every task whose texts are recognised as a class or given a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torchmetrics import MetricCollection
from transformers import PreTrainedTokenizerBase

from lightning_peft.datamodules.loading.arguments import at_least
from lightning_peft.datamodules.loading.labelled import Labelled, LabelledDataset, checked_label
from lightning_peft.datamodules.loading.pairs import PairEncoder
from lightning_peft.datamodules.loading.samplers import fixed_sample
from lightning_peft.datamodules.loading.tokenized import TokenizedDataModule
from lightning_peft.datamodules.metrics.labels import make_metrics
from lightning_peft.datamodules.protocols import PairProtocol
from lightning_peft.errors import UserError


class LabelledDataModule(TokenizedDataModule):
    """Texts or pairs of texts with labels, for `SequenceClassificationModule`.

    A task says its labels and gives its records. For example::

        class Spam(LabelledDataModule):
            label_names = ("ham", "spam")

            def train_records(self):
                return [Labelled("Win now!", None, label=1, index=0), ...]

            def held_out_records(self):
                return {"spam": [Labelled("See you at six.", None, label=0, index=0), ...]}

    Args:
        data_dir: Folder or hub name of the data; what exactly, the task says.
        max_length: Limit in tokens, special ones included. A byte-level tokenizer needs about four
            times what others do.
        val_size: Training records that are left out and validated on, so that what is tested
            chooses nothing; 0 validates on what is tested.
        **kwargs: The arguments of `TokenizedDataModule`.

    Attributes:
        label_names: Names of the classes in the order of their indices; None for scores.
        metric_names: Of predictions (see `make_metrics`); the one to select by first.
        pair_names: What our template calls the two texts of a pair; None for single texts.
        protocol: The `PairProtocol` in force; there from ``setup`` on.
        val_sets: After ``setup``: names of the sets that are validated on together; a validation
            batch's ``set`` (n,) holds their numbers.
    """

    label_names: tuple[str, ...] | None = None
    metric_names: tuple[str, ...] = ("accuracy",)
    pair_names: tuple[str, str] | None = None
    protocol_name = "pairs"

    def __init__(
        self, data_dir: str | None, max_length: int = 512, val_size: int = 0, **kwargs: Any
    ) -> None:
        super().__init__(data_dir=data_dir, val_size=val_size, **kwargs)
        self.max_length = at_least(8, "max_length", max_length)
        self.protocol: PairProtocol | None = None
        self.val_sets: list[str] = []
        self._encoder: PairEncoder | None = None

    # What a task says -----------------------------------------------------------------------------

    def train_records(self) -> Sequence[Labelled]:
        """Return the training records."""
        raise NotImplementedError

    def held_out_records(self) -> Mapping[str, Sequence[Labelled]]:
        """Return the records of every set that is validated and tested on, by its name."""
        raise NotImplementedError

    def metrics(self) -> MetricCollection:
        """Make the metrics of predicted class indices or scores."""
        return make_metrics(self.metric_names, len(self.label_names or ()))

    def task_protocol(self, task: str) -> PairProtocol:
        """Return the protocol in force, the same on all sets."""
        assert self.protocol is not None
        return self.protocol

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Say of every row with ``output`` and ``expected`` whether it is ``correct``.

        A score is neither right nor wrong.
        """
        for row in rows if self.label_names else ():
            row["correct"] = row["output"] == row["expected"]

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name the metrics of a set's predictions."""
        return (*self.metric_names, "loss")

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Score a set's predictions: metrics by name, the one to select by first.

        Last comes ``loss``, the mean cross-entropy or squared error.
        """
        metrics = self.metrics()
        columns = [[self._number(row[key]) for row in rows] for key in ("output", "expected")]
        metrics.update(*map(torch.tensor, columns))
        values = metrics.compute()
        scores = {name: float(values[name]) for name in self.metric_names}
        losses = [row["loss"] for row in rows if "loss" in row]
        # Of all records or of none: an older version may have answered some.
        complete = losses and len(losses) == len(rows)
        return {**scores, "loss": sum(losses) / len(losses)} if complete else scores

    def write_answers(self, folder: Path, predictions: Mapping[str, Sequence[Any]]) -> None:
        """Nothing: predictions have no further form."""

    def label_text(self, label: float) -> str | float:
        """Write a class index as its name, and leave a score as it is."""
        return self.label_names[int(label)] if self.label_names else label

    def _number(self, label: str | float) -> int | float:
        return self.label_names.index(str(label)) if self.label_names else float(label)

    # Data sets ------------------------------------------------------------------------------------

    def training_sets(self) -> tuple[LabelledDataset, LabelledDataset]:
        """Make the training set, and one validation set of all that it is validated on."""
        train = list(self.train_records())
        if self.val_size:
            train, held_out = self._split(train)
        else:
            held_out = self.held_out_records()
        self.val_sets = list(held_out)
        rows = [(n, record) for n, records in enumerate(held_out.values()) for record in records]
        rows = [rows[i] for i in fixed_sample(len(rows), self.limits["val"])]
        numbers, val = [n for n, _ in rows], [record for _, record in rows]
        train = [train[i] for i in fixed_sample(len(train), self.limits["train"])]
        return self._encoded("train", train), self._encoded("val", val, sets=numbers)

    def _split(
        self, records: list[Labelled]
    ) -> tuple[list[Labelled], Mapping[str, Sequence[Labelled]]]:
        """Take ``val_size`` records, the same for every seed, out of those for training."""
        if self.val_size >= len(records):
            raise UserError(
                f"data.val_size is {self.val_size}, which leaves nothing of the {len(records)} "
                "training records; lower it."
            )
        chosen = set(fixed_sample(len(records), self.val_size))
        left = [record for i, record in enumerate(records) if i not in chosen]
        return left, {"train": [records[i] for i in sorted(chosen)]}

    def test_sets(self) -> dict[str, LabelledDataset]:
        """Make the test sets."""
        sets = {}
        for task, records in self.held_out_records().items():
            kept = [records[i] for i in fixed_sample(len(records), self.limits["test"])]
            sets[task] = self._encoded(task, kept, task=task)
        self.counts["test"] = {task: self.counts.pop(task) for task in sets}
        return sets

    def _encoded(self, split: str, records: Sequence[Labelled], **kwargs: Any) -> LabelledDataset:
        records = [checked_label(record, self.label_names, split) for record in records]
        table = self.encoder.cached(records, self.cache_dir)
        self.counts[split] = len(records)
        self.report_cut(
            split,
            sum(n > 0 for n in table["cut"]),
            len(records),
            self.encoder.max_length,
            what="records",
            where="at the end of the longer text",
        )
        regression = self.label_names is None
        return LabelledDataset(table, records, self.encoder.pad_id, regression, **kwargs)

    # The tokenizer --------------------------------------------------------------------------------

    @property
    def encoder(self) -> PairEncoder:
        """What turns text into token ids; there from ``setup`` on."""
        if self._encoder is None:
            raise RuntimeError("The tokenizer is known from `setup` on; call it first.")
        return self._encoder

    @property
    def pad_id(self) -> int:
        """What batches are padded with."""
        return self.encoder.pad_id

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer, before any set is made."""
        names = self.pair_names or ("Text 1", "Text 2")
        encoder = self._encoder = PairEncoder(tokenizer, self.max_length, names)
        name, template = self.protocol_name, None
        if not encoder.pairs:
            name, template = f"{name}-ours", encoder.template if self.pair_names else "{first}"
        self.protocol = PairProtocol(name, template, encoder.max_length)
