"""Loading a base model, with an answer in one sentence where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from lightning_peft.errors import UserError
from lightning_peft.models.checking import (
    BaseSource,
    check_causal,
    check_model,
    first_sentence,
    read_config,
)
from lightning_peft.models.quantization import keep_exact, quantized

_HEADS = ["score", "classifier", "pooler"]  # never quantized, since they train in full


# What is raised where a base's files are missing, of another program, cut off or damaged.
_BROKEN = (OSError, ValueError, UnpicklingError, SafetensorError, EOFError)


def load_causal_lm(source: BaseSource) -> Any:
    """Load a causal language model by ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If the model cannot be loaded from there, or is no causal language model.
    """
    from transformers import AutoModelForCausalLM

    check_model(source)
    check_causal(source.name)
    return _from_pretrained(AutoModelForCausalLM, source).train()


def load_classifier(
    source: BaseSource, labels: Sequence[str] | None = None, regression: bool = False
) -> tuple[Any, list[str]]:
    """Load a model with a classification head by ``AutoModelForSequenceClassification``.

    A head that the model brings is kept where its number of outputs fits.

    Args:
        source: Of the model; quantization leaves the head as it is.
        labels: Names of the classes; None leaves the number of outputs to the model.
        regression: One output, a score.

    Returns:
        The model, in training mode, and the full names of the modules that make its head: whatever
        stands beside the base model, and a pooler that was not saved with it.

    Raises:
        UserError: If the model cannot be loaded from there, has no form that classifies, or lacks
            weights of the base model.
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoModelForSequenceClassification,
    )

    check_model(source)
    config = read_config(source.name)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model.model_name_or_path: transformers has no model for sequence classification of "
            f"the type {config.model_type} of {source.name}."
        )
    _set_labels(config, ["score"] if regression else labels, regression)
    with _quiet_loading():
        model, report = _from_pretrained(
            AutoModelForSequenceClassification,
            source,
            exact=_HEADS,
            config=config,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return model.train(), _head_of(model, source.name, fresh)


def _from_pretrained(
    kind: Any, source: BaseSource, exact: list[str] | None = None, **options: Any
) -> Any:
    """What ``kind.from_pretrained`` gives, with an answer in one sentence where it fails.

    Args:
        kind: A class of transformers.
        source: Of the model.
        exact: Names of modules that are not quantized; the output layer when None.
        options: More arguments of ``from_pretrained``.
    """
    extra = quantized(source.quantization, _compute_dtype(source), source.device, exact)
    if source.attn_implementation is not None:
        extra["attn_implementation"] = source.attn_implementation
    try:
        # Code that lies beside a model is never run, nor is anybody asked whether it may be.
        extra["trust_remote_code"] = False
        loaded = kind.from_pretrained(source.name, dtype=source.dtype, **extra, **options)
    except _BROKEN as error:
        reason = first_sentence(error).rstrip(".")
        if isinstance(error, UnpicklingError):
            reason = "its weights are damaged, or hold code, which is not run"
        raise UserError(
            f"model.model_name_or_path: {source.name} cannot be loaded: {reason}."
        ) from error
    keep_exact(loaded[0] if isinstance(loaded, tuple) else loaded)
    return loaded


def _compute_dtype(source: BaseSource) -> torch.dtype:
    """The dtype in which a base's weights are loaded, where they are not quantized."""
    if source.dtype != "auto":
        return getattr(torch, source.dtype)
    saved = read_config(source.name).dtype
    return torch.float32 if saved is None else saved


def _set_labels(config: Any, labels: Sequence[str] | None, regression: bool) -> None:
    config.use_cache = False
    if labels is None:
        return
    own = any(kind.endswith("ForSequenceClassification") for kind in config.architectures or ())
    if not own or config.num_labels != len(labels):
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: i for i, label in enumerate(labels)}
    config.problem_type = "regression" if regression else "single_label_classification"


def _head_of(model: Any, name: str, fresh: set[str]) -> list[str]:
    """The modules of a classification head, once it is sure that nothing else began at random."""
    beside = {n: m for n, m in model.named_children() if n != model.base_model_prefix}
    head = [n for n, module in beside.items() if any(True for _ in module.parameters())]
    rest = [key for key in sorted(fresh) if key.split(".")[0] not in head]
    poolers = {key[: key.index("pooler") + len("pooler")] for key in rest if "pooler" in key}
    lost = [key for key in rest if "pooler" not in key]
    if lost:
        raise UserError(
            f"model.model_name_or_path: {name} lacks weights of {type(model).__name__}: {lost[0]} "
            f"({len(lost)} in all)."
        )
    return [*head, *sorted(poolers)]


@contextmanager
def _quiet_loading() -> Iterator[None]:
    """Silence transformers' table of weights that were not there, which the report tells too."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
