"""Causal language models under a real Trainer: windows, validation, tests by generation."""

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch import Tensor

from lightning_peft import CausalLMModule, save_peft
from lightning_peft.adapters import adapter_layers
from lightning_peft.callbacks import Checkpoints
from lightning_peft.datamodules import Example, Protocol, TextDataModule
from lightning_peft.datamodules.loading.examples import Encoder
from lightning_peft.models.generation import generate
from lightning_peft.strategies import LoRA

BARE = "neither a checkpoint nor an adapter"
# Prompt and response; the embedded model adds without an error.
RIGHT = (("042+917", "0959"), ("999+001", "1000"), ("123+456", "0579"), ("500+500", "1000"))
WRONG = (("042+917", "0958"), ("042+917", "095"), ("042+917", "09590"), ("007+001", "8"))
Ask = Callable[[Sequence[str]], dict[str, Any]]


class Sums(TextDataModule):
    """Seven records to train on, eight of which half are right to validate and test with."""

    protocols = {
        "greedy": Protocol("greedy", "{instruction}=", "response", 64, 8),
        "sampled": Protocol("sampled", "{instruction}=", "response", 64, 8, temperature=3.0),
    }

    def __init__(self, fails_at: int = -1, tasks: Sequence[str] = ("sums",), **kwargs: Any) -> None:
        given = {"protocol": "greedy", "batch_size": 2, "eval_batch_size": 3, **kwargs}
        super().__init__(data_dir=None, group_by_length=False, **given)
        self.fails_at, self.tasks = fails_at, tasks
        self.judged: list[tuple[str, int]] = []

    def train_examples(self) -> Sequence[Example]:
        return [self.example("1" * (i % 3 + 1), "7" * (i % 4 * 2), "t", i) for i in range(7)]

    def val_examples(self) -> Sequence[Example]:
        return [self.example(*pair, "v", i) for i, pair in enumerate(RIGHT + WRONG)]

    def test_examples(self) -> Mapping[str, Sequence[Example]]:
        pairs = {"sums": RIGHT + WRONG, "few": RIGHT[:3] + WRONG[:1]}
        return {
            task: [
                self.example(prompt, "", task, i, expected)
                for i, (prompt, expected) in enumerate(pairs[task])
            ]
            for task in self.tasks
        }

    def extract(self, output: str, task: str) -> str | None:
        return output or None

    def judge(self, task: str, rows: Sequence[dict[str, Any]]) -> None:
        if len(self.judged) == self.fails_at:
            raise RuntimeError("the lights went out")
        super().judge(task, rows)
        self.judged += [(task, row["index"]) for row in rows]


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


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Sums]:
    def make_data(kind: type[Sums] = Sums, **kwargs: Any) -> Sums:
        return kind(cache_dir=str(tmp_path / "cache"), **kwargs)

    return make_data


def module(adapter: LoRA | None = None, **kwargs: Any) -> CausalLMModule:
    sgd = functools.partial(torch.optim.SGD, lr=0.25)
    options = {"optimizer": sgd, "lr_scheduler_type": "constant", **kwargs}
    return CausalLMModule("tiny_llama", adapter=adapter or LoRA(r=2), **options)


def trainer(folder: Path, **kwargs: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
        "default_root_dir": folder,
        "num_sanity_val_steps": 0,
    }
    return Trainer(**{**quiet, **kwargs})


def losses_by_hand(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """The loss of each target token, row by row and without padding."""
    losses = []
    for ids, mask, labels in zip(
        batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True
    ):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0]
        for position in range(1, length):
            if labels[position] != -100:
                assert labels[position] == ids[position]
                losses.append(-logits[position - 1].log_softmax(-1)[ids[position]])
    return losses


# Training -----------------------------------------------------------------------------------------


class Rows(Logger):
    """Keeps what is logged."""

    name, version = "rows", 0

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        if "train_loss" in metrics:
            self.rows.append({**metrics, "step": step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


class ByHand(Callback):
    """Computes each window's loss and gradients anew before the step that they are for."""

    def __init__(self) -> None:
        self.window: list[dict[str, Tensor]] = []
        self.sizes: list[tuple[int, ...]] = []
        self.losses: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, i: int) -> None:
        self.window.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        params = [p for p in module.parameters() if p.requires_grad]
        with torch.enable_grad():
            micro = [losses_by_hand(module.model, batch) for batch in self.window]
            mean = torch.stack([loss for losses in micro for loss in losses]).mean()
            expected = torch.autograd.grad(mean + module.adapter.penalty(module.model), params)
        for p, grad in zip(params, expected, strict=True):
            # Other batches add up in another order, which a tensor's largest values decide.
            atol = 1e-5 * grad.abs().max().item()
            torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=atol)
        self.sizes.append(tuple(map(len, micro)))
        self.losses.append(float(mean))
        self.window = []


class Decayed(LoRA):
    def penalty(self, model: torch.nn.Module) -> Tensor:
        layers = adapter_layers(model).values()
        return 0.01 * torch.stack([layer.lora_A.square().sum() for layer in layers]).sum()


@pytest.mark.parametrize("strategy", [LoRA, Decayed])
@pytest.mark.parametrize(("accumulate", "windows"), [(1, 4), (2, 2), (3, 2)])
def test_a_windows_loss_is_the_mean_over_its_target_tokens(
    accumulate: int, windows: int, strategy: type[LoRA], make: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    by_hand, logger = ByHand(), Rows()
    run = trainer(
        tmp_path,
        callbacks=[by_hand],
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
    )
    run.fit(module(strategy(r=2)), datamodule=make())
    assert run.global_step == len(by_hand.losses) == windows
    assert [row["train_loss"] for row in logger.rows] == pytest.approx(by_hand.losses, rel=1e-5)
    # Micro-batches differ in targets, and the last window holds fewer of them.
    assert len({size for window in by_hand.sizes for size in window}) > 2
    assert [len(sizes) for sizes in by_hand.sizes][-1] == {1: 1, 2: 2, 3: 1}[accumulate]
    assert sum(map(sum, by_hand.sizes)) == sum(i % 4 * 2 + 1 for i in range(7))


class Spoilt(torch.optim.SGD):
    """Its third step leaves nothing usable."""

    steps = 0

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        self.steps += 1
        if self.steps == 3:
            for p in self.param_groups[0]["params"]:
                p.data.fill_(float("nan"))
        return loss


@pytest.mark.parametrize("every", [1, None])
def test_a_loss_that_is_no_number_stops_the_run(
    every: int | None, make: Any, tmp_path: Path
) -> None:
    saving = {"enable_checkpointing": True, "callbacks": [Checkpoints(every)]} if every else {}
    run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, **saving)
    with pytest.raises(ValueError, match="loss") as raised:
        run.fit(module(optimizer=functools.partial(Spoilt, lr=0.25)), datamodule=make())
    start, end = (
        "the loss is nan at step 3 with learning rate 0.25: try a lower one, more warmup_steps or "
        "trainer.gradient_clip_val; ",
        "no good checkpoint was written yet.",
    )
    if every:
        good = next(tmp_path.rglob("step=2.ckpt"))
        end = f"the last good checkpoint is {good}."
        state = torch.load(good, weights_only=True)["state_dict"]
        assert all(tensor.isfinite().all() for tensor in state.values())
    assert str(raised.value) == start + end


# Validation ---------------------------------------------------------------------------------------


def test_val_accuracy_is_that_of_greedy_answers(
    make: Any, encoder: Encoder, ask: Ask, tmp_path: Path
) -> None:
    data, tested = make(), module()
    [metrics] = trainer(tmp_path).validate(tested, datamodule=data, verbose=False)
    pairs = RIGHT + WRONG
    answers = generate(
        tested.model.eval(), ask([f"{p}=" for p, _ in pairs]), data.protocol, encoder
    )
    right = [answer == response for answer, (_, response) in zip(answers, pairs, strict=True)]
    assert right == [True] * 4 + [False] * 4
    assert metrics["val_accuracy"] == 0.5

    with torch.no_grad():
        losses = [
            loss for batch in data.val_dataloader() for loss in losses_by_hand(tested.model, batch)
        ]
    assert len(losses) == sum(len(response) + 1 for _, response in pairs)
    assert metrics["val_loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)


# Tests --------------------------------------------------------------------------------------------


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
