from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.conversation import mt_bench
from lightning_peft.datamodules.conversation.mt_bench import Answer, Question

TEMPLATES = {
    "pair-v2": ("Compare.", "{question} {answer_a} {answer_b}"),
    "single-v1": ("Help.", "Rate.\n[Q]\n{question}\n[A]\n{answer}\n[End]"),
    "single-v1-multi-turn": ("Rate.", "{question_1}|{answer_1}|{question_2}|{answer_2}"),
    "single-math-v1": ("Help.", "Check.\n[Q]\n{question}\n[R]\n{ref_answer_1}\n[A]\n{answer}"),
    "single-math-v1-multi-turn": (
        "Check.",
        "{question_1}|{ref_answer_1}|{question_2}|{ref_answer_2}\n"
        "{question_1}|{answer_1}|{question_2}|{answer_2}",
    ),
}
PROMPTS = [
    {"name": name, "type": "single", "system_prompt": system, "prompt_template": template}
    for name, (system, template) in TEMPLATES.items()
]
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write {a} poem.", "Shorter."]},
    {
        "question_id": 111,
        "category": "math",
        "turns": ["1 + 1?", "Times 3?"],
        "reference": ["", ""],
    },
]
ANSWERS = [
    mt_bench.answer_line(81, "mine", ["A {rose}.", "Rose."]),
    mt_bench.answer_line(111, "mine", ["3", "9"]),
]
REFERENCES = [mt_bench.answer_line(111, "gpt-4", ["2", "6"])]


def write(path: Path, lines: list[Any]) -> Path:
    path.parent.mkdir(exist_ok=True)
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    write(tmp_path / "question.jsonl", QUESTIONS)
    write(tmp_path / "judge_prompts.jsonl", PROMPTS)
    write(tmp_path / "reference_answer" / "gpt-4.jsonl", REFERENCES)
    write(tmp_path / "answers.jsonl", ANSWERS)
    return tmp_path


def tasks_of(folder: Path, judge: str = "gpt-4") -> list[dict[str, Any]]:
    return mt_bench.judge_tasks(folder, folder / "answers.jsonl", judge)


def test_each_variant_of_the_prompt_is_filled_in(data_dir: Path) -> None:
    """Braces in questions and answers stay what they are."""
    expected = [
        (81, 1, "single-v1", "Help.", "Rate.\n[Q]\nWrite {a} poem.\n[A]\nA {rose}.\n[End]"),
        (81, 2, "single-v1-multi-turn", "Rate.", "Write {a} poem.|A {rose}.|Shorter.|Rose."),
        (111, 1, "single-math-v1", "Help.", "Check.\n[Q]\n1 + 1?\n[R]\n2\n[A]\n3"),
        (
            111,
            2,
            "single-math-v1-multi-turn",
            "Check.",
            "1 + 1?|2|Times 3?|6\n1 + 1?|3|Times 3?|9",
        ),
    ]
    tasks = tasks_of(data_dir)
    found = [
        (t["question_id"], t["turn"], t["prompt"], *(m["content"] for m in t["messages"]))
        for t in tasks
    ]
    assert found == expected
    assert {tuple(m["role"] for m in t["messages"]) for t in tasks} == {("system", "user")}
    assert {(t["model"], t["judge"]) for t in tasks} == {("mine", "gpt-4")}


@pytest.mark.parametrize("category", ["math", "reasoning", "coding"])
def test_reference_goes_with_its_categories(category: str) -> None:
    assert mt_bench.prompt_name(category, 1) == "single-math-v1"
    assert mt_bench.prompt_name(category, 2) == "single-math-v1-multi-turn"
    assert mt_bench.prompt_name("extraction", 2) == "single-v1-multi-turn"


def test_digest_changes_with_what_the_judge_sees(data_dir: Path) -> None:
    before = [task["digest"] for task in tasks_of(data_dir)]
    assert len(set(before)) == 4
    assert before == [task["digest"] for task in tasks_of(data_dir)]
    assert not set(before) & {task["digest"] for task in tasks_of(data_dir, "another")}
    answers = [ANSWERS[0], mt_bench.answer_line(111, "mine", ["3", "6"])]
    write(data_dir / "answers.jsonl", answers)
    after = [task["digest"] for task in tasks_of(data_dir)]
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, True, True, False]


def test_references_of_several_judges(data_dir: Path) -> None:
    """The file that is named after the judge, or else the only one."""
    other = [mt_bench.answer_line(111, "my/judge", ["two", "six"])]
    write(data_dir / "reference_answer" / "other.jsonl", other)
    assert "[R]\ntwo\n" in tasks_of(data_dir, "other")[2]["messages"][1]["content"]
    assert "[R]\n2\n" in tasks_of(data_dir, "gpt-4")[2]["messages"][1]["content"]
    with pytest.raises(
        ValueError, match=r"reference_answer has to hold one \.jsonl, or new\.jsonl"
    ):
        tasks_of(data_dir, "new")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Rating: [[5]]", 5.0),
        ("Good. Rating: [[7.5]] of [[10]]", 7.5),
        ("as shown in [1], I say [[9]]", 9.0),
        ("Rating: [8]", 8.0),
        ("Rating: [8.]", 8.0),
        ("[[6/10]] or [6]", 6.0),
        ("Rating: 8", None),
        ("[[rating]] [[-1]]", None),
        ("", None),
    ],
)
def test_rating(text: str, score: float | None) -> None:
    assert mt_bench.rating(text) == score


def judgment(category: str, turn: int, score: float | None) -> dict[str, Any]:
    return {"category": category, "turn": turn, "score": score}


def test_means_leave_out_the_invalid() -> None:
    """The mean of both turns is over all ratings: 23 / 4, and not (7 + 4.5) / 2."""
    judgments = [
        judgment("math", 1, 10.0),
        judgment("writing", 1, 4.0),
        judgment("math", 2, None),
        judgment("writing", 2, 2.0),
        judgment("writing", 2, 7.0),
        judgment("stem", 1, None),
    ]
    assert mt_bench.means(judgments) == {
        "turn_1": 7.0,
        "turn_2": 4.5,
        "both": 5.75,
        "categories": {"math": 10.0, "writing": 13 / 3, "stem": None},
        "judgments": 6,
        "invalid": 2,
    }


def test_unequal_turns_weigh_by_their_ratings() -> None:
    judgments = [judgment("math", 1, 9.0), judgment("math", 1, 6.0), judgment("math", 2, 3.0)]
    found = mt_bench.means(judgments)
    assert (found["turn_1"], found["turn_2"], found["both"]) == (7.5, 3.0, 6.0)


def test_means_of_nothing() -> None:
    found = mt_bench.means([])
    assert (found["both"], found["categories"], found["judgments"]) == (None, {}, 0)


def test_answer_line_is_read_back(tmp_path: Path) -> None:
    before = time.time()
    line = mt_bench.answer_line(81, "mine", ["one\u2028two", "\ud83d\ude00"])
    assert before <= line["tstamp"] <= time.time()
    assert line.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert line["choices"] == [{"index": 0, "turns": ["one\u2028two", "\ud83d\ude00"]}]
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line, ensure_ascii=False).replace("\ud83d\ude00", "😀"))
    assert mt_bench.read_answers(path) == {81: Answer("mine", ("one\u2028two", "😀"))}


def test_answer_id_tells_answers_apart() -> None:
    same, other = (mt_bench.answer_line(81, "mine", [text, ""]) for text in ("a", "b"))
    assert same["answer_id"] == mt_bench.answer_line(81, "mine", ["a", ""])["answer_id"]
    assert same["answer_id"] != other["answer_id"]


def test_temperatures() -> None:
    given = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    others = dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0)
    assert {**given, **others} == mt_bench.TEMPERATURES


def test_blank_lines_are_no_records(tmp_path: Path) -> None:
    path = write(tmp_path / "question.jsonl", [QUESTIONS[0], "", " "])
    found = mt_bench.read_questions(path)
    assert found == {81: Question("writing", ("Write {a} poem.", "Shorter."))}


Q, A, P = "question.jsonl", "answers.jsonl", "judge_prompts.jsonl"
NO_TURNS = {"question_id": 81, "category": "writing", "turns": ["one"]}
NO_ANSWER = {"question_id": 81, "model_id": "mine", "choices": []}
ODD_TURNS = {"question_id": 81, "model_id": "mine", "choices": [{"turns": ["one", None]}]}


@pytest.mark.parametrize(
    ("file", "lines", "sentence"),
    [
        (Q, [QUESTIONS[0], "{cut"], "{}/question.jsonl, line 2 is no JSON object."),
        (Q, ["[]"], "{}/question.jsonl, line 1 is no JSON object."),
        (Q, [QUESTIONS[0], "", QUESTIONS[0]], "{}/question.jsonl, line 3 repeats question 81."),
        (Q, [NO_TURNS], "{}/question.jsonl, line 1 does not have two texts in 'turns'."),
        (Q, [{"question_id": "x"}], "{}/question.jsonl, line 1 has no int in 'question_id'."),
        (Q, [{"question_id": 1}], "{}/question.jsonl, line 1 has no str in 'category'."),
        (A, [NO_ANSWER], "{}/answers.jsonl, line 1 does not have two texts in 'turns'."),
        (A, [ODD_TURNS], "{}/answers.jsonl, line 1 does not have two texts in 'turns'."),
        (A, [{"question_id": 1}], "{}/answers.jsonl, line 1 has no list in 'choices'."),
        (Q, QUESTIONS[1:], "Question 81 of {}/answers.jsonl is none of those in {}."),
        (A, [], "{}/answers.jsonl holds no answer."),
        (P, PROMPTS[:4], "{}/judge_prompts.jsonl has no prompt named single-math-v1-multi-turn."),
        (P, [{"name": "a"}], "{}/judge_prompts.jsonl, line 1 has no str in 'system_prompt'."),
        (
            "reference_answer/gpt-4.jsonl",
            [],
            "{}/reference_answer/gpt-4.jsonl has no answer to question 111.",
        ),
    ],
)
def test_broken_files_get_one_sentence(
    data_dir: Path, file: str, lines: list[Any], sentence: str
) -> None:
    write(data_dir / file, lines)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        tasks_of(data_dir)
    assert str(error.value) == sentence.replace("{}", str(data_dir))


def test_questions_without_an_answer_are_left_out_and_said(data_dir: Path) -> None:
    write(data_dir / A, ANSWERS[:1])
    with pytest.warns(UserWarning, match=r"^1 of 2 questions have no answer in .* are not judged"):
        tasks = tasks_of(data_dir)
    assert [(task["question_id"], task["turn"]) for task in tasks] == [(81, 1), (81, 2)]


@pytest.mark.parametrize("file", [Q, A, P])
def test_missing_file(data_dir: Path, file: str) -> None:
    (data_dir / file).unlink()
    with pytest.raises(FileNotFoundError, match=f"{file} does not exist"):
        tasks_of(data_dir)


def test_real_data(tmp_path: Path, real: Any) -> None:
    folder = real("conversation/mt_bench")
    questions = mt_bench.read_questions(folder / "question.jsonl")
    assert list(questions) == list(range(81, 161))
    assert {question.category for question in questions.values()} == set(mt_bench.TEMPERATURES)
    lines = [mt_bench.answer_line(i, "mine", [f"one {i}", f"two {i}"]) for i in questions]
    tasks = mt_bench.judge_tasks(folder, write(tmp_path / "answers.jsonl", lines), "judge")
    assert len({task["digest"] for task in tasks}) == len(tasks) == 160
    counts = {name: sum(t["prompt"] == name for t in tasks) for name in mt_bench.PROMPTS}
    assert list(counts.values()) == [50, 50, 30, 30]
    contents = [[m["content"] for m in task["messages"]] for task in tasks]
    system, user = contents[0]
    assert system == "You are a helpful assistant."
    assert user.startswith("[Instruction]\nPlease act as an impartial judge and evaluate")
    assert user.endswith(
        'for example: "Rating: [[5]]".\n\n[Question]\nCompose an engaging travel blog post about a '
        "recent trip to Hawaii, highlighting cultural experiences and must-see attractions.\n\n"
        "[The Start of Assistant's Answer]\none 81\n[The End of Assistant's Answer]"
    )
    system, user = contents[1]
    assert system.startswith("Please act as an impartial judge")
    assert user == (
        "<|The Start of Assistant A's Conversation with User|>\n\n### User:\nCompose an engaging "
        "travel blog post about a recent trip to Hawaii, highlighting cultural experiences and "
        "must-see attractions.\n\n### Assistant A:\none 81\n\n### User:\nRewrite your previous "
        "response. Start every sentence with the letter A.\n\n### Assistant A:\ntwo 81\n\n"
        "<|The End of Assistant A's Conversation with User|>"
    )
    one, two = (
        "Imagine you are participating in a race with a group of people. If you have just "
        "overtaken the second person, what's your current position? Where is the person you just "
        "overtook?",
        'If the "second person" is changed to "last person" in the above question, what would the '
        "answer be?",
    )
    first, second = (
        "If you have just overtaken the second person, your current position is now second place. "
        "The person you just overtook is now in third place.",
        "If you have just overtaken the last person, it means you were previously the second to "
        "last person in the race. After overtaking the last person, your position remains the "
        "same, which is second to last. The person you just overtook is now in the last place.",
    )
    assert contents[40][1].endswith(
        f'for example: "Rating: [[5]]".\n\n[Question]\n{one}\n\n[The Start of Reference Answer]\n'
        f"{first}\n[The End of Reference Answer]\n\n[The Start of Assistant's Answer]\none 101\n"
        "[The End of Assistant's Answer]"
    )
    assert contents[41][1] == (
        f"<|The Start of Reference Answer|>\n\n### User:\n{one}\n\n### Reference answer:\n{first}"
        f"\n\n### User:\n{two}\n\n### Reference answer:\n{second}\n\n"
        "<|The End of Reference Answer|>\n\n\n"
        f"<|The Start of Assistant A's Conversation with User|>\n\n### User:\n{one}\n\n"
        f"### Assistant A:\none 101\n\n### User:\n{two}\n\n### Assistant A:\ntwo 101\n\n"
        "<|The End of Assistant A's Conversation with User|>"
    )
