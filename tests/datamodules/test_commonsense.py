from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules import CommonsenseDataModule
from lightning_peft.datamodules.commonsense import LABELS

TRAINED = ["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"]


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(folder: Path | str, stage: str | None = None, **kwargs: Any) -> Any:
        options = {"max_length": 1000, "val_size": 8, "batch_size": 6} | kwargs
        return build_data(CommonsenseDataModule, folder, stage=stage, **options)

    return build_module


def texts(tokenizer: Any, loader: Any) -> list[tuple[str, str]]:
    """Text of every row, and the text under its labels."""
    rows = []
    for batch in loader:
        for ids, mask, labels in zip(
            batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
        ):
            rows.append((tokenizer.decode(ids[mask.bool()]), tokenizer.decode(labels[labels >= 0])))
    return rows


@pytest.mark.parametrize("protocol", ["llm_adapters", "droplora"])
def test_a_row_token_for_token(protocol: str, build: Any, byte_ids: Any, tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "d" / "boolq").mkdir(parents=True, exist_ok=True)
        record = {"instruction": "Is é\nwet?", "input": "", "output": "the answer is true"}
        text = json.dumps([record | {"answer": "true"}] * 2)
        (tmp_path / "d" / "boolq" / f"{split}.json").write_text(text)
    data = build(tmp_path / "d", protocol=protocol, val_size=0)
    space = " " if protocol == "llm_adapters" else ""
    prompt = byte_ids(
        "Below is an instruction that describes a task. Write a response that appropriately "
        f"completes the request.{space}\n\n### Instruction:\nIs é\nwet?\n\n### Response:\n"
    )
    response = [*byte_ids("the answer is true"), 2]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"][0].tolist() == prompt + response
    masked = prompt if protocol == "llm_adapters" else [-100] * len(prompt)
    assert batch["labels"][0].tolist() == masked + response
    count = len(prompt + response) - 1 if protocol == "llm_adapters" else len(response)
    assert batch["num_target_tokens"].item() == 2 * count
    test = next(iter(data.test_dataloader()[0]))
    assert test["input_ids"][0].tolist() == prompt
    assert test["expected"] == ["true", "true"]
    assert data.val_dataloader() == []


def test_training_joins_the_tasks_and_holds_out_the_same_records(
    build: Any, commonsense_dir: Path, tokenizer: Any
) -> None:
    data = build(commonsense_dir, protocol="droplora", seed=0)
    train, val = texts(tokenizer, data.train_dataloader()), texts(tokenizer, data.val_dataloader())
    assert (len(train), len(val)) == (72, 8)
    tasks = Counter(re.search(r"Instruction:\n([\w-]+)", t).group(1) for t, _ in train + val)
    assert tasks == dict.fromkeys(TRAINED, 20)
    assert not set(train) & set(val)
    assert len({t for t, _ in train + val}) == 80
    assert {r for _, r in train} <= {
        f"the correct answer is {label}</s>" for labels in LABELS.values() for label in labels
    }
    other = build(commonsense_dir, protocol="droplora", seed=1)
    assert texts(tokenizer, other.val_dataloader()) == val
    assert texts(tokenizer, other.train_dataloader()) != train


def test_tests_are_apart_and_longest_first(build: Any, commonsense_dir: Path) -> None:
    data = build(commonsense_dir, "test", eval_batch_size=4)
    assert data.test_tasks == list(LABELS)
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        batches = list(loader)
        assert [len(b["index"]) for b in batches] == [4, 4, 2]
        assert {b["task"] for b in batches} == {task}
        assert sorted(i for b in batches for i in b["index"]) == list(range(10))
        lengths = [len(p) for b in batches for p in b["prompt"]]
        assert lengths == sorted(lengths, reverse=True)
        records = json.loads((commonsense_dir / task / "test.json").read_text())
        for b in batches:
            assert b["expected"] == [records[i]["answer"] for i in b["index"]]
            for i, prompt in zip(b["index"], b["prompt"], strict=True):
                assert records[i]["instruction"] in prompt


def test_tasks_without_training_data_are_named_and_tested(
    build: Any, commonsense_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_peft.datamodules.commonsense.rank_zero_info", said.append)
    data = build(commonsense_dir)
    assert said == [
        "Without a train.json, and only tested: piqa, social_i_qa, hellaswag, winogrande."
    ]
    assert list(data.counts["test"]) == list(LABELS)


@pytest.mark.parametrize("beside", [False, True])
def test_the_joined_file_is_used_where_it_is(
    beside: bool, build: Any, commonsense_dir: Path, tokenizer: Any
) -> None:
    outputs = ["true", "solution1", "ending3", "option2", "answer4", "false"]
    joined = [
        {"instruction": f"joined {i}", "output": f"the correct answer is {outputs[i % 6]}"}
        for i in range(60)
    ]
    folder = commonsense_dir.parent if beside else commonsense_dir
    (folder / "commonsense_170k.json").write_text(json.dumps(joined))
    data = build(commonsense_dir, val_size=0)
    assert data.counts["train"] == 60
    assert all("joined" in text for text, _ in texts(tokenizer, data.train_dataloader()))
    sample = texts(tokenizer, data.probe_dataloader(0.2))
    kinds = Counter(text.split("answer is ")[1].removesuffix("</s>") for text, _ in sample)
    assert kinds == dict.fromkeys(outputs, 2)
    # The joined file cannot be taken apart by task, so a choice of tasks reads their own.
    assert build(commonsense_dir, val_size=0, tasks=["boolq"]).counts["train"] == 20


def test_probe_is_stratified_by_task(build: Any, commonsense_dir: Path, tokenizer: Any) -> None:
    data = build(commonsense_dir, val_size=0)
    sample = texts(tokenizer, data.probe_dataloader(0.25, seed=3))
    tasks = Counter(re.search(r"Instruction:\n([\w-]+)", t).group(1) for t, _ in sample)
    assert tasks == dict.fromkeys(TRAINED, 5)
    assert sorted(texts(tokenizer, data.probe_dataloader(0.25, seed=3))) == sorted(sample)
    assert sorted(texts(tokenizer, data.probe_dataloader(0.25, seed=4))) != sorted(sample)


def test_limits_keep_a_fixed_sample(build: Any, commonsense_dir: Path) -> None:
    data = build(
        commonsense_dir, train_limit=30, val_limit=3, test_limit=4, tasks=["boolq", "piqa"]
    )
    assert data.counts["train"] == 12  # Of boolq's 20 records, 8 validate.
    assert data.counts["val"] == 3
    assert data.counts["test"] == {"boolq": 4, "piqa": 4}
    first = [i for b in data.test_dataloader()[0] for i in b["index"]]
    again = build(commonsense_dir, test_limit=4, tasks=["boolq"], seed=5)
    assert sorted(first) == sorted(i for b in again.test_dataloader()[0] for i in b["index"])


@pytest.mark.parametrize(
    ("task", "output", "answer"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", None),
        ("piqa", "the correct answer is solution2 solution1", "solution2"),
        ("piqa", "solution3", None),
        ("winogrande", " option1", "option1"),
        ("social_i_qa", "answer3", "answer3"),
        ("ARC-Easy", "answer5.", "answer5"),
        ("ARC-Challenge", "Answer1 is answer4", "answer4"),
        ("openbookqa", "answer12", "answer1"),
        ("hellaswag", "ending4ending1", "ending4"),
        ("hellaswag", "ending5", None),
        ("hellaswag", "answer1", None),
        ("boolq", "", None),
    ],
)
def test_extraction_takes_the_first_label(task: str, output: str, answer: str | None) -> None:
    data = CommonsenseDataModule("anywhere")
    assert data.extract(output, task) == answer
    assert data.correct(answer, answer or "true", task) is (answer is not None)


def test_score_is_accuracy() -> None:
    predictions = [{"correct": True}, {"correct": False}, {"correct": False}, {"correct": True}]
    assert CommonsenseDataModule("anywhere").score("boolq", predictions) == {"accuracy": 0.5}


def test_cut_prompts_are_counted_and_reported_once(build: Any, commonsense_dir: Path) -> None:
    with pytest.warns(UserWarning, match="were cut from the left") as warned:
        data = build(commonsense_dir, max_length=200, protocol="droplora")
    cut, total = data.counts["cut"], data.counts
    assert 0 < cut["train"] <= total["train"]
    ours = [str(w.message) for w in warned if "cut from the left" in str(w.message)]
    assert sorted(ours) == sorted(
        f"{n} of {total[split] if split != 'test' else 80} {split} prompts were longer than the "
        "limit of 200 tokens and were cut from the left; data.max_length raises it."
        for split, n in cut.items()
        if n
    )
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape[1] == 200
    ends = batch["attention_mask"].sum(dim=1) - 1
    assert batch["labels"].gather(1, ends[:, None]).flatten().unique().tolist() == [2]


def write(folder: Path, task: str, split: str, text: str) -> str:
    path = folder / task / f"{split}.json"
    path.write_text(text)
    return str(path)


def test_a_file_that_is_not_json_is_named(build: Any, commonsense_dir: Path) -> None:
    path = write(commonsense_dir, "boolq", "train", '[{"instruction": "a", "output": ')
    with pytest.raises(ValueError, match=rf"^{re.escape(path)} is not JSON \(.+\)\.$"):
        build(commonsense_dir, "fit")


@pytest.mark.parametrize("text", ["[]", "", "{}"])
def test_an_empty_file_is_named(text: str, build: Any, commonsense_dir: Path) -> None:
    path = write(commonsense_dir, "piqa", "test", text)
    with pytest.raises(ValueError, match=rf"^{re.escape(path)} holds no record\.$"):
        build(commonsense_dir, "test")


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ({"instruction": "c"}, "instruction"),
        ({"instruction": "c", "output": None, "answer": "x"}, "instruction, answer"),
    ],
)
def test_a_record_without_output_is_named(
    bad: dict[str, Any], found: str, build: Any, commonsense_dir: Path
) -> None:
    records = [{"instruction": "a", "output": "b"}, bad, {"instruction": "d", "output": "e"}]
    path = write(commonsense_dir, "boolq", "train", json.dumps(records))
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(commonsense_dir, "fit")
    assert str(error.value) == f"Record 2 of {path} has no text in 'output', only in {found}."


def test_records_that_are_no_objects_are_named(build: Any, commonsense_dir: Path) -> None:
    path = write(commonsense_dir, "boolq", "test", "[1, 2]")
    with pytest.raises(ValueError, match=rf"^Record 1 of {re.escape(path)} has no text"):
        build(commonsense_dir, "test")


def test_a_label_of_another_task_is_named(build: Any, commonsense_dir: Path) -> None:
    file = commonsense_dir / "piqa" / "test.json"
    records = json.loads(file.read_text())
    records[1]["answer"] = "answer1"
    file.write_text(json.dumps(records))
    with pytest.raises(
        ValueError,
        match=r"^Record 2 of piqa/test.json has the answer 'answer1', which is none of solution1, "
        r"solution2\.$",
    ):
        build(commonsense_dir)


@pytest.mark.parametrize("folder", ["/nowhere/at/all", "no-such-folder", "./no/such"])
def test_a_missing_folder_is_named(folder: str, build: Any) -> None:
    with pytest.raises(ValueError, match=rf"^data.data_dir '{folder}' is not a folder, nor an own"):
        build(folder)


def test_what_the_hub_does_not_give_is_named(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build("no/where")
    assert str(error.value) == (
        "data.data_dir 'no/where' is not a folder, and the hub does not give it (no route)."
    )


def test_a_chosen_task_that_is_missing_is_named(build: Any, commonsense_dir: Path) -> None:
    (commonsense_dir / "piqa" / "test.json").unlink()
    with pytest.raises(ValueError, match=r"has no piqa/test.json; give the folder"):
        build(commonsense_dir, "test", tasks=["boolq", "piqa"])
    assert "piqa" not in build(commonsense_dir, "test").test_tasks


def test_nothing_to_train_on_is_said(build: Any, commonsense_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"neither commonsense_170k.json nor a train.json of piqa"):
        build(commonsense_dir, "fit", tasks=["piqa"])


def test_too_much_validation_is_said(build: Any, commonsense_dir: Path) -> None:
    with pytest.raises(
        ValueError, match=r"val_size is 80, which leaves nothing of the 80 training"
    ):
        build(commonsense_dir, "fit", val_size=80)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "dropLora"}, "data.protocol 'dropLora' is unknown; did you mean 'droplora'?"),
        ({"tasks": ["arc"]}, "data.tasks 'arc' is unknown; known are boolq, "),
        ({"tasks": ["ARC-easy"]}, "data.tasks 'ARC-easy' is unknown; did you mean 'ARC-Easy'?"),
        ({"max_length": 0}, "data.max_length is 0; it has to be 1 or more."),
        ({"train_limit": 0}, "data.train_limit is 0; it has to be 1 or more."),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CommonsenseDataModule("anywhere", **arguments)


def test_limits_of_the_protocol_can_be_changed() -> None:
    data = CommonsenseDataModule("x", protocol="droplora", max_length=900, max_new_tokens=16)
    assert (data.protocol.max_length, data.protocol.max_new_tokens) == (900, 16)
    assert data.protocols["droplora"].max_new_tokens == 2048


@pytest.mark.filterwarnings("ignore:.*cut from the left")
def test_real_records(build: Any, real: Any) -> None:
    data = build(real("commonsense"), protocol="droplora", val_size=100, batch_size=16)
    assert data.counts["test"] == dict.fromkeys(LABELS, 400)
    assert data.counts["train"] + data.counts["val"] == 1119 + 3 * 1200
    for task, loader in zip(data.test_tasks, data.test_dataloader(), strict=True):
        gold = [e for b in loader for e in b["expected"]]
        assert set(gold) <= set(LABELS[task])
        assert all(
            data.correct(data.extract(f"the correct answer is {e}", task), e, task) for e in gold
        )
    batches = list(data.train_dataloader())
    assert sum(len(b["labels"]) for b in batches) == data.counts["train"]
    padded = sum(b["attention_mask"].numel() for b in batches)
    assert padded < 1.05 * sum(int(b["attention_mask"].sum()) for b in batches)
