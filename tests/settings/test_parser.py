"""The parser's errors are one sentence each, and modules are made of their settings."""

from __future__ import annotations

import subprocess
import sys
from argparse import ArgumentError
from typing import Any

import fsspec
import pytest

from lightning_peft.errors import UserError
from lightning_peft.modules import CausalLMModule
from lightning_peft.settings.parser import FriendlyParser, make_data, make_module
from lightning_peft.strategies import DropLoRA


def parser(**options: Any) -> FriendlyParser:
    made = FriendlyParser(**options)
    made.add_argument("--steps", type=int, default=1)
    return made


def test_an_error_is_one_sentence() -> None:
    assert parser().parse_args(["--steps", "2"]).steps == 2
    with pytest.raises(UserError, match=r"^steps: 'x' is no int\.$"):
        parser().parse_args(["--steps", "x"])
    with pytest.raises(UserError, match="step is unknown; did you mean steps?"):
        parser().parse_args(["--step", "2"])  # no abbreviation


def test_an_error_that_another_parser_catches_stays_jsonargparses() -> None:
    with pytest.raises(ArgumentError):
        parser(exit_on_error=False).parse_args(["--steps", "x"])


def part(**adapter: Any) -> dict[str, Any]:
    return {
        "class_path": "lightning_peft.modules.CausalLMModule",
        "init_args": {
            "model_name_or_path": "tiny_llama",
            "adapter": {"class_path": "DropLoRA", "init_args": adapter},
        },
    }


def test_a_module_is_made_without_its_model() -> None:
    module = make_module(part(r=3))
    assert isinstance(module, CausalLMModule)
    assert isinstance(module.adapter, DropLoRA)
    assert module.adapter.r == 3


def test_a_data_module_is_made_without_its_data_or_refused_with_its_key() -> None:
    data = {"class_path": "CommonsenseDataModule", "init_args": {"data_dir": "nowhere"}}
    assert make_data(data).test_tasks[0] == "boolq"
    data["init_args"] = {"data_dir": "nowhere", "batch_size": 0}
    with pytest.raises(UserError, match=r"^data.batch_size") as caught:
        make_data(data)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("adapter", "sentence"),
    [
        ({"r": 0}, r"^model.adapter: r must be at least 1, got 0\.$"),
        ({"rank": 3}, r"^model.*rank"),
        ({"r": "x"}, r"^model.adapter.r: 'x' is no int"),
        ({"r": None}, r"^model.adapter.r: null is no int"),
        ({"rank_gate": {"class_path": "os.system"}}, r"^model.adapter.rank_gate"),
    ],
)
def test_a_module_that_cannot_be_made_is_one_sentence(
    adapter: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        make_module(part(**adapter))
    assert "\n" not in str(caught.value)


def test_a_constructors_own_value_error_bears_the_key() -> None:
    """In a process of its own, since a class once known is known to all tests."""
    program = """
from lightning_peft.settings.parser import make_data, make_module
from lightning_peft.strategies import LoRA
class Mine(LoRA):
    def __init__(self, x: int = 1):
        raise ValueError(f"x must be even, got {x}.")
try:
    make_module({"class_path": "lightning_peft.modules.CausalLMModule", "init_args":
        {"model_name_or_path": "tiny_llama", "adapter": {"class_path": "__main__.Mine"}}})
except ValueError as error:
    print(type(error).__name__, error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "UserError model.adapter: x must be even, got 1.\n", run.stderr


def test_configurations_are_files_of_this_machine() -> None:
    """Lightning lets jsonargparse read whatever fsspec does, such as http:// and s3://."""
    fsspec.filesystem("memory").pipe("/f.yaml", b"steps: 3")
    made = parser()
    made.add_argument("--config", action="config")
    with pytest.raises(UserError, match="--config: the file memory://f.yaml does not exist"):
        made.parse_args(["--config", "memory://f.yaml"])


def test_whatever_jsonargparse_stumbles_over_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stumble(*args: Any, **kwargs: Any) -> None:
        raise AttributeError("'str' object has no attribute 'keys'")

    monkeypatch.setattr(FriendlyParser, "_parse_common", stumble)
    with pytest.raises(UserError, match="no attribute 'keys'"):
        parser().parse_args(["--steps", "2"])


def test_a_word_without_end_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="stand for more than 100,000 values"):
        parser().parse_args(["--steps", "a: &a [*a, *a]"])
