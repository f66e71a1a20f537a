"""What every task with references does, by one of three sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.references import (
    ReferencesDataModule,
    our_protocol,
    three_splits,
)


class Plurals(ReferencesDataModule):
    """Words to be put into the plural."""

    task = "plurals"
    wanted = {"source": "'word'", "reference": "'plural'"}
    splits = three_splits("o/plurals", ("train.jsonl",), ("dev.jsonl",), ("test*.jsonl", "t.json"))
    protocols = our_protocol(task, "Many of {instruction}: ", max_length=40)

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        return record.get("word")

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        return [record.get("plural"), record.get("other")]


RECORDS = [
    {"word": "ox", "plural": "oxen"},
    {"word": "index", "plural": "indices", "other": "indexes"},
    {"word": "ox", "plural": "oxes"},
    {"word": "cat", "plural": "cats"},
]


@pytest.fixture
def folder(tmp_path: Path, write_records: Any) -> Path:
    for split in ("train", "dev", "test"):
        write_records(tmp_path / "words" / f"{split}.jsonl", RECORDS)
    return tmp_path / "words"


def test_splits_and_protocol_of_a_task() -> None:
    assert {name: (s.hub, s.split) for name, s in Plurals.splits.items()} == {
        "train": ("o/plurals", "train"),
        "dev": ("o/plurals", "validation"),
        "test": ("o/plurals", "test"),
    }
    assert Plurals.splits["test"].files == ("test*.jsonl", "t.json")
    (protocol,) = Plurals.protocols.values()
    assert (protocol.name, protocol.max_length, protocol.max_new_tokens) == (
        "plurals-ours",
        40,
        128,
    )
    assert (protocol.loss_on, protocol.num_beams, protocol.temperature) == ("response", 1, 0.0)


def test_each_reference_trains_and_each_source_is_asked_once(folder: Path) -> None:
    data = Plurals(str(folder))
    trained = [(e.prompt, e.response) for e in data.train_examples()]
    assert trained == [
        ("Many of ox: ", "oxen"),
        ("Many of ox: ", "oxes"),
        ("Many of index: ", "indices"),
        ("Many of index: ", "indexes"),
        ("Many of cat: ", "cats"),
    ]
    assert [e.index for e in data.train_examples()] == [0, 1, 2, 3, 4]
    asked = data.test_examples()["plurals"]
    assert [(e.index, e.expected) for e in asked] == [
        (0, ["oxen", "oxes"]),
        (1, ["indices", "indexes"]),
        (2, ["cats"]),
    ]


def test_a_source_is_held_out_with_all_of_its_references(folder: Path) -> None:
    data = Plurals(str(folder), train_split="dev", test_split="dev", val_size=1)
    trained, held_out = data.train_examples(), data.val_examples()
    assert {e.prompt for e in trained} & {e.prompt for e in held_out} == set()
    assert len({e.prompt for e in held_out}) == 1
    assert len(trained) + len(held_out) == 5
    tested = data.test_examples()["plurals"]
    assert [e.prompt for e in tested] == [held_out[0].prompt]


def test_the_best_reference_counts() -> None:
    data = Plurals()
    rows: list[dict[str, Any]] = [
        {"output": "the indexes", "expected": ["the indices", "the indexes"]},
        {"output": "the cat", "expected": ["the cats"]},
    ]
    data.judge("plurals", rows)
    assert [row["rougeL"] for row in rows] == [1.0, pytest.approx(0.5)]
    scores = data.score("plurals", rows)
    assert list(scores) == ["bleu", "rougeL"]
    assert scores["rougeL"] == pytest.approx(0.75)
    for row, (loss, tokens) in zip(rows, [(6.0, 4), (1.0, 1)], strict=True):
        row |= {"loss": loss, "target_tokens": tokens}
    assert data.score("plurals", rows)["loss"] == pytest.approx(7 / 5)
    unknown = {k: v for k, v in rows[1].items() if k not in ("loss", "target_tokens")}
    assert "loss" not in data.score("plurals", [rows[0], unknown])
    assert data.score_names("plurals") == ("bleu", "rougeL", "loss")


def test_a_record_that_lacks_something_is_named(folder: Path, write_records: Any) -> None:
    write_records(folder / "test.jsonl", [RECORDS[0], {"word": "", "plural": "x"}])
    with pytest.raises(ValueError, match=r"^Record 2 of .*test\.jsonl has no 'word', only word, p"):
        Plurals(str(folder)).test_examples()
    write_records(folder / "test.jsonl", [{"word": "ox", "plural": ""}])
    with pytest.raises(ValueError, match=r"^Record 1 of .*test\.jsonl has no 'plural', only word"):
        Plurals(str(folder)).test_examples()


def test_prompts_are_joined_with_each_reference_as_in_training(
    folder: Path, build_data: Any
) -> None:
    data = build_data(Plurals, str(folder), eval_batch_size=2)
    first, second = data.test_dataloader()[0]
    assert (len(first["index"]), len(second["index"])) == (2, 1)
    found = [(b, *rest) for b in (first, second) for rest in data.reference_batches(b)]
    texts = [len(b["expected"][i]) for b, owners, _ in found for i in owners]
    assert sorted(texts) == [1, 2, 2, 2, 2]  # each with every reference of its source
    assert all(len(owners) <= 2 for _, owners, _ in found)
    trained = {tuple(row) for row in data.training_sets()[0].table["tokens"]}
    for _, _, batch in found:
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in trained
