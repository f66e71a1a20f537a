"""GLUE's files as they are published, a few records of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import processors

from lightning_peft.datamodules.glue.module import GlueDataModule

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


@pytest.fixture(scope="session")
def published() -> SimpleNamespace:
    """The text of each task's file: ``published.RTE``."""
    return SimpleNamespace(
        QQP_HEADER=QQP_HEADER,
        COLA=COLA,
        SST2=SST2,
        MRPC=MRPC,
        STSB=STSB,
        QQP=QQP,
        MNLI=MNLI,
        RTE=RTE,
        QNLI=QNLI,
    )


@pytest.fixture(scope="session")
def write() -> Callable[[Path, str, str], Path]:
    """Writes a file under a folder: ``write(tmp_path, "RTE/train.tsv", text)``."""

    def write_file(root: Path, path: str, text: str) -> Path:
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode())
        return file

    return write_file


@pytest.fixture
def build(build_data: Any, tmp_path: Path) -> Callable[..., GlueDataModule]:
    def make(task: str, stage: str | None = None, **kwargs: Any) -> GlueDataModule:
        options = {"batch_size": 2, "max_length": 400, "data_dir": str(tmp_path)} | kwargs
        return build_data(GlueDataModule, task, stage=stage, **options)

    return make


@pytest.fixture
def bert_like(make_tokenizer: Any) -> Callable[..., Any]:
    """Makes a tokenizer of ``<s> A </s> B </s>`` with types 0 and 1."""

    def make(**special: Any) -> Any:
        made = make_tokenizer(sep_token="</s>", cls_token="<s>", **special)
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", "<s> $A </s> $B:1 </s>:1", [("<s>", 1), ("</s>", 2)]
        )
        made.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
        return made

    return make
