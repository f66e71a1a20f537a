"""Names are looked up among the classes there are, and wrong ones get a hint."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.settings.names import find_class, hint_at, shown_names, subclasses
from lightning_peft.strategies import AdapterStrategy, DropLoRA, LoRA


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lora_alpa", "did you mean --lora_alpha?"),
        ("xyz", "there are lora_alpha, lr, r."),
        ("rank", "did you mean --r?"),
        ("learning_rate", "did you mean --lr?"),  # by its initials
        ("R", "did you mean --r?"),
    ],
)
def test_a_hint_is_the_nearest_name_or_all(name: str, hint: str) -> None:
    assert hint_at(name, ["lora_alpha", "r", "lr"], before="--") == hint


def test_a_hint_shows_what_it_is_told_to() -> None:
    assert hint_at("xyz", ["aaa", "bbb"], shown=["bbb"]) == "there are bbb."


def test_an_abstract_or_private_class_is_no_choice() -> None:
    class Base:
        pass

    class Public(Base):
        pass

    class _Private(Base):
        pass

    assert subclasses(Base) == {"Base": Base, "Public": Public}


def test_own_classes_are_shown_and_the_libraries_where_there_are_no_others() -> None:
    assert {"DropLoRA", "LoRA"} <= set(shown_names(AdapterStrategy))
    assert "AdapterStrategy" not in shown_names(AdapterStrategy)
    assert "StepLR" in shown_names(torch.optim.lr_scheduler.LRScheduler)


def test_a_class_is_found_by_its_name_and_by_its_path() -> None:
    assert find_class("model.adapter", "DropLoRA", AdapterStrategy) is DropLoRA
    assert find_class("model.adapter", "lightning_peft.strategies.LoRA", AdapterStrategy) is LoRA


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("DropLora", "model.adapter: 'DropLora' is no AdapterStrategy; did you mean DropLoRA?"),
        ("no.such.LoRa", r"cannot be imported \(No module named 'no'\); did you mean LoRA\?"),
        ("lightning_peft.Nothing", "cannot be imported .*has no attribute 'Nothing'"),
    ],
)
def test_a_name_of_no_class_is_refused(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        find_class("model.adapter", name, AdapterStrategy)
