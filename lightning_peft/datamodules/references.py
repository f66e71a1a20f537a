"""The base of every task that writes a text of a source and is compared with references.

Each pair of a source and a reference is a training record; each source is one test record with all
of its references. Scores are those of `metrics.texts`: corpus BLEU (0 to 100) and the mean ROUGE-L
(0 to 1, the best reference of each record). Beside them stands ``loss``: the cross-entropy of all
references of a source given its prompt, in nats per token (EOS included), which differs least from
seed to seed.

E2E, DART and DialogSum are such tasks. Each says in its file where its records lie, what a record
holds, and its prompt. LoRA-drop evaluates on them without saying how it asks, so their protocols
are ours (`our_protocol`): greedy, at most 128 new tokens, loss on the reference and its EOS.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.fields import filled
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.loading.samplers import fixed_sample
from lightning_peft.datamodules.metrics.texts import bleu, rouge_l
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.errors import UserError


@dataclass(frozen=True)
class Referenced:
    """A source and what was written of it."""

    source: str
    references: tuple[str, ...]


def three_splits(
    hub: str, train: Sequence[str], dev: Sequence[str], test: Sequence[str]
) -> dict[str, Source]:
    """Say where the splits of a data set lie.

    Args:
        hub: ``owner/name`` on the hub, where the dev split is called ``validation``.
        train: Glob patterns of its files in a folder, the first that matches to be read.
        dev: The same.
        test: The same.
    """
    return {
        "train": Source(tuple(train), hub, "train"),
        "dev": Source(tuple(dev), hub, "validation"),
        "test": Source(tuple(test), hub, "test"),
    }


def our_protocol(task: str, template: str, max_length: int) -> dict[str, Protocol]:
    """Make a task's only protocol, ``<task>-ours``.

    Args:
        task: The task.
        template: The prompt; ``{instruction}`` stands for the source.
        max_length: Limit in tokens, prompt and reference together.
    """
    name = f"{task}-ours"
    return {name: Protocol(name, template, "response", max_length, max_new_tokens=128)}


class ReferencesDataModule(TextDataModule):
    """Texts that are written from a source and compared with references.

    A benchmark says its ``task``, the ``splits`` (``train``, ``dev``, ``test``), and what a record
    holds (``source_of``, ``references_of``; ``wanted`` names both in errors).

    Args:
        data_dir: Folder of the published files; None takes the hub's data.
        protocol: Its only one when None.
        train_split: ``train``, or ``dev`` where only that is at hand.
        test_split: ``test``, or ``dev``. Where both are ``dev``, the ``val_size`` sources that
            training leaves out are tested.
        **kwargs: The arguments of `TextDataModule`. ``val_size`` counts sources here, all of whose
            references are left out; where training is on ``train`` and there is a dev file or the
            hub's, that is validated instead.
    """

    task: ClassVar[str]
    splits: ClassVar[Mapping[str, Source]]
    wanted: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        data_dir: str | None = None,
        protocol: str | None = None,
        train_split: Literal["train", "dev"] = "train",
        test_split: Literal["test", "dev"] = "test",
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, protocol or next(iter(self.protocols)), **kwargs)
        self.train_split = known("train_split", train_split, ("train", "dev"))
        self.test_split = known("test_split", test_split, ("test", "dev"))
        self.test_tasks = [self.task]

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return what a text is to be written of; None where the record does not hold it.

        Raises:
            UserError: If it holds something else; where it stands is put before what this says.
        """
        raise NotImplementedError

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return a record's references; others of the same source may stand in other records.

        Raises:
            UserError: As in :meth:`source_of`.
        """
        raise NotImplementedError

    def train_examples(self) -> list[Example]:
        """Return every pair of a source and one of its references."""
        records = self._read(self.train_split)
        held_out = set() if self._has_dev else set(self._held_out(records))
        return self._pairs([r for i, r in enumerate(records) if i not in held_out])

    def val_examples(self) -> list[Example]:
        """Return the pairs of the dev split, or those of the sources that are held out."""
        if self._has_dev:
            return self._pairs(self._read("dev"))
        records = self._read(self.train_split)
        return self._pairs([records[i] for i in self._held_out(records)])

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return every source with all of its references."""
        records = self._read(self.test_split)
        rows: Sequence[int] = range(len(records))
        if self.train_split == self.test_split:
            rows = self._held_out(records)
            if not rows:
                raise UserError(
                    "data.val_size is 0 and training takes the whole dev split, so nothing is left "
                    "to test on; raise it, or set data.test_split: test."
                )
        return {self.task: [self._asked(records[i], i, "") for i in rows]}

    def reference_batches(
        self, batch: Mapping[str, Any]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Make batches of a test batch's prompts, each with every one of its references."""
        pairs = [
            (i, Example(prompt, reference, self.task, 0))
            for i, (prompt, texts) in enumerate(
                zip(batch["prompt"], batch["expected"], strict=True)
            )
            for reference in texts
        ]
        columns = self.encoder.encode([example for _, example in pairs], True)
        rows = [
            (len(tokens), owner, (tokens, [first, len(tokens)]))
            for (owner, _), tokens, first in zip(
                pairs, columns["tokens"], columns["prompt_length"], strict=True
            )
            if tokens  # a reference over the limit is left out, as in training
        ]
        rows.sort(key=lambda row: -row[0])
        for start in range(0, len(rows), self.eval_batch_size):
            some = rows[start : start + self.eval_batch_size]
            yield (
                [owner for _, owner, _ in some],
                training_batch([row for _, _, row in some], self.encoder.pad_id),
            )

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write each output's own ROUGE-L into its line."""
        for row in rows:
            row["rougeL"] = rouge_l(row["output"], row["expected"])

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name the metrics."""
        return ("bleu", "rougeL", "loss")

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return corpus BLEU, the mean ROUGE-L, and the references' loss per token, in nats."""
        corpus = bleu([row["output"] for row in rows], [row["expected"] for row in rows])
        scores = {"bleu": corpus, "rougeL": sum(row["rougeL"] for row in rows) / len(rows)}
        # Of all records or of none: an older version may have answered some.
        tokens = [row["target_tokens"] for row in rows if "target_tokens" in row]
        if len(tokens) == len(rows) and any(tokens):
            scores["loss"] = sum(row["loss"] for row in rows) / sum(tokens)
        return scores

    @property
    def _has_dev(self) -> bool:
        there = self.data_dir is None or self.splits["dev"].there(self.data_dir)
        return self.train_split == "train" and bool(there)

    def _held_out(self, records: Sequence[Referenced]) -> Sequence[int]:
        if self.val_size >= len(records):
            raise UserError(
                f"data.val_size is {self.val_size}, which leaves nothing of the {len(records)} "
                f"{self.task} sources in the {self.train_split} split; lower it."
            )
        return fixed_sample(len(records), self.val_size)

    def _pairs(self, records: Sequence[Referenced]) -> list[Example]:
        pairs = [(r, text) for r in records for text in r.references]
        return [self._asked(r, index, text) for index, (r, text) in enumerate(pairs)]

    def _asked(self, record: Referenced, index: int, response: str) -> Example:
        return self.example(record.source, response, self.task, index, list(record.references))

    def _read(self, split: str) -> list[Referenced]:
        """Read a split, the references of a source together, in the order of its first record."""
        source = self.splits[split]
        dev = self.splits["dev"].there(self.data_dir)
        if split == "train" and dev and not source.there(self.data_dir):
            raise UserError(
                f"data.data_dir {self.data_dir!r} holds no {' or '.join(source.files)} to train "
                f"on; data.train_split: dev takes {dev[0].name}, which is there."
            )
        records = source.read(self.data_dir, self.cache_dir)
        place = ", ".join(map(str, source.there(self.data_dir))) or f"{source.hub} ({split})"
        found: dict[str, list[str]] = {}
        for number, record in enumerate(records, start=1):
            try:
                text, references = self.source_of(record), self.references_of(record)
            except UserError as error:
                raise UserError(f"Record {number} of {place} {str(error).strip()}") from error
            kept = [reference for reference in references if reference]
            if not text or not kept:
                lacking = self.wanted["reference" if text else "source"]
                raise UserError(
                    f"Record {number} of {place} has no {lacking}, only {filled(record)}."
                )
            found.setdefault(text, []).extend(kept)
        return [Referenced(text, tuple(references)) for text, references in found.items()]
