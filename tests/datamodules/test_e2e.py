"""E2E, and what it shares with DART and DialogSum: several references, splits, scores."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.e2e import E2EDataModule

CITY, RIVER, EAST = "name[A], area[city]", "name[B], area[riverside]", "name[C], food[Thai, hot]"
TRAIN = [(CITY, "A is in the city."), (RIVER, "B is by the é river."), (CITY, "The city has A.")]
DEV = [(EAST, "C is hot."), (EAST, "C, Thai."), (CITY, "A!"), (RIVER, "B, at the river.")]
TEST = [(RIVER, "B is by the river side."), (CITY, "A is in the city."), (RIVER, "See B there.")]
PROMPT = (
    "Describe the restaurant in one or two sentences.\n\nRestaurant:\n{}\n\nDescription:\n".format
)


def write(path: Path, rows: list[tuple[str, str]], fields: tuple[str, ...] = ("mr", "ref")) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([fields, *rows])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "e2e").mkdir()
    files = {"trainset": TRAIN, "devset": DEV, "testset_w_refs": TEST}
    for name, rows in files.items():
        write(tmp_path / "e2e" / f"{name}.csv", rows)
    return tmp_path / "e2e"


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(folder: Path, stage: str | None = None, **kwargs: Any) -> E2EDataModule:
        options = {"batch_size": 8, "val_size": 0, **kwargs}
        return build_data(E2EDataModule, folder, stage=stage, **options)

    return build_module


def pairs(batch: dict[str, Any], tokenizer: Any) -> set[tuple[str, str]]:
    """Prompt and response of each row, told by its labels."""
    rows = zip(batch["input_ids"], batch["attention_mask"].bool(), batch["labels"], strict=True)
    return {
        (tokenizer.decode(ids[mask & (labels < 0)]), tokenizer.decode(labels[labels >= 0]))
        for ids, mask, labels in rows
    }


def test_a_row_token_for_token(build: Any, byte_ids: Any, tmp_path: Path) -> None:
    for name in ("trainset", "testset_w_refs"):
        write(tmp_path / f"{name}.csv", [("name[É {instruction}], area[city]", 'An "É".')])
    data = build(tmp_path)
    prompt = byte_ids(
        "Describe the restaurant in one or two sentences.\n\nRestaurant:\n"
        "name[É {instruction}], area[city]\n\nDescription:\n"
    )
    response = [*byte_ids('An "É".'), 2]
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"][0].tolist() == prompt + response
    assert batch["labels"][0].tolist() == [-100] * len(prompt) + response
    assert batch["num_target_tokens"].item() == len(response)
    test = next(iter(data.test_dataloader()[0]))
    assert test["input_ids"][0].tolist() == prompt
    assert test["expected"] == [['An "É".']]
    assert (data.protocol.name, data.protocol.num_beams) == ("e2e-ours", 1)
    assert (data.protocol.max_length, data.protocol.max_new_tokens) == (256, 128)


def test_each_pair_trains_and_the_dev_file_validates(
    build: Any, folder: Path, tokenizer: Any
) -> None:
    data = build(folder, "fit")
    expected = [{(PROMPT(mr), f"{ref}</s>") for mr, ref in rows} for rows in (TRAIN, DEV)]
    assert pairs(next(iter(data.train_dataloader())), tokenizer) == expected[0]
    assert pairs(next(iter(data.val_dataloader())), tokenizer) == expected[1]


def test_rows_of_a_source_are_one_test_record(build: Any, folder: Path) -> None:
    data = build(folder, "test")
    batch = next(iter(data.test_dataloader()[0]))
    assert data.test_tasks == ["e2e"]
    records = dict(zip(batch["prompt"], batch["expected"], strict=True))
    assert records == {
        PROMPT(RIVER): ["B is by the river side.", "See B there."],
        PROMPT(CITY): ["A is in the city."],
    }
    assert dict(zip(batch["index"], batch["prompt"], strict=True))[0] == PROMPT(RIVER)


def test_scores_of_references_are_perfect_and_of_others_are_not(build: Any, folder: Path) -> None:
    data = build(folder, "test")
    batch = next(iter(data.test_dataloader()[0]))

    def rows(outputs: list[str]) -> list[dict[str, Any]]:
        made = [
            {"output": o, "expected": e} for o, e in zip(outputs, batch["expected"], strict=True)
        ]
        data.judge("e2e", made)
        return made

    perfect = rows([expected[-1] for expected in batch["expected"]])
    assert [row["rougeL"] for row in perfect] == [1.0, 1.0]
    assert data.score("e2e", perfect) == {"bleu": pytest.approx(100.0), "rougeL": 1.0}
    # Of "B is by the river side" the first five of six words, and nothing of the other.
    half = rows(["B is by the river" if "B" in e[0] else "x" for e in batch["expected"]])
    assert data.score("e2e", half)["rougeL"] == pytest.approx((10 / 11) / 2, abs=1e-6)
    assert 0 < data.score("e2e", half)["bleu"] < 60


def test_the_dev_split_trains_where_it_is_asked_to(
    build: Any, folder: Path, tokenizer: Any
) -> None:
    (folder / "trainset.csv").unlink()
    data = build(folder, train_split="dev", val_size=1)
    train = pairs(next(iter(data.train_dataloader())), tokenizer)
    val = pairs(next(iter(data.val_dataloader())), tokenizer)
    assert train | val == {(PROMPT(mr), f"{ref}</s>") for mr, ref in DEV}
    # A source is held out with all of its references.
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in val}
    assert len({prompt for prompt, _ in val}) == 1
    assert data.counts["test"] == {"e2e": 2}


def test_the_held_out_part_of_the_dev_split_is_tested(build: Any, folder: Path) -> None:
    data = build(folder, train_split="dev", test_split="dev", val_size=2)
    train = {e.prompt for e in data.train_examples()}
    tested = {e.prompt for e in data.test_examples()["e2e"]}
    assert tested == {e.prompt for e in data.val_examples()}
    assert (len(train), len(tested), train & tested) == (1, 2, set())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "data.data_dir '{folder}' holds no trainset*.csv or train*.csv or train*.parquet to "
            "train on; data.train_split: dev takes devset.csv, which is there.",
        ),
        (
            {"train_split": "dev", "val_size": 3},
            "data.val_size is 3, which leaves nothing of the 3 e2e sources in the dev split; "
            "lower it.",
        ),
        (
            {"train_split": "dev", "test_split": "dev"},
            "data.val_size is 0 and training takes the whole dev split, so nothing is left to test "
            "on; raise it, or set data.test_split: test.",
        ),
        ({"train_split": "val"}, "data.train_split 'val' is unknown; known are train, dev."),
        ({"test_split": "tset"}, "data.test_split 'tset' is unknown; did you mean 'test'?"),
        ({"protocol": "e2e"}, "data.protocol 'e2e' is unknown; known are e2e-ours."),
    ],
)
def test_wrong_arguments_get_one_sentence(
    arguments: dict[str, Any], message: str, build: Any, folder: Path
) -> None:
    (folder / "trainset.csv").unlink()
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        build(folder, **arguments)
    assert str(error.value) == message.format(folder=folder)


def test_no_files_at_all_is_said(build: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no trainset\*.csv or .* or null for GEM/e2e_nlg"):
        build(tmp_path / "empty", "fit")


@pytest.mark.parametrize(
    ("fields", "row", "message"),
    [
        (("MR",), (CITY,), "has no 'ref', only MR."),
        (("mr", "ref"), (CITY, ""), "has no 'ref', only mr."),
        (("mr", "ref"), ("", "A."), "has no 'mr', only ref."),
    ],
)
def test_a_record_without_reference_is_named(
    fields: tuple[str, ...], row: tuple[str, ...], message: str, build: Any, folder: Path
) -> None:
    path = folder / "testset_w_refs.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([fields, ("x", "y")[: len(fields)], row])
    number = 1 if len(fields) == 1 else 2
    with pytest.raises(ValueError, match=f"^Record {number} of {re.escape(f'{path} {message}')}$"):
        build(folder, "test")


def test_the_hubs_schema_is_read(build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_hub(source: Any, cache_dir: str | None) -> list[dict[str, Any]]:
        asked.append((source.hub, source.split))
        references = [] if source.split == "train" else ["A.", "The A."]
        return [
            {
                "gem_id": "e2e_nlg-0",
                "meaning_representation": CITY,
                "target": "A.",
                "references": references,
            }
        ]

    asked: list[tuple[str, str]] = []
    monkeypatch.setattr("lightning_peft.datamodules.loading.records._from_hub", from_hub)
    data = E2EDataModule(None)
    assert [(e.prompt, e.response) for e in data.train_examples()] == [(PROMPT(CITY), "A.")]
    assert [e.response for e in data.val_examples()] == ["A.", "The A."]
    assert [e.expected for e in data.test_examples()["e2e"]] == [["A.", "The A."]]
    assert asked == [("GEM/e2e_nlg", split) for split in ("train", "validation", "test")]


def test_real_records(build: Any, real: Any, real_counts: dict[str, int]) -> None:
    data = build(real("nlg/e2e"), train_split="dev", max_length=1000)
    assert data.counts["train"] == real_counts["nlg/e2e/devset.csv"]
    tests = data.test_examples()["e2e"]
    assert sum(len(e.expected) for e in tests) == real_counts["nlg/e2e/testset_w_refs.csv"]
    assert len(tests) == len({e.prompt for e in tests}) == 57
    rows = [{"output": e.expected[0], "expected": e.expected} for e in tests]
    data.judge("e2e", rows)
    assert data.score("e2e", rows) == {"bleu": pytest.approx(100.0), "rougeL": pytest.approx(1.0)}
