"""The rows of the papers hold the papers' values, as ../shared/reference writes them down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.code.module import CodeDataModule
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.conversation.module import ConversationDataModule
from lightning_peft.datamodules.math.module import MathDataModule

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT.parent / "shared" / "reference" / "hyperparameters.json"
METHODS = ("lora", "droplora", "prunedlora", "loradrop")
DATA = {
    "commonsense": CommonsenseDataModule,
    "math": MathDataModule,
    "code": CodeDataModule,
    "conversation": ConversationDataModule,
}
LLAMAS, GLUE = ("llama2_7b", "llama3_8b"), ("roberta_base", "roberta_large", "llama2_7b")
FAMILIES = {
    **dict.fromkeys(DATA, LLAMAS),
    **dict.fromkeys(("e2e", "dart", "dialogsum"), LLAMAS[:1]),
    "glue": GLUE,
}

Row = Callable[[str, str, str], dict[str, Any]]

pytestmark = pytest.mark.skipif(not REFERENCE.is_file(), reason="no ../shared/reference")


def papers() -> Any:
    return json.loads(REFERENCE.read_text())


@pytest.fixture
def row(
    files_of: Callable[[str, str, str], list[str]], settings: Callable[[list[str]], dict[str, Any]]
) -> Row:
    """The whole settings of a row: ``row(family, model, method)``."""
    return lambda *names: settings(files_of(*names))


def parts(config: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
    """The module's arguments, the adapter's, the optimizer's and the data's."""
    model = config["model"]["init_args"]
    adapter, optimizer = model["adapter"]["init_args"], model["optimizer"]
    assert optimizer["class_path"] == "torch.optim.AdamW"
    return model, adapter, optimizer["init_args"], config["data"]["init_args"]


def test_every_row_has_its_files_and_every_family_a_tiny_one(
    files_of: Callable[[str, str, str], list[str]],
) -> None:
    for family, sizes in FAMILIES.items():
        for size in sizes:
            for method in METHODS:
                assert len(files_of(family, size, method)) >= 3
        assert (ROOT / "configs" / "families" / family / "tiny.yaml").is_file()


@pytest.mark.parametrize("method", ["lora", "droplora"])
@pytest.mark.parametrize("size", LLAMAS)
@pytest.mark.parametrize("family", DATA)
def test_droplora_and_its_lora(family: str, size: str, method: str, row: Row) -> None:
    known = papers()["droplora"]
    shared, own = known["shared"], known[family]
    config = row(family, size, method)
    model, adapter, optimizer, data = parts(config)
    assert (adapter["r"], adapter["lora_alpha"]) == (own["r"], own["lora_alpha"])
    assert adapter["lora_dropout"] == shared["lora_dropout"]
    assert adapter["target_modules"] == shared["target_modules"]
    assert adapter.get("p", known["best_pruning_rate"]) == known["best_pruning_rate"]
    assert (optimizer["lr"], optimizer["weight_decay"]) == (shared["lr"], shared["weight_decay"])
    assert model["lr_scheduler_type"] == shared["scheduler"]
    assert model["warmup_steps"] == shared["warmup_steps"]
    trainer = config["trainer"]
    assert trainer["max_epochs"] == own["epochs"]
    assert data["batch_size"] * trainer["accumulate_grad_batches"] == shared["batch_size"]
    assert DATA[family].protocols[data["protocol"]].loss_on == "response"
    assert shared["loss"] == "response tokens only"


@pytest.mark.parametrize("family", ["math", "code"])
def test_prunedlora(family: str, row: Row) -> None:
    known = papers()["prunedlora"]
    config = row(family, "llama3_8b", "prunedlora")
    model, adapter, optimizer, data = parts(config)
    assert model["model_name_or_path"] == "meta-llama/Meta-Llama-3-8B"
    assert adapter["r"] == max(known["initial_rank"])
    assert adapter["target_r"] == known["final_rank"]
    assert (adapter["lora_alpha"], adapter["lora_dropout"]) == (
        known["lora_alpha"],
        known["lora_dropout"],
    )
    assert adapter["target_modules"] == known["target_modules"]
    assert adapter["prune_every"] == known["prune_every_steps"]
    assert adapter["prune_count"] == known["components_per_prune"]
    assert (optimizer["lr"], model["lr_scheduler_type"]) == (known["lr"], known["scheduler"])
    trainer = config["trainer"]
    assert trainer["max_epochs"] == known["epochs"]
    assert data["batch_size"] == known["per_device_batch"]
    assert trainer["accumulate_grad_batches"] == known["gradient_accumulation"]
    assert DATA[family].protocols[data["protocol"]].max_length == known["max_length"]
    train_on = {"math": "metamathqa", "code": "codefeedback_chats"}
    assert data["train_on"] == train_on[family]
    # Code-Feedback holds fewer.
    assert data.get("train_limit", known["train_samples"]) == known["train_samples"]


@pytest.mark.parametrize(
    ("family", "size"),
    [*(("glue", size) for size in GLUE), *((f, "llama2_7b") for f in ("e2e", "dart", "dialogsum"))],
)
def test_lora_drop(family: str, size: str, row: Row) -> None:
    known = papers()["lora_drop"]
    adapter = parts(row(family, size, "loradrop"))[1]
    targets = known["target_modules"]["roberta" if "roberta" in size else "llama"]
    assert adapter["target_modules"] == targets
    assert adapter["r"] == (16 if family == "dialogsum" else known["r"])
    assert {key: adapter[key] for key in ("sample_ratio", "probe_epochs", "threshold")} == {
        key: known[key] for key in ("sample_ratio", "probe_epochs", "threshold")
    }
    lora = parts(row(family, size, "lora"))[1]
    assert (lora["r"], lora["target_modules"]) == (adapter["r"], targets)
