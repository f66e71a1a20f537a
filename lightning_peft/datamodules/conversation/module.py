"""Chats: training on conversations, answers to MT-Bench's 80 questions of two turns.

Training data are records of ``conversations``, lists of messages with ``from`` (human or user, gpt
or assistant, system) and ``value``, as WizardLM's and ShareGPT's are, or with ``role`` and
``content``. Every answer carries loss. A question at the end without an answer is answered by the
record's ``chosen``, where it holds preferences, and left out elsewhere.

Tests read MT-Bench's ``question.jsonl``. A task is a category, answered at the category's
temperature; answers to both turns are also written as ``mt_bench.jsonl``, in FastChat's format,
for ``lightning-peft judge``. Nothing is scored before that.

Protocol ``vicuna-ours``: the text of FastChat's ``vicuna_v1.1``, of which the next turns follow the
EOS without a space::

    A chat between a curious user and an artificial intelligence assistant. The assistant gives
    helpful, detailed, and polite answers to the user's questions. USER: {question} ASSISTANT:
    {answer}</s>USER: {question} ASSISTANT: {answer}</s>

(all in one line). Ours are that a base model is trained on it, that a system message stands in
place of the two sentences, that the space after ``ASSISTANT:`` begins the answer and carries loss,
and that a long conversation loses its beginning, where FastChat cuts off its end. 2048 tokens in
all are FastChat's, and so are at most 1024 generated ones for a turn.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_peft.atomic import write_text
from lightning_peft.datamodules.base import TextDataModule, before_response
from lightning_peft.datamodules.conversation.mt_bench import (
    TEMPERATURES,
    answer_line,
    read_questions,
)
from lightning_peft.datamodules.loading.batches import PromptDataset
from lightning_peft.datamodules.loading.chats import Chat, read_chat
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.fields import filled
from lightning_peft.datamodules.loading.files import is_file
from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.errors import UserError, shown

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
TURN = "USER: {instruction} ASSISTANT:"
HUB = "WizardLMTeam/WizardLM_evol_instruct_V2_196k"
FILES = ("train*.json*", "WizardLM*.json*", "*/train*.json*", "train*.parquet")


class ConversationDataModule(TextDataModule):
    """Training on conversations, tests on MT-Bench.

    Args:
        data_dir: Folder of the training data, a ``train*.json`` or WizardLM's file in it or in a
            folder of it; None takes WizardLM's from the hub.
        questions: MT-Bench's ``question.jsonl``; None is the one in ``mt_bench`` in ``data_dir``.
        model_id: Names the model in the file of answers; None takes its name and the strategy's.
        protocol: ``vicuna-ours``.
        **kwargs: The arguments of `TextDataModule`.
    """

    protocols = {
        "vicuna-ours": Protocol(
            "vicuna-ours",
            f"{SYSTEM} {TURN}",
            loss_on="response",
            max_length=2048,
            max_new_tokens=1024,
        )
    }

    def __init__(
        self,
        data_dir: str | None = None,
        questions: str | None = None,
        model_id: str | None = None,
        protocol: str = "vicuna-ours",
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir, protocol, **kwargs)
        self.questions, self.model_id = questions, model_id
        self.test_tasks = list(TEMPERATURES)

    def train_examples(self) -> list[Example]:
        """Return each conversation as one example, whose last answer is its response."""
        source = Source(FILES, HUB, "train")
        place = ", ".join(map(str, source.there(self.data_dir))) or HUB
        examples, unanswered = [], 0
        for index, record in enumerate(source.read(self.data_dir, self.cache_dir)):
            chat = _chat(record, f"Record {index + 1} of {place}")
            if chat.turns:
                answered = replace(chat, open="")
                examples.append(self.chat_example(answered, "conversation", index))
            else:
                unanswered += 1
        if unanswered and not examples:
            raise UserError(f"None of the {unanswered} conversations in {place} holds an answer.")
        if unanswered:
            rank_zero_warn(
                f"{unanswered} of {unanswered + len(examples)} conversations in {place} hold no "
                "answer and were left out."
            )
        return examples

    def chat_example(self, chat: Chat, task: str, index: int, expected: Any = "") -> Example:
        """Make an example of a conversation; ``open`` asks for an answer where it is set."""
        turns = [*chat.turns, (chat.open, "")] if chat.open else list(chat.turns)
        pieces = [(TURN.replace("{instruction}", question), f" {text}") for question, text in turns]
        pieces[0] = (f"{chat.system or SYSTEM} {pieces[0][0]}", pieces[0][1])
        *history, (prompt, response) = pieces
        response = "" if chat.open else response
        return Example(prompt, response, task, index, expected, tuple(history))

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return the first turns by category; the second ones are in ``expected``."""
        if self.questions is None and self.data_dir is None:
            raise UserError("data.questions is not set; give MT-Bench's question.jsonl.")
        path = Path(self.questions or f"{self.data_dir}/mt_bench/question.jsonl")
        if not is_file(path):
            raise UserError(
                f"{path} does not exist; give MT-Bench's question.jsonl in data.questions."
            )
        tasks: dict[str, list[Example]] = {}
        for number, question in read_questions(path).items():
            if question.category not in TEMPERATURES:
                raise UserError(
                    f"Question {number} of {path} is of the category {shown(question.category)}; "
                    f"known are {', '.join(TEMPERATURES)}."
                )
            if not all(question.turns):
                raise UserError(
                    f"Question {number} of {path} has an empty text among its 'turns'; write two."
                )
            examples = tasks.setdefault(question.category, [])
            asked = {"question_id": number, "turns": list(question.turns)}
            chat = Chat((), open=question.turns[0])
            examples.append(self.chat_example(chat, question.category, len(examples), asked))
        return tasks

    def decoding(self, task: str) -> Protocol:
        """Return the protocol at the category's temperature."""
        return replace(self.protocol, temperature=TEMPERATURES[task])

    def follow_up(self, batch: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any] | None:
        """Ask the second question after the first one's answer, once."""
        if batch.get("turn") == 2:
            return None
        examples = [
            self.chat_example(
                Chat(((asked["turns"][0], output.strip()),), open=asked["turns"][1]),
                batch["task"],
                index,
                asked,
            )
            for asked, output, index in zip(batch["expected"], outputs, batch["index"], strict=True)
        ]
        tokens = before_response(self.encoder.encode(examples, True))
        data = PromptDataset(tokens, examples, self.encoder.pad_id)
        following = data.collate([data[i] for i in range(len(data))])
        for name in ("input_ids", "attention_mask"):
            following[name] = following[name].to(batch[name].device)
        return {**following, "turn": 2}

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Judge nothing; a language model does, later."""

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name none."""
        return ()

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return no scores."""
        return {}

    def write_answers(self, folder: Path, predictions: Mapping[str, Sequence[Any]]) -> None:
        """Write ``mt_bench.jsonl``, the answers of all categories in the order of questions."""
        rows = [row for found in predictions.values() for row in found]
        lines = sorted(
            (
                answer_line(
                    row["expected"]["question_id"],
                    self.model_id or self._model_name(),
                    [text.strip() for text in row["output"]],
                )
                for row in rows
            ),
            key=lambda line: line["question_id"],
        )
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        path = folder / "mt_bench.jsonl"
        write_text(path, text)

    def _model_name(self) -> str:
        module: Any = getattr(self.trainer, "lightning_module", None)
        name = Path(str(getattr(module, "model_name_or_path", "model"))).name
        adapter = getattr(module, "adapter", None)
        return name if adapter is None else f"{name}-{type(adapter).__name__}"


def _chat(record: Mapping[str, Any], place: str) -> Chat:
    if record.get("conversations") is None:
        raise UserError(f"{place} has no 'conversations', only {filled(record) or 'empty fields'}.")
    messages, chosen = record["conversations"], record.get("chosen")
    chat = read_chat(messages, place)
    return read_chat([*messages, chosen], place) if chat.open and chosen else chat
