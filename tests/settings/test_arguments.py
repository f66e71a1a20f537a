"""What a class takes, and whether a value is of a type."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
        (int, None, False),
        (int | None, None, True),
        (Any, None, True),
    ],
)
def test_values_are_of_a_type_or_not(hint: Any, value: Any, takes: bool) -> None:
    assert arguments.takes(hint, value) is takes


@pytest.mark.parametrize(
    ("hint", "sentence"),
    [
        (int, "k: 'tokn' is no int."),
        (int | bool | None, "k: 'tokn' is no int or bool."),
        (str | list[str], "k: 'tokn' is no str."),
        (Base | list[Base], "k: 'tokn' is no Base or list of Base; there are Child."),
        (Literal["token", "step"] | None, "k: 'tokn' is none of token, step; did you mean token?"),
        (Path, "k: 'tokn' is no Path."),
    ],
)
def test_a_value_of_another_type_is_named_with_what_would_do(hint: Any, sentence: str) -> None:
    assert arguments.no_good(hint, "tokn", "k") == sentence


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (None, "k: null is no int."),
        ([1, 2], "k: [1, 2] is no int."),
        ({"a": 1}, "k: {'a': 1} is no int."),
        (float("inf"), "k: inf is no int."),
        (True, "k: true is no int."),
        ("x" * 500, f"k: '{'x' * 78}… is no int."),
    ],
)
def test_any_value_is_shown_and_a_long_one_cut(value: Any, sentence: str) -> None:
    assert arguments.no_good(int, value, "k") == sentence


@pytest.mark.parametrize(
    ("hint", "inner"),
    [
        (list[Base] | Base | None, Base),
        (dict[str, int], int),
        (Iterable[Base] | bool, Base),
        (set[int] | tuple[str, ...], int | str),
        (str, Any),
        (list, Any),
    ],
)
def test_what_a_container_holds(hint: Any, inner: Any) -> None:
    assert arguments.inner_of(hint) == inner


def test_null_is_refused_where_a_type_does_not_have_it() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--given", type=int)
    parser.add_argument("--none", type=int | None, default=1)
    parser.add_argument("--any", type=Any, default=1)
    actions = arguments.actions_of(parser)
    for name in ("given", "none", "any"):
        arguments.refuse_null(actions[name], None, name)
    arguments.refuse_null(actions["count"], 2, "count")
    with pytest.raises(ValueError, match=r"^x.count: null is no int\.$"):
        arguments.refuse_null(actions["count"], None, "x.count")


def test_a_callable_of_no_known_kind_asks_for_no_class() -> None:
    assert arguments.bases_of(Callable) == []
    assert arguments.choose([Base]) == ["Child"]
