"""Estimates against what is measured on small models."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, RobertaConfig

from lightning_peft import trainable_parameters
from lightning_peft.adapters import save_peft
from lightning_peft.cli import main
from lightning_peft.commands import estimate as command
from lightning_peft.estimation import estimate, nbytes, saved_bytes
from lightning_peft.modules import CausalLMModule, SequenceClassificationModule
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DoRA,
    DropLoRA,
    FullFineTuning,
    GaLore,
    LoRA,
    LoRADrop,
    MiLoRA,
    PiSSA,
    PrunedLoRA,
    SparseAdapter,
    TiedLoRA,
    VeRA,
)

ROWS, TOKENS = 4, 24
STRATEGIES: dict[str, Callable[[], AdapterStrategy]] = {
    "LoRA": lambda: LoRA(8, target_modules=["q_proj", "down_proj"]),
    "DropLoRA": lambda: DropLoRA(8, 0.3),
    "masks by step": lambda: DropLoRA(8, 0.3, mask="step"),
    "PrunedLoRA": lambda: PrunedLoRA(16, target_r=4, start_step=5),
    "LoRADrop": lambda: LoRADrop(8),
    "DoRA": lambda: DoRA(8, lora_dropout=0.1),
    "PiSSA": lambda: PiSSA(8),
    "MiLoRA": lambda: MiLoRA(8),
    "VeRA": lambda: VeRA(32),
    "TiedLoRA": lambda: TiedLoRA(8),
    "SparseAdapter": lambda: SparseAdapter(8),
    "AdaLoRA": lambda: AdaLoRA(12, 8, total_step=100),
    "GaLore": lambda: GaLore(8),
    "FullFineTuning": FullFineTuning,
}


def padded_batch(tokens: int = TOKENS) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 250, (ROWS, tokens))
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def real(make: Callable[[], AdapterStrategy], **arguments: Any) -> CausalLMModule:
    """The module with its model, loaded and adapted."""
    module = CausalLMModule("tiny_llama", adapter=make(), **arguments)
    module.model = module.load_base()
    module.adapter.attach(module.model)
    return module


def measured_activations(module: Any, batch: dict[str, torch.Tensor]) -> int:
    with saved_bytes(module.model) as saved:
        module.target_loss(batch)
        return sum(saved.values())


@pytest.mark.parametrize("name", STRATEGIES)
def test_counts_and_bytes_are_those_of_a_real_step(name: str) -> None:
    module = real(STRATEGIES[name])
    model = module.model
    found = estimate(CausalLMModule("tiny_llama", adapter=STRATEGIES[name]()), ROWS, TOKENS)
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert found.total == sum(p.numel() for p in model.parameters())
    assert found.trainable == trainable_parameters(model, include_saved=True)
    assert found.base == nbytes([*frozen, *model.buffers()])
    batch = padded_batch()
    activations = measured_activations(module, batch)
    # Which components a mask of a step chooses are values, so all are counted.
    bound = 0.1 if name == "masks by step" else 0.01
    assert found.activations == pytest.approx(activations, rel=bound)

    total, count = module.target_loss(batch)
    (total / count + module.adapter.penalty(model)).backward()
    assert found.gradients == nbytes([p.grad for p in trained if p.grad is not None])
    optimizer = module.adapter.make_optimizer(module.model, torch.optim.AdamW)
    module.adapter.before_step(model, optimizer, 0)
    optimizer.step()
    state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    assert found.optimizer == nbytes(state)


def test_a_fused_optimizer_has_the_same_state() -> None:
    fused, plain = (
        CausalLMModule(
            "tiny_llama", adapter=LoRA(8), optimizer=partial(torch.optim.AdamW, fused=fused)
        )
        for fused in (True, False)
    )
    assert estimate(fused, ROWS, TOKENS).optimizer == estimate(plain, ROWS, TOKENS).optimizer


@pytest.mark.parametrize("name", ["DropLoRA", "DoRA", "PiSSA", "VeRA", "TiedLoRA", "SparseAdapter"])
def test_export_is_what_is_written(name: str, tmp_path: Path) -> None:
    module = real(STRATEGIES[name])
    save_peft(module.model, tmp_path)
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    found = estimate(CausalLMModule("tiny_llama", adapter=STRATEGIES[name]()), ROWS, TOKENS)
    assert found.export == pytest.approx(size, rel=0.02)


def test_the_end_of_a_run_is_what_its_strategy_leaves() -> None:
    def end(name: str) -> int | None:
        made = CausalLMModule("tiny_llama", adapter=STRATEGIES[name]())
        return estimate(made, ROWS, TOKENS).trainable_end

    assert end("PrunedLoRA") == trainable_parameters(real(lambda: LoRA(4)).model)
    assert end("SparseAdapter") == trainable_parameters(real(lambda: LoRA(8)).model) // 2
    assert end("LoRADrop") is None


def test_checkpointing_keeps_inputs_of_blocks_and_one_block(tmp_path: Path) -> None:
    """Against torch, whose checkpoints hold on to their inputs where no hook sees it."""

    def found(checkpointing: bool) -> int:
        module = CausalLMModule("tiny_llama", adapter=LoRA(8), gradient_checkpointing=checkpointing)
        return estimate(module, ROWS, TOKENS).activations

    module = real(lambda: LoRA(8))
    module.model.gradient_checkpointing_enable({"use_reentrant": False})
    module.model.enable_input_require_grads()
    outside = measured_activations(module, padded_batch())
    inputs = 4 * ROWS * TOKENS * 128 * 4  # of four blocks, hidden size 128, float32
    block = (found(False) - outside) / 4
    assert found(True) == pytest.approx(outside + inputs + block, rel=0.1)
    assert found(True) < 0.6 * found(False)


def test_half_precision_bases_keep_adapters_in_single_precision() -> None:
    module = real(lambda: LoRA(8), dtype="bfloat16")
    found = estimate(CausalLMModule("tiny_llama", adapter=LoRA(8), dtype="bfloat16"), ROWS, TOKENS)
    assert found.trained == nbytes([p for p in module.model.parameters() if p.requires_grad])
    assert found.activations == pytest.approx(measured_activations(module, padded_batch()), rel=0.1)


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


def test_zero_shards_what_its_stage_says() -> None:
    found = estimate(CausalLMModule("tiny_llama", adapter=LoRA(8)), ROWS, TOKENS)
    whole = found.per_device()
    for stage, sharded in enumerate(
        [(), ("optimizer",), ("optimizer", "gradients"), ("optimizer", "gradients", "weights")]
    ):
        sizes = found.per_device(4, stage)
        for kind, size in whole.items():
            assert sizes[kind] == (size / 4 if kind in sharded else size)
    with pytest.raises(ValueError, match="zero_stage must be 0, 1, 2 or 3, got 4"):
        found.per_device(2, 4)


def test_the_command_needs_a_configuration_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["lightning-peft"])
    LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)
    words = ["--config", "configs/quickstart.yaml", "--model.model_name_or_path", str(tmp_path)]
    command.main([*words, "--devices", "2", "--zero_stage", "1", "--tokens", "20"])
    printed = capsys.readouterr().out
    assert "memory of each device, of 2 devices with ZeRO stage 1" in printed
    assert "128 rows of 20 tokens" in printed


def test_a_model_without_its_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no config.json"):
        estimate(CausalLMModule(str(tmp_path)), ROWS, TOKENS)


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("PiSSA", "GaLore")]


@pytest.mark.parametrize("name", ["LoRA", "FullFineTuning", *SLOW])
def test_a_checkpoint_is_what_a_run_writes(name: str, tmp_path: Path) -> None:
    words = ["fit", "--config", str(Path(__file__).parents[2] / "configs/quickstart.yaml")]
    settings = {
        "trainer.default_root_dir": str(tmp_path),
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": False,
        "validate_first": False,
        "data.batch_size": 4,
        "model.adapter": name,
        **({} if name == "FullFineTuning" else {"model.adapter.r": 16}),
    }
    assert main([*words, *(f"--{key}={value}" for key, value in settings.items())]) in (0, None)
    (written,) = tmp_path.glob("version_0/checkpoints/*.ckpt")
    adapter = {"LoRA": LoRA, "PiSSA": PiSSA, "GaLore": GaLore, "FullFineTuning": FullFineTuning}
    made = adapter[name](**({} if name == "FullFineTuning" else {"r": 16}))
    found = estimate(CausalLMModule("tiny_llama", adapter=made), ROWS, TOKENS)
    assert found.checkpoint == pytest.approx(written.stat().st_size, rel=0.1)
