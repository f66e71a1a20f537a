"""The base under a real Trainer: resume in the middle of an epoch, tokenizers, the command line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from torch import Tensor

from lightning_peft.datamodules import Example, Protocol, TextDataModule

RECORDS = 23


class Capitals(TextDataModule):
    """A task of its own, as a user would write one."""

    protocols = {"ours": Protocol("ours", "{instruction} -> ", "response", 64, 8)}

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(data_dir=None, protocol="ours", **kwargs)

    def train_examples(self) -> Sequence[Example]:
        return [
            self.example(f"{'land' * (i % 5)} {i}", f"city {i}", "c", i) for i in range(RECORDS)
        ]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        return {"c": [self.example(f"land {i}", "", "c", i, f"city {i}") for i in range(5)]}

    def extract(self, output: str, task: str) -> str | None:
        return output.strip() or None


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


@pytest.fixture
def make(tokenizer: Any, tmp_path: Path) -> Any:
    def make_module(**kwargs: Any) -> Capitals:
        cache = str(tmp_path / "cache")
        options = {"tokenizer": tokenizer, "batch_size": 3, "val_size": 2, "cache_dir": cache}
        return Capitals(**{**options, **kwargs})

    return make_module


@pytest.mark.parametrize("grouped", [True, False])
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
    grouped: bool, accumulate: int, options: dict[str, Any], make: Any, tmp_path: Path
) -> None:
    def fit(resumed: str | None = None, callbacks: Any = ()) -> list[tuple[Any, ...]]:
        module = Recorder()
        arguments = {"max_epochs": 3, "accumulate_grad_batches": accumulate, **options}
        trainer(
            tmp_path,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            **arguments,
        ).fit(module, datamodule=make(group_by_length=grouped), ckpt_path=resumed)
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
    accumulate: int, limit: int | None, make: Any, tmp_path: Path
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
    run.fit(module, datamodule=make())
    for epoch in range(2):
        seen = [s for s in module.seen if s[0] == epoch]
        for start in range(0, len(seen), accumulate):
            window = seen[start : start + accumulate]
            assert {s[3] for s in window} == {sum(s[4] for s in window)}
    assert run.global_step == 2 * -(-(limit or 7) // accumulate)


def test_windows_follow_an_accumulation_schedule(make: Any, tmp_path: Path) -> None:
    module = Recorder()
    schedule = GradientAccumulationScheduler({0: 1, 1: 7})
    trainer(tmp_path, max_epochs=2, callbacks=[schedule], enable_checkpointing=False).fit(
        module, datamodule=make()
    )
    first, second = ([s for s in module.seen if s[0] == epoch] for epoch in range(2))
    assert [s[3] for s in first] == [s[4] for s in first]
    assert {s[3] for s in second} == {sum(s[4] for s in second)}


def test_overfitting_repeats_the_same_batches(make: Any, tmp_path: Path) -> None:
    module = Recorder()
    run = trainer(tmp_path, max_epochs=3, overfit_batches=2, enable_checkpointing=False)
    run.fit(module, datamodule=make())
    epochs = [[s[2] for s in module.seen if s[0] == epoch] for epoch in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert len(epochs[0]) == 2


def test_test_and_predict_give_every_record_once(make: Any, tmp_path: Path) -> None:
    module, data = Recorder(), make(eval_batch_size=2)
    run = trainer(tmp_path, enable_checkpointing=False)
    run.test(module, datamodule=data, verbose=False)
    assert sorted(module.tested) == [(i, f"land {i} -> ", f"city {i}") for i in range(5)]
    predicted = run.predict(module, datamodule=data)
    assert predicted is not None
    assert sorted(i for batch in predicted for i in batch) == list(range(5))


def test_the_tokenizer_of_the_modules_model_is_taken(
    make: Any, tokenizer: Any, tmp_path: Path
) -> None:
    tokenizer.save_pretrained(tmp_path / "model")
    runs = []
    for data in (make(), make(tokenizer=None), make(tokenizer=str(tmp_path / "model"))):
        runs.append(Recorder(str(tmp_path / "model")))
        trainer(tmp_path, max_epochs=1, enable_checkpointing=False).fit(runs[-1], datamodule=data)
    assert runs[0].seen == runs[1].seen == runs[2].seen
    data = make(tokenizer=None)
    with pytest.raises(ValueError, match=r"^data.tokenizer is not set, and there is no module"):
        data.setup("fit")


def test_a_folder_without_tokenizer_is_named(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^data.tokenizer '.*empty' could not be loaded \("):
        make(tokenizer=str(tmp_path / "empty")).setup("fit")


def test_setup_works_once(make: Any) -> None:
    data = make()
    data.setup("fit")
    sets = data._sets()
    data.setup("fit")
    assert data._sets() is sets
    data.setup("test")
    assert data._sets() is sets
    assert data.test_tasks == ["c"]
    assert data.counts == {
        "train": RECORDS - 2,
        "val": 2,
        "test": {"c": 5},
        "cut": {"train": 0, "val": 0, "test": 0},
    }


def test_loaders_before_setup_say_what_is_missing(make: Any) -> None:
    with pytest.raises(RuntimeError, match=r"setup\('fit'\)"):
        make().train_dataloader()
    with pytest.raises(RuntimeError, match=r"setup\('test'\)"):
        make().test_dataloader()


def test_arguments_of_the_base_are_found_by_the_command_line() -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(TextDataModule, "data")
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    arguments = parser.parse_args(
        ["--data", "ArithmeticDataModule", "--data.task", "operators", "--data.batch_size", "8"]
    )
    data = instantiate(arguments).data
    assert (data.operators, data.batch_size, data.tokenizer) == ("-%&^", 8, None)
    arguments = parser.parse_args(
        ["--data=CommonsenseDataModule", "--data.data_dir=d", "--data.tokenizer=some/folder"]
    )
    data = instantiate(arguments).data
    assert (data.data_dir, data.tokenizer, data.val_size) == ("d", "some/folder", 120)


def test_importing_the_package_loads_no_datasets() -> None:
    program = "import sys, lightning_peft.datamodules; sys.exit('datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
