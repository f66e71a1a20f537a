"""A stranger's run folder: nothing that it holds is run, and each thing is refused by name.

The commands that read a run's own files are given each of them with something that would leave a
mark: the configuration, the checkpoint, the adapter, the tokenizer, the model's code, the data.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from at_once import small_fit, write

from lightning_peft.cli import main


class Code:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


@pytest.fixture(scope="module")
def good(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, its base and its configuration."""
    folder = tmp_path_factory.mktemp("good")
    shutil.copytree(base, folder / "base")
    config = write(folder / "fit.yaml", small_fit(folder / "base", folder / "runs", max_steps=2))
    argv, path = sys.argv, sys.path[:]
    sys.argv = ["lightning-peft"]
    main(["fit", "--config", str(config)])
    sys.argv, sys.path[:] = argv, path
    return folder


@pytest.fixture
def run(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the run that a test may spoil, and a mark that must not appear: ``mark``."""
    folder = tmp_path / "got"
    shutil.copytree(good, folder)
    for path in (folder / "fit.yaml", *folder.rglob("config.yaml")):
        path.write_text(path.read_text().replace(str(good), str(folder)))
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    # Where a module of the stranger's would be found, a user's own classes are: not here.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return folder / "runs" / "version_0"


Refused = Callable[..., str]


@pytest.fixture
def refused(run: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs a command that must be refused, and gives the sentence."""

    def check(*words: Any) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as info:
            main([str(word) for word in words])
        said = capfd.readouterr().err
        assert info.value.code == 2
        assert said.count("error: ") == 1
        assert not (run / "mark").exists()
        return said

    return check


def commands(run: Path) -> list[list[Any]]:
    """Those that read a run's own configuration."""
    config, last = (
        ["--config", run / "config.yaml"],
        ["--ckpt_path", run / "checkpoints/step=2.ckpt"],
    )
    return [
        ["fit", *config, *last],
        ["validate", *config, *last],
        ["test", *config, *last],
        ["predict", *config, *last],
        ["estimate", *config],
        ["export", *last, "--output", run / "out"],
    ]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("model.init_args.optimizer", "model.optimizer"),
        ("model.init_args.adapter", "model.adapter"),
        ("model", "model"),
    ],
)
def test_a_configuration_runs_no_command(run: Path, refused: Refused, key: str, named: str) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    *path, last = key.split(".")
    place = config
    for name in path:
        place = place[name]
    command = {"class_path": "os.system", "init_args": {"command": f"touch {run / 'mark'}"}}
    place[last] = command
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for words in commands(run):
        said = refused(*words)
        assert named in said
        assert "os.system" in said


def test_callbacks_and_loggers_run_no_command(run: Path, refused: Refused) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    popen = {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", str(run / "mark")]}}
    for key in ("callbacks", "logger", "plugins", "profiler", "strategy"):
        trainer = {**config["trainer"], key: [popen] if key != "strategy" else popen}
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "trainer": trainer}))
        said = refused("test", "--config", run / "config.yaml", "--ckpt_path", "last")
        assert f"trainer.{key}" in said
        assert "subprocess.Popen" in said


def test_a_checkpoint_runs_no_code(run: Path, refused: Refused) -> None:
    path = run / "checkpoints" / "step=2.ckpt"
    content = torch.load(path, weights_only=True)
    del content["digest"]
    torch.save({**content, "extra": Code(run / "mark")}, path)
    for words in commands(run):
        if words[0] != "estimate":
            assert "step=2.ckpt holds code (posix.system), which is not run" in refused(*words)


def test_an_adapter_runs_no_code(run: Path, refused: Refused) -> None:
    adapter = run / "adapter"
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({"x": Code(run / "mark")}, adapter / "adapter_model.bin")
    words = ["test", "--config", run / "config.yaml", "--model.peft_path", adapter]
    assert "adapter_model" in refused(*words)


def test_a_base_and_its_tokenizer_run_no_code(run: Path, refused: Refused) -> None:
    base = run.parents[1] / "base"
    (base / "evil.py").write_text(f"open({str(run / 'mark')!r}, 'w')\nclass Evil: pass\n")
    for file, entry in (
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
        ("config.json", {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}),
    ):
        path = base / file
        before = path.read_text()
        more = {"auto_map": entry, "tokenizer_class": "Evil", "model_type": "evil"}
        path.write_text(json.dumps({**json.loads(before), **more}))
        assert str(base) in refused("test", "--config", run / "config.yaml", "--ckpt_path", "last")
        path.write_text(before)


def test_weights_of_a_base_run_no_code(run: Path, refused: Refused) -> None:
    base = run.parents[1] / "base"
    (base / "model.safetensors").unlink()
    torch.save({"x": Code(run / "mark")}, base / "pytorch_model.bin")
    said = refused("fit", "--config", run.parents[1] / "fit.yaml")
    assert f"{base} cannot be loaded: its weights are damaged, or hold code, which is not" in said


def test_data_run_no_code(run: Path, refused: Refused) -> None:
    folder = run.parents[1] / "data"
    folder.mkdir()
    script = f"open({str(run / 'mark')!r}, 'w')\n"
    for name in ("data.py", "train.py", f"{folder.name}.py"):
        (folder / name).write_text(script)
    words = [
        "--model.model_name_or_path",
        run.parents[1] / "base",
        "--trainer.default_root_dir",
        "r",
    ]
    data = ["--data", "E2EDataModule", "--data.data_dir", folder]
    assert str(folder) in refused("fit", *words, *data)
