"""A test that was cut off goes on in its folder, also where no run has one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.atomic import is_held
from lightning_peft.cli import main
from lightning_peft.models.generation import generate
from lightning_peft.modules import causal_lm
from lightning_peft.runs.folders import interrupted_test

ROWS, BATCH = 10, 2

pytestmark = pytest.mark.filterwarnings("ignore:neither a checkpoint nor an adapter")


class Generation:
    """Answers batches until it is cut off."""

    def __init__(self, most: int | None = None) -> None:
        self.most, self.batches = most, 0

    def __call__(self, model: Any, batch: Any, *rest: Any) -> list[str]:
        if self.batches == self.most:
            raise KeyboardInterrupt
        self.batches += 1
        return generate(model, batch, *rest)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Test the bare base on arithmetic, for some batches; gives how many were generated."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(tmp_path)
    settings = {
        "trainer.default_root_dir": "root",
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "model.model_name_or_path": "tiny_llama",
        "data": "ArithmeticDataModule",
        "data.test_size": ROWS,
        "data.val_size": 2,
        "data.eval_batch_size": BATCH,
    }

    def test(most: int | None = None, **more: Any) -> int:
        generation = Generation(most)
        monkeypatch.setattr(causal_lm, "generate", generation)
        given = {**settings, **more}
        words = (str(word) for key, value in given.items() for word in (f"--{key}", value))
        try:
            main(["test", *words])
        except (KeyboardInterrupt, SystemExit):
            assert most is not None
        return generation.batches

    return test


def lines(folder: str) -> list[Any]:
    text = (Path("root") / folder / "predictions" / "subtraction.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def test_an_interrupted_test_of_the_bare_base_goes_on(run: Any) -> None:
    assert run(3) == 3
    assert interrupted_test("root") == Path("root/version_0").absolute()
    assert run() == ROWS // BATCH - 3
    assert [line["index"] for line in lines("version_0")] == list(range(ROWS))
    # What is done is not gone on with.
    assert interrupted_test("root") is None
    assert run() == ROWS // BATCH
    assert lines("version_1") == lines("version_0")


def test_one_of_other_records_starts_anew_in_its_place(run: Any) -> None:
    assert run(3) == 3
    assert run(**{"data.split_seed": 1}) == ROWS // BATCH
    assert [p.name for p in Path("root").iterdir()] == ["version_0"]


def test_a_test_that_runs_in_another_process_is_left_alone(tmp_path: Path) -> None:
    part = tmp_path / "version_4" / "predictions" / "c.part0"
    part.parent.mkdir(parents=True)
    part.write_text("{}\n")
    assert interrupted_test(tmp_path) == tmp_path / "version_4"
    script = (
        "import sys; from lightning_peft.atomic import hold; file = open(sys.argv[1], 'a'); "
        "hold(file); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(part)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        assert is_held(part)
        assert interrupted_test(tmp_path) is None
        other.kill()
        other.wait()
    assert interrupted_test(tmp_path) == tmp_path / "version_4"


@pytest.mark.parametrize("beside", ["config.yaml", "checkpoints/last.ckpt"])
def test_the_folder_of_a_run_is_not_a_tests(beside: str, tmp_path: Path) -> None:
    for name in ("predictions/c.part0", beside):
        path = tmp_path / "version_0" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    assert interrupted_test(tmp_path) is None


def test_no_folder_holds_no_test(tmp_path: Path) -> None:
    assert interrupted_test(tmp_path) is None
