"""Data modules under a real Trainer: resume in the middle of an epoch, windows, tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor

from lightning_peft.datamodules.loading.batches import EncodedDataset
from lightning_peft.datamodules.loading.tokenized import TokenizedDataModule

HALVES = ([0, 1, 2], [3, 4, 5])


class Recorder(LightningModule):
    """Writes down what it is given."""

    def __init__(self, model_name_or_path: str | None = None) -> None:
        super().__init__()
        self.model_name_or_path = model_name_or_path
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[Any, ...]] = []
        self.tested: list[Any] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(
            (
                self.trainer.current_epoch,
                batch_idx,
                batch["input_ids"].tolist(),
                int(batch["num_target_tokens"]),
                int((batch["labels"][:, 1:] != -100).sum()),
            )
        )
        return self.weight.sum()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        assert "labels" in batch

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested += list(zip(batch["index"], batch["prompt"], batch["expected"], strict=True))

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[int]:
        return batch["index"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
    }
    return Trainer(**{**quiet, **kwargs})


@pytest.mark.parametrize("grouped", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("accumulate", "options"),
    [
        (1, {}),
        (2, {}),
        (1, {"limit_train_batches": 4}),
        (2, {"limit_train_batches": 0.75}),
        (2, {"val_check_interval": 3}),
        (2, {"max_epochs": -1, "max_steps": 10}),
        (1, {"num_sanity_val_steps": 0, "check_val_every_n_epoch": 2}),
    ],
)
def test_a_resumed_run_sees_the_same_batches(
    grouped: bool,
    accumulate: int,
    options: dict[str, Any],
    make_capitals: Any,
    tmp_path: Path,
) -> None:
    def fit(resumed: str | None = None, callbacks: Any = ()) -> list[tuple[Any, ...]]:
        module = Recorder()
        arguments = {"max_epochs": 3, "accumulate_grad_batches": accumulate, **options}
        trainer(
            tmp_path,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            **arguments,
        ).fit(module, datamodule=make_capitals(group_by_length=grouped), ckpt_path=resumed)
        return module.seen

    every = ModelCheckpoint(
        tmp_path / "ckpt", "{step}", every_n_train_steps=1, save_top_k=-1, save_last=False
    )
    at_ends = ModelCheckpoint(
        tmp_path / "ends", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True
    )
    after_validation = ModelCheckpoint(
        tmp_path / "val", "{step}", mode="max", save_top_k=-1, save_on_train_epoch_end=False
    )
    whole = fit(callbacks=[every, at_ends, after_validation])
    per_epoch = {4: 4, 0.75: 5}.get(options.get("limit_train_batches", 1.0), 7)
    steps = min(options.get("max_steps", 99), 3 * -(-per_epoch // accumulate))
    assert len(whole) == 3 * per_epoch or "max_steps" in options
    checkpoints = sorted(tmp_path.glob("ckpt/*.ckpt"))
    assert len(checkpoints) == steps
    for path in [*checkpoints, *tmp_path.glob("ends/*.ckpt"), *tmp_path.glob("val/*.ckpt")]:
        state = torch.load(path, weights_only=True)["loops"]["fit_loop"]["state_dict"]
        loader = state["combined_loader"][0]
        done = loader["epoch"] * per_epoch + loader["position"]
        resumed, rest = fit(str(path)), whole[done:]
        if loader["position"] % accumulate and loader["position"] < per_epoch:
            # Saved by a validation within a window, whose first gradients are lost.
            assert options.get("val_check_interval")
            assert (resumed[0][:3], resumed[0][3]) == (rest[0][:3], rest[0][4])
            resumed, rest = resumed[1:], rest[1:]
        assert resumed == rest, path


@pytest.mark.parametrize(("accumulate", "limit"), [(1, None), (2, None), (3, None), (2, 3)])
def test_windows_agree_with_lightnings(
    accumulate: int, limit: int | None, make_capitals: Any, tmp_path: Path
) -> None:
    module = Recorder()
    options = {"limit_train_batches": limit} if limit else {}
    run = trainer(
        tmp_path,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        **options,
    )
    run.fit(module, datamodule=make_capitals())
    for epoch in range(2):
        seen = [s for s in module.seen if s[0] == epoch]
        for start in range(0, len(seen), accumulate):
            window = seen[start : start + accumulate]
            assert {s[3] for s in window} == {sum(s[4] for s in window)}
    assert run.global_step == 2 * -(-(limit or 7) // accumulate)


def test_windows_follow_an_accumulation_schedule(make_capitals: Any, tmp_path: Path) -> None:
    module = Recorder()
    schedule = GradientAccumulationScheduler({0: 1, 1: 7})
    trainer(tmp_path, max_epochs=2, callbacks=[schedule], enable_checkpointing=False).fit(
        module, datamodule=make_capitals()
    )
    first, second = ([s for s in module.seen if s[0] == epoch] for epoch in range(2))
    assert [s[3] for s in first] == [s[4] for s in first]
    assert {s[3] for s in second} == {sum(s[4] for s in second)}


def test_overfitting_repeats_the_same_batches(make_capitals: Any, tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, max_epochs=3, overfit_batches=2, enable_checkpointing=False)
    run.fit(module, datamodule=make_capitals())
    epochs = [[s[2] for s in module.seen if s[0] == epoch] for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2


def test_test_and_predict_give_every_record_once(make_capitals: Any, tmp_path: Path) -> None:
    module, data = Recorder(), make_capitals(eval_batch_size=2)
    run = trainer(tmp_path, enable_checkpointing=False)
    run.test(module, datamodule=data, verbose=False)
    assert sorted(module.tested) == [(i, f"land {i} -> ", f"city {i}") for i in range(5)]
    predicted = run.predict(module, datamodule=data)
    assert predicted is not None
    assert sorted(i for batch in predicted for i in batch) == list(range(5))


def test_the_tokenizer_of_the_modules_model_is_taken(
    make_capitals: Any, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    runs = []
    for data in (
        make_capitals(),
        make_capitals(tokenizer=None),
        make_capitals(tokenizer=str(tmp_path / "model")),
    ):
        runs.append(Recorder(str(tmp_path / "model")))
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(runs[-1], datamodule=data)
    assert runs[0].seen == runs[1].seen == runs[2].seen
    data = make_capitals(tokenizer=None)
    with pytest.raises(ValueError, match=r"^data.tokenizer is not set, and there is no module"):
        data.setup("fit")


def test_a_folder_without_tokenizer_is_named(make_capitals: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.tokenizer '.*empty' could not be loaded \("):
        make_capitals(tokenizer=str(tmp_path / "empty")).setup("fit")


def test_setup_works_once(make_capitals: Any) -> None:
    data = make_capitals()
    data.setup("fit")
    sets = data._sets()
    data.setup("fit")
    assert data._sets() is sets
    data.setup("test")
    assert data._sets() is sets
    assert data.test_tasks == ["c"]
    assert data.counts == {
        "train": 21,
        "val": 2,
        "test": {"c": 5},
        "cut": {"train": 0, "val": 0, "test": 0},
        "left_out": {"train": 0, "val": 0},
    }


def test_a_kind_of_data_may_bring_its_own_sets(tokenizer: Any, tmp_path: Path) -> None:
    """Loaders and resume are the same for whatever offers lengths, targets and batches."""

    class Counting(TokenizedDataModule):
        def use_tokenizer(self, tokenizer: Any) -> None:
            self.taken = tokenizer

        def training_sets(self) -> Any:
            table = Dataset.from_dict(
                {"tokens": [[5] * (i + 2) for i in range(6)], "prompt_length": [1] * 6}
                | {"earlier": [[]] * 6, "cut": [0] * 6}
            )
            sets = [EncodedDataset(table.select(rows), ["t"] * 3, 0, "all") for rows in HALVES]
            return sets[0], sets[1]

    data = Counting(None, tokenizer=tokenizer, batch_size=2, group_by_length=False)
    data.setup("fit")
    assert data.taken is tokenizer
    batches = list(data.train_dataloader())
    lengths = sorted(n for batch in batches for n in batch["attention_mask"].sum(1).tolist())
    assert lengths == [2, 3, 4]
    assert [int(b["num_target_tokens"]) for b in batches] == [
        int(b["attention_mask"][:, 1:].sum()) for b in batches
    ]
    loader: Any = data.val_dataloader()
    assert [batch["attention_mask"].sum(1).tolist() for batch in loader] == [[7, 6], [5]]
    with pytest.raises(NotImplementedError):
        data.setup("test")


def test_loaders_before_setup_say_what_is_missing(make_capitals: Any) -> None:
    with pytest.raises(RuntimeError, match=r"setup\('fit'\)"):
        make_capitals().train_dataloader()
    with pytest.raises(RuntimeError, match=r"setup\('test'\)"):
        make_capitals().test_dataloader()
