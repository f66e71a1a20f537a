"""Watching what enters the adapted layers: attended tokens, once for each forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft.adapters import LoRALinear, adapter_layers, observe_inputs


class Model(nn.Module):
    """Two adapted linears, which may be recomputed, or the second called twice."""

    def __init__(self, recompute: bool = False, twice: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = LoRALinear(nn.Linear(3, 3), 2, 2)
        self.second = LoRALinear(nn.Linear(3, 3), 2, 2)
        self.recompute, self.twice = recompute, twice

    def forward(self, x: Tensor, attention_mask: Any = None, position_ids: Any = None) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return self.second(self.first(x).tanh())

        y = checkpoint(inner, x, use_reentrant=False) if self.recompute else inner(x)
        return self.second(y) if self.twice else y


class Seen(dict[str, list[Tensor]]):
    """An observer that keeps all that it is given."""

    def __call__(self, name: str, layer: Any, x: Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert isinstance(layer, LoRALinear)
        self.setdefault(name, []).append(x)


X = torch.arange(24.0).view(2, 4, 3)


def test_every_layer_is_seen_with_what_enters_it() -> None:
    model, seen = Model(), Seen()
    with observe_inputs(model, seen):
        model(X)
    assert list(seen) == ["first", "second"]
    assert torch.equal(seen["first"][0], X.view(8, 3))
    torch.testing.assert_close(seen["second"][0], model.first(X).tanh().detach().view(8, 3))
    model(X)
    assert len(seen["first"]) == 1  # the block has ended


def test_start_and_stop_do_the_same_as_a_block() -> None:
    model, block, hand = Model(), Seen(), Seen()
    with observe_inputs(model, block):
        model(X)
    watch = observe_inputs(model, hand)
    model(X)
    assert not hand
    assert watch.start() is watch
    model(X)
    watch.stop()
    model(X)
    watch.stop()  # once more does no harm
    assert hand.keys() == block.keys()
    for name, tensors in block.items():
        assert len(tensors) == len(hand[name]) == 1
        assert torch.equal(tensors[0], hand[name][0])
    for module in (model, *adapter_layers(model).values()):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


def test_padding_does_not_count() -> None:
    model, seen = Model(), Seen()
    mask = torch.tensor([[0, 1, 1, 0], [1, 1, 1, 0]])  # on the left and on the right
    with observe_inputs(model, seen):
        model(X, attention_mask=mask)
    assert torch.equal(seen["first"][0], X[mask.bool()])
    assert len(seen["second"][0]) == 5


@pytest.mark.parametrize(
    "mask", [None, torch.ones(2, 5), torch.ones(2, 1, 4, 4)], ids=["none", "shape", "4d"]
)
def test_without_a_mask_of_its_shape_every_token_counts(mask) -> None:
    model, seen = Model(), Seen()
    with observe_inputs(model, seen):
        model(X, attention_mask=mask)
    assert len(seen["first"][0]) == 8


def test_of_packed_rows_the_documents_of_a_single_token_do_not_count() -> None:
    model, seen = Model(), Seen()
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])  # the last token is padding
    with observe_inputs(model, seen):
        model(X, position_ids=positions)
    assert torch.equal(seen["first"][0], X.view(8, 3)[:7])


def test_a_recomputation_is_no_second_forward() -> None:
    model, seen = Model(recompute=True), Seen()
    with observe_inputs(model, seen):
        for _ in range(2):
            model(X.clone().requires_grad_()).sum().backward()
    assert {name: len(tensors) for name, tensors in seen.items()} == {"first": 2, "second": 2}


def test_a_layer_that_is_called_twice_is_seen_once() -> None:
    model, seen = Model(twice=True), Seen()
    with observe_inputs(model, seen):
        model(X)
    torch.testing.assert_close(seen["second"][0], model.first(X).tanh().detach().view(8, 3))
    assert len(seen["second"]) == 1


def test_the_observer_computes_in_full_precision_under_autocast() -> None:
    model, dtypes = Model(), []

    def add(name: str, layer: Any, x: Tensor) -> None:
        dtypes.append((layer.lora_A @ x.float().T).dtype)

    with torch.autocast("cpu", torch.bfloat16), observe_inputs(model, add):
        model(X)
    assert dtypes == [torch.float32] * 2


def test_an_error_in_the_model_ends_the_watch_and_the_forward() -> None:
    model, seen = Model(), Seen()
    watch = observe_inputs(model, seen).start()
    with pytest.raises(RuntimeError):
        model(torch.ones(2, 4, 5))
    seen.clear()
    model.first(X)  # outside of the model's forward
    assert not seen
    watch.stop()
