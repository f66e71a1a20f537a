"""Conversations: every answer carries loss; MT-Bench is asked turn by turn."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from lightning_peft.datamodules.conversation.module import ConversationDataModule
from lightning_peft.datamodules.conversation.mt_bench import TEMPERATURES, read_answers
from lightning_peft.modules import CausalLMModule, answering, causal_lm

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
QUESTIONS = [
    {"question_id": 90, "category": "math", "turns": ["1 + 1?", "And é?"]},
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite {instruction}."]},
    {"question_id": 91, "category": "math", "turns": ["2 + 2, in words?", "Why?"]},
]


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]
    return {"conversations": [*([{"from": "system", "value": system}] if system else []), *said]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chats" / "mt_bench").mkdir(parents=True)
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (tmp_path / "chats" / "mt_bench" / "question.jsonl").write_text("".join(lines))
    return tmp_path / "chats"


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(
        folder: Path | str | None, stage: str | None = None, *records: Any, **kwargs: Any
    ) -> ConversationDataModule:
        if records:
            (Path(str(folder)) / "train.json").write_text(json.dumps(records))
        options = {"val_size": 0, **kwargs}
        return build_data(ConversationDataModule, folder, stage=stage, **options)

    return build_module


@pytest.mark.parametrize("system", ["", "Be é."])
def test_a_row_token_for_token(
    system: str, build: Any, folder: Path, byte_ids: Any, only_row: Any, joined_row: Any
) -> None:
    data = build(folder, "fit", chat("Hi {instruction}", "Ho é", "Bye", "So\nlong", system=system))
    assert only_row(data) == joined_row(
        [
            (byte_ids(f"{system or SYSTEM} USER: Hi {{instruction}} ASSISTANT:"), False),
            ([*byte_ids(" Ho é"), 2], True),
            (byte_ids("USER: Bye ASSISTANT:"), False),
            ([*byte_ids(" So\nlong"), 2], True),
        ]
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["num_target_tokens"].item() == len(byte_ids(" Ho é So\nlong")) + 2
    assert (data.protocol.name, data.protocol.max_length) == ("vicuna-ours", 2048)
    assert data.protocol.max_new_tokens == 1024


@pytest.mark.parametrize(
    ("record", "responses"),
    [
        # A question at the end has no answer, but for one that is preferred.
        (chat("a", "b", "c"), [" b"]),
        ({**chat("a", "b", "c"), "chosen": {"from": "gpt", "value": "d"}}, [" b", " d"]),
        ({**chat("a", "b"), "chosen": {"from": "gpt", "value": "d"}}, [" b"]),
        # An assistant who begins is passed over.
        ({"conversations": [{"from": "gpt", "value": "z"}, *chat("a", "b")["conversations"]]},
         [" b"]),
        ({"conversations": [{"role": "user", "content": "a"},
                            {"role": "assistant", "content": "b"}]}, [" b"]),
    ],
)  # fmt: skip
def test_which_answers_are_learnt(
    record: dict[str, Any],
    responses: list[str],
    build: Any,
    folder: Path,
    byte_ids: Any,
    only_row: Any,
) -> None:
    expected = [[*byte_ids(response), 2] for response in responses]
    _, labels = only_row(build(folder, "fit", record))
    assert [token for token in labels if token >= 0] == [t for ids in expected for t in ids]


def test_conversations_without_answers_are_left_out_and_counted(build: Any, folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"^1 of 3 conversations in .* hold no answer and were"):
        data = build(folder, "fit", chat("a", "b"), chat("a"), chat("c", "d"))
    assert data.counts["train"] == 2


def test_conversations_without_any_answer_are_refused(build: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"^None of the 2 conversations in .* holds an answer\.$"):
        build(folder, "fit", chat("a"), chat("b"))


def test_mt_bench_is_asked_by_category(build: Any, folder: Path, byte_ids: Any) -> None:
    data = build(folder, "test")
    assert data.test_tasks == ["math", "writing"]
    math, writing = (next(iter(loader)) for loader in data.test_dataloader())
    first = byte_ids(f"{SYSTEM} USER: Write. ASSISTANT:")
    assert writing["input_ids"].tolist() == [first]
    assert writing["expected"] == [{"question_id": 81, "turns": QUESTIONS[1]["turns"]}]
    assert sorted(e["question_id"] for e in math["expected"]) == [90, 91]
    temperatures = {task: data.decoding(task).temperature for task in TEMPERATURES}
    assert (temperatures["writing"], temperatures["stem"], temperatures["math"]) == (0.7, 0.1, 0.0)


def test_the_second_turn_follows_the_first_answer_as_in_training(
    build: Any, folder: Path, byte_ids: Any
) -> None:
    answers = ["Zwei é.", "Four, in words, is four."]
    data = build(folder, None, *(chat(*q["turns"][:1], a, q["turns"][1], "!")
                                 for q, a in zip(QUESTIONS[::2], answers, strict=True)),
                 group_by_length=False)  # fmt: skip
    math = next(iter(data.test_dataloader()[0]))
    by_id = dict(zip((90, 91), answers, strict=True))
    outputs = [f" {by_id[e['question_id']]}\n" for e in math["expected"]]
    second = data.follow_up(math, outputs)
    # What stands before the last answer of the same conversation in training.
    rows = next(iter(data.train_dataloader()))
    trained = set()
    wide = ("input_ids", "attention_mask", "labels")
    for ids, mask, labels in zip(*(rows[key].tolist() for key in wide),
                                 strict=True):  # fmt: skip
        kept = [token for token, m in zip(ids, mask, strict=True) if m]
        trained.add(tuple(kept[: len(kept) - len(byte_ids(" !")) - 1]))
        assert labels[: len(kept)][-3:] == [*byte_ids(" !"), 2]
    asked = {
        tuple(ids[m.bool()].tolist())
        for ids, m in zip(second["input_ids"], second["attention_mask"], strict=True)
    }
    assert asked == trained
    assert second["index"] == math["index"]
    assert second["expected"] == math["expected"]
    assert data.follow_up(second, ["x", "y"]) is None


def test_answers_are_written_in_fastchats_format(build: Any, folder: Path, tmp_path: Path) -> None:
    data = build(folder, "test", model_id="m")

    def rows(task: str) -> list[dict[str, Any]]:
        return [
            {"expected": e.expected, "output": [f" first {e.index}\n", "second"]}
            for e in data.test_examples()[task]
        ]

    data.write_answers(tmp_path, {task: rows(task) for task in data.test_tasks})
    answers = read_answers(tmp_path / "mt_bench.jsonl")
    assert list(answers) == [81, 90, 91]
    assert {answer.model_id for answer in answers.values()} == {"m"}
    assert answers[91].turns == ("first 1", "second")
    assert data.score("math", rows("math")) == {}


def test_a_whole_test_leaves_both_turns_and_no_score(
    build: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, float]] = []
    said: list[str] = []

    def answer(model: Any, batch: Any, protocol: Any, encoder: Any) -> list[str]:
        asked.extend((prompt, protocol.temperature) for prompt in batch["prompt"])
        return [f" {batch.get('turn', 1)}: {e['question_id']}" for e in batch["expected"]]

    monkeypatch.setattr(causal_lm, "generate", answer)
    monkeypatch.setattr(answering, "rank_zero_info", said.append)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
    data = ConversationDataModule(
        str(folder), tokenizer=build(folder, "test").tokenizer, cache_dir=str(tmp_path / "cache")
    )
    with pytest.warns(UserWarning, match="scores the bare base model"):
        trainer.test(CausalLMModule("tiny_llama"), data, verbose=False)
    predictions = tmp_path / "predictions"
    assert said == [f"no scores; the answers are in {predictions}"]
    answers = read_answers(predictions / "mt_bench.jsonl")
    assert {number: answer.turns for number, answer in answers.items()} == {
        number: (f"1: {number}", f"2: {number}") for number in (81, 90, 91)
    }
    assert answers[81].model_id == "tiny_llama-LoRA"
    rows = [json.loads(line) for line in (predictions / "math.jsonl").read_text().splitlines()]
    assert [row["output"] for row in rows] == [[" 1: 90", " 2: 90"], [" 1: 91", " 2: 91"]]
    assert rows[0]["prompt"] == "USER: And é? ASSISTANT:"
    assert {temperature for prompt, temperature in asked if "rite" in prompt} == {0.7}
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"text": "a"},
            "Record 2 of {path} has no 'conversations', only text.",
        ),
        (
            {"conversations": [*chat("a")["conversations"], *chat("b", "c")["conversations"]]},
            "Record 2 of {path} has a message of the user where the other side's turn is; user and "
            "assistant have to alternate, a system message to come first.",
        ),
        (
            {"conversations": [{"from": "tool", "value": "a"}]},
            "Record 2 of {path} has the role 'tool'; known are user, human, assistant, gpt, "
            "chatgpt, model, system.",
        ),
    ],
)
def test_what_is_wrong_with_a_conversation_is_said(
    record: dict[str, Any], message: str, build: Any, folder: Path
) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(folder, "fit", chat("a", "b"), record)
    assert str(error.value) == message.format(path=folder / "train.json")


def test_missing_data_and_questions_are_named(build: Any, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no train\*.json\* or WizardLM.* null for WizardLM"
    ):
        build(folder, "fit")
    with pytest.raises(ValueError, match=r"^data.questions is not set; give MT-Bench's question.j"):
        build(None, "test")
    with pytest.raises(
        ValueError, match=rf"^{re.escape(str(tmp_path))}/mt_bench/question.jsonl does not exist; gi"
    ):
        build(tmp_path, "test")
    path = folder / "mt_bench" / "question.jsonl"
    path.write_text(json.dumps({**QUESTIONS[0], "category": "cooking"}))
    with pytest.raises(ValueError, match=r"^Question 90 of .* is of the category 'cooking'; known"):
        build(folder, "test")
    path.write_text(json.dumps({**QUESTIONS[0], "turns": ["", "and now?"]}))
    with pytest.raises(ValueError, match=r"^Question 90 of .* has an empty text among its 'turns'"):
        build(folder, "test")


@pytest.mark.filterwarnings("ignore:.*(cut from the left|left out)")
def test_real_records(build: Any, real: Any, real_counts: dict[str, int]) -> None:
    data = build(real("conversation"), None, max_length=30000)
    assert data.counts["train"] == real_counts["conversation/sharegpt/train.json"]
    assert data.counts["test"] == dict.fromkeys(TEMPERATURES, 10)
    assert sum(data.counts["test"].values()) == real_counts["conversation/mt_bench/question.jsonl"]
