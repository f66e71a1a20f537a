"""Lightning's hooks call a strategy once for each optimizer step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft import distributed
from lightning_peft.adapters import adapter_layers, keep_components
from lightning_peft.errors import UserError
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DynamicRankDoRA,
    ElaLoRA,
    IncreLoRA,
    PrunedLoRA,
)
from lightning_peft.strategies.hooks import steps_of


class Recording(AdapterStrategy):
    """Notes when it is called."""

    def __init__(self, **lora: Any) -> None:
        super().__init__(**lora)
        self.calls: list[tuple[str, int, bool]] = []

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        grad = next(iter(adapter_layers(model).values())).lora_B.grad
        self.calls.append(("before", global_step, grad is not None))

    def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        super().after_step(model, optimizer, global_step)
        self.calls.append(("after", global_step, bool(optimizer.state)))


class Module(lightning.LightningModule):
    def __init__(self, adapter: AdapterStrategy, model: nn.Module) -> None:
        super().__init__()
        self.adapter, self.model = adapter, model
        adapter.attach(self.model)
        self.ranks: list[int] = []

    def configure_callbacks(self) -> Any:
        return [self.adapter]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ranks.append(adapter_layers(self.model)["0"].rank)
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> Any:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=0.01)


def fit(
    module: Module, batches: int, accumulate: int, folder: Any, **more: Any
) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **more,
    )
    trainer.fit(module, DataLoader(torch.randn(4 * batches, 4), batch_size=4))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_calls_once_for_each_optimizer_step(two_linears, tmp_path) -> None:
    strategy = Recording(r=2)
    fit(Module(strategy, two_linears()), batches=7, accumulate=2, folder=tmp_path)
    steps = [(name, step) for name, step, _ in strategy.calls]
    # Seven micro-batches: three full windows, and a short last one.
    assert steps == [(name, step) for step in range(4) for name in ("before", "after")]
    assert all(good for _, _, good in strategy.calls)


@pytest.mark.filterwarnings("ignore")
def test_ranks_fall_at_optimizer_steps_under_accumulation(two_linears, tmp_path) -> None:
    strategy = PrunedLoRA(r=4, target_r=1, min_r=0, start_step=1, prune_every=1, prune_count=1)
    module = Module(strategy, two_linears())
    fit(module, batches=10, accumulate=2, folder=tmp_path)
    assert module.ranks == [4, 4, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [d["step"] for d in strategy.decisions if d["layer"] == "0"] == [1, 2, 3]


class ByHand(AdapterStrategy):
    """Puts in a larger parameter, which no optimizer knows."""

    def before_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
        for layer in adapter_layers(model).values():
            if global_step == 1:
                layer.lora_A = nn.Parameter(torch.randn(3, 4))
                layer.lora_B = nn.Parameter(torch.randn(4, 3))
                layer.rank = 3


@pytest.mark.filterwarnings("ignore")
def test_a_parameter_that_is_added_by_hand_is_said(two_linears, tmp_path) -> None:
    strategy = ByHand(r=2)
    module = Module(strategy, two_linears())
    module.configure_callbacks = lambda: [strategy]  # type: ignore[method-assign]
    with pytest.raises(UserError) as error:
        fit(module, batches=4, accumulate=1, folder=tmp_path, log_every_n_steps=2)
    assert str(error.value) == (
        "after step 1 0 has a parameter of shape (3, 4) that the optimizer does not have, so that "
        "it never trains; change ranks by keep_components and add_components, which keep the "
        "parameter and change what it holds."
    )


def test_processes_compare_ranks_and_which_layers_share(two_linears, monkeypatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(distributed, "assert_agreement", lambda *args: told.append(args))
    model, strategy = two_linears(), PrunedLoRA(r=4, target_r=2)
    strategy.attach(model)
    keep_components(model[2], torch.tensor([1]))
    strategy.assert_agreement(5)
    model[0].share_with(model[2])
    strategy.assert_agreement(6)
    assert told == [
        (5, {"0": [4, "0"], "2": [1, "2"]}, "ranks and sharing"),
        (6, {"0": [4, "0"], "2": [1, "0"]}, "ranks and sharing"),
    ]


def test_a_step_that_a_resumed_run_has_made_is_not_made_again(two_linears) -> None:
    strategy = Recording(r=2)
    strategy.attach(two_linears())
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    trainer = SimpleNamespace(global_step=7, optimizers=[optimizer], log_every_n_steps=0)
    module: Any = None
    strategy.on_train_start(trainer, module)  # type: ignore[arg-type]
    for global_step in (7, 7, 8, 8, 9):  # micro-batches, of which some end a step
        trainer.global_step = global_step
        strategy.on_train_batch_end(trainer, module, None, None, 0)  # type: ignore[arg-type]
    assert [step for _, step, _ in strategy.calls] == [7, 8]


@pytest.mark.parametrize(
    ("estimated", "steps"), [(12, 12), (12.0, 12), (-1, None), (float("inf"), None)]
)
def test_steps_that_no_trainer_knows_are_none(estimated: float, steps: int | None) -> None:
    trainer: Any = SimpleNamespace(estimated_stepping_batches=estimated)
    assert steps_of(trainer) == steps


@pytest.mark.parametrize(
    ("strategy", "last", "sentence"),
    [
        (
            AdaLoRA(tfinal=20, total_step=100),
            80,
            "AdaLoRA's budget is final by total_step = 100 at step 80, but this run has 80 steps "
            "and ends before: leave total_step out.",
        ),
        (
            AdaLoRA(total_step=100),
            99,
            "AdaLoRA's budget is final by total_step = 100 at step 99, but this run has 99 steps "
            "and ends before: leave total_step out.",
        ),
        (
            DynamicRankDoRA(final_ratio=0.2, total_step=100),
            79,
            "DynamicRankDoRA's budget is final by total_step = 100 at step 79, but this run has 79 "
            "steps and ends before: leave total_step out.",
        ),
        (
            ElaLoRA(init_warmup=10, final_warmup=20, mask_interval=5, total_step=100),
            79,
            "ElaLoRA's ranks are final by total_step = 100 at step 79, but this run has 79 steps "
            "and ends before: leave total_step out.",
        ),
        (
            IncreLoRA(r=1, target_r=2),
            2000,
            "IncreLoRA reaches target_r = 2 at the earliest at step 2000, but this run has 2000 "
            "steps and ends below, with its reserves: lower init_warmup or incre_interval, or "
            "raise top_h or incre_rank_num.",
        ),
    ],
)
def test_a_run_that_ends_before_a_strategy_is_done_is_told_at_its_start(
    strategy, last, sentence, two_linears, recwarn
) -> None:
    strategy.attach(two_linears())
    for steps in (last + 1, -1, last):  # -1: nobody knows
        assert not recwarn
        trainer: Any = SimpleNamespace(global_step=0, estimated_stepping_batches=steps)
        strategy.on_train_start(trainer, None)
    assert [str(warning.message) for warning in recwarn] == [sentence]
