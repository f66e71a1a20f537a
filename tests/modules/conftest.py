"""Makes the helper `sums` importable, and what several tests of modules build."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from lightning_peft.assets import TINY_LLAMA

sys.path.insert(0, str(Path(__file__).parent))

from sums import Sums  # noqa: E402

SHAPE: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {**SHAPE, "num_hidden_layers": 3, "max_position_embeddings": 130}
WORDS = ("good", "bad", "fine", "poor", "great", "dull", "warm", "cold", "kind", "rude")


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Sums]:
    """Makes the data module, or one of a class made of it."""

    def make_data(kind: type[Sums] = Sums, **kwargs: Any) -> Sums:
        return kind(cache_dir=str(tmp_path / "cache"), **kwargs)

    return make_data


def write_data(root: Path) -> Path:
    """Small tasks whose labels follow from their words."""
    rows = [(f"{WORDS[i % 10]} {WORDS[i * 7 % 10]}", WORDS[i * 3 % 10], i % 2) for i in range(24)]
    names = ("entailment", "not_entailment")
    third = ("entailment", "neutral", "contradiction")
    texts = {
        "SST-2": ["sentence\tlabel", *(f"{a}\t{label}" for a, _, label in rows)],
        "CoLA": [f"x\t{label}\t\t{a}" for a, _, label in rows],
        "RTE": [
            "index\tsentence1\tsentence2\tlabel",
            *(f"{i}\t{a}\t{b}\t{names[label]}" for i, (a, b, label) in enumerate(rows)),
        ],
        "STS-B": [
            "index\tsentence1\tsentence2\tscore",
            *(f"{i}\t{a}\t{b}\t{i % 6 * 0.9:.3f}" for i, (a, b, _) in enumerate(rows)),
        ],
        "MNLI": [
            "index\tsentence1\tsentence2\tgold_label",
            *(f"{i}\t{a}\t{b}\t{third[i % 3]}" for i, (a, b, _) in enumerate(rows)),
        ],
    }
    for task, lines in texts.items():
        (root / task).mkdir(parents=True)
        for split in ("train", *(("dev_matched", "dev_mismatched") if task == "MNLI" else ["dev"])):
            kept = lines[:-5] if split == "dev_mismatched" else lines
            (root / task / f"{split}.tsv").write_text("\n".join(kept) + "\n")
    return root


@pytest.fixture
def encoder_shape() -> dict[str, Any]:
    """The configuration of a small encoder."""
    return dict(ENCODER)


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random RoBERTa and a random LLaMA without pad token, as they are published: headless."""
    root, tokenizer = tmp_path_factory.mktemp("bases"), AutoTokenizer.from_pretrained(TINY_LLAMA)
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(**{**SHAPE, "pad_token_id": None}, num_hidden_layers=2, num_key_value_heads=1)
    ).save_pretrained(root / "llama")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(root / "llama")
    RobertaForMaskedLM(RobertaConfig(**ENCODER, type_vocab_size=1)).save_pretrained(
        root / "roberta"
    )
    tokenizer.pad_token = "<pad>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", "<s> $A </s> </s> $B </s>", [("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save_pretrained(root / "roberta")
    return {kind: root / kind for kind in ("llama", "roberta")}
