"""What the tests of shipped configurations share: how files are laid over one another."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.commands import train
from lightning_peft.comparison.plan import Resolver

ROOT = Path(__file__).parents[2]
Words = list[str]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Words], train.PeftCLI]:
    """Parses and instantiates what a command line says, and stops before it runs."""
    made: list[train.PeftCLI] = []

    class Stopped(train.PeftCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            made.append(self)

    def parse(words: Words) -> train.PeftCLI:
        given = [str(tmp_path) if word == "DATA" else word for word in words]
        train.main([*given, "--trainer.default_root_dir", str(tmp_path)])
        return made[-1]

    monkeypatch.setattr(train, "PeftCLI", Stopped)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(ROOT)
    return parse


@pytest.fixture(scope="session")
def resolver() -> Iterator[Resolver]:
    """Gives whole settings; its parser is made once for all tests."""
    before = sys.argv
    sys.argv = ["lightning-peft"]
    yield Resolver()
    sys.argv = before


@pytest.fixture(scope="session")
def command_of() -> Callable[[str], Words]:
    """The words after ``lightning-peft`` in a file's first line."""

    def read(config: str) -> Words:
        first = (ROOT / config).read_text().splitlines()[0]
        assert first.startswith("# lightning-peft "), f"{config} begins with {first!r}"
        return shlex.split(first)[2:]

    return read


@pytest.fixture(scope="session")
def files_of() -> Callable[[str, str, str], list[str]]:
    """The files of a family's row, as configs/README.md says that they are laid."""

    def lay(family: str, model: str, method: str) -> list[str]:
        own = f"configs/families/{family}"
        files = [f"{own}/protocol.yaml", f"configs/models/{model}.yaml", f"{own}/{model}.yaml"]
        files += [f"configs/methods/{method}.yaml", f"{own}/{method}.yaml"]
        found = [file for file in files if (ROOT / file).is_file()]
        assert set(files[::3]) | {files[1]} <= set(found)
        return found

    return lay


@pytest.fixture(scope="session")
def row(files_of: Callable[[str, str, str], list[str]]) -> Callable[[str, str, str], Words]:
    """The command of a family's row: ``row(family, model, method)``."""

    def command(family: str, model: str, method: str) -> Words:
        files = files_of(family, model, method)
        return ["fit", *(w for f in files for w in ("--config", f)), "--data.data_dir", "DATA"]

    return command


@pytest.fixture(scope="session")
def settings(resolver: Resolver) -> Callable[[list[str]], dict[str, Any]]:
    """Whole settings of files laid over one another."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def resolve(files: list[str]) -> dict[str, Any]:
        key = tuple(files)
        if key not in known:
            words = [w for f in files for w in ("--config", str(ROOT / f))]
            data = ["--data.data_dir=DATA"] if any("/families/" in f for f in files) else []
            known[key] = resolver.tree([*words, *data])
        return known[key]

    return resolve
