"""The base of every task that is answered in text: examples, masks, extraction, scores.

A new benchmark is one class in one file, and nothing else changes. It says what its records are
(``train_examples``, ``test_examples``), how they are asked (its `Protocol` records), and how an
answer is found in a model's output and judged (``extract``, ``correct``). For example::

    from lightning_peft.datamodules import Protocol, Source, TextDataModule

    TRAIN, TEST = (
        Source((f"{split}.jsonl",), "someone/capitals", split, texts=("country", "capital"))
        for split in ("train", "test")
    )
    ASKED = Protocol("capitals-ours", "The capital of {instruction} is", "response", 64, 8)


    class Capitals(TextDataModule):
        protocols = {ASKED.name: ASKED}

        def __init__(self, data_dir: str | None, protocol: str = ASKED.name, **kwargs) -> None:
            super().__init__(data_dir, protocol, **kwargs)

        def train_examples(self):
            rows = enumerate(TRAIN.read(self.data_dir, self.cache_dir))
            return [self.example(r["country"], f" {r['capital']}", "capitals", i) for i, r in rows]

        def test_examples(self):
            rows = enumerate(TEST.read(self.data_dir, self.cache_dir))
            asked = [self.example(r["country"], "", "capitals", i, r["capital"]) for i, r in rows]
            return {"capitals": asked}

        def extract(self, output, task):
            return output.split()[0] if output.split() else None

`LabelledDataModule` is the base of tasks with classes or scores, `ReferencesDataModule` of texts
that are compared with references.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_peft.datamodules.loading.arguments import at_least, known
from lightning_peft.datamodules.loading.batches import EncodedDataset, PromptDataset, TrainingData
from lightning_peft.datamodules.loading.examples import (
    Encoder,
    Example,
    checked_example,
    encode_cached,
)
from lightning_peft.datamodules.loading.fields import text_in
from lightning_peft.datamodules.loading.packing import PackedDataset
from lightning_peft.datamodules.loading.samplers import fixed_sample
from lightning_peft.datamodules.loading.tokenized import TokenizedDataModule
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.errors import UserError


class TextDataModule(TokenizedDataModule):
    """Records with a prompt and a response, for training and for testing by generation.

    Args:
        data_dir: Folder, file or hub name of the data; what exactly, the task says.
        protocol: Name of one of the task's protocols.
        max_length: Limit in tokens in place of the protocol's. A byte-level tokenizer needs about
            four times what others do.
        max_new_tokens: Limit of generated tokens in place of the protocol's.
        packing: Train on rows of several records, each up to ``max_length`` tokens and none seen by
            another. ``batch_size`` then counts such packs.
        **kwargs: The arguments of `TokenizedDataModule`.

    Attributes:
        protocol: The `Protocol` in force, limits included.
    """

    protocols: ClassVar[Mapping[str, Protocol]] = {}

    def __init__(
        self,
        data_dir: str | None,
        protocol: str,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        packing: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir=data_dir, **kwargs)
        self.packing = packing
        changes = {"max_length": max_length, "max_new_tokens": max_new_tokens}
        given = {key: at_least(1, key, n) for key, n in changes.items() if n is not None}
        chosen = self.protocols[known("protocol", protocol, self.protocols)]
        self.protocol = replace(chosen, **given)  # type: ignore[arg-type]
        self._encoder: Encoder | None = None

    # What a task says -----------------------------------------------------------------------------

    def train_examples(self) -> Sequence[Example]:
        """Return the training records."""
        raise NotImplementedError

    def val_examples(self) -> Sequence[Example] | None:
        """Return the validation records; None takes ``val_size`` of the training records."""
        return None

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return the test records of every task in ``test_tasks``."""
        raise NotImplementedError

    def extract(self, output: str, task: str) -> str | None:
        """Find the answer in a model's output; None where there is none."""
        raise NotImplementedError

    def correct(self, extracted: str, expected: Any, task: str) -> bool:
        """Judge an answer that was found."""
        return extracted == expected

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Judge a batch of outputs: write into every row what its line of predictions shall tell.

        Args:
            task: The task.
            rows: Each with ``index``, ``prompt``, ``output`` and ``expected``; ``extracted`` and
                ``correct`` are added (an output without an answer is wrong).
        """
        for row in rows:
            found = row["extracted"] = self.extract(row["output"], task)
            row["correct"] = found is not None and self.correct(found, row["expected"], task)

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Score a task's predictions.

        Args:
            task: The task.
            rows: All of its predictions, judged.

        Returns:
            Metrics by name, the one that averages over tasks are taken of first; ``accuracy``
            unless a task says otherwise.
        """
        return {"accuracy": sum(row["correct"] for row in rows) / len(rows)}

    def score_names(self, task: str) -> tuple[str, ...]:
        """Names of the metrics that :meth:`score` will give, known before there are answers.

        A task with a ``score`` of its own says them here too; where it does not, a comparison
        cannot tell a wrong name before its runs have ended.
        """
        return ("accuracy",)

    def decoding(self, task: str) -> Protocol:
        """Say how a task's answers are generated."""
        return self.protocol

    def task_protocol(self, task: str) -> Protocol:
        """Return the protocol in force on a test task, its decoding included."""
        return self.decoding(task)

    def follow_up(self, batch: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any] | None:
        """Ask on in a conversation.

        Args:
            batch: A batch of prompts.
            outputs: The answers to it.

        Returns:
            The batch of next prompts, or None where the answers are complete.
        """
        return None

    def reference_batches(
        self, batch: Mapping[str, Any]
    ) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
        """Make batches of a test batch's prompts, each with the texts that would be right.

        Args:
            batch: Of prompts.

        Yields:
            The record of each row, by its place in ``batch``, and the rows as training has them;
            nothing where a task has no such texts. A test then gives a loss per token.
        """
        yield from ()

    def write_answers(self, folder: Path, predictions: Mapping[str, Sequence[Any]]) -> None:
        """Write a test's answers once more, in a form that others read.

        Args:
            folder: Where the predictions are.
            predictions: Each task's, as in their files.
        """

    def example(
        self, instruction: str, response: str, task: str, index: int, expected: Any = ""
    ) -> Example:
        """Make an example whose prompt is the protocol's for an instruction."""
        asked = {"instruction": instruction}
        prompt = self.protocol.prompt(
            text_in(asked, "instruction", f"Record {index + 1} of {task}")
        )
        return Example(prompt, response, task, index, expected)

    # Data sets ------------------------------------------------------------------------------------

    def training_sets(self) -> tuple[TrainingData, TrainingData]:
        """Make the training and the validation set (which may be empty)."""
        train, val = list(self.train_examples()), self.val_examples()
        if not train:
            raise UserError(f"data.data_dir {self.data_dir!r} holds no training record.")
        if val is None:
            if self.val_size >= len(train):
                raise UserError(
                    f"data.val_size is {self.val_size}, which leaves nothing of the {len(train)} "
                    "training records; lower it."
                )
            held_out = set(fixed_sample(len(train), self.val_size))
            val = [e for i, e in enumerate(train) if i in held_out]
            train = [e for i, e in enumerate(train) if i not in held_out]
        return self._encoded("train", train), self._encoded("val", val)

    def batched(self, data: TrainingData) -> TrainingData:
        """Return the data, or packs of them."""
        if not self.packing:
            return data
        packed = PackedDataset(data, self._limit)
        rank_zero_info(
            f"packing: {len(data)} training records in {len(packed)} packs of up to "
            f"{self._limit} tokens, {packed.lengths().mean() / self._limit:.1%} full"
        )
        return packed

    def test_sets(self) -> dict[str, PromptDataset]:
        """Make the test set of every task."""
        sets, cut = {}, {}
        for task, examples in self.test_examples().items():
            rows = fixed_sample(len(examples), self.limits["test"])
            kept = [checked_example(examples[i]) for i in rows]
            if not kept:
                raise UserError(f"data.data_dir {self.data_dir!r} holds no test record of {task}.")
            # Earlier turns stand before a prompt as in training, with their responses.
            asked = [replace(e, response="") for e in kept]
            turns = any(e.history for e in kept)
            table = encode_cached(self.encoder, asked, turns, self.cache_dir)
            sets[task] = PromptDataset(before_response(table), kept, self.encoder.pad_id)
            cut[task] = sum(n > 0 for n in table["cut"])
        self.counts["test"] = {task: len(data) for task, data in sets.items()}
        self.report_cut("test", sum(cut.values()), sum(map(len, sets.values())), self._limit)
        return sets

    def _encoded(self, split: str, examples: Sequence[Example]) -> EncodedDataset:
        rows = fixed_sample(len(examples), self.limits[split])
        examples = [checked_example(examples[i]) for i in rows]
        table = encode_cached(self.encoder, examples, True, self.cache_dir)
        fitting = [i for i, tokens in enumerate(table["tokens"]) if tokens]
        self._report_left_out(split, len(examples) - len(fitting), len(examples))
        table, tasks = table.select(fitting), [examples[i].task for i in fitting]
        self.counts[split] = len(table)
        self.report_cut(split, sum(n > 0 for n in table["cut"]), len(table), self._limit)
        return EncodedDataset(table, tasks, self.encoder.pad_id, self.protocol.loss_on)

    def _report_left_out(self, split: str, left_out: int, total: int) -> None:
        self.counts.setdefault("left_out", {})[split] = left_out
        why = f"response over the limit of {self._limit} tokens"
        if left_out and left_out == total:
            raise UserError(f"all {total} {split} records have a {why}; raise data.max_length.")
        if left_out:
            rank_zero_warn(
                f"{left_out} of {total} {split} records have a {why} and were left out; "
                "data.max_length raises it."
            )

    @property
    def _limit(self) -> int:
        return self.protocol.max_length

    # The tokenizer --------------------------------------------------------------------------------

    @property
    def encoder(self) -> Encoder:
        """What turns text into token ids; there from ``setup`` on."""
        if self._encoder is None:
            raise RuntimeError("The tokenizer is known from `setup` on; call it first.")
        return self._encoder

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer, before any set is made."""
        self._encoder = Encoder(tokenizer, self.protocol.max_length)


def before_response(columns: Mapping[str, Any]) -> list[list[int]]:
    """Take from the columns of `Encoder.encode` what stands before each last response."""
    pairs = zip(columns["tokens"], columns["prompt_length"], strict=True)
    return [ids[:length] for ids, length in pairs]
