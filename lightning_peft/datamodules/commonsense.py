"""The eight commonsense tasks, in the layout of LLM-Adapters (arXiv 2304.01933).

``data_dir/<task>/train.json`` and ``test.json`` are arrays of records with ``instruction``,
``input`` (always empty), ``output`` (``the correct answer is X``) and ``answer`` (``X``). Training
is on all tasks together, from ``commonsense_170k.json`` where it lies in ``data_dir`` or beside it,
else from the tasks' ``train.json``; tests are apart. Scores are accuracies: the first label of the
task that occurs in the output is the answer, and none is wrong.

Protocols, as they are pinned here:

* ``llm_adapters``: a space after "request." as in the original, no indentation, and the prompt ends
  in ``### Response:`` and a line break, so that the response begins a line; loss on the prompt too,
  256 tokens, 4 beams, 32 new tokens. The original indents every line after the first by 16 spaces
  (its evaluator's prompt ends in a line break and 16 spaces), and versions of its trainer differ
  from it by stray spaces and a literal comment: ``llm_adapters_indented`` is the evaluator's.
* ``droplora``: no space after "request.", the same end; loss on the response alone, greedy, at most
  2048 new tokens. Its script sets no limit of length; 2048 is ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.fields import text_if_any
from lightning_peft.datamodules.loading.records import RecordFiles
from lightning_peft.datamodules.protocols import INSTRUCTION, PREAMBLE, Protocol, indented
from lightning_peft.errors import UserError, shown

LABELS = {
    "boolq": ("true", "false"),
    "piqa": ("solution1", "solution2"),
    "social_i_qa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "hellaswag": ("ending1", "ending2", "ending3", "ending4"),
    "winogrande": ("option1", "option2"),
    "ARC-Easy": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "ARC-Challenge": ("answer1", "answer2", "answer3", "answer4", "answer5"),
    "openbookqa": ("answer1", "answer2", "answer3", "answer4", "answer5"),
}
JOINED = "commonsense_170k.json"
# The kind of a label tells the task of a joined record, as far as it can be told.
KIND = re.compile(r"(?:solution|option|answer|ending)(?=\d)|true|false")

_LLM_ADAPTERS = Protocol(
    "llm_adapters",
    f"{PREAMBLE} \n\n{INSTRUCTION}\n",
    loss_on="all",
    max_length=256,
    max_new_tokens=32,
    num_beams=4,
    extraction="the first of the task's labels",
)


class CommonsenseDataModule(TextDataModule):
    """BoolQ, PIQA, SIQA, HellaSwag, WinoGrande, ARC-e, ARC-c and OBQA.

    Args:
        data_dir: Folder, or ``owner/name`` of a data set on the hub, that holds the tasks' folders.
        protocol: ``llm_adapters``, ``llm_adapters_indented`` or ``droplora``.
        tasks: Which tasks; None is all that lie there. With fewer than eight named, training
            takes their own ``train.json``, since the joined file's records do not tell the task.
        **kwargs: The arguments of `TextDataModule`.
    """

    protocols = {
        "llm_adapters": _LLM_ADAPTERS,
        "llm_adapters_indented": replace(
            _LLM_ADAPTERS, name="llm_adapters_indented", template=indented(_LLM_ADAPTERS.template)
        ),
        "droplora": Protocol(
            "droplora",
            f"{PREAMBLE}\n\n{INSTRUCTION}\n",
            loss_on="response",
            max_length=2048,
            max_new_tokens=2048,
            extraction="the first of the task's labels",
        ),
    }

    def __init__(
        self,
        data_dir: str,
        protocol: str = "llm_adapters",
        tasks: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir=data_dir, protocol=protocol, **kwargs)
        for task in tasks or ():
            known("tasks", task, LABELS)
        self.tasks = tasks
        self.test_tasks = list(tasks or LABELS)

    def train_examples(self) -> list[Example]:
        """Return the records of all tasks together."""
        files = self._files(self.data_dir)
        for source in (files, self._files(f"{self.data_dir}/..")) if files.folder else (files,):
            if set(self.test_tasks) == set(LABELS) and source.has(JOINED):
                return self._joined(source)
        with_data = [task for task in self.test_tasks if files.has(f"{task}/train.json")]
        without = [task for task in self.test_tasks if task not in with_data]
        if not with_data:
            raise UserError(
                f"data.data_dir {self.data_dir!r} holds neither {JOINED} nor a train.json of "
                f"{', '.join(without)}; there is nothing to train on."
            )
        if without:
            rank_zero_info(f"Without a train.json, and only tested: {', '.join(without)}.")
        return [
            self.example(_instruction(record, f"{task}/train.json", i), record["output"], task, i)
            for task in with_data
            for i, record in enumerate(files.read(f"{task}/train.json", ("instruction", "output")))
        ]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return every task's test records."""
        files = self._files(self.data_dir)
        there = [task for task in self.test_tasks if files.has(f"{task}/test.json")]
        missing = [task for task in self.test_tasks if task not in there]
        if not there or (missing and self.tasks):
            raise UserError(
                f"data.data_dir {self.data_dir!r} has no {missing[0]}/test.json; "
                "give the folder that holds the tasks' folders, or name others in data.tasks."
            )
        if missing:
            rank_zero_info(f"Without a test.json, and not tested: {', '.join(missing)}.")
        return {
            task: [
                self.example(
                    _instruction(record, f"{task}/test.json", i),
                    "",
                    task,
                    i,
                    _label(record, task, i),
                )
                for i, record in enumerate(
                    files.read(f"{task}/test.json", ("instruction", "output", "answer"))
                )
            ]
            for task in there
        }

    def extract(self, output: str, task: str) -> str | None:
        """Return the first of the task's labels that occurs in an output."""
        found = re.search("|".join(LABELS[task]), output)
        return found.group() if found else None

    def _joined(self, source: RecordFiles) -> list[Example]:
        rank_zero_info(f"Training on {source.name}/{JOINED}.")
        examples = []
        for index, record in enumerate(source.read(JOINED, ("instruction", "output"))):
            kind = KIND.search(record["output"].removeprefix("the correct answer is "))
            task = f"{JOINED}, {kind.group() if kind else 'other'}"
            asked = _instruction(record, JOINED, index)
            examples.append(self.example(asked, record["output"], task, index))
        return examples

    def _files(self, data_dir: str | None) -> RecordFiles:
        return RecordFiles(str(data_dir), self.cache_dir)


def _label(record: Mapping[str, Any], task: str, index: int) -> str:
    """Return a test record's label, if it is one of the task's."""
    label: str = record["answer"]
    if label not in LABELS[task]:
        raise UserError(
            f"Record {index + 1} of {task}/test.json has the answer {shown(label)}, which is none "
            f"of {', '.join(LABELS[task])}."
        )
    return label


def _instruction(record: Mapping[str, Any], file: str, index: int) -> str:
    """Return the instruction, and the input after it, which is empty in all published files."""
    added = text_if_any(record, "input", f"Record {index + 1} of {file}")
    return "\n".join(filter(None, (record["instruction"], added)))
