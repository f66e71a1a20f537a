"""DART: triples, annotations, and the hub's schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.dart import DartDataModule

COLLEGE = [["Mars Hill", "JOINED", "1973"], ["[TABLECONTEXT]", "[TITLE]", "Élan"]]
WOLVES = [["Newberry", "NICKNAME", "Wolves"]]


def record(triples: Any, *texts: str) -> dict[str, Any]:
    annotations = [{"source": "WikiSQL", "text": text} for text in texts]
    return {"tripleset": triples, "subtree_was_extended": True, "annotations": annotations}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    files = {
        "train": [
            record(COLLEGE, "It joined in 1973.", "Joined: 1973."),
            record(WOLVES, "Wolves."),
        ],
        "test": [
            record(WOLVES, "The wolves.", "Its nickname is the wolves."),
            record(COLLEGE, "J."),
        ],
    }
    for split, records in files.items():
        path = tmp_path / f"dart-v1.1.1-full-{split}.json"
        path.write_text(json.dumps(records, indent=4))
    return tmp_path


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(folder: Path, stage: str | None = None, **kwargs: Any) -> DartDataModule:
        options = {"batch_size": 8, "val_size": 0, "group_by_length": False, **kwargs}
        return build_data(DartDataModule, folder, stage=stage, **options)

    return build_module


def test_a_row_token_for_token(build: Any, folder: Path, byte_ids: Any) -> None:
    data = build(folder)
    prompt = byte_ids(
        "Describe the facts in one or two sentences.\n\nFacts:\n"
        "Mars Hill | JOINED | 1973\n[TABLECONTEXT] | [TITLE] | Élan\n\nDescription:\n"
    )
    response = [*byte_ids("Joined: 1973."), 2]
    batch = next(iter(data.train_dataloader()))
    assert len(batch["input_ids"]) == 3
    length = len(prompt + response)
    row = [ids[:length] for ids in batch["input_ids"].tolist()].index(prompt + response)
    labels = batch["labels"][row].tolist()
    assert labels[:length] == [-100] * len(prompt) + response
    assert set(labels[length:]) <= {-100}
    test = next(iter(data.test_dataloader()[0]))
    assert test["index"] == [1, 0]
    assert test["input_ids"][0].tolist() == prompt
    assert test["expected"] == [["J."], ["The wolves.", "Its nickname is the wolves."]]
    assert (data.protocol.name, data.protocol.max_length) == ("dart-ours", 512)
    assert data.protocol.max_new_tokens == 128


def test_a_reference_scores_fully(build: Any, folder: Path) -> None:
    data = build(folder, "test")
    rows = [
        {"output": e.expected[-1] + "\n", "expected": e.expected}
        for e in data.test_examples()["dart"][:1]
    ]
    data.judge("dart", rows)
    assert data.score("dart", rows) == {"bleu": pytest.approx(100.0), "rougeL": 1.0}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record(COLLEGE), "has no text in 'annotations', only tripleset, subtree_was_ext"),
        (record([], "A."), "has no 'tripleset', only "),
    ],
)
def test_a_record_that_lacks_something_is_named(
    bad: dict[str, Any], message: str, build: Any, folder: Path
) -> None:
    path = folder / "dart-v1.1.1-full-test.json"
    path.write_text(json.dumps([record(WOLVES, "W."), bad]))
    with pytest.raises(ValueError, match=re.escape(f"Record 2 of {path} {message}")):
        build(folder, "test")


def test_the_hubs_schema_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(source: Any, cache_dir: str | None) -> list[dict[str, Any]]:
        references = [] if source.split == "train" else ["W.", "The W."]
        return [{"dart_id": 0, "tripleset": WOLVES, "target": "W.", "references": references}]

    monkeypatch.setattr("lightning_peft.datamodules.loading.records._from_hub", from_hub)
    data = DartDataModule()
    assert [e.response for e in data.train_examples()] == ["W."]
    assert [e.expected for e in data.test_examples()["dart"]] == [["W.", "The W."]]
    assert data.splits["train"].hub == "GEM/dart"


def test_real_records(build: Any, real: Any, real_counts: dict[str, int]) -> None:
    data = build(
        real("nlg/dart"), train_split="dev", test_split="dev", val_size=40, max_length=1000
    )
    assert data.counts["test"] == {"dart": 40}
    assert data.counts["train"] + 40 == real_counts["nlg/dart/dart-v1.1.1-full-dev.json"]
    trained = {e.prompt for e in data.train_examples()}
    assert not trained & {e.prompt for e in data.test_examples()["dart"]}
