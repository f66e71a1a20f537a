from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft.adapters.attach import adapter_layers, kind_of
from lightning_peft.callbacks.importance import LayerImportance
from lightning_peft.reports.records import DECISIONS, IMPORTANCE, read_table
from lightning_peft.strategies import FullFineTuning, LoRA, LoRADrop, PrunedLoRA


def batches(count: int, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 32, (count, 3, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[:, 0, 4:] = 0  # padding on the right
    mask[:, 1, :2] = 0  # and on the left
    return [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]


class Module(pl.LightningModule):
    def __init__(self, strategy: Any, checkpointing: bool = False, fail_at: int = -1) -> None:
        super().__init__()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        self.model = LlamaForCausalLM(config)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.enable_input_require_grads()
        self.adapter, self.fail_at, self.hooks = strategy, fail_at, []
        strategy.attach(self.model)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [self.adapter]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise RuntimeError("stop")
        layers = adapter_layers(self.model).values()
        self.hooks.append(sum(len(layer._forward_pre_hooks) for layer in layers))
        loss = self.model(**batch, labels=batch["input_ids"]).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def fit(
    module: Module,
    folder: Path,
    every: int = 2,
    data: list[dict[str, torch.Tensor]] | None = None,
    ckpt_path: str | None = None,
    callbacks: tuple[pl.Callback, ...] = (),
    **options: Any,
) -> None:
    trainer = pl.Trainer(
        accelerator="cpu",
        **{"logger": False, "max_epochs": 1, "enable_checkpointing": False, **options},
        callbacks=[LayerImportance(every), *callbacks],
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data or batches(6), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader, ckpt_path=ckpt_path)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return read_table(folder / "importance.csv", IMPORTANCE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_importance_is_the_mean_square_over_attended_tokens_of_the_training_batch(
    tmp_path: Path, checkpointing: bool
) -> None:
    module = Module(LoRA(r=4, init_lora_weights=False, lora_dropout=0.3), checkpointing)
    batch = batches(1)[0]
    inputs: dict[str, torch.Tensor] = {}
    deltas = {n: layer.delta_weight() for n, layer in adapter_layers(module.model).items()}

    def keep(name: str) -> Any:
        return lambda m, args: inputs.setdefault(name, args[0].detach())

    # What the training forward itself sees, dropout of earlier layers included.
    handles = [
        layer.register_forward_pre_hook(keep(name))
        for name, layer in adapter_layers(module.model).items()
    ]
    fit(module, tmp_path, data=[batch])
    for handle in handles:
        handle.remove()

    rows = rows_of(tmp_path)
    assert [row["layer"] for row in rows] == list(deltas)
    for row in rows:
        x = inputs[row["layer"]][batch["attention_mask"].bool()]
        expected = (x @ deltas[row["layer"]].T).square().sum(-1).mean()
        assert row["importance"] == pytest.approx(expected.item(), rel=1e-5)
        assert row["rank"] == 4
        assert row["step"] == 0


def test_shares_sum_to_one_in_each_kind_and_to_zero_where_nothing_has_changed(
    tmp_path: Path,
) -> None:
    fit(Module(LoRA(r=4)), tmp_path)
    rows = rows_of(tmp_path)
    for step in (0, 2, 4):
        for kind in {row["kind"] for row in rows}:
            share = [r["share"] for r in rows if (r["step"], r["kind"]) == (step, kind)]
            assert len(share) == 3
            assert sum(share) == pytest.approx(0 if step == 0 else 1)
    assert all(row["kind"] == kind_of(row["layer"]) for row in rows)


def test_the_first_micro_batch_of_a_due_window_is_measured_and_no_other_is_hooked(
    tmp_path: Path,
) -> None:
    data = batches(8)
    module = Module(LoRA(r=4, init_lora_weights=False))
    fit(module, tmp_path, data=data, accumulate_grad_batches=2)
    layers = len(adapter_layers(module.model))
    assert sorted({row["step"] for row in rows_of(tmp_path)}) == [0, 2]
    assert module.hooks == [layers, 0, 0, 0, layers, 0, 0, 0]


def test_watching_changes_nothing_in_training(tmp_path: Path) -> None:
    ends = []
    for every in (1, 1000):
        module = Module(LoRA(r=4, lora_dropout=0.2))
        torch.manual_seed(3)
        fit(module, tmp_path, every)
        ends.append([p.detach().clone() for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_ranks_and_decisions_of_pruned_lora_are_recorded(tmp_path: Path) -> None:
    module = Module(PrunedLoRA(r=4, target_r=2, prune_every=2, prune_count=1, start_step=2))
    fit(module, tmp_path)
    ranks = {row["step"]: row["rank"] for row in rows_of(tmp_path)}
    # A removal at step 2 comes after the forward pass that is measured there.
    assert ranks == {0: 4, 2: 4, 4: 3}
    assert read_table(tmp_path / "decisions.csv", DECISIONS) == module.adapter.decisions
    assert (tmp_path / "importance.png").stat().st_size > 10_000


def test_each_layer_of_a_shared_lora_has_its_own_row_and_a_removed_one_has_none(
    tmp_path: Path,
) -> None:
    for ablation in (None, "without_share"):
        module = Module(LoRADrop(r=4, threshold=0.6, probe_epochs=1, ablation=ablation))
        module.adapter.prepare(
            module.model,
            lambda ratio: batches(3, seed=1),
            lambda batch, model=module.model: model(**batch, labels=batch["input_ids"]).loss,
        )
        fit(module, tmp_path)
        expected = {n for n, e in module.adapter.layout.items() if e["role"] != "removed"}
        assert {row["layer"] for row in rows_of(tmp_path)} == expected
        decisions = read_table(tmp_path / "decisions.csv", DECISIONS)
        assert {d["event"] for d in decisions} == {"removed" if ablation else "shared"}


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    options: dict[str, Any] = {"callbacks": (saving,), "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="stop"):
        fit(Module(LoRA(r=4), fail_at=5), tmp_path, every=1, **options)
    assert (tmp_path / "importance.png").is_file()
    assert max(row["step"] for row in rows_of(tmp_path)) == 4
    path = tmp_path / "importance.csv"
    path.write_text(path.read_text() + "5,model.layers.0.self_attn.q_proj,q_p")
    fit(Module(LoRA(r=4)), tmp_path, every=1, ckpt_path=str(tmp_path / "step=3.ckpt"))
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert len(rows) == len({(row["step"], row["layer"]) for row in rows}) == 6 * 21
    assert len(path.read_text().splitlines()) == len(rows) + 1


def test_loggers_get_shares_but_metrics_csv_does_not(tmp_path: Path) -> None:
    class Recorder(Logger):
        name = version = None

        def __init__(self) -> None:
            super().__init__()
            self.logged: list[tuple[int, dict[str, float]]] = []

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            assert step is not None
            self.logged.append((step, metrics))

        def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    recorder, writer = Recorder(), CSVLogger(tmp_path, "run", version=0)
    fit(Module(LoRA(r=4)), tmp_path, logger=[writer, recorder], log_every_n_steps=1)
    rows = rows_of(tmp_path / "run/version_0")
    logged = [(s, m) for s, m in recorder.logged if any(k.startswith("importance/") for k in m)]
    assert [step for step, _ in logged] == [0, 2, 4]
    for step, metrics in logged:
        shares = {f"importance/{r['layer']}": r["share"] for r in rows if r["step"] == step}
        assert metrics == pytest.approx(shares, rel=1e-6)
    names = (tmp_path / "run/version_0/metrics.csv").read_text().splitlines()[0]
    assert "train_loss" in names
    assert "importance" not in names


def test_a_loss_that_is_not_finite_still_leaves_rows(tmp_path: Path) -> None:
    module = Module(LoRA(r=4, init_lora_weights=False))
    for parameter in next(iter(adapter_layers(module.model).values())).own_parameters():
        parameter.data.fill_(float("nan"))
    fit(module, tmp_path, data=batches(1))
    assert all(row["share"] != row["share"] for row in rows_of(tmp_path))
    assert (tmp_path / "importance.png").is_file()


def test_a_step_that_goes_around_the_model_is_named(tmp_path: Path) -> None:
    class Around(Module):
        def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.model.model(**batch)[0].square().mean()

    with pytest.warns(UserWarning, match="saw no adapted layer at step 0"):
        fit(Around(LoRA(r=4)), tmp_path, data=batches(1))


def test_every_n_steps_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        LayerImportance(0)


def test_without_adapters_it_is_the_norm_of_each_weights_change(tmp_path: Path) -> None:
    module = Module(FullFineTuning())
    start = {n: p.detach().clone() for n, p in module.model.named_parameters()}
    fit(module, tmp_path, every=3)  # steps 0 and 3; the weights have moved on since
    rows = rows_of(tmp_path)
    assert {row["measure"] for row in rows} == {"weight"}
    assert all(row["importance"] == 0 for row in rows if row["step"] == 0)
    again = Module(FullFineTuning())
    fit(again, tmp_path / "three", every=3, data=batches(6)[:3])
    expected = {n: (p - start[n]).norm().item() for n, p in again.model.named_parameters()}
    late = {row["layer"]: row["importance"] for row in rows if row["step"] == 3}
    assert len(late) == 21
    for name, change in late.items():
        assert change == pytest.approx(expected[f"{name}.weight"], rel=1e-5)
    assert (tmp_path / "importance.png").is_file()
