"""Names are looked up among the classes there are, and wrong ones get a hint."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lightning_peft.settings.names import (
    find_class,
    hint_at,
    import_named,
    runs_when_named,
    shown_names,
    subclasses,
)
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
    assert {"AdamW", "GaLoreAdamW"} <= set(shown_names(torch.optim.Optimizer))
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


def test_a_name_may_be_of_one_of_several_classes() -> None:
    assert find_class("k", "SGD", AdapterStrategy, torch.optim.Optimizer) is torch.optim.SGD
    with pytest.raises(ValueError, match="k: 'SGDD' is no AdapterStrategy or Optimizer; did you"):
        find_class("k", "SGDD", AdapterStrategy, torch.optim.Optimizer)


@pytest.mark.parametrize("name", ["os.system", "antigravity.x", "lightning_peft.__main__.main"])
def test_what_runs_when_it_is_imported_is_not_imported(name: str) -> None:
    sys.modules.pop("antigravity", None)
    assert runs_when_named(name)
    with pytest.raises(ValueError, match="is no AdapterStrategy; there are"):
        find_class("k", name, AdapterStrategy)
    assert "antigravity" not in sys.modules
    assert not runs_when_named("lightning_peft.strategies.LoRA")
    assert not runs_when_named("__main__.Mine")


def test_whatever_a_module_raises_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raising.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="imported .ZeroDivisionError: division by zero"):
        find_class("k", "raising.Mine", AdapterStrategy)


def test_a_name_is_of_a_module_or_of_a_class_in_it() -> None:
    assert import_named("torch.nn.Linear") is torch.nn.Linear
    assert import_named("torch.nn.Linear.forward") is torch.nn.Linear.forward
    with pytest.raises(ImportError):
        import_named("no.such.Class")
