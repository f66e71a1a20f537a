"""Tokenizers, small records and real ones for the tests of data modules."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lightning_peft.datamodules import Example, Protocol, TextDataModule

REAL = Path(__file__).parents[2].parent / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "</s>"]


def _alphabet() -> list[str]:
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = (chr(256 + i) for i in range(256))
    return [chr(byte) if byte in visible else next(hidden) for byte in range(256)]


def build_tokenizer(
    merges: tuple[tuple[str, str], ...] = (), adds_bos: bool = False, **special: Any
) -> PreTrainedTokenizerFast:
    """Three special tokens, then the 256 bytes in order, then merges."""
    tokens = [*SPECIALS, *_alphabet(), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIALS])
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def ids(text: str) -> list[int]:
    """What the byte-level tokenizer makes of a text."""
    return [3 + byte for byte in text.encode()]


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def byte_ids() -> Callable[[str], list[int]]:
    return ids


@pytest.fixture
def build_data(tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    """Makes a data module of a class and sets it up: ``build_data(GlueDataModule, "rte")``.

    ``stage`` is Lightning's, or ``"none"`` for no setup; a folder may be a path.
    """

    def build(kind: type, *args: Any, stage: str | None = None, **options: Any) -> Any:
        args = tuple(str(arg) if isinstance(arg, Path) else arg for arg in args)
        cache = str(tmp_path / "cache")
        data = kind(*args, **{"tokenizer": tokenizer, "cache_dir": cache, **options})
        if stage != "none":
            data.setup(stage)
        return data

    return build


@pytest.fixture(scope="session")
def write_records() -> Callable[..., Path]:
    """Writes records as lines, or as an array, by the file's name; makes its folder."""

    def write(path: Path, records: Sequence[Any]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.suffix == ".jsonl"
        text = "".join(json.dumps(r) + "\n" for r in records) if lines else json.dumps(records)
        path.write_text(text)
        return path

    return write


@pytest.fixture(scope="session")
def real() -> Callable[[str], Path]:
    """Finds a file or folder of the real records, or skips: ``real("math/gsm8k/test.jsonl")``."""

    def find(path: str) -> Path:
        if not (REAL / path).exists():
            pytest.skip(f"no ../shared/data/{path}")
        return REAL / path

    return find


@pytest.fixture
def real_counts(real: Callable[[str], Path]) -> dict[str, int]:
    """How many records each file of the real ones holds, by their manifest."""
    entries = json.loads(real("MANIFEST.json").read_text(encoding="utf-8"))
    return {entry["file"]: entry["records"] for entry in entries}


class Capitals(TextDataModule):
    """A task of its own, as a user would write one."""

    protocols = {"ours": Protocol("ours", "{instruction} -> ", "response", 64, 8)}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_dir=None, protocol="ours", **kwargs)

    def train_examples(self) -> Sequence[Example]:
        return [self.example(f"{'land' * (i % 5)} {i}", f"city {i}", "c", i) for i in range(23)]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        return {"c": [self.example(f"land {i}", "", "c", i, f"city {i}") for i in range(5)]}

    def extract(self, output: str, task: str) -> str | None:
        return output.strip() or None


@pytest.fixture(scope="session")
def capitals() -> type[TextDataModule]:
    """A task of 23 records to train on and five to test."""
    return Capitals


@pytest.fixture
def make_capitals(tokenizer: Any, tmp_path: Path) -> Callable[..., TextDataModule]:
    """Makes it in batches of three, before ``setup``."""

    def make(**kwargs: Any) -> TextDataModule:
        cache = str(tmp_path / "cache")
        options = {"tokenizer": tokenizer, "batch_size": 3, "val_size": 2, "cache_dir": cache}
        return Capitals(**{**options, **kwargs})

    return make


@pytest.fixture
def chatml(make_tokenizer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with ChatML's template."""
    tokenizer = make_tokenizer()
    tokens = [AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})
    tokenizer.chat_template = CHATML
    return tokenizer


Row = tuple[list[int], list[int]]


@pytest.fixture(scope="session")
def only_row() -> Callable[[Any], Row]:
    """Takes the ids and labels of the only training record."""

    def take(data: Any) -> Row:
        batch = next(iter(data.train_dataloader()))
        assert batch["input_ids"].shape[0] == 1
        assert batch["num_target_tokens"].item() == (batch["labels"][:, 1:] >= 0).sum()
        return batch["input_ids"][0].tolist(), batch["labels"][0].tolist()

    return take


@pytest.fixture(scope="session")
def joined_row() -> Callable[[list[tuple[list[int], bool]]], Row]:
    """Joins ids that do and do not carry loss."""

    def join(pieces: list[tuple[list[int], bool]]) -> Row:
        ids = [token for piece, _ in pieces for token in piece]
        return ids, [token if loss else -100 for piece, loss in pieces for token in piece]

    return join


LABELS = {
    "boolq": ["true", "false"],
    "piqa": ["solution1", "solution2"],
    "social_i_qa": ["answer1", "answer2", "answer3"],
    "hellaswag": ["ending1", "ending2", "ending3", "ending4"],
    "winogrande": ["option1", "option2"],
    "ARC-Easy": ["answer1", "answer2", "answer3", "answer4", "answer5"],
    "ARC-Challenge": ["answer1", "answer2", "answer3", "answer4"],
    "openbookqa": ["answer1", "answer2", "answer3", "answer4"],
}
TRAINED = ("boolq", "ARC-Easy", "ARC-Challenge", "openbookqa")


def record(task: str, index: int) -> dict[str, str]:
    """A record in the LLM-Adapters layout, of a length that differs from its neighbours'."""
    labels = LABELS[task]
    answer = labels[index % len(labels)]
    return {
        "instruction": f"{task} {index}: {'why ' * (index * 7 % 11)}?\n\nAnswer format: "
        + "/".join(labels),
        "input": "",
        "output": f"the correct answer is {answer}",
        "answer": answer,
    }


@pytest.fixture
def commonsense_dir(tmp_path: Path) -> Path:
    """Eight tasks of ten test records, four of them with twenty training records."""
    for task in LABELS:
        folder = tmp_path / "commonsense" / task
        folder.mkdir(parents=True)
        (folder / "test.json").write_text(json.dumps([record(task, i) for i in range(10)]))
        if task in TRAINED:
            (folder / "train.json").write_text(json.dumps([record(task, i) for i in range(20)]))
    return tmp_path / "commonsense"
