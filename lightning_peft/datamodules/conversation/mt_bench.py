"""MT-Bench: 80 questions of two turns, whose answers a judge rates from 1 to 10 (arXiv 2306.05685).

Single-answer grading as in FastChat's ``llm_judge`` (https://github.com/lm-sys/FastChat), with its
files and prompts: each turn is judged by itself, the second with the first before it, and math,
reasoning and coding beside a reference answer. The rating is the judge's first ``[[5]]``, else its
first ``[5]``; without one a judgment is invalid and left out of the means. That of both turns is
taken over all ratings. What asks the judge is ``lightning-peft judge``.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning_peft.datamodules.loading.files import is_file, reason
from lightning_peft.datamodules.loading.formats import Broken, loads
from lightning_peft.errors import MissingFile, UserError

TEMPERATURES = {
    **dict.fromkeys(("writing", "roleplay"), 0.7),
    **dict.fromkeys(("stem", "humanities"), 0.1),
    **dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0),
}
WITH_REFERENCE = ("math", "reasoning", "coding")
PROMPTS = ("single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn")


@dataclass(frozen=True)
class Question:
    """A question and the one that follows it."""

    category: str
    turns: tuple[str, str]


@dataclass(frozen=True)
class Answer:
    """What a model, or the reference, answers to both turns of a question."""

    model_id: str
    turns: tuple[str, str]


def read_questions(path: Path) -> dict[int, Question]:
    """Read ``question.jsonl``: questions by their ids, in the file's order.

    Raises:
        MissingFile: If there is no such file.
        UserError: If a line is broken or repeats an id.
    """
    return {
        question_id: Question(_field(place, line, "category"), _turns(place, line))
        for question_id, place, line in _by_id(path)
    }


def read_answers(path: Path) -> dict[int, Answer]:
    """Read answers in FastChat's public format by question ids; raises as `read_questions` does."""
    answers = {}
    for question_id, place, line in _by_id(path):
        choices = _field(place, line, "choices", list)
        answers[question_id] = Answer(_field(place, line, "model_id"), _turns(place, *choices[:1]))
    return answers


def read_prompts(path: Path) -> dict[str, tuple[str, str]]:
    """Read the judge's system prompts and templates by their names, `PROMPTS` among them.

    Raises:
        MissingFile: If there is no such file.
        UserError: If a line is broken, or one of `PROMPTS` is not there.
    """
    prompts = {}
    for place, line in read_lines(path):
        texts = _field(place, line, "system_prompt"), _field(place, line, "prompt_template")
        prompts[_field(place, line, "name")] = texts
    if missing := [name for name in PROMPTS if name not in prompts]:
        raise UserError(f"{path} has no prompt named {missing[0]}.")
    return prompts


def prompt_name(category: str, turn: int) -> str:
    """Name the judge's prompt for a category's turn, 1 or 2."""
    return PROMPTS[2 * (category in WITH_REFERENCE) + turn - 1]


def judge_messages(
    prompt: tuple[str, str], question: Question, answer: Answer, reference: Answer | None = None
) -> list[dict[str, str]]:
    """Fill in a prompt; which turn is judged, and whether by a reference, is up to its template."""
    fields = {"question": question.turns[0], "answer": answer.turns[0]}
    for i in (0, 1):
        fields |= {f"question_{i + 1}": question.turns[i], f"answer_{i + 1}": answer.turns[i]}
        fields |= {} if reference is None else {f"ref_answer_{i + 1}": reference.turns[i]}
    content = prompt[1].format_map(fields)
    return [{"role": "system", "content": prompt[0]}, {"role": "user", "content": content}]


def judge_tasks(data_dir: Path, answers: Path, judge: str) -> list[dict[str, Any]]:
    """Prepare both turns of every answered question: what judgments will hold, and ``messages``.

    The ``digest`` of the messages, with judge and question, tells whether they are judged already.

    Raises:
        MissingFile: If a file is missing.
        UserError: If a file is broken, or questions, answers and references do not match.
    """
    questions = read_questions(data_dir / "question.jsonl")
    prompts, given = read_prompts(data_dir / "judge_prompts.jsonl"), read_answers(answers)
    files = sorted((data_dir / "reference_answer").glob("*.jsonl"))
    files = [file for file in files if file.stem == judge] or files
    if len(files) != 1:
        raise UserError(f"{data_dir}/reference_answer has to hold one .jsonl, or {judge}.jsonl.")
    references = read_answers(files[0])
    if not given:
        raise UserError(f"{answers} holds no answer.")
    if odd := given.keys() - questions.keys():
        raise UserError(f"Question {min(odd)} of {answers} is none of those in {data_dir}.")
    if missing := questions.keys() - given.keys():
        warnings.warn(
            f"{len(missing)} of {len(questions)} questions have no answer in {answers} and are not "
            "judged.",
            stacklevel=3,
        )
    questions = {number: q for number, q in questions.items() if number in given}
    tasks = []
    for (number, question), turn in itertools.product(questions.items(), (1, 2)):
        if question.category in WITH_REFERENCE and number not in references:
            raise UserError(f"{files[0]} has no answer to question {number}.")
        name, answer = prompt_name(question.category, turn), given[number]
        try:
            messages = judge_messages(prompts[name], question, answer, references.get(number))
        except (LookupError, ValueError, AttributeError, TypeError, MemoryError) as error:
            raise UserError(
                f"The prompt {name} of {data_dir / 'judge_prompts.jsonl'} cannot be filled in "
                f"({type(error).__name__}: {error}); take the file as FastChat publishes it."
            ) from error
        task = {"question_id": number, "category": question.category, "model": answer.model_id}
        task |= {"judge": judge, "prompt": name, "turn": turn, "messages": messages}
        digest = hashlib.sha256(json.dumps([judge, number, messages]).encode()).hexdigest()
        tasks.append({**task, "digest": digest})
    return tasks


def rating(text: str) -> float | None:
    """Return the rating in a judgment, None where there is none."""
    number = r"(\d+(?:\.\d*)?)"
    found = re.search(rf"\[\[{number}\]\]", text) or re.search(rf"\[{number}\]", text)
    return float(found[1]) if found else None


def means(judgments: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Average the scores of judgments, without those that are invalid, which are None.

    Returns:
        Means of ``turn_1``, ``turn_2``, ``both`` and, of both turns, ``categories``; they are None
        where no score is valid. Further the counts of ``judgments`` and of ``invalid`` ones.
    """
    rows = list(judgments)
    valid = [row for row in rows if row["score"] is not None]

    def mean(**wanted: Any) -> float | None:
        scores = [row["score"] for row in valid if wanted.items() <= row.items()]
        return fmean(scores) if scores else None

    return {
        "turn_1": mean(turn=1),
        "turn_2": mean(turn=2),
        "both": mean(),
        "categories": {c: mean(category=c) for c in dict.fromkeys(r["category"] for r in rows)},
        "judgments": len(rows),
        "invalid": len(rows) - len(valid),
    }


def answer_line(question_id: int, model_id: str, turns: list[str]) -> dict[str, Any]:
    """Put answers into FastChat's public format; the same answers have the same ``answer_id``."""
    answer_id = hashlib.sha256(json.dumps([question_id, model_id, turns]).encode()).hexdigest()
    return {
        "question_id": question_id,
        "answer_id": answer_id[:22],
        "model_id": model_id,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def read_lines(path: Path, partial: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each line's place, for messages, and the JSON object that it holds.

    Without ``partial``, what follows the last line break is left out, as half of a line may.

    Raises:
        MissingFile: If there is no such file.
        UserError: If a line holds anything else.
    """
    if not is_file(path):
        raise MissingFile(f"{path} does not exist.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason(error)}).") from error
    yield from lines_in(content, path, partial)


def lines_in(
    content: bytes, path: Path, partial: bool = True
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a file's content as `read_lines` does; ``path`` names it."""
    *lines, last = content.split(b"\n")  # bytes: texts have further kinds of line breaks
    for number, line in enumerate([*lines, last] if partial else lines, start=1):
        if not line.strip():
            continue
        try:
            record = loads(line.removeprefix(codecs.BOM_UTF8).decode())
        except (Broken, UnicodeDecodeError):
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number} is no JSON object.")
        yield f"{path}, line {number}", record


def _by_id(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    known = set()
    for place, record in read_lines(path):
        question_id = _field(place, record, "question_id", int)
        if question_id in known:
            raise UserError(f"{place} repeats question {question_id}.")
        known.add(question_id)
        yield question_id, place, record


def _field(place: str, record: Mapping[str, Any], name: str, kind: type = str) -> Any:
    if not isinstance(record.get(name), kind) or isinstance(record[name], bool):
        raise UserError(f"{place} has no {kind.__name__} in {name!r}.")
    return record[name]


def _turns(place: str, holder: Any = None) -> tuple[str, str]:
    turns = holder.get("turns") if isinstance(holder, dict) else None
    if not isinstance(turns, list) or [type(turn) for turn in turns] != [str, str]:
        raise UserError(f"{place} does not have two texts in 'turns'.")
    return turns[0], turns[1]
