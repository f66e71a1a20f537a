"""What the documentation shows is what the repository holds, and it works."""

from __future__ import annotations

import io
import re
import shlex
import shutil
import sys
import tokenize
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from lightning_peft.commands import train

ROOT = Path(__file__).parents[1]
DOCS = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")])
EXAMPLES = ["examples/my_idea.py", "examples/growing_idea.py", "examples/my_gate.py"]


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


def blocks(name: str, language: str) -> list[str]:
    """The fenced blocks of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(name), re.MULTILINE | re.DOTALL)


def lines_of_code(source: str) -> int:
    """Lines that hold anything but comments."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*silent, tokenize.ENDMARKER):
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held)


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[list[str]], Any]:
    """Parses and instantiates what a command line says, in a folder with the examples."""
    made: list[train.PeftCLI] = []

    class Stopped(train.PeftCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            made.append(self)

    def run(words: list[str]) -> train.PeftCLI:
        train.main(words)
        return made[-1]

    monkeypatch.setattr(train, "PeftCLI", Stopped)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize("name", ["my_idea", "growing_idea"])
def test_a_new_idea_takes_at_most_30_lines(name: str) -> None:
    assert lines_of_code(text_of(f"examples/{name}.py")) <= 30


@pytest.mark.parametrize("name", EXAMPLES)
def test_page_shows_the_example_as_it_is(name: str) -> None:
    page = text_of("docs/new_strategy.md")
    assert f"<!-- {name} -->\n```python\n{text_of(name)}```" in page


def test_command_of_the_new_strategy_is_accepted(parse: Callable[[list[str]], Any]) -> None:
    command = blocks("docs/new_strategy.md", "bash")[0].replace("\\\n", "")
    made = parse(shlex.split(command)[1:])
    adapter = made.model.adapter
    assert type(adapter).__name__ == "MyIdea"
    assert (adapter.r, adapter.target_r, adapter.every) == (32, 8, 10)
    assert made.trainer.max_steps == 3


@pytest.mark.parametrize("page", ["docs/methods.md", "docs/new_strategy.md"])
def test_yaml_of_a_page_is_accepted(page: str, parse: Callable[[list[str]], Any]) -> None:
    for block in blocks(page, "yaml"):
        Path("shown.yaml").write_text(block)
        made = parse(["fit", "--config", "configs/quickstart.yaml", "--config", "shown.yaml"])
        shown = yaml.safe_load(block)["model"]["adapter"]
        assert type(made.model.adapter).__name__ == shown["class_path"].split(".")[-1]
        assert made.model.adapter.r == shown["init_args"]["r"]


def test_python_of_the_methods_runs(
    tiny_llama: Callable[..., Any], random_batch: Callable[..., Any]
) -> None:
    for block in blocks("docs/methods.md", "python"):
        model = tiny_llama()
        run = SimpleNamespace(model=model)
        names = {
            "model": model,
            "sample": lambda ratio: [random_batch(0)],
            "loss": lambda batch, run=run: run.model(**batch).loss,
        }
        exec(block, names)
        assert names["strategy"].model is model  # type: ignore[attr-defined]


def test_plain_loop_of_the_usage_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(blocks("docs/usage.md", "python")[0], names)
    assert {decision["rank"] for decision in names["strategy"].decisions} == {12, 8}
    assert (tmp_path / "my_adapter" / "adapter_config.json").is_file()


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_links_and_named_configurations_exist(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
    for config in re.findall(r"configs/[\w/]+\.yaml", text):
        assert (ROOT / config).is_file(), f"{page.name} names {config}"
