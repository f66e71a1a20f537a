"""Ranks and alphas that differ by layer, as PEFT reads its patterns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from lightning_peft.adapters import lora_layers, save_peft
from lightning_peft.errors import UserError
from lightning_peft.strategies import (
    AdaLoRA,
    AdapterStrategy,
    DoRA,
    DropLoRA,
    LoRA,
    LoRADrop,
    PiSSA,
    PrunedLoRA,
    SparseAdapter,
    TiedLoRA,
    VeRA,
)
from lightning_peft.testing import check_strategy, tiny_llama

RANKS = {"q_proj": 2, r"layers\.0\..*_proj": 3, "down_proj": 5}
ALPHAS = {r".*mlp.up_proj": 1.5, "q_proj": 4}


def test_each_layer_has_the_rank_and_scaling_that_peft_gives_it() -> None:
    model = tiny_llama()
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", rank_pattern=RANKS, alpha_pattern=ALPHAS
    )
    peft = get_peft_model(copy.deepcopy(model), config)
    LoRA(r=4, lora_alpha=8, rank_pattern=RANKS, alpha_pattern=ALPHAS).attach(model)
    layers = lora_layers(model)
    assert len({layer.rank for layer in layers.values()}) == 4
    for name, layer in layers.items():
        theirs = peft.get_submodule(f"base_model.model.{name}")
        assert layer.rank == theirs.r["default"], name
        assert layer.scaling == theirs.scaling["default"], name


@pytest.mark.parametrize(
    "strategy",
    [
        LoRA(r=4, rank_pattern=RANKS, alpha_pattern=ALPHAS),
        pytest.param(
            DropLoRA(r=4, mask="step", rank_pattern=RANKS, alpha_pattern=ALPHAS),
            marks=pytest.mark.long,
        ),
        PrunedLoRA(r=6, target_r=3, start_step=1, prune_every=2, rank_pattern=RANKS),
        PrunedLoRA(r=6, target_r=3, prune_every=2, allocation="global", rank_pattern=RANKS),
        LoRADrop(r=4, threshold=0.5, rank_pattern={r"layers\.0\..*": 2}),
        DoRA(r=4, rank_pattern=RANKS),
        pytest.param(PiSSA(r=4, rank_pattern=RANKS), marks=pytest.mark.long),
        AdaLoRA(r=4, target_r=3, total_step=12, tfinal=3, rank_pattern=RANKS),
        pytest.param(SparseAdapter(r=4, rank_pattern=RANKS), marks=pytest.mark.long),
        TiedLoRA(r=4, alpha_pattern=ALPHAS),
        pytest.param(VeRA(r=16, alpha_pattern=ALPHAS), marks=pytest.mark.long),
    ],
    ids=lambda strategy: type(strategy).__name__,
)
def test_every_method_keeps_its_promises_with_them(strategy: AdapterStrategy) -> None:
    check_strategy(strategy)


def test_a_layer_that_begins_below_the_target_loses_nothing() -> None:
    model = tiny_llama()
    strategy = PrunedLoRA(r=6, target_r=4, prune_every=1, rank_pattern={"q_proj": 2})
    strategy.attach(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    tokens = torch.arange(12)[None]
    for step in range(3):
        model(input_ids=tokens, labels=tokens).loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
    ranks = {name.rsplit(".", 1)[1]: layer.rank for name, layer in lora_layers(model).items()}
    assert ranks.pop("q_proj") == 2
    assert set(ranks.values()) == {4}


def test_what_is_exported_has_the_same_pattern(tmp_path: Path) -> None:
    from peft import PeftModel

    base, model = tiny_llama(), tiny_llama()
    LoRA(r=4, rank_pattern=RANKS, alpha_pattern=ALPHAS, init_lora_weights=False).attach(model)
    save_peft(model, tmp_path)
    tokens = torch.arange(12)[None]
    theirs = PeftModel.from_pretrained(base, str(tmp_path)).eval()
    torch.testing.assert_close(model.eval()(tokens).logits, theirs(tokens).logits)


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (
            lambda: LoRA(rank_pattern={"qproj": 4}),
            "rank_pattern: 'qproj' matches no adapted layer; there are "
            "model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj, "
            "model.layers.0.self_attn.v_proj, …",
        ),
        (
            lambda: VeRA(rank_pattern={"q_proj": 4}),
            "rank_pattern: VeRA makes model.layers.0.self_attn.q_proj of rank 256 and not 4, "
            "since its ranks follow a rule of its own.",
        ),
        (
            lambda: LoRA(alpha_pattern={"(": 4}),
            "alpha_pattern: '(' is not a regular expression: missing ), unterminated subpattern.",
        ),
        (
            lambda: LoRA(rank_pattern={"q_proj": 0}),
            "rank_pattern 'q_proj' must be at least 1, got 0.",
        ),
        (
            lambda: LoRA(rank_pattern={"q_proj": 4.0}),  # type: ignore[dict-item]
            "rank_pattern 'q_proj' must be a whole number, got 4.0.",
        ),
        (
            lambda: LoRA(alpha_pattern={"q_proj": "8"}),  # type: ignore[dict-item]
            "alpha_pattern 'q_proj' must be a finite number above zero, got '8'.",
        ),
        (
            lambda: LoRA(alpha_pattern={"q_proj": True}),
            "alpha_pattern 'q_proj' must be a finite number above zero, got True.",
        ),
        (
            lambda: LoRA(alpha_pattern={"q_proj": -2}),
            "alpha_pattern 'q_proj' must be a finite number above zero, got -2.",
        ),
        (
            lambda: LoRA(alpha_pattern={"q_proj": float("nan")}),
            "alpha_pattern 'q_proj' must be a finite number above zero, got nan.",
        ),
        (
            lambda: LoRA(lora_alpha="16"),  # type: ignore[arg-type]
            "lora_alpha must be a finite number above zero, got '16'.",
        ),
    ],
)
def test_a_pattern_that_does_not_hold_is_refused(strategy, said) -> None:
    with pytest.raises(UserError) as error:
        strategy().attach(tiny_llama())
    assert str(error.value) == said
