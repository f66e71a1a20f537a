"""What every form inherits: all of it follows from ``forward`` and ``merged_weight``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import (
    AdaptedLayer,
    LoRALinear,
    PeftForm,
    adapter_state_dict,
    keep_components,
    load_adapter_state,
    merge,
    save_peft,
)


class InputScale(AdaptedLayer):
    """``y = W (v ⊙ x) + b``: as small as a form can be."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.v = nn.Parameter(torch.ones(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(self.v * x)

    def merged_weight(self, base_weight: Tensor) -> Tensor:
        return base_weight * self.v.detach()


class Pairs(InputScale):
    """Two parameters with a slice for each component."""

    def __init__(self, base: nn.Module, r: int) -> None:
        super().__init__(base)
        self.r = self.rank = r
        self.left, self.right = nn.Parameter(torch.ones(r, 3)), nn.Parameter(torch.ones(2, r))

    def components(self) -> list[tuple[nn.Parameter, int]]:
        return [(self.left, 0), (self.right, 1)]


@pytest.fixture
def layer() -> InputScale:
    torch.manual_seed(0)
    layer = InputScale(nn.Linear(5, 4).requires_grad_(False))
    nn.init.normal_(layer.v)
    return layer


def test_the_change_and_its_norm_are_the_naive_ones(layer) -> None:
    W, x = layer.base.weight.detach(), torch.randn(2, 6, 5)
    delta = torch.stack([W[:, i] * (layer.v[i].item() - 1) for i in range(5)], 1)
    torch.testing.assert_close(layer.delta_weight(), delta)
    changes = layer(x) - layer.base(x)
    torch.testing.assert_close(layer.delta_sq_norm(x), changes.detach().square().sum(-1))
    assert layer.delta_sq_norm(x).shape == (2, 6)
    assert not layer.delta_sq_norm(x).requires_grad


def test_the_norm_is_measured_in_the_adapters_precision() -> None:
    layer = InputScale(nn.Linear(5, 4, dtype=torch.bfloat16))
    nn.init.constant_(layer.v, 2.0)
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    assert layer.delta_weight().dtype == torch.float32
    expected = (x.float() @ layer.base.weight.float().T).square().sum(-1)
    torch.testing.assert_close(layer.delta_sq_norm(x), expected.detach())


def test_it_shows_its_bases_sizes_and_owns_what_is_not_the_bases(layer) -> None:
    assert (layer.in_features, layer.out_features) == (5, 4)
    assert layer.weight is layer.base.weight
    assert layer.bias is layer.base.bias
    assert InputScale(nn.Linear(5, 4, bias=False)).bias is None
    assert [id(p) for p in layer.own_parameters()] == [id(layer.v)]


def test_a_form_without_ranks_says_so(layer, tmp_path) -> None:
    assert (layer.r, layer.rank, layer.gate) == (None, None, None)
    assert layer.components() == []
    assert layer.peft() is None
    with pytest.raises(ValueError, match="^a InputScale has no components that could be removed.$"):
        keep_components(layer, torch.tensor([0]))
    with pytest.raises(ValueError, match="^PEFT has no form for InputScale, so there is no adapte"):
        save_peft(nn.Sequential(layer), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_all_values_train_but_those_of_dead_components(layer) -> None:
    assert layer.trained_values(layer.v) == 5
    pairs = Pairs(nn.Linear(5, 4).requires_grad_(False), r=4)
    counts = [pairs.trained_values(p) for p in (pairs.v, pairs.left, pairs.right)]
    assert counts == [5, 12, 8]
    keep_components(pairs, torch.tensor([1]), resize=False)  # tensors keep their size
    assert [pairs.trained_values(p) for p in (pairs.v, pairs.left, pairs.right)] == [5, 3, 2]
    assert trainable_parameters(nn.Sequential(pairs)) == 10
    keep_components(pairs, torch.tensor([], dtype=torch.long), resize=True)
    assert [pairs.trained_values(p) for p in (pairs.v, pairs.left, pairs.right)] == [5, 0, 0]


def test_layers_that_share_their_first_parameter_have_one_key(layer) -> None:
    other = InputScale(nn.Linear(5, 4))
    assert layer.sharing_key != other.sharing_key
    other.v = layer.v
    assert layer.sharing_key == other.sharing_key
    first, second = (LoRALinear(nn.Linear(5, 4), 2, 2) for _ in range(2))
    assert first.sharing_key != second.sharing_key
    second.share_with(first)
    assert first.sharing_key == second.sharing_key


def test_it_is_saved_loaded_and_merged_like_any_other(layer) -> None:
    model, x = nn.Sequential(layer), torch.randn(3, 5)
    state = adapter_state_dict(model)
    assert {name: value.shape for name, value in state.items()} == {"0.v": (5,)}
    twin = InputScale(nn.Linear(5, 4).requires_grad_(False))
    twin.base.load_state_dict(layer.base.state_dict())
    load_adapter_state(nn.Sequential(twin), state)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    torch.testing.assert_close(merge(model)(x), expected)


def test_a_form_says_forward_and_merged_weight_itself() -> None:
    bare: Any = AdaptedLayer(nn.Linear(5, 4))
    for call in (lambda: bare.merged_weight(bare.weight), lambda: bare.delta_weight()):
        with pytest.raises(NotImplementedError):
            call()
    assert bare.sharing_key == id(bare)  # it has no parameter that could be shared


def test_a_peft_form_is_plain_lora_unless_it_says_more() -> None:
    form = PeftForm({"lora_A.weight": torch.ones(1)})
    assert (form.config, form.shared, form.scaling) == ({}, {}, 1.0)
