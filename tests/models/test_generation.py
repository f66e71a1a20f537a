"""Answers do not depend on the company they are generated in; length, stops and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_peft import merge
from lightning_peft.adapters import adapter_layers
from lightning_peft.datamodules import Protocol
from lightning_peft.datamodules.loading.examples import Encoder
from lightning_peft.models.generation import cut_at, generate
from lightning_peft.strategies import DropLoRA

Ask = Callable[[Sequence[str]], dict[str, Any]]
# From 1 to 362 tokens; the sums are answered in full, the others go on to the limit.
PROMPTS = (
    "042+917=",
    "1",
    "Which of these is it, if any? " * 11 + "Answer format: stone/river/crane",
    "123+456=0579 and " * 6,
    "the answer is wolf/lake/stone",
    "999+001=",
)


def protocol(**changes: Any) -> Protocol:
    return Protocol(
        "p", "{instruction}", "response", **{"max_length": 600, "max_new_tokens": 10} | changes
    )


@torch.no_grad()
def greedy(model: Any, encoder: Encoder, prompt: str, limit: int) -> str:
    """The most likely token again and again, by whole forward passes."""
    ids = encoder.texts([prompt])[0]
    start = len(ids)
    while len(ids) < start + limit and ids[-1] != encoder.eos_id:
        ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return encoder.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_answers_take_the_most_likely_token(model: Any, encoder: Encoder, ask: Ask) -> None:
    answers = generate(model, ask(PROMPTS), protocol(), encoder)
    assert answers == [greedy(model, encoder, prompt, 10) for prompt in PROMPTS]
    assert (answers[0], answers[-1]) == ("0959", "1000")
    assert max(map(len, answers)) == 10


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("stop", [(), ("9", "t")])
def test_a_batch_is_answered_as_its_prompts_one_by_one(
    num_beams: int, stop: tuple[str, ...], model: Any, encoder: Encoder, ask: Ask
) -> None:
    how = protocol(num_beams=num_beams, stop=stop)
    batch = ask(PROMPTS)
    assert sorted(batch["attention_mask"].sum(1).tolist())[::5] == [1, 362]
    together = generate(model, batch, how, encoder)
    assert together == [generate(model, ask([p]), how, encoder)[0] for p in PROMPTS]
    assert len(set(together)) > 3


def test_beams_find_what_greedy_does_not(model: Any, encoder: Encoder, ask: Ask) -> None:
    batch = ask(PROMPTS)
    assert generate(model, batch, protocol(num_beams=4), encoder) != generate(
        model, batch, protocol(), encoder
    )


def test_answers_end_before_the_first_stop_text(model: Any, encoder: Encoder, ask: Ask) -> None:
    whole = generate(model, ask(PROMPTS), protocol(), encoder)
    stopped = generate(model, ask(PROMPTS), protocol(stop=("95", "0", "ak")), encoder)
    assert stopped == [cut_at(text, ("95", "0", "ak")) for text in whole]
    assert (stopped[0], stopped[-1]) == ("", "1")
    assert stopped != whole


def test_stop_texts_of_the_prompt_do_not_stop_the_answer(
    model: Any, encoder: Encoder, ask: Ask
) -> None:
    assert generate(model, ask(["042+917="]), protocol(stop=("+", "=")), encoder) == ["0959"]


def test_generation_ends_at_the_limit_or_at_a_stop_text(
    model: Any, encoder: Encoder, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    forward = type(model).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    for how, expected in (
        (protocol(), 5),  # four digits and </s>
        (protocol(stop=("95",)), 3),
        (protocol(max_new_tokens=2), 2),
    ):
        steps.clear()
        generate(model, ask(["042+917="]), how, encoder)
        assert len(steps) == expected


def test_samples_depend_on_the_prompts_alone(model: Any, encoder: Encoder, ask: Ask) -> None:
    hot = protocol(temperature=2.0, max_new_tokens=20)
    samples = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        samples.append(generate(model, ask(PROMPTS[:2]), hot, encoder))
    assert samples[0] == samples[1]
    # The same tokens under other prompts: other draws.
    other = {**ask(PROMPTS[:2]), "prompt": ["a", "b"]}
    assert generate(model, other, hot, encoder) != samples[0]
    # The same prompt twice in a batch: two draws.
    twice = generate(model, ask(["1", "1"]), hot, encoder)
    assert twice[0] != twice[1]


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_leaves_the_random_stream_alone(
    temperature: float, model: Any, encoder: Encoder, ask: Ask
) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    generate(model, ask(PROMPTS[:2]), protocol(temperature=temperature), encoder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("changes", [{}, {"temperature": 2.0}, {"num_beams": 2}])
def test_the_models_own_generation_settings_do_not_count(
    changes: dict[str, Any], model: Any, encoder: Encoder, ask: Ask
) -> None:
    how = protocol(**changes)
    expected = generate(model, ask(PROMPTS[:2]), how, encoder)
    model.generation_config.update(
        do_sample=True, top_k=1, top_p=0.1, temperature=0.1, repetition_penalty=3.0
    )
    assert generate(model, ask(PROMPTS[:2]), how, encoder) == expected


@pytest.mark.parametrize("changes", [{}, {"num_beams": 4}, {"temperature": 1.0}])
def test_a_merged_adapter_answers_alike(
    changes: dict[str, Any], model: Any, encoder: Encoder, ask: Ask
) -> None:
    how = protocol(**changes)
    base = generate(model, ask(PROMPTS), how, encoder)
    torch.manual_seed(0)
    DropLoRA(r=4, p=0.5).attach(model)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.2)
    model.eval()
    adapted = generate(model, ask(PROMPTS), how, encoder)
    assert sum(a != b for a, b in zip(adapted, base, strict=True)) > 2
    merge(model)
    assert not adapter_layers(model)
    assert generate(model, ask(PROMPTS), how, encoder) == adapted


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("", (), ""),
        ("", ("x",), ""),
        ("a b", (), "a b"),
        ("a b", ("c",), "a b"),
        ("a b", ("b",), "a "),
        ("a b a b", ("b",), "a "),
        ("abc", ("c", "b"), "a"),
        ("abc", ("b", "c"), "a"),
        ("abc", ("abcd", "bc"), "a"),
        ("abc", ("a",), ""),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("one\ntwo", ("\n\n",), "one\ntwo"),
    ],
)
def test_a_text_is_cut_before_the_first_stop(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    assert cut_at(text, stop) == expected
