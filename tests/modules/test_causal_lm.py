"""Causal language models under a real Trainer: what validation says, and which data fit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sums import RIGHT, WRONG, losses_by_hand, module, trainer

from lightning_peft import CausalLMModule
from lightning_peft.datamodules.loading.examples import Encoder
from lightning_peft.models.generation import generate
from lightning_peft.models.sharded_loading import LoadsWhole

Ask = Callable[[Sequence[str]], dict[str, Any]]


def test_val_accuracy_is_that_of_greedy_answers(
    make: Any, encoder: Encoder, ask: Ask, tmp_path: Path
) -> None:
    data, tested = make(), module()
    [metrics] = trainer(tmp_path).validate(tested, datamodule=data, verbose=False)
    pairs = RIGHT + WRONG
    answers = generate(
        tested.model.eval(), ask([f"{p}=" for p, _ in pairs]), data.protocol, encoder
    )
    right = [answer == response for answer, (_, response) in zip(answers, pairs, strict=True)]
    assert right == [True] * 4 + [False] * 4
    assert metrics["val_accuracy"] == 0.5

    with torch.no_grad():
        losses = [
            loss for batch in data.val_dataloader() for loss in losses_by_hand(tested.model, batch)
        ]
    assert len(losses) == sum(len(response) + 1 for _, response in pairs)
    assert metrics["val_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


def test_data_with_labels_are_refused(tmp_path: Path) -> None:
    tested = module()
    tested.trainer = trainer(tmp_path)
    tested.trainer.datamodule = SimpleNamespace(label_names=["a", "b"])  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="answers in texts, but SimpleNamespace has labels; take"):
        tested.setup("fit")


def test_a_base_of_its_own_is_loaded_whole() -> None:
    class Own(CausalLMModule):
        def load_base(self) -> Any:
            return super().load_base()

    with pytest.raises(LoadsWhole, match="Own has a load_base of its own"):
        Own("tiny_llama").load_shapes()
    assert all(p.is_meta for p in CausalLMModule("tiny_llama").load_shapes().parameters())


def test_tasks_are_averaged_by_their_first_metric() -> None:
    scores = {"a": {"accuracy": 0.5}, "b": {"f1": 0.25, "rows": 8.0}, "judged elsewhere": {}}
    assert module().named_scores(scores) == {"a": 0.5, "b/f1": 0.25, "b/rows": 8, "average": 0.375}
    assert module().named_scores({"judged elsewhere": {}}) == {}
