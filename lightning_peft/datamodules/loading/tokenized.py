"""The part of a data module that is Lightning's: tokenizer, samplers, loaders, resume."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from lightning_peft.datamodules.loading.arguments import at_least, load_tokenizer
from lightning_peft.datamodules.loading.batches import Subset, TrainingData
from lightning_peft.datamodules.loading.loader import ResumableDataLoader, eval_loader
from lightning_peft.datamodules.loading.samplers import (
    LengthGroupedBatchSampler,
    RandomBatchSampler,
    stratified_sample,
)
from lightning_peft.errors import UserError


class TokenizedDataModule(LightningDataModule):
    """Tokenized records in loaders that resume in the middle of an epoch.

    Args:
        data_dir: Folder, file or hub name of the data; what exactly, the task says.
        tokenizer: A tokenizer, or the name or folder of one; None takes that of the module's model.
        batch_size: Records in a training batch of one process.
        eval_batch_size: The same for validation and test; None takes ``batch_size``.
        val_size: Records taken out of the training data for validation, the same for every seed.
        train_limit: Most training records, a fixed sample of all.
        val_limit: Most validation records.
        test_limit: Most test records of each task, a fixed sample in their order.
        group_by_length: Train on batches of like length, which pads less; else on random ones.
        num_workers: Worker processes of each loader.
        seed: Fixes the order of training data; None takes that of ``seed_everything``, or 0.
        cache_dir: Folder for tokenized data; None takes the cache of `datasets`.

    Attributes:
        protocol: What is pinned of how records are asked and answered; a run prints it.
        test_tasks: Names of the test sets, in the order of the test loaders.
        counts: After ``setup``: records per split, how many prompts were cut, and how many records
            were left out.
    """

    protocol: Any = None

    def __init__(
        self,
        data_dir: str | None,
        tokenizer: str | PreTrainedTokenizerBase | None = None,
        batch_size: int = 16,
        eval_batch_size: int | None = None,
        val_size: int = 120,
        train_limit: int | None = None,
        val_limit: int | None = None,
        test_limit: int | None = None,
        group_by_length: bool = True,
        num_workers: int = 0,
        seed: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        super().__init__()
        self.data_dir = data_dir
        self.tokenizer = tokenizer
        self.batch_size = at_least(1, "batch_size", batch_size)
        self.eval_batch_size = at_least(1, "eval_batch_size", eval_batch_size or batch_size)
        self.val_size = at_least(0, "val_size", val_size)
        self.limits = {"train": train_limit, "val": val_limit, "test": test_limit}
        for split, limit in self.limits.items():
            at_least(1, f"{split}_limit", 1 if limit is None else limit)
        self.group_by_length = group_by_length
        self.num_workers = at_least(0, "num_workers", num_workers)
        # Where Lightning's seed_everything leaves what it was given.
        given = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.seed = at_least(0, "seed", given)
        self.cache_dir = cache_dir
        self.test_tasks: list[str] = []
        self.counts: dict[str, Any] = {}
        self._source: Any = None
        self._training: tuple[TrainingData, TrainingData] | None = None
        self._tests: Mapping[str, Any] | None = None

    # What a kind of data says ---------------------------------------------------------------------

    def use_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer, before any set is made."""
        raise NotImplementedError

    def training_sets(self) -> tuple[TrainingData, TrainingData]:
        """Make the training and the validation set (which may be empty)."""
        raise NotImplementedError

    def batched(self, data: TrainingData) -> TrainingData:
        """Return what rows of training batches are drawn from: the data, or packs of them."""
        return data

    def test_sets(self) -> Mapping[str, Any]:
        """Make the test set of every task: with ``collate``, ``longest_first``, ``fingerprint``."""
        raise NotImplementedError

    def task_protocol(self, task: str) -> Any:
        """Return the protocol in force on a test task, a data class that is stamped."""
        raise NotImplementedError

    def test_stamp(self, task: str) -> dict[str, Any]:
        """Say what a test task's predictions depend on beside the weights.

        Args:
            task: One of ``test_tasks``, after ``setup("test")``.

        Returns:
            The fields of the protocol in force on it, ``records``, how many there are, and
            ``fingerprint``, which tells them by what is asked and expected.
        """
        data = self._test_sets()[task]
        own = dataclasses.asdict(self.task_protocol(task))
        return {**own, "records": len(data), "fingerprint": data.fingerprint()}

    # Lightning ------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Load and encode what a stage needs, once.

        Args:
            stage: Lightning's ``fit``, ``validate``, ``test`` or ``predict``; None is all of them.
        """
        self._refuse_distributed_sampler()
        self._load_tokenizer()
        if self.protocol is not None and self._training is None and self._tests is None:
            rank_zero_info(f"protocol {self.protocol}")
        if stage in ("fit", "validate", None) and self._training is None:
            self._training = self.training_sets()
        if stage in ("test", "predict", None) and self._tests is None:
            self._tests = dict(self.test_sets())
            self.test_tasks = list(self._tests)

    def train_dataloader(self) -> ResumableDataLoader:
        """Return a loader of the training set that can continue in the middle of an epoch."""
        data, trainer = self.batched(self._sets()[0]), self.trainer
        sampler = self._sampler(data, self.seed)
        if trainer is None:
            return ResumableDataLoader(data, sampler, num_workers=self.num_workers)
        limit = trainer.limit_train_batches
        # From a checkpoint written after an epoch's end, Lightning loads no loader's state, and
        # `current_epoch` still is the epoch before.
        epochs: Any = trainer.fit_loop.epoch_progress.current
        return ResumableDataLoader(
            data,
            sampler,
            # Asked anew for each window: GradientAccumulationScheduler changes it.
            accumulate=lambda: trainer.accumulate_grad_batches,
            epoch_length=limit if isinstance(limit, int) else int(limit * len(sampler)),
            epoch=epochs.processed,
            same_every_epoch=getattr(trainer, "overfit_batches", 0) > 0,
            num_workers=self.num_workers,
        )

    def probe_dataloader(self, ratio: float, seed: int = 0) -> ResumableDataLoader:
        """Return a loader of a sample of the training set, stratified by task.

        Its batches are windows of their own, and every pass over it has another order. Every
        process is given all of them: whoever probes shares them out, the last ones too.

        Args:
            ratio: The sample's share of the training set, in (0, 1].
            seed: Fixes the sample and its orders.
        """
        data = self._sets()[0]
        sample = self.batched(Subset(data, stratified_sample(data.strata(), ratio, seed)))
        return ResumableDataLoader(sample, self._sampler(sample, seed, processes=(0, 1)))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        """Return one loader of all validation records, longest first; none without records."""
        data = self._sets()[1]
        lengths = data.lengths()
        if lengths is None:
            lengths = np.zeros(len(data))
        return self._eval_loader(data, np.argsort(-lengths, kind="stable")) if len(data) else []

    def test_dataloader(self) -> list[DataLoader[Any]]:
        """Return one loader for each of ``test_tasks``, longest prompts first."""
        tests = self._test_sets().values()
        return [self._eval_loader(data, data.longest_first()) for data in tests]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        """Return the test loaders."""
        return self.test_dataloader()

    def _sets(self) -> tuple[TrainingData, TrainingData]:
        if self._training is None:
            raise RuntimeError("The training data are there from `setup('fit')` on; call it first.")
        return self._training

    def _test_sets(self) -> Mapping[str, Any]:
        if self._tests is None:
            raise RuntimeError("The test sets are there from `setup('test')` on; call it first.")
        return self._tests

    def _sampler(
        self, data: TrainingData, seed: int, processes: tuple[int, int] | None = None
    ) -> RandomBatchSampler:
        lengths, share = data.lengths(), processes or self._place()
        if self.group_by_length and lengths is not None:
            return LengthGroupedBatchSampler(lengths, self.batch_size, seed, *share)
        return RandomBatchSampler(len(data), self.batch_size, seed, *share)

    def _eval_loader(self, data: Any, order: Any) -> DataLoader[Any]:
        process, count = self._place()
        return eval_loader(
            data, order, self.eval_batch_size, process, count, num_workers=self.num_workers
        )

    def _place(self) -> tuple[int, int]:
        trainer = self.trainer
        return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)

    def _refuse_distributed_sampler(self) -> None:
        connector = getattr(self.trainer, "_accelerator_connector", None)
        if self._place()[1] > 1 and getattr(connector, "use_distributed_sampler", False):
            raise UserError(
                "trainer.use_distributed_sampler is true, which would replace the loaders that "
                "share the data out and resume by themselves; set it to false."
            )

    def _load_tokenizer(self) -> None:
        source = self.tokenizer
        if source is None:
            module = getattr(self.trainer, "lightning_module", None)
            source = getattr(module, "model_name_or_path", None)
        if source is None:
            raise UserError(
                "data.tokenizer is not set, and there is no module whose model_name_or_path could "
                "tell it; give the name or folder of a tokenizer."
            )
        if source == self._source:
            return
        tokenizer = (
            source if isinstance(source, PreTrainedTokenizerBase) else load_tokenizer(source)
        )
        self.use_tokenizer(tokenizer)
        self.tokens_known = len(tokenizer)
        self._source, self._training, self._tests = source, None, None

    def report_cut(
        self,
        split: str,
        cut: int,
        total: int,
        max_length: int,
        what: str = "prompts",
        where: str = "from the left",
    ) -> None:
        """Count and say how many records of a split were over the limit, once for all of them."""
        self.counts.setdefault("cut", {})[split] = cut
        if cut:
            rank_zero_warn(
                f"{cut} of {total} {split} {what} were longer than the limit of {max_length} "
                f"tokens and were cut {where}; data.max_length raises it."
            )
