r"""Mathematics: training on MetaMathQA or GSM8K, tests on GSM8K, MATH, SVAMP and AQuA.

``data_dir`` holds ``metamathqa/``, ``gsm8k/train`` and ``test``, ``MATH/test``, ``SVAMP/test`` and
``AQuA/test``, as jsonl, json or parquet. Without it, the hub's ``meta-math/MetaMathQA``,
``openai/gsm8k`` (``main``) and ``DigitalLearningGmbH/MATH-lighteval``, a copy of MATH with all
subjects in one configuration; SVAMP and AQuA are LLM-Adapters' files, which are on no hub.

``accuracy`` is by the protocol's rule, by which published scores were taken (`answers`,
`equivalence`). Beside it, for GSM8K and MATH, ``math_verify`` is the share of answers that the
library of that name finds equivalent to the gold answer; it judges all that follows the marker,
and is not asked where that is the gold answer to the letter.

Protocols, as they are pinned here:

* ``metamath`` (arXiv 2309.12284, ``eval_gsm8k.py``, ``eval_math.py``): the response follows
  ``### Response: Let's think step by step.`` without a space; loss on the response; 512 tokens;
  greedy, at most 512 new tokens, on MATH 2048; ten stop texts, "Question" and "Response" among
  them, at which some honest answers end too.
* ``droplora``: the same prompt without stop texts, at most 2048 new tokens, loss on the response.
  Its script sets no limit of length; 2048 is ours.
* ``prunedlora``: ``Question: {query} </s> Answer: `` and 512 tokens, as in its training script,
  where ``</s>`` is text that LLaMA 2's tokenizer reads as EOS and LLaMA 3's does not. The script
  masks the question, but then packs all records and overwrites the labels with the inputs; here
  loss is on the response, and nothing is packed. Its scores are lm-evaluation-harness's, which
  takes the exported adapter; the tests here ask as in training, judge as MetaMath does, and allow
  512 new tokens (ours).
* ``llm_adapters`` (arXiv 2304.01933, ``evaluate.py``): the template as in `commonsense`, loss on
  the prompt too, 256 tokens, 4 beams, at most 256 new tokens (early versions 128). The last number
  counts, within 0.001; on AQuA the first letter from A to E.

GSM8K's answers, to train on, get MetaMathQA's last line, ``The answer is: 18``, which every
protocol's rule understands; their ``<<16-3=13>>`` are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.loading.fields import text_if_any
from lightning_peft.datamodules.math import answers
from lightning_peft.datamodules.math.equivalence import equivalent, require_math_verify, same_math
from lightning_peft.datamodules.math.records import TESTS, TRAINING, gold, with_marker
from lightning_peft.datamodules.protocols import INSTRUCTION, PREAMBLE, Protocol
from lightning_peft.errors import UserError

VERIFIED = ("gsm8k", "MATH")
MATH_NEW_TOKENS = 2048
STOP = tuple(
    word + end
    for word in ("Question", "USER", "ASSISTANT", "Instruction", "Response")
    for end in (":", "")
)

_METAMATH = Protocol(
    "metamath",
    f"{PREAMBLE}\n\n{INSTRUCTION} Let's think step by step.",
    loss_on="response",
    max_length=512,
    max_new_tokens=512,
    stop=STOP,
    extraction=f"after the last {answers.MARKER!r}: on GSM8K the first number, on MATH all",
)


class MathDataModule(TextDataModule):
    """MetaMathQA or GSM8K to train on; GSM8K, MATH, SVAMP and AQuA to test.

    Args:
        data_dir: Folder that holds the data sets' folders; None takes the hub's.
        protocol: ``metamath``, ``droplora``, ``prunedlora`` or ``llm_adapters``.
        train_on: ``metamathqa``, or ``gsm8k`` for GSM8K's own training records.
        tasks: What to test: ``gsm8k`` and ``MATH``; by ``llm_adapters`` ``gsm8k``, ``SVAMP`` and
            ``AQuA``. None is all of them that lie there.
        max_new_tokens: Limit of generated tokens in place of the protocol's, on every task.
        **kwargs: The arguments of `TextDataModule`.
    """

    protocols = {
        "metamath": _METAMATH,
        "droplora": replace(
            _METAMATH, name="droplora", max_length=2048, max_new_tokens=2048, stop=()
        ),
        "prunedlora": replace(
            _METAMATH, name="prunedlora", template="Question: {instruction} </s> Answer: ", stop=()
        ),
        "llm_adapters": Protocol(
            "llm_adapters",
            f"{PREAMBLE} \n\n{INSTRUCTION}\n",
            loss_on="all",
            max_length=256,
            max_new_tokens=256,
            num_beams=4,
            extraction="the last number, without commas; on AQuA the first letter from A to E",
        ),
    }

    def __init__(
        self,
        data_dir: str | None,
        protocol: str = "metamath",
        train_on: Literal["metamathqa", "gsm8k"] = "metamathqa",
        tasks: list[str] | None = None,
        max_new_tokens: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            data_dir=data_dir, protocol=protocol, max_new_tokens=max_new_tokens, **kwargs
        )
        self.train_on = known("train_on", train_on, TRAINING)
        asked = ("gsm8k", "SVAMP", "AQuA") if self._last_number else ("gsm8k", "MATH")
        for task in tasks or ():
            if known("tasks", task, TESTS) not in asked:
                raise UserError(
                    f"data.tasks {task!r} is no task of the protocol {protocol}, which has "
                    f"{', '.join(asked)}."
                )
        self.tasks = tasks
        self.test_tasks = list(tasks or asked)
        # MetaMath's evaluators differ in this limit alone.
        self._longer = protocol == "metamath" and max_new_tokens is None
        self._verifies = True

    def train_examples(self) -> list[Example]:
        """Return the records of ``train_on``; MetaMathQA's types are the tasks of its records."""
        records = TRAINING[self.train_on].read(self.data_dir, self.cache_dir)
        if self.train_on == "metamathqa":
            kinds = [
                text_if_any(r, "type", f"Record {n} of metamathqa") or "metamathqa"
                for n, r in enumerate(records, start=1)
            ]
            return [
                self.example(r["query"], r["response"], kind, i)
                for i, (r, kind) in enumerate(zip(records, kinds, strict=True))
            ]
        answered = [
            with_marker(r["answer"], f"Record {i + 1} of gsm8k") for i, r in enumerate(records)
        ]
        return [
            self.example(r["question"], answer, "gsm8k", i)
            for i, (r, answer) in enumerate(zip(records, answered, strict=True))
        ]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return every task's test records."""
        try:
            require_math_verify()
        except ValueError as error:
            self._verifies = False
            rank_zero_info(f"{error} The metric math_verify is left out.")
        return {task: self._test_examples(task) for task in self._tasks_there()}

    def decoding(self, task: str) -> Protocol:
        """Allow more tokens on MATH where the protocol does."""
        longer = self._longer and task == "MATH"
        return replace(self.protocol, max_new_tokens=MATH_NEW_TOKENS) if longer else self.protocol

    def extract(self, output: str, task: str) -> str | None:
        """Find an answer by the protocol's rule."""
        if task == "AQuA":
            return answers.first_choice(output)
        if self._last_number:
            return answers.last_number(output)
        return (answers.extract_math if task == "MATH" else answers.extract_gsm8k)(output)

    def correct(self, extracted: str, expected: str, task: str) -> bool:
        """Compare an answer with the gold one by the protocol's rule."""
        if task == "AQuA":
            return extracted == expected
        if self._last_number:
            return answers.same_number(extracted, expected)
        return (same_math if task == "MATH" else answers.same_integer)(extracted, expected)

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Write ``extracted`` and ``correct``, and where the library judges too ``equivalent``."""
        super().judge(task, rows)
        if self._verifies and task in VERIFIED:
            for row in rows:
                found = self.extract(row["output"], task if self._last_number else "MATH")
                # The library's limits of time are the clock's, so that a busy machine fails there.
                row["equivalent"] = found is not None and (
                    found == row["expected"] or equivalent(found, row["expected"])
                )

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name accuracy, and the library's judgement where it is installed and judges."""
        try:
            require_math_verify()
        except ValueError:
            return ("accuracy",)
        return ("accuracy", "math_verify") if task in VERIFIED else ("accuracy",)

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return ``accuracy``, and ``math_verify`` where the library has judged."""
        scores = super().score(task, rows)
        if all("equivalent" in row for row in rows):
            scores["math_verify"] = sum(row["equivalent"] for row in rows) / len(rows)
        return scores

    @property
    def _last_number(self) -> bool:
        return self.protocol.name == "llm_adapters"

    def _tasks_there(self) -> list[str]:
        """Leave out the tasks without data, unless they were asked for by name."""
        there = [t for t in self.test_tasks if TESTS[t].there(self.data_dir)]
        if self.data_dir is None:
            there = [t for t in self.test_tasks if TESTS[t].hub]
        missing = [t for t in self.test_tasks if t not in there]
        if missing and (self.tasks or not there):
            where = "null" if self.data_dir is None else repr(self.data_dir)
            raise UserError(
                f"data.data_dir {where} has no test records of {', '.join(missing)}; "
                f"give a folder with {missing[0]}/test.json, or name other data.tasks."
            )
        if missing:
            rank_zero_info(f"Without test records, and not tested: {', '.join(missing)}.")
        return there

    def _test_examples(self, task: str) -> list[Example]:
        question = {"gsm8k": "question", "MATH": "problem"}.get(task, "instruction")
        records = TESTS[task].read(self.data_dir, self.cache_dir)
        return [
            self.example(r[question], "", task, i, gold(task, r, i + 1))
            for i, r in enumerate(records)
        ]
