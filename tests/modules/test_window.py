"""The accumulation window: its loss and gradient are of the mean over its targets."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers.logger import Logger
from sums import losses_by_hand, module, trainer
from torch import Tensor

from lightning_peft import distributed
from lightning_peft.adapters import adapter_layers
from lightning_peft.callbacks import Checkpoints
from lightning_peft.modules.window import Window, stop_at_no_number
from lightning_peft.strategies import LoRA


def batch(tokens: int, **more: Any) -> dict[str, Any]:
    return {"attention_mask": torch.ones(1, tokens, dtype=torch.long), **more}


def test_shares_add_up_to_the_mean_over_the_windows_targets() -> None:
    window, counted = Window(), {"num_target_tokens": torch.tensor(8)}
    given = [(3.0, 1), (10.0, 5), (4.0, 2)]  # sums of the loss, and targets
    scaled = [
        window.add(batch(7, **counted), torch.tensor(total), torch.tensor(count), 0.5, 3, 2)
        for total, count in given
    ]
    # What Lightning and the engine divide by is taken back; the penalty counts once.
    assert float(sum(scaled)) / (3 * 2) == pytest.approx(17 / 8 + 0.5)
    assert float(window.loss) == pytest.approx(17 / 8)
    assert int(window.tokens) == 21


def test_without_a_count_micro_batches_are_taken_for_equal() -> None:
    window = Window()
    scaled = window.add(batch(4), torch.tensor(6.0), torch.tensor(3), 0.0, 2, 2)
    assert float(scaled) == 2.0
    assert float(window.loss) == 0.5


def test_a_window_without_targets_is_zero() -> None:
    window, none = Window(), {"num_target_tokens": torch.tensor(0)}
    assert float(window.add(batch(4, **none), torch.tensor(0.0), torch.tensor(0), 1.0, 1, 1)) == 0


def test_closing_sums_over_processes_and_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "total", lambda tensors: [2 * tensor for tensor in tensors])
    now = iter([10.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    window = Window()
    window.add(batch(10), torch.tensor(3.0), torch.tensor(1), 0.0, 1, 2)
    assert window.close() == (3.0, 2 * 10 / 4.0)
    assert (window.loss, window.tokens) == (0.0, 0)


def test_a_finite_loss_stops_nothing() -> None:
    stop_at_no_number(1.0, SimpleNamespace())  # type: ignore[arg-type]


# Under a trainer.


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "train_loss" in metrics:
            self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class ByHand(Callback):
    """Computes each window's loss and gradients anew before the step that they are for."""

    def __init__(self) -> None:
        self.window: list[dict[str, Tensor]] = []
        self.sizes: list[tuple[int, ...]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, i: int) -> None:
        self.window.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        params = [p for p in module.parameters() if p.requires_grad]
        with torch.enable_grad():
            micro = [losses_by_hand(module.model, batch) for batch in self.window]
            mean = torch.stack([loss for losses in micro for loss in losses]).mean()
            expected = torch.autograd.grad(mean + module.adapter.penalty(module.model), params)
        for p, grad in zip(params, expected, strict=True):
            # Other batches add up in another order, which a tensor's largest values decide.
            atol = 1e-5 * grad.abs().max().item()
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=atol)
        self.sizes.append(tuple(map(len, micro)))
        self.losses.append(float(mean))
        self.window = []


class Decayed(LoRA):
    def penalty(self, model: torch.nn.Module) -> Tensor:
        layers = adapter_layers(model).values()
        return 0.01 * torch.stack([layer.lora_A.square().sum() for layer in layers]).sum()


@pytest.mark.parametrize("strategy", [LoRA, Decayed])
@pytest.mark.parametrize(("accumulate", "windows"), [(1, 4), (2, 2), (3, 2)])
def test_a_windows_loss_is_the_mean_over_its_target_tokens(
    accumulate: int, windows: int, strategy: type[LoRA], make: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    by_hand, logger = ByHand(), Rows()
    run = trainer(
        tmp_path,
        callbacks=[by_hand],
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    run.fit(module(strategy(r=2)), datamodule=make())
    assert run.global_step == len(by_hand.losses) == windows
    assert [row["train_loss"] for row in logger.rows] == pytest.approx(by_hand.losses, rel=1e-5)
    # Micro-batches differ in targets, and the last window holds fewer of them.
    assert len({size for window in by_hand.sizes for size in window}) > 2
    assert [len(sizes) for sizes in by_hand.sizes][-1] == {1: 1, 2: 2, 3: 1}[accumulate]
    assert sum(map(sum, by_hand.sizes)) == sum(i % 4 * 2 + 1 for i in range(7))


class Spoilt(torch.optim.SGD):
    """Its third step leaves nothing usable."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps == 3:
            for p in self.param_groups[0]["params"]:
                p.data.fill_(float("nan"))
        return loss


@pytest.mark.parametrize("every", [1, None])
def test_a_loss_that_is_no_number_stops_the_run(
    every: int | None, make: Any, tmp_path: Path
) -> None:
    saving = {"enable_checkpointing": True, "callbacks": [Checkpoints(every)]} if every else {}
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, **saving)
    with pytest.raises(ValueError, match="loss") as raised:
        run.fit(module(optimizer=functools.partial(Spoilt, lr=0.25)), datamodule=make())
    start, end = (
        "the loss is nan at step 3 with learning rate 0.25: try a lower one, more warmup_steps or "
        "trainer.gradient_clip_val; ",
        "no good checkpoint was written yet.",
    )
    if every:
        good = next(tmp_path.rglob("step=2.ckpt"))
        end = f"the last good checkpoint is {good}."
        state = torch.load(good, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert str(raised.value) == start + end
