"""Real records through every benchmark: all are read, gold answers score fully, others as chance.

Each data set's own tests look at its records more closely; here stands what holds for all.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.code.module import CodeDataModule
from lightning_peft.datamodules.code.records import HUMANEVAL, MBPP, TRAINING
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.conversation.module import ConversationDataModule
from lightning_peft.datamodules.conversation.mt_bench import (
    read_answers,
    read_prompts,
    read_questions,
)
from lightning_peft.datamodules.dart import DartDataModule
from lightning_peft.datamodules.dialogsum import DialogSumDataModule
from lightning_peft.datamodules.e2e import E2EDataModule
from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.glue.tasks import TASKS
from lightning_peft.datamodules.math.module import MathDataModule
from lightning_peft.datamodules.math.records import with_marker
from lightning_peft.datamodules.metrics.texts import bleu, rouge_l

REAL = Path(__file__).parents[2].parent / "shared" / "data"
TO_TEXT = {"e2e": E2EDataModule, "dart": DartDataModule, "dialogsum": DialogSumDataModule}

pytestmark = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data")


def manifest() -> dict[str, int]:
    """Records by file."""
    entries = json.loads((REAL / "MANIFEST.json").read_text()) if REAL.is_dir() else []
    return {entry["file"]: entry["records"] for entry in entries}


# Counts -------------------------------------------------------------------------------------------


def commonsense(task: str, split: str) -> int:
    data = CommonsenseDataModule(str(REAL / "commonsense"), tasks=[task])
    return len(data.test_examples()[task] if split == "test" else data.train_examples())


def mathematics(task: str, split: str) -> int:
    protocol = "metamath" if task in ("gsm8k", "MATH") else "llm_adapters"
    if split == "test":
        data = MathDataModule(str(REAL / "math"), protocol, tasks=[task])
        return len(data.test_examples()[task])
    return len(MathDataModule(str(REAL / "math"), train_on=task).train_examples())  # type: ignore[arg-type]


def glue(folder: str, split: str) -> int:
    task = next(name for name, described in TASKS.items() if described.folder == folder)
    data = GlueDataModule(task, str(REAL / "glue"))
    if split == "train":
        return len(data.train_records())
    (found,) = data.held_out_records().values()
    return len(found)


def references(task: str, split: str) -> int:
    data = TO_TEXT[task](str(REAL / "nlg" / task))
    read = data._read(split)
    if task == "e2e":  # one row for each reference
        return sum(len(record.references) for record in read)
    return len(read)


def code(task: str) -> int:
    source = {**TRAINING, "humaneval": HUMANEVAL, "mbpp": MBPP}[task]
    return len(source.read(str(REAL / "code")))


BENCH = REAL / "conversation" / "mt_bench"
READERS: dict[str, Callable[[], int]] = {
    "code/codefeedback/code_feedback.json": lambda: code("codefeedback_chats"),
    "code/codefeedback/codefeedback_filtered.json": lambda: code("codefeedback"),
    "code/evol_instruct_code/train.json": lambda: code("evol_instruct_code"),
    "code/humaneval/HumanEval.jsonl": lambda: code("humaneval"),
    "code/mbpp/mbpp.jsonl": lambda: code("mbpp"),
    "conversation/mt_bench/question.jsonl": lambda: len(read_questions(BENCH / "question.jsonl")),
    "conversation/mt_bench/reference_answer/gpt-4.jsonl": lambda: len(
        read_answers(BENCH / "reference_answer" / "gpt-4.jsonl")
    ),
    "conversation/mt_bench/judge_prompts.jsonl": lambda: len(
        read_prompts(BENCH / "judge_prompts.jsonl")
    ),
    "conversation/sharegpt/train.json": lambda: len(
        ConversationDataModule(str(REAL / "conversation")).train_examples()
    ),
    "math/metamathqa/rows.json": lambda: mathematics("metamathqa", "train"),
    "nlg/e2e/devset.csv": lambda: references("e2e", "dev"),
    "nlg/e2e/testset_w_refs.csv": lambda: references("e2e", "test"),
    "nlg/dart/dart-v1.1.1-full-dev.json": lambda: references("dart", "dev"),
    "nlg/dialogsum/dialogsum.dev.jsonl": lambda: references("dialogsum", "dev"),
    "nlg/dialogsum/dialogsum.test.jsonl": lambda: references("dialogsum", "test"),
}
BY_SPLIT = {"commonsense": commonsense, "math": mathematics, "glue": glue}


@pytest.mark.filterwarnings("ignore:.*were mended")
@pytest.mark.parametrize("file", manifest())
def test_every_file_holds_what_the_manifest_counts(file: str) -> None:
    family, task, name = file.split("/")[:3]
    read = READERS.get(file) or (lambda: BY_SPLIT[family](task, name.partition(".")[0]))
    assert read() == manifest()[file]


# Scores -------------------------------------------------------------------------------------------


def score(
    data: Any, task: str, outputs: Sequence[Any], expected: Sequence[Any]
) -> dict[str, float]:
    rows = [
        {"index": i, "prompt": "", "output": output, "expected": gold}
        for i, (output, gold) in enumerate(zip(outputs, expected, strict=True))
    ]
    data.judge(task, rows)
    return data.score(task, rows)  # type: ignore[no-any-return]


def within_chance(accuracy: float, gold: Sequence[Any]) -> bool:
    """Whether a permutation's share of right answers is what chance gives, by four deviations."""
    chance = sum(gold.count(g) for g in gold) / len(gold) ** 2
    return abs(accuracy - chance) < 4 * (chance * (1 - chance) / len(gold)) ** 0.5


def shuffled(gold: Sequence[Any]) -> list[Any]:
    return random.Random(0).sample(list(gold), len(gold))


def test_commonsense() -> None:
    data = CommonsenseDataModule(str(REAL / "commonsense"))
    for task, examples in data.test_examples().items():
        gold = [e.expected for e in examples]
        said = [f"the correct answer is {g}" for g in gold]
        assert score(data, task, said, gold) == {"accuracy": 1.0}
        others = [f"the correct answer is {g}" for g in shuffled(gold)]
        assert within_chance(score(data, task, others, gold)["accuracy"], gold), task


def test_gsm8ks_own_solutions() -> None:
    """The texts that training teaches are right by every protocol."""
    lines = (REAL / "math" / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    solutions = [with_marker(json.loads(line)["answer"]) for line in lines]
    for protocol in ("metamath", "droplora", "prunedlora", "llm_adapters"):
        data = MathDataModule(str(REAL / "math"), protocol, tasks=["gsm8k"])
        gold = [e.expected for e in data.test_examples()["gsm8k"]]
        assert score(data, "gsm8k", solutions, gold) == {"accuracy": 1.0, "math_verify": 1.0}


@pytest.mark.parametrize("task", TO_TEXT)
def test_texts_by_their_references(task: str) -> None:
    folder = str(REAL / "nlg" / task)
    own = {"train_split": "dev", "test_split": "dev", "val_size": 120} if task == "dart" else {}
    data = TO_TEXT[task](folder, **own)
    expected = [e.expected for e in data.test_examples()[task]]
    for place in (0, -1):
        found = score(data, task, [references[place] for references in expected], expected)
        assert found == {"bleu": pytest.approx(100.0), "rougeL": pytest.approx(1.0)}
    others = score(data, task, shuffled([refs[0] for refs in expected]), expected)
    assert others["bleu"] < 40
    assert others["rougeL"] < 0.5


@pytest.mark.parametrize("task", TO_TEXT)
def test_bleu_and_rouge_of_real_texts_are_sacrebleus_and_rouge_scores(task: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")
    own = {"train_split": "dev", "test_split": "dev", "val_size": 120} if task == "dart" else {}
    data = TO_TEXT[task](str(REAL / "nlg" / task), **own)
    expected = [e.expected for e in data.test_examples()[task]][:60]
    # Each record's first reference with every third word lost, against the rest, and the next.
    outputs = [" ".join(w for i, w in enumerate(r[0].split()) if i % 3 != 2) for r in expected]
    references = [
        [*r[1:], n[0]] for r, n in zip(expected, expected[1:] + expected[:1], strict=True)
    ]
    most = max(map(len, references))
    streams = [[r[i] if i < len(r) else None for r in references] for i in range(most)]
    score = sacrebleu.corpus_bleu(outputs, streams).score
    assert 0 < score < 100
    assert bleu(outputs, references) == pytest.approx(score, abs=1e-5)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for output, refs in zip(outputs, references, strict=True):
        best = scorer.score_multi(refs, output)["rougeL"].fmeasure
        assert rouge_l(output, refs) == pytest.approx(best, abs=1e-6)


@pytest.mark.filterwarnings("ignore:.*were mended")
@pytest.mark.parametrize("task", TASKS)
def test_glue(task: str) -> None:
    data = GlueDataModule(task, str(REAL / "glue"))
    for name, records in data.held_out_records().items():
        gold = [data.label_text(r.label) for r in records]
        perfect = score(data, name, gold, gold)
        assert perfect == dict.fromkeys(data.metric_names, pytest.approx(1.0, abs=1e-5))
        first = score(data, name, shuffled(gold), gold)[data.metric_names[0]]
        if data.metric_names[0] == "accuracy":
            assert within_chance(first, gold)
        else:  # a correlation
            assert abs(first) < 4 / len(gold) ** 0.5


def test_code_of_other_problems_fails() -> None:
    """Its programs run in the sandbox; gold solutions are run with the benchmark's own tests."""
    data = CodeDataModule(str(REAL / "code"))
    lines = (REAL / "code" / "humaneval" / "HumanEval.jsonl").read_text().splitlines()
    solutions = [json.loads(line)["canonical_solution"] for line in lines]
    problems = data._problems("humaneval")[::10]
    others = [solutions[(e.index + 1) % len(solutions)] for e in problems]
    assert score(data, "humaneval", others, [e.expected for e in problems]) == {"pass@1": 0.0}
