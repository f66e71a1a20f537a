"""BLEU and ROUGE-L of texts that have several references, over torchmetrics; no network is needed.

BLEU is sacrebleu's ``corpus_bleu`` as it comes (``13a`` tokens, case kept, 4-grams, clipped by the
most of any reference), from 0 to 100. `SacreBLEUScore` counts; two of sacrebleu's rules, which it
has not, are added here: of references of equally near lengths the shorter one counts, and an order
of n-grams without a match is smoothed (``exp``), where torchmetrics gives 0 for the corpus. The E2E
challenge's own script tokenizes otherwise, so its BLEU is not this one.

ROUGE-L is the f-measure of ``rouge_score``'s ``rougeL`` without its stemmer, from 0 to 1, the mean
over records. Of several references the best one counts (``accumulate="best"``, what
``rouge_score``'s ``score_multi`` does); ``"avg"`` takes their mean. Its keys with a stemmer and
``rougeLsum`` would need nltk, and the latter a download; neither is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torchmetrics.functional.text import rouge_score
from torchmetrics.text import SacreBLEUScore


def bleu(outputs: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Compute corpus BLEU, equal to ``sacrebleu.corpus_bleu``.

    Args:
        outputs: One text for each record.
        references: Its references, of which records may have different numbers.

    Returns:
        From 0 to 100.
    """
    metric = SacreBLEUScore(tokenize="13a")

    def length(text: str) -> int:
        return len(metric.tokenizer(text))

    # torchmetrics takes the first of equally near references; so the shorter ones come first.
    ordered = [sorted((text.rstrip() for text in texts), key=length) for texts in references]
    metric.update([text.rstrip() for text in outputs], ordered)
    matches, totals = metric.numerator.tolist(), metric.denominator.tolist()  # type: ignore[operator, union-attr]
    return _score(matches, totals, float(metric.preds_len), float(metric.target_len))  # type: ignore[arg-type]


def _score(matches: list[float], totals: list[float], written: float, wanted: float) -> float:
    """Brevity penalty times the geometric mean of the precisions of each order, in percent."""
    if not any(matches) or not all(totals):
        return 0.0
    logs, smoothing = [], 1.0
    for match, total in zip(matches, totals, strict=True):
        if not match:  # each order without a match counts half of the one before
            smoothing *= 2
        logs.append(math.log((match or 1 / smoothing) / total))
    brevity = min(0.0, 1 - wanted / written)
    return 100 * math.exp(brevity + sum(logs) / len(logs))


def rouge_l(
    output: str, references: Sequence[str], accumulate: Literal["best", "avg"] = "best"
) -> float:
    """Compute one record's ROUGE-L f-measure, equal to that of ``rouge_score`` without stemming.

    Args:
        output: The text.
        references: Its references.
        accumulate: ``best`` takes the best of the references, ``avg`` their mean.

    Returns:
        From 0 to 1.
    """
    scores = rouge_score([output], [list(references)], accumulate, rouge_keys="rougeL")
    return scores["rougeL_fmeasure"].item()
