"""What every strategy inherits: attaching, being called, and saying so when it is not."""

from __future__ import annotations

import gc
from typing import Any

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_peft.adapters import LoRALinear, adapter_layers, keep_components
from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA, PrunedLoRA


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


def two_linears() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)


def backward(model: nn.Module) -> None:
    model(torch.randn(8, 4)).square().mean().backward()


# Being called.


@pytest.mark.parametrize(
    "make",
    [
        lambda: PrunedLoRA(r=4, target_r=2),
        lambda: DropLoRA(r=4, mask="step"),
        lambda: Recording(r=2),
    ],
)
def test_a_strategy_that_acts_at_steps_says_so_when_nobody_calls_it(make) -> None:
    model, strategy = two_linears(), make()
    strategy.attach(model)
    optimizer = optimizer_of(model)
    needs_both = isinstance(strategy, Recording)
    needs_before = not isinstance(strategy, DropLoRA)
    backward(model)
    if not needs_before:
        optimizer.step()  # after_step may still come
    missing = "before_step" if needs_before else "after_step"
    with pytest.raises(RuntimeError, match=f"acts at every step, but {missing} was not called"):
        optimizer.step()
    if needs_both:
        with pytest.raises(RuntimeError, match="but before_step and after_step was not called"):
            optimizer.step()


def test_one_forgotten_call_is_named() -> None:
    model, strategy = two_linears(), DropLoRA(r=4, mask="step")
    strategy.attach(model)
    optimizer = optimizer_of(model)
    backward(model)
    strategy.before_step(model, optimizer, 0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="but after_step was not called"):
        optimizer.step()


@pytest.mark.parametrize("strategy", [LoRA(r=2), DropLoRA(r=2)])
def test_a_strategy_that_does_nothing_at_steps_needs_no_calls(strategy) -> None:
    model = two_linears()
    strategy.attach(model)
    optimizer = optimizer_of(model)
    for _ in range(3):
        backward(model)
        optimizer.step()


def test_other_optimizers_and_dead_strategies_are_left_alone() -> None:
    strategy = PrunedLoRA(r=4, target_r=2)
    strategy.attach(two_linears())
    other = two_linears()
    optimizer = optimizer_of(other)
    backward(other)
    optimizer.step()
    del strategy
    gc.collect()
    for _ in range(2):
        optimizer.step()


class Module(lightning.LightningModule):
    def __init__(self, adapter: AdapterStrategy) -> None:
        super().__init__()
        self.adapter, self.model = adapter, two_linears()
        adapter.attach(self.model)
        self.ranks: list[int] = []

    def configure_callbacks(self) -> Any:
        return [self.adapter]

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.ranks.append(adapter_layers(self.model)["0"].rank)
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.model)


def fit(module: Module, batches: int, accumulate: int, folder: Any) -> lightning.Trainer:
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(module, DataLoader(torch.randn(4 * batches, 4), batch_size=4))
    return trainer


@pytest.mark.filterwarnings("ignore")
def test_the_trainer_calls_once_for_each_optimizer_step(tmp_path) -> None:
    strategy = Recording(r=2)
    fit(Module(strategy), batches=7, accumulate=2, folder=tmp_path)
    steps = [(name, step) for name, step, _ in strategy.calls]
    # Seven micro-batches: three full windows, and a short last one.
    assert steps == [(name, step) for step in range(4) for name in ("before", "after")]
    assert all(good for _, _, good in strategy.calls)


@pytest.mark.filterwarnings("ignore")
def test_ranks_fall_at_optimizer_steps_under_accumulation(tmp_path) -> None:
    strategy = PrunedLoRA(r=4, target_r=1, min_r=0, start_step=1, prune_every=1, prune_count=1)
    module = Module(strategy)
    fit(module, batches=10, accumulate=2, folder=tmp_path)
    assert module.ranks == [4, 4, 4, 4, 3, 3, 2, 2, 1, 1]
    assert [d["step"] for d in strategy.decisions if d["layer"] == "0"] == [1, 2, 3]


# Attaching.


def test_attaching_freezes_the_base_and_gives_each_layer_its_own_adapter(tiny_llama) -> None:
    model = tiny_llama()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    LoRA(r=3, lora_alpha=5, target_modules=["q_proj"]).attach(model)
    after = {n.replace(".base", ""): p for n, p in model.named_parameters()}
    assert all(torch.equal(after[n], value) for n, value in before.items())
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    layers = adapter_layers(model)
    assert trained == {f"{name}.lora_{side}" for name in layers for side in "AB"}
    assert [x.scaling for x in layers.values()] == [5 / 3] * 2
    first, second = layers.values()
    assert not torch.equal(first.lora_A, second.lora_A)


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoRA(r=6).lora_alpha == 12
    assert LoRA(r=6, lora_alpha=1).lora_alpha == 1


def test_attaching_twice_is_an_error() -> None:
    strategy, model = LoRA(r=2), two_linears()
    strategy.attach(model)
    with pytest.raises(ValueError, match="this LoRA is attached already; make one for each model"):
        strategy.attach(two_linears())
    with pytest.raises(ValueError, match="the model has adapters already"):
        LoRA(r=2).attach(model)


def test_saved_modules_train_whole_and_without_adapters(tiny_llama) -> None:
    model = tiny_llama()
    LoRA(r=2, modules_to_save=["lm_head", "1.mlp", "norm"]).attach(model)
    full = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    mlp = {f"model.layers.1.mlp.{kind}_proj.weight" for kind in ("gate", "up", "down")}
    assert full == mlp | {"lm_head.weight", "model.norm.weight"}
    assert not any("1.mlp" in name for name in adapter_layers(model))


def test_a_saved_module_that_is_not_there_changes_nothing() -> None:
    model = two_linears()
    with pytest.raises(ValueError, match="modules_to_save: 'score' matches no module"):
        LoRA(r=2, modules_to_save=["score"]).attach(model)
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"lora_dropout": 1}, r"lora_dropout must lie in \[0, 1\), got 1"),
        ({"lora_dropout": -0.5}, r"lora_dropout must lie in \[0, 1\), got -0.5"),
    ],
)
def test_wrong_numbers_are_refused_at_once(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        LoRA(**arguments)


# Overriding.


def test_a_gate_is_all_that_a_new_method_needs() -> None:
    class HalfDrop(AdapterStrategy):
        def gate(self, r: int) -> nn.Module:
            assert r == 3
            return nn.Dropout(0.5)

    model = two_linears()
    HalfDrop(r=3).attach(model)
    gates = [layer.gate for layer in adapter_layers(model).values()]
    assert [type(gate) for gate in gates] == [nn.Dropout] * 2
    assert gates[0] is not gates[1]


def test_a_layer_and_its_start_can_be_replaced() -> None:
    class Scaled(LoRALinear):
        pass

    class Own(AdapterStrategy):
        def layer(self, base: nn.Module, name: str) -> LoRALinear:
            return Scaled(base, self.r, self.lora_alpha)

        def initialize(self, layer: LoRALinear) -> None:
            nn.init.constant_(layer.lora_A, 0.5)

    model = two_linears()
    Own(r=2).attach(model)
    for layer in adapter_layers(model).values():
        assert type(layer) is Scaled
        assert (layer.lora_A == 0.5).all()


def test_decisions_survive_a_checkpoint_and_are_no_alias() -> None:
    strategy = LoRA(r=2)
    strategy.note(3, "q", "removed", 1)
    state = strategy.state_dict()
    strategy.note(4, "q", "removed", 0)
    other = LoRA(r=2)
    other.load_state_dict(state)
    assert other.decisions == [{"step": 3, "layer": "q", "event": "removed", "rank": 1}]
    other.note(5, "k", "removed", 1)
    assert len(state["decisions"]) == 1


def test_defaults_do_nothing() -> None:
    model, strategy = two_linears(), LoRA(r=2)
    strategy.attach(model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = strategy.make_optimizer(model, torch.optim.SGD)
    assert isinstance(optimizer, torch.optim.SGD)
    strategy.prepare(model, lambda share: [], lambda batch: torch.zeros(()))
    strategy.before_step(model, optimizer, 0)
    strategy.after_step(model, optimizer, 0)
    assert strategy.penalty(model) == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_strategy_can_remove_at_any_step_by_hand() -> None:
    class Halving(AdapterStrategy):
        def after_step(self, model: nn.Module, optimizer: Any, global_step: int) -> None:
            super().after_step(model, optimizer, global_step)
            for layer in adapter_layers(model).values():
                keep_components(layer, torch.arange(layer.rank // 2), optimizer)

    model, strategy = two_linears(), Halving(r=4)
    strategy.attach(model)
    optimizer = optimizer_of(model)
    ranks = []
    for step in range(4):
        backward(model)
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
        ranks.append(adapter_layers(model)["0"].rank)
    assert ranks == [2, 1, 0, 0]


def test_dropout_is_shared_by_the_layers_that_read_one_input_where_that_is_asked(
    tiny_llama, random_batch
) -> None:
    for share in (False, True):
        model = tiny_llama()
        LoRA(r=2, lora_dropout=0.5, share_dropout=share).attach(model)
        seen = {}
        for name, layer in adapter_layers(model).items():

            def remember(x, name=name, kept=layer.dropout.kept, seen=seen):
                found = kept(x)
                seen[name] = found.mask
                return found

            layer.dropout.kept = remember
        model(**random_batch(1)).loss.backward()
        q, k, v, o = (seen[f"model.layers.0.self_attn.{kind}_proj"] for kind in "qkvo")
        assert torch.equal(q, k) is share
        assert torch.equal(q, v) is share
        assert not torch.equal(q, o)
