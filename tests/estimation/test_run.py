"""Estimates of whole runs against what is measured on small models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import RobertaConfig

from lightning_peft import trainable_parameters
from lightning_peft.estimation import estimate
from lightning_peft.estimation.memory import nbytes
from lightning_peft.modules import CausalLMModule, SequenceClassificationModule
from lightning_peft.strategies import LoRA

ROWS, TOKENS = 4, 24
STRATEGIES = (  # of conftest.py
    "LoRA",
    "DropLoRA",
    "masks by step",
    "PrunedLoRA",
    "LoRADrop",
    "DoRA",
    "PiSSA",
    "MiLoRA",
    "VeRA",
    "TiedLoRA",
    "SparseAdapter",
    "AdaLoRA",
    "GaLore",
    "FullFineTuning",
)


@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_and_bytes_are_those_of_a_real_step(
    name: str, strategy, estimated, real, measured, padded_batch
) -> None:
    module = real(strategy(name))
    model = module.model
    found = estimated(strategy(name))
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.trainable == trainable_parameters(model, include_saved=True)
    assert found.base == nbytes([*frozen, *model.buffers()])
    activations = measured(module, padded_batch)
    # Which components a mask of a step chooses are values, so all are counted.
    bound = 0.1 if name == "masks by step" else 0.01
    assert found.activations == pytest.approx(activations, rel=bound)

    total, count = module.target_loss(padded_batch)
    (total / count + module.adapter.penalty(model)).backward()
    assert found.gradients == nbytes([p.grad for p in trained if p.grad is not None])
    optimizer = module.adapter.make_optimizer(module.model, torch.optim.AdamW)
    module.adapter.before_step(model, optimizer, 0)
    # As if resumed: LoRA-drop's look at data would change what is counted.
    module.adapter.load_state_dict(module.adapter.state_dict())
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer == nbytes(state)


def test_the_end_of_a_run_is_what_its_strategy_leaves(strategy, estimated, real) -> None:
    def end(name: str) -> int | None:
        return estimated(strategy(name)).trainable_end

    assert end("PrunedLoRA") == trainable_parameters(real(LoRA(4)).model)
    assert end("SparseAdapter") == trainable_parameters(real(LoRA(8)).model) // 2
    assert end("LoRADrop") is None


def test_a_classifier_counts_its_head(tmp_path: Path) -> None:
    RobertaConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        architectures=["RobertaForMaskedLM"],
    ).save_pretrained(tmp_path)
    made = SequenceClassificationModule(
        str(tmp_path), adapter=LoRA(4, target_modules=["query", "value"])
    )
    found = estimate(made, ROWS, TOKENS)
    head = 32 * 32 + 32 + 32 * 2 + 2
    assert found.trainable == 4 * 4 * 64 + head


def test_zero_shards_what_its_stage_says(estimated) -> None:
    found = estimated(LoRA(8))
    whole = found.per_device()
    for stage, sharded in enumerate(
        [(), ("optimizer",), ("optimizer", "gradients"), ("optimizer", "gradients", "weights")]
    ):
        sizes = found.per_device(4, stage)
        for kind, size in whole.items():
            assert sizes[kind] == (size / 4 if kind in sharded else size)
    with pytest.raises(ValueError, match="zero_stage must be 0, 1, 2 or 3, got 4"):
        found.per_device(2, 4)


def test_a_model_without_its_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        estimate(CausalLMModule(str(tmp_path)), ROWS, TOKENS)
