"""Python: training on CodeFeedback or Evol-Instruct-Code, tests on HumanEval and MBPP.

``data_dir`` holds ``codefeedback/``, ``evol_instruct_code/``, ``humaneval/`` and ``mbpp/``, as
jsonl, json or parquet; without it, the hub's data sets are taken. Training records have one of
three schemas, told by their columns: ``query`` and ``answer``, ``messages`` (role and content), or
``instruction`` and ``output``. Where they have a ``lang``, only ``python`` is kept. Of MBPP all 974
problems are read, and the tests choose by task id.

``pass@1`` is the share of problems whose one answer passes the task's tests. What a model wrote is
run in a sandbox (`execution`), and only if ``allow_code_execution`` is set.

Protocols, as they are pinned here:

* ``droplora``: the authors' published record, which is WizardCoder's prompt: two empty lines before
  ``### Instruction:``, and nothing after ``### Response:``; loss on the response, temperature 0, at
  most 2048 new tokens. Test problems stand under ``Create a Python script for this problem:``;
  training instructions stand alone, and of a conversation every question is put into the template
  and every answer learnt (ours: their training records are not published). Their record indents by
  tabs, which is not done here. MBPP's problems are written as EvalPlus does, on which their scores
  were taken, it seems: all are multiples of 1/378. The task ``mbpp_evalplus`` is that list. Their
  script sets no limit of length; 2048 is ours.
* ``prunedlora``: the turns before the last as lines ``User: …`` and ``System: …`` (earlier answers
  left out), then the last answer, and 512 tokens, as in its training script. The script masks the
  turns, but then packs all records and overwrites the labels with the inputs; here loss is on the
  answer, and nothing is packed. Its scores are lm-evaluation-harness's, which takes the exported
  adapter; the tests here ask as in training, and allow 512 new tokens (ours).

An answer is the generation's python block, cut as `programs.extract_code` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_info

from lightning_peft.datamodules.base import TextDataModule
from lightning_peft.datamodules.code.execution import run_program, run_programs
from lightning_peft.datamodules.code.limits import Limits
from lightning_peft.datamodules.code.programs import (
    MBPP_IDS,
    extract_code,
    humaneval_program,
    mbpp_program,
    mbpp_prompt,
)
from lightning_peft.datamodules.code.records import (
    HUMANEVAL,
    MBPP,
    TRAINING,
    Turn,
    mbpp_problem,
    python_turns,
)
from lightning_peft.datamodules.loading.arguments import known
from lightning_peft.datamodules.loading.examples import Example
from lightning_peft.datamodules.protocols import INSTRUCTION, PREAMBLE, Protocol
from lightning_peft.errors import UserError

TASKS = ("humaneval", *MBPP_IDS)
MBPP_FIELDS = ("task_id", "test_setup_code", "test_list")
PROBLEM = "Create a Python script for this problem:\n"
_BLOCK = "the python block, cut at __main__, '# Example usage' or the first bare assert"


class CodeDataModule(TextDataModule):
    """CodeFeedback or Evol-Instruct-Code to train on; HumanEval and MBPP to test.

    Args:
        data_dir: Folder that holds the data sets' folders; None takes the hub's.
        protocol: ``droplora`` or ``prunedlora``.
        train_on: ``codefeedback`` (the filtered instructions, else whatever lies in its folder),
            ``codefeedback_chats`` (the conversations) or ``evol_instruct_code``.
        tasks: What to test: ``humaneval``, ``mbpp`` (task ids 11 to 510) and ``mbpp_evalplus``
            (EvalPlus's 378). None is the first two.
        allow_code_execution: Run the programs that the model writes, without which there is no
            score; see `execution` for what holds them.
        seconds: Limit of each program's time.
        **kwargs: The arguments of `TextDataModule`.
    """

    protocols = {
        "droplora": Protocol(
            "droplora",
            f"{PREAMBLE}\n\n\n{INSTRUCTION}",
            loss_on="response",
            max_length=2048,
            max_new_tokens=2048,
            extraction=_BLOCK,
        ),
        "prunedlora": Protocol(
            "prunedlora",
            "{instruction}",
            loss_on="response",
            max_length=512,
            max_new_tokens=512,
            extraction=_BLOCK,
        ),
    }

    def __init__(
        self,
        data_dir: str | None,
        protocol: str = "droplora",
        train_on: Literal[
            "codefeedback", "codefeedback_chats", "evol_instruct_code"
        ] = "codefeedback",
        tasks: list[str] | None = None,
        allow_code_execution: bool = False,
        seconds: float = 10.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(data_dir=data_dir, protocol=protocol, **kwargs)
        self.train_on = known("train_on", train_on, TRAINING)
        self.test_tasks = [known("tasks", task, TASKS) for task in tasks or TASKS[:2]]
        self.allow_code_execution = allow_code_execution
        if seconds <= 0:
            raise UserError(f"data.seconds is {seconds}; it has to be more than 0.")
        self.program_limits = Limits(seconds=seconds)

    def train_examples(self) -> list[Example]:
        """Return the Python records of ``train_on``, and count what is left out."""
        source = TRAINING[self.train_on]
        records = source.read(self.data_dir, self.cache_dir)
        place = source.hub if self.data_dir is None else self.data_dir
        turns, left_out = python_turns(records, f"{self.train_on} in {place}")
        for reason, count in left_out.items():
            self.counts[reason] = count
            if count:
                rank_zero_info(
                    f"{count} of {len(records)} records of {self.train_on} are "
                    f"{reason.replace('_', ' ')} and were left out."
                )
        return [self._training_example(i, t) for i, t in turns]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        """Return every task's problems, if their answers may be run."""
        if not self.allow_code_execution:
            raise UserError(
                "data.allow_code_execution is false, but answers in code are scored by running "
                "programs that the model wrote; set it to true to let them run on this machine, "
                "in a sandbox without network and with limits on time, memory and files."
            )
        run_program("pass")  # where no sandbox can be put up, that is said before generation
        return {task: self._problems(task) for task in self.test_tasks}

    def extract(self, output: str, task: str) -> str | None:
        """Return the program in an output."""
        return extract_code(output)

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        """Run a batch's programs side by side; write ``extracted``, ``correct`` and ``reason``."""
        build = humaneval_program if task == "humaneval" else mbpp_program
        for row in rows:
            row["extracted"] = self.extract(row["output"], task)
        programs = [build(row["extracted"], row["expected"]) for row in rows]
        for row, outcome in zip(rows, run_programs(programs, self.program_limits), strict=True):
            row["correct"], row["reason"] = outcome.passed, outcome.reason

    def score_names(self, task: str) -> tuple[str, ...]:
        """Name the one metric."""
        return ("pass@1",)

    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        """Return ``pass@1``."""
        return {"pass@1": sum(row["correct"] for row in rows) / len(rows)}

    def _training_example(self, index: int, turns: list[Turn]) -> Example:
        """Make an example of turns, of which the last is an answer."""
        if self.protocol.name == "prunedlora":
            lines = (f"{r.capitalize()}: {text}\n" for r, text in turns[:-1] if r != "assistant")
            return self.example("".join(lines), turns[-1][1], self.train_on, index)
        pairs: list[tuple[str, str]] = []
        asked: list[str] = []
        for role, text in turns:
            if role == "assistant":
                pairs.append((self.protocol.prompt("\n".join(asked)), text))
                asked = []
            else:
                asked.append(text)
        *history, (prompt, answer) = pairs
        return Example(prompt, answer, self.train_on, index, history=tuple(history))

    def _problems(self, task: str) -> list[Example]:
        """Read a task's problems; each keeps what its program is made of."""
        if task == "humaneval":
            fields, source, write = HUMANEVAL.texts, HUMANEVAL, _humaneval_prompt
        else:
            fields, source, write = MBPP_FIELDS, MBPP, mbpp_prompt
        records = source.read(self.data_dir, self.cache_dir)
        if task in MBPP_IDS:
            problems = [
                mbpp_problem(r, f"Record {number} of mbpp")
                for number, r in enumerate(records, start=1)
            ]
            records = [dict(r) for r in problems if r["task_id"] in MBPP_IDS[task]]
        bare = self.protocol.name == "prunedlora"
        return [
            self.example(
                f"User: {write(r)}\n" if bare else f"{PROBLEM}{write(r)}",
                "",
                task,
                index,
                {field: r.get(field) for field in fields},
            )
            for index, r in enumerate(records)
        ]


def _humaneval_prompt(problem: Mapping[str, Any]) -> str:
    return problem["prompt"]
