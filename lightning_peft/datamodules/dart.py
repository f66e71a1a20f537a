"""DART: sentences from sets of triples (arXiv 2007.02871).

Files of https://github.com/Yale-LILY/dart, ``dart-v1.1.1-full-{train,dev,test}.json``: arrays of
records with a ``tripleset`` (subject, relation, object) and ``annotations``, each a ``source`` and
a ``text``, all of which are references. The hub's `GEM/dart` holds ``tripleset``, ``target`` and,
outside of training, ``references``. Records of the same triples are one.

Protocol ``dart-ours``; one triple a line, as it is published, with its ``[TABLECONTEXT]`` and
``[TITLE]``::

    Describe the facts in one or two sentences.

    Facts:
    {subject} | {relation} | {object}

    Description:
    {text}

512 tokens in all; what else it says stands in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_peft.datamodules.loading.fields import (
    described,
    is_list,
    no_list,
    text_in,
    texts_in,
)
from lightning_peft.datamodules.references import (
    ReferencesDataModule,
    our_protocol,
    three_splits,
)
from lightning_peft.errors import UserError


class DartDataModule(ReferencesDataModule):
    """Triples to text on DART, scored by BLEU and ROUGE-L.

    Args:
        **kwargs: The arguments of `ReferencesDataModule`.
    """

    task = "dart"
    wanted = {"source": "'tripleset'", "reference": "text in 'annotations'"}
    splits = three_splits(
        "GEM/dart",
        train=("dart*train*.json", "train*.json", "train*.parquet"),
        dev=("dart*dev*.json", "dev*.json", "validation*.parquet"),
        test=("dart*test*.json", "test*.json", "test*.parquet"),
    )
    protocols = our_protocol(
        task,
        "Describe the facts in one or two sentences.\n\nFacts:\n{instruction}\n\nDescription:\n",
        max_length=512,
    )

    def source_of(self, record: Mapping[str, Any]) -> str | None:
        """Return the triples, one in a line."""
        triples = record.get("tripleset")
        if triples is None:
            return None
        if not is_list(triples):
            raise UserError(no_list("tripleset", triples, "triples"))
        return "\n".join(" | ".join(texts_in(triple, "tripleset", "")) for triple in triples)

    def references_of(self, record: Mapping[str, Any]) -> Sequence[str | None]:
        """Return the texts of all annotations, or all that the hub's record holds."""
        annotations = record.get("annotations")
        if annotations is not None and not is_list(annotations):
            raise UserError(no_list("annotations", annotations, "annotations"))
        texts = [text_in(_object(a), "text", "") for a in annotations or ()]
        if texts or not record.get("references"):
            return texts or [record.get("target")]
        return texts_in(record["references"], "references", "")


def _object(annotation: Any) -> Mapping[str, Any]:
    if not isinstance(annotation, Mapping):
        raise UserError(
            f"has no object with a 'text' in 'annotations' but {described(annotation)}; give one."
        )
    return annotation
