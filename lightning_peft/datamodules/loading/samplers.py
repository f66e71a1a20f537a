"""Which rows make a batch, an epoch, a sample: functions of a seed, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

from lightning_peft.errors import UserError

# Batches sorted together: with fewer, rows of a batch are less alike; with all, so are epochs.
MEGA_BATCH = 50
# Fixes which records validate and which a limit keeps: the same for every training seed.
SPLIT_SEED = 0


class RandomBatchSampler(Sampler[list[int]]):
    """Batches of a random permutation, drawn anew for every epoch from (seed, epoch).

    Args:
        size: Number of rows.
        batch_size: Rows in a batch of one process.
        seed: Fixes every epoch's order.
        process: This one takes batches `process`, `process + processes`, … of the epoch's list.
        processes: Number of processes; with more than one, batches at the end that would not give
            each process one are left out, so that all take the same number of steps.

    Attributes:
        epoch: Which epoch is drawn next.
        start: How many batches of it to leave out.
    """

    def __init__(
        self, size: int, batch_size: int, seed: int = 0, process: int = 0, processes: int = 1
    ) -> None:
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.process, self.processes = process, processes
        self.epoch = self.start = 0
        self._drawn: tuple[int, list[np.ndarray]] | None = None

    def order(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Draw the list of batches of one epoch, over all processes."""
        return _split(rng.permutation(self.size), self.batch_size)

    def batches(self) -> list[np.ndarray]:
        """Return the current epoch's batches, over all processes."""
        if self._drawn is None or self._drawn[0] != self.epoch:
            self._drawn = self.epoch, self.order(np.random.default_rng([self.seed, self.epoch]))
        return self._drawn[1]

    def step(self, step: int) -> list[np.ndarray]:
        """Return the batches that all processes see together in one step of the epoch."""
        return self.batches()[step * self.processes : (step + 1) * self.processes]

    def __len__(self) -> int:
        """Return the number of batches that each process sees in a whole epoch."""
        batches = -(-self.size // self.batch_size)
        return batches if self.processes == 1 else batches // self.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process' batches of the epoch, from ``start``."""
        steps = range(self.start, len(self))
        mine = [self.batches()[s * self.processes + self.process] for s in steps]
        return (batch.tolist() for batch in mine)


class LengthGroupedBatchSampler(RandomBatchSampler):
    """Batches of rows of like length, in random order.

    A random permutation is cut into mega-batches of 50 batches, each is sorted by length and cut
    into batches, and the batches are shuffled. The batch with the longest row comes first, so that
    what does not fit into memory shows at once.

    Args:
        lengths: Every row's length in tokens.
        batch_size: As above.
        seed: As above.
        process: As above.
        processes: As above.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        seed: int = 0,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        super().__init__(len(lengths), batch_size, seed, process, processes)
        self.lengths = lengths

    def order(self, rng: np.random.Generator) -> list[np.ndarray]:
        """Draw the list of batches of one epoch, over all processes."""
        batches: list[np.ndarray] = []
        for mega in _split(rng.permutation(self.size), self.batch_size * MEGA_BATCH):
            # Stable, so that rows of one length stay in random order.
            mega = mega[np.argsort(-self.lengths[mega], kind="stable")]
            batches += _split(mega, self.batch_size)
        batches = [batches[i] for i in rng.permutation(len(batches))]
        longest = max(range(len(batches)), key=lambda i: int(self.lengths[batches[i]].max()))
        batches[0], batches[longest] = batches[longest], batches[0]
        return batches


def fixed_sample(size: int, limit: int | None) -> list[int]:
    """Draw up to ``limit`` of ``size`` positions, ascending, the same ones every time."""
    if limit is None or limit >= size:
        return list(range(size))
    return sorted(np.random.default_rng(SPLIT_SEED).permutation(size)[:limit].tolist())


def stratified_sample(strata: np.ndarray, ratio: float, seed: int = 0) -> np.ndarray:
    """Draw the same share of every stratum, and at least one row of each.

    Args:
        strata: Every row's stratum, `(n,)`.
        ratio: The share, in (0, 1].
        seed: Fixes the draw.

    Returns:
        The drawn rows' indices, ascending.
    """
    if not 0 < ratio <= 1:
        raise UserError(f"The sample's ratio is {ratio}; it has to lie in (0, 1].")
    rng = np.random.default_rng(seed)
    drawn = []
    for stratum in np.unique(strata):
        rows = np.flatnonzero(strata == stratum)
        drawn.append(rng.permutation(rows)[: max(1, round(ratio * len(rows)))])
    return np.sort(np.concatenate(drawn))


def _split(indices: np.ndarray, size: int) -> list[np.ndarray]:
    return [indices[i : i + size] for i in range(0, len(indices), size)]
