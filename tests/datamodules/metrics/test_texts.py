"""BLEU and ROUGE-L against sacrebleu and rouge_score."""

from __future__ import annotations

import random
import socket
from typing import Any

import pytest

from lightning_peft.datamodules.metrics.texts import bleu, rouge_l

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

WORDS = [
    *("the", "a", "cat", "Cat", "sat", "on", "mat,", "3.5", "and-so", "&amp;", "it's"),
    *("#Person1#:", "é", "naïve", "x-", "1,000", "(no)", "...", ""),
]
PAIRS = [
    (["the cat sat on the mat"], [["the cat sat on the mat", "a cat was there"]]),
    # Equally near references: four and six words for five.
    (["a b c d e"], [["a b c d e f", "a b c d"]]),
    (["a b c d e"], [["a b c d", "a b c d e f"]]),
    # No 4-gram, no 3-gram matches.
    (["the cat is out there"], [["the cat sat on a mat"]]),
    (["one two", "three"], [["one two three"], ["three", "four"]]),
    (["nothing alike"], [["other words here now"]]),
    (["", "a b c d e"], [["a b", "c"], ["a b c d e"]]),
    ([""], [["a"]]),
    (["ends in a break-\n\n"], [["ends in a break-", "ends in\na break"]]),
    (["&quot;Quoted&quot; <skipped>text, 3.5% of 1,000"], [['"Quoted" text , 3.5 % of 1,000']]),
]


def random_corpus(seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def text() -> str:
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(0, 12)))

    return [text() for _ in range(20)], [
        [text() for _ in range(rng.randint(1, 5))] for _ in range(20)
    ]


CORPORA = [*PAIRS, *map(random_corpus, range(5))]


@pytest.mark.parametrize(("outputs", "references"), CORPORA)
def test_bleu_is_sacrebleus(outputs: list[str], references: list[list[str]]) -> None:
    most = max(map(len, references))
    streams = [[refs[i] if i < len(refs) else None for refs in references] for i in range(most)]
    expected = sacrebleu.corpus_bleu(outputs, streams).score
    assert bleu(outputs, references) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("outputs", "references"), CORPORA)
def test_rouge_l_is_rouge_scores(outputs: list[str], references: list[list[str]]) -> None:
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    for output, refs in zip(outputs, references, strict=True):
        scores = [scorer.score(ref, output)["rougeL"].fmeasure for ref in refs]
        best = scorer.score_multi(refs, output)["rougeL"].fmeasure
        assert rouge_l(output, refs) == pytest.approx(best, abs=1e-6)
        assert rouge_l(output, refs, "avg") == pytest.approx(sum(scores) / len(refs), abs=1e-6)


def test_a_reference_against_itself_is_perfect() -> None:
    texts = ["There is a place, Alimentum, in the city.", "#Person1# asks for 3.5 pounds."]
    others = ["Something else is said here.", "Nobody asks."]
    pairs = [list(pair) for pair in zip(others, texts, strict=True)]
    assert bleu(texts, pairs) == pytest.approx(100.0, abs=1e-9)
    assert [rouge_l(t, p) for t, p in zip(texts, pairs, strict=True)] == [1.0, 1.0]


def test_known_values() -> None:
    # One word of five is wrong: 4/5, 3/4, 2/3, 1/2 of the n-grams.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu(["a b c d x"], [["a b c d e"]]) == pytest.approx(expected, abs=1e-9)
    # The longest common subsequence of "a c e" and "a b c d e" is 3: precision 1, recall 3/5.
    assert rouge_l("a c e", ["a b c d e", "z"]) == pytest.approx(0.75, abs=1e-6)
    assert rouge_l("a c e", ["a b c d e", "z"], "avg") == pytest.approx(0.375, abs=1e-6)


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert bleu(["a b c d"], [["a b c d"]]) == pytest.approx(100.0)
    assert rouge_l("a b", ["a b"]) == 1.0
