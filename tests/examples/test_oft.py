"""OFT: a form without ranks, without a product and without a place in PEFT."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers, keep_components, merge, save_peft
from lightning_peft.adapters.attach import kind_of
from lightning_peft.callbacks import LayerImportance, RunRecord
from lightning_peft.modules import CausalLMModule
from lightning_peft.reports.records import IMPORTANCE, read_table
from lightning_peft.testing import check_strategy

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def oft(example) -> ModuleType:
    return example("oft")


@pytest.fixture
def layer(oft) -> Any:
    """A layer of 8 inputs in blocks of 4, its rotation no longer the identity."""
    torch.manual_seed(0)
    layer = oft.OFTLinear(nn.Linear(8, 5).requires_grad_(False), block_size=4)
    nn.init.normal_(layer.skew, std=0.7)
    return layer


def whole_rotation(layer: Any) -> torch.Tensor:
    return torch.block_diag(*layer.rotation()).detach()


def test_keeps_a_strategys_promises(oft) -> None:
    check_strategy(oft.OFT(block_size=4))


def test_the_rotation_is_orthogonal_and_the_identity_at_the_start(oft, layer) -> None:
    R = whole_rotation(layer)
    torch.testing.assert_close(R @ R.T, torch.eye(8))
    torch.testing.assert_close(torch.linalg.det(R), torch.ones(()))
    assert (R - torch.eye(8)).abs().max() > 0.1
    for i, block in enumerate(layer.rotation().detach()):  # by the formula, entry by entry
        S, values = torch.zeros(4, 4), iter(layer.skew[i].tolist())
        for row in range(4):
            for column in range(row + 1, 4):
                S[row, column] = next(values)
                S[column, row] = -S[row, column]
        expected = torch.linalg.inv(torch.eye(4) - S) @ (torch.eye(4) + S)
        torch.testing.assert_close(block, expected, rtol=1e-4, atol=1e-5)
    fresh = oft.OFTLinear(nn.Linear(8, 5), block_size=2)
    assert torch.equal(whole_rotation(fresh), torch.eye(8))


def test_merged_weight_and_change_are_those_of_the_rotated_weight(layer) -> None:
    W, R, x = layer.base.weight.detach(), whole_rotation(layer), torch.randn(3, 6, 8)
    torch.testing.assert_close(layer.merged_weight(W), W @ R)
    torch.testing.assert_close(layer.delta_weight(), W @ R - W)
    torch.testing.assert_close(layer(x), x @ R.T @ W.T + layer.bias)
    naive = (x @ (W @ R - W).T).square().sum(-1)
    torch.testing.assert_close(layer.delta_sq_norm(x), naive)
    merged = merge(nn.Sequential(layer))
    torch.testing.assert_close(merged(x), x @ R.T @ W.T + layer.bias)


def test_what_it_lacks_is_said_in_one_sentence(oft, tiny_llama, tmp_path) -> None:
    with pytest.raises(ValueError, match="block_size must divide the layer's 8 inputs, got 3"):
        oft.OFTLinear(nn.Linear(8, 5), block_size=3)
    model = tiny_llama()
    report = oft.OFT(block_size=4, target_modules=["q_proj"]).attach(model)
    assert report.trainable == trainable_parameters(model) == 2 * 8 * 6
    layer = adapter_layers(model)[Q]
    assert (layer.r, layer.rank, layer.gate, layer.peft()) == (None, None, None, None)
    with pytest.raises(ValueError, match="a OFTLinear has no components that could be removed"):
        keep_components(layer, torch.tensor([0]))
    with pytest.raises(ValueError, match="PEFT has no form for OFTLinear, .* merge it instead"):
        save_peft(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


class Watched(LayerImportance):
    """Remembers the inputs and ΔW of each step."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self.seen: list[dict[str, float]] = []
        for name, layer in adapter_layers(pl_module.model).items():
            layer.register_forward_pre_hook(functools.partial(self.look, name))

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, index: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, index)
        self.mask = batch["attention_mask"].bool()
        self.seen.append({})

    def look(self, name: str, layer: Any, args: Any) -> None:
        W, R = layer.base.weight, whole_rotation(layer)
        changes = args[0][self.mask].detach() @ (W @ R - W).T
        self.seen[-1][name] = changes.square().sum(-1).mean().item()


@pytest.mark.filterwarnings("ignore")
def test_a_run_says_that_peft_has_no_form_and_records_the_importance(
    oft, tiny_llama, random_batch, tmp_path: Path
) -> None:
    class Module(CausalLMModule):
        def load_base(self) -> Any:
            return tiny_llama()

    strategy = oft.OFT(block_size=4, target_modules=["q_proj", "down_proj"])
    adamw = functools.partial(torch.optim.AdamW, lr=0.05)
    module = Module("tiny_llama", adapter=strategy, optimizer=adamw)
    importance = Watched(every_n_steps=1)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=3,
        default_root_dir=tmp_path,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[importance, RunRecord()],
    )
    batches: Any = [random_batch(i) for i in range(3)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["exported"] == (
        "nothing: PEFT has no form for OFTLinear; lightning-peft export --merge writes the merged "
        "model"
    )
    assert not (tmp_path / "adapter").exists()
    assert set(record["ranks"].values()) == {None}
    assert record["parameters"]["end"] == 2 * (8 * 6 + 12 * 6)
    rows = read_table(tmp_path / "importance.csv", IMPORTANCE)
    assert len(rows) == 3 * 4
    for row in rows:
        expected = importance.seen[row["step"]]
        assert row["importance"] == pytest.approx(expected[row["layer"]], rel=1e-3, abs=1e-9)
        kind = [v for n, v in expected.items() if kind_of(n) == kind_of(row["layer"])]
        if sum(kind):
            share = expected[row["layer"]] / sum(kind)
            assert row["share"] == pytest.approx(share, rel=1e-3)
    assert any(row["importance"] > 0 for row in rows)
