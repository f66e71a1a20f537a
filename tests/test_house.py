"""The rules of the house, which CONTRIBUTING.md states, hold for every file of the package."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_peft"
SOURCES = {str(p.relative_to(PACKAGE)): p.read_text() for p in sorted(PACKAGE.rglob("*.py"))}
LONGER_FOR_A_REASON = {"strategies/base.py"}
# Forms, beside adapters/: what stands in a layer's place and has an A and a B.
FORMS = {"dora.py", "sparse_adapter.py", "tied_lora.py", "vera.py"}
# No functions of their own: entry points, and what is only read by other processes.
WITHOUT_TESTS = {"__main__.py", "comparison/preload.py"}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def test_files_are_short() -> None:
    lines = {name: text.count("\n") for name, text in SOURCES.items()}
    long = {name for name, count in lines.items() if count > 300}
    assert long <= LONGER_FOR_A_REASON
    assert statistics.median(lines.values()) <= 130


def test_a_method_fits_on_a_few_screens() -> None:
    """Of all that users choose from; what several share stands in files of their own."""
    from lightning_peft import strategies

    methods = {
        getattr(strategies, name).__module__.rpartition(".")[2]
        for name in strategies.__all__
        if issubclass(getattr(strategies, name), strategies.AdapterStrategy)
    } - {"base"}
    lines = {name: SOURCES[f"strategies/{name}.py"].count("\n") for name in methods}
    assert statistics.median(lines.values()) <= 120


def test_a_long_file_says_why() -> None:
    for name in LONGER_FOR_A_REASON:
        assert "longer than other files" in (ast.get_docstring(ast.parse(SOURCES[name])) or "")


@pytest.mark.parametrize("name", SOURCES)
def test_functions_are_short(name: str) -> None:
    for node in functions(ast.parse(SOURCES[name])):
        assert (node.end_lineno or 0) - node.lineno + 1 <= 50, node.name


def private_of_others(name: str) -> list[str]:
    """Names with one underscore that a file takes from another file of the package."""
    found = []
    modules: set[str] = set()  # names that stand for modules of the package
    tree = ast.parse(SOURCES[name])
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_peft"):
            names = [alias.asname or alias.name for alias in node.names]
            found += [n for n in (a.name for a in node.names) if is_private(n)]
            modules |= {n for n in names if n[0].islower()}
    for node in ast.walk(tree):
        of_name = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        if of_name and node.value.id in modules and is_private(node.attr):
            found.append(f"{node.value.id}.{node.attr}")
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@pytest.mark.parametrize("name", SOURCES)
def test_private_names_stay_in_their_file(name: str) -> None:
    assert not private_of_others(name)


def test_only_forms_name_a_and_b() -> None:
    naming = {name for name, text in SOURCES.items() if "lora_A" in text or "lora_B" in text}
    outside = {name for name in naming if not name.startswith("adapters/")}
    assert outside <= {f"strategies/{form}" for form in FORMS}


def test_every_file_has_its_tests() -> None:
    missing = []
    for name in SOURCES:
        path = Path(name)
        if path.name == "__init__.py" or name in WITHOUT_TESTS:
            continue
        if not (ROOT / "tests" / path.parent / f"test_{path.name}").is_file():
            missing.append(name)
    assert not missing


def test_test_files_are_short() -> None:
    lines = {p: p.read_text().count("\n") for p in (ROOT / "tests").rglob("*.py")}
    assert not {str(p.relative_to(ROOT)): n for p, n in lines.items() if n > 400}
