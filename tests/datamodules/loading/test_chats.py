from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.instruction.module import InstructionDataModule
from lightning_peft.datamodules.loading.chats import ChatTemplate, read_chat
from lightning_peft.errors import UserError

# As Llama 2's: BOS and EOS around each pair, the system's message within the first question.
PAIRED = (
    "{% set system = '' %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set system = m.content %}{{ '<<' + m.content + '>>' }}"
    "{% elif m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
CHAT = [
    {"role": "system", "content": "Be é."},
    {"role": "user", "content": "Hi {input}"},
    {"role": "assistant", "content": "Ho"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So\nlong"},
]


@pytest.fixture
def build(build_data: Any) -> Any:
    def build_module(
        data_dir: Path | str, stage: str | None = "fit", **kwargs: Any
    ) -> InstructionDataModule:
        options = {"group_by_length": False, **kwargs}
        return build_data(InstructionDataModule, data_dir, stage=stage, **options)

    return build_module


def test_a_chat_template_token_for_token(
    build: Any, chatml: Any, tmp_path: Path, only_row: Any, joined_row: Any, write_records: Any
) -> None:
    def ids(text: str) -> list[int]:
        return chatml(text, add_special_tokens=False)["input_ids"]

    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT}])
    data = build(path, tokenizer=chatml, chat_template=True)
    first = (
        "<|im_start|>system\nBe é.<|im_end|>\n<|im_start|>user\nHi {input}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    second = "\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    pieces = [
        (ids(first), False),
        (ids("Ho<|im_end|>"), True),
        (ids(second), False),
        (ids("So\nlong<|im_end|>"), True),
    ]
    row = only_row(data)
    assert row == joined_row(pieces)
    whole = chatml.apply_chat_template(CHAT, tokenize=False)
    assert chatml.decode(row[0]) == whole.rstrip("\n")
    assert (data.protocol.name, data.protocol.stop) == ("chat template", ("<|im_end|>",))


def test_a_chat_template_with_bos_and_eos(
    build: Any,
    make_tokenizer: Any,
    tmp_path: Path,
    only_row: Any,
    joined_row: Any,
    write_records: Any,
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    tokenizer.chat_template = PAIRED

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT[1:]}])
    data = build(path, tokenizer=tokenizer, chat_template=True)
    pieces = [
        (ids("<s>[INST] Hi {input} [/INST]"), False),
        (ids(" Ho </s>"), True),
        (ids("<s>[INST] Bye [/INST]"), False),
        (ids(" So\nlong </s>"), True),
    ]
    assert only_row(data) == joined_row(pieces)
    assert data.protocol.stop == ()


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Add", "input": "1", "output": "2"},
        {"prompt": "Add\n\n1", "completion": "2"},
    ],
)
def test_other_forms_by_the_chat_template(
    record: dict[str, str],
    build: Any,
    chatml: Any,
    tmp_path: Path,
    only_row: Any,
    write_records: Any,
) -> None:
    data = build(
        write_records(tmp_path / "a.jsonl", [record]), tokenizer=chatml, chat_template=True
    )
    ids, labels = only_row(data)
    text = "<|im_start|>user\nAdd\n\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>"
    assert chatml.decode(ids) == text
    assert chatml.decode([token for token in labels if token >= 0]) == "2<|im_end|>"


GOOD = {"instruction": "a", "output": "b"}


def test_a_tokenizer_without_chat_template_is_named(
    build: Any, tmp_path: Path, write_records: Any
) -> None:
    path = write_records(tmp_path / "own.jsonl", [GOOD])
    with pytest.raises(
        ValueError,
        match=r"^data.chat_template is true, but the tokenizer '.*' has none; take an instruction-",
    ):
        build(path, chat_template=True)


def test_a_chat_template_that_changes_earlier_turns_is_refused(
    build: Any, chatml: Any, tmp_path: Path, write_records: Any
) -> None:
    chatml.chat_template = chatml.chat_template.replace(
        "{{ m.role }}", "{{ m.role if loop.last else '?' }}"
    )
    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT}])
    with pytest.raises(ValueError, match=r"^(A conversation|Record 1 of .*) cannot be trained on"):
        build(path, tokenizer=chatml, chat_template=True)


def test_what_a_chat_template_refuses_is_said(
    build: Any, chatml: Any, tmp_path: Path, write_records: Any
) -> None:
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    chatml.chat_template = refusal + chatml.chat_template
    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT}])
    with pytest.raises(
        ValueError, match=rf"^Record 1 of {path} is refused by the chat template: no system\.$"
    ):
        build(path, tokenizer=chatml, chat_template=True)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        (f"{'{% for i in range(99999) %}' * 3}{'{% endfor %}' * 3}", "it ran for more than 0.2 s"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_a_chat_template_that_fails_or_does_not_end_is_named(
    template: str,
    reason: str,
    build: Any,
    chatml: Any,
    tmp_path: Path,
    write_records: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_peft.datamodules.loading.chats.SECONDS", 0.2)
    chatml.chat_template, chatml.name_or_path = template, "strangers/model"
    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT}])
    with pytest.raises(UserError) as error:
        build(path, tokenizer=chatml, chat_template=True)
    sentence = "A conversation cannot be written by the chat template of 'strangers/model' ("
    assert str(error.value).startswith(f"{sentence}{reason}")


def test_a_chat_template_reaches_no_code(
    build: Any, chatml: Any, tmp_path: Path, write_records: Any
) -> None:
    made = tmp_path / "made"
    reach = "cycler.__init__.__globals__.os"
    path = write_records(tmp_path / "own.jsonl", [{"messages": CHAT}])
    for template in (
        f"{{{{ {reach}.mkdir('{made}') }}}}",
        f"{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ {reach}.mkdir('{made}') }}}}",
        "{% include '/etc/passwd' %}",
        "{{ messages.append(1) }}",
    ):
        chatml.chat_template = template
        with pytest.raises(UserError, match="^A conversation (is refused|cannot be written) by t"):
            build(path, tokenizer=chatml, chat_template=True)
    assert not made.exists()


def test_an_alarm_of_somebody_else_goes_on(chatml: Any) -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    earlier = signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        begun = time.monotonic()
        while not rang and time.monotonic() - begun < 5:
            ChatTemplate(chatml)
        assert rang
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *earlier)


def test_a_message_that_is_no_text_is_named() -> None:
    for value, found in ((5, "the number 5"), (["a"], "a list"), (True, "true")):
        message = {"role": "user", "content": value}
        sentence = f"^Record 1 has a message that has no text in 'content' but {found}; "
        with pytest.raises(UserError, match=sentence):
            read_chat([message], "Record 1")
    for messages in ("", "abc", 5, None, {"role": "user"}):
        with pytest.raises(UserError, match=r"^Record 1 holds no list of messages\.$"):
            read_chat(messages, "Record 1")
