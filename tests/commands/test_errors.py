"""Bad input ends in one sentence and an exit code, and leaves nothing behind."""

# ruff: noqa: E501 - a row of a table, input and sentence, reads best as one line

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_peft.assets import TINY_LLAMA
from lightning_peft.cli import main

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.enable_progress_bar": "false",
    "trainer.limit_val_batches": "1",
    "trainer.log_every_n_steps": "1",
    "model.model_name_or_path": "tiny_llama",
    "data": "ArithmeticDataModule",
    "data.batch_size": "4",
    "data.val_size": "8",
    "data.test_size": "8",
    "checkpoint.every_n_train_steps": "1",
}
Fail = Callable[..., str]


def small(root: Path, **settings: Any) -> list[str]:
    """Words of a fit that takes a second; ``__`` stands for a dot."""
    given = {key.replace("__", "."): value for key, value in settings.items()}
    words = {**SMALL, "trainer.default_root_dir": root, **given}
    return ["fit", *(str(word) for key, value in words.items() for word in (f"--{key}", value))]


@pytest.fixture
def fail(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Fail:
    """Run a command that must fail, from an own folder, and give the sentence."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)

    def run(*words: Any) -> str:
        capfd.readouterr()
        with pytest.raises(SystemExit) as info:
            main([str(word) for word in words])
        error = capfd.readouterr().err
        assert info.value.code == 2
        assert "Traceback" not in error
        assert "usage:" not in error
        lines = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, error
        assert error.endswith(lines[0] + "\n")
        return lines[0]

    return run


def quickstart(*words: Any) -> list[Any]:
    return ["fit", "--config", QUICKSTART, "--trainer.default_root_dir", "root", *words]


ADAPTER = "--model.adapter"
ARGUMENTS = [
    # Unknown keys.
    (["--model.adapter.rank", 4], "model.adapter.rank is no argument of DropLoRA; did you mean model.adapter.r?"),
    (["--model.adapter.alpha", 4], "did you mean model.adapter.lora_alpha?"),
    (["--model.adpter.r", 4], "model.adpter is no argument of CausalLMModule; did you mean model.adapter?"),
    (["--model.optimizer.learning_rate", 1], "no argument of AdamW; did you mean model.optimizer.lr?"),
    (["--data.data_dirr", "x"], "data.data_dirr is no argument of ArithmeticDataModule; there are batch_size"),
    (["--trainr.max_steps", 1], "trainr is unknown; did you mean trainer?"),
    (["--trainer.max_step", 1], "trainer.max_step is unknown; did you mean trainer.max_steps?"),
    (["--checkpoint.save_top", 1], "checkpoint.save_top is unknown; did you mean checkpoint.save_top_k?"),
    (["--ckpt_pth", "x"], "ckpt_pth is unknown; did you mean ckpt_path?"),
    (["oops"], "'oops' belongs to no option"),
    ([ADAPTER], "--model.adapter needs a value."),
    # Unknown classes.
    ([ADAPTER, "DropLora"], "model.adapter: 'DropLora' is no AdapterStrategy; did you mean DropLoRA?"),
    ([ADAPTER, "my.Own"], "model.adapter: 'my.Own' cannot be imported (No module named 'my')."),
    ([ADAPTER, "torch.nn.Linear"], "'torch.nn.Linear' is no AdapterStrategy; there are"),
    (["--model.optimizer", "os.system"], "model.optimizer: 'os.system' is no Optimizer; there are"),
    (["--trainer.callbacks", "NoSuch"], "trainer.callbacks: 'NoSuch' is no Callback; there are"),
    (["--model", "CausaLM"], "model: 'CausaLM' is no LightningModule; did you mean CausalLMModule?"),
    (["--data", "Arithmetic"], "did you mean ArithmeticDataModule?"),
    (["--model.optimizer", "AdmW"], "model.optimizer: 'AdmW' is no Optimizer; did you mean AdamW?"),
    # Values.
    (["--model.adapter.r", "abc"], "model.adapter.r: 'abc' is no int."),
    (["--model.peft_path", "a: {b}"], "model.peft_path takes a text, but YAML reads 'a: {b}' as {'a': {'b': None}}; put the text in quotes of its own."),
    (["--model.optimizer.lr", "abc"], "model.optimizer.lr: 'abc' is no float."),
    (["--trainer.max_steps", "[1]"], "trainer.max_steps: '[1]' is no int."),
    (["--trainer", "5"], "trainer: '5' is no mapping of keys to values; its keys are accelerator"),
    (["--config", "x" * 300], "cannot be read (File name too long)."),
    (["--config", "."], "--config: . is a folder; give a file of settings."),
    (["--trainer.max_steps", "x"], "trainer.max_steps: 'x' is no int."),
    (["--model.adapter.mask", "tokn"], "model.adapter.mask: 'tokn' is none of token, "),
    (["--model.adapter.mask", "tokn"], "; did you mean token?"),
    # What constructors refuse.
    (["--model.adapter.r", 0], "error: model.adapter: r must be at least 1, got 0."),
    (["--model.adapter.p", 1.0], "error: model.adapter: p must lie in [0, 1), got 1.0."),
    ([ADAPTER, "LoRADrop", "--model.adapter.threshold", 1.5], "threshold must lie in (0, 1], got 1.5."),
    ([ADAPTER, "PrunedLoRA", "--model.adapter.target_r", 64], "between 0 and r = 32, got 64."),
    (["--data.batch_size", 0], "error: data.batch_size is 0; it has to be 1 or more."),
    (["--importance.every_n_steps", 0], "error: importance: every_n_steps must be at least 1"),
    (["--trainer.accelerator", "gpuu"], "error: trainer: You selected an invalid accelerator name"),
    (["--trainer.logger", "MLFlowLogger"], "error: trainer.logger: Requirement 'mlflow>=1.0.0' not met. HINT: Try running `pip install"),
    (["--trainer.max_steps", -5], "error: trainer: `max_steps` must be a non-negative integer"),
    # What only the start of a run tells.
    (["--model.dtype", "float"], "model.dtype must be one of auto, float32"),
    (["--model.lr_scheduler_type", "liner"], "model.lr_scheduler_type: 'liner' is no schedule; did you mean linear?"),
    (["--model.optimizer.lr", -1], "model.optimizer: Invalid learning rate: -1.0."),
    (["--model.optimizer.fused", "true", "--trainer.precision", "bf16-mixed"], "bf16-mixed Lightning clips no gradients for a fused step; set it to false, or trainer.gradient_clip_val to null."),
    (["--model.liger", "true"], "model.liger: Liger's kernels run on GPUs, and this run is on the CPU; set it to false."),
    (["--model.adapter.target_modules", "[q_porj]"], "target_modules: 'q_porj' matches no linear layer; near names are q_proj"),
    (["--model.model_name_or_path", "./nowhere"], "model.model_name_or_path: the folder ./nowhere does not exist."),
    (["--model.model_name_or_path", "meta-llama/Nothing"], "meta-llama/Nothing is no folder, is not in the local cache, and the hub cannot be reached."),
    (["--ckpt_path", "nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist."),
    (["--ckpt_path", "last"], "ckpt_path: last was given, but no run under root has a checkpoint."),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), ARGUMENTS)
def test_argument(fail: Fail, tmp_path: Path, words: list[Any], sentence: str) -> None:
    assert sentence in fail(*quickstart(*words))
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (
            "        p: 0.1",
            "        pp: 0.1",
            "model.adapter.pp is no argument of DropLoRA; did you",
        ),
        (
            "max_steps: 600",
            "max_stepz: 400",
            "trainer.max_stepz is unknown; did you mean trainer.max",
        ),
        ("class_path: DropLoRA", "class_path: DropLora", "'DropLora' is no AdapterStrategy; did"),
        ("\ntrainer:", "\ntrainers:", "trainers is unknown; did you mean trainer?"),
        ("lr: 3.0e-3", "lr: high", "model.optimizer.lr: 'high' is no float."),
        ("model:\n", "model: [\n", "line "),
        (
            "validate_first",
            "trainer: {max_epochs: 1}\nvalidate_first",
            "'trainer' stands in line 4",
        ),
        ("trainer:\n", "trainer: .inf\nx:\n", "trainer: inf is no mapping of keys to values"),
    ],
)
def test_file(fail: Fail, tmp_path: Path, old: str, new: str, sentence: str) -> None:
    """The file is named too: a second one, relative to the folder where the command runs."""
    text = QUICKSTART.read_text()
    assert old in text
    folder = tmp_path / "sub"
    folder.mkdir()
    (folder / "bad.yaml").write_text(text.replace(old, new))
    error = fail(*quickstart("--config", "sub/bad.yaml"))
    assert sentence in error
    assert "sub/bad.yaml" in error
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["fti"], "'fti' is no command; did you mean fit?"),
        (["fit"], "model.model_name_or_path is missing"),
        (
            ["fit", "--model.model_name_or_path", "tiny_llama"],
            "data is missing: give --data (one of",
        ),
        (["fit", "--config", "nowhere.yaml"], "--config: the file nowhere.yaml does not exist."),
        (["report", "nowhere"], "nowhere is not a folder"),
        (["test", "--confg", "x"], "confg is unknown; there are"),
    ],
)
def test_command(fail: Fail, tmp_path: Path, words: list[str], sentence: str) -> None:
    assert sentence in fail(*words)
    assert not list(tmp_path.rglob("*"))


def test_option_beats_file(fail: Fail) -> None:
    """A class that is replaced takes its arguments with it; those of the new one are looked at."""
    error = fail(*quickstart(ADAPTER, "LoRA", "--model.adapter.p", 0.5))
    assert "model.adapter.p is no argument of LoRA" in error


def test_folder_without_weights(fail: Fail, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    words = quickstart("--model.model_name_or_path", folder)
    assert "holds no config.json, so it is no model." in fail(*words)
    shutil.copy(TINY_LLAMA / "config.json", folder)
    assert "has a config.json but no weights (model.safetensors)." in fail(*words)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("command", ["fit", "test", "export"])
def test_damaged_checkpoint(fail: Fail, tmp_path: Path, command: str) -> None:
    path = tmp_path / "cut.ckpt"
    path.write_bytes(b"PK\x03\x04abc")
    options = ["--output", "out"] if command == "export" else ["--config", QUICKSTART]
    assert f"{path} is cut off or damaged" in fail(command, "--ckpt_path", path, *options)
    assert [p.name for p in tmp_path.iterdir()] == ["cut.ckpt"]


RECORD = {"instruction": "a", "input": "", "output": "the correct answer is true", "answer": "true"}


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (None, "'data' is not a folder"),
        ("{not json", "train.json is not JSON"),
        ("[]", "train.json holds no record."),
        (json.dumps([RECORD, {"instruction": "a", "answer": "true"}]), "Record 2 of data/boolq/train.json"),
    ],
)  # fmt: skip
def test_data(fail: Fail, tmp_path: Path, train: str | None, sentence: str) -> None:
    if train is not None:
        folder = tmp_path / "data" / "boolq"
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(train)
        (folder / "test.json").write_text(json.dumps([RECORD]))
    settings = {"data": "CommonsenseDataModule", "data.data_dir": "data", "data.val_size": "1"}
    words = small(Path("root"), **settings)
    at = words.index("--data.test_size")
    assert sentence in fail(*words[:at], *words[at + 2 :])
    assert not (tmp_path / "root").exists()


def evil(path: Path, run: Path | None = None) -> Path:
    """A configuration, that of a run if there is one, whose optimizer is a command of the shell."""
    config = yaml.safe_load((run / "config.yaml" if run else QUICKSTART).read_text())
    command = {"class_path": "os.system", "init_args": {"command": f"touch {path}.ran"}}
    config["model"]["init_args"]["optimizer"] = command
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict", "estimate", "export"])
def test_a_configuration_runs_no_command_of_the_shell(
    fail: Fail, run: Path, tmp_path: Path, command: str
) -> None:
    """Nor does one that came with somebody else's run."""
    path = evil(tmp_path / "config.yaml", None if command in ("fit", "estimate") else run)
    (tmp_path / "checkpoints").mkdir()
    checkpoint = shutil.copy(run / "checkpoints" / "step=2.ckpt", tmp_path / "checkpoints")
    words = ["--ckpt_path", checkpoint] if command != "estimate" else []
    words += ["--output", "out"] if command == "export" else ["--config", path]
    assert "model.optimizer: 'os.system' is no Optimizer; there are" in fail(command, *words)
    assert not Path(f"{path}.ran").exists()


# Checkpoints that belong to something else.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps."""
    root = tmp_path_factory.mktemp("run")
    argv, path = sys.argv, sys.path[:]
    main(
        small(
            root,
            model__adapter="LoRA",
            model__adapter__target_modules="[q_proj]",
            trainer__max_steps=2,
        )
    )
    sys.argv, sys.path[:] = argv, path
    return root / "version_0"


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def resume(run: Path, adapter: str = "LoRA", targets: str = "[q_proj]", **more: Any) -> list[str]:
    settings = {"model.adapter": adapter, "model.adapter.target_modules": targets, **more}
    settings["resume_with_changes"] = "true"
    checkpoint = run / "checkpoints" / "step=2.ckpt"
    return small(run.parent, **settings, ckpt_path=checkpoint, trainer__max_steps=3)


FOREIGN = [
    ({"adapter": "DropLoRA"}, ["was trained with LoRA, model.adapter is DropLoRA"]),
    ({"targets": "[q_proj,k_proj]"}, ["only there none", "only here model.layers.0.self_attn.k_proj"]),
    ({"targets": "[v_proj]"}, ["only there model.layers.0.self_attn.q_proj", "only here model.layers.0.self_attn.v"]),
    ({"model.adapter.modules_to_save": "[lm_head]"}, ["trained with modules_to_save = []", "is ['lm_head']"]),
    ({"model.model_name_or_path": "other"}, ["base model has fingerprint", "an adapter fits only the base"]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "sentences"), FOREIGN)
def test_foreign_checkpoint(
    fail: Fail, run: Path, tmp_path: Path, settings: dict[str, str], sentences: list[str]
) -> None:
    """The run that would have been resumed keeps its configuration, checkpoints and adapter."""
    if "other" in settings.values():
        other = tmp_path / "other"
        shutil.copytree(TINY_LLAMA, other)
        weights = {k: v + 1e-3 for k, v in load_file(other / "model.safetensors").items()}
        save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
        settings = {key: str(other) for key in settings}
    before = contents(run)
    error = fail(*resume(run, **settings))
    assert all(sentence in error for sentence in sentences)
    after = contents(run)
    rewritten = {name for name in before if before[name] != after.get(name)}
    assert rewritten <= {"metrics.csv", "run.json"}  # which the next test is about
    assert after.keys() <= before.keys()


def test_failed_resume_leaves_the_run_as_it_was(fail: Fail, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "runs" / "version_0"
    shutil.copytree(run, copy)
    (copy / "metrics.csv").write_text("step,lr\n0,1\n1,1\n")
    before = contents(copy)
    fail(*resume(copy, adapter="DropLoRA"))
    assert contents(copy) == before


def test_checkpoint_of_other_program(fail: Fail, tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "other.ckpt"
    path.parent.mkdir()
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.5", "global_step": 1}, path)
    assert "it has no entry 'adapter'" in fail(*small(tmp_path, ckpt_path=path))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoints"]


def test_loss_that_is_no_number(fail: Fail, tmp_path: Path) -> None:
    """Checkpoints from before stay, and no adapter comes out."""
    settings = {"model.optimizer.lr": "1e30", "model.warmup_steps": 3, "trainer.max_steps": 9}
    error = fail(*small(tmp_path, **settings))
    assert "the loss is nan at step 2 with learning rate" in error
    checkpoints = sorted((tmp_path / "version_0" / "checkpoints").iterdir())
    assert any(f"the last good checkpoint is {path}." in error for path in checkpoints)
    assert not (tmp_path / "version_0" / "adapter").exists()


def test_quiet(
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nothing of what every run would say, validation before the first step included."""
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    main(small(tmp_path, validate_first="true", trainer__max_steps=1))
    said = [*capfd.readouterr(), caplog.text, *(str(warning.message) for warning in recwarn)]
    assert "run.json" in caplog.text
    for noise in ("Tip", "LeafSpec", "Loading weights", "override existing", "Seed set"):
        assert not any(noise in text for text in said)
