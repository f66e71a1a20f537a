"""EVA against PEFT's own on the same batches, and against the inputs' singular vectors."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.observe import observe_inputs
from lightning_peft.errors import UserError
from lightning_peft.strategies import LoRA, RankDropout
from lightning_peft.strategies.eva import EVA
from lightning_peft.testing import check_strategy

# No two of them read the same input, so that no shares are equal.
TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


def prepared(strategy: EVA, model: Any, batches: list[Any]) -> Any:
    torch.manual_seed(0)
    strategy.attach(model)
    strategy.prepare(model, lambda share: batches, lambda batch: model(**batch).loss)
    return model


def pefts(model: Any, batches: list[Any], **eva: Any) -> Any:
    """PEFT's model after its initialisation from these batches."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(use_label_mask=False, **eva),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config)
        peft.initialize_lora_eva_weights(theirs, batches, show_progress_bar=False)
    return theirs


def their_layers(theirs: Any, names: Any) -> dict[str, Any]:
    return {name: theirs.get_submodule(f"base_model.model.{name}") for name in names}


@pytest.mark.parametrize("eva", [{}, {"rho": 1.5}, {"adjust_scaling_factors": False}])
def test_ranks_scalings_and_a_are_pefts(eva, tiny_llama, random_batch) -> None:
    # With one batch PEFT's decomposition is exact: its second pass sees the same rows again.
    batches = [random_batch(0, rows=8, length=20)]
    strategy = EVA(r=8, target_modules=TARGETS, **eva)
    ours = prepared(strategy, tiny_llama(), batches)
    names = strategy.allotted
    others = their_layers(pefts(tiny_llama(), batches, **eva), names)
    ranks = {name: getattr(m, "r", {"default": 0})["default"] for name, m in others.items()}
    assert {name: entry["rank"] for name, entry in names.items()} == ranks
    assert sum(ranks.values()) == 8 * len(names)
    assert len(set(ranks.values())) > 2
    for name, layer in adapter_layers(ours).items():
        A = others[name].lora_A["default"].weight
        torch.testing.assert_close(layer.lora_A, A, rtol=1e-3, atol=1e-3)
        assert layer.scaling == others[name].scaling["default"]


def test_over_several_batches_pefts_subspace_comes_near(tiny_llama, random_batch) -> None:
    batches = [random_batch(seed, rows=8, length=20) for seed in range(4)]
    strategy = EVA(r=8, rho=1, target_modules=TARGETS)
    ours = prepared(strategy, tiny_llama(), batches)
    others = their_layers(pefts(tiny_llama(), batches, rho=1.0), strategy.allotted)
    for name, layer in adapter_layers(ours).items():
        cosines = torch.linalg.svdvals(layer.lora_A @ others[name].lora_A["default"].weight.T)
        # PEFT truncates to r directions after each batch, and loses some of the lesser ones.
        assert layer.rank == 8
        assert cosines.square().mean() > 0.8


def test_a_explains_the_most_variance_of_attended_inputs(tiny_llama, random_batch) -> None:
    batches = [random_batch(seed, rows=3) for seed in range(3)]
    ours = prepared(EVA(r=4, rho=1, target_modules=TARGETS), tiny_llama(), batches)
    model, rows = tiny_llama(), {}
    LoRA(r=1, target_modules=TARGETS).attach(model)
    with torch.no_grad(), observe_inputs(model, lambda n, m, x: rows.setdefault(n, []).append(x)):
        for batch in batches:
            model(**batch)
    for name, layer in adapter_layers(ours).items():
        x = torch.cat(rows[name]).double()
        assert len(x) == sum(int(batch["attention_mask"].sum()) for batch in batches)
        right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:4]
        overlap = (right @ layer.lora_A.double().T).abs()
        torch.testing.assert_close(overlap, torch.eye(4).double(), rtol=0, atol=1e-4)
        assert not layer.lora_B.any()


def test_a_layer_may_lose_all_of_its_components(tiny_llama, random_batch) -> None:
    strategy = EVA(r=1, rho=30, target_modules=TARGETS)
    model = prepared(strategy, tiny_llama(), [random_batch(0)])
    ranks = {name: entry["rank"] for name, entry in strategy.allotted.items()}
    assert sum(ranks.values()) == len(ranks)
    assert 0 in ranks.values()
    assert list(adapter_layers(model)) == [name for name, rank in ranks.items() if rank]
    layers = adapter_layers(model).values()
    assert trainable_parameters(model) == sum(
        m.rank * (m.in_features + m.out_features) for m in layers
    )
    kept = prepared(EVA(r=2, rho=30, min_r=1), tiny_llama(), [random_batch(0)])
    assert min(layer.rank for layer in adapter_layers(kept).values()) == 1


def test_no_layer_gets_more_than_it_has_inputs(tiny_llama, random_batch) -> None:
    model = prepared(EVA(r=20, rho=4, target_modules=TARGETS), tiny_llama(), [random_batch(0)])
    layers = adapter_layers(model)
    assert sum(layer.rank for layer in layers.values()) == 20 * 8
    assert all(layer.rank <= layer.in_features for layer in layers.values())


def test_a_rank_above_the_inputs_is_refused_with_what_would_do(tiny_llama) -> None:
    sentence = (
        "budget must lie between 0 (min_r = 0 in each of 2 layers) and 64 (the most that they may "
        "have), got 80, the sum of all r; give another budget, or change r, min_r or rho."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        EVA(r=40, target_modules=["q_proj"]).attach(tiny_llama())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rho": 0.5}, "rho must be a finite number of at least 1, got 0.5."),
        ({"rho": math.nan}, "rho must be a finite number of at least 1, got nan."),
        ({"rho": math.inf}, "rho must be a finite number of at least 1, got inf."),
        ({"max_r": 8}, "max_r = 8: EVA bounds ranks by rho times r; give rho = max_r / r."),
        ({"sample_ratio": 2}, "sample_ratio must lie in (0, 1], got 2."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        EVA(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        pytest.param({"rho": 1}, marks=pytest.mark.long),
        pytest.param(
            {"lora_dropout": 0.2, "rank_gate": lambda r: RankDropout(r, 0.3)},
            marks=pytest.mark.long,
        ),
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(EVA(r=4, **arguments))


def test_two_processes_come_to_one_allotment() -> None:
    check_strategy(EVA(r=4), processes=2)
