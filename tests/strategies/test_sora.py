"""SoRA against AdamW and a soft threshold written out at full size, over many steps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.gates import rank_scale
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.sora import SoRA
from lightning_peft.testing import check_strategy

RATE, GATE_RATE, DECAY, L1 = 0.02, 0.03, 0.1, 0.9
STEPS = 80


def values_of(layer: Any) -> Tensor:
    return rank_scale(layer.gate).values


def rate_at(step: int) -> float:
    return 1 - 0.5 * step / STEPS


def data(step: int) -> tuple[Tensor, Tensor]:
    stream = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=stream, dtype=torch.float64)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)


class FullSize:
    """The same network, every component there until the end; what is removed is masked.

    AdamW is written out by its formulas.
    """

    def __init__(self, model: nn.Module, remove_every: int | None) -> None:
        self.layers = list(adapter_layers(model).values())
        self.remove_every = remove_every
        self.values = [
            [t.detach().clone() for t in (layer.lora_A, layer.lora_B, values_of(layer))]
            for layer in self.layers
        ]
        self.moments = [
            [(torch.zeros_like(t), torch.zeros_like(t)) for t in own] for own in self.values
        ]
        self.alive = [torch.ones_like(own[2], dtype=torch.bool) for own in self.values]
        self.came_back = False

    def loss(self, step: int) -> Tensor:
        x, y = data(step)
        outs = []
        for layer, (A, B, g) in zip(self.layers, self.values, strict=True):
            change = layer.scaling * B @ torch.diag(g) @ A
            x = x @ (layer.base.weight + change).T + layer.base.bias
            outs.append(x)
            x = x.tanh()
        return (outs[-1] - y).square().mean()

    def step(self, step: int) -> None:
        leaves = [t.requires_grad_() for own in self.values for t in own]
        grads = iter(torch.autograd.grad(self.loss(step), leaves))
        for own, moments, alive in zip(self.values, self.moments, self.alive, strict=True):
            for index, (m, v) in enumerate(moments):
                gate = index == 2
                rate = (GATE_RATE if gate else RATE) * rate_at(step)
                old, grad = own[index].detach(), next(grads)
                m.mul_(0.9).add_(0.1 * grad)
                v.mul_(0.999).add_(0.001 * grad**2)
                up = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
                new = old * (1 - rate * (0 if gate else DECAY)) - rate * up
                if gate:
                    cut = rate * L1
                    new = torch.where(new > cut, new - cut, torch.where(new < -cut, new + cut, 0))
                    self.came_back |= bool(((old == 0) & (new != 0) & alive).any())
                own[index] = new
            if self.remove_every and (step + 1) % self.remove_every == 0:
                alive &= own[2] != 0
            for index, mask in enumerate((alive[:, None], alive, alive)):
                for tensor in (own[index], *moments[index]):
                    tensor.mul_(mask)


def small_model(two_linears: Any, **arguments: Any) -> tuple[SoRA, nn.Module]:
    model = two_linears().double()
    torch.manual_seed(1)
    strategy = SoRA(r=6, l1_weight=L1, gate_lr=GATE_RATE, **arguments)
    strategy.attach(model)
    return strategy, model.double()


def adamw(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY)


@pytest.mark.parametrize("remove_every", [None, 7])
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_many_steps_are_adamw_and_a_soft_threshold(
    two_linears, remove_every, scheduler_first
) -> None:
    strategy, model = small_model(two_linears, remove_every=remove_every)
    reference = FullSize(model, remove_every)
    optimizer = strategy.make_optimizer(model, adamw)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    zeros = 0
    for step in range(STEPS):
        x, y = data(step)
        loss = (model(x) - y).square().mean()
        torch.testing.assert_close(loss, reference.loss(step), rtol=1e-9, atol=1e-12)
        loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        if scheduler_first:  # as Lightning does it
            scheduler.step()
        strategy.after_step(model, optimizer, step)
        if not scheduler_first:
            scheduler.step()
        optimizer.zero_grad()
        reference.step(step)
        for layer, own, alive in zip(
            adapter_layers(model).values(), reference.values, reference.alive, strict=True
        ):
            assert layer.rank == alive.sum()
            assert ((values_of(layer) == 0) == (own[2][alive] == 0)).all()
            zeros += int((own[2][alive] == 0).sum())
            ours = layer.lora_A, layer.lora_B, values_of(layer)
            theirs = own[0][alive], own[1][:, alive], own[2][alive]
            for one, other in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.detach(), other, rtol=1e-7, atol=1e-9)
    assert zeros > 10
    assert reference.came_back == (remove_every is None)
    ranks = [layer.rank for layer in adapter_layers(model).values()]
    assert (sum(ranks) < 12) == (remove_every is not None)


class Small(LightningModule):
    """A module whose rate falls at each step, around a model that a strategy is attached to."""

    def __init__(self, strategy: SoRA, model: nn.Module) -> None:
        super().__init__()
        self.strategy_, self.net = strategy, model

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = self.strategy_.make_optimizer(self.net, adamw)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def test_a_lightning_run_takes_the_rate_of_the_step_and_removes_at_its_end(
    two_linears, tmp_path
) -> None:
    strategy, model = small_model(two_linears)
    reference = FullSize(model, 30)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[strategy],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    batches: Any = [data(step) for step in range(30)]
    trainer.fit(
        Small(strategy, model), torch.utils.data.DataLoader(batches, batch_size=None, num_workers=0)
    )
    for step in range(30):
        reference.step(step)
    for layer, own, alive in zip(
        adapter_layers(model).values(), reference.values, reference.alive, strict=True
    ):
        assert layer.rank == alive.sum() == len(values_of(layer))
        torch.testing.assert_close(values_of(layer).detach(), own[2][alive], rtol=1e-7, atol=1e-9)
    assert sum(layer.rank for layer in adapter_layers(model).values()) < 12
    assert {(d["step"], d["event"]) for d in strategy.decisions} == {(29, "removed")}


def test_the_gates_start_normal_and_have_a_group_without_decay(tiny_llama) -> None:
    torch.manual_seed(0)
    strategy = SoRA(r=64, rank_gate=lambda r: RankDropout(r, 0.1))
    strategy.attach(model := tiny_llama())
    gates = [values_of(layer) for layer in adapter_layers(model).values()]
    every = torch.cat([gate.detach() for gate in gates])
    assert every.mean().abs() < 0.1
    assert abs(every.std() - 1) < 0.1
    matrices, own = strategy.make_optimizer(model, adamw).param_groups
    assert [id(p) for p in own["params"]] == [id(gate) for gate in gates]
    assert len(matrices["params"]) == 2 * len(gates)
    assert (own["weight_decay"], matrices["weight_decay"]) == (0, DECAY)
    assert own["lr"] == matrices["lr"] == RATE


def test_what_lies_between_the_threshold_and_twice_it_stays(two_linears) -> None:
    strategy = SoRA(r=4, l1_weight=0.5)
    strategy.attach(model := two_linears())
    layer = next(iter(adapter_layers(model).values()))
    start = torch.tensor([0.15, -0.15, 0.1, 0.05])
    values_of(layer).data.copy_(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)  # one group; no gradients, no change
    strategy.before_step(model, optimizer, 0)
    strategy.after_step(model, optimizer, 0)
    torch.testing.assert_close(values_of(layer).data, torch.tensor([0.05, -0.05, 0.0, 0.0]))


def test_removal_keeps_the_function_and_takes_the_parameters(
    tiny_llama, random_batch, logits
) -> None:
    torch.manual_seed(0)
    strategy = SoRA(r=4)
    strategy.attach(model := tiny_llama())
    layers = adapter_layers(model)
    assert strategy.final_parameters(model) is None
    expected_count = 0
    for index, layer in enumerate(layers.values()):
        nn.init.normal_(layer.lora_B)
        values_of(layer).data[: index % 5] = 0
        left = 4 - index % 5
        expected_count += left * (layer.in_features + layer.out_features + 1)
    expected = logits(model, batch := random_batch(0))
    strategy.remove(model, None, 3)
    torch.testing.assert_close(logits(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert trainable_parameters(model) == expected_count
    assert [layer.rank for layer in layers.values()][:6] == [4, 3, 2, 1, 0, 4]
    noted = {d["layer"]: d["rank"] for d in strategy.decisions}
    assert noted == {name: layer.rank for name, layer in layers.items() if layer.rank < 4}


def test_an_optimizer_without_the_gates_is_refused(two_linears) -> None:
    strategy = SoRA(r=2)
    strategy.attach(model := two_linears())
    optimizer = torch.optim.SGD([adapter_layers(model)["0"].lora_A], lr=0.1)
    sentence = (
        "the optimizer does not train SoRA's gates, such as 0's, whose learning rate the proximal "
        "step needs; make it by strategy.make_optimizer, or from all parameters that train."
    )
    with pytest.raises(ValueError, match="the optimizer does not train") as error:
        strategy.before_step(model, optimizer, 0)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"l1_weight": -1.0}, "l1_weight must be a finite number of at least 0, got -1.0."),
        ({"gate_lr": math.inf}, "gate_lr must be a finite number of at least 0, got inf."),
        ({"remove_every": 0}, "remove_every must be at least 1, got 0."),
        ({"total_step": 0}, "total_step must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(ValueError, match="must be") as error:
        SoRA(**arguments)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    "arguments",
    [
        {"remove_every": 4},
        pytest.param({"total_step": 12}, marks=pytest.mark.long),
        pytest.param(
            {
                "remove_every": 5,
                "rank_gate": lambda r: RankDropout(r, 0.3),
                "rank_pattern": {"up_proj": 2},
            },
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(SoRA(r=4, l1_weight=5.0, **arguments))


@pytest.mark.slow
def test_two_processes_agree() -> None:
    check_strategy(SoRA(r=4, l1_weight=5.0, remove_every=4), processes=2)
