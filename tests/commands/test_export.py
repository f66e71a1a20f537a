"""A run's adapter is exported from its checkpoint; what cannot be is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lightning_peft.assets import TINY_LLAMA
from lightning_peft.cli import main as run
from lightning_peft.commands import export as command
from lightning_peft.errors import MissingFile, UserError

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds a run of two steps."""
    root = tmp_path_factory.mktemp("runs")
    settings = {
        "trainer.default_root_dir": root,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "validate_first": "false",
        "data.batch_size": 4,
        "model.adapter.r": 2,
    }
    argv, path = sys.argv, sys.path[:]
    run(["fit", "--config", QUICKSTART, *(f"--{key}={value}" for key, value in settings.items())])
    sys.argv, sys.path[:] = argv, path
    return root


def test_the_adapter_is_that_of_the_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--ckpt_path", str(root), "--output", str(tmp_path / "out")])
    assert capsys.readouterr().out == f"adapter: {tmp_path / 'out'}\n"
    expected = load_file(root / "version_0/adapter/adapter_model.safetensors")
    found = load_file(tmp_path / "out/adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_merged_model_loads_by_itself(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["--ckpt_path", str(root), "--output", str(tmp_path / "out"), "--merge"])
    assert capsys.readouterr().out.endswith(f"merged model: {tmp_path / 'out'}\n")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not any("lora" in name for name in model.state_dict())
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_a_base_that_is_still_being_pruned_waits_for_its_last_removal(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=8,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(TINY_LLAMA).save_pretrained(tmp_path / "base")
    settings = {
        "trainer.default_root_dir": tmp_path,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 6,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "validate_first": "false",
        "data.batch_size": 4,
        "checkpoint.every_n_train_steps": 3,
        "checkpoint.save_top_k": -1,
        "model.model_name_or_path": tmp_path / "base",
        "model.adapter": "LoRAPrune",
        "model.adapter.r": 2,
        "model.adapter.start_step": 0,
        "model.adapter.prune_every": 5,
        "model.adapter.removals": 2,
    }
    argv, path = sys.argv, sys.path[:]
    run(["fit", "--config", QUICKSTART, *(f"--{key}={value}" for key, value in settings.items())])
    sys.argv, sys.path[:] = argv, path
    checkpoints, output = tmp_path / "version_0/checkpoints", tmp_path / "out"
    words = ["--output", str(output), "--merge", "--ckpt_path"]
    with pytest.raises(UserError) as error:
        command.main([*words, str(checkpoints / "step=3.ckpt")])
    assert str(error.value) == (
        "LlamaConfig refuses the base as it is in this checkpoint (The hidden size (48) is not a "
        "multiple of the number of attention heads (5)); export one from after the last removal."
    )
    assert not output.exists()
    command.main([*words, str(checkpoints / "step=6.ckpt")])
    assert AutoModelForCausalLM.from_pretrained(output).config.num_attention_heads == 4


@pytest.mark.parametrize("merges", [(), ("--merge",)])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_checkpoint_whose_numbers_are_none_is_refused_naming_the_tensor(
    root: Path, tmp_path: Path, merges: tuple[str, ...], value: str
) -> None:
    from lightning_peft.runs import AtomicCheckpointIO, find_last

    path = tmp_path / "broken.ckpt"
    checkpoint = torch.load(find_last(root), weights_only=True)
    name = next(key for key in checkpoint["state_dict"] if key.endswith("q_proj.lora_B"))
    checkpoint["state_dict"][name].flatten()[0] = float(value)
    del checkpoint["digest"]
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)  # as who changes one by hand has to
    config = str(root / "version_0/config.yaml")
    words = ["--ckpt_path", str(path), "--config", config, "--output", str(tmp_path / "out")]
    said = f"broken.ckpt holds NaN or an infinite number in {name}: training had broken down"
    with pytest.raises(UserError, match=said):
        command.main([*words, *merges])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "does not exist; give the run's configuration."),
        ("a: [", "is not valid YAML"),
        ("trainer: {}", "has no model; give the run's configuration."),
        ("model: {class_path: Nothing}", "model"),
    ],
)
def test_a_configuration_that_is_none_is_one_sentence(
    root: Path, tmp_path: Path, content: str | None, sentence: str
) -> None:
    config = tmp_path / "config.yaml"
    if content is not None:
        config.write_text(content)
    words = ["--ckpt_path", str(root), "--config", str(config), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match=sentence) as caught:
        command.main(words)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_full_folder_a_file_and_a_checkpoint_that_is_not_there_are_refused(
    tmp_path: Path,
) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(UserError, match="is not empty; give a new folder"):
        command.main(["--ckpt_path", "none.ckpt", "--output", str(tmp_path)])
    with pytest.raises(UserError, match="is a file; give a new folder"):
        command.main(["--ckpt_path", "none.ckpt", "--output", str(tmp_path / "x")])
    with pytest.raises(MissingFile, match=r"the checkpoint none.ckpt does not exist"):
        command.main(["--ckpt_path", "none.ckpt", "--output", str(tmp_path / "new")])
