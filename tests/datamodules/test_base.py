"""What a task says, and what its base makes of that: sets, judgement, stamps."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules import Example, TextDataModule


def test_a_test_set_is_known_by_what_is_asked_and_expected(
    make_capitals: Any, tokenizer: Any, capitals: Any
) -> None:
    class Others(capitals):
        def test_examples(self) -> Mapping[str, Sequence[Example]]:
            asked = super().test_examples()["c"]
            return {"c": [replace(e, expected="?") for e in asked], "d": asked}

    class Asked(capitals):
        def test_examples(self) -> Mapping[str, Sequence[Example]]:
            return {"c": [replace(e, prompt=f"{e.prompt}!") for e in super().test_examples()["c"]]}

    def stamp(data: TextDataModule, task: str = "c") -> dict[str, Any]:
        data.setup("test")
        return data.test_stamp(task)

    known = stamp(make_capitals())
    assert (known["name"], known["records"], known["max_length"]) == ("ours", 5, 64)
    assert stamp(make_capitals(batch_size=1)) == known
    others = Others(tokenizer=tokenizer)
    assert stamp(others)["fingerprint"] != known["fingerprint"] == stamp(others, "d")["fingerprint"]
    assert stamp(Asked(tokenizer=tokenizer))["fingerprint"] != known["fingerprint"]
    # What a limit cuts off is another question to the model.
    with pytest.warns(UserWarning, match="cut from the left"):
        assert stamp(make_capitals(max_length=6))["fingerprint"] != known["fingerprint"]
    with pytest.raises(RuntimeError, match="call it first"):
        make_capitals().test_stamp("c")


@pytest.fixture
def longer(capitals: Any) -> Any:
    class Longer(capitals):
        """Every third response is over a limit of 40, and so is every other prompt."""

        def train_examples(self) -> Sequence[Example]:
            return [
                self.example("land " * (i % 2 * 9), f"{i:02d}" + "?" * (i % 3 == 0) * 40, "c", i)
                for i in range(10)
            ]

        def val_examples(self) -> Sequence[Example]:
            return [self.example(f"land {i}", "city", "c", i) for i in range(3)]

    return Longer


def test_records_whose_response_is_over_the_limit_are_left_out(
    make_tokenizer: Any, tmp_path: Path, longer: Any
) -> None:
    data = longer(
        tokenizer=make_tokenizer(), max_length=40, batch_size=2, cache_dir=str(tmp_path / "cache")
    )
    with pytest.warns(UserWarning, match="records|prompts") as warned:
        data.setup("fit")
    assert [str(w.message) for w in warned] == [
        "4 of 10 train records have a response over the limit of 40 tokens and were left out; "
        "data.max_length raises it.",
        "3 of 6 train prompts were longer than the limit of 40 tokens and were cut from the left; "
        "data.max_length raises it.",
    ]
    assert data.counts == {
        "left_out": {"train": 4, "val": 0},
        "train": 6,
        "cut": {"train": 3, "val": 0},
        "val": 3,
    }
    seen = []
    for batch in data.train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert len(ids) <= 40
            target = labels[labels != -100]
            seen.append("".join(chr(i - 3) for i in target[:-1]))
            assert target[-1] == 2
    assert sorted(seen) == ["01", "02", "04", "05", "07", "08"]


def test_what_is_left_out_counts_after_the_limit_of_records(
    make_tokenizer: Any, tmp_path: Path, longer: Any
) -> None:
    data = longer(
        tokenizer=make_tokenizer(), max_length=40, train_limit=6, cache_dir=str(tmp_path / "cache")
    )
    with pytest.warns(UserWarning, match="left out|cut"):
        data.setup("fit")
    left_out = data.counts["left_out"]["train"]
    assert 0 < left_out < 6
    assert data.counts["train"] == 6 - left_out


@pytest.mark.parametrize(("max_length", "split", "total"), [(2, "train", 10), (4, "val", 3)])
def test_a_limit_that_leaves_no_record_is_refused(
    max_length: int, split: str, total: int, make_tokenizer: Any, tmp_path: Path, longer: Any
) -> None:
    data = longer(
        tokenizer=make_tokenizer(), max_length=max_length, cache_dir=str(tmp_path / "cache")
    )
    sentence = (
        rf"^all {total} {split} records have a response over the limit of {max_length} tokens; "
        r"raise data\.max_length\.$"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=sentence):
            data.setup("fit")


def test_answers_are_judged_by_what_is_found_in_them(make_capitals: Any, capitals: Any) -> None:
    class Lower(capitals):
        def correct(self, extracted: str, expected: Any, task: str) -> bool:
            return extracted.lower() == expected.lower()

    rows = [
        {"index": 0, "prompt": "p", "output": " Rome ", "expected": "rome"},
        {"index": 1, "prompt": "p", "output": "Rome!", "expected": "Rome"},
        {"index": 2, "prompt": "p", "output": "  ", "expected": ""},
    ]
    data = Lower()
    data.judge("c", rows)
    assert [(row["extracted"], row["correct"]) for row in rows] == [
        ("Rome", True),
        ("Rome!", False),
        (None, False),
    ]
    assert data.score("c", rows) == {"accuracy": 1 / 3}
    assert data.decoding("c") is data.protocol
    assert data.follow_up({}, []) is None


def test_arguments_of_the_base_are_found_by_the_command_line() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    arguments = parser.parse_args(
        ["--data", "ArithmeticDataModule", "--data.task", "operators", "--data.batch_size", "8"]
    )
    data = instantiate(arguments).data
    assert (data.operators, data.batch_size, data.tokenizer) == ("-%&^", 8, None)
    arguments = parser.parse_args(
        ["--data=CommonsenseDataModule", "--data.data_dir=d", "--data.tokenizer=some/folder"]
    )
    data = instantiate(arguments).data
    assert (data.data_dir, data.tokenizer, data.val_size) == ("d", "some/folder", 120)


def test_importing_the_package_loads_no_datasets() -> None:
    program = "import sys, lightning_peft.datamodules; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_a_score_is_named_before_there_are_answers(make_capitals: Any) -> None:
    data = make_capitals()
    assert data.score_names("capitals") == ("accuracy",)
    assert tuple(data.score("capitals", [{"correct": True}])) == data.score_names("capitals")
