"""GLUE's rows go through the real command line, with the papers' numbers of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from lightning_peft import trainable_parameters
from lightning_peft.commands import train
from lightning_peft.modules import classification

METHODS = {
    "lora": "LoRA",
    "droplora": "DropLoRA",
    "prunedlora": "PrunedLoRA",
    "loradrop": "LoRADrop",
}
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
}
BASE = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
LARGE = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
# The hub's name, its shape, and the adapters' parameters at r = 8 that the LoRA-drop paper prints.
SIZES: dict[str, tuple[str, Any, Any, int]] = {
    "roberta_base": (
        "FacebookAI/roberta-base",
        RobertaForSequenceClassification,
        RobertaConfig(**BASE, num_attention_heads=12),
        294_912,
    ),
    "roberta_large": (
        "FacebookAI/roberta-large",
        RobertaForSequenceClassification,
        RobertaConfig(**LARGE, num_attention_heads=16),
        786_432,
    ),
    "llama2_7b": (
        "meta-llama/Llama-2-7b-hf",
        LlamaForSequenceClassification,
        LlamaConfig(**LLAMA),
        4_194_304,
    ),
}
Cli = Callable[[list[str]], train.PeftCLI]
Words = Callable[..., list[str]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_the_papers_parameters(
    size: str, method: str, cli: Cli, row: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind, shape, count = SIZES[size]
    made = cli([*row("glue", size, method), "--data.task", "rte"])
    module: Any = made.model
    assert type(module.adapter).__name__ == METHODS[method]
    assert module.model_name_or_path == name
    assert made.datamodule.batch_size * made.trainer.accumulate_grad_batches == 32
    assert (made.datamodule.task, made.datamodule.max_length) == ("rte", 512)
    monitored = [getattr(c, "monitor", None) for c in made.trainer.callbacks]
    # Stops and keeps by the score, and keeps by the step as every run does.
    assert [m for m in monitored if m] == ["val_score", "val_score", "step"]

    def on_meta(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        with torch.device("meta"):
            return kind(shape).train(), [
                "score" if kind is LlamaForSequenceClassification else "classifier"
            ]

    monkeypatch.setattr(classification, "load_classifier", on_meta)
    module.configure_model()
    # PrunedLoRA begins at twice the rank; LoRA-drop shares layers only after its probe.
    assert trainable_parameters(module.model) == count * (2 if method == "prunedlora" else 1)
    head = trainable_parameters(module.model, include_saved=True) - trainable_parameters(
        module.model
    )
    hidden = shape.hidden_size
    encoder = hidden * hidden + hidden + 2 * hidden + 2
    assert head == (2 * hidden if kind is LlamaForSequenceClassification else encoder)


def test_the_tiny_row_builds(cli: Cli, command_of: Words) -> None:
    module: Any = cli(command_of("configs/families/glue/tiny.yaml")).model
    module.configure_model()
    assert type(module.adapter).__name__ == "LoRADrop"
    assert module.adapter.modules_to_save == ["score"]
