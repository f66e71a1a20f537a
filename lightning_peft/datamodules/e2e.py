"""E2E: descriptions of restaurants from their attributes (arXiv 1706.09254).

Files of https://github.com/tuetschek/e2e-dataset: ``trainset.csv`` (42,061 pairs), ``devset.csv``
(4,672) and ``testset_w_refs.csv`` (4,693), each row with an ``mr`` and one ``ref``; rows with the
same ``mr`` are one test record with several references. The hub's `GEM/e2e_nlg` holds
``meaning_representation``, ``target`` and, outside of training, ``references``; its texts are those
of the cleaned corpus of Dušek et al. (2019), so scores on it are not those on the files.

Protocol ``e2e-ours`` (LoRA-drop evaluates on E2E without saying how it asks), greedy::

    Describe the restaurant in one or two sentences.

    Restaurant:
    {mr}

    Description:
    {ref}

Loss is on the reference and its EOS, 256 tokens in all, at most 128 of them generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.datamodules.references import ReferencesDataModule

HUB = "GEM/e2e_nlg"


class E2EDataModule(ReferencesDataModule):
    """Table to text on E2E, scored by BLEU and ROUGE-L.

    Args:
        **kwargs: The arguments of `ReferencesDataModule`.
    """

    task = "e2e"
    wanted = {"source": "'mr'", "reference": "'ref'"}
    splits = {
        "train": Source(("trainset*.csv", "train*.csv", "train*.parquet"), HUB, "train"),
        "dev": Source(("devset*.csv", "dev*.csv", "validation*.parquet"), HUB, "validation"),
        "test": Source(("testset_w_refs*.csv", "test*.csv", "test*.parquet"), HUB, "test"),
    }
    protocols = {
        "e2e-ours": Protocol(
            "e2e-ours",
            "Describe the restaurant in one or two sentences.\n\n"
            "Restaurant:\n{instruction}\n\nDescription:\n",
            loss_on="response",
            max_length=256,
            max_new_tokens=128,
        )
    }

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the meaning representation, as it is written."""
        return record.get("mr") or record.get("MR") or record.get("meaning_representation")

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the row's reference, or all that the hub's record holds."""
        return record.get("references") or [record.get("ref") or record.get("target")]
