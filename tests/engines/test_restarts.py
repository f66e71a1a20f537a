"""From where a run goes on that torchrun has started again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_peft.runs import AtomicCheckpointIO, find_restart


def save(path: Path, step: int) -> None:
    """A checkpoint as ours, but for its content."""
    adapter = {"strategy": "LoRA", "arguments": {}, "layers": [], "state": {}}
    content = {"global_step": step, "state_dict": {}, "adapter": adapter}
    AtomicCheckpointIO().save_checkpoint(content, path)


def write_run(folder: Path, began: float, *steps: int) -> None:
    (folder / "checkpoints").mkdir(parents=True)
    for step in steps:
        save(folder / "checkpoints" / f"step={step}.ckpt", step)
    (folder / "config.yaml").write_text("")
    os.utime(folder / "config.yaml", (began, began))


@pytest.fixture
def began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """When torchrun began a job that it has started again since."""
    errors = tmp_path / "torchelastic" / "job"
    (errors / "attempt_0" / "0").mkdir(parents=True)
    os.utime(errors / "attempt_0", (1000.0, 1000.0))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(errors / "attempt_1" / "0" / "error.json"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    return 1000.0


def test_a_restart_goes_on_from_the_last_checkpoint_of_its_own_run(
    tmp_path: Path, began: float
) -> None:
    root = tmp_path / "runs"
    write_run(root / "version_0", began - 50, 8, 12)
    write_run(root / "version_1", began + 50, 2, 4)
    newest = root / "version_1" / "checkpoints" / "step=4.ckpt"
    assert find_restart(root, None) == newest
    newest.write_bytes(newest.read_bytes()[:100])  # cut off
    with pytest.warns(UserWarning, match="cut off or damaged"):
        assert find_restart(root, None) == newest.with_name("step=2.ckpt")


def test_a_restart_before_the_first_checkpoint_leaves_earlier_runs_alone(
    tmp_path: Path, began: float
) -> None:
    root = tmp_path / "runs"
    assert find_restart(root, None) is None
    write_run(root / "version_0", began - 50, 8)
    assert find_restart(root, None) is None
    write_run(root / "version_1", began + 50)
    assert find_restart(root, None) is None


def test_a_restart_of_a_run_that_was_resumed_goes_on_in_it(tmp_path: Path, began: float) -> None:
    root = tmp_path / "runs"
    write_run(root / "version_0", began - 50, 8)
    write_run(root / "version_1", began - 20, 6)
    given = root / "version_0" / "checkpoints" / "step=8.ckpt"
    assert find_restart(root, given) == given
    os.utime(root / "version_0" / "config.yaml", (began + 50, began + 50))
    later = given.with_name("step=10.ckpt")
    save(later, 10)
    assert find_restart(root, given) == later


def test_a_first_start_does_what_the_command_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    write_run(tmp_path / "version_0", 2000.0, 8)
    assert find_restart(tmp_path, None) is None
