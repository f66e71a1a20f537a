"""Loading a base model, with an answer in one sentence where that fails."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from lightning_peft.errors import UserError
from lightning_peft.models.quantization import check_quantization, keep_exact, quantized

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEADS = ["score", "classifier", "pooler"]  # never quantized, since they train in full


# What is raised where a base's files are missing, of another program, cut off or damaged.
_BROKEN = (OSError, ValueError, UnpicklingError, SafetensorError, EOFError)


@dataclass(frozen=True)
class BaseSource:
    """Where a base model comes from, and in which form its weights come.

    Attributes:
        name: A folder or a hub name.
        dtype: One of ``auto`` (as saved), ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: As in transformers; None for its choice.
        quantization: ``nf4``, ``int8`` or None.
        device: Where quantized weights are made, and buffers of a base that is read in shares;
            plain weights come on the CPU.
    """

    name: str
    dtype: str = "auto"
    attn_implementation: str | None = None
    quantization: str | None = None
    device: torch.device | str = "cpu"


def check_dtype(name: str) -> None:
    """Refuse a name of no dtype.

    Raises:
        UserError: If it is none of :data:`DTYPES`.
    """
    if name not in DTYPES:
        raise UserError(f"model.dtype must be one of {', '.join(DTYPES)}, got {name!r}.")


def check_model(source: BaseSource) -> None:
    """Refuse a base model that cannot be loaded, before anything else needs it.

    Raises:
        UserError: If the folder is none of a model, the hub's model is out of reach, the dtype or
            the quantization is none, or quantizing needs a package that is absent.
    """
    check_quantization(source.quantization)
    check_dtype(source.dtype)
    name, folder = source.name, Path(source.name)
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not folder.is_dir():
        raise UserError(f"model.model_name_or_path: the folder {name} does not exist.")
    if not folder.is_dir():
        _check_hub(name)
        return
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.model_name_or_path: {name} holds no config.json, so it is no model."
        )
    names = [f"{file}{end}" for file in WEIGHTS for end in ("", ".index.json")]
    if not any((folder / file).is_file() for file in names):
        raise UserError(
            f"model.model_name_or_path: {name} has a config.json but no weights ({WEIGHTS[0]})."
        )


def _check_hub(name: str) -> None:
    """Refuse a hub name whose configuration cannot be had."""
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        causes = tuple(type(cause) for cause in _causes(error))
        unknown = (RepositoryNotFoundError, HFValidationError)
        if any(issubclass(cause, GatedRepoError) for cause in causes):
            reason = "is restricted; ask for access on the hub and log in (hf auth login)"
        elif any(issubclass(cause, unknown) for cause in causes):
            reason = "is no folder, and no model on the hub that you may see"
        elif "couldn't connect" in str(error).lower() or "offline" in str(error).lower():
            reason = "is no folder, is not in the local cache, and the hub cannot be reached"
        else:
            reason = f"cannot be loaded: {first_sentence(error)}"
        raise UserError(f"model.model_name_or_path: {name} {reason.rstrip('.')}.") from error


def read_config(name: str) -> Any:
    """The configuration of a model; code that lies beside it is never run, nor asked about.

    Raises:
        UserError: If transformers has no model of its type.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        reason = first_sentence(error).rstrip(".")
        raise UserError(
            f"model.model_name_or_path: {name} cannot be loaded: {reason}; code that comes with a "
            "model is never run here."
        ) from error


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (inner := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(inner)
    return found


def first_sentence(error: BaseException) -> str:
    """The first sentence of an error's message, on one line."""
    return " ".join(str(error).split()).split(". ")[0]


def load_causal_lm(source: BaseSource) -> Any:
    """Load a causal language model by ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If the model cannot be loaded from there.
    """
    from transformers import AutoModelForCausalLM

    check_model(source)
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
