"""One's own data: instructions, conversations, prompts with completions, or plain text.

A file is json, jsonl, csv or parquet. All records have one form, which the fields tell; of several
that fit, the first in this list is taken:

* ``messages``: a list with ``role`` and ``content``; every answer carries loss;
* ``conversations``: the same with ``from`` and ``value``;
* ``instruction``: ``instruction`` and ``output``, with or without an ``input``;
* ``prompt``: ``prompt`` and ``completion``, joined as they are, without a template;
* ``text``: ``text``, all of which carries loss; there is nothing to test.

Protocol ``alpaca``: Stanford Alpaca's two prompts, each ended by a line break as in alpaca-lora
(Stanford's end in ``### Response:``)::

    Below is an instruction that describes a task. Write a response that appropriately completes
    the request.

    ### Instruction:
    {instruction}

    ### Response:

and where there is an input, "Below is an instruction that describes a task, paired with an input
that provides further context. Write …" with a further section ``### Input:`` before the response.
Greedy, 2048 tokens in all, at most 512 generated; these are ours. So is that each turn of a
conversation is asked in the template, a system message before its first question. ``template``
takes one's own text in its place; ``chat_template: true`` the tokenizer's, whose answers' end then
is what the model learns and generation stops at.

Tests compare answers with those in ``test_file``: the share that is equal but for white space
around it, and the mean ROUGE-L.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedTokenizerBase

from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.instruction.forms import FIELDS, of_one_form, texts_of
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.chats import Chat, ChatTemplate, read_chat
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.files import (
    READERS,
    Records,
    is_file,
    is_folder,
    read_file,
)
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.metrics.texts import rouge_l
from lightning_peft.datamodules.protocols import INSTRUCTION, PREAMBLE, Protocol
from lightning_peft.errors import UserError

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class InstructionDataModule(TextDataModule):
    """Training and testing on one's own data.

    Args:
        data_dir: A file, a folder that holds a ``train`` file, or ``owner/name`` on the hub.
        val_file: File to validate on, in place of ``val_size`` records of the training data.
        test_file: File to test on.
        train_split: Which files of the folder (by how their names begin) or which split of the
            hub's data to train on; of the latter `datasets` takes parts too, ``train[:5000]``.
        val_split: The same to validate on, in place of ``val_file``.
        test_split: The same to test on, in place of ``test_file``.
        subset: The hub data's configuration, such as ``main``.
        columns: The data's names of fields, such as ``{instruction: question, output: answer}``.
        template: A prompt with ``{instruction}``, and ``{input}`` where that is not to follow the
            instruction in a line of its own; in place of the protocol's.
        chat_template: Whether to write prompts and answers by the tokenizer's chat template.
        protocol: ``alpaca``.
        val_size: Records that training leaves out for validation.
        **kwargs: The arguments of `TextDataModule`.
    """

    protocols = {
        "alpaca": Protocol(
            "alpaca",
            f"{PREAMBLE}\n\n{INSTRUCTION}\n",
            loss_on="response",
            max_length=2048,
            max_new_tokens=512,
            extraction="the whole output, without white space around it",
        )
    }

    def __init__(
        self,
        data_dir: str,
        val_file: str | None = None,
        test_file: str | None = None,
        train_split: str = "train",
        val_split: str | None = None,
        test_split: str | None = None,
        subset: str | None = None,
        columns: dict[str, str] | None = None,
        template: str | None = None,
        chat_template: bool = False,
        protocol: str = "alpaca",
        val_size: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, protocol, val_size=val_size, **kwargs)
        for field in columns or ():
            known("columns", field, FIELDS)
        if template is not None and "{instruction}" not in template:
            raise UserError(f"data.template {template!r} has no place for {{instruction}}.")
        if template is not None and chat_template:
            raise UserError("data.template and data.chat_template are both set; take one.")
        for name, file, split in (("val", val_file, val_split), ("test", test_file, test_split)):
            if file is not None and split is not None:
                raise UserError(f"data.{name}_file and data.{name}_split are both set; take one.")
        self.val_file, self.test_file, self.columns = val_file, test_file, dict(columns or {})
        self.train_split, self.val_split, self.test_split = train_split, val_split, test_split
        self.subset = subset
        self.test_tasks = [task] if (task := self._task()) else []
        self.template, self.chat_template = template, chat_template
        self._chat: ChatTemplate | None = None
        if template is not None:
            self.protocol = replace(self.protocol, name="own template", template=template)

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer, and its chat template where that is asked for."""
        super().use_tokenizer(tokenizer)
        if self.chat_template:
            self._chat = ChatTemplate(tokenizer)
            end = self._chat.end
            # An answer ends in the template's own token, which need not be the tokenizer's EOS.
            stop = (end,) if end and end != tokenizer.eos_token else ()
            text = str(tokenizer.chat_template)
            self.protocol = replace(self.protocol, name="chat template", template=text, stop=stop)

    def train_examples(self) -> list[Example]:
        """Return the training records."""
        path = Path(str(self.data_dir))
        if is_file(path) or path.suffix.lower() in READERS:
            return self._examples(*self._of_file(path))
        return self._examples(*self._of_split(self.train_split))

    def val_examples(self) -> list[Example] | None:
        """Return the records of ``val_file`` or ``val_split``, if there is one."""
        if self.val_file is not None:
            return self._examples(*self._of_file(self.val_file))
        return None if self.val_split is None else self._examples(*self._of_split(self.val_split))

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return the test records, their last answers as what is expected."""
        task = self._task()
        if self.test_file is not None:
            records, place = self._of_file(self.test_file)
        elif self.test_split is not None:
            records, place = self._of_split(self.test_split)
        else:
            raise UserError(
                "data.test_file is not set, nor data.test_split, so there is nothing to test on."
            )
        examples = self._examples(records, place, task)
        if not any(e.prompt for e in examples):
            raise UserError(f"{place} is in the text form, which asks nothing to test.")
        return {task: examples}

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write into each line whether the output is the answer, and its ROUGE-L."""
        for row in rows:
            output = row["extracted"] = row["output"].strip()
            row["correct"] = output == row["expected"].strip()
            row["rougeL"] = rouge_l(output, [row["expected"]])

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name both metrics."""
        return ("accuracy", "rougeL")

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return the share of equal answers and the mean ROUGE-L."""
        names = {"accuracy": "correct", "rougeL": "rougeL"}
        return {name: sum(row[key] for row in rows) / len(rows) for name, key in names.items()}

    def _task(self) -> str:
        """What the test is called; empty where there is none."""
        if self.test_file is not None:
            return Path(self.test_file).stem
        return re.sub(r"\W+", "_", self.test_split or "").strip("_")

    def _of_file(self, path: str | Path) -> tuple[Records, str]:
        """Read a file's records; and its name."""
        return read_file(path), str(path)

    def _of_split(self, split: str) -> tuple[Records, str]:
        """Read a split of the folder or of the hub's data; and its name."""
        path = Path(str(self.data_dir))
        if is_file(path):
            raise UserError(
                f"data.data_dir {str(path)!r} is a file, which has no split {split!r}; name "
                "another file in data.val_file or data.test_file."
            )
        files = tuple(f"{split}*{kind}" for kind in READERS)
        source = Source(files, str(path), split, self.subset)
        folder = str(path) if is_folder(path) else None
        place = ", ".join(map(str, source.there(folder))) or f"{source.hub} ({split})"
        return source.read(folder, self.cache_dir), place

    # Records --------------------------------------------------------------------------------------

    def _examples(self, records: Records, place: str, task: str = "train") -> list[Example]:
        form, records = of_one_form(records, place, self.columns)
        examples = [
            self._example(form, record, f"Record {index + 1} of {place}", task, index)
            for index, record in enumerate(records)
        ]
        rank_zero_info(f"data: {len(records)} records in the {form} form ({place})")
        return examples

    def _example(
        self, form: str, record: Mapping[str, Any], name: str, task: str, index: int
    ) -> Example:
        texts = texts_of(form, record, name)
        if form == "text":
            if self._chat:
                raise UserError(
                    f"{name} is in the text form, which data.chat_template has no use for."
                )
            return Example("", texts["text"], task, index)
        if form == "prompt":
            chat = Chat(((texts["prompt"], texts["completion"]),))
            pieces = list(chat.turns)
        elif form == "instruction":
            question, added = texts["instruction"], texts.get("input", "")
            chat = Chat((("\n\n".join(filter(None, (question, added))), texts["output"]),))
            pieces = [(self._prompt(question, added), texts["output"])]
        else:
            chat = read_chat(record[form], name)
            if not chat.turns:
                raise UserError(f"{name} holds no question with an answer.")
            (first, answer), *rest = chat.turns
            first = "\n\n".join(filter(None, (chat.system, first)))
            pieces = [(self._prompt(q, ""), text) for q, text in [(first, answer), *rest]]
        if self._chat:
            pieces = self._chat.pieces(chat, name)
        *history, (prompt, response) = pieces
        closed = self._chat is not None and bool(self._chat.end)
        return Example(prompt, response, task, index, chat.turns[-1][1], tuple(history), closed)

    def _prompt(self, instruction: str, added: str) -> str:
        """Write a prompt in one pass, since texts may hold braces."""
        template = self.template or (WITH_INPUT if added else self.protocol.template)
        if "{input}" not in template:
            instruction = "\n".join(filter(None, (instruction, added)))
        texts = {"instruction": instruction, "input": added}
        return re.sub(r"\{(instruction|input)\}", lambda found: texts[found[1]], template)
