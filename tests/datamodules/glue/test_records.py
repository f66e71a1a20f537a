from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.glue.records import GlueFiles
from lightning_peft.datamodules.glue.tasks import TASKS
from lightning_peft.datamodules.loading.labelled import Labelled


@pytest.mark.parametrize(
    ("task", "path", "text", "expected"),
    [
        (
            "cola",
            "CoLA/train.tsv",
            lambda p: p.COLA,
            [("Our friends won't buy it.", None, 1), ('They drank the "pub.', None, 0)],
        ),
        (
            "sst2",
            "SST-2/train.tsv",
            lambda p: p.SST2,
            [("hide new secretions ", None, 0), ("lovely \u2028 film ", None, 1)],
        ),
        (
            "mrpc",
            "MRPC/train.tsv",
            lambda p: p.MRPC,
            [('He said " yes .', '" Yes , " he said .', 1), ("A 'b", "C", 0)],
        ),
        (
            "stsb",
            "STS-B/train.tsv",
            lambda p: p.STSB,
            [("A plane.", "An air plane.", 5.0), ("A flute.", "A large flute.", 3.8)],
        ),
        (
            "qqp",
            "QQP/train.tsv",
            lambda p: p.QQP,
            [("How is it?", "Which level for the exam jlpt5?", 0), ("What now?", "What then?", 1)],
        ),
        (
            "qqp",
            "QQP/train.tsv",
            lambda p: p.QQP_HEADER + p.QQP,
            [("How is it?", "Which level for the exam jlpt5?", 0), ("What now?", "What then?", 1)],
        ),
        (
            "mnli",
            "MNLI/train.tsv",
            lambda p: p.MNLI,
            [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 2)],
        ),
        (
            "mnli",
            "MNLI/train.jsonl",
            lambda p: (
                '{"premise": "It rains.", "hypothesis": "It pours.\\n", "label": "neutral"}\n'
            ),
            [("It rains.", "It pours.\n", 1)],
        ),
        ("rte", "RTE/train.tsv", lambda p: p.RTE, [("No wet.", "Wet.", 1), ("A", "B", 0)]),
        ("qnli", "QNLI/train.tsv", lambda p: p.QNLI, [("Who?", "She did.", 0)]),
        ("qnli", "train.tsv", lambda p: p.QNLI, [("Who?", "She did.", 0)]),
        ("sst2", "sst2/train.tsv", lambda p: p.SST2.split("\n")[0] + "\na\t1", [("a", None, 1)]),
    ],
)
def test_files_are_read_as_they_are(
    task: str, path: str, text: Any, expected: list[Any], tmp_path: Path, published: Any, write: Any
) -> None:
    write(tmp_path, path, text(published))
    files = GlueFiles(task, str(tmp_path), str(tmp_path / "cache"))
    assert files.read(("train",)) == [Labelled(*row, index=i) for i, row in enumerate(expected)]
    broken = {"mended": 1, "left_out": 2} if task == "qqp" else {"mended": 0, "left_out": 0}
    assert files.counts == broken


@pytest.mark.parametrize("task", list(TASKS))
def test_the_hubs_form_is_read(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = TASKS[task].labels
    values = [0.0, 4.2] if labels is None else list(range(len(labels)))
    fields = TASKS[task].fields
    rows = [{**{f: f"{f} {n}" for f in fields}, "label": n, "idx": n} for n in values]
    asked: list[Any] = []

    def load_dataset(*args: Any, **kwargs: Any) -> datasets.Dataset:
        asked.append((*args, kwargs["split"]))
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    expected = [
        Labelled(f"{fields[0]} {n}", f"{fields[1]} {n}" if fields[1:] else None, n, i)
        for i, n in enumerate(values)
    ]
    module = GlueDataModule(task)
    with monkeypatch.context() as patch:
        patch.setattr("datasets.load_dataset", load_dataset)
        read = [module.train_records(), *module.held_out_records().values()]
    assert read == [expected] * len(read)
    splits = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
    assert asked == [("nyu-mll/glue", task, split) for split in ["train", *splits]]
    # A copy of it in a folder.
    (tmp_path / task).mkdir()
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / task / "train-00000-of-00001.parquet")
    assert GlueDataModule(task, str(tmp_path)).train_records() == expected


def test_broken_rows_of_qqp_are_said(
    build: Any, tmp_path: Path, published: Any, write: Any
) -> None:
    write(tmp_path, "QQP/sample.tsv", published.QQP)
    with pytest.warns(UserWarning, match=r"^qqp \(dev\): 1 rows lacked the tab .* mended, 2 were"):
        assert build("qqp", "test").counts["test"] == {"qqp": 2}


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        (
            "rte",
            lambda p: p.RTE + "2\tA\tB\tmaybe\n",
            "line 4: the label 'maybe' is none of 0 (entailment), ",
        ),
        (
            "sst2",
            lambda p: p.SST2 + "a\t2\n",
            "line 4: the label '2' is none of 0 (negative), 1 (positive).",
        ),
        ("sst2", lambda p: p.SST2 + "a\t-1\n", "1 (positive); GLUE hides those of its test sets."),
        (
            "stsb",
            lambda p: p.STSB.replace("3.8", "5.2"),
            "line 3: the score '5.2' is no number from 0 to 5.",
        ),
        (
            "stsb",
            lambda p: p.STSB.replace("3.8", "x"),
            "line 3: the score 'x' is no number from 0 to 5.",
        ),
        (
            "stsb",
            lambda p: p.STSB.replace("3.8", "nan"),
            "line 3: the score 'nan' is no number from 0 to 5.",
        ),
        ("mrpc", lambda p: p.MRPC + "1\ta\tb\tc\n", "line 4: 4 columns, where 5 are wanted."),
        (
            "cola",
            lambda p: p.COLA + "gj04\t1\tsentence\n",
            "line 3: 3 columns, where 4 are wanted.",
        ),
        ("cola", lambda p: p.COLA + "gj04\t1\t\t\n", "line 3: the sentence is empty."),
        (
            "rte",
            lambda p: p.RTE.replace("sentence2", "other"),
            "line 1: the header has no column 'sentence2', only index, sentence1, other, label.",
        ),
        ("rte", lambda p: "index\tsentence1\tsentence2\tlabel\n", " holds no record."),
        ("cola", lambda p: "", " holds no record."),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    task: str, text: Any, message: str, build: Any, tmp_path: Path, published: Any, write: Any
) -> None:
    path = write(tmp_path, f"{TASKS[task].folder}/train.tsv", text(published))
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        build(task, "fit")


def test_a_field_that_is_missing_is_named(build: Any, tmp_path: Path, write: Any) -> None:
    path = write(tmp_path, "MNLI/train.jsonl", '{"premise": "a", "label": "neutral"}\n')
    with pytest.raises(ValueError, match=rf"^Record 1 of {path} has no 'hypothesis', only premise"):
        build("mnli", "fit")
    write(tmp_path, "MNLI/train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "-"}\n')
    with pytest.raises(ValueError, match=rf"^record 1 of {path}: the label '-' is none of"):
        build("mnli", "fit")
