"""Tests by generation under a real Trainer: predictions, scores, interruptions, the bare base."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from sums import RIGHT, Sums, module, trainer

from lightning_peft import save_peft
from lightning_peft.datamodules.loading.examples import Encoder
from lightning_peft.models.generation import generate
from lightning_peft.modules.answering import AnsweringModule

BARE = "neither a checkpoint nor an adapter"
Ask = Callable[[Sequence[str]], dict[str, Any]]


class TwoMetrics(Sums):
    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {**super().score(task, rows), "rows": float(len(rows))}


class JudgedElsewhere(Sums):
    def score(self, task: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        return {}


class Conversation(Sums):
    """Everything is asked once more, with the first digit of its answer in front."""

    def follow_up(self, batch: dict[str, Any], outputs: Sequence[str]) -> dict[str, Any] | None:
        if "outputs" in batch:
            return None
        digits = torch.tensor(self.encoder.texts([output[0] for output in outputs]))
        ids = torch.cat([digits, batch["input_ids"]], dim=1)
        mask = torch.ones_like(ids)
        return {**batch, "input_ids": ids, "attention_mask": mask, "outputs": list(outputs)}

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            row["correct"] = len(row["output"]) == 2


def predictions(folder: Path, task: str = "sums") -> list[dict[str, Any]]:
    text = (folder / "predictions" / f"{task}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.filterwarnings(f"ignore:{BARE}")
@pytest.mark.parametrize(
    ("kind", "tasks", "expected"),
    [
        (Sums, ["sums"], {"test/sums": 0.5, "test/average": 0.5}),
        (Sums, ["sums", "few"], {"test/sums": 0.5, "test/few": 0.75, "test/average": 0.625}),
        (
            TwoMetrics,
            ["few", "sums"],
            {
                "test/few/accuracy": 0.75,
                "test/few/rows": 4,
                "test/sums/accuracy": 0.5,
                "test/sums/rows": 8,
                "test/average": 0.625,
            },
        ),
        (JudgedElsewhere, ["sums"], {}),
    ],
)
def test_a_test_logs_each_tasks_metrics_and_their_average(
    kind: type[Sums], tasks: list[str], expected: dict[str, float], make: Any, tmp_path: Path
) -> None:
    run = trainer(tmp_path)
    run.test(module(), datamodule=make(kind, tasks=tasks), verbose=False)
    assert {key: float(value) for key, value in run.callback_metrics.items()} == expected


@pytest.mark.filterwarnings(f"ignore:{BARE}")
def test_predictions_tell_what_was_asked_and_judged(make: Any, tmp_path: Path) -> None:
    trainer(tmp_path).test(module(), datamodule=make(), verbose=False)
    rows = predictions(tmp_path)
    assert rows[4] == {
        "index": 4,
        "prompt": "042+917=",
        "output": "0959",
        "expected": "0958",
        "extracted": "0959",
        "correct": False,
    }
    assert [row["index"] for row in rows] == list(range(8))
    assert [row["correct"] for row in rows] == [True] * 4 + [False] * 4


def test_predict_writes_answers_and_scores_nothing(make: Any, tmp_path: Path) -> None:
    run = trainer(tmp_path)
    outputs = run.predict(module(), datamodule=make())
    assert outputs is not None
    rows = predictions(tmp_path)
    assert sorted(o for batch in outputs for o in batch) == sorted(row["output"] for row in rows)
    assert [row["output"] for row in rows[:4]] == [response for _, response in RIGHT]
    assert not run.callback_metrics


@pytest.mark.filterwarnings(f"ignore:{BARE}")
def test_a_conversation_is_asked_on(make: Any, tmp_path: Path, encoder: Encoder, ask: Ask) -> None:
    tested = module()
    trainer(tmp_path).test(tested, datamodule=make(Conversation), verbose=False)
    for row in predictions(tmp_path):
        first, second = row["output"]
        again = ask([first[0] + row["prompt"]])
        assert [second] == generate(tested.model, again, Sums.protocols["greedy"], encoder)


@pytest.mark.filterwarnings(f"ignore:{BARE}")
@pytest.mark.parametrize("protocol", ["greedy", "sampled"])
def test_an_interrupted_test_goes_on(protocol: str, make: Any, tmp_path: Path) -> None:
    options = {"protocol": protocol, "tasks": ["few", "sums"]}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = trainer(whole)
    run.test(module(), datamodule=make(**options), verbose=False)

    judged = []
    for fails_at in (3, 4, -1):  # in the first task, in the second, not at all
        data, resumed = make(fails_at=fails_at, **options), trainer(parts)
        if fails_at > 0:
            with pytest.raises(RuntimeError, match="the lights went out"):
                resumed.test(module(), datamodule=data, verbose=False)
            assert not list(parts.rglob("*.jsonl"))
        else:
            resumed.test(module(), datamodule=data, verbose=False)
        judged += data.judged
    assert sorted(judged) == [("few", i) for i in range(4)] + [("sums", i) for i in range(8)]
    for task in ("few", "sums"):
        assert predictions(parts, task) == predictions(whole, task)
    assert run.callback_metrics == resumed.callback_metrics
    outputs = {row["output"] for row in predictions(whole)}
    assert (outputs == {"0959", "1000", "0579", "0008"}) == (protocol == "greedy")


class Warned(list[str]):
    """The warnings of a block about the bare base."""

    def __enter__(self) -> Warned:
        self._catch = warnings.catch_warnings(record=True)
        self._caught = self._catch.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *exc: Any) -> None:
        self._catch.__exit__(*exc)
        self += [str(w.message) for w in self._caught or () if BARE in str(w.message)]


def test_scoring_the_bare_base_is_warned_about(make: Any, tmp_path: Path) -> None:
    few = {"tasks": ["few"]}
    with Warned() as warned:
        trainer(tmp_path).test(module(), datamodule=make(**few), verbose=False)
    assert warned == [
        "neither a checkpoint nor an adapter was given: this scores the bare base model "
        "(--ckpt_path last, or --model.peft_path FOLDER)."
    ]
    with Warned() as warned:
        run, fitted = trainer(tmp_path, max_steps=1, limit_val_batches=0), module()
        run.fit(fitted, datamodule=make(**few))
        run.test(fitted, datamodule=make(**few), verbose=False)
        run.save_checkpoint(tmp_path / "one.ckpt")
        save_peft(fitted.model, tmp_path / "adapter")
        trainer(tmp_path).test(
            module(), datamodule=make(**few), ckpt_path=str(tmp_path / "one.ckpt"), verbose=False
        )
        adapted: LightningModule = module(peft_path=str(tmp_path / "adapter"))
        trainer(tmp_path).test(adapted, datamodule=make(**few), verbose=False)
    assert warned == []


def test_scores_are_named_by_task_and_metric() -> None:
    scores = {"a": {"f1": 0.5, "accuracy": 0.75}, "b": {"f1": 0.25}}
    named = AnsweringModule("tiny_llama").named_scores(scores)
    assert named == {"a/f1": 0.5, "a/accuracy": 0.75, "b/f1": 0.25}
