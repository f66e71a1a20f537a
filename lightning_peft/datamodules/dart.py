"""DART: sentences from sets of triples (arXiv 2007.02871).

Files of https://github.com/Yale-LILY/dart, ``dart-v1.1.1-full-{train,dev,test}.json``: arrays of
records with a ``tripleset`` (subject, relation, object) and ``annotations``, each a ``source`` and
a ``text``, all of which are references. The hub's `GEM/dart` holds ``tripleset``, ``target`` and,
outside of training, ``references``. Records of the same triples are one.

Protocol ``dart-ours`` (LoRA-drop evaluates on DART without saying how it asks), greedy; one triple
a line, as it is published, with its ``[TABLECONTEXT]`` and ``[TITLE]``::

    Describe the facts in one or two sentences.

    Facts:
    {subject} | {relation} | {object}

    Description:
    {text}

Loss is on the text and its EOS, 512 tokens in all, at most 128 of them generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.records import Source
from lightning_peft.datamodules.protocols import Protocol
from lightning_peft.datamodules.references import ReferencesDataModule

HUB = "GEM/dart"


class DartDataModule(ReferencesDataModule):
    """Triples to text on DART, scored by BLEU and ROUGE-L.

    Args:
        **kwargs: The arguments of `ReferencesDataModule`.
    """

    task = "dart"
    wanted = {"source": "'tripleset'", "reference": "text in 'annotations'"}
    splits = {
        "train": Source(("dart*train*.json", "train*.json", "train*.parquet"), HUB, "train"),
        "dev": Source(("dart*dev*.json", "dev*.json", "validation*.parquet"), HUB, "validation"),
        "test": Source(("dart*test*.json", "test*.json", "test*.parquet"), HUB, "test"),
    }
    protocols = {
        "dart-ours": Protocol(
            "dart-ours",
            "Describe the facts in one or two sentences.\n\n"
            "Facts:\n{instruction}\n\nDescription:\n",
            loss_on="response",
            max_length=512,
            max_new_tokens=128,
        )
    }

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the triples, one in a line."""
        return "\n".join(" | ".join(triple) for triple in record.get("tripleset") or ())

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the texts of all annotations, or all that the hub's record holds."""
        annotations = [annotation["text"] for annotation in record.get("annotations") or ()]
        return annotations or record.get("references") or [record.get("target")]
