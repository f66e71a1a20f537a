"""A resumed run's settings are compared with those that it was begun with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.errors import UserError
from lightning_peft.settings.resume import (
    ApplyChanges,
    check_changes,
    differences,
    is_recorded,
)

BEGUN: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_steps": 4, "devices": 1, "callbacks": None},
    "model": {
        "class_path": "M",
        "init_args": {"optimizer": {"class_path": "AdamW", "init_args": {"lr": 0.1}}},
    },
}


def given(key: str, value: Any) -> dict[str, Any]:
    """The same settings, but for one."""

    def change(tree: Any, names: list[str]) -> Any:
        if not names:
            return value
        inner = tree["init_args"] if "init_args" in tree and names[0] not in tree else None
        if inner is not None:
            return {**tree, "init_args": change(inner, names)}
        return {**tree, names[0]: change(tree.get(names[0]) or {}, names[1:])}

    return change(BEGUN, key.split("."))  # type: ignore[no-any-return]


def changes(key: str, value: Any) -> list[dict[str, Any]]:
    return list(differences(BEGUN, given(key, value)))


def test_equal_settings_have_no_changes() -> None:
    assert list(differences(BEGUN, BEGUN)) == []


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("model.optimizer.lr", 0.1, 0.2),
        ("model.optimizer.class_path", "AdamW", "SGD"),
        ("trainer.max_steps", 4, 8),
        ("trainer.callbacks", None, [{"class_path": "C"}]),
        ("seed_everything", 0, 1),
        ("trainer.gradient_clip_val", None, 1.0),
    ],
)
def test_a_change_is_named_by_the_key_that_users_write(key: str, old: Any, new: Any) -> None:
    assert changes(key, new) == [{"key": key, "old": old, "new": new}]


def test_another_class_is_one_change_whatever_it_takes() -> None:
    optimizer = {"class_path": "SGD", "init_args": {"momentum": 0.9}}
    (change,) = changes("model.optimizer", optimizer)
    assert change == {"key": "model.optimizer.class_path", "old": "AdamW", "new": "SGD"}


def test_what_decides_numbers_is_refused_unless_it_is_asked_for() -> None:
    found = changes("model.optimizer.lr", 0.2)
    sentence = (
        "model.optimizer.lr: the run was begun with 0.1, this command says 0.2; give the old "
        "value, or --resume_with_changes true to go on with the new one from here"
    )
    with pytest.raises(UserError, match=sentence):
        check_changes(found, allowed=False)
    check_changes(found, allowed=True)
    assert is_recorded(found[0])


@pytest.mark.parametrize("key", ["seed_everything", "model.optimizer.class_path"])
def test_what_the_checkpoint_decides_is_refused_always(key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: the run was .*; the checkpoint's state decides"):
        check_changes(changes(key, "7"), allowed=True)


@pytest.mark.parametrize(
    ("key", "recorded"),
    [
        ("ckpt_path", False),
        ("checkpoint.save_top_k", False),
        ("trainer.logger", False),
        ("trainer.devices", True),
        ("trainer.strategy", True),
    ],
)
def test_what_decides_no_number_passes(key: str, recorded: bool) -> None:
    found = changes(key, 2)
    check_changes(found, allowed=False)
    assert [is_recorded(change) for change in found] == [recorded]


def optimizer_and_schedule(rate: float, decay: float, steps: int) -> Any:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=decay)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


@pytest.mark.parametrize("key", ["model.optimizer.lr", "trainer.max_steps"])
def test_changes_are_put_over_what_the_checkpoint_brings(key: str) -> None:
    old, old_schedule = optimizer_and_schedule(0.1, 0.01, steps=10)
    for _ in range(4):
        old.step()
        old_schedule.step()
    new, schedule = optimizer_and_schedule(0.5, 0.03, steps=20)
    trainer: Any = SimpleNamespace(
        optimizers=[new], lr_scheduler_configs=[SimpleNamespace(scheduler=schedule)]
    )
    apply = ApplyChanges([{"key": key}])
    apply.on_fit_start(trainer, None)  # type: ignore[arg-type]
    new.load_state_dict(old.state_dict())
    schedule.load_state_dict(old_schedule.state_dict())
    assert new.param_groups[0]["weight_decay"] == 0.01
    apply.on_train_start(trainer, None)  # type: ignore[arg-type]
    rate, decay = (0.5, 0.03) if key == "model.optimizer.lr" else (0.1, 0.01)
    assert new.param_groups[0]["lr"] == pytest.approx(rate * (1 - 4 / 20))
    assert new.param_groups[0]["weight_decay"] == decay
    new.step()
    schedule.step()
    assert new.param_groups[0]["lr"] == pytest.approx(rate * (1 - 5 / 20))
