from __future__ import annotations

from typing import Any

import pytest

from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.datamodules.arithmetic.problems import (
    PAIRS,
)


@pytest.mark.parametrize("task", ["subtraction", "operators"])
@pytest.mark.parametrize("regime", ["stream", "fixed"])
def test_no_problem_leaks(
    task: str, regime: str, tokenizer: Any, decoded: Any, module: Any
) -> None:
    data = module(tokenizer, task=task, regime=regime, train_size=5000, batch_size=500)

    def pair(prompt: str) -> tuple[str, ...]:
        return tuple(sorted((prompt[:3], prompt[4:7])))

    test = {pair(p) for loader in data.test_dataloader() for b in loader for p in b["prompt"]}
    val_loader: Any = data.val_dataloader()
    val = {pair(p) for b in val_loader for p, _ in decoded(tokenizer, b)}
    train = set()
    for _, batch in zip(range(10), data.train_dataloader(), strict=False):
        train |= {pair(p) for p, _ in decoded(tokenizer, batch)}
    assert len(test) == 60
    assert len(val) == 50
    assert not test & val
    assert not train & (test | val)


def test_operators_all_occur_and_are_tested_apart(
    tokenizer: Any, solve: Any, decoded: Any, module: Any
) -> None:
    data = module(tokenizer, task="operators", batch_size=400)
    assert data.test_tasks == ["subtraction", "reversed", "minimum", "carryless"]
    for loader, task, operator in zip(data.test_dataloader(), data.test_tasks, "-%&^", strict=True):
        batches = list(loader)
        assert {b["task"] for b in batches} == {task}
        prompts = [p for b in batches for p in b["prompt"]]
        assert {p[3] for p in prompts} == {operator}
        assert [e for b in batches for e in b["expected"]] == [solve(p) for p in prompts]
        assert sorted(i for b in batches for i in b["index"]) == list(range(60))
    batch = next(iter(data.train_dataloader()))
    counts = [sum(p[3] == o for p, _ in decoded(tokenizer, batch)) for o in "-%&^"]
    assert min(counts) > 60


def test_seeds_train_differently_and_are_tested_alike(
    tokenizer: Any, decoded: Any, module: Any
) -> None:
    first, second = (module(tokenizer, seed=s, regime="fixed", train_size=64) for s in (1, 2))

    def train(data: ArithmeticDataModule) -> set[str]:
        return {p for b in data.train_dataloader() for p, _ in decoded(tokenizer, b)}

    def test(data: ArithmeticDataModule) -> list[str]:
        return [p for b in data.test_dataloader()[0] for p in b["prompt"]]

    assert len(train(first)) == len(train(second)) == 64
    assert train(first) == train(first)
    assert len(train(first) & train(second)) < 5
    assert test(first) == test(second)
    assert test(first) != test(module(tokenizer, split_seed=1))


def test_an_epoch_is_the_rest_of_the_million_or_the_fixed_set(tokenizer: Any, module: Any) -> None:
    stream = module(tokenizer, batch_size=100)
    assert PAIRS - 2 * 110 <= stream.counts["train"] <= PAIRS - 110
    assert len(stream.train_dataloader()) == -(-stream.counts["train"] // 100)
    assert module(tokenizer, task="operators").counts["train"] == 4 * stream.counts["train"]
    fixed = module(tokenizer, regime="fixed", train_size=300, train_limit=120, test_limit=7)
    assert fixed.counts == {"train": 120, "val": 50, "test": {"subtraction": 7}}


def test_probe_holds_every_operator_alike(tokenizer: Any, decoded: Any, module: Any) -> None:
    data = module(tokenizer, task="operators", batch_size=50)
    loader = data.probe_dataloader(1e-4)
    prompts = [p for b in loader for p, _ in decoded(tokenizer, b)]
    per_operator = round(1e-4 * data.counts["train"] / 4)
    assert [sum(p[3] == o for p in prompts) for o in "-%&^"] == [per_operator] * 4
    again = [p for b in loader for p, _ in decoded(tokenizer, b)]
    assert again != prompts
    assert sorted(again) == sorted(prompts)


@pytest.mark.parametrize(
    ("output", "answer"),
    [
        ("0875", "0875"),
        ("-875", "-875"),
        (" 0875\n", "0875"),
        ("0875-875", "0875"),
        ("875", None),
        ("-87", None),
        ("--87", None),
        ("the answer is 0875", None),
        ("", None),
    ],
)
def test_extraction(output: str, answer: str | None) -> None:
    data = ArithmeticDataModule()
    assert data.extract(output, "subtraction") == answer
    assert data.correct(answer, "0875", "subtraction") is (answer == "0875")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "subtract"}, "data.task 'subtract' is unknown; did you mean 'subtraction'?"),
        ({"regime": "all"}, "data.regime 'all' is unknown; known are stream, fixed."),
        ({"train_size": 0}, "data.train_size is 0; it has to be 1 or more."),
        ({"batch_size": 0}, "data.batch_size is 0; it has to be 1 or more."),
        ({"seed": -1}, "data.seed is -1; it has to be 0 or more."),
        (
            {"test_size": 90_000, "val_size": 20_000},
            "data.test_size and data.val_size are 110000 pairs together; "
            "at most 100000 can be held out.",
        ),
    ],
)
def test_wrong_arguments_get_one_sentence(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011 (the whole message is compared)
        ArithmeticDataModule(**arguments)
    assert str(error.value) == message
