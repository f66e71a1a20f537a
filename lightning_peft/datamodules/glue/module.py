"""Eight tasks of GLUE (Wang et al. 2018, https://arxiv.org/abs/1804.07461).

CoLA, SST-2, MRPC, QQP, STS-B, MNLI, QNLI and RTE: everything but WNLI and the diagnostic set.
Trained on a task's train set, validated and tested on its dev set (MNLI: matched and mismatched),
since the labels of GLUE's test sets are hidden; so a checkpoint that was selected by ``val_score``
is tested on what selected it, as in the published rows. With ``val_size`` that many records of the
train set are validated instead, and the dev set is tested only. Scores are Matthews' correlation
for CoLA, Spearman's for STS-B (Pearson's beside it), accuracy for the rest (F1 beside it for MRPC
and QQP).

Protocols, by the tokenizer:

* ``glue``: the tokenizer's own encoding of pairs (BERT, RoBERTa).
* ``glue-ours``: for tokenizers without one (LLaMA), ``{name}: {first}``, a line break and
  ``{name}: {second}``; the names are Premise and Hypothesis (RTE, MNLI), Question and Sentence
  (QNLI), Question 1 and 2 (QQP), Sentence 1 and 2 (MRPC, STS-B). CoLA's and SST-2's sentences stand
  alone.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_peft.datamodules.glue.records import GlueFiles
from lightning_peft.datamodules.glue.tasks import TASKS, spelled
from lightning_peft.datamodules.labelled import LabelledDataModule
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.labelled import Labelled
from lightning_peft.errors import UserError

TRAIN, DEV = ("train",), ("dev", "validation")


class GlueDataModule(LabelledDataModule):
    """One task of GLUE.

    Args:
        task: ``cola``, ``sst2``, ``mrpc``, ``qqp``, ``stsb``, ``mnli``, ``qnli`` or ``rte``, with
            any capitals and marks.
        data_dir: Folder that holds the tasks' folders (``CoLA/train.tsv``), or the task's own; None
            takes `nyu-mll/glue` of the hub.
        max_length: Limit in tokens, special ones included. A byte-level tokenizer needs about four
            times what others do.
        **kwargs: The arguments of `LabelledDataModule`. With ``val_size`` the dev set chooses
            nothing: so many training records are validated instead.
    """

    protocol_name = "glue"

    def __init__(
        self, task: str, data_dir: str | None = None, max_length: int = 512, **kwargs: Any
    ) -> None:
        super().__init__(data_dir=data_dir, max_length=max_length, **kwargs)
        self.task = spelled(task) if spelled(task) in TASKS else known("task", task.lower(), TASKS)
        described = TASKS[self.task]
        self.label_names = described.labels
        self.metric_names = described.metrics
        self.pair_names = described.names if described.fields[1:] else None
        self.dev = dict(described.dev or ((self.task, DEV),))
        self.test_tasks = list(self.dev)
        self._said = False

    def setup(self, stage: str | None = None) -> None:
        """Load and encode what a stage needs, once.

        Args:
            stage: Lightning's ``fit``, ``validate``, ``test`` or ``predict``; None is all of them.
        """
        files = self._files()
        # Without its train set a task can still be validated and tested.
        if stage == "fit" and not files.there(TRAIN):
            raise UserError(
                f"{files.missing(TRAIN).rstrip('.')}; {self.task} can be tested from there, but "
                "not trained on."
            )
        super().setup(stage)

    def train_records(self) -> list[Labelled]:
        """Return the training records; none where they are not there."""
        files = self._files()
        return self._read(files, TRAIN) if files.there(TRAIN) else []

    def held_out_records(self) -> dict[str, list[Labelled]]:
        """Return the dev set, or those of its two parts that are there."""
        files = self._files()
        there = {name: names for name, names in self.dev.items() if files.there(names)}
        if not there:
            raise UserError(files.missing(next(iter(self.dev.values()))))
        if not self._said:
            absent = [name for name in self.dev if name not in there]
            without = f"; {', '.join(absent)} is not there" if absent else ""
            also = "" if self.val_size else "validated and "
            rank_zero_info(
                f"{self.task}: {also}tested on its dev set ({', '.join(there)}{without}), "
                "since GLUE hides its test sets' labels."
            )
            self._said = True
        return {name: self._read(files, names) for name, names in there.items()}

    def _read(self, files: GlueFiles, names: tuple[str, ...]) -> list[Labelled]:
        before = dict(files.counts)
        records = files.read(names)
        mended, left_out = (files.counts[key] - before[key] for key in ("mended", "left_out"))
        if mended or left_out:
            rank_zero_warn(
                f"{self.task} ({names[0]}): {mended} rows lacked the tab before their label and "
                f"were mended, {left_out} were broken otherwise and were left out."
            )
        return records

    def _files(self) -> GlueFiles:
        return GlueFiles(self.task, self.data_dir, self.cache_dir)
