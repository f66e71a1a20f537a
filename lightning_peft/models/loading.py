"""Loading a base model, with an answer in one sentence where that fails."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.plugins import MixedPrecision
from torch.optim import Optimizer

from lightning_peft.errors import UserError
from lightning_peft.models.quantization import check_quantization, keep_exact, quantized

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_HEADS = ["score", "classifier", "pooler"]  # never quantized, since they train in full


def check_model(name: str, dtype: str = "auto", quantization: str | None = None) -> None:
    """Refuse a base model that cannot be loaded, before anything else needs it.

    Args:
        name: A folder or a hub name.
        dtype: One of ``auto``, ``float32``, ``bfloat16``, ``float16``.
        quantization: ``nf4``, ``int8`` or None.

    Raises:
        UserError: If the folder is none of a model, the hub's model is out of reach, ``dtype`` or
            ``quantization`` is none of these, or quantizing needs a package that is absent.
    """
    check_quantization(quantization)
    if dtype not in DTYPES:
        raise UserError(f"model.dtype must be one of {', '.join(DTYPES)}, got {dtype!r}.")
    folder = Path(name)
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
        AutoConfig.from_pretrained(name)
    except (OSError, HFValidationError) as error:
        causes = tuple(type(cause) for cause in _causes(error))
        unknown = (RepositoryNotFoundError, HFValidationError)
        if any(issubclass(cause, GatedRepoError) for cause in causes):
            reason = "is restricted; ask for access on the hub and log in (hf auth login)"
        elif any(issubclass(cause, unknown) for cause in causes):
            reason = "is no folder, and no model on the hub that you may see"
        elif "couldn't connect" in str(error).lower() or "offline" in str(error).lower():
            reason = "is no folder, is not in the local cache, and the hub cannot be reached"
        else:
            reason = f"cannot be loaded: {_first_sentence(error)}"
        raise UserError(f"model.model_name_or_path: {name} {reason.rstrip('.')}.") from error


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (inner := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(inner)
    return found


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]


def check_training(optimizer: OptimizerCallable, lr_scheduler_type: str, trainer: Trainer) -> None:
    """Refuse an optimizer's or a schedule's wrong arguments before a model is loaded.

    Args:
        optimizer: Makes the optimizer from parameters.
        lr_scheduler_type: Name of the schedule.
        trainer: Whose precision and clipping the optimizer has to go with.

    Raises:
        UserError: If the optimizer refuses its arguments, there is no such schedule, or a fused
            optimizer would have gradients scaled or not clipped.
    """
    from transformers import SchedulerType

    names = [kind.value for kind in SchedulerType]
    if lr_scheduler_type not in names:
        near = difflib.get_close_matches(lr_scheduler_type, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}."
        raise UserError(f"model.lr_scheduler_type: {lr_scheduler_type!r} is no schedule; {hint}")
    try:
        made = optimizer([torch.nn.Parameter(torch.zeros(1))])
    except ValueError as error:
        raise UserError(f"model.optimizer: {_first_sentence(error).rstrip('.')}.") from error
    _check_fused(made, trainer)


def _check_fused(optimizer: Optimizer, trainer: Trainer) -> None:
    """Refuse a step that unscales gradients by itself where they are read or clipped before it."""
    precision = trainer.precision_plugin
    if not isinstance(precision, MixedPrecision) or not any(
        group.get("fused") for group in optimizer.param_groups
    ):
        return
    if precision.scaler is not None:
        raise UserError(
            "model.optimizer.fused: with trainer.precision 16-mixed a fused step unscales "
            "gradients by itself, too late for what looks at them before; set it to false."
        )
    if trainer.gradient_clip_val:
        raise UserError(
            "model.optimizer.fused: with trainer.precision bf16-mixed Lightning clips no gradients "
            "for a fused step; set it to false, or trainer.gradient_clip_val to null."
        )


def _compute_dtype(name: str, dtype: str) -> torch.dtype:
    """The dtype in which a base's weights are loaded, where they are not quantized."""
    from transformers import AutoConfig

    if dtype != "auto":
        return getattr(torch, dtype)
    saved = AutoConfig.from_pretrained(name).dtype
    return torch.float32 if saved is None else saved


def load_causal_lm(
    name: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> Any:
    """Load a causal language model by ``AutoModelForCausalLM.from_pretrained``.

    Args:
        name: A folder or a hub name.
        dtype: One of ``auto``, ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: As in transformers.
        quantization: ``nf4``, ``int8`` or None.
        device: Where quantized weights are made; plain ones come on the CPU.

    Returns:
        The model, in training mode.

    Raises:
        UserError: If ``dtype`` is none of these, or the model cannot be loaded from there.
    """
    from transformers import AutoModelForCausalLM

    check_model(name, dtype, quantization)
    extra: dict[str, Any] = quantized(quantization, _compute_dtype(name, dtype), device)
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **extra)
    except OSError as error:
        reason = _first_sentence(error).rstrip(".")
        raise UserError(f"model.model_name_or_path: {name} cannot be loaded: {reason}.") from error
    keep_exact(model)
    return model.train()


def load_classifier(
    name: str,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    labels: Sequence[str] | None = None,
    regression: bool = False,
    quantization: str | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Any, list[str]]:
    """Load a model with a classification head by ``AutoModelForSequenceClassification``.

    A head that the model brings is kept where its number of outputs fits.

    Args:
        name: A folder or a hub name.
        dtype: One of ``auto``, ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: As in transformers.
        labels: Names of the classes; None leaves the number of outputs to the model.
        regression: One output, a score.
        quantization: ``nf4``, ``int8`` or None; the head stays as it is.
        device: Where quantized weights are made; plain ones come on the CPU.

    Returns:
        The model, in training mode, and the full names of the modules that make its head: whatever
        stands beside the base model, and a pooler that was not saved with it.

    Raises:
        UserError: If ``dtype`` is none of these, the model cannot be loaded from there, has no
            form that classifies, or lacks weights of the base model.
    """
    from transformers import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
        AutoConfig,
        AutoModelForSequenceClassification,
    )

    check_model(name, dtype, quantization)
    config = AutoConfig.from_pretrained(name)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(
            f"model.model_name_or_path: transformers has no model for sequence classification of "
            f"the type {config.model_type} of {name}."
        )
    _set_labels(config, ["score"] if regression else labels, regression)
    extra: dict[str, Any] = quantized(quantization, _compute_dtype(name, dtype), device, _HEADS)
    if attn_implementation is not None:
        extra["attn_implementation"] = attn_implementation
    with _quiet_loading():
        try:
            model, report = AutoModelForSequenceClassification.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **extra,
            )
        except OSError as error:
            reason = _first_sentence(error).rstrip(".")
            message = f"model.model_name_or_path: {name} cannot be loaded: {reason}."
            raise UserError(message) from error
    keep_exact(model)
    fresh = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    return model.train(), _head_of(model, name, fresh)


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
