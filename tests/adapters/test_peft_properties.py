"""Whatever is saved in PEFT's format comes back, here and in PEFT, from any model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_peft import load_peft, save_peft
from lightning_peft.adapters import LoRALinear, adapter_layers, keep_components
from lightning_peft.adapters.gates import RankScale

FILES = ("adapter_config.json", "adapter_model.safetensors")
# Names that are ends of others, with dots and without, and that a pattern would read otherwise.
NAMES = ("q", "v", "xq", "deep.q", "deep.xq", "h.0.q", "h.1.q", "h.10.q", "q_proj.q", "h.0.a+b")


class Sum(nn.Module):
    """Linears of any shapes and names, whose outputs are put side by side."""

    def __init__(self, shapes: dict[str, tuple[int, int, bool]], seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.places = list(shapes)
        for name, (fan_in, fan_out, bias) in shapes.items():
            node: nn.Module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(node, part):
                    node.add_module(part, nn.Module())
                node = node.get_submodule(part)
            linear = nn.Linear(fan_in, fan_out, bias)
            with torch.no_grad():
                for parameter in linear.parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            node.add_module(last, linear)

    def forward(self, x: Tensor) -> Tensor:
        parts = []
        for name in self.places:
            module: Any = self.get_submodule(name)
            width = next(m for m in module.modules() if isinstance(m, nn.Linear)).in_features
            parts.append(module(x[:, :width]))
        return torch.cat(parts, 1)


@dataclass(frozen=True)
class Case:
    """A model, and the adapters that are put on it: rank, alpha, rsLoRA, gate and dropout."""

    shapes: dict[str, tuple[int, int, bool]]
    adapters: dict[str, tuple[int, float, bool, bool, float]]
    removed: dict[str, int]
    shared: bool
    saved: tuple[str, ...]
    seed: int

    def base(self) -> Sum:
        return Sum(self.shapes, self.seed)

    def adapted(self) -> Sum:
        torch.manual_seed(self.seed)
        model = self.base().requires_grad_(False).eval()
        first: dict[Any, LoRALinear] = {}
        for name, (r, alpha, rslora, gated, dropout) in self.adapters.items():
            gate = RankScale(r, 1.0) if gated else None
            base = model.get_submodule(name)
            layer = LoRALinear(base, r, alpha, dropout, rslora, gate)
            layer.reset_parameters(False)
            if gate is not None:
                nn.init.normal_(gate.values, 1.0, 0.5)
            model.set_submodule(name, layer.eval())
            key = (layer.in_features, layer.out_features, r)
            if self.shared and key in first and name not in self.removed:
                layer.share_with(first[key])
            elif name not in self.removed:
                first[key] = layer
        for name, rank in self.removed.items():
            layer = adapter_layers(model)[name]
            keep_components(layer, torch.randperm(layer.rank or 0)[:rank].sort().values)
        for name in self.saved:
            for parameter in model.get_submodule(name).requires_grad_(True).parameters():
                nn.init.normal_(parameter)
        return model


@st.composite
def cases(draw: Any, saves: bool = False) -> Case:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=6, unique=True))
    # A linear holds no other module.
    names = [n for n in names if not any(other.startswith(f"{n}.") for other in names)]
    size = st.integers(1, 6)
    shapes = {name: (draw(size), draw(size), draw(st.booleans())) for name in names}
    saved = ()
    if saves:
        shapes |= {"head": (3, 2, True), "ahead": (2, 2, False)}
        saved = draw(st.sampled_from([(), ("head",), ("ahead",), ("head", "ahead")]))
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    alpha = st.one_of(st.integers(1, 40), st.floats(0.05, 50))
    adapters = {
        name: (
            draw(st.integers(1, 7)),
            draw(alpha),
            draw(st.booleans()),
            draw(st.booleans()),
            draw(st.sampled_from([0.0, 0.3])),
        )
        for name in chosen
    }
    removed = {
        name: draw(st.integers(0, r))
        for name, (r, *_) in adapters.items()
        if name != chosen[0] and draw(st.booleans())
    }
    return Case(shapes, adapters, removed, draw(st.booleans()), saved, draw(st.integers(0, 99)))


def in_peft(base: nn.Module, folder: str) -> nn.Module:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base, folder).eval().base_model.model


def check_round_trip(case: Case) -> None:
    model, x = case.adapted(), torch.randn(4, 6)
    with torch.no_grad(), TemporaryDirectory() as first, TemporaryDirectory() as second:
        expected = model(x)
        save_peft(model, first)
        loaded = load_peft(case.base().eval(), first)
        close = {"rtol": 1e-5, "atol": 1e-5 * max(1.0, float(expected.abs().max()))}
        torch.testing.assert_close(loaded(x), expected, **close)
        torch.testing.assert_close(in_peft(case.base(), first)(x), expected, **close)
        alive = {name: layer.rank for name, layer in adapter_layers(model).items() if layer.rank}
        assert {name: layer.rank for name, layer in adapter_layers(loaded).items()} == alive
        for name in alive:
            scaling = adapter_layers(model)[name].scaling  # type: ignore[operator]
            assert math.isclose(adapter_layers(loaded)[name].scaling, scaling, rel_tol=1e-14)  # type: ignore[arg-type]
        # What was loaded is what was saved, to the byte.
        save_peft(loaded, second)
        for file in FILES:
            assert (Path(first) / file).read_bytes() == (Path(second) / file).read_bytes(), file


fast = settings(
    derandomize=True,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow],
)


@given(cases())
@fast
def test_any_layers_come_back(case: Case) -> None:
    check_round_trip(case)


@given(cases(saves=True))
@fast
def test_modules_that_train_in_full_come_back(case: Case) -> None:
    check_round_trip(case)


@given(st.integers(1, 64), st.integers(1, 64), st.booleans(), st.data())
@fast
def test_what_peft_writes_comes_back(r: int, alpha: int, rslora: bool, data: Any) -> None:
    from peft import LoraConfig, get_peft_model

    numbers = st.dictionaries(st.sampled_from(["q", "h.0.q", ".*q", "^v", "v"]), st.integers(1, 9))
    config = LoraConfig(
        r=r,
        lora_alpha=alpha,
        use_rslora=rslora,
        target_modules=data.draw(st.sampled_from([["q", "v"], ["q"], ".*(q|v)"])),
        rank_pattern=data.draw(numbers),
        alpha_pattern=data.draw(numbers),
        init_lora_weights=False,
    )
    shapes = {"q": (3, 4, True), "h.0.q": (4, 2, False), "h.1.q": (2, 2, True), "v": (5, 3, True)}
    make: Callable[[], Sum] = lambda: Sum(shapes, 0)  # noqa: E731
    theirs, x = get_peft_model(make(), config), torch.randn(3, 5)
    with torch.no_grad(), TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(folder)
        # PEFT sorts the patterns as it writes them, and then takes the first that matches.
        try:
            again = in_peft(make(), folder)
        except RuntimeError:  # ranks that the tensors do not have
            with pytest.raises(ValueError, match="two files are not of one adapter, or rank_patt"):
                load_peft(make(), folder)
            return
        ours = load_peft(make().eval(), folder)
        torch.testing.assert_close(ours(x), again(x), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_a_case_is_the_same_for_its_seed(seed: int) -> None:
    case = Case({"q": (3, 2, True)}, {"q": (2, 3.0, True, True, 0.0)}, {}, False, (), seed)
    first, second = case.adapted().state_dict(), case.adapted().state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
