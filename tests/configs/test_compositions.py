"""Every shipped configuration goes through the real command line, as its first line says."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_peft import engines, trainable_parameters
from lightning_peft.adapters import adapter_layers
from lightning_peft.commands import train
from lightning_peft.comparison.plan import Resolver
from lightning_peft.models.checking import BaseSource
from lightning_peft.modules import causal_lm

ROOT = Path(__file__).parents[2]


def under(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(f"configs/{pattern}"))


# Those of comparisons are of another kind; tests/comparison plans each.
CONFIGS = [file for file in under("**/*.yaml") if Path(file).parent.name != "compare"]
# Those that give a method the same module and the same LoRA are one.
FAMILIES = {
    str(yaml.safe_load((ROOT / file).read_text())["model"]): Path(file).parent.name
    for file in under("families/*/protocol.yaml")
}
METHODS = [Path(file).stem for file in under("methods/*.yaml")]
# Of DropLoRA's Table 1, and of the two other papers beside it.
PAPERS = ("lora", "droplora", "prunedlora", "loradrop")
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
LARGE = [(model, method) for model in COUNTS for method in PAPERS]

Cli = Callable[[list[str]], train.PeftCLI]
Words = Callable[..., list[str]]
Settings = Callable[[list[str]], dict[str, Any]]


def configs_in(words: list[str]) -> list[str]:
    return [value for key, value in zip(words, words[1:], strict=False) if key == "--config"]


def named(files: list[str], *path: str) -> str | None:
    """The class that the last file that names one names."""
    found = None
    for file in files:
        part = yaml.safe_load((ROOT / file).read_text())
        for key in path:
            part = (part or {}).get(key)
        found = (part or {}).get("class_path", found)
    return found


def shown(page: Path) -> set[tuple[str, ...]]:
    """What a page lays over one another."""
    runs = re.findall(r"(?:--config configs/[\w/]+\.yaml[\s\\]*)+", page.read_text())
    return {tuple(re.findall(r"configs/[\w/]+\.yaml", run)) for run in runs}


PAGES = [ROOT / "README.md", *ROOT.glob("configs/*.md"), *sorted(ROOT.glob("docs/*.md"))]
SHOWN = sorted(
    {
        files
        for page in PAGES
        for files in shown(page)
        if not files[0].startswith(("configs/compare", "configs/trainer"))
    }
)


def on_meta(source: BaseSource) -> LlamaForCausalLM:
    """What ``load_causal_lm`` gives, in shape only."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[source.name]))
    return model.to(getattr(torch, source.dtype)).train()


@pytest.mark.parametrize("config", CONFIGS)
def test_begins_with_the_command_that_runs_it(config: str, command_of: Words) -> None:
    words = command_of(config)
    assert words[0] == "fit"
    files = configs_in(words)
    assert config in files
    for name in files:
        assert (ROOT / name).is_file(), f"{config} names {name}"


@pytest.mark.parametrize("config", CONFIGS)
def test_is_parsed_and_instantiated(
    config: str, resolver: Resolver, command_of: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "deepspeed" in config:
        pytest.importorskip("deepspeed")
    monkeypatch.chdir(ROOT)
    words = command_of(config)
    files, tree = configs_in(words), resolver.tree(words[1:])
    module, data = resolver.module(tree), resolver.data(tree)
    assert type(module.adapter).__name__ == named(files, "model", "init_args", "adapter")
    assert type(data).__name__ == named(files, "data")
    if tree["model"]["init_args"]["model_name_or_path"] == "tiny_llama":
        module.configure_model()
        ranks = {layer.rank for layer in adapter_layers(module.model).values()}
        # IncreLoRA's layers have a reserve beside.
        assert ranks == {module.adapter.r + getattr(module.adapter, "incre_rank_num", 0)}


@pytest.mark.parametrize("files", SHOWN, ids=" ".join)
def test_what_a_page_lays_over_one_another_is_accepted(
    files: tuple[str, ...], settings: Settings, resolver: Resolver
) -> None:
    if any("deepspeed" in file for file in files):
        pytest.importorskip("deepspeed")
    module = resolver.module(settings([*files]))
    strategy = named([*files], "model", "init_args", "adapter")
    assert type(module.adapter).__name__ == strategy


def test_pages_show_every_family() -> None:
    text = "".join(page.read_text() for page in PAGES)
    for folder in (ROOT / "configs" / "families").iterdir():
        assert f"configs/families/{folder.name}/tiny.yaml" in text


def pairs() -> Iterator[Any]:
    """All methods over all families; in CI the papers' over each, and each over one."""
    families = sorted(FAMILIES.values())
    for i, method in enumerate(METHODS):
        for family in families:
            often = method in PAPERS or family == families[i % len(families)]
            yield pytest.param(family, method, marks=() if often else pytest.mark.long)


@pytest.mark.parametrize(("family", "method"), list(pairs()))
def test_every_method_goes_over_every_family(
    family: str, method: str, settings: Settings, resolver: Resolver, files_of: Words
) -> None:
    model = "roberta_base" if family == "glue" else "llama2_7b"
    files = files_of(family, model, method)
    tree = settings(files)
    module = resolver.module(tree)
    assert type(module.adapter).__name__ == named(files, "model", "init_args", "adapter")
    given = tree["model"]["init_args"]["adapter"]["init_args"]
    protocol = yaml.safe_load((ROOT / files[0]).read_text())
    shared = protocol["model"]["init_args"]["adapter"]["init_args"]
    # What a method does not name itself is the family's.
    texts = "".join((ROOT / file).read_text() for file in files[1:])
    for key in shared.keys() & given.keys():
        if f" {key}:" not in texts:
            assert given[key] == shared[key], key


@pytest.mark.parametrize("method", under("methods/**/*.yaml"))
def test_every_method_is_built_on_the_embedded_model(
    method: str, settings: Settings, resolver: Resolver
) -> None:
    tree = settings(["configs/families/commonsense/tiny.yaml", method])
    if tree["model"]["init_args"]["quantization"] and not importlib.util.find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is not installed")
    module = resolver.module(tree)
    module.configure_model()
    assert trainable_parameters(module.model) > 0


def often(method: str) -> bool:
    """Whether a test of many files is in CI for a method: for a few, that name much and little."""
    return method in (*PAPERS, "gora")


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=() if often(m) else pytest.mark.long) for m in METHODS]
)
def test_keeps_nothing_of_a_method_before_it(
    method: str, settings: Settings, files_of: Words
) -> None:
    """A class that is named anew keeps the old one's arguments, so a file names all it needs.

    Rank, alpha, dropout and targets are those of the family, whose file comes before a method's.
    """
    files = files_of("commonsense", "llama2_7b", method)
    others = [
        file
        for file in sorted({*under("methods/**/*.yaml")} - {*files})
        # Files without a class of their own only add to what was there.
        if named([file], "model", "init_args", "adapter") not in (None, "LoRA")
    ]
    after, alone = settings([*others, *files]), settings(files)
    assert after["model"] == alone["model"]
    assert after["data"] == alone["data"]


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
def test_a_further_file_moves_any_experiment_to_an_engine(
    file: str, engine: str, cli: Cli, command_of: Words
) -> None:
    if "deepspeed" in file:
        pytest.importorskip("deepspeed")
    words = command_of("configs/methods/tiny/prunedlora.yaml")
    made = cli([*words, "--config", f"configs/trainer/{file}.yaml"])
    assert engines.traits(made.trainer.strategy).name == engine
    assert type(made.model.adapter).__name__ == "PrunedLoRA"
    assert made.trainer.num_nodes == (2 if file == "multi_node" else 1)
    if "deepspeed" in file:
        assert made.trainer.strategy.exclude_frozen_parameters


@pytest.mark.parametrize(("model", "method"), LARGE)
def test_has_the_papers_trainable_parameters_and_batch(
    model: str, method: str, cli: Cli, row: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "load_causal_lm", on_meta)
    made = cli(row("commonsense", model, method))
    module: Any = made.model
    module.configure_model()
    # PrunedLoRA begins at twice the rank; LoRA-drop shares layers only after its probe.
    expected = COUNTS[model] * (2 if method == "prunedlora" else 1)
    assert trainable_parameters(module.model) == expected
    assert all(p.is_meta for p in module.model.parameters())
    # 128 records a step for three epochs.
    assert made.datamodule.batch_size * made.trainer.accumulate_grad_batches == 128
    assert made.trainer.max_epochs == 3
    assert made.datamodule.protocol.name == "droplora"


@pytest.mark.parametrize(
    ("methods", "count"),
    [
        (["dora"], 56_975_360),
        (["dora", "rank_masks"], 56_975_360),
        (["pissa"], 56_098_816),
        (["milora", "rank_masks"], 56_098_816),
        (["lora", "qlora"], 56_098_816),
        (["adalora"], 84_148_224 + 32 * 5 * 48),
        (["full"], 6_738_415_616),
    ],
)
def test_baselines_have_the_trainable_parameters_of_their_papers(
    methods: list[str], count: int, cli: Cli, row: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(causal_lm, "load_causal_lm", on_meta)
    more = [w for name in methods[1:] for w in ("--config", f"configs/methods/{name}.yaml")]
    module: Any = cli([*row("commonsense", "llama2_7b", methods[0]), *more]).model
    module.configure_model()
    assert trainable_parameters(module.model) == count


@pytest.mark.parametrize(
    ("words", "seed"),
    [([], 0), (["--seed_everything", "7"], 7), (["--seed_everything", "7", "--data.seed", "3"], 3)],
)
def test_the_order_of_data_follows_the_seed_unless_it_has_its_own(
    words: list[str], seed: int, cli: Cli, command_of: Words
) -> None:
    made = cli([*command_of("configs/quickstart.yaml"), *words])
    assert made.datamodule.seed == seed
