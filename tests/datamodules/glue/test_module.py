from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import scipy.stats
import torch
from tokenizers import processors

from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.datamodules.glue.records import TASKS, GlueFiles
from lightning_peft.datamodules.loading.pairs import Labelled, PairEncoder, longest_first
from lightning_peft.datamodules.metrics.labels import make_metrics

REAL = Path(__file__).parents[3].parent / "shared" / "data" / "glue"
DEV = ("dev", "validation")

# As published: byte-order mark, header or none, quotation marks, odd line ends.
COLA = "gj04\t1\t\tOur friends won't buy it.\ngj04\t0\t*\tThey drank the \"pub.\n"
SST2 = "sentence\tlabel\nhide new secretions \t0\nlovely \u2028 film \t1\n"
MRPC = (
    "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n"
    '1\t10\t11\tHe said " yes .\t" Yes , " he said .\r\n'
    "0\t12\t13\tA 'b\tC\r\n"
)
STSB = (
    "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    "0\tmain-captions\tMSRvid\t2012test\t0001\tnone\tnone\tA plane.\tAn air plane.\t5.000\n"
    "1\tmain-captions\tMSRvid\t2012test\t0004\tnone\tnone\tA flute.\tA large flute.\t3.8\n"
)
QQP_HEADER = "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
QQP = (
    "133273\t213221\t213222\tHow is it?\tWhich level for the exam jlpt5? 0\n"
    "360472\t364011\t490273\tWhat now?\tWhat then?\t1\n"
    "7\t8\t9\tThis question\n"
    "goes on here?\tDoes it?\t0\n"
)
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
    "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label\n"
    "0\t1\t1n\tfiction\t( a )\t( b )\t(A)\t(B)\tIt rains.\tIt is wet.\tneutral\tentailment\n"
    "1\t1\t1c\tfiction\t( a )\t( b )\t(A)\t(B)\tIt rains.\tIt is dry.\tneutral\tcontradiction\n"
)
RTE = "index\tsentence1\tsentence2\tlabel\n0\tNo wet.\tWet.\tnot_entailment\n1\tA\tB\tentailment\n"
QNLI = "index\tquestion\tsentence\tlabel\n0\tWho?\tShe did.\tentailment\n"


def write(root: Path, path: str, text: str) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text.encode())
    return file


@pytest.fixture
def build(tokenizer: Any, tmp_path: Path) -> Any:
    def build_module(task: str, stage: str | None = None, **kwargs: Any) -> GlueDataModule:
        options = {"tokenizer": tokenizer, "batch_size": 2, "max_length": 400} | kwargs
        options.setdefault("data_dir", str(tmp_path))
        data = GlueDataModule(task, cache_dir=str(tmp_path / "cache"), **options)
        data.setup(stage)
        return data

    return build_module


def bert_like(make_tokenizer: Any, **special: Any) -> Any:
    """``<s> A </s> B </s>`` with types 0 and 1."""
    made = make_tokenizer(sep_token="</s>", cls_token="<s>", **special)
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 1), ("</s>", 2)]
    )
    made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    return made


@pytest.mark.parametrize(
    ("task", "path", "text", "expected"),
    [
        (
            "cola",
            "CoLA/train.tsv",
            COLA,
            [("Our friends won't buy it.", None, 1), ('They drank the "pub.', None, 0)],
        ),
        (
            "sst2",
            "SST-2/train.tsv",
            SST2,
            [("hide new secretions ", None, 0), ("lovely \u2028 film ", None, 1)],
        ),
        (
            "mrpc",
            "MRPC/train.tsv",
            MRPC,
            [('He said " yes .', '" Yes , " he said .', 1), ("A 'b", "C", 0)],
        ),
        (
            "stsb",
            "STS-B/train.tsv",
            STSB,
            [("A plane.", "An air plane.", 5.0), ("A flute.", "A large flute.", 3.8)],
        ),
        (
            "qqp",
            "QQP/train.tsv",
            QQP,
            [("How is it?", "Which level for the exam jlpt5?", 0), ("What now?", "What then?", 1)],
        ),
        (
            "qqp",
            "QQP/train.tsv",
            QQP_HEADER + QQP,
            [("How is it?", "Which level for the exam jlpt5?", 0), ("What now?", "What then?", 1)],
        ),
        (
            "mnli",
            "MNLI/train.tsv",
            MNLI,
            [("It rains.", "It is wet.", 0), ("It rains.", "It is dry.", 2)],
        ),
        (
            "mnli",
            "MNLI/train.jsonl",
            '{"premise": "It rains.", "hypothesis": "It pours.\\n", "label": "neutral"}\n',
            [("It rains.", "It pours.\n", 1)],
        ),
        ("rte", "RTE/train.tsv", RTE, [("No wet.", "Wet.", 1), ("A", "B", 0)]),
        ("qnli", "QNLI/train.tsv", QNLI, [("Who?", "She did.", 0)]),
        ("qnli", "train.tsv", QNLI, [("Who?", "She did.", 0)]),
        ("sst2", "sst2/train.tsv", SST2.split("\n")[0] + "\na\t1", [("a", None, 1)]),
    ],
)
def test_files_are_read_as_they_are(
    task: str, path: str, text: str, expected: list[Any], tmp_path: Path
) -> None:
    write(tmp_path, path, text)
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


def test_single_texts_and_pairs_have_the_tokenizers_own_form(
    build: Any, make_tokenizer: Any, byte_ids: Any, tmp_path: Path
) -> None:
    write(tmp_path, "RTE/train.tsv", RTE)
    write(tmp_path, "RTE/dev.tsv", RTE)
    write(tmp_path, "CoLA/train.tsv", COLA)
    write(tmp_path, "CoLA/dev.tsv", COLA)
    tokenizer = bert_like(make_tokenizer)
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
    adds_bos: bool, build: Any, make_tokenizer: Any, byte_ids: Any, tmp_path: Path
) -> None:
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", RTE)
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


@pytest.mark.parametrize(
    ("lengths", "room", "kept"),
    [
        ((9, 2), 20, (9, 2)),
        ((9, 2), 8, (6, 2)),
        ((2, 9), 8, (2, 6)),
        ((9, 5), 8, (4, 4)),
        ((9, 9), 7, (4, 3)),
        ((0, 9), 3, (0, 3)),
    ],
)
def test_the_longer_text_is_cut_first(
    lengths: tuple[int, int], room: int, kept: tuple[int, int]
) -> None:
    assert longest_first(*lengths, room) == kept


@pytest.mark.filterwarnings("ignore:.*1 of 2 (val|rte) records")
@pytest.mark.parametrize("own", [False, True])
def test_cut_records_are_counted_and_said(
    own: bool, build: Any, make_tokenizer: Any, byte_ids: Any, tmp_path: Path
) -> None:
    text = f"index\tsentence1\tsentence2\tlabel\n0\t{'a' * 50}\tbb\tentailment\n1\tA\tB\t0\n"
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", text)
    tokenizer = bert_like(make_tokenizer) if own else make_tokenizer()
    message = r"^1 of 2 train records were longer than the limit of 30 tokens and were cut at the "
    with pytest.warns(UserWarning, match=message + "end of the longer text; data.max_length"):
        data = build("rte", tokenizer=tokenizer, max_length=30)
    assert data.counts["cut"] == {"train": 1, "val": 1, "rte": 1}
    row = next(iter(data.train_dataloader()))["input_ids"][0].tolist()
    ours = byte_ids(f"Premise: {'a' * 6}\nHypothesis: bb")
    assert row == ([1, *byte_ids("a" * 25), 2, *byte_ids("bb"), 2] if own else ours)


def test_scores_are_floats_and_strata_their_bins(build: Any, tmp_path: Path) -> None:
    write(tmp_path, "STS-B/train.tsv", STSB)
    write(tmp_path, "STS-B/dev.tsv", STSB)
    data = build("STS-B")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["labels"].tolist()) == [pytest.approx(3.8), 5.0]
    assert batch["labels"].dtype == torch.float32
    assert sorted(data._training[0].strata().tolist()) == [4, 5]
    assert data.label_names is None


def test_dev_is_validated_and_tested(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_peft.datamodules.glue.module.rank_zero_info", said.append)
    write(tmp_path, "MNLI/train.tsv", MNLI)
    write(tmp_path, "MNLI/dev_matched.tsv", MNLI)
    other = MNLI.replace("\tentailment", "\tneutral")
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


def test_without_a_train_file_there_is_no_fit(build: Any, tmp_path: Path) -> None:
    write(tmp_path, "QNLI/dev.tsv", QNLI)
    message = (
        f"{tmp_path}/QNLI holds no train.tsv of qnli (nor a .jsonl or .parquet); qnli can be "
        "tested from there, but not trained on."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        build("qnli", "fit")
    assert len(list(build("qnli", "validate").val_dataloader())) == 1
    assert build("qnli", "test").counts["test"] == {"qnli": 1}


def test_broken_rows_of_qqp_are_said(build: Any, tmp_path: Path) -> None:
    write(tmp_path, "QQP/sample.tsv", QQP)
    with pytest.warns(UserWarning, match=r"^qqp \(dev\): 1 rows lacked the tab .* mended, 2 were"):
        assert build("qqp", "test").counts["test"] == {"qqp": 2}


@pytest.mark.parametrize(
    ("task", "text", "message"),
    [
        ("rte", RTE + "2\tA\tB\tmaybe\n", "line 4: the label 'maybe' is none of 0 (entailment), "),
        ("sst2", SST2 + "a\t2\n", "line 4: the label '2' is none of 0 (negative), 1 (positive)."),
        ("sst2", SST2 + "a\t-1\n", "1 (positive); GLUE hides those of its test sets."),
        ("stsb", STSB.replace("3.8", "5.2"), "line 3: the score '5.2' is no number from 0 to 5."),
        ("stsb", STSB.replace("3.8", "x"), "line 3: the score 'x' is no number from 0 to 5."),
        ("stsb", STSB.replace("3.8", "nan"), "line 3: the score 'nan' is no number from 0 to 5."),
        ("mrpc", MRPC + "1\ta\tb\tc\n", "line 4: 4 columns, where 5 are wanted."),
        ("cola", COLA + "gj04\t1\tsentence\n", "line 3: 3 columns, where 4 are wanted."),
        ("cola", COLA + "gj04\t1\t\t\n", "line 3: the sentence is empty."),
        (
            "rte",
            RTE.replace("sentence2", "other"),
            "line 1: the header has no column 'sentence2', only index, sentence1, other, label.",
        ),
        ("rte", "index\tsentence1\tsentence2\tlabel\n", " holds no record."),
        ("cola", "", " holds no record."),
    ],
)
def test_what_is_wrong_is_named_with_its_line(
    task: str, text: str, message: str, build: Any, tmp_path: Path
) -> None:
    path = write(tmp_path, f"{TASKS[task].folder}/train.tsv", text)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*{re.escape(message)}"):
        build(task, "fit")


def test_a_field_that_is_missing_is_named(build: Any, tmp_path: Path) -> None:
    path = write(tmp_path, "MNLI/train.jsonl", '{"premise": "a", "label": "neutral"}\n')
    with pytest.raises(ValueError, match=rf"^Record 1 of {path} has no 'hypothesis', only premise"):
        build("mnli", "fit")
    write(tmp_path, "MNLI/train.jsonl", '{"premise": "a", "hypothesis": "b", "label": "-"}\n')
    with pytest.raises(ValueError, match=rf"^record 1 of {path}: the label '-' is none of"):
        build("mnli", "fit")


@pytest.mark.parametrize(
    ("spelling", "task"),
    [("SST-2", "sst2"), ("sst_2", "sst2"), ("STS-B", "stsb"), ("CoLA", "cola"), ("MNLI", "mnli")],
)
def test_usual_spellings_are_known(spelling: str, task: str) -> None:
    assert GlueDataModule(spelling, "anywhere").task == task


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


def test_no_token_to_pad_with_is_said(make_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="has neither a pad nor an EOS token"):
        PairEncoder(make_tokenizer(pad_token=None, eos_token=None), 20)


def test_what_was_encoded_is_read_again(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "dev"):
        write(tmp_path, f"RTE/{split}.tsv", RTE)
    first = build("rte")
    monkeypatch.setattr(PairEncoder, "encode", None)
    again = build("rte")
    assert again._training[0].table["tokens"][:] == first._training[0].table["tokens"][:]
    with pytest.raises(TypeError):
        build("rte", max_length=20)


def test_metrics_are_those_of_an_independent_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randint(2, (200,), generator=generator)
    labels = torch.where(torch.rand(200, generator=generator) < 0.7, predicted, 1 - predicted)
    tp, tn = ((predicted == labels) & (labels == c) for c in (1, 0))
    tp, tn = int(tp.sum()), int(tn.sum())
    fp, fn = int((predicted > labels).sum()), int((predicted < labels).sum())
    metrics = make_metrics(("accuracy", "f1", "matthews"), 2)
    metrics.update(predicted, labels)
    found = metrics.compute()
    assert found["accuracy"] == pytest.approx((tp + tn) / 200)
    assert found["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    # Matthews' coefficient is Pearson's of the two columns of zeros and ones.
    pearson = scipy.stats.pearsonr(predicted.numpy(), labels.numpy()).statistic
    assert found["matthews"] == pytest.approx(pearson, abs=1e-6)
    scores = torch.rand(50, generator=generator).mul(8).round() / 2  # with ties
    outputs = scores + torch.randn(50, generator=generator)
    metrics = make_metrics(("spearman", "pearson"), 0)
    metrics.update(outputs, scores)
    found = metrics.compute()
    a, b = outputs.numpy(), scores.numpy()
    assert found["spearman"] == pytest.approx(scipy.stats.spearmanr(a, b).statistic, abs=1e-5)
    assert found["pearson"] == pytest.approx(scipy.stats.pearsonr(a, b).statistic, abs=1e-5)


@pytest.mark.parametrize("constant", [0, 1])
def test_matthews_of_one_class_is_zero(constant: int) -> None:
    metrics = make_metrics(("matthews",), 2)
    metrics.update(torch.full((5,), constant), torch.tensor([0, 1, 1, 0, 0]))
    assert metrics.compute()["matthews"] == 0


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


@pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data/glue")
@pytest.mark.filterwarnings("ignore:.*(mended|cut at the end)")
@pytest.mark.parametrize("task", list(TASKS))
def test_real_files_hold_what_their_manifest_counts(task: str, build: Any) -> None:
    manifest = json.loads((REAL.parent / "MANIFEST.json").read_text())
    listed = {f["file"]: f["records"] for f in manifest if f["file"].startswith("glue/")}
    folder = TASKS[task].folder
    own = {Path(file).name: n for file, n in listed.items() if Path(file).parent.name == folder}
    data = build(task, data_dir=str(REAL))
    train = next((n for file, n in own.items() if file.startswith("train")), 0)
    assert data.counts["train"] == train
    assert sum(data.counts["test"].values()) == sum(own.values()) - train == data.counts["val"]
    if data.label_names is None:
        assert data._training[1]._labels.min() >= 0
    else:
        classes = {label for b in data.val_dataloader() for label in b["labels"].tolist()}
        assert classes == set(range(len(data.label_names)))
