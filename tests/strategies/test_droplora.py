"""DropLoRA's masks: what one draw covers, what it leaves, and that eval is LoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import trainable_parameters
from lightning_peft.adapters import LoRALinear, adapter_layers
from lightning_peft.adapters.gates import step_gates
from lightning_peft.strategies import DropLoRA, LearnedRankMask, LoRA, RankDropout, StepMask

RANDOM = ["token", "sample", "batch", "step"]


def make_gate(mask: str, r: int, p: float, rescale: bool = True) -> nn.Module:
    return StepMask(r, p, rescale) if mask == "step" else RankDropout(r, p, mask, rescale)


def drawn(gate: nn.Module, *shape: int) -> Tensor:
    return gate.train()(torch.ones(*shape))


def attached(strategy: Any, make: Any) -> nn.Module:
    torch.manual_seed(0)
    model = make()
    strategy.attach(model)
    torch.manual_seed(1)
    for layer in adapter_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model


@pytest.mark.parametrize("mask", [*RANDOM, "learned"])
def test_eval_is_lora(mask, tiny_llama, random_batch, logits) -> None:
    plain, masked = (attached(s, tiny_llama) for s in (LoRA(r=4), DropLoRA(r=4, p=0.5, mask=mask)))
    ours, theirs = adapter_layers(masked), adapter_layers(plain)
    for name, layer in theirs.items():  # a step mask's first draw moves the stream
        ours[name].lora_A.data.copy_(layer.lora_A)
        ours[name].lora_B.data.copy_(layer.lora_B)
    assert torch.equal(logits(masked, random_batch(1)), logits(plain, random_batch(1)))
    extra = 4 * len(ours) if mask == "learned" else 0
    assert trainable_parameters(masked) == trainable_parameters(plain) + extra


@pytest.mark.parametrize("mask", RANDOM)
def test_the_mean_over_draws_is_the_unmasked_activation(mask) -> None:
    torch.manual_seed(0)
    gate, p, draws = make_gate(mask, 8, 0.3), 0.3, 4000
    total = torch.zeros(8)
    for _ in range(draws):
        total += drawn(gate, 1, 1, 8)[0, 0]
        if mask == "step":
            gate.new_step()
    # The standard deviation of one draw is sqrt(p / (1 - p)); five of those of the mean.
    assert (total / draws - 1).abs().max() < 5 * (p / (1 - p) / draws) ** 0.5


@pytest.mark.parametrize("mask", RANDOM)
@pytest.mark.parametrize(("rescale", "kept"), [(True, 1 / 0.7), (False, 1.0)])
def test_p_is_the_share_that_is_dropped(mask, rescale, kept) -> None:
    torch.manual_seed(0)
    values = drawn(make_gate(mask, 20_000, 0.3, rescale), 1, 1, 20_000)
    assert values.unique().tolist() == pytest.approx([0, kept])
    assert (values == 0).float().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / 20_000) ** 0.5)


def test_a_token_mask_is_the_authors_dropout() -> None:
    """``nn.Dropout`` on rank activations: each element by itself, what is kept over 1 - p."""
    z = torch.randn(200, 50, 16)
    masked = RankDropout(16, 0.3, "token").train()(z)
    kept = masked != 0
    torch.testing.assert_close(masked[kept], z[kept] / 0.7)
    assert abs(kept.float().mean().item() - 0.7) < 5 * (0.21 / z.numel()) ** 0.5
    # Neighbours share their random words, and must not know of each other.
    centred = kept.double().flatten(0, 1) - 0.7
    correlation = centred.T @ centred / (0.21 * len(centred))
    assert (correlation - torch.eye(16)).abs().max() < 5 / len(centred) ** 0.5


@pytest.mark.parametrize(
    ("mask", "same_tokens", "same_samples", "same_forwards"),
    [
        ("token", False, False, False),
        ("sample", True, False, False),
        ("batch", True, True, False),
        ("step", True, True, True),
    ],
)
def test_what_one_draw_covers(mask, same_tokens, same_samples, same_forwards) -> None:
    torch.manual_seed(0)
    gate = make_gate(mask, 32, 0.5)
    first, second = drawn(gate, 3, 5, 32), drawn(gate, 3, 5, 32)
    assert torch.equal(first[:, 0], first[:, 1]) is same_tokens
    assert torch.equal(first[0], first[1]) is same_samples
    assert torch.equal(first, second) is same_forwards
    # Only a draw that is held has to be renewed by somebody.
    assert bool(step_gates(gate)) is same_forwards
    if same_forwards:
        gate.new_step()
    assert not torch.equal(first, drawn(gate, 3, 5, 32))


@pytest.mark.parametrize("mask", ["batch", "step"])
def test_a_component_dropped_for_a_whole_step_has_no_gradient(mask) -> None:
    torch.manual_seed(0)
    gate = make_gate(mask, 6, 0.5)
    layer = LoRALinear(nn.Linear(7, 5), 6, 6, gate=gate)
    layer.reset_parameters(False)
    drawn_masks = []
    gate.register_forward_hook(lambda gate, args, z: drawn_masks.append((z != 0).any(0).any(0)))
    micro_batches = 2 if mask == "step" else 1
    for _ in range(micro_batches):
        layer(torch.randn(2, 4, 7)).square().sum().backward()
    dropped = ~drawn_masks[0]
    assert 0 < dropped.sum() < 6
    assert torch.equal(layer.lora_A.grad.any(1), ~dropped)
    assert torch.equal(layer.lora_B.grad.any(0), ~dropped)


def test_a_step_mask_changes_once_for_each_optimizer_step(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    strategy = DropLoRA(r=16, mask="step")
    strategy.attach(model)
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    gates = [layer.gate for layer in adapter_layers(model).values()]
    seen = []
    for step in range(3):
        for micro in range(2):
            model(**random_batch(2 * step + micro)).loss.backward()
            seen.append(torch.stack([gate.mask.clone() for gate in gates]))
        strategy.before_step(model, optimizer, step)
        optimizer.step()
        strategy.after_step(model, optimizer, step)
        optimizer.zero_grad()
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    # Each layer has its own draw, and another one at the next step.
    assert len({tuple(row.tolist()) for row in seen[0]}) == len(gates)
    assert not (seen[1] == seen[2]).all(1).any()


def test_the_learned_mask_and_its_gradient_by_hand() -> None:
    gate = LearnedRankMask(4)
    z, weight = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(gate.train()(z), z)  # all logits start at zero, so all are kept
    logits = torch.tensor([0.0, -0.5, 2.0, -3.0])
    gate.logits.data.copy_(logits)
    out = gate(z)
    share = 0.5  # two of four are kept
    torch.testing.assert_close(out, z * torch.tensor([1.0, 0.0, 1.0, 0.0]) / share)
    (out * weight).sum().backward()
    slope = logits.sigmoid() * (1 - logits.sigmoid())
    torch.testing.assert_close(gate.logits.grad, (z * weight).sum(0) / share * slope)
    assert torch.equal(gate.eval()(z), z)


@pytest.mark.parametrize("mask", RANDOM)
def test_without_dropping_it_is_lora(mask, tiny_llama, random_batch) -> None:
    losses = []
    for strategy in (LoRA(r=4), DropLoRA(r=4, p=0.0, mask=mask)):
        model = attached(strategy, tiny_llama)
        for i, layer in enumerate(adapter_layers(model).values()):
            torch.manual_seed(i)
            layer.reset_parameters(False)
        loss = model(**random_batch(1)).loss
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        losses.append((loss, grads))
    assert torch.equal(losses[0][0], losses[1][0])
    assert all(torch.equal(a, b) for a, b in zip(losses[0][1], losses[1][1], strict=True))


def test_masks_repeat_under_one_seed_and_differ_under_another() -> None:
    gate = RankDropout(64, 0.5, "token")
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(drawn(gate, 2, 3, 64))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_half_precision_activations_stay_so() -> None:
    z = torch.ones(2, 3, 8, dtype=torch.bfloat16)
    for mask in RANDOM:
        assert make_gate(mask, 8, 0.5).train()(z).dtype == torch.bfloat16
    assert LearnedRankMask(8).train()(z).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"p": 1.0}, r"p must lie in \[0, 1\), got 1.0"),
        ({"p": -0.1}, r"p must lie in \[0, 1\), got -0.1"),
        ({"mask": "rank"}, "mask must be token, sample, batch, step or learned, got 'rank'"),
        ({"r": 0}, "r must be at least 1, got 0"),
    ],
)
def test_wrong_values_are_refused_at_once(arguments, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        DropLoRA(**arguments)


def test_making_one_draws_nothing() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    DropLoRA(mask="step")
    assert torch.equal(torch.rand(1), expected)
