"""PrunedLoRA: the right components leave at the right steps, and the others stay what they were."""

from __future__ import annotations

import functools
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft.adapters import adapter_state_dict, load_adapter_state
from lightning_peft.pruning import activation_recovery, damped, gradient_recovery, gram
from lightning_peft.strategies import PrunedLoRA, StepMask

TARGETS = ["q_proj", "v_proj", "down_proj"]
Small = functools.partial(PrunedLoRA, r=6, target_r=2, prune_every=3, target_modules=TARGETS)


# When.


@pytest.mark.parametrize(
    ("start", "every", "count", "target", "expected"),
    [
        (0, 3, 2, 2, [4, 4, 4, 2, 2, 2, 2, 2, 2]),
        (2, 2, 1, 3, [6, 6, 5, 5, 4, 4, 3, 3, 3]),
        (1, 4, 4, 1, [6, 2, 2, 2, 2, 1, 1, 1, 1]),
        (1, 1, 9, 0, [6, 0, 0, 0, 0, 0, 0, 0, 0]),
        (0, 1, 1, 6, [6] * 9),
    ],
)
def test_ranks_fall_at_the_steps_of_the_schedule(
    start, every, count, target, expected, loop
) -> None:
    strategy = Small(
        start_step=start, prune_every=every, prune_count=count, target_r=target, min_r=0
    )
    run, ranks = loop(strategy), []
    for step in range(9):
        run.step(step)
        assert len(set(run.ranks())) == 1
        ranks.append(run.ranks()[0])
    assert ranks == expected
    falls = [s for s in range(9) if ranks[s] < (ranks[s - 1] if s else 6)]
    assert strategy.decisions == [
        {"step": s, "layer": layer, "event": "removed", "rank": ranks[s]}
        for s in falls
        for layer in run.layers
    ]


def test_accumulated_gradients_make_one_event(loop) -> None:
    run = loop(Small(start_step=1))
    for step in range(2):
        for micro in range(3):
            run.backward(3 * step + micro)
        run.update(step)
    assert run.ranks() == [4] * 6


# Which.


def kept(scores: Tensor, count: int) -> list[int]:
    return sorted(scores.argsort()[count:].tolist())


CRITERIA = [
    "gradient",
    "llm_pruner_element1",
    "llm_pruner_element2",
    "llm_pruner_taylor2",
    "magnitude",
    "wanda",
    "sparsegpt",
]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_components_of_the_lowest_scores_leave_and_the_others_are_untouched(
    criterion, loop, brute_force
) -> None:
    run = loop(Small(criterion=criterion, start_step=2))
    events = 0
    for step in range(6):
        run.step(step)
        if step in (2, 5):
            for name, m in run.before.items():
                keep = kept(brute_force(criterion, m, run.z[name]), 2)
                B, A = run.after[name]
                assert torch.equal(B, m["B"][:, keep]), name
                assert torch.equal(A, m["A"][keep]), name
                run.z[name].clear()
            events += 1
        else:
            assert all(torch.equal(run.after[n][0], m["B"]) for n, m in run.before.items())
    assert events == 2
    assert run.ranks() == [2] * 6


def test_random_removal_comes_from_the_global_stream(loop) -> None:
    run = loop(Small(criterion="random", start_step=1))
    run.step(0)
    run.backward(1)
    torch.manual_seed(7)
    run.update(1)
    torch.manual_seed(7)
    groups: dict[Any, list[str]] = {}
    for name, m in run.before.items():
        groups.setdefault((m["B"].shape, m["A"].shape), []).append(name)
    for names in groups.values():
        scores = torch.rand(len(names), 6, dtype=torch.float64)
        for name, score in zip(names, scores, strict=True):
            assert torch.equal(run.after[name][0], run.before[name]["B"][:, kept(score, 2)])


@pytest.mark.parametrize(("min_r", "target"), [(0, 2), (2, 3), (3, 3)])
def test_global_allocation_takes_the_lowest_over_all_above_the_floor(
    min_r, target, loop, brute_force
) -> None:
    strategy = Small(allocation="global", min_r=min_r, target_r=target, start_step=2, prune_count=3)
    run = loop(strategy)
    for step in range(3):
        run.step(step)
    scores = {n: brute_force("gradient", m, []) for n, m in run.before.items()}
    left = dict.fromkeys(scores, 6)
    gone: dict[str, list[int]] = {name: [] for name in scores}
    ordered = sorted((s.item(), n, j) for n, score in scores.items() for j, s in enumerate(score))
    for _, name, j in ordered:
        if sum(map(len, gone.values())) < 18 and left[name] > min_r:
            gone[name].append(j)
            left[name] -= 1
    assert run.ranks() == list(left.values())
    for name, m in run.before.items():
        keep = [j for j in range(6) if j not in gone[name]]
        assert torch.equal(run.after[name][0], m["B"][:, keep])
    for step in range(3, 9):
        run.step(step)
    assert sum(run.ranks()) == target * 6
    assert min(run.ranks()) >= min_r


# Recovery.


def test_the_gradient_recovery_is_the_formula_with_h_averaged_since_the_last_event(
    loop, brute_force
) -> None:
    run = loop(Small(recovery="gradient", start_step=2, damping=0.05, max_ratio=0.5))
    H: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in run.layers}
    for step in range(6):
        run.step(step)
        for name, m in run.before.items():
            H[name].append((gram(m["grad_B"]), gram(m["grad_A"].T)))
        if step in (2, 5):
            for name, m in run.before.items():
                keep = kept(brute_force("gradient", m, []), 2)
                gone = torch.tensor([j for j in range(m["B"].shape[1]) if j not in keep])
                H_B, H_A = (torch.stack(h).mean(0) for h in zip(*H[name], strict=True))
                B = m["B"] + gradient_recovery(
                    m["B"], m["grad_B"], damped(H_B, 0.05), gone, max_ratio=0.5
                )
                A = (
                    m["A"]
                    + gradient_recovery(
                        m["A"].T, m["grad_A"].T, damped(H_A, 0.05), gone, max_ratio=0.5
                    ).T
                )
                torch.testing.assert_close(run.after[name][0], B[:, keep], rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(run.after[name][1], A[keep], rtol=1e-4, atol=1e-6)
                assert not torch.equal(B[:, keep], m["B"][:, keep])
                H[name].clear()


@pytest.mark.parametrize("allocation", ["matrix", "global"])
def test_the_activation_recovery_changes_b_alone(allocation, loop, brute_force) -> None:
    strategy = Small(
        criterion="magnitude", recovery="activation", start_step=2, allocation=allocation
    )
    run = loop(strategy)
    for step in range(3):
        run.step(step)
    scores = {n: brute_force("magnitude", m, []) for n, m in run.before.items()}
    for name, m in run.before.items():
        keep = kept(scores[name], 6 - run.layers[name].rank)
        gone = torch.tensor([j for j in range(6) if j not in keep], dtype=torch.int64)
        z = torch.cat(run.z[name]).double()
        change = activation_recovery(m["B"], z.T @ z / len(z), gone, 0.01)
        expected = (m["B"] + change)[:, keep]
        torch.testing.assert_close(run.after[name][0], expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(run.after[name][1], m["A"][keep])
    if allocation == "matrix":
        assert run.ranks() == [4] * 6


def test_the_activation_recovery_makes_the_outputs_error_smaller(loop) -> None:
    errors = {}
    for recovery in ("none", "activation"):
        run = loop(Small(criterion="magnitude", recovery=recovery, start_step=4))
        for step in range(5):
            run.step(step)
        name = "model.layers.0.self_attn.q_proj"
        m, (B, A) = run.before[name], run.after[name]
        z, x = torch.cat(run.z[name]), m["B"] @ m["A"] - B @ A
        assert x.any()
        keep = [j for j in range(6) if any(torch.equal(m["A"][j], row) for row in A)]
        errors[recovery] = (z @ m["B"].T - z[:, keep] @ B.T).square().sum().item()
    assert errors["activation"] < errors["none"]


# Padding, resume, and never coming back.


def test_padding_does_not_count_for_activations(loop, random_batch) -> None:
    sums = []
    for junk in (0, 1):
        strategy = Small(criterion="wanda", start_step=5, target_modules=["q_proj"])
        run = loop(strategy)
        batch = random_batch(1)
        batch["input_ids"] = torch.where(
            batch["attention_mask"].bool(),
            batch["input_ids"],
            torch.full_like(batch["input_ids"], junk),
        )
        run.mask = batch["attention_mask"].bool()
        run.model(**batch).loss.backward()
        sums.append(strategy.sums["model.layers.0.self_attn.q_proj"])
    torch.testing.assert_close(sums[0]["C"], sums[1]["C"])
    assert sums[0]["tokens"] == random_batch(1)["attention_mask"].sum()


def test_evaluation_does_not_count_for_activations(loop, random_batch, logits) -> None:
    run = loop(Small(criterion="wanda"))
    logits(run.model, random_batch(3))
    assert not run.strategy.sums


def test_activations_are_no_longer_watched_once_the_target_is_reached(loop) -> None:
    run = loop(Small(criterion="wanda", prune_every=1))
    for step in range(3):
        run.step(step)
    assert run.ranks() == [2] * 6
    run.strategy.sums.clear()
    run.step(3)
    assert not run.strategy.sums


@pytest.mark.parametrize("after", [1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "arguments",
    [
        {"recovery": "gradient"},
        {"criterion": "sparsegpt", "recovery": "activation", "allocation": "global"},
        {"criterion": "random", "rank_gate": StepMask},
    ],
)
def test_resume_in_the_middle_of_averaging_is_exact(after, arguments, loop) -> None:
    def make() -> PrunedLoRA:
        return Small(start_step=2, prune_count=1, **arguments)

    first, saved = loop(make()), io.BytesIO()
    for step in range(8):
        if step == after:
            state = {
                "adapter": adapter_state_dict(first.model),
                "strategy": first.strategy.state_dict(),
                "optimizer": first.optimizer.state_dict(),
                "random": torch.get_rng_state(),
            }
            torch.save(state, saved)
        first.step(step)
    second = loop(make(), seed=5)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    load_adapter_state(second.model, state["adapter"])
    second.strategy.load_state_dict(state["strategy"])
    second.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    for step in range(after, 8):
        second.step(step)
    expected = adapter_state_dict(first.model)
    resumed = adapter_state_dict(second.model)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert second.strategy.decisions == first.strategy.decisions


def test_a_loaded_state_is_no_alias(loop) -> None:
    run = loop(Small(recovery="gradient", start_step=9))
    run.step(0)
    state = run.strategy.state_dict()
    other = loop(Small(recovery="gradient", start_step=9))
    other.strategy.load_state_dict(state)
    other.step(1)
    sums = [
        s.sums["model.layers.0.self_attn.q_proj"]["steps"] for s in (run.strategy, other.strategy)
    ]
    assert sums == [1, 2]
    assert state["sums"]["model.layers.0.self_attn.q_proj"]["steps"] == 1


def test_a_removed_component_never_comes_back(loop) -> None:
    run = loop(Small(prune_every=1, prune_count=1, target_r=1))
    ranks = []
    for step in range(10):
        run.step(step)
        ranks.append(run.ranks()[0])
        for layer in run.layers.values():
            assert layer.lora_A.shape[0] == layer.lora_B.shape[1] == layer.rank
    assert ranks == [5, 4, 3, 2, 1, 1, 1, 1, 1, 1]


def test_activations_that_nobody_saw_are_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    strategy = PrunedLoRA(r=2, target_r=1, criterion="wanda")
    strategy.attach(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.eval()(torch.randn(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="'wanda' .* needs the activations .* and saw none"):
        strategy.before_step(model, optimizer, 0)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"target_r": 33}, "target_r must lie between 0 and r = 32, got 33"),
        ({"target_r": -1}, "target_r must lie between 0 and r = 32, got -1"),
        ({"min_r": 9, "allocation": "global"}, "min_r must lie between 0 and target_r = 8, got 9"),
        ({"start_step": -1}, "start_step must be at least 0, got -1"),
        ({"prune_every": 0}, "prune_every must be at least 1, got 0"),
        ({"prune_count": 0}, "prune_count must be at least 1, got 0"),
        ({"criterion": "best"}, "criterion must be one of gradient, .*, got 'best'"),
        ({"recovery": "full"}, "recovery must be one of none, gradient, activation, got 'full'"),
        ({"allocation": "each"}, "allocation must be one of matrix, global, got 'each'"),
        ({"r": 0}, "r must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_refused_at_once(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        PrunedLoRA(**arguments)


@pytest.mark.parametrize(
    ("arguments", "last", "end"),
    [
        ({"r": 8}, 14, "4"),  # removals at 4, 9 and 14
        ({"r": 4, "rank_pattern": {"v_proj": 9}}, 19, "3"),
        ({"r": 4, "rank_pattern": {"v_proj": 9}, "allocation": "global"}, 9, "3.66667"),
    ],
)
def test_a_run_that_ends_before_the_target_is_warned_about(
    arguments, last, end, loop, recwarn
) -> None:
    run = loop(Small(start_step=4, prune_every=5, prune_count=2, **arguments))
    run.strategy._say_if_too_short(run.layers, last + 1)
    assert not recwarn
    run.strategy._say_if_too_short(run.layers, last)
    assert [str(warning.message) for warning in recwarn] == [
        f"PrunedLoRA reaches target_r = 2 at step {last}, but this run has {last} steps and ends "
        f"at rank {end}: lower start_step or prune_every, or raise prune_count."
    ]
    for step in range(last + 1):
        before = run.ranks()
        run.step(step)
    highest = max(before) if "allocation" not in arguments else sum(before) / len(before)
    assert f"{highest:g}" == end
    assert sum(run.ranks()) == 2 * len(before)
