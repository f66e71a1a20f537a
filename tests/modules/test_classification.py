"""Classifiers: encoders and LLaMA under a head that trains, is saved and is taken away."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForSequenceClassification,
)

from lightning_peft.adapters import adapter_layers
from lightning_peft.assets import TINY_LLAMA
from lightning_peft.datamodules.glue.module import GlueDataModule
from lightning_peft.modules.classification import SequenceClassificationModule
from lightning_peft.strategies import LoRA

ROOT = Path(__file__).parents[2]
TARGETS = {"roberta": ["query", "value"], "llama": ["q_proj", "v_proj"]}
HEADS = {"roberta": "classifier", "llama": "score"}


@pytest.fixture
def fit(bases: dict[str, Path], glue: Path, tmp_path: Path) -> Callable[..., Any]:
    """Fits a module on a task: ``fit(kind, task, steps)``; the trainer has module and data."""

    def run(
        kind: str,
        task: str = "sst2",
        steps: int = 4,
        folder: str = "run",
        seed: int = 0,
        ckpt_path: Any = None,
        adapter: Any = None,
        accumulate: int = 1,
        **kwargs: Any,
    ) -> Trainer:
        seed_everything(seed, verbose=False)
        adapter = adapter or LoRA(r=4, lora_dropout=0.1, target_modules=TARGETS[kind])
        module = SequenceClassificationModule(str(bases[kind]), adapter=adapter, **kwargs)
        module.make_optimizer = lambda params: torch.optim.AdamW(params, lr=1e-2)
        trainer = make_trainer(tmp_path / folder, steps, accumulate)
        trainer.fit(module, make_data(glue, task, tmp_path), ckpt_path=ckpt_path)
        return trainer

    return run


def make_data(glue: Path, task: str, tmp_path: Path, **kwargs: Any) -> GlueDataModule:
    options = {"batch_size": 4, "eval_batch_size": 5, "max_length": 120, "seed": 0} | kwargs
    return GlueDataModule(task, str(glue), cache_dir=str(tmp_path / "cache"), **options)


def make_trainer(folder: Path, steps: int, accumulate: int = 1) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )


def trained(trainer: Trainer) -> dict[str, Tensor]:
    module: Any = trainer.lightning_module
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Any]) -> Tensor:
    model.eval()
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


@pytest.mark.parametrize("kind", ["roberta", "llama"])
def test_the_head_trains_is_saved_and_resumed(
    kind: str,
    fit: Callable[..., Trainer],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr("lightning_peft.modules.building.rank_zero_info", said.append)
    options = {"accumulate": 2, "lr_scheduler_type": "constant"}  # one that knows no end
    whole = fit(kind, steps=6, **options)
    assert f"  trained in full and saved with the adapter: {HEADS[kind]} " in said[0]
    half = fit(kind, steps=2, folder="half", **options)
    assert half.lightning_module.adapter.modules_to_save == [HEADS[kind]]
    names = {name for name in trained(half) if HEADS[kind] in name}
    path = tmp_path / "second_step.ckpt"
    half.save_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    assert names
    assert names < saved["state_dict"].keys()
    assert all(HEADS[kind] in n or "lora_" in n for n in saved["state_dict"])
    # Another seed: the head begins otherwise, which must not make the base another one.
    resumed = fit(kind, steps=6, folder="resumed", seed=1, ckpt_path=path, **options)
    assert same(trained(whole), trained(resumed))
    assert not any(torch.equal(trained(whole)[n], trained(half)[n]) for n in names)


@pytest.mark.parametrize(
    ("kind", "task"), [("roberta", "mnli"), ("roberta", "stsb"), ("llama", "sst2")]
)
def test_peft_loads_adapter_and_head_with_equal_logits(
    kind: str,
    task: str,
    fit: Callable[..., Trainer],
    tmp_path: Path,
    bases: dict[str, Path],
) -> None:
    from peft import AutoPeftModelForSequenceClassification, PeftModel

    from lightning_peft import load_peft, save_peft

    trainer = fit(kind, task, steps=5)
    module: Any = trainer.lightning_module
    folder = save_peft(module.model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_CLS"
    assert config["modules_to_save"] == [HEADS[kind]]
    batch = next(iter(trainer.datamodule.val_dataloader()))
    expected = logits_of(module.model, batch)
    outputs = expected.shape[1]
    assert outputs == {"mnli": 3, "stsb": 1, "sst2": 2}[task]

    def base() -> Any:
        made = AutoModelForSequenceClassification.from_pretrained(bases[kind], num_labels=outputs)
        made.config.pad_token_id = trainer.datamodule.pad_id
        return made

    torch.testing.assert_close(
        logits_of(PeftModel.from_pretrained(base(), folder), batch), expected, atol=1e-5, rtol=0
    )
    auto = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=outputs)
    auto.config.pad_token_id = auto.base_model.model.config.pad_token_id = (
        module.model.config.pad_token_id
    )
    torch.testing.assert_close(logits_of(auto, batch), expected, atol=1e-5, rtol=0)
    ours = load_peft(base(), folder)
    torch.testing.assert_close(logits_of(ours, batch), expected, atol=1e-5, rtol=0)


def test_llama_pools_the_last_token_of_each_row(fit: Callable[..., Trainer]) -> None:
    trainer = fit("llama", steps=3)
    module: Any = trainer.lightning_module
    data: Any = trainer.datamodule
    assert module.model.config.pad_token_id == data.pad_id == 2  # there is no pad token: EOS
    batch = next(b for b in data.val_dataloader() if (b["attention_mask"] == 0).any())
    assert (batch["attention_mask"][:, 0] == 1).all()  # padded on the right
    found = logits_of(module.model, batch)
    with torch.no_grad():
        hidden = module.model.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    expected = hidden[torch.arange(len(last)), last] @ module.model.score.weight.T
    torch.testing.assert_close(found, expected.detach())
    for row, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {key: batch[key][row : row + 1, :length] for key in ("input_ids", "attention_mask")}
        torch.testing.assert_close(logits_of(module.model, alone)[0], found[row])


@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_loss_is_summed_over_records(task: str, fit: Callable[..., Trainer]) -> None:
    trainer = fit("roberta", task, steps=1)
    module: Any = trainer.lightning_module
    batch = next(iter(trainer.datamodule.train_dataloader()))
    outputs = logits_of(module.model, batch)
    total, count = module.target_loss(batch)
    assert count == 4 == batch["num_target_tokens"]
    if task == "stsb":
        expected = ((outputs[:, 0] - batch["labels"]) ** 2).sum()
        assert module.model.config.problem_type == "regression"
    else:
        expected = -F.log_softmax(outputs, -1)[torch.arange(4), batch["labels"]].sum()
    torch.testing.assert_close(total, expected)


def test_validation_and_test_say_the_tasks_metrics(
    fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    trainer = fit("roberta", "mnli", steps=3)
    module: Any = trainer.lightning_module
    data: Any = trainer.datamodule
    right: dict[int, list[bool]] = {0: [], 1: []}
    losses = []
    for batch in data.val_dataloader():
        outputs = logits_of(module.model, batch)
        losses += F.cross_entropy(outputs, batch["labels"], reduction="none").tolist()
        for number, hit in zip(batch["set"], outputs.argmax(-1) == batch["labels"], strict=True):
            right[int(number)].append(bool(hit))
    both = right[0] + right[1]
    assert (len(right[0]), len(right[1])) == (24, 19)
    found = {k: float(v) for k, v in trainer.validate(module, data, verbose=False)[0].items()}
    share = {"val_accuracy": both, "val_score": both}
    share |= {"val_accuracy_mnli_matched": right[0], "val_accuracy_mnli_mismatched": right[1]}
    expected = {k: sum(hits) / len(hits) for k, hits in share.items()}
    assert found == pytest.approx({**expected, "val_loss": sum(losses) / len(losses)})
    tested = trainer.test(module, data, verbose=False)
    parts = ("matched", "mismatched")
    keys = {f"test/mnli_{part}/{name}" for part in parts for name in ("accuracy", "loss")}
    assert tested[0].keys() == {*keys, "test/loss"}
    by_part = (
        24 * tested[0][f"test/mnli_{parts[0]}/loss"],
        19 * tested[0][f"test/mnli_{parts[1]}/loss"],
    )
    assert sum(by_part) == pytest.approx(sum(losses), rel=1e-5)
    assert tested[0]["test/loss"] == pytest.approx((by_part[0] / 24 + by_part[1] / 19) / 2)
    assert tested[0]["test/mnli_matched/accuracy"] == pytest.approx(sum(right[0]) / 24)
    lines = (tmp_path / "run" / "predictions" / "mnli_mismatched.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == list(range(19))
    assert rows[0].keys() == {"index", "output", "expected", "score", "loss", "correct"}
    assert [row["expected"] for row in rows[:3]] == ["entailment", "neutral", "contradiction"]
    assert sum(row["correct"] for row in rows) == sum(right[1])
    assert all(row["correct"] == (row["output"] == row["expected"]) for row in rows)
    assert all(1 / 3 <= row["score"] <= 1 for row in rows)
    assert not list((tmp_path / "run" / "predictions").glob("*.part*"))


def test_scores_are_predicted_as_numbers(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    from scipy.stats import spearmanr

    trainer = fit("roberta", "stsb", steps=3)
    tested = trainer.test(trainer.lightning_module, trainer.datamodule, verbose=False)[0]
    lines = (tmp_path / "run" / "predictions" / "stsb.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["expected"] for row in rows[:3]] == pytest.approx([0.0, 0.9, 1.8])
    columns = [[row[key] for row in rows] for key in ("output", "expected")]
    assert tested["test/stsb/spearman"] == pytest.approx(spearmanr(*columns).statistic, abs=1e-4)
    assert trainer.callback_metrics.keys() >= {"test/stsb/spearman", "test/stsb/pearson"}


def test_a_head_over_half_precision_trains_in_float32(fit: Callable[..., Trainer]) -> None:
    trainer = fit("llama", steps=2, dtype="bfloat16")
    module: Any = trainer.lightning_module
    assert module.model.score.weight.dtype == torch.float32
    assert module.model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    batch = next(iter(trainer.datamodule.val_dataloader()))
    assert logits_of(module.model, batch).dtype == torch.float32


def build(path: Path, glue: Path, task: str, tmp_path: Path, **kwargs: Any) -> Any:
    """A module that was built for a task, without a fit."""
    options = {"adapter": LoRA(r=2, target_modules=["query", "value"])} | kwargs
    module = SequenceClassificationModule(str(path), **options)
    module.trainer = trainer = make_trainer(tmp_path, 1)
    tokenizer = path.parent / "roberta"
    trainer.datamodule = make_data(glue, task, tmp_path, tokenizer=str(tokenizer))
    trainer.datamodule.setup("validate")
    module.configure_model()
    return module


def test_a_head_of_the_same_classes_is_kept_in_its_order(
    bases: dict[str, Path], encoder_shape: dict[str, Any], glue: Path, tmp_path: Path
) -> None:
    names = {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}  # as roberta-large-mnli has them
    config = RobertaConfig(**encoder_shape, type_vocab_size=1, id2label=names)
    config.label2id = {name: i for i, name in names.items()}
    bases["roberta"].with_name("own").mkdir(exist_ok=True)
    own = RobertaForSequenceClassification(config)
    own.save_pretrained(bases["roberta"].with_name("own"))
    module = build(bases["roberta"].with_name("own"), glue, "mnli", tmp_path)
    torch.testing.assert_close(
        module.model.classifier.out_proj.weight.detach(), own.classifier.out_proj.weight.detach()
    )
    batch = next(iter(module.trainer.datamodule.val_dataloader()))
    module.eval()
    with torch.no_grad():
        torch.testing.assert_close(module._outputs(batch), logits_of(own, batch)[:, [2, 1, 0]])
    assert module.model.config.id2label == names
    # One with other classes gets a new head of the task's.
    other = build(bases["roberta"].with_name("own"), glue, "sst2", tmp_path)
    assert other.model.classifier.out_proj.out_features == 2
    assert other.model.config.id2label == {0: "negative", 1: "positive"}


def test_a_pooler_that_was_not_saved_trains_too(
    bases: dict[str, Path], encoder_shape: dict[str, Any], glue: Path, tmp_path: Path
) -> None:
    folder = bases["roberta"].with_name("bert")
    BertForMaskedLM(BertConfig(**encoder_shape)).save_pretrained(folder)
    module = build(folder, glue, "rte", tmp_path)
    assert module.adapter.modules_to_save == ["classifier", "bert.pooler"]
    kept = bases["roberta"].with_name("bert_pooled")
    BertForSequenceClassification(BertConfig(**encoder_shape)).save_pretrained(kept)
    own = build(kept, glue, "rte", tmp_path)
    assert own.adapter.modules_to_save == ["classifier"]
    assert not own.model.bert.pooler.dense.weight.requires_grad


def test_lost_weights_of_the_base_are_named(
    bases: dict[str, Path], encoder_shape: dict[str, Any], glue: Path, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    folder = bases["roberta"].with_name("lost")
    RobertaForMaskedLM(RobertaConfig(**encoder_shape, type_vocab_size=1)).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    kept = {k: v for k, v in tensors.items() if "layer.2.attention.self" not in k}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    message = (
        rf"^model.model_name_or_path: {folder} lacks weights of RobertaForSequenceClassification: "
        r"roberta.encoder.layer.2.attention.self.key.bias \(6 in all\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        build(folder, glue, "rte", tmp_path)


def test_given_modules_to_save_stay(bases: dict[str, Path], glue: Path, tmp_path: Path) -> None:
    adapter = LoRA(r=2, target_modules=["query"], modules_to_save=["roberta.embeddings.LayerNorm"])
    module = build(bases["roberta"], glue, "rte", tmp_path, adapter=adapter)
    assert adapter.modules_to_save == ["roberta.embeddings.LayerNorm", "classifier"]
    assert module.model.roberta.embeddings.LayerNorm.weight.requires_grad
    assert len(adapter_layers(module.model)) == 3


def test_another_tasks_checkpoint_is_refused(fit: Callable[..., Trainer], tmp_path: Path) -> None:
    fit("roberta", "sst2", steps=1).save_checkpoint(tmp_path / "sst2.ckpt")
    message = "^the checkpoint was trained on negative, positive, data has entailment, neutral, "
    with pytest.raises(ValueError, match=message):
        fit("roberta", "mnli", folder="other", ckpt_path=tmp_path / "sst2.ckpt")


def test_a_data_module_without_labels_is_named(bases: dict[str, Path], tmp_path: Path) -> None:
    from lightning_peft.datamodules import ArithmeticDataModule

    module = SequenceClassificationModule(str(bases["roberta"]))
    with pytest.raises(ValueError, match=r"label_names\), which ArithmeticDataModule does not"):
        make_trainer(tmp_path, 1).fit(module, ArithmeticDataModule(tokenizer=str(TINY_LLAMA)))
