"""Words and files become one tree of settings, later ones over earlier ones."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.settings.tree import assign, merge, read_words, to_words


def test_words_are_keys_and_values_in_their_order() -> None:
    words = ["--a.b=1", "-c", "f.yaml", "--x", "-1", "--y+=2", "--model.help", "LoRA"]
    assert list(read_words(words)) == [("a.b", "1"), ("config", "f.yaml"), ("x", "-1")]
    assert ("y+", "2") in read_words(words, appends=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["oops"], "'oops' belongs to no option; options are written --key value."),
        (["--a"], "--a needs a value."),
        (["--a", "--b", "1"], "--a needs a value."),
    ],
)
def test_words_without_key_or_value_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list(read_words(words))


def test_a_file_lies_over_those_before_it() -> None:
    tree: dict[str, Any] = {"a": {"b": 1, "c": 2}, "d": 3}
    merge(tree, {"a": {"c": 4}, "e.f": 5})
    assert tree == {"a": {"b": 1, "c": 4}, "d": 3, "e": {"f": 5}}


def test_another_class_takes_the_arguments_of_the_one_before_away() -> None:
    tree = {"m": {"class_path": "A", "init_args": {"r": 1}}}
    merge(tree, {"m": {"class_path": "x.A", "init_args": {"p": 2}}})
    assert tree["m"] == {"class_path": "x.A", "init_args": {"r": 1, "p": 2}}
    merge(tree, {"m": {"class_path": "B"}})
    assert tree["m"] == {"class_path": "B"}


def test_a_setting_goes_below_init_args_where_there_is_a_class() -> None:
    tree: dict[str, Any] = {"m": {"class_path": "A"}, "t": {}}
    assign(tree, "m.r", 1)
    assign(tree, "m.gate", "G")
    assign(tree, "m.gate.p", 2)
    assign(tree, "t.steps", 3)
    gate = {"class_path": "G", "init_args": {"p": 2}}
    assert tree == {
        "m": {"class_path": "A", "init_args": {"r": 1, "gate": gate}},
        "t": {"steps": 3},
    }
    assign(tree, "m", "x.A")  # the same class
    assert tree["m"]["init_args"]["r"] == 1
    assign(tree, "m", "B")
    assert tree["m"] == "B"


def test_shorter_keys_come_first_so_that_a_class_comes_before_its_arguments() -> None:
    given = {"model.adapter.r": 4, "trainer": {"max_steps": 3}, "model.adapter": "LoRA"}
    words = ["--trainer.max_steps=3", "--model.adapter=LoRA", "--model.adapter.r=4"]
    assert to_words(given) == words


def test_options_hold_what_yaml_reads_again() -> None:
    given = {"a": {"class_path": "G", "init_args": {"p": 1}}, "b": None, "c": [1, "x"], "d": {}}
    words = to_words(given)
    assert words == [
        '--a={"class_path": "G", "init_args": {"p": 1}}',
        "--b=null",
        '--c=[1, "x"]',
        "--d={}",
    ]


def test_numbers_that_json_does_not_have_are_written_as_yaml_reads_them() -> None:
    given = {"a": float("inf"), "b": [float("nan"), -float("inf")], "c": {}}
    words = to_words(given)
    assert words == ["--a=.inf", "--b=[.nan, -.inf]", "--c={}"]


def test_one_more_of_a_list_and_what_is_said_of_it() -> None:
    tree: dict[str, Any] = {"t": {}}
    assign(tree, "t.callbacks+", "A")
    assign(tree, "t.callbacks.x", 1)
    assign(tree, "t.callbacks+", "B")
    assign(tree, "t.callbacks.y", 2)
    one, two = ({"class_path": c, "init_args": a} for c, a in (("A", {"x": 1}), ("B", {"y": 2})))
    assert tree == {"t": {"callbacks": [one, two]}}
    tree = {"t": "A"}
    assign(tree, "t+", "B")
    assert tree == {"t": ["A", "B"]}
