"""Sparse Adapter: which values are kept, and that the others stay at zero."""

from __future__ import annotations

import pytest
import torch

from lightning_peft import trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.strategies import SparseAdapter
from lightning_peft.strategies.sparse_adapter import keep_highest
from lightning_peft.testing import check_strategy


def test_the_values_of_highest_weight_times_gradient_are_kept(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    strategy = SparseAdapter(r=4, sparsity=0.6, start_step=2)
    strategy.attach(model)
    params = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in params)
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1)
    for step in range(6):
        optimizer.zero_grad()
        model(**random_batch(step)).loss.backward()
        if step == 2:
            scores = torch.cat([(p * p.grad).abs().flatten() for p in params])
            threshold = scores.sort(descending=True).values[total - int(0.6 * total) - 1]
            chosen = [(p * p.grad).abs() >= threshold for p in params]
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
    assert trainable_parameters(model) == total - int(0.6 * total)
    for parameter, kept in zip(params, chosen, strict=True):
        assert (parameter[~kept] == 0).all()
        state = optimizer.state[parameter]
        assert (state["exp_avg"][~kept] == 0).all()
        assert (state["exp_avg_sq"][~kept] == 0).all()
    masks = [mask for layer in adapter_layers(model).values() for _, mask in layer.masked()]
    assert all(torch.equal(mask, kept) for mask, kept in zip(masks, chosen, strict=True))
    assert {d["event"] for d in strategy.decisions} == {"masked"}


def test_ties_do_not_change_the_count() -> None:
    kept = keep_highest([torch.ones(3), torch.tensor([2.0, 1.0])], 0.5)
    assert [k.tolist() for k in kept] == [[True, True, False], [True, False]]


@pytest.mark.parametrize(("key", "value"), [("sparsity", 1.0), ("start_step", 0)])
def test_numbers_outside_their_range_are_refused(key, value) -> None:
    with pytest.raises(ValueError, match=f"{key} must .*, got {value}"):
        SparseAdapter(**{key: value})


def test_keeps_a_strategys_promises() -> None:
    check_strategy(SparseAdapter(r=4, start_step=3))
