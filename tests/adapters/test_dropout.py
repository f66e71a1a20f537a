"""Input dropout: what one draw keeps, and which layers share it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_layers
from lightning_peft.adapters.dropout import InputDropout, draw, share_draws
from lightning_peft.strategies import LoRA


@pytest.fixture
def dropped(filled) -> Callable[[int], nn.ModuleList]:
    """Makes layers that drop half of their input, with scaling 1.5."""

    def make(count: int) -> nn.ModuleList:
        bases = [nn.Linear(20, 12).requires_grad_(False) for _ in range(count)]
        return nn.ModuleList(filled(base, 6, 9, lora_dropout=0.5) for base in bases)

    return make


@pytest.mark.parametrize("keep", [1.0, 1 - 1e-7, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("shape", [(100_001,), (7, 11, 1303)])
def test_a_draw_keeps_its_share(keep: float, shape: tuple[int, ...]) -> None:
    drawn = draw(shape, keep, torch.device("cpu")).double()
    assert drawn.shape == shape
    bound = 5 * (keep * (1 - keep) / drawn.numel()) ** 0.5
    assert abs(drawn.mean().item() - keep) <= bound + 1e-7


def test_layers_that_share_an_input_may_share_its_draw(dropped) -> None:
    layers = dropped(3)
    x, other = torch.ones(4, 20), torch.ones(4, 20)

    def masks(x: Tensor) -> list[Tensor]:
        return [layer.dropout.kept(x).mask for layer in layers]

    first, second, _ = masks(x)
    assert not torch.equal(first, second)
    share_draws(layers.modules())
    first, second, third = masks(x)
    assert torch.equal(first, second)
    assert torch.equal(first, third)
    assert not torch.equal(first, masks(other)[0])
    x.add_(1)  # no longer the tensor that it was
    again, shared, _ = masks(x)
    assert not torch.equal(first, again)
    assert torch.equal(again, shared)


def test_a_layer_given_the_same_tensor_again_draws_anew(dropped) -> None:
    layers = dropped(2)
    share_draws(layers.modules())
    x = torch.ones(4, 20)
    first, shared = (layer.dropout.kept(x).mask for layer in layers)
    again, shared_again = (layer.dropout.kept(x).mask for layer in layers)
    assert torch.equal(first, shared)
    assert torch.equal(again, shared_again)
    assert not torch.equal(first, again)


def test_a_shared_draw_gives_each_layer_its_own_gradients(dropped, run_layer, assert_same) -> None:
    torch.manual_seed(0)
    layers = dropped(2)
    for layer in layers:
        nn.init.normal_(layer.lora_B)
    share_draws(layers.modules())
    x = torch.randn(3, 20)
    ours = run_layer(layers, lambda x: sum(layer(x) for layer in layers), x)
    torch.manual_seed(3)
    keep = layers[0].dropout.kept(x.clone()).mask

    def formula(x: Tensor) -> Tensor:
        dropped = x * keep * 2
        changes = (dropped @ layer.lora_A.T @ layer.lora_B.T for layer in layers)
        return sum(layer.base(x) + 1.5 * c for layer, c in zip(layers, changes, strict=True))

    assert_same(ours, run_layer(layers, formula, x), 1e-5)


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


def test_what_is_kept_is_one_byte_for_each_element_and_scaled() -> None:
    dropout, x = InputDropout(0.25).train(), torch.randn(6, 8)
    torch.manual_seed(0)
    kept = dropout.kept(x)
    assert kept.mask.dtype == torch.uint8
    assert set(kept.mask.unique().tolist()) == {0, 1}
    assert kept.scale == pytest.approx(4 / 3)
    torch.manual_seed(0)
    torch.testing.assert_close(dropout(x), x * kept.mask * 4 / 3)
    assert dropout.eval().kept(x) is None
    assert dropout(x) is x
    assert InputDropout(0.0).train().kept(x) is None


def test_a_shared_mask_is_the_same_whether_it_is_found_or_drawn_again() -> None:
    x, layers = torch.ones(5, 6), [InputDropout(0.5).train() for _ in range(2)]
    share_draws(layers)
    torch.manual_seed(1)
    first, found = (layer.kept(x).mask for layer in layers)
    after = torch.rand(1)
    torch.manual_seed(1)
    again = layers[0].kept(x.clone()).mask  # another tensor: drawn anew, from the same place
    assert torch.equal(first, found)
    assert torch.equal(first, again)
    layers[1].kept(x.clone())
    assert torch.equal(torch.rand(1), after)  # who finds a mask takes a number too
