from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_peft.datamodules.loading.examples import Encoder, encode_cached


def test_a_cached_text_is_not_encoded_again(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, example: Any
) -> None:
    examples = [example("ab", "c", i) for i in range(3)]
    first = encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path).to_dict()
    encode: Callable[..., Any] = Encoder.encode
    calls = []
    monkeypatch.setattr(Encoder, "encode", lambda *a: calls.append(1) or encode(*a))
    assert encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path).to_dict() == first
    assert calls == []


def test_the_cache_knows_texts_limit_and_tokenizer_apart(
    tokenizer: Any, make_tokenizer: Any, tmp_path: Path, example: Any
) -> None:
    base = [example("ab", "c")]
    variants = [
        (tokenizer, 64, base, True),
        (tokenizer, 64, base, False),
        (tokenizer, 3, base, True),
        (tokenizer, 64, [example("a", "bc")], True),
        (make_tokenizer(merges=(("a", "b"),)), 64, base, True),
        (make_tokenizer(adds_bos=True), 64, base, True),
    ]
    seen = []
    for tok, limit, examples, with_response in variants * 2:
        table = encode_cached(Encoder(tok, limit), examples, with_response, tmp_path)
        seen.append((table["tokens"][0], table["prompt_length"][0]))
    assert seen[:6] == seen[6:]
    assert len({str(s) for s in seen}) == 6
    assert len(list(tmp_path.glob("*.arrow"))) == 6


def test_a_call_that_pads_does_not_change_the_fingerprint(make_tokenizer: Any) -> None:
    fresh = make_tokenizer()
    before = Encoder(fresh, 64).fingerprint()
    fresh(["a", "bb"], padding=True, truncation=True, max_length=4)
    assert Encoder(fresh, 64).fingerprint() == before


def test_a_file_that_was_cut_off_is_made_again(
    tokenizer: Any, tmp_path: Path, example: Any
) -> None:
    examples = [example(f"ab {i}", "c", i) for i in range(2500)]
    first = encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path).to_dict()
    (file,) = tmp_path.glob("*.arrow")
    whole = file.read_bytes()
    # Also where only the mark of the end is missing, or whole batches of rows.
    for end in (0, 10, len(whole) // 2, len(whole) - 8):
        file.write_bytes(whole[:end])
        again = encode_cached(Encoder(tokenizer, 64), examples, True, tmp_path)
        assert again.to_dict() == first


def test_a_folder_that_cannot_be_written_is_named(
    tokenizer: Any, tmp_path: Path, example: Any, refused: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    long = "x" * 300
    for folder, reason in (
        ("file", "File exists"),
        ("file/folder", "Not a directory"),
        (long, "File name too long"),
    ):
        with refused(
            f"The cache folder {tmp_path / folder} cannot be written ({reason}); data.cache_dir "
            "names another."
        ):
            encode_cached(Encoder(tokenizer, 64), [example("a", "b")], True, tmp_path / folder)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("datasets.Dataset.map", refuse)
    with refused(f"The cache folder {tmp_path} cannot be written (Read-only file system); data.…"):
        encode_cached(Encoder(tokenizer, 64), [example("a", "b")], True, tmp_path)
