"""A test's loss per token, against one text at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.nn import functional as F

from lightning_peft import CausalLMModule
from lightning_peft.datamodules import E2EDataModule
from lightning_peft.modules import likelihood
from lightning_peft.strategies import LoRA

ROWS = [
    ("name[Aromi], food[French]", "Aromi serves French food."),
    ("name[Blue Spice]", "Blue Spice is a pub by the river, and nothing more is known of it."),
    ("name[Aromi], food[French]", "French food is served at Aromi."),
    ("name[Cocum]", "Cocum."),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = ["mr,ref", *(f'"{source}","{text}"' for source, text in ROWS)]
    for name in ("devset.csv", "testset_w_refs.csv"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_test_gives_the_loss_per_token_of_all_references(folder: Path, tmp_path: Path) -> None:
    data = E2EDataModule(
        str(folder),
        train_split="dev",
        val_size=1,
        batch_size=3,
        eval_batch_size=2,
        max_length=512,
        max_new_tokens=2,
    )
    torch.manual_seed(0)
    module = CausalLMModule("tiny_llama", adapter=LoRA(r=2, target_modules=["q_proj"]))
    trainer = Trainer(
        accelerator="cpu",
        max_steps=2,
        default_root_dir=tmp_path / "run",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    (tested,) = trainer.test(module, data, verbose=False)
    encoder, losses, tokens = data.encoder, 0.0, 0
    for source, text in ROWS:
        prompt = data.example(source, "", "e2e", 0).prompt
        begin = encoder.encode([data.example(source, "", "e2e", 0)], False)["tokens"][0]
        answer = [*encoder.texts([text])[0], encoder.eos_id]
        with torch.no_grad():
            logits = module.model(input_ids=torch.tensor([[*begin, *answer]])).logits[0]
        predicted = logits[len(begin) - 1 : -1]
        losses += float(F.cross_entropy(predicted, torch.tensor(answer), reduction="sum"))
        tokens += len(answer)
        assert source in prompt
    assert tested["test/e2e/loss"] == pytest.approx(losses / tokens, rel=1e-5)
    assert tested["test/loss"] == tested["test/e2e/loss"]


def test_a_process_with_fewer_batches_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded model would wait for ever for the one that does not."""
    seen: list[int] = []

    def losses(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(int(batch["input_ids"][0, 0]))
        return torch.tensor([1.5]), torch.tensor([3])

    monkeypatch.setattr(likelihood, "row_losses", losses)
    monkeypatch.setattr(likelihood.distributed, "largest", lambda number: 3)
    batches = [([1], {"input_ids": torch.tensor([[7]])})]
    expected = [{"loss": 0.0, "target_tokens": 0}, {"loss": 1.5, "target_tokens": 3}]
    model = torch.nn.Linear(1, 1)
    for cut in (False, True):  # a model that is whole needs nobody, also where others are done
        seen.clear()
        monkeypatch.setattr(likelihood.distributed, "is_cut", lambda p, cut=cut: cut)
        found = likelihood.reference_losses(model, batches, 2, torch.device("cpu"))
        assert (found, seen) == (expected, [7, 7, 7] if cut else [7])
