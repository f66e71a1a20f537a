"""A configuration names classes that belong where they stand; others are refused, and not made."""

from __future__ import annotations

import re
import sys
from argparse import ArgumentError
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jsonargparse
import pytest
import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer

from lightning_peft.errors import UserError
from lightning_peft.settings.classes import check_classes, is_own
from lightning_peft.settings.names import import_named
from lightning_peft.settings.parser import make_module
from lightning_peft.settings.resolve import Resolver

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
HOOK = "torch.distributed.algorithms.ddp_comm_hooks.default_hooks.fp16_compress_hook"


@runtime_checkable
class Waits(Protocol):
    def wait(self) -> Any: ...


class Holder:
    """Takes all kinds of things."""

    def __init__(
        self,
        make: Callable[[Any], Optimizer] = torch.optim.SGD,
        gates: list[nn.Module] | None = None,
        by_name: dict[str, nn.Module] | None = None,
        either: str | nn.Module | None = None,
        kind: type[nn.Module] | None = None,
        any_kind: type | None = None,
        call: Callable[[int], float] | None = None,
        what: Any = None,
        some: dict[str, Any] | None = None,
        manager: AbstractContextManager | None = None,
        hashed: Hashable | None = None,
        waits: Waits | None = None,
        untyped=None,
        count: int = 1,
        **more: Any,
    ) -> None:
        pass


RUNS = {"args": "touch {here}/ran", "shell": True}
SYSTEM = {"class_path": "os.system", "init_args": {"command": "touch {here}/ran"}}
POPEN = {"class_path": "subprocess.Popen", "init_args": RUNS}
LINEAR = {"class_path": "torch.nn.Linear", "init_args": {"in_features": 1, "out_features": 1}}
LAYER = {"class_path": "torch.nn.TransformerEncoderLayer", "init_args": {"d_model": 2, "nhead": 1}}


def here(given: Any, path: Path) -> Any:
    if isinstance(given, dict):
        return {key: here(value, path) for key, value in given.items()}
    if isinstance(given, list):
        return [here(value, path) for value in given]
    return given.replace("{here}", str(path)) if isinstance(given, str) else given


REFUSED = [
    ({"make": SYSTEM}, "make: '(os|posix).system'"),
    ({"make": POPEN}, "make: 'subprocess.Popen'"),
    ({"make": "os.system"}, "make: '(os|posix).system'"),
    ({"make": {"class_path": "torch.hub.os.system"}}, "make: '(torch.hub.os|posix).system'"),
    ({"make": "torch.nn.Linear"}, "make: 'torch.nn.Linear'"),
    ({"gates": [LINEAR, POPEN]}, "gates: 'subprocess.Popen'"),
    ({"gates": ["os.system"]}, "gates: 'os.system'"),
    ({"gates": [{"class_path": "torch.optim.SGD"}]}, "gates: 'torch.optim.SGD' is no Module"),
    ({"by_name": {"a": POPEN}}, "by_name"),
    ({"kind": "subprocess.Popen"}, "kind: 'subprocess.Popen'"),
    ({"any_kind": "torch.utils.data.DataLoader"}, "any_kind: '.*DataLoader' may not stand here"),
    ({"call": "os.system"}, "call: '(os|posix).system' may not stand here; functions are"),
    ({"call": "torch.hub.load"}, "call: 'torch.hub.load' may not stand here; functions are taken"),
    ({"call": {"class_path": "torch.nn.Linear", "init_args": LINEAR["init_args"]}}, "call: 'torch"),
    ({"what": POPEN}, "what: 'subprocess.Popen' may not stand here: no type says what belongs"),
    ({"what": LINEAR}, "what: 'torch.nn.Linear' may not stand here: no type says what belongs"),
    ({"what": [{"a": LINEAR}]}, "what.*'torch.nn.Linear' may not stand here"),
    ({"some": {"a": {"b": POPEN}}}, "some.a.b: 'subprocess.Popen' may not stand here"),
    ({"untyped": POPEN}, "untyped: 'subprocess.Popen' may not stand here"),
    ({"more": POPEN}, "more"),
    ({"manager": POPEN}, "manager: 'subprocess.Popen'"),
    ({"hashed": LINEAR}, "hashed: 'torch.nn.*Linear' may not stand"),
    ({"waits": POPEN}, "waits: 'subprocess.Popen'"),
    ({"gates": [{**LAYER, "dict_kwargs": {"x": POPEN}}]}, "gates.dict_kwargs.x: 'subprocess.Pop"),
    ({"gates": [{"class_path": "lightning_peft.__main__.main"}]}, "gates: .*__main__"),
    ({"count": None}, "count: null is no int."),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("denies", [True, False])
@pytest.mark.parametrize(("given", "sentence"), REFUSED)
def test_what_does_not_belong_is_refused_and_not_called(
    given: dict[str, Any],
    sentence: str,
    denies: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While jsonargparse reads it, or by the check, whatever a release of jsonargparse denies."""
    settings = getattr(jsonargparse._common, "parsing_settings", {})
    monkeypatch.setitem(settings, "import_paths_enforced", denies)
    monkeypatch.chdir(tmp_path)  # where none of the classes is one's own
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, fail_untyped=False)
    with pytest.raises((UserError, ArgumentError)) as caught:
        check_classes(parser, parser.parse_object(here(given, tmp_path)))
    said = str(caught.value)
    by_us = isinstance(caught.value, UserError)
    assert re.search(sentence, said) if by_us else next(iter(given)) in said
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"make": "torch.optim.SGD"},
        {"make": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1}}},
        {"gates": [LINEAR, {"class_path": "torch.nn.Dropout"}]},
        {"gates": [LAYER]},  # whose activation is a function, by default
        {"by_name": {"a": LINEAR}},
        {"either": "os.system"},  # a text
        {"kind": "torch.nn.Linear"},
        {"call": HOOK},
        {"what": {"a": [1, {"b": "os.system"}]}, "some": {"x": 1}},
    ],
)
def test_what_belongs_is_let_through(given: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, fail_untyped=False)
    check_classes(parser, parser.parse_object(given))


OWN = """
import os
from os import system
from lightning_peft.strategies import LoRA
class Thing:
    def __init__(self, x=1): self.x = x
class Mine(LoRA):
    def __init__(self, thing=None, **more):
        super().__init__(**more)
        self.thing = thing
def mine(step): return 1.0
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    name = f"own_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    return name


def test_ones_own_classes_need_no_further_word(own: str, resolver: Resolver) -> None:
    thing = {"class_path": f"{own}.Thing", "init_args": {"x": 3}}
    adapter = {"class_path": f"{own}.Mine", "init_args": {"thing": thing}}
    words = [f"--model.adapter={own}.Mine"]
    tree = resolver.tree(["--config", QUICKSTART, *words])
    tree["model"]["init_args"]["adapter"] = adapter
    assert make_module(tree["model"]).adapter.thing.x == 3
    adapter["init_args"]["thing"] = LINEAR
    with pytest.raises(UserError, match=r"^model.adapter.thing: 'torch.nn.Linear' may not stand"):
        make_module(tree["model"])


def test_ones_own_is_what_stands_in_a_file_below_the_current_folder(
    own: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("Thing", "Mine", "mine"):
        assert is_own(import_named(f"{own}.{name}"))
    assert not is_own(import_named(f"{own}.system"))  # where it was made counts
    assert not is_own(nn.Linear)
    monkeypatch.chdir("/")
    assert not is_own(nn.Linear)  # installed there, and not one's own
    assert not is_own(Resolver)
    monkeypatch.chdir(tmp_path.parent)
    assert is_own(import_named(f"{own}.mine"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not is_own(import_named(f"{own}.mine"))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("model.optimizer", SYSTEM, "'os.system' is no Optimizer; there are .*AdamW"),
        ("model.optimizer", "lightning_peft.cli.os.system", "is no Optimizer .it is a function"),
        ("model.adapter", POPEN, "'subprocess.Popen' is no AdapterStrategy; there are AdaLoRA"),
        ("trainer.strategy", POPEN, "'subprocess.Popen' is no Strategy; there are"),
        ("trainer.callbacks", [POPEN], "'subprocess.Popen' is no Callback; there are"),
        ("trainer.logger", POPEN, "'subprocess.Popen' is no Logger; there are"),
        ("trainer.plugins", [POPEN], "'subprocess.Popen' is no Precision or ClusterEnvironment"),
        ("data", POPEN, "'subprocess.Popen' is no LightningDataModule; there are"),
        ("model", SYSTEM, "'os.system' is no LightningModule; there are"),
    ],
)  # fmt: skip
def test_every_key_of_a_run_says_what_belongs_there(
    key: str, value: Any, sentence: str, resolver: Resolver, tmp_path: Path
) -> None:
    import yaml

    (tmp_path / "f.yaml").write_text(yaml.safe_dump({key: here(value, tmp_path)}))
    words = ["--config", QUICKSTART, "--config", str(tmp_path / "f.yaml")]
    with pytest.raises(UserError, match=f"f.yaml: {key}: .*{sentence}"):
        resolver.tree(words)
    assert not (tmp_path / "ran").exists()
