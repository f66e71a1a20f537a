"""A training loader that continues where it stopped, and knows its accumulation windows.

Lightning keeps a loader's state only if it has ``state_dict``, and a shuffled `DataLoader` cannot
go on in the middle of an epoch. Here the order of an epoch is a pure function of (seed, epoch), so
that two integers are the whole state. The loader draws from a generator of its own: the global
stream belongs to dropout and masks, and must not depend on how data are loaded.

The loss scale travels with the batches. Lightning divides a loss by the number of micro-batches in
an accumulation window, and gradients are averaged over processes, though these hold different
numbers of target tokens. So that a window's gradient is that of the mean over all of its targets,

* a data set counts the targets of rows without fetching them (``count_targets`` in `batches`);
* the loader, which knows the rows of a whole window on every process, adds them up, and puts the
  sum into each batch of the window as ``num_target_tokens``;
* the module divides each batch's summed loss by it and takes back what Lightning divides by
  (``lightning_peft/modules/window.py``). No other number passes between the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from lightning_peft.datamodules.loading.batches import TrainingData, target_positions
from lightning_peft.datamodules.loading.samplers import RandomBatchSampler


class ResumableDataLoader(DataLoader[Any]):
    """A loader whose state is (epoch, position), for exact resume in the middle of an epoch.

    Each batch (a dict) is given ``num_target_tokens``, a 0-d integer tensor: the labels that are
    predicted in its whole accumulation window, over all processes. A batch's summed token losses
    divided by it, times Lightning's ``accumulate_grad_batches`` (also in a short last window) and
    the number of processes, accumulate to the mean over the window's tokens exactly.

    ``len`` is that of a whole epoch, also where only its rest is yielded: with it Lightning counts
    batches and does not prefetch, so that the position saved is that of the batch in work. A window
    that is resumed in its middle counts its remaining batches only, since the gradients of the
    others are lost.

    Args:
        dataset: The data.
        sampler: Draws the batches.
        accumulate: Batches in an accumulation window, or a function that says it at present.
        epoch_length: Batches after which the epoch ends, if before the last one (Lightning's
            ``limit_train_batches``); there a short window ends too.
        epoch: The epoch to begin with.
        same_every_epoch: Repeat the first epoch's order, for Lightning's ``overfit_batches``.
        num_workers: Worker processes.
    """

    def __init__(
        self,
        dataset: TrainingData,
        sampler: RandomBatchSampler,
        accumulate: int | Callable[[], int] = 1,
        epoch_length: int | None = None,
        epoch: int = 0,
        same_every_epoch: bool = False,
        num_workers: int = 0,
    ) -> None:
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=sampler,
            collate_fn=dataset.collate,
            num_workers=num_workers,
            # Without one, every `iter` would draw a number from the global stream.
            generator=torch.Generator().manual_seed(0),
        )
        self.accumulate = accumulate
        self.epoch_length = min(epoch_length or len(sampler), len(sampler))
        self.same_every_epoch = same_every_epoch
        self.epoch, self.position = epoch, 0
        self._continues = False

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches were yielded."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next ``iter`` go on where the state was taken."""
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._continues = True

    def __iter__(self) -> Any:
        """Begin the next epoch, or go on with the one that a state was loaded of."""
        begun = self.position > 0 and not self._continues
        if begun or self.position >= self.epoch_length:
            self.epoch, self.position = self.epoch + 1, 0
        sampler: Any = self.batch_sampler
        sampler.epoch = 0 if self.same_every_epoch else self.epoch
        sampler.start = self.position
        return self._yield(super().__iter__(), self.epoch, self.position)

    def _yield(self, batches: Iterator[dict[str, Any]], epoch: int, start: int) -> Iterator[Any]:
        end, tokens = start, 0
        for position, batch in enumerate(batches, start):
            if position >= end:
                end = self._window_end(position)
                tokens = self._count(range(position, end))
            batch["num_target_tokens"] = torch.tensor(tokens)
            labels = batch.get("labels")
            if isinstance(labels, torch.Tensor) and labels.ndim == 2:
                batch["target_positions"] = target_positions(labels)
            # Before the yield: the state saved while a batch is in work counts it as done.
            self.epoch, self.position, self._continues = epoch, position + 1, False
            yield batch

    def _window_end(self, position: int) -> int:
        size = self.accumulate() if callable(self.accumulate) else self.accumulate
        end = (position // size + 1) * size
        # Past a limit of Lightning's, nobody accumulates.
        return min(end, self.epoch_length if position < self.epoch_length else len(self))

    def _count(self, steps: range) -> int:
        sampler: Any = self.batch_sampler
        data: Any = self.dataset
        return sum(data.count_targets(rows) for step in steps for rows in sampler.step(step))


def eval_loader(
    data: Any,
    order: Sequence[int],
    batch_size: int,
    process: int = 0,
    processes: int = 1,
    num_workers: int = 0,
) -> DataLoader[Any]:
    """Load rows in a fixed order, shared out to processes.

    All processes get the same number of rows, a few of them twice where they do not divide evenly,
    so that none waits for another for ever.
    """
    share = -(-len(order) // processes)
    mine = np.resize(np.asarray(order, dtype=np.int64), share * processes)[process::processes]
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=mine.tolist(),
        collate_fn=data.collate,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),  # Not the global one; see above.
    )
