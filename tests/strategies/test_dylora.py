"""DyLoRA against the authors' formulas, and every rank that is cut out of one run."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_peft import distributed, load_peft, save_peft, trainable_parameters
from lightning_peft.adapters import (
    LoRALinear,
    adapter_layers,
    adapter_state_dict,
    load_adapter_state,
    merge,
)
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA, RankDropout
from lightning_peft.strategies.dylora import DyLoRA, FirstComponents
from lightning_peft.testing import check_strategy

R = 6


def gates(model: nn.Module) -> list[FirstComponents]:
    return [part for part in model.modules() if isinstance(part, FirstComponents)]


def use(model: nn.Module, b: int) -> None:
    for gate in gates(model):
        gate.use(b)


def make_layer(frozen: bool = False, **lora: Any) -> Any:
    torch.manual_seed(0)
    layer = DyLoRA(r=R, frozen=frozen, **lora).layer(nn.Linear(7, 5), "q")
    nn.init.normal_(layer.lora_B)
    layer.base.requires_grad_(False)
    return layer.train()


@pytest.fixture
def trained(tiny_llama) -> Any:
    """Makes a strategy and a model of it whose B is random: ``trained(**arguments)``."""

    def make(**arguments: Any) -> tuple[DyLoRA, Any]:
        model = tiny_llama()
        torch.manual_seed(0)
        strategy = DyLoRA(**{"r": R, **arguments})
        strategy.attach(model)
        for layer in adapter_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.2)
        return strategy, model

    return make


def training_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        out = model.train()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return out[batch["attention_mask"].bool()]


def authors(layer: LoRALinear, x: Tensor, b: int, frozen: bool) -> list[Tensor]:
    """Output and gradients as the authors' code has them: the root of r / b on A and on B."""
    x = x.clone().requires_grad_()
    A, B = (m.detach().clone().requires_grad_() for m in (layer.lora_A, layer.lora_B))
    first_A, first_B = A[:b], B[:, :b]
    if frozen:
        first_A = torch.cat([A[: b - 1].detach(), A[b - 1 : b]])
        first_B = torch.cat([B[:, : b - 1].detach(), B[:, b - 1 : b]], 1)
    root = math.sqrt(R / b)
    change = F.linear(F.linear(x, first_A * root), first_B * root)
    y = layer.base(x) + 2 * R / R * change  # lora_alpha is 2 r
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), x.grad, A.grad, B.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("b", [1, 4, R])
@pytest.mark.parametrize("path", ["chosen", "chained", "formula"])
def test_forward_and_gradients_are_the_authors(b, frozen, path, run_layer) -> None:
    chained = {"rank_gate": lambda r: nn.Identity()} if path == "chained" else {}
    layer = make_layer(frozen, **chained)
    use(layer, b)
    x = torch.randn(2, 3, 7)
    expected = authors(layer, x, b, frozen)
    forward = layer if path != "formula" else functools.partial(formula, layer)
    found = run_layer(layer, forward, x)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    trained = list(range(b)) if not frozen else [b - 1]
    assert layer.lora_A.grad.any(1).nonzero()[:, 0].tolist() == trained
    assert layer.lora_B.grad.any(0).nonzero()[:, 0].tolist() == trained


def formula(layer: LoRALinear, x: Tensor) -> Tensor:
    """What a compiler is given."""
    return layer._formula(x, x)


@pytest.mark.parametrize("b", [1, 4])
def test_with_rslora_the_scaling_is_alpha_over_the_root_of_b(b) -> None:
    layer = make_layer(use_rslora=True, lora_alpha=3)
    use(layer, b)
    x = torch.randn(4, 7)
    change = F.linear(F.linear(x, layer.lora_A[:b]), layer.lora_B[:, :b])
    torch.testing.assert_close(layer(x), layer.base(x) + 3 / math.sqrt(b) * change)


def test_eval_is_lora_of_the_highest_rank(trained, tiny_llama, random_batch, logits) -> None:
    model, plain = trained()[1], tiny_llama()
    LoRA(r=R).attach(plain)
    for name, layer in adapter_layers(plain).items():
        layer.lora_A.data.copy_(model.get_submodule(name).lora_A)
        layer.lora_B.data.copy_(model.get_submodule(name).lora_B)
    use(model, 2)
    torch.testing.assert_close(logits(model, random_batch(1)), logits(plain, random_batch(1)))
    assert trainable_parameters(model) == trainable_parameters(plain)


def test_one_uniform_draw_holds_for_all_layers_and_a_whole_step(trained, random_batch) -> None:
    strategy, model = trained(min_r=3, target_modules=["q_proj", "v_proj"])
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    seen, steps = [], 400
    for step in range(steps):
        drawn = {int(gate.b) for gate in gates(model)}
        if step < 3:
            for micro in range(2):
                model(**random_batch(micro)).loss.backward()
                assert {int(gate.b) for gate in gates(model)} == drawn
        seen += drawn
        strategy.before_step(model, optimizer, step)
        strategy.after_step(model, optimizer, step)
    assert len(seen) == steps
    assert set(seen) == {3, 4, 5, 6}
    deviation = (steps * 0.25 * 0.75) ** 0.5
    assert all(abs(seen.count(b) - steps / 4) < 5 * deviation for b in set(seen))


def test_all_processes_take_the_first_ones_draw(trained, monkeypatch) -> None:
    monkeypatch.setattr(distributed, "from_first", lambda drawn: torch.full_like(drawn, 5))
    model = trained()[1]
    assert {int(gate.b) for gate in gates(model)} == {5}


def test_a_frozen_step_changes_one_component(trained, random_batch) -> None:
    strategy, model = trained(frozen=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 0.1)
    for step in range(4):
        last = int(gates(model)[0].b) - 1
        before = {n: (m.lora_A.clone(), m.lora_B.clone()) for n, m in adapter_layers(model).items()}
        model(**random_batch(step)).loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
        for name, layer in adapter_layers(model).items():
            A, B = before[name]
            assert (layer.lora_A != A).any(1).nonzero()[:, 0].tolist() == [last]
            assert (layer.lora_B != B).any(0).nonzero()[:, 0].tolist() == [last]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("b", [1, 3, 5])
def test_a_cut_model_is_what_training_computed_at_that_rank(
    b, frozen, trained, random_batch, logits
) -> None:
    strategy, model = trained(frozen=frozen)
    batch = random_batch(1)
    use(model, b)
    expected = training_logits(model, batch)
    strategy.cut(model, b)
    assert torch.equal(logits(model, batch), expected)
    assert {tuple(layer.lora_A.shape)[0] for layer in adapter_layers(model).values()} == {b}
    assert {layer.lora_B.shape[1] for layer in adapter_layers(model).values()} == {b}
    torch.testing.assert_close(logits(merge(model), batch), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_one_run_is_exported_at_several_ranks(
    use_rslora, trained, tiny_llama, random_batch, logits, tmp_path
) -> None:
    peft = pytest.importorskip("peft")
    strategy, model = trained(use_rslora=use_rslora)
    batch, expected = random_batch(1), {}
    for b in (5, 3, 1):
        use(model, b)
        expected[b] = training_logits(model, batch)
    assert not torch.allclose(expected[5], expected[3], atol=1e-2)
    for b in (5, 3, 1):
        strategy.cut(model, b)
        folder = save_peft(model, tmp_path / str(b))
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), folder)
        assert {p.shape[0] for n, p in theirs.named_parameters() if "lora_A" in n} == {b}
        torch.testing.assert_close(logits(theirs, batch), expected[b], rtol=1e-5, atol=1e-5)
        load_peft(ours := tiny_llama(), folder)
        torch.testing.assert_close(logits(ours, batch), expected[b], rtol=1e-5, atol=1e-5)


def test_a_cut_model_can_be_saved_and_loaded(trained, random_batch, logits) -> None:
    strategy, model = trained()
    strategy.cut(model, 4)
    loaded = trained()[1]
    load_adapter_state(loaded, copy.deepcopy(adapter_state_dict(model)))
    assert torch.equal(logits(loaded, random_batch(1)), logits(model, random_batch(1)))


def test_a_layer_of_a_lower_rank_uses_all_that_it_has(trained, random_batch, logits) -> None:
    strategy, model = trained(rank_pattern={"v_proj": 2}, lora_alpha=5)
    layers, batch = adapter_layers(model), random_batch(1)
    use(model, 4)
    layer = layers["model.layers.0.self_attn.v_proj"].train()
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(
        layer(x), layer.base(x) + 5 / 2 * F.linear(F.linear(x, layer.lora_A), layer.lora_B)
    )
    expected = training_logits(model, batch)
    strategy.cut(model, 4)
    assert {name.rpartition(".")[2]: layer.rank for name, layer in layers.items()}["v_proj"] == 2
    assert max(layer.rank for layer in layers.values()) == 4
    assert torch.equal(logits(model, batch), expected)


def test_what_it_has_not_trained_is_not_cut(trained, tiny_llama, tmp_path) -> None:
    strategy, model = trained(min_r=2)
    for b in (1, R + 1, 2.5, True):
        with pytest.raises(UserError) as error:
            strategy.cut(model, b)  # type: ignore[arg-type]
        assert str(error.value) == (
            "b must be a whole number from 2 to 6, the ranks that were trained and are still "
            f"there, got {b}."
        )
    load_peft(other := tiny_llama(), save_peft(model, tmp_path))
    with pytest.raises(ValueError, match="adapters were not made by DyLoRA; cut the model that it"):
        strategy.cut(other, 3)
    assert {layer.rank for layer in adapter_layers(other).values()} == {R}
    with pytest.raises(UserError, match="adapters were not made by DyLoRA; cut the model that it"):
        strategy.cut(tiny_llama(), 0)


def test_a_pattern_below_the_lowest_rank_leaves_that_rank_to_cut(trained) -> None:
    strategy, model = trained(min_r=4, target_modules=["q_proj"], rank_pattern={"q_proj": 2})
    with pytest.raises(UserError, match=r"^b must be a whole number from 2 to 2, .* got 4\.$"):
        strategy.cut(model, 4)
    strategy.cut(model, 2)
    assert {layer.rank for layer in adapter_layers(model).values()} == {2}


@pytest.mark.parametrize("min_r", [0, 5])
def test_a_lowest_rank_outside_its_range_is_refused(min_r) -> None:
    with pytest.raises(ValueError, match=f"min_r must lie between 1 and r = 4, got {min_r}"):
        DyLoRA(r=4, min_r=min_r)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"min_r": 2, "frozen": True}, marks=pytest.mark.long),
        pytest.param(
            {"lora_dropout": 0.2, "rank_gate": functools.partial(RankDropout, p=0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(DyLoRA(r=4, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("frozen", [False, True])
def test_two_processes_agree(frozen) -> None:
    check_strategy(DyLoRA(r=4, frozen=frozen), processes=2)
