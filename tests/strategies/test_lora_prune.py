"""The groups that matter least leave, by the formula on a full-size model with masks."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_peft.adapters import (
    adapter_layers,
    adapter_state_dict,
    load_adapter_state,
    merge,
)
from lightning_peft.adapters.groups import groups_of
from lightning_peft.assets import TINY_LLAMA
from lightning_peft.cli import main
from lightning_peft.commands import export
from lightning_peft.errors import UserError
from lightning_peft.modules import CausalLMModule
from lightning_peft.runs import find_last, read_checkpoint
from lightning_peft.strategies import LoRA, LoRAPrune, RankDropout
from lightning_peft.testing import check_strategy

SHAPE = {
    "hidden_size": 48,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
}
SCHEDULE = {"ratio": 0.5, "head_ratio": 0.25, "start_step": 2, "prune_every": 3, "removals": 3}
QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.yaml")


class Masked:
    """LoRA at full size; what leaves is zero, and importance is computed with loops over groups."""

    def __init__(self, model: Any, adapter: LoRA) -> None:
        self.model, self.layers = model, adapter_layers(model)
        self.groups = groups_of(model)
        self.alive = {name: torch.ones(each.count) for name, each in self.groups.items()}
        self.smoothed = {name: torch.zeros(each.count) for name, each in self.groups.items()}
        for name, each in self.groups.items():
            last = each.members[-1]
            model.get_submodule(last.name).register_forward_pre_hook(
                lambda module, args, name=name, size=last.size: (
                    args[0] * self.alive[name].repeat_interleave(size),
                )
            )

    def look(self) -> None:
        for name, each in self.groups.items():
            now = torch.zeros(each.count)
            for member in each.members:
                if (layer := self.layers.get(member.name)) is None:
                    continue
                A, B = layer.lora_A.detach(), layer.lora_B.detach()
                grad = layer.lora_B.grad @ A + B @ layer.lora_A.grad
                grad -= layer.lora_B.grad @ layer.lora_A.grad
                score = (grad * (layer.weight + layer.scaling * B @ A)).abs()
                sums = torch.stack([s.sum() for s in score.split(member.size, member.dim)])
                sums *= self.alive[name]
                now += sums / (sums.norm() + 1e-8)
            self.smoothed[name] = 0.9 * self.smoothed[name] + 0.1 * now

    def remove(self, heads: int, channels: int) -> None:
        for name, each in self.groups.items():
            left = heads if each.kind == "heads" else channels
            importance = self.smoothed[name].masked_fill(self.alive[name] == 0, -1)
            self.alive[name] = torch.zeros(each.count).index_fill(0, importance.topk(left)[1], 1)


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "o_proj", "down_proj"]])
def test_a_run_is_that_of_a_full_size_model_with_masks(
    tiny_llama, random_batch, logits, targets, tmp_path
) -> None:
    model, reference = tiny_llama(**SHAPE), tiny_llama(**SHAPE)
    strategy = LoRAPrune(r=3, target_modules=targets, **SCHEDULE)
    optimizers = []
    for adapter, each in ((strategy, model), (LoRA(r=3, target_modules=targets), reference)):
        torch.manual_seed(0)
        adapter.attach(each)
        optimizers.append(torch.optim.AdamW(trained(each), lr=0.01))
    masked = Masked(reference, adapter)
    # Of 40 channels and 4 key/value heads: 0.5 and 0.25 times 19/27, 26/27 and 1 have gone.
    removals = {2: (4, 26), 5: (4, 21), 8: (3, 20)}
    for step in range(12):
        for micro in range(2):  # one optimizer step over two batches
            for each in (model, reference):
                each(**random_batch(2 * step + micro)).loss.backward()
        masked.look() if step <= 8 else None
        if step in removals:
            masked.remove(*removals[step])
        strategy.before_step(model, optimizers[0], step)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        strategy.after_step(model, optimizers[0], step)
        alive = {name: mask.nonzero().flatten() for name, mask in masked.alive.items()}
        assert all(torch.equal(strategy.kept[name], alive[name]) for name in alive), step
        expected = logits(reference, random_batch(100))
        torch.testing.assert_close(logits(model, random_batch(100)), expected, rtol=0, atol=1e-5)
    config = model.config
    assert (config.intermediate_size, config.num_attention_heads) == (20, 6)
    chosen = [strategy.kept[f"model.layers.{i}.mlp"].tolist() for i in (0, 1)]
    assert chosen[0] != chosen[1]
    assert not strategy.importance  # nothing is computed once all has gone
    merge(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, random_batch(100)), expected, rtol=0, atol=1e-5)
    # Two layers, each without a head group of 12 + 6 + 6 + 12 and without 20 of 40 channels.
    lost = 2 * 48 * (36 + 3 * 20)
    assert loaded.num_parameters() == tiny_llama(**SHAPE).num_parameters() - lost
    assert model.model.layers[0].mlp.up_proj.weight.shape == (20, 48)
    steps = {decision["step"] for decision in strategy.decisions}
    assert steps == {2, 5, 8}
    assert {d["event"] for d in strategy.decisions} == {"narrowed"}


def test_the_shared_arguments_and_gates_serve_here_too() -> None:
    check_strategy(
        LoRAPrune(
            r=4,
            start_step=1,
            prune_every=3,
            removals=3,
            lora_dropout=0.1,
            share_dropout=True,
            use_rslora=True,
            rank_gate=lambda r: RankDropout(r, 0.3),
            modules_to_save=["lm_head"],
        )
    )


@pytest.mark.parametrize(
    "arguments",
    [
        {"start_step": 2, "prune_every": 2, "removals": 3},
        {"start_step": 0, "removals": 1, "head_ratio": 0.0},
        {"start_step": 0, "prune_every": 5, "ratio": 0.0, "head_ratio": 0.5, "removals": 3},
        {"start_step": 1, "prune_every": 1, "target_modules": ["v_proj", "up_proj"]},
    ],
)
def test_keeps_a_strategys_promises(arguments) -> None:
    check_strategy(LoRAPrune(r=4, **arguments))


@pytest.mark.slow
def test_two_processes_are_refused() -> None:
    sentence = "2 processes cannot train: .*LoRAPrune changes the sizes of weights, which several"
    with pytest.raises(AssertionError, match=sentence):
        check_strategy(LoRAPrune(r=4), processes=2)


def test_a_saved_state_gives_a_fresh_base_its_sizes(tiny_llama, random_batch, logits) -> None:
    def attached() -> tuple[LoRAPrune, Any, torch.optim.Optimizer]:
        strategy = LoRAPrune(r=3, **SCHEDULE)
        torch.manual_seed(0)
        strategy.attach(model := tiny_llama(**SHAPE))
        return strategy, model, torch.optim.AdamW(trained(model), lr=0.01)

    strategy, model, optimizer = attached()
    states: dict[int, Any] = {}
    for step in range(9):
        states[step] = (
            strategy.state_dict(),
            copy.deepcopy(adapter_state_dict(model)),
            logits(model, random_batch(9)),
        )
        model(**random_batch(step)).loss.backward()
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        optimizer.zero_grad()
    for step in (0, 3, 6):
        strategy_state, tensors, expected = states[step]
        fresh, other, _ = attached()
        fresh.restructure(other, strategy_state)
        assert any(layer.resized for layer in adapter_layers(other).values()) == (step > 0)
        # The first removal of tests, too, may come before tensors: from an earlier state on.
        load_adapter_state(other, tensors)
        fresh.load_state_dict(strategy_state)
        assert torch.equal(logits(other, random_batch(9)), expected)
        if step:
            fresh.restructure(other, states[6][0])  # what has gone since leaves too
            assert other.config.intermediate_size == 21


def test_a_base_that_has_lost_what_a_checkpoint_holds_is_refused(tiny_llama) -> None:
    strategy = LoRAPrune(r=2)
    strategy.attach(model := tiny_llama())
    state = strategy.state_dict()
    half = {name: kept[: len(kept) // 2] for name, kept in state["kept"].items()}
    strategy.restructure(model, {"kept": half})
    with pytest.raises(UserError) as error:
        strategy.restructure(model, state)
    assert str(error.value) == (
        "the checkpoint holds groups of model.layers.0.self_attn that this model has lost; load "
        "the base anew."
    )


def test_gradients_that_are_not_finite_say_nothing(tiny_llama, random_batch) -> None:
    strategy = LoRAPrune(r=2, start_step=0, prune_every=1, removals=1)
    strategy.attach(model := tiny_llama())
    optimizer = torch.optim.AdamW(trained(model), lr=0.01)
    layer: Any = model.model.layers[0].mlp.up_proj
    for step, value in enumerate((torch.inf, torch.nan, None)):
        model(**random_batch(step)).loss.backward()
        if value is None:
            strategy.before_step(model, optimizer, step)  # one removal later
        else:
            layer.lora_A.grad[0, 0] = value
            with pytest.warns(UserWarning, match=f"^nothing was removed at step {step}, since"):
                strategy.before_step(model, optimizer, step)
            assert not any(own.any() for own in strategy.importance.values())
            assert model.config.intermediate_size == 48
        optimizer.zero_grad()
    assert model.config.intermediate_size == 24


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"smoothing": 1.0}, "smoothing must lie in [0, 1), got 1.0."),
        ({"smoothing": -0.1}, "smoothing must lie in [0, 1), got -0.1."),
    ],
)
def test_numbers_outside_their_range_are_refused(arguments, sentence) -> None:
    with pytest.raises(UserError) as error:
        LoRAPrune(**arguments)
    assert str(error.value) == sentence


def test_groups_without_an_adapter_have_no_gradient_to_choose_by(tiny_llama) -> None:
    with pytest.raises(UserError) as error:
        LoRAPrune(target_modules=["q_proj"]).attach(tiny_llama())
    assert str(error.value) == (
        "target_modules: model.layers.0.mlp is to lose channels by the gradients of its adapters, "
        "and has none; add down_proj."
    )
    LoRAPrune(target_modules=["q_proj"], ratio=0.0, head_ratio=0.5).attach(tiny_llama())


def run(*words: str) -> None:
    argv, path = sys.argv, sys.path[:]
    try:
        main([*words])
    finally:
        sys.argv, sys.path[:] = argv, path


@pytest.mark.slow
def test_the_command_line_trains_resumes_and_exports_a_smaller_model(
    random_batch, logits, tmp_path: Path
) -> None:
    settings = {
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": "false",
        "trainer.limit_val_batches": "1",
        "trainer.limit_test_batches": "1",
        "trainer.val_check_interval": "4",
        "trainer.accumulate_grad_batches": "2",
        "validate_first": "false",
        "data.batch_size": "4",
        "data.eval_batch_size": "4",
        "checkpoint.every_n_train_steps": "4",
        "checkpoint.save_top_k": "-1",
        "importance.every_n_steps": "2",
        "model.warmup_steps": "0",
        "model.lr_scheduler_type": "constant",
    }
    arguments = {"r": 4, "ratio": 0.5, "start_step": 2, "prune_every": 2, "removals": 3}
    adapter = {"class_path": "LoRAPrune", "init_args": arguments}
    given = ["--config", QUICKSTART, *(f"--{key}={value}" for key, value in settings.items())]
    given.append(f"--model.adapter={json.dumps(adapter)}")
    loaded = []
    for name in ("whole", "resumed"):
        root, more = tmp_path / name, []
        if name == "resumed":
            shutil.copytree(tmp_path / "whole", root, ignore=lambda *_: ["merged"])
            (root / "version_0/checkpoints/step=10.ckpt").unlink()
            more = [f"--ckpt_path={root}/version_0/checkpoints/step=4.ckpt"]
        run("fit", *given, f"--trainer.default_root_dir={root}", "--trainer.max_steps=10", *more)
        run("export", "--ckpt_path", str(root), "--merge", "--output", str(root / "merged"))
        loaded.append(AutoModelForCausalLM.from_pretrained(root / "merged"))
    folder = tmp_path / "whole/version_0"
    run("test", "--config", str(folder / "config.yaml"), "--ckpt_path", str(find_last(folder)))
    record = json.loads((folder / "run.json").read_text())
    assert "test/average" in record["metrics"]
    assert record["exported"] == (
        "nothing: PEFT needs a stored base of the same sizes, and this one was pruned; "
        "lightning-peft export --merge writes the merged model"
    )
    assert not (folder / "adapter").exists()
    with pytest.raises(UserError, match="^PEFT needs a stored base of the same sizes"):
        export.main(["--ckpt_path", str(folder), "--output", str(tmp_path / "adapter")])
    for name, tensor in loaded[0].state_dict().items():
        assert torch.equal(loaded[1].state_dict()[name], tensor), name
    config = loaded[0].config
    assert (config.intermediate_size, config.num_attention_heads) == (192, 2)
    assert (config.num_key_value_heads, config.head_dim) == (1, 32)
    base = AutoModelForCausalLM.from_pretrained(TINY_LLAMA)
    lost = 4 * 128 * (6 * 32 + 3 * 192)  # in each layer half of the heads and of the channels
    assert loaded[0].num_parameters() == base.num_parameters() - lost
    # The checkpoint, not merged.
    module = CausalLMModule("tiny_llama", adapter=LoRAPrune(**arguments))
    module.loads_state = True
    module.configure_model()
    checkpoint = read_checkpoint(find_last(folder))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    found, expected = (logits(each, random_batch(0)) for each in (loaded[0], module.model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
