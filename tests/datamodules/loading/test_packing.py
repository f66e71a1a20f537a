"""Packing: which records share a row, what stands in it, and that the model sees them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from lightning_peft import CausalLMModule
from lightning_peft.datamodules import ArithmeticDataModule, Example, Protocol, TextDataModule
from lightning_peft.datamodules.loading.batches import training_batch
from lightning_peft.datamodules.loading.packing import PackedDataset, packed_batch, packs_of
from lightning_peft.strategies import LoRA

LIMIT = 48


class Capitals(TextDataModule):
    """Records of different lengths, one of them a conversation."""

    protocols = {
        on: Protocol(on, "{instruction} -> ", on, LIMIT, 8)  # type: ignore[arg-type]
        for on in ("response", "all")
    }

    def __init__(self, protocol: str = "response", **kwargs: Any) -> None:
        super().__init__(None, protocol, **{"val_size": 3, "batch_size": 2, **kwargs})

    def train_examples(self) -> Sequence[Example]:
        found = [self.example("land " * (i % 5) + str(i), f"city {i}", "c", i) for i in range(23)]
        return [Example("b?", "c", "talk", 23, history=(("a?", "b"),)), *found]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        return {"c": [self.example("land", "", "c", 0, "city")]}


def prepared(tokenizer: Any, cache: Path, **kwargs: Any) -> Capitals:
    data = Capitals(tokenizer=tokenizer, cache_dir=str(cache), **kwargs)
    data.setup("fit")
    return data


def records_in(batch: dict[str, torch.Tensor]) -> int:
    return int(((batch["position_ids"] == 0) & batch["attention_mask"].bool()).sum())


def test_every_row_is_in_one_pack_and_no_pack_is_over_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 61, 2000)
    packs = packs_of(lengths, 100)
    assert sorted(np.concatenate(packs).tolist()) == list(range(2000))
    assert max(lengths[rows].sum() for rows in packs) <= 100
    # No more packs than the tokens need, by a hundredth.
    assert len(packs) <= np.ceil(lengths.sum() / 100) * 1.01
    assert [rows.tolist() for rows in packs_of(lengths, 100)] == [rows.tolist() for rows in packs]


def test_a_row_goes_into_the_fullest_pack_that_has_room() -> None:
    packs = packs_of(np.array([7, 6, 3, 2, 1]), 10)
    assert sorted(rows.tolist() for rows in packs) == [[0, 2], [1, 3, 4]]


def test_a_packed_batch_token_for_token() -> None:
    one = [([5, 6, 7], [1, 3]), ([8, 9], [0, 2]), ([4, 3, 2, 1], [1, 2, 3, 4])]
    batch = packed_batch([one, [([6, 5], [1, 2])]], pad_id=99)
    rows = {name: value.tolist() for name, value in batch.items()}
    assert rows == {
        "input_ids": [[5, 6, 7, 8, 9, 4, 3, 2, 1], [6, 5] + [99] * 7],
        "attention_mask": [[1] * 9, [1, 1] + [0] * 7],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1, 2, 3], [0, 1] + [0] * 7],
        # The second record's first token would be predicted from the first record.
        "labels": [[-100, 6, 7, -100, 9, -100, 3, -100, 1], [-100, 5] + [-100] * 7],
    }


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_windows_weigh_packs_by_their_targets(loss_on: str, tokenizer: Any, tmp_path: Path) -> None:
    data = prepared(tokenizer, tmp_path, protocol=loss_on, packing=True)
    seen, targets = 0, 0
    for batch in data.train_dataloader():
        assert batch["input_ids"].shape[0] <= 2
        assert batch["input_ids"].shape[1] <= LIMIT
        count = int((batch["labels"][:, 1:] != -100).sum())
        assert int(batch["num_target_tokens"]) == count
        seen, targets = seen + records_in(batch), targets + count
    plain = prepared(tokenizer, tmp_path, protocol=loss_on)
    batches = list(plain.train_dataloader())
    assert seen == data.counts["train"] == sum(len(b["labels"]) for b in batches)
    assert targets == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    assert len(data.train_dataloader()) < len(batches) / 1.5


def test_a_probe_is_packed_as_training_is_and_validation_is_not(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = prepared(tokenizer, tmp_path, packing=True)
    assert all("position_ids" not in batch for batch in data.val_dataloader())
    records = sum(records_in(b) for b in data.probe_dataloader(0.5))
    plain = prepared(tokenizer, tmp_path).probe_dataloader(0.5)
    assert records == sum(len(batch["labels"]) for batch in plain)


def test_packs_have_the_length_and_the_task_of_their_records(
    tokenizer: Any, tmp_path: Path
) -> None:
    data = prepared(tokenizer, tmp_path)
    whole = data._sets()[0]
    packed = PackedDataset(whole, LIMIT)
    assert packed.lengths().sum() == whole.lengths().sum()  # type: ignore[union-attr]
    assert packed.strata().tolist() == [whole.strata()[rows[0]] for rows in packed.packs]


def test_records_of_one_length_are_not_packed(tokenizer: Any) -> None:
    data = ArithmeticDataModule(tokenizer=tokenizer, packing=True)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"^data.packing is true, but .* set it to false\.$"):
        data.train_dataloader()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_loss_and_gradient_are_those_of_a_padded_batch(attention: str) -> None:
    torch.manual_seed(0)
    module = CausalLMModule(
        "tiny_llama", adapter=LoRA(r=4, init_lora_weights=False), attn_implementation=attention
    )
    module.configure_model()
    rng = np.random.default_rng(0)
    rows = [(rng.integers(3, 200, n).tolist(), [n // 2, n]) for n in (9, 17, 2, 30)]
    found = []
    for batch in (training_batch(rows, 0), packed_batch([rows[:3], rows[3:]])):
        module.zero_grad()
        total, count = module.target_loss(batch)
        total.backward()
        grads = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        found.append((total.detach(), count, grads))
    (total, count, grads), (packed, packed_count, packed_grads) = found
    assert count == packed_count == 5 + 9 + 1 + 15
    torch.testing.assert_close(packed, total, rtol=1e-5, atol=0)
    assert len(grads) == len(packed_grads) > 0
    for a, b in zip(grads, packed_grads, strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()


def test_a_packed_run_trains_and_resumes_alike(tokenizer: Any, tmp_path: Path) -> None:
    def run(name: str, ckpt_path: str | None = None, **limits: Any) -> torch.Tensor:
        torch.manual_seed(0)
        trainer = Trainer(
            default_root_dir=tmp_path / name,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            accumulate_grad_batches=2,
            num_sanity_val_steps=0,
            limit_val_batches=0,
            **limits,
        )
        module = CausalLMModule("tiny_llama", adapter=LoRA(r=2), lr_scheduler_type="constant")
        data = Capitals(tokenizer=None, packing=True, batch_size=1, cache_dir=str(tmp_path))
        trainer.fit(module, data, ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{name}.ckpt")
        return torch.cat([p.detach().flatten() for p in module.parameters() if p.requires_grad])

    whole = run("whole", max_steps=5)
    run("part", max_steps=3)
    assert torch.equal(run("rest", str(tmp_path / "part.ckpt"), max_steps=5), whole)
