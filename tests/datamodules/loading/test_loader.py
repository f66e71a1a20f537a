from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.datamodules.loading.loader import ResumableDataLoader, eval_loader


def rows_of(batch: dict[str, Any]) -> list[int]:
    return batch["input_ids"][:, 0].tolist()


def targets_of(batch: dict[str, Any]) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("accumulate", "limit"), [(1, None), (3, None), (3, 10), (40, None)])
def test_windows_hold_their_target_tokens(
    kind: str, workers: int, accumulate: int, limit: int | None, data: Any, sampler: Any
) -> None:
    if workers and (accumulate, limit) != (3, None):
        pytest.skip("worker processes are slow to start, and one case shows them")
    loader = ResumableDataLoader(data, sampler(kind), accumulate, limit, num_workers=workers)
    batches = list(loader)[:limit]
    for start in range(0, len(batches), accumulate):
        window = batches[start : start + accumulate]
        tokens = sum(map(targets_of, window))
        assert [b["num_target_tokens"].item() for b in window] == [tokens] * len(window)
    assert batches[0]["num_target_tokens"].shape == ()


def test_windows_hold_the_target_tokens_of_all_processes(data: Any, sampler: Any) -> None:
    loaders = [
        list(ResumableDataLoader(data, sampler(process=r, processes=2), 4)) for r in range(2)
    ]
    for start in range(0, 10, 4):
        window = [b for loader in loaders for b in loader[start : start + 4]]
        assert {b["num_target_tokens"].item() for b in window} == {sum(map(targets_of, window))}


def test_accumulation_may_change_between_windows(data: Any, sampler: Any) -> None:
    sizes = [2]
    loader = ResumableDataLoader(data, sampler(), lambda: sizes[0])
    batches = []
    for i, batch in enumerate(loader):
        batches.append(batch)
        if i == 3:
            sizes[0] = 4
    tokens = [targets_of(b) for b in batches]
    told = [b["num_target_tokens"].item() for b in batches]
    assert told[2:8] == [sum(tokens[2:4])] * 2 + [sum(tokens[4:8])] * 4


@pytest.mark.parametrize("kind", ["random", "grouped"])
@pytest.mark.parametrize("limit", [None, 11])
def test_a_loaded_state_continues_the_same_sequence(
    kind: str, limit: int | None, data: Any, sampler: Any
) -> None:
    def run(
        loader: ResumableDataLoader, epochs: int
    ) -> list[tuple[dict[str, int], list[int], int]]:
        seen = []
        for _ in range(epochs):
            for i, batch in enumerate(loader):
                seen.append((loader.state_dict(), rows_of(batch), int(batch["num_target_tokens"])))
                if limit and loader.position >= limit:
                    break
                assert i < 20
        return seen

    whole = run(ResumableDataLoader(data, sampler(kind), 2, limit), 3)
    assert len(whole) == 3 * (limit or 20)
    for done in (*range(1, 50, 4), 10, 11, 20, 22, 40):
        if done >= len(whole):
            continue
        loader = ResumableDataLoader(data, sampler(kind), 2, limit)
        loader.load_state_dict(whole[done - 1][0])
        rest = run(loader, 3)[: len(whole) - done]
        assert [r[:2] for r in rest] == [w[:2] for w in whole[done:]]
        # A window's first steps are gone if it was left in its middle, so their tokens are too.
        alike = [r[2] == w[2] for r, w in zip(rest, whole[done:], strict=True)]
        assert all(alike[1:])
        position = whole[done - 1][0]["position"]
        assert alike[0] or position % 2


def test_iterating_again_without_a_batch_stays_in_the_epoch(data: Any, sampler: Any) -> None:
    loader = ResumableDataLoader(data, sampler())
    iter(loader)
    first = rows_of(next(iter(loader)))
    assert loader.state_dict() == {"epoch": 0, "position": 1}
    iter(loader)
    assert loader.state_dict() == {"epoch": 1, "position": 0}
    loader.load_state_dict({"epoch": 0, "position": 0})
    iter(loader)
    assert rows_of(next(iter(loader))) == first
    assert len(loader) == 20


def test_same_every_epoch_repeats_the_first_order(data: Any, sampler: Any) -> None:
    loader = ResumableDataLoader(data, sampler(), same_every_epoch=True)
    assert [rows_of(b) for b in loader] == [rows_of(b) for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_the_global_random_stream_alone(
    workers: int, data: Any, sampler: Any
) -> None:
    before = torch.get_rng_state()
    for batch in ResumableDataLoader(data, sampler(), num_workers=workers):
        assert "labels" in batch
    assert len(list(eval_loader(data, range(157), 8, num_workers=workers))) == 20
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rows", "world"), [(10, 1), (10, 3), (1, 4)])
def test_eval_rows_are_shared_out_evenly(rows: int, world: int, data: Any) -> None:
    shares = [
        [i for b in eval_loader(data, range(rows), 2, r, world) for i in rows_of(b)]
        for r in range(world)
    ]
    assert len({len(s) for s in shares}) == 1
    assert set(sum(shares, [])) == set(range(rows))
    assert sum(map(len, shares)) < rows + world
