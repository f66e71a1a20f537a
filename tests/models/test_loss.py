"""The loss in chunks against logits and cross-entropy, values and gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    MBartConfig,
    OPTConfig,
    WhisperConfig,
)

from lightning_peft.errors import UserError
from lightning_peft.models.loss import (
    TargetLoss,
    chunked_loss,
    plain_head,
    row_losses,
    target_logits,
    token_loss,
    whole_batch,
)
from lightning_peft.strategies import LoRA

pytestmark = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy"
)


@pytest.mark.parametrize("rows", [1, 255, 700])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_chunks_give_the_loss_and_gradient_of_all_logits(
    monkeypatch, rows, bias, dtype, tolerance
) -> None:
    monkeypatch.setattr("lightning_peft.models.loss._LOGITS", 0)
    torch.manual_seed(0)
    head = nn.Linear(16, 50, bias=bias, dtype=dtype).requires_grad_(False)
    hidden = torch.randn(rows, 16, dtype=dtype, requires_grad=True)
    targets = torch.randint(50, (rows,))
    ours = chunked_loss(hidden, head, targets)
    (ours / rows).backward()
    grad, hidden.grad = hidden.grad, None
    theirs, count = token_loss(head(hidden).float()[None], targets[None])
    (theirs / rows).backward()
    assert count == rows
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=0)
    scale = float(hidden.grad.abs().max())
    torch.testing.assert_close(grad, hidden.grad, rtol=tolerance, atol=tolerance * scale)


def test_no_target_gives_a_loss_of_zero_that_has_a_gradient() -> None:
    hidden = torch.randn(0, 16, requires_grad=True)
    loss = chunked_loss(hidden, nn.Linear(16, 50), torch.zeros(0, dtype=torch.long))
    loss.backward()
    assert loss == 0


def adapted(model: nn.Module) -> nn.Module:
    LoRA().attach(model)
    for layer in model.modules():
        if hasattr(layer, "lora_B"):
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


def batch_of(random_batch) -> dict:
    batch = random_batch(1)
    labels = batch["input_ids"].clone()
    labels[:, ::3] = -100
    return {**batch, "labels": labels}


def gradients(loss: TargetLoss, model: nn.Module, batch: dict) -> tuple:
    model.zero_grad()
    total, count = loss(model, batch)
    (total / count).backward()
    return total, count, [p.grad for p in model.parameters() if p.requires_grad]


def test_a_step_is_the_same_with_and_without_logits(tiny_llama, random_batch) -> None:
    torch.manual_seed(0)
    loss, model, batch = TargetLoss(), adapted(tiny_llama()), batch_of(random_batch)
    total, count, grads = gradients(loss, model, batch)
    assert loss.without_logits is True
    loss.without_logits = False
    expected, expected_count, expected_grads = gradients(loss, model, batch)
    assert count == expected_count > 0
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture
def capped(tiny_llama) -> nn.Module:
    """A model that does more to its logits than its output layer."""
    model = tiny_llama()
    plain = type(model).forward

    def forward(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = 2 * torch.tanh(output.logits / 2)
        return output

    model.forward = forward.__get__(model)
    return adapted(model)


def test_logits_that_are_more_than_the_output_layer_are_found_out(capped, random_batch) -> None:
    loss, batch = TargetLoss(), batch_of(random_batch)
    total, _ = loss(capped, batch)
    assert loss.without_logits is False
    torch.testing.assert_close(total, token_loss(*target_logits(capped, batch))[0])


def of(config: Any) -> Any:
    """A small model of a configuration, without dropout, its weights further from one another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 64,
    "decoder_attention_heads": 4,
    "is_decoder": True,
    "is_encoder_decoder": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    ("config", "without_logits"),
    [
        # Their decoder is run past the module that they name as their base.
        (OPTConfig(**OPT, num_attention_heads=4, word_embed_proj_dim=32), True),
        (OPTConfig(**OPT, num_attention_heads=4, word_embed_proj_dim=16), True),
        (BartConfig(**DECODER), True),
        (MBartConfig(**DECODER), True),
        (WhisperConfig(**DECODER), True),
        # They cap or scale their logits.
        (Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0), False),
        (CohereConfig(**SMALL, logit_scale=0.0625), False),
        (GraniteConfig(**SMALL, logits_scaling=8.0), False),
    ],
    ids=["opt", "opt, projected", "bart", "mbart", "whisper", "gemma-2", "cohere", "granite"],
)
def test_any_models_loss_is_that_of_its_own_logits(config, without_logits, random_batch) -> None:
    model, loss, batch = of(config), TargetLoss(), batch_of(random_batch)
    total, count = loss(model, batch)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False
    ).logits
    expected, expected_count = token_loss(logits[:, :-1].float(), batch["labels"][:, 1:])
    assert loss.without_logits is without_logits
    assert count == expected_count
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)


def test_a_cap_is_found_though_logits_begin_small(random_batch) -> None:
    """Gemma-2's cap of 30 takes a tenth of a logit of 17, and nothing that shows of one of 0.01."""
    model, loss = of(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=30.0)), TargetLoss()
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
    largest = 0.0
    batch = batch_of(random_batch)  # one, which it learns by heart
    for step in range(200):
        total, count = loss(model, batch)
        if step % 20 == 0:
            logits = model(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits[:, :-1]
            expected, _ = token_loss(logits.float(), batch["labels"][:, 1:])
            torch.testing.assert_close(total, expected, rtol=1e-5, atol=0)
            largest = max(largest, float(logits.detach().abs().max()))
        optimizer.zero_grad()
        (total / count).backward()
        optimizer.step()
    assert largest > 15


def test_a_cap_that_shows_only_later_is_said_to(capped, random_batch) -> None:
    loss, batch = TargetLoss(), batch_of(random_batch)
    head = capped.get_output_embeddings().weight
    kept = head.detach().clone()
    with torch.no_grad():
        head.zero_()
    loss(capped, batch)
    assert loss.without_logits is True  # all logits are zero, capped or not
    with torch.no_grad():
        head.copy_(kept)
    with pytest.warns(UserWarning, match="changes its logits behind the output layer"):
        total, _ = loss(capped, batch)
    torch.testing.assert_close(total, token_loss(*target_logits(capped, batch))[0])


def test_a_run_that_broke_down_tells_nothing_of_its_model(tiny_llama, random_batch) -> None:
    model, loss = tiny_llama(), TargetLoss()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    total, _ = loss(model, batch_of(random_batch))
    assert loss.without_logits is True
    assert total.isnan()


def test_the_output_layer_is_what_it_was_after_a_failure(tiny_llama, random_batch) -> None:
    model = tiny_llama()
    batch = batch_of(random_batch)
    with pytest.raises(IndexError):
        TargetLoss()(model, {**batch, "input_ids": batch["input_ids"] + 10_000})
    assert "forward" not in vars(model.lm_head)


def test_a_batch_without_targets_decides_nothing(capped, random_batch) -> None:
    loss, batch = TargetLoss(), batch_of(random_batch)
    total, count = loss(capped, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    total.backward()
    assert (float(total), int(count), loss.without_logits) == (0.0, 0, None)
    loss(capped, batch)
    assert loss.without_logits is False


def test_only_positions_with_a_target_get_logits(tiny_llama, random_batch) -> None:
    batch = batch_of(random_batch)
    logits, targets = target_logits(tiny_llama(), batch)
    kept = (batch["labels"][:, 1:] != -100).any(0)
    assert logits.shape[:2] == targets.shape == (len(batch["labels"]), int(kept.sum()))
    assert torch.equal(targets, batch["labels"][:, 1:][:, kept])


def test_rows_have_losses_that_add_up(tiny_llama, random_batch) -> None:
    batch, model = batch_of(random_batch), tiny_llama()
    sums, counts = row_losses(model, batch)
    total, count = token_loss(*target_logits(model, batch))
    assert sums.shape == counts.shape == (len(batch["labels"]),)
    assert (sums.sum().item(), int(counts.sum())) == (pytest.approx(total.item()), int(count))
    first = {name: value[:1] for name, value in batch.items()}
    assert row_losses(model, first)[0].item() == pytest.approx(sums[0].item(), rel=1e-5)


def test_an_output_layer_that_is_adapted_or_watched_is_left_to_the_model(
    tiny_llama, random_batch
) -> None:
    model = tiny_llama()
    assert plain_head(model) is model.lm_head
    model.lm_head.register_forward_hook(lambda *args: None)
    assert plain_head(model) is None
    model = tiny_llama()
    model.lm_head.forward = wrapped = functools.partial(nn.Linear.forward, model.lm_head)
    assert plain_head(model) is None
    TargetLoss()(model, batch_of(random_batch))
    assert model.lm_head.forward is wrapped
    model = tiny_llama()
    LoRA(r=2, target_modules=["lm_head"]).attach(model)
    assert plain_head(model) is None


# Batches of anybody's loader.


def test_without_a_mask_every_token_is_attended_to(tiny_llama, random_batch) -> None:
    model, batch = tiny_llama(), random_batch(0, rows=3, length=7)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["labels"] = batch["input_ids"]
    plain = {name: batch[name] for name in ("input_ids", "labels")}
    for found, wanted in (
        (TargetLoss()(model, plain), TargetLoss()(model, batch)),
        (target_logits(model, plain), target_logits(model, batch)),
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert plain.keys() == {"input_ids", "labels"}


def test_without_a_mask_padding_cannot_be_told(tiny_llama) -> None:
    config = tiny_llama().config
    config.pad_token_id = 0
    ids = torch.tensor([[5, 6, 7], [5, 0, 7]])
    assert whole_batch({"input_ids": ids, "labels": ids}, config)["attention_mask"].all()
    for row in ([5, 6, 0], [0, 5, 6]):
        batch = {"input_ids": torch.tensor([row]), "labels": torch.tensor([row])}
        sentence = (
            "^a batch has rows that begin or end in 0, which the model pads with, and no 'att"
        )
        with pytest.raises(UserError, match=sentence):
            whole_batch(batch, config)
        batch["attention_mask"] = torch.ones(1, 3)
        assert whole_batch(batch, config) == batch
        config.pad_token_id = None
        assert whole_batch({**batch, "attention_mask": None}, config)["attention_mask"].all()
        config.pad_token_id = 0


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ([torch.ones(1, 3)], "a batch is a list and no dictionary; a loader has to give input_ids"),
        ({"input_ids": torch.ones(1, 3)}, "a batch has no tensor 'labels', only input_ids; a loa"),
        ({"labels": torch.ones(1, 3), "x": 1}, "a batch has no tensor 'input_ids', only labels, x"),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, "a batch has no tensor 'input_ids', only in"),
        (
            {"input_ids": torch.ones(2, 3), "labels": torch.ones(2)},
            "a batch has input_ids of the shape (2, 3) and labels of (2,); a loader has to give",
        ),
        ({"input_ids": torch.ones(3), "labels": torch.ones(3)}, "a batch has input_ids of the sh"),
    ],
)
def test_what_is_no_batch_is_told(tiny_llama, batch, sentence) -> None:
    model = tiny_llama()
    for read in (TargetLoss(), target_logits):
        with pytest.raises(UserError) as error:
            read(model, batch)
        assert str(error.value).startswith(sentence)
        assert str(error.value).endswith("labels and attention_mask, (batch, tokens) each.")
