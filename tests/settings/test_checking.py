"""A value is checked against its key's type, as deep as it goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from torch.optim import SGD, Adam, Optimizer

from lightning_peft.errors import UserError
from lightning_peft.settings.arguments import actions_of
from lightning_peft.settings.checking import (
    Check,
    check_missing,
    check_spelling,
    refuse_no_group,
)


@pytest.mark.parametrize(
    ("hint", "value", "sentence"),
    [
        (int, "x", "k: 'x' is no int."),
        (int | None, None, None),
        (int, None, "k: null is no int."),
        (dict[str, list[int]], {"a": ["x"]}, "k.a: ['x'] is no list of int."),
        (SGD | Adam, {"class_path": "torch.optim.SGD"}, None),
        (SGD | Adam, {"class_path": "torch.optim.AdamW"}, None),  # which is an Adam
        (SGD | Adam, {"class_path": "torch.optim.Rprop"}, "k: 'torch.optim.Rprop' is no SGD or A"),
        (list[SGD | Adam], [{"class_path": "Adam", "init_args": {"lr": "x"}}], "k.lr: 'x' is no"),
        (list[SGD] | SGD, "sgd.yaml", "k: sgd.yaml: 'lr' stands in line 1 and again in line 1"),
        (list[SGD], ["{class_path: SGD}"], "k: '{class_path: SGD}' is no SGD; there are"),
        (str, "{a: 1}", "k takes a text, but YAML reads '{a: 1}' as {'a': 1}; put the text in"),
        (str | SGD, "sgd.yaml", None),  # a text
        (Any, {"a": object}, None),
        (Any, None, None),
    ],
)
def test_a_value_is_of_its_type_or_named(
    hint: Any, value: Any, sentence: str | None, tmp_path: Path
) -> None:
    (tmp_path / "sgd.yaml").write_text("init_args: {lr: 1, lr: 2}")
    check = Check(tmp_path)
    if sentence is None:
        check.value(hint, value, "k")
        return
    with pytest.raises(UserError) as error:
        check.value(hint, value, "k")
    assert str(error.value).startswith(sentence)


def test_a_default_of_null_may_be_given() -> None:
    Check(Path()).value(int, None, "k", None)


def test_arguments_beside_a_class_are_refused_at_any_depth() -> None:
    fine = {"a": {"class_path": "A", "init_args": {"r": 1}, "dict_kwargs": {}}, "b": {"r": 1}}
    check_spelling(fine, "")
    fine["a"]["init_args"]["gate"] = {"class_path": "G", "p": 1}  # type: ignore[index]
    with pytest.raises(UserError, match=r"^a.gate.p stands beside class_path; a class's arguments"):
        check_spelling(fine, "")


def test_a_group_is_a_mapping() -> None:
    actions = dict.fromkeys(("a.x", "a.y", "b"))
    refuse_no_group(actions, {"x": 1}, "a.", "a")  # type: ignore[arg-type]
    refuse_no_group(actions, 5, "b.", "b")  # type: ignore[arg-type] - no group
    with pytest.raises(UserError, match="^a: 5 is no mapping of keys to values; its keys are x, y"):
        refuse_no_group(actions, 5, "a.", "a")  # type: ignore[arg-type]


class Part:
    def __init__(self, size: int) -> None:
        pass


def test_a_class_has_what_it_needs() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Part, "part")
    parser.add_argument("--make", type=Optimizer, default=None)
    actions = {"part": actions_of(parser)["part"]}
    check_missing(actions, {"part": {"class_path": "Part", "init_args": {"size": 1}}})
    for given in ({}, {"size": None}):
        with pytest.raises(UserError, match=r"^part.size is missing: Part needs it\.$"):
            check_missing(actions, {"part": {"class_path": "Part", "init_args": given}})
    with pytest.raises(UserError, match="^part is missing: give --part"):
        check_missing(actions, {})
