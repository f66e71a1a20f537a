from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from lightning_peft.datamodules import ArithmeticDataModule
from lightning_peft.datamodules.arithmetic.problems import (
    PAIRS,
    answer_text,
    answers,
    prompt_text,
    split_pairs,
)


def solve(prompt: str) -> str:
    """The tasks' definitions, one digit at a time."""
    a, operator, b = prompt[:3], prompt[3], prompt[4:7]
    assert len(prompt) == 8
    assert prompt[7] == "="
    if operator in "-%":
        difference = (int(a) - int(b)) * (1 if operator == "-" else -1)
        return ("-" if difference < 0 else "0") + str(abs(difference)).zfill(3)
    digits = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    if operator == "&":
        return "0" + "".join(str(min(x, y)) for x, y in digits)
    assert operator == "^"
    return "0" + "".join(str((x + y) % 10) for x, y in digits)


def decoded(tokenizer: Any, batch: dict[str, Any]) -> list[tuple[str, str]]:
    """Prompt and answer of every row, told apart by its labels."""
    pairs = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        ids, labels = ids[mask.bool()], labels[mask.bool()]
        assert (labels[labels != -100] == ids[labels != -100]).all()
        learnt = labels != -100
        assert ids[learnt][-1] == tokenizer.eos_token_id
        pairs.append((tokenizer.decode(ids[~learnt]), tokenizer.decode(ids[learnt][:-1])))
    return pairs


def module(tokenizer: Any, **kwargs: Any) -> ArithmeticDataModule:
    data = ArithmeticDataModule(tokenizer=tokenizer, **{"val_size": 50, "test_size": 60, **kwargs})
    data.setup()
    return data


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("042-917=", "-875"),
        ("917-042=", "0875"),
        ("000-000=", "0000"),
        ("042%917=", "0875"),
        ("917%042=", "-875"),
        ("042&917=", "0012"),
        ("042^917=", "0959"),
        ("999^999=", "0888"),
    ],
)
def test_answers_of_hand_made_problems(prompt: str, answer: str) -> None:
    number = "-%&^".index(prompt[3]) * PAIRS + int(prompt[:3]) * 1000 + int(prompt[4:7])
    assert prompt_text("-%&^", number) == prompt
    assert answer_text(int(answers("-%&^", np.array([number]))[0])) == answer == solve(prompt)


def test_answers_by_brute_force() -> None:
    problems = np.random.default_rng(0).integers(0, 4 * PAIRS, size=4000)
    texts = [answer_text(a) for a in answers("-%&^", problems).tolist()]
    assert texts == [solve(prompt_text("-%&^", p)) for p in problems.tolist()]


def test_a_training_row_token_for_token(tokenizer: Any, byte_ids: Any) -> None:
    batch = next(iter(module(tokenizer).train_dataloader()))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    prompt = tokenizer.decode(ids[:8])
    assert ids == [*byte_ids(prompt), *byte_ids(solve(prompt)), 2]
    assert labels == [-100] * 8 + [*byte_ids(solve(prompt)), 2]
    assert batch["attention_mask"].unique().tolist() == [1]
    assert batch["num_target_tokens"].item() == 5 * 16


@pytest.mark.parametrize("task", ["subtraction", "operators"])
@pytest.mark.parametrize("kind", ["bytes", "bos", "merging"])
def test_every_tokenizer_gives_the_same_texts(task: str, kind: str, make_tokenizer: Any) -> None:
    merges = (("0", "9"), ("1", "2"), ("3", "-"), ("4", "=")) if kind == "merging" else ()
    tok = make_tokenizer(merges=merges, adds_bos=kind == "bos")
    data = module(tok, task=task, batch_size=64)
    train = data.training_sets()[0]
    assert (train.table is None) == (kind == "merging")  # type: ignore[attr-defined]
    for _, batch in zip(range(5), data.train_dataloader(), strict=False):
        pairs = decoded(tok, batch)
        assert [a for _, a in pairs] == [solve(p.removeprefix("<s>")) for p, _ in pairs]
        assert all(p.startswith("<s>") == (kind == "bos") for p, _ in pairs)
        labels = batch["labels"][:, 1:]
        assert batch["num_target_tokens"].item() == int((labels != -100).sum())


def test_held_out_pairs_never_train_in_either_order() -> None:
    test, val, train = (set(p.tolist()) for p in split_pairs(0, 3000, 2000))
    assert (len(test), len(val)) == (3000, 2000)

    def unordered(pairs: set[int]) -> set[tuple[int, ...]]:
        return {tuple(sorted(divmod(p, 1000))) for p in pairs}

    test_, val_, train_ = map(unordered, (test, val, train))
    assert not test_ & val_
    assert not test_ & train_
    assert not val_ & train_
    assert test_ | val_ | train_ == unordered(set(range(PAIRS)))


@pytest.mark.parametrize("task", ["subtraction", "operators"])
@pytest.mark.parametrize("regime", ["stream", "fixed"])
def test_no_problem_leaks(task: str, regime: str, tokenizer: Any) -> None:
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


def test_operators_all_occur_and_are_tested_apart(tokenizer: Any) -> None:
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


def test_seeds_train_differently_and_are_tested_alike(tokenizer: Any) -> None:
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


def test_an_epoch_is_the_rest_of_the_million_or_the_fixed_set(tokenizer: Any) -> None:
    stream = module(tokenizer, batch_size=100)
    assert PAIRS - 2 * 110 <= stream.counts["train"] <= PAIRS - 110
    assert len(stream.train_dataloader()) == -(-stream.counts["train"] // 100)
    assert module(tokenizer, task="operators").counts["train"] == 4 * stream.counts["train"]
    fixed = module(tokenizer, regime="fixed", train_size=300, train_limit=120, test_limit=7)
    assert fixed.counts == {"train": 120, "val": 50, "test": {"subtraction": 7}}


def test_probe_holds_every_operator_alike(tokenizer: Any) -> None:
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


def test_building_and_batching_are_fast(tokenizer: Any) -> None:
    def seconds(work: Any) -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    # The best of several, and twice what is wanted: the machine may be busy.
    data = [ArithmeticDataModule(tokenizer=tokenizer, batch_size=128) for _ in range(5)]
    assert min(seconds(lambda d=d: d.setup("fit")) for d in data) < 0.6
    batches = iter(data[0].train_dataloader())
    next(batches)
    assert min(seconds(lambda: next(batches)) for _ in range(20)) < 0.004


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
