"""What a class takes, and whether a value is of a type."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from jsonargparse import ArgumentParser
from torch.optim import SGD, Optimizer

from lightning_peft.settings import arguments


class Base:
    def __init__(self, r: int = 1, **more: Any) -> None:
        pass


class Child(Base):
    def __init__(self, p: float = 0.5, **more: Any) -> None:
        super().__init__(**more)


def test_settings_of_a_parser_leave_out_what_only_does_something() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(Child, "child")
    actions = arguments.actions_of(parser)
    assert {"child.p", "child.r"} <= actions.keys()
    assert not actions.keys() & {"help", "config", "print_config"}
    assert arguments.hint_of(actions["child.p"]) is float


def test_a_class_takes_what_it_hands_on() -> None:
    assert set(arguments.arguments_of(Child, 0)) == {"p", "r"}
    assert "params" not in arguments.arguments_of(SGD, 1)  # given later
    assert "lr" in arguments.arguments_of(SGD, 1)


@pytest.mark.parametrize(
    ("hint", "bases"),
    [
        (Base | None, [(Base, 0)]),
        (Callable[[Any], Optimizer], [(Optimizer, 1)]),
        (int | str, []),
        (Path, []),
    ],
)
def test_types_ask_for_classes(hint: Any, bases: list[tuple[type, int]]) -> None:
    found = [(base, skip) for base, skip in arguments.bases_of(hint) if base is not type(None)]
    assert found == bases


def test_a_default_may_name_a_class() -> None:
    assert arguments.default_class({"class_path": "A"}) == "A"
    for none in (None, "A", 1, {"x": 1}, object()):
        assert arguments.default_class(none) is None


@pytest.mark.parametrize(
    ("hint", "value", "takes"),
    [
        (int, "3", True),
        (int, "x", False),
        (int, 3.5, False),
        (float | None, "null", True),
        (list[int], [1, 2], True),
        (Literal["a", "b"], "c", False),
    ],
)
def test_values_are_of_a_type_or_not(hint: Any, value: Any, takes: bool) -> None:
    assert arguments.takes(hint, value) is takes


@pytest.mark.parametrize(
    ("hint", "sentence"),
    [
        (int, "k: 'tokn' is no int."),
        (int | bool | None, "k: 'tokn' is no int or bool."),
        (Literal["token", "step"] | None, "k: 'tokn' is none of token, step; did you mean token?"),
        (Path, "k: 'tokn' is no Path."),
    ],
)
def test_a_value_of_another_type_is_named_with_what_would_do(hint: Any, sentence: str) -> None:
    assert arguments.no_good(hint, "tokn", "k") == sentence
