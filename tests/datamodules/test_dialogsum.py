"""DialogSum: one summary to learn from, three to compare with."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.dialogsum import DialogSumDataModule

DIALOGUE = "#Person1#: Wet é?\n#Person2#: Yes."
OTHER = "#Person1#: Who is it that comes to see us this late?\n#Person2#: Nobody at all."
THREE = {"summary1": "It is wet.", "summary2": "They say it is wet.", "summary3": "Wet, yes."}


def write(folder: Path, split: str, *records: dict[str, Any]) -> Path:
    path = folder / f"dialogsum.{split}.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, "train", {"fname": "t", "dialogue": DIALOGUE, "summary": "It is wet é."})
    write(tmp_path, "test", {"dialogue": OTHER, **THREE}, {"dialogue": DIALOGUE, **THREE})
    write(tmp_path, "hiddentest", {"dialogue": OTHER})
    return tmp_path


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(folder: Path, stage: str | None = None, **kwargs: Any) -> DialogSumDataModule:
        options = {"batch_size": 4, "val_size": 0, **kwargs}
        return build_data(DialogSumDataModule, folder, stage=stage, **options)

    return build_module


def test_a_row_token_for_token(build: Any, folder: Path, byte_ids: Any) -> None:
    data = build(folder)
    prompt = byte_ids("Summarize the dialogue.\n\n#Person1#: Wet é?\n#Person2#: Yes.\n\nSummary:\n")
    response = [*byte_ids("It is wet é."), 2]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].tolist() == [prompt + response]
    assert batch["labels"].tolist() == [[-100] * len(prompt) + response]
    test = next(iter(data.test_dataloader()[0]))
    assert test["index"] == [0, 1]
    assert test["input_ids"][1].tolist()[-len(prompt) :] == prompt
    assert test["expected"] == [list(THREE.values())] * 2
    assert (data.protocol.name, data.protocol.max_length) == ("dialogsum-ours", 1024)
    assert data.protocol.max_new_tokens == 128


def test_the_best_of_three_summaries_counts(build: Any, folder: Path) -> None:
    data = build(folder, "test")
    outputs = ["They say it is wet.", "It is wet."]
    rows = [{"output": output, "expected": list(THREE.values())} for output in outputs]
    data.judge("dialogsum", rows)
    assert data.score("dialogsum", rows) == {"bleu": pytest.approx(100.0), "rougeL": 1.0}


def test_a_record_without_summary_is_named(build: Any, folder: Path) -> None:
    path = write(folder, "test", {"dialogue": OTHER, **THREE}, {"dialogue": DIALOGUE, "topic": "t"})
    with pytest.raises(
        ValueError,
        match=re.escape(
            f"Record 2 of {path} has no 'summary' (or summary1 to summary3), only dialogue, topic."
        ),
    ):
        build(folder, "test")


def test_rows_of_the_hubs_test_set_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(source: Any, cache_dir: str | None) -> list[dict[str, Any]]:
        assert (source.hub, source.split) == ("knkarthick/dialogsum", "test")
        return [
            {"id": f"test_0_{i}", "dialogue": DIALOGUE, "summary": summary, "topic": "rain"}
            for i, summary in enumerate(THREE.values(), start=1)
        ]

    monkeypatch.setattr("lightning_peft.datamodules.loading.records._from_hub", from_hub)
    tests = DialogSumDataModule().test_examples()["dialogsum"]
    assert [e.expected for e in tests] == [list(THREE.values())]


def test_real_records(build: Any, real: Any, real_counts: dict[str, int]) -> None:
    data = build(real("nlg/dialogsum"), train_split="dev", max_length=4000)
    assert data.counts["train"] == real_counts["nlg/dialogsum/dialogsum.dev.jsonl"]
    assert data.counts["test"] == {"dialogsum": real_counts["nlg/dialogsum/dialogsum.test.jsonl"]}
    assert {len(e.expected) for e in data.test_examples()["dialogsum"]} == {3}
