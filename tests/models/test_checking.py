"""A model that cannot be loaded, or does not fit its data, is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from transformers import BartConfig, T5Config, T5ForConditionalGeneration

from lightning_peft.errors import UserError
from lightning_peft.models.checking import (
    BaseSource,
    check_causal,
    check_dtype,
    check_model,
    check_vocabulary,
    first_sentence,
)
from lightning_peft.models.loading import load_causal_lm
from lightning_peft.models.sharded_loading import stored_causal_lm
from lightning_peft.testing import tiny_llama


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"name": "./no/such/folder"}, "the folder ./no/such/folder does not exist"),
        ({"dtype": "float8"}, "model.dtype must be one of auto, float32, bfloat16, float16, got"),
        ({"quantization": "nf3"}, "model.quantization must be null or one of nf4, int8, got 'nf3'"),
    ],
)
def test_what_cannot_be_loaded_is_refused_before(
    change: dict[str, Any], sentence: str, folder: Path
) -> None:
    check_model(BaseSource(str(folder)))
    with pytest.raises(ValueError, match=sentence):
        check_model(BaseSource(**{"name": str(folder), **change}))


def test_a_folder_without_a_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json, so it is no model"):
        check_model(BaseSource(str(tmp_path)))


def test_dtypes_have_names() -> None:
    check_dtype("auto")
    with pytest.raises(ValueError, match="got 'half'"):
        check_dtype("half")


def test_the_first_sentence_stands_on_one_line() -> None:
    assert first_sentence(OSError("No\n  such file. Try another.")) == "No such file"


@pytest.mark.parametrize("load", [load_causal_lm, stored_causal_lm])
def test_an_encoder_decoder_is_refused_by_its_type(load: Any, tmp_path: Path) -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError) as error:
        load(BaseSource(str(tmp_path)))
    assert str(error.value) == (
        "model.model_name_or_path: transformers has no causal language model of the type t5 of "
        f"{tmp_path}; it reads with an encoder, and models that do so are not trained here."
    )


def test_the_decoder_of_an_encoder_decoder_is_a_causal_model(tmp_path: Path) -> None:
    BartConfig(is_decoder=True, is_encoder_decoder=False).save_pretrained(tmp_path)
    check_causal(str(tmp_path))


def test_a_tokenizer_longer_than_the_embedding_is_refused() -> None:
    model = tiny_llama()
    rows = model.config.vocab_size
    check_vocabulary(model, rows)
    with pytest.raises(UserError) as error:
        check_vocabulary(model, rows + 1)
    assert str(error.value) == (
        f"data.tokenizer knows {rows + 1:,} tokens, and the model's embedding has {rows:,} rows, "
        "so the last ones could not be read; give the tokenizer of this model, or a model that was "
        "saved after resize_token_embeddings."
    )
    check_vocabulary(nn.Linear(2, 2), rows + 1)  # of somebody who loads a model of their own
    model.resize_token_embeddings(rows + 1)
    check_vocabulary(model, rows + 1)
