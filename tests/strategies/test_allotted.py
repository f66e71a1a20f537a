"""What methods share that allot ranks before training: structure, resume, sample, refusals."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import LoRALinear, adapter_layers
from lightning_peft.errors import UserError
from lightning_peft.strategies import RankDropout
from lightning_peft.strategies.allotted import Allotted, Layers
from lightning_peft.testing import check_strategy

RANKS = [1, 4, 0, 3, 2, 2, 4, 0, 1, 3, 2, 2, 2, 2]


class Known(Allotted):
    """Counts tokens, and has its ranks from elsewhere."""

    def __init__(self, known: list[int] | None = None, **more: Any) -> None:
        super().__init__(**{"r": 2, "min_r": 0, "max_r": 4, **more})
        self.known = RANKS if known is None else known

    def look(self, model: Any, batches: Iterator[Any], loss: Any) -> dict[str, Any]:
        self.batches = list(batches)
        torch.rand(3)  # as dropout would
        return dict.fromkeys(adapter_layers(model), 0)

    def ranks(self, layers: Layers, found: dict[str, Any]) -> list[int]:
        return self.known


def attached(strategy: Allotted, model: Any) -> Any:
    torch.manual_seed(0)
    strategy.attach(model)
    return model


def prepare(strategy: Allotted, model: Any, batches: list[Any]) -> None:
    strategy.prepare(model, lambda share: batches, lambda batch: model(**batch).loss)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"use_rslora": True, "lora_alpha": 3, "init_lora_weights": "gaussian"},
        {"alpha_pattern": {"v_proj": 5}, "rank_gate": lambda r: RankDropout(r, 0.3)},
    ],
)
def test_layers_are_what_they_would_be_if_made_at_their_rank(
    arguments, tiny_llama, random_batch
) -> None:
    strategy = Known(**arguments)
    model = attached(strategy, tiny_llama())
    before = adapter_layers(model)
    parameters = {name: list(layer.own_parameters()) for name, layer in before.items()}
    stream = torch.get_rng_state()
    prepare(strategy, model, [random_batch(0)])
    after = adapter_layers(model)
    torch.set_rng_state(stream)
    for (name, layer), rank in zip(before.items(), RANKS, strict=True):
        if not rank:
            assert name not in after
            assert model.get_submodule(name) is layer.base
            continue
        with torch.random.fork_rng():  # its constructor draws too
            fresh = LoRALinear(layer.base, **strategy.lora_arguments(name=name, r=rank))
        strategy.initialize(fresh)
        torch.testing.assert_close(layer.lora_A, fresh.lora_A, rtol=0, atol=0)
        torch.testing.assert_close(layer.lora_B, fresh.lora_B, rtol=0, atol=0)
        assert (layer.r, layer.rank, layer.max_r) == (fresh.r, fresh.rank, fresh.max_r)
        assert layer.scaling == fresh.scaling
        assert str(layer.gate) == str(fresh.gate)
        # The objects that an optimizer may have already.
        assert parameters[name][0] is next(layer.own_parameters())
    events = [(d["step"], d["event"], d["rank"]) for d in strategy.decisions]
    assert events == [(0, "allotted", rank) for rank in RANKS]


def test_the_count_is_that_of_the_ranks(tiny_llama, random_batch) -> None:
    strategy = Known()
    model = attached(strategy, tiny_llama())
    assert strategy.looks_at_data
    assert strategy.final_parameters(model) is None
    sizes = [layer.in_features + layer.out_features for layer in adapter_layers(model).values()]
    prepare(strategy, model, [random_batch(0)])
    expected = sum(rank * size for rank, size in zip(RANKS, sizes, strict=True))
    assert trainable_parameters(model) == strategy.final_parameters(model) == expected
    assert not strategy.looks_at_data


def test_a_checkpoint_gives_ranks_and_scalings_back(tiny_llama, random_batch) -> None:
    strategy = Known(lora_alpha=3)
    model = attached(strategy, tiny_llama())
    prepare(strategy, model, [random_batch(0)])
    other = Known(lora_alpha=3)
    resumed = attached(other, tiny_llama())
    for _ in range(2):  # some engines ask before they wrap the model, and when they load
        other.restructure(resumed, strategy.state_dict())
    expected = {n: (m.rank, m.r, m.scaling) for n, m in adapter_layers(model).items()}
    assert {n: (m.rank, m.r, m.scaling) for n, m in adapter_layers(resumed).items()} == expected
    other.load_state_dict(strategy.state_dict())
    prepare(other, resumed, [])  # nothing is looked at again
    assert other.decisions == strategy.decisions


def test_a_checkpoint_of_other_ranks_is_refused(tiny_llama, random_batch) -> None:
    states = []
    for known in (RANKS, RANKS[::-1]):
        strategy = Known(known)
        model = attached(strategy, tiny_llama())
        prepare(strategy, model, [random_batch(0)])
        states.append(strategy.state_dict())
    sentence = (
        "the checkpoint was trained with other ranks than those that this Known has allotted; set "
        "trainer.ckpt_path before trainer.fit(), so that no sample is looked at."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        strategy.restructure(model, states[0])


def test_the_sample_is_the_share_that_was_asked_for(tiny_llama) -> None:
    strategy, shares = Known(sample_ratio=0.25, max_batches=3), []
    model = attached(strategy, tiny_llama())
    strategy.prepare(model, lambda share: shares.append(share) or range(9), lambda batch: None)
    assert shares == [0.25]
    assert strategy.batches == [0, 1, 2]
    assert strategy.seen == 3


@pytest.mark.parametrize("batches", [[], [None, None]])
def test_an_empty_sample_is_refused(batches, tiny_llama) -> None:
    strategy = Known()
    model = attached(strategy, tiny_llama())
    with pytest.raises(UserError, match=r"^Known's sample is empty at sample_ratio 0\.1\.$"):
        prepare(strategy, model, batches)


@pytest.mark.parametrize(("budget", "min_r"), [(13, 1), (57, 0)])
def test_a_budget_outside_of_the_bounds_is_refused(budget, min_r, tiny_llama) -> None:
    sentence = (
        f"budget must lie between {14 * min_r} (min_r = {min_r} in each of 14 layers) and 56 (the "
        f"most that they may have), got {budget}; give another budget, or change r, min_r or max_r."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        Known(budget=budget, min_r=min_r).attach(tiny_llama())


def test_ranks_that_make_a_budget_outside_of_the_bounds_are_named(tiny_llama) -> None:
    sentence = (
        "budget must lie between 0 (min_r = 0 in each of 2 layers) and 8 (the most that they may "
        "have), got 10, the sum of all r; give another budget, or change r, min_r or max_r."
    )
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        Known(target_modules=["q_proj"], rank_pattern={"q_proj": 5}).attach(tiny_llama())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"r": 4, "min_r": 5}, "min_r must lie between 0 and r = 4, got 5."),
        ({"r": 4, "min_r": -1}, "min_r must lie between 0 and r = 4, got -1."),
        ({"r": 4, "max_r": 3}, "max_r must be at least r = 4, got 3."),
        ({"sample_ratio": 0}, "sample_ratio must lie in (0, 1], got 0."),
        ({"sample_ratio": 1.5}, "sample_ratio must lie in (0, 1], got 1.5."),
        ({"max_batches": 0}, "max_batches must be at least 1, got 0."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        Known(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"lora_dropout": 0.2, "share_dropout": True, "rank_gate": lambda r: RankDropout(r, 0.3)}],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(Known(**arguments))
