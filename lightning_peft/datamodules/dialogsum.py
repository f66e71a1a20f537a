"""DialogSum: summaries of dialogues (https://aclanthology.org/2021.findings-acl.449).

Files of https://github.com/cylnlp/dialogsum, ``dialogsum.{train,dev,test}.jsonl``: ``dialogue`` and
``summary``, or in the test file ``summary1`` to ``summary3``. The hub's `knkarthick/dialogsum` has
``dialogue`` and ``summary`` throughout, so that a dialogue of its test set stands in three rows;
rows of the same dialogue are one record here.

Protocol ``dialogsum-ours``::

    Summarize the dialogue.

    {dialogue}

    Summary:
    {summary}

1024 tokens in all; what else it says stands in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.fields import text_if_any
from lightning_peft.datamodules.references import (
    ReferencesDataModule,
    our_protocol,
    three_splits,
)


class DialogSumDataModule(ReferencesDataModule):
    """Summaries on DialogSum, scored by BLEU and ROUGE-L.

    Args:
        **kwargs: The arguments of `ReferencesDataModule`.
    """

    task = "dialogsum"
    wanted = {"source": "'dialogue'", "reference": "'summary' (or summary1 to summary3)"}
    splits = three_splits(
        "knkarthick/dialogsum",
        train=("*train*.jsonl", "train*.csv"),
        dev=("*dev*.jsonl", "validation*.csv"),
        # Beside it the repository has a hidden test set, without summaries.
        test=("dialogsum.test.jsonl", "test*.jsonl", "test*.csv"),
    )
    protocols = our_protocol(
        task,
        "Summarize the dialogue.\n\n{instruction}\n\nSummary:\n",
        max_length=1024,
    )

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the dialogue."""
        return text_if_any(record, "dialogue", "")

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the summary, or summaries."""
        return [text_if_any(record, f"summary{i}", "") for i in ("", 1, 2, 3)]
