"""Every shipped configuration goes through the real command line, as its first line says."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import engines, trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.commands import train
from lightning_peft.modules import causal_lm

ROOT = Path(__file__).parents[2]
# Those of comparisons are of another kind; tests/comparison plans each.
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in ROOT.glob("configs/**/*.yaml")
    if "compare" not in path.parts
)
METHODS = {
    "lora": "LoRA",
    "droplora": "DropLoRA",
    "prunedlora": "PrunedLoRA",
    "loradrop": "LoRADrop",
}
# By the last word of a row's name.
STRATEGIES = {
    **METHODS,
    "adalora": "AdaLoRA",
    "dora": "DoRA",
    "full": "FullFineTuning",
    "galore": "GaLore",
    "milora": "MiLoRA",
    "pissa": "PiSSA",
    "qlora": "LoRA",
    "rslora": "LoRA",
    "sparseadapter": "SparseAdapter",
    "tiedlora": "TiedLoRA",
    "vera": "VeRA",
}
DATA = {
    "configs": "ArithmeticDataModule",
    "code": "CodeDataModule",
    "commonsense": "CommonsenseDataModule",
    "conversation": "ConversationDataModule",
    "dart": "DartDataModule",
    "dialogsum": "DialogSumDataModule",
    "e2e": "E2EDataModule",
    "glue": "GlueDataModule",
    "instruction": "InstructionDataModule",
    "math": "MathDataModule",
    "trainer": "ArithmeticDataModule",
}
SIZES = ("tiny", "llama2_7b", "llama3_8b")
ROWS = [f"configs/commonsense/{size}_{method}.yaml" for size in SIZES for method in METHODS]
LARGE = [row for row in ROWS if "tiny" not in row]

LLAMA_2_7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
}
LLAMA_3_8B = {
    **LLAMA_2_7B,
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
}
SHAPES = {"meta-llama/Llama-2-7b-hf": LLAMA_2_7B, "meta-llama/Meta-Llama-3-8B": LLAMA_3_8B}
# Of the papers' rows at r = 32 with q, k, v, up and down adapted.
COUNTS = {"llama2_7b": 56_098_816, "llama3_8b": 56_623_104}

Cli = Callable[[list[str]], train.PeftCLI]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Parses and instantiates what a command line says, and stops before it runs."""
    made: list[train.PeftCLI] = []

    class Stopped(train.PeftCLI):
        def _run_subcommand(self, subcommand: str) -> None:
            made.append(self)

    def parse(words: list[str]) -> train.PeftCLI:
        train.main([*words, "--trainer.default_root_dir", str(tmp_path)])
        return made[-1]

    monkeypatch.setattr(train, "PeftCLI", Stopped)
    monkeypatch.setattr(sys, "argv", ["lightning-peft"])
    monkeypatch.chdir(ROOT)
    return parse


def command_of(config: str, data_dir: Path | str = "DATA") -> list[str]:
    """The words after ``lightning-peft`` in a file's first line, a folder in DATA's place."""
    first = (ROOT / config).read_text().splitlines()[0]
    assert first.startswith("# lightning-peft "), f"{config} begins with {first!r}"
    return [str(data_dir) if word == "DATA" else word for word in shlex.split(first)[2:]]


def on_meta(name: str, dtype: str, **others: Any) -> LlamaForCausalLM:
    """What ``load_causal_lm`` gives, in shape only."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[name]))
    return model.to(getattr(torch, dtype)).train()


@pytest.mark.parametrize("config", CONFIGS)
def test_begins_with_the_command_that_runs_it(config: str) -> None:
    words = command_of(config)
    assert words[0] == "fit"
    named = [value for key, value in zip(words, words[1:], strict=False) if key == "--config"]
    assert config in named
    for name in named:
        assert (ROOT / name).is_file(), f"{config} names {name}"


@pytest.mark.parametrize("config", CONFIGS)
def test_is_parsed_and_instantiated(config: str, cli: Cli, tmp_path: Path) -> None:
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
    words = command_of(config, tmp_path)
    made = cli(words)
    # The row that a shared file names comes last.
    row = [value for key, value in zip(words, words[1:], strict=False) if key == "--config"][-1]
    strategy = STRATEGIES.get(Path(row).stem.rpartition("_")[2], "DropLoRA")
    assert type(made.model.adapter).__name__ == strategy
    assert type(made.datamodule).__name__ == DATA[Path(config).parent.name]
    if Path(made.model.model_name_or_path).is_dir():
        made.model.configure_model()
        ranks = {layer.rank for layer in adapter_layers(made.model.model).values()}
        assert ranks == {made.model.adapter.r}


@pytest.mark.parametrize(
    ("file", "engine"),
    [
        ("cpu", "one device"),
        ("single", "one device"),
        ("ddp", "DDP"),
        ("deepspeed_z2", "DeepSpeed ZeRO-2"),
        ("deepspeed_z3", "DeepSpeed ZeRO-3"),
        ("fsdp", "FSDP2"),
        ("multi_node", "DDP"),
    ],
)
def test_a_second_file_moves_any_experiment_to_an_engine(
    file: str, engine: str, cli: Cli, tmp_path: Path
) -> None:
    if "deepspeed" in file:
        pytest.importorskip("deepspeed")
    words = command_of("configs/commonsense/tiny_prunedlora.yaml", tmp_path)
    made = cli([*words, "--config", f"configs/trainer/{file}.yaml"])
    assert engines.traits(made.trainer.strategy).name == engine
    assert type(made.model.adapter).__name__ == "PrunedLoRA"
    assert made.trainer.num_nodes == (2 if file == "multi_node" else 1)
    if "deepspeed" in file:
        assert made.trainer.strategy.exclude_frozen_parameters


@pytest.mark.parametrize("config", LARGE)
def test_has_the_papers_trainable_parameters(
    config: str, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "load_causal_lm", on_meta)
    module: Any = cli(command_of(config, tmp_path)).model
    module.configure_model()
    size, _, method = Path(config).stem.rpartition("_")
    # PrunedLoRA begins at twice the rank; LoRA-drop shares layers only after its probe.
    expected = COUNTS[size] * (2 if method == "prunedlora" else 1)
    assert trainable_parameters(module.model) == expected
    assert all(p.is_meta for p in module.model.parameters())


@pytest.mark.parametrize(
    ("row", "count"),
    [
        ("dora", 56_975_360),
        ("droplora_on_dora", 56_975_360),
        ("pissa", 56_098_816),
        ("droplora_on_milora", 56_098_816),
        ("qlora", 56_098_816),
        ("adalora", 84_148_224 + 32 * 5 * 48),
        ("full", 6_738_415_616),
    ],
)
def test_baselines_have_the_trainable_parameters_of_their_papers(
    row: str, count: int, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "load_causal_lm", on_meta)
    module: Any = cli(command_of(f"configs/commonsense/llama2_7b_{row}.yaml", tmp_path)).model
    module.configure_model()
    assert trainable_parameters(module.model) == count


@pytest.mark.parametrize("config", LARGE)
def test_takes_128_records_a_step_for_three_epochs(config: str, cli: Cli, tmp_path: Path) -> None:
    made = cli(command_of(config, tmp_path))
    assert made.datamodule.batch_size * made.trainer.accumulate_grad_batches == 128
    assert made.trainer.max_epochs == 3
    assert made.datamodule.protocol.name == "droplora"


@pytest.mark.parametrize("config", ROWS)
def test_keeps_nothing_of_a_file_before_it(config: str, cli: Cli, tmp_path: Path) -> None:
    """A class that is named anew keeps the old one's arguments, so a row names all it needs."""
    words = command_of(config, tmp_path)
    alone = cli(words)
    place = words.index(config) - 1
    size = Path(config).stem.rpartition("_")[0]
    others = [row for row in ROWS if row != config and Path(row).stem.rpartition("_")[0] == size]
    before = [word for row in others for word in ("--config", row)]
    after = cli([*words[:place], *before, *words[place:]])
    assert after.config.fit.model.as_dict() == alone.config.fit.model.as_dict()
    assert after.config.fit.data.as_dict() == alone.config.fit.data.as_dict()


@pytest.mark.parametrize(
    ("words", "seed"),
    [([], 0), (["--seed_everything", "7"], 7), (["--seed_everything", "7", "--data.seed", "3"], 3)],
)
def test_the_order_of_data_follows_the_seed_unless_it_has_its_own(
    words: list[str], seed: int, cli: Cli, tmp_path: Path
) -> None:
    made = cli([*command_of("configs/quickstart.yaml", tmp_path), *words])
    assert made.datamodule.seed == seed
