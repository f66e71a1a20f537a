"""A configuration names the same modules here as in PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from lightning_peft.adapters.peft_config import PeftConfig
from lightning_peft.adapters.peft_targets import saved_by, targets_of

PATH = Path("adapter_config.json")


def settings_of(**changes: Any) -> PeftConfig:
    plain: dict[str, Any] = {
        "path": PATH,
        "r": 2,
        "lora_alpha": 2,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": ["q"],
        "exclude_modules": None,
        "modules_to_save": [],
        "layers_to_transform": None,
        "layers_pattern": [],
    }
    return PeftConfig(**{**plain, **changes})


def nested(names: list[str]) -> nn.Module:
    """A model whose linears have these full names."""
    model = nn.Module()
    for name in names:
        node = model
        *path, last = name.split(".")
        for part in path:
            if not hasattr(node, part):
                node.add_module(part, nn.Module())
            node = getattr(node, part)
        node.add_module(last, nn.Linear(2, 2))
    return model


NAMES = ["q", "v", "xq", "h.0.q", "h.0.v", "h.1.q", "h.1.attn.q", "h.10.xq", "m.h.1.e.0.v", "head"]


def in_peft(config: PeftConfig, model: nn.Module) -> list[str]:
    """The same by PEFT's own function."""
    theirs = LoraConfig(
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        modules_to_save=config.modules_to_save or None,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern or None,
    )
    found = {n: check_target_module_exists(theirs, n) for n, _ in model.named_modules() if n}
    return [n for n, hit in found.items() if hit and not isinstance(hit, _ExcludedModule)]


ends = st.sampled_from(["q", "v", "xq", "h.0.q", "0.q", "attn.q", "e.0.v", "head", "h.1.attn.q"])
patterns = st.sampled_from([r".*\.q", r"h\.\d+\..*", "q|v", r".*attn.*", "(.*)*(.*)*Q"])


@given(
    targets=st.one_of(st.lists(ends, min_size=1, max_size=3), patterns),
    excluded=st.one_of(st.none(), st.lists(ends, max_size=2), patterns),
    saved=st.lists(st.sampled_from(["head", "v", "attn"]), max_size=2),
    layers=st.one_of(st.none(), st.lists(st.sampled_from([0, 1, 10]), min_size=1, max_size=2)),
    pattern=st.sampled_from([[], ["h"], ["e"], ["m.h", "h"]]),
)
@settings(derandomize=True, deadline=None, max_examples=300)
def test_targets_are_those_of_peft(
    targets: Any, excluded: Any, saved: list[str], layers: Any, pattern: list[str]
) -> None:
    evil = "(.*)*(.*)*Q"
    if isinstance(targets, str):
        layers, pattern = None, []
    if layers is None:
        pattern = []
    config = settings_of(
        target_modules=targets,
        exclude_modules=excluded or None,
        modules_to_save=saved,
        layers_to_transform=layers,
        layers_pattern=pattern,
    )
    model = nested(NAMES)
    ours = list(targets_of(config, model))
    if evil in (targets, excluded):  # which PEFT would not end with
        assert targets != evil or ours == []
    else:
        assert ours == in_peft(config, model)


def test_all_linear_is_every_linear_but_the_output(tiny_llama) -> None:
    found = targets_of(settings_of(target_modules="all-linear"), tiny_llama())
    assert len(found) == 14
    assert "lm_head" not in found


def test_saved_modules_are_taken_by_the_end_of_a_name_with_or_without_a_dot() -> None:
    config = settings_of(modules_to_save=["q", "head", "gone"])
    found = {entry: list(modules) for entry, modules in saved_by(config, nested(NAMES))}
    assert found["q"] == ["q", "xq", "h.0.q", "h.1.q", "h.1.attn.q", "h.10.xq"]
    assert (found["head"], found["gone"]) == (["head"], [])


def test_a_pattern_that_does_not_end_is_refused_with_file_and_key() -> None:
    config = settings_of(target_modules="(.|..|...)+[A-Z]")
    with pytest.raises(ValueError, match=r"adapter_config.json has target_modules: the regular"):
        targets_of(config, nested(["a" * 60]))
