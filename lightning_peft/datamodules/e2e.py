"""E2E: descriptions of restaurants from their attributes (arXiv 1706.09254).

Files of https://github.com/tuetschek/e2e-dataset: ``trainset.csv`` (42,061 pairs), ``devset.csv``
(4,672) and ``testset_w_refs.csv`` (4,693), each row with an ``mr`` and one ``ref``; rows with the
same ``mr`` are one test record with several references. The hub's `GEM/e2e_nlg` holds
``meaning_representation``, ``target`` and, outside of training, ``references``; its texts are those
of the cleaned corpus of Dušek et al. (2019), so scores on it are not those on the files.

Protocol ``e2e-ours``::

    Describe the restaurant in one or two sentences.

    Restaurant:
    {mr}

    Description:
    {ref}

256 tokens in all; what else it says stands in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.fields import text_if_any, texts_in
from lightning_peft.datamodules.references import (
    ReferencesDataModule,
    our_protocol,
    three_splits,
)


class E2EDataModule(ReferencesDataModule):
    """Table to text on E2E, scored by BLEU and ROUGE-L.

    Args:
        **kwargs: The arguments of `ReferencesDataModule`.
    """

    task = "e2e"
    wanted = {"source": "'mr'", "reference": "'ref'"}
    splits = three_splits(
        "GEM/e2e_nlg",
        train=("trainset*.csv", "train*.csv", "train*.parquet"),
        dev=("devset*.csv", "dev*.csv", "validation*.parquet"),
        test=("testset_w_refs*.csv", "test*.csv", "test*.parquet"),
    )
    protocols = our_protocol(
        task,
        "Describe the restaurant in one or two sentences.\n\n"
        "Restaurant:\n{instruction}\n\nDescription:\n",
        max_length=256,
    )

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the meaning representation, as it is written."""
        return _first(record, "mr", "MR", "meaning_representation")

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the row's reference, or all that the hub's record holds."""
        references = record.get("references")
        return (
            texts_in(references, "references", "")
            if references
            else [_first(record, "ref", "target")]
        )


def _first(record: Mapping[str, Any], *fields: str) -> str | None:
    """Return the text of the first of some fields that holds one."""
    texts = (text_if_any(record, field, "") for field in fields)
    return next(filter(None, texts), None)
