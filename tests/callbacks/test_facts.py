"""What a record says of a run and its machine."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lightning_peft.callbacks.facts import (
    PACKAGES,
    arguments,
    commit,
    numbers,
    peak_memory_mb,
    protocol,
    versions,
)
from lightning_peft.strategies import PrunedLoRA


def test_metrics_become_plain_numbers() -> None:
    found = numbers({"loss": torch.tensor(0.5), "count": 3})
    assert found == {"loss": 0.5, "count": 3.0}
    assert all(type(value) is float for value in found.values())


def test_arguments_are_the_constructors() -> None:
    found = arguments(PrunedLoRA(r=16, target_r=4, prune_every=7))
    assert (found["r"], found["target_r"], found["prune_every"]) == (16, 4, 7)
    assert not {"decisions", "model", "base_fingerprint"} & found.keys()
    assert not [name for name in found if name.startswith("_")]


def test_a_protocol_is_named_where_the_data_have_one() -> None:
    data = SimpleNamespace(protocol=SimpleNamespace(name="dart"))
    assert protocol(SimpleNamespace(datamodule=data)) == "dart"
    assert protocol(SimpleNamespace(datamodule=None)) is None
    assert protocol(SimpleNamespace()) is None


def test_memory_and_versions_are_this_machines() -> None:
    assert 10 < peak_memory_mb() < 1e6
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(found) == {"python", *PACKAGES}


def test_a_changed_checkout_is_marked_and_no_checkout_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert commit() is None

    def git(*words: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-m", "first")
    clean = commit()
    assert clean is not None
    assert len(clean) == 12
    (tmp_path / "file").write_text("two")
    assert commit() == f"{clean}-dirty"
