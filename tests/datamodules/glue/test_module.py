from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.glue.tasks import TASKS
from lightning_peft.datamodules.loading.pairs import PairEncoder


def test_single_texts_and_pairs_have_the_tokenizers_own_form(
    build: Any,
    make_tokenizer: Any,
    byte_ids: Any,
    tmp_path: Path,
    published: Any,
    write: Any,
    bert_like: Any,
) -> None:
    write(tmp_path, "RTE/train.tsv", published.RTE)
    write(tmp_path, "RTE/dev.tsv", published.RTE)
    write(tmp_path, "CoLA/train.tsv", published.COLA)
    write(tmp_path, "CoLA/dev.tsv", published.COLA)
    tokenizer = bert_like()
    data = build("rte", tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    rows = [
        [1, *byte_ids("No wet."), 2, *byte_ids("Wet."), 2],
        [1, *byte_ids("A"), 2, *byte_ids("B"), 2],
    ]
    padded = rows[1] + [0] * (len(rows[0]) - len(rows[1]))
    assert batch["input_ids"].tolist() == [rows[0], padded]
    assert batch["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
    assert batch["token_type_ids"].tolist() == [[0] * 9 + [1] * 5, [0] * 3 + [1] * 2 + [0] * 9]
    assert batch["labels"].tolist() == [1, 0]
    assert batch["num_target_tokens"].item() == 2
    assert batch.keys() == {
        *("input_ids", "attention_mask", "token_type_ids", "labels", "num_target_tokens")
    }
    assert (data.protocol.name, data.protocol.template) == ("glue", None)
    single = next(iter(build("cola", tokenizer=tokenizer).train_dataloader()))
    assert single["input_ids"][0].tolist() == [1, *byte_ids("Our friends won't buy it."), 2]
    alone = build("cola")
    row = next(iter(alone.train_dataloader()))["input_ids"][0].tolist()
    assert row == byte_ids("Our friends won't buy it.")
    assert (alone.protocol.name, alone.protocol.template) == ("glue-ours", "{first}")


@pytest.mark.parametrize("adds_bos", [False, True])
def test_pairs_go_into_our_template_without_an_own_form(
    adds_bos: bool,
    build: Any,
    make_tokenizer: Any,
    byte_ids: Any,
    tmp_path: Path,
    published: Any,
    write: Any,
) -> None:
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", published.RTE)
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    if adds_bos:  # as LLaMA's does it
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A", "<s> $A <s> $B", [("<s>", 1)]
        )
    data = build("rte", tokenizer=tokenizer)
    batch = next(iter(data.train_dataloader()))
    text = [*([1] if adds_bos else []), *byte_ids("Premise: No wet.\nHypothesis: Wet.")]
    assert batch["input_ids"][0].tolist() == text
    assert data.protocol.name == "glue-ours"
    assert data.protocol.template == "Premise: {first}\nHypothesis: {second}"


@pytest.mark.filterwarnings("ignore:.*1 of 2 (val|rte) records")
@pytest.mark.parametrize("own", [False, True])
def test_cut_records_are_counted_and_said(
    own: bool,
    build: Any,
    make_tokenizer: Any,
    byte_ids: Any,
    tmp_path: Path,
    write: Any,
    bert_like: Any,
) -> None:
    text = f"index\tsentence1\tsentence2\tlabel\n0\t{'a' * 50}\tbb\tentailment\n1\tA\tB\t0\n"
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", text)
    tokenizer = bert_like() if own else make_tokenizer()
    message = r"^1 of 2 train records were longer than the limit of 30 tokens and were cut at the "
    with pytest.warns(UserWarning, match=message + "end of the longer text; data.max_length"):
        data = build("rte", tokenizer=tokenizer, max_length=30)
    assert data.counts["cut"] == {"train": 1, "val": 1, "rte": 1}
    row = next(iter(data.train_dataloader()))["input_ids"][0].tolist()
    ours = byte_ids(f"Premise: {'a' * 6}\nHypothesis: bb")
    assert row == ([1, *byte_ids("a" * 25), 2, *byte_ids("bb"), 2] if own else ours)


def test_scores_are_floats_and_strata_their_bins(
    build: Any, tmp_path: Path, published: Any, write: Any
) -> None:
    write(tmp_path, "STS-B/train.tsv", published.STSB)
    write(tmp_path, "STS-B/dev.tsv", published.STSB)
    data = build("STS-B")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["labels"].tolist()) == [pytest.approx(3.8), 5.0]
    assert batch["labels"].dtype == torch.float32
    assert sorted(data._training[0].strata().tolist()) == [4, 5]
    assert data.label_names is None


def test_dev_is_validated_and_tested(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Any, write: Any
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_peft.datamodules.glue.module.rank_zero_info", said.append)
    write(tmp_path, "MNLI/train.tsv", published.MNLI)
    write(tmp_path, "MNLI/dev_matched.tsv", published.MNLI)
    other = published.MNLI.replace("\tentailment", "\tneutral")
    write(tmp_path, "MNLI/dev_mismatched.tsv", other)
    data = build("mnli", eval_batch_size=3)
    assert said == [
        "mnli: validated and tested on its dev set (mnli_matched, mnli_mismatched), since GLUE "
        "hides its test sets' labels."
    ]
    val = list(data.val_dataloader())
    assert data.val_sets == ["mnli_matched", "mnli_mismatched"]
    rows = [pair for b in val for pair in zip(b["set"].tolist(), b["labels"].tolist(), strict=True)]
    assert sorted(rows) == [(0, 0), (0, 2), (1, 1), (1, 2)]
    assert data.test_tasks == ["mnli_matched", "mnli_mismatched"]
    matched, mismatched = (next(iter(loader)) for loader in data.test_dataloader())
    assert (matched["task"], mismatched["task"]) == ("mnli_matched", "mnli_mismatched")
    assert sorted(zip(matched["index"], matched["labels"].tolist(), strict=True)) == [
        (0, 0),
        (1, 2),
    ]
    assert data.counts["test"] == {"mnli_matched": 2, "mnli_mismatched": 2}
    assert (data.counts["train"], data.counts["val"]) == (2, 4)
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    assert build("mnli").test_tasks == ["mnli_matched"]
    assert "(mnli_matched; mnli_mismatched is not there)" in said[1]


def test_without_a_train_file_there_is_no_fit(
    build: Any, tmp_path: Path, published: Any, write: Any
) -> None:
    write(tmp_path, "QNLI/dev.tsv", published.QNLI)
    message = (
        f"{tmp_path}/QNLI holds no train.tsv of qnli (nor a .jsonl or .parquet); qnli can be "
        "tested from there, but not trained on."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build("qnli", "fit")
    assert len(list(build("qnli", "validate").val_dataloader())) == 1
    assert build("qnli", "test").counts["test"] == {"qnli": 1}


def test_wrong_arguments_get_one_sentence(build: Any, tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"^data.task 'qnl' is unknown; did you mean 'qnli'\?$"):
        GlueDataModule("QNL", "anywhere")
    with pytest.raises(ValueError, match=r"^data.task 'wnli' is unknown; did you mean '[mq]nli'"):
        GlueDataModule("WNLI", "anywhere")
    with pytest.raises(ValueError, match=r"^data.data_dir '/no/where' is no folder; give the"):
        build("rte", data_dir="/no/where")
    with pytest.raises(ValueError, match=r"holds no dev.tsv of rte"):
        build("rte", "test")
    with pytest.raises(ValueError, match=r"^data.max_length is 0; it has to be 8 or more.$"):
        GlueDataModule("rte", "anywhere", max_length=0)


def test_what_was_encoded_is_read_again(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: Any, write: Any
) -> None:
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", published.RTE)
    first = build("rte")
    monkeypatch.setattr(PairEncoder, "encode", None)
    again = build("rte")
    assert again._training[0].table["tokens"][:] == first._training[0].table["tokens"][:]
    with pytest.raises(TypeError):
        build("rte", max_length=20)


def test_predictions_are_judged_and_scored() -> None:
    rows = [
        {"output": "acceptable", "expected": "acceptable"},
        {"output": "acceptable", "expected": "unacceptable"},
        {"output": "unacceptable", "expected": "unacceptable"},
        {"output": "unacceptable", "expected": "unacceptable"},
    ]
    data = GlueDataModule("cola", "anywhere")
    data.judge("cola", rows)
    assert [row["correct"] for row in rows] == [True, False, True, True]
    scores = data.score("cola", rows)
    assert list(scores) == ["matthews", "accuracy"]
    assert scores["matthews"] == pytest.approx(2 / (2 * 1 * 2 * 3) ** 0.5)
    assert scores["accuracy"] == 0.75
    graded = [{"output": x, "expected": y} for x, y in ((1.0, 0.0), (2.5, 3.0), (2.0, 5.0))]
    sts = GlueDataModule("stsb", "anywhere")
    sts.judge("stsb", graded)
    assert "correct" not in graded[0]
    assert sts.score("stsb", graded)["spearman"] == pytest.approx(0.5, abs=1e-5)


@pytest.mark.filterwarnings("ignore:.*(mended|cut at the end)")
@pytest.mark.parametrize("task", list(TASKS))
def test_real_files_hold_what_their_manifest_counts(
    task: str, build: Any, real: Any, real_counts: dict[str, int]
) -> None:
    listed = {file: n for file, n in real_counts.items() if file.startswith("glue/")}
    folder = TASKS[task].folder
    own = {Path(file).name: n for file, n in listed.items() if Path(file).parent.name == folder}
    data = build(task, data_dir=str(real("glue")))
    train = next((n for file, n in own.items() if file.startswith("train")), 0)
    assert data.counts["train"] == train
    assert sum(data.counts["test"].values()) == sum(own.values()) - train == data.counts["val"]
    if data.label_names is None:
        assert data._training[1]._labels.min() >= 0
    else:
        classes = {label for b in data.val_dataloader() for label in b["labels"].tolist()}
        assert classes == set(range(len(data.label_names)))
