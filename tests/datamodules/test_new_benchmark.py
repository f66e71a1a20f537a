"""What a new benchmark touches: one file of its own, as the base's docstring shows it."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import lightning_peft
from lightning_peft import datamodules
from lightning_peft.datamodules import base

PACKAGE = Path(lightning_peft.__file__).parent
BASES = {"TextDataModule", "LabelledDataModule"}
TASKS = [name for name in datamodules.__all__ if name.endswith("DataModule") and name not in BASES]
# A sentence of a module that says which data module would do; it chooses nothing by the name.
NAMED_IN_SENTENCES = {"GlueDataModule": {"modules/classification.py"}}
WORLD = {"France": "Paris", "Japan": "Tokyo", "Kenya": "Nairobi", "Peru": "Lima"}


def example_of(text: str | None) -> str:
    """The code in a docstring."""
    _, _, after = (text or "").partition("For example::\n")
    lines = after.split("\n")
    end = next(i for i, line in enumerate(lines) if line and not line.startswith("    "))
    return textwrap.dedent("\n".join(lines[:end])).strip() + "\n"


@pytest.fixture
def capitals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The docstring's benchmark, in a file of its own that nothing else knows."""
    path = tmp_path / "my_capitals.py"
    path.write_text(f"from __future__ import annotations\n\n{example_of(base.__doc__)}")
    spec = importlib.util.spec_from_file_location("my_capitals", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "my_capitals", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path: Path, write_records: Any) -> Path:
    records = [{"country": country, "capital": capital} for country, capital in WORLD.items()]
    write_records(tmp_path / "world" / "train.jsonl", records[:3])
    write_records(tmp_path / "world" / "test.jsonl", records[2:])
    return tmp_path / "world"


def test_it_is_about_twenty_lines() -> None:
    lines = [line for line in example_of(base.__doc__).splitlines() if line.strip()]
    assert len(lines) <= 25


def test_it_gives_batches(
    capitals: ModuleType, folder: Path, build_data: Any, byte_ids: Callable[[str], list[int]]
) -> None:
    data = build_data(capitals.Capitals, folder, stage="fit", val_size=1, batch_size=2)
    (batch,) = data.train_dataloader()
    (held_out,) = data.val_dataloader()
    rows = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist())
        for b in (batch, held_out)
        for ids, mask, labels in zip(b["input_ids"], b["attention_mask"], b["labels"], strict=True)
    ]
    expected = []
    for country, capital in list(WORLD.items())[:3]:
        prompt, answer = byte_ids(f"The capital of {country} is"), [*byte_ids(f" {capital}"), 2]
        expected.append((prompt + answer, [-100] * len(prompt) + answer))
    assert sorted(rows) == sorted(expected)
    assert batch["num_target_tokens"].item() == int((batch["labels"] != -100).sum())
    assert data.counts["train"] == 2


def test_it_gives_prompts_and_scores(
    capitals: ModuleType, folder: Path, build_data: Any, tokenizer: Any
) -> None:
    data = build_data(capitals.Capitals, folder, stage="test")
    assert data.test_tasks == ["capitals"]
    (loader,) = data.test_dataloader()
    (batch,) = loader
    assert sorted(batch["prompt"]) == ["The capital of Kenya is", "The capital of Peru is"]
    asked = [tokenizer.decode(ids[ids > 2]) for ids in batch["input_ids"]]
    assert asked == batch["prompt"]
    outputs = {"Nairobi": " Nairobi.", "Lima": " Lima is it"}
    columns = zip(batch["index"], batch["prompt"], batch["expected"], strict=True)
    rows: list[dict[str, Any]] = [
        {"index": i, "prompt": p, "output": outputs[e], "expected": e} for i, p, e in columns
    ]
    data.judge("capitals", rows)
    judged = {row["expected"]: (row["extracted"], row["correct"]) for row in rows}
    assert judged == {"Nairobi": ("Nairobi.", False), "Lima": ("Lima", True)}
    assert data.score("capitals", rows) == {"accuracy": 0.5}
    assert data.test_stamp("capitals")["name"] == "capitals-ours"


def test_what_its_file_lacks_is_said(
    capitals: ModuleType, folder: Path, write_records: Any
) -> None:
    path = write_records(folder / "train.jsonl", [{"country": "Peru"}])
    with pytest.raises(ValueError, match=f"^Record 1 of {re.escape(str(path))} has no 'capital'"):
        capitals.Capitals(str(folder)).train_examples()


def test_it_is_chosen_by_its_path(capitals: ModuleType, folder: Path) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(datamodules.TextDataModule, "data")
    arguments = parser.parse_args(
        ["--data=my_capitals.Capitals", f"--data.data_dir={folder}", "--data.val_size=1"]
    )
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    data = instantiate(arguments).data
    assert type(data) is capitals.Capitals
    assert (data.data_dir, data.val_size) == (str(folder), 1)


@pytest.mark.parametrize("name", TASKS)
def test_a_tasks_name_stands_in_its_own_file_alone(name: str) -> None:
    own = Path(sys.modules[getattr(datamodules, name).__module__].__file__ or "")
    home = own if own.parent == PACKAGE / "datamodules" else own.parent
    allowed = {PACKAGE / "datamodules" / "__init__.py"}
    allowed |= {PACKAGE / path for path in NAMED_IN_SENTENCES.get(name, ())}
    word = re.compile(rf"\b{name}\b")
    named = [path for path in PACKAGE.rglob("*.py") if word.search(path.read_text("utf-8"))]
    assert own in named
    assert [p for p in named if p not in allowed and p != home and p.parent != home] == []


def imports_of(path: Path) -> set[str]:
    """The modules of this package that a file imports, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {module for module in found if module.split(".")[0] == "lightning_peft"}


def test_data_modules_know_no_strategy_no_module_and_no_engine() -> None:
    ground = ("datamodules", "assets", "atomic", "errors")  # assets tells where a tokenizer lies
    allowed = tuple(f"lightning_peft.{name}" for name in ground)
    for path in (PACKAGE / "datamodules").rglob("*.py"):
        assert [m for m in imports_of(path) if not m.startswith(allowed)] == [], path


@pytest.mark.parametrize("folder", ["arithmetic", "code", "conversation", "glue", "math"])
def test_tasks_do_not_know_each_other(folder: str) -> None:
    tasks = {"arithmetic", "code", "conversation", "glue", "instruction", "math"} - {folder}
    others = tuple(f"lightning_peft.datamodules.{task}" for task in tasks)
    for path in (PACKAGE / "datamodules" / folder).glob("*.py"):
        assert [m for m in imports_of(path) if m.startswith(others)] == [], path
