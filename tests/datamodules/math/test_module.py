from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.math import module as math_data
from lightning_peft.datamodules.math.module import MathDataModule

BELOW = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
STEPS = (
    f"{BELOW}\n\n### Instruction:\nHow {{many}}?\nTwo é\n\n### Response: Let's think step by step."
)
PROMPTS = {
    "metamath": STEPS,
    "droplora": STEPS,
    "prunedlora": "Question: How {many}?\nTwo é </s> Answer: ",
    "llm_adapters": f"{BELOW} \n\n### Instruction:\nHow {{many}}?\nTwo é\n\n### Response:\n",
}
QUESTION = "How {many}?\nTwo é"
Build = Callable[..., MathDataModule]


def read_records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return (
        [json.loads(r) for r in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
    )


@pytest.fixture
def folder(tmp_path: Path, write_records: Any) -> Path:
    """Six records of each data set; answers are 11 to 16, and A to E."""
    place, numbers = tmp_path / "data", range(11, 17)
    query = [{"query": QUESTION, "response": f"Add.\nThe answer is: {n}"} for n in numbers]
    write_records(
        place / "metamathqa" / "MetaMathQA-395K.json", [{**r, "type": "GSM_SV"} for r in query]
    )
    gsm8k = [{"question": QUESTION, "answer": f"1+1=<<1+1=2>>2\n#### 1,0{n}"} for n in numbers]
    write_records(place / "gsm8k" / "train.jsonl", gsm8k)
    write_records(place / "gsm8k" / "test.jsonl", gsm8k)
    solved = [
        {"problem": QUESTION, "solution": f"It is $\\boxed{{\\frac{{{n}}}{{17}}}}$."}
        for n in numbers
    ]
    write_records(place / "MATH" / "test.jsonl", solved)
    write_records(
        place / "SVAMP" / "test.json",
        [{"instruction": QUESTION, "answer": f"{n}.0"} for n in numbers],
    )
    write_records(
        place / "AQuA" / "test.json", [{"instruction": QUESTION, "answer": c} for c in "ABCDEA"]
    )
    return place


@pytest.fixture
def build(build_data: Any) -> Build:
    def make(folder: Path | str | None, stage: str | None = None, **kwargs: Any) -> MathDataModule:
        options: dict[str, Any] = {"max_length": 1000, "val_size": 0, "batch_size": 6} | kwargs
        return build_data(MathDataModule, folder, stage=stage, **options)

    return make


def score(data: MathDataModule, task: str, outputs: list[str], gold: list[str]) -> dict[str, float]:
    pairs = enumerate(zip(outputs, gold, strict=True))
    rows = [{"index": i, "prompt": "", "output": o, "expected": e} for i, (o, e) in pairs]
    data.judge(task, rows)
    return data.score(task, rows)


@pytest.mark.parametrize("train_on", ["metamathqa", "gsm8k"])
@pytest.mark.parametrize("protocol", PROMPTS)
def test_a_row_token_for_token(
    protocol: str, train_on: str, build: Build, folder: Path, tokenizer: Any
) -> None:
    data = build(folder, protocol=protocol, train_on=train_on, group_by_length=False)
    ids = tokenizer(PROMPTS[protocol], add_special_tokens=False)["input_ids"]
    ends = {
        "metamathqa": [f"Add.\nThe answer is: {n}" for n in range(11, 17)],
        "gsm8k": [f"1+1=<<1+1=2>>2\n#### 1,0{n}\nThe answer is: 10{n}" for n in range(11, 17)],
    }
    responses = [[*tokenizer(text)["input_ids"], 2] for text in ends[train_on]]
    masked = ids if protocol == "llm_adapters" else [-100] * len(ids)
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["input_ids"].tolist()) == sorted(ids + r for r in responses)
    assert sorted(batch["labels"].tolist()) == sorted(masked + r for r in responses)
    for loader in data.test_dataloader():
        assert next(iter(loader))["input_ids"][0].tolist() == ids


def test_end_of_sequence_in_a_prompt_is_read_as_the_tokenizer_reads_it(tokenizer: Any) -> None:
    prompt = MathDataModule(None, protocol="prunedlora").protocol.prompt("1+1?")
    assert prompt == "Question: 1+1? </s> Answer: "
    assert tokenizer(prompt)["input_ids"].count(2) == 1  # as LLaMA 2's; LLaMA 3's has no such token


def test_each_protocol_has_its_tasks_and_gold_answers(build: Build, folder: Path) -> None:
    expected = {
        "gsm8k": [str(n) for n in range(1011, 1017)],
        "MATH": [f"\\frac{{{n}}}{{17}}" for n in range(11, 17)],
        "SVAMP": [f"{n}.0" for n in range(11, 17)],
        "AQuA": list("ABCDEA"),
    }
    tasks = {"metamath": ["gsm8k", "MATH"], "llm_adapters": ["gsm8k", "SVAMP", "AQuA"]}
    for protocol, names in tasks.items():
        data = build(folder, "test", protocol=protocol)
        assert data.test_tasks == names
        for task, loader in zip(names, data.test_dataloader(), strict=True):
            assert next(iter(loader))["expected"] == expected[task]


def test_decoding() -> None:
    data = MathDataModule(None)
    stops = "Question: Question USER: USER ASSISTANT: ASSISTANT Instruction: Instruction"
    assert data.decoding("gsm8k").stop == (*stops.split(), "Response:", "Response")
    assert data.decoding("gsm8k").max_new_tokens == 512
    assert data.decoding("MATH").max_new_tokens == 2048
    assert MathDataModule(None, max_new_tokens=512).decoding("MATH").max_new_tokens == 512
    data = MathDataModule(None, "droplora")
    limits = (data.protocol.max_new_tokens, data.protocol.temperature, data.protocol.num_beams)
    assert (limits, data.protocol.stop) == ((2048, 0.0, 1), ())
    data = MathDataModule(None, "prunedlora")
    assert (data.protocol.max_length, data.decoding("MATH").max_new_tokens) == (512, 512)
    data = MathDataModule(None, "llm_adapters")
    assert (data.protocol.max_length, data.protocol.num_beams, data.protocol.loss_on) == (
        256,
        4,
        "all",
    )


@pytest.mark.parametrize(
    ("protocol", "task", "gold", "outputs"),
    [
        # By the string rule and by algebra: both, the rule alone, algebra alone, none.
        (
            "metamath",
            "gsm8k",
            "1200",
            {
                "The answer is: 7. No. The answer is: 1200": (True, True),
                "The answer is: 1199.6": (True, False),
                "The answer is: $1,200": (True, True),
                "The answer is: 120": (False, False),
                "#### 1200": (False, False),
                "": (False, False),
            },
        ),
        (
            "droplora",
            "MATH",
            "\\frac{1}{4}",
            {
                "The answer is: \\dfrac14.": (True, True),
                "The answer is: 1/4.\nSo.": (True, True),
                "The answer is: 0.25": (False, True),
                "The answer is: \\frac{1}{5}": (False, False),
                "\\boxed{\\frac14}": (False, False),
            },
        ),
        (
            "llm_adapters",
            "gsm8k",
            "1200",
            {"So 1,200.": (True, True), "3 and 1200.0005": (True, False), "x": (False, False)},
        ),
        ("llm_adapters", "SVAMP", "8.0", {"so 8": (True, None), "8, or 9": (False, None)}),
        ("llm_adapters", "AQuA", "C", {"(C) or (D)": (True, None), "c": (False, None)}),
    ],
)
def test_judgement(
    protocol: str,
    task: str,
    gold: str,
    outputs: dict[str, tuple[bool, bool | None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The library has its own tests, and limits of time by the clock.
    same = {"$1,200": "1200", "\\dfrac14": "\\frac{1}{4}", "1/4": "\\frac{1}{4}"}
    same |= {"0.25": "\\frac{1}{4}", "1200.": "1200"}
    monkeypatch.setattr(math_data, "equivalent", lambda found, gold: same.get(found) == gold)
    data = MathDataModule(None, protocol)
    rows = [
        {"index": i, "prompt": "", "output": o, "expected": gold} for i, o in enumerate(outputs)
    ]
    data.judge(task, rows)
    assert [(r["correct"], r.get("equivalent")) for r in rows] == list(outputs.values())
    right, verified = zip(*outputs.values(), strict=True)
    expected = {"accuracy": sum(right) / len(right)}
    if None not in verified:
        expected["math_verify"] = sum(map(bool, verified)) / len(verified)
    assert data.score(task, rows) == expected


def test_without_the_library_its_metric_is_left_out_and_that_is_said_once(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing() -> None:
        raise ValueError("Symbolic equivalence needs the library.")

    said: list[str] = []
    monkeypatch.setattr(math_data, "require_math_verify", missing)
    monkeypatch.setattr(math_data, "rank_zero_info", said.append)
    data = build(folder, "test")
    assert said == ["Symbolic equivalence needs the library. The metric math_verify is left out."]
    for _ in range(2):
        assert score(data, "gsm8k", ["The answer is: 1"], ["1"]) == {"accuracy": 1.0}
    assert len(said) == 1


def test_what_does_not_lie_there(
    build: Build, folder: Path, monkeypatch: pytest.MonkeyPatch, write_records: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr(math_data, "rank_zero_info", said.append)
    (folder / "MATH" / "test.jsonl").unlink()
    assert build(folder, "test").test_tasks == ["gsm8k"]
    assert said == ["Without test records, and not tested: MATH."]
    with pytest.raises(
        ValueError, match=r"has no test records of MATH; give a folder with MATH/te"
    ):
        build(folder, "test", tasks=["gsm8k", "MATH"])
    with pytest.raises(ValueError, match=r"^data.data_dir null has no test records of AQuA; give"):
        build(None, "test", protocol="llm_adapters", tasks=["AQuA"])
    with pytest.raises(ValueError, match=r"is no folder that holds a metamathqa/\*\.jsonl or meta"):
        build("/nowhere", "fit")
    write_records(folder / "MATH" / "test.jsonl", [{"problem": "1?", "solution": "It is 1."}])
    with pytest.raises(
        ValueError, match=r"^Record 1 of MATH has no \\boxed answer in its solution"
    ):
        build(folder, "test")
    write_records(
        folder / "metamathqa" / "MetaMathQA-395K.json", [{"question": "a", "response": "b"}]
    )
    with pytest.raises(ValueError, match=r"has no 'query', only question, response\.$"):
        build(folder, "fit")


@pytest.mark.parametrize(
    ("file", "record", "message"),
    [
        (
            "gsm8k/test.jsonl",
            {"question": "a", "answer": "It is 18"},
            "does not end in '#### ' and a",
        ),
        (
            "gsm8k/test.jsonl",
            {"question": "a", "answer": "#### x"},
            "has the answer 'x', which is no ",
        ),
        (
            "MATH/test.jsonl",
            {"problem": "a", "solution": "5"},
            "has no \\boxed answer in its solution.",
        ),
        (
            "SVAMP/test.json",
            {"instruction": "a", "answer": "two"},
            "answer 'two', which is no number.",
        ),
        (
            "AQuA/test.json",
            {"instruction": "a", "answer": "F"},
            "'F', which is no letter from A to E.",
        ),
    ],
)
def test_a_gold_answer_that_nothing_can_equal_is_named(
    file: str, record: dict[str, Any], message: str, build: Build, folder: Path, write_records: Any
) -> None:
    write_records(folder / file, [*read_records(folder / file)[:1], record])
    task = file.partition("/")[0]
    protocol = "metamath" if task in ("gsm8k", "MATH") else "llm_adapters"
    with pytest.raises(ValueError, match=rf"^Record 2 of {task} .*{re.escape(message)}"):
        build(folder, "test", protocol=protocol, tasks=[task])


def test_a_gold_answer_to_train_on_is_there(build: Build, folder: Path, write_records: Any) -> None:
    write_records(folder / "gsm8k" / "train.jsonl", [{"question": "a", "answer": "18"}])
    with pytest.raises(ValueError, match=r"^Record 1 of gsm8k has an answer that does not end in"):
        build(folder, "fit", train_on="gsm8k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_on": "math"}, "data.train_on 'math' is unknown; known are metamathqa, gsm8k."),
        ({"tasks": ["math"]}, "data.tasks 'math' is unknown; known are gsm8k, MATH, SVAMP, AQuA."),
        (
            {"tasks": ["SVAMP"]},
            "data.tasks 'SVAMP' is no task of the protocol metamath, which has gsm8k, MATH.",
        ),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        MathDataModule(None, **arguments)
    assert str(error.value) == message


def test_real_records(build: Build, real: Any, real_counts: dict[str, int]) -> None:
    wrong = {"metamath": {}, "llm_adapters": {}}
    for protocol, scores in wrong.items():
        data = build(real("math"), "none", protocol=protocol)
        for task, examples in data.test_examples().items():
            file = next(f for f in real_counts if f.startswith(f"math/{task}/test"))
            assert len(examples) == real_counts[file]
            gold = [e.expected for e in examples]
            data._verifies = True
            answers = [f"Thus. The answer is: {g}" for g in gold]
            assert set(score(data, task, answers, gold).values()) == {1.0}
            data._verifies = False
            others = random.Random(0).sample(gold, len(gold))
            scores[task] = score(data, task, [f"The answer is: {o}" for o in others], gold)
            chance = sum(gold.count(g) for g in gold) / len(gold) ** 2
            error = (chance * (1 - chance) / len(gold)) ** 0.5
            assert abs(scores[task]["accuracy"] - chance) < 4 * error
    sets = {"metamathqa": "metamathqa/rows.json", "gsm8k": "gsm8k/train.jsonl"}
    for train_on, file in sets.items():
        data = build(real("math"), "none", train_on=train_on)
        assert len(data.train_examples()) == real_counts[f"math/{file}"]
    assert {e.task for e in build(real("math"), "none").train_examples()} == {
        "MATH_AnsAug",
        "GSM_Rephrased",
        "GSM_FOBAR",
    }
