from __future__ import annotations

import pytest

from lightning_peft.datamodules.arithmetic.module import ArithmeticDataModule
from lightning_peft.datamodules.commonsense import CommonsenseDataModule
from lightning_peft.datamodules.protocols import PairProtocol, Protocol, indented

QUESTION = "Is water wet?\n\nAnswer format: true/false"


def test_llm_adapters_is_pinned() -> None:
    protocol = CommonsenseDataModule.protocols["llm_adapters"]
    assert protocol.prompt(QUESTION) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request. \n"
        "\n"
        "### Instruction:\n"
        "Is water wet?\n"
        "\n"
        "Answer format: true/false\n"
        "\n"
        "### Response:\n"
    )
    assert (protocol.name, protocol.loss_on, protocol.max_length) == ("llm_adapters", "all", 256)
    assert (protocol.num_beams, protocol.max_new_tokens, protocol.temperature) == (4, 32, 0.0)


def test_llm_adapters_indented_is_the_published_evaluators() -> None:
    protocol = CommonsenseDataModule.protocols["llm_adapters_indented"]
    space = " " * 16
    assert protocol.prompt(QUESTION) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request. \n"
        "\n"
        f"{space}### Instruction:\n"
        f"{space}Is water wet?\n"
        "\n"
        "Answer format: true/false\n"
        "\n"
        f"{space}### Response:\n"
        f"{space}"
    )
    assert protocol.name == "llm_adapters_indented"


def test_droplora_is_pinned() -> None:
    protocol = CommonsenseDataModule.protocols["droplora"]
    assert protocol.prompt(QUESTION) == (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n"
        "\n"
        "### Instruction:\n"
        "Is water wet?\n"
        "\n"
        "Answer format: true/false\n"
        "\n"
        "### Response:\n"
    )
    assert (protocol.name, protocol.loss_on) == ("droplora", "response")
    assert (protocol.num_beams, protocol.max_new_tokens, protocol.temperature) == (1, 2048, 0.0)


def test_arithmetic_is_pinned() -> None:
    protocol = ArithmeticDataModule.protocols["arithmetic-ours"]
    assert protocol.prompt("042-917=") == "042-917="
    assert (protocol.loss_on, protocol.num_beams) == ("response", 1)


def test_an_instruction_may_hold_braces() -> None:
    protocol = Protocol("p", "Q: {instruction} A:", "response", 8, 8)
    assert protocol.prompt("{x} {} {instruction}") == "Q: {x} {} {instruction} A:"


def test_a_template_without_its_place_is_refused() -> None:
    protocol = Protocol("p", "Q: {question}", "response", 8, 8)
    with pytest.raises(
        ValueError, match=r"^The template of the protocol 'p' has no place for \{ins"
    ):
        protocol.prompt("x")


def test_indented_keeps_empty_lines_empty() -> None:
    assert indented("a\n\nb", 2) == "a\n\n  b"
    assert indented("a\n", 2) == "a\n  "


def test_a_protocol_is_said_in_one_line() -> None:
    beams = CommonsenseDataModule.protocols["llm_adapters"]
    assert str(beams) == (
        "llm_adapters: loss on the whole text, 256 tokens; answers by 4 beams, at most 32 tokens; "
        "the first of the task's labels"
    )
    sampled = Protocol("p", "{instruction}", "response", 8, 9, temperature=0.7, stop=("x", "y"))
    assert str(sampled) == (
        "p: loss on the response, 8 tokens; answers sampled at 0.7, at most 9 tokens, 2 stop "
        "texts; the whole output"
    )
    assert str(PairProtocol("glue", None, 64)) == "glue: the tokenizer's own encoding, 64 tokens"
    assert str(PairProtocol("glue-ours", "{first}", 8)) == "glue-ours: '{first}', 8 tokens"
