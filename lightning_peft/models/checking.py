"""Base models that cannot be loaded or do not fit their data are refused, in one sentence each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lightning_peft.errors import UserError
from lightning_peft.models.quantization import check_quantization

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")


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


def check_causal(name: str) -> None:
    """Refuse a model that has no form in which it goes on with a text.

    Args:
        name: A folder or a hub name.

    Raises:
        UserError: If transformers has no causal language model of its type.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = read_config(name)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        reason = (
            "; it reads with an encoder, and models that do so are not trained here"
            if getattr(config, "is_encoder_decoder", False)
            else ""
        )
        raise UserError(
            f"model.model_name_or_path: transformers has no causal language model of the type "
            f"{config.model_type} of {name}{reason}."
        )


def check_vocabulary(model: Any, tokens: int) -> None:
    """Refuse a tokenizer whose last tokens have no row in a model's embedding.

    Args:
        model: Of transformers; another one whose embedding nobody can tell is let through.
        tokens: How many the tokenizer knows.

    Raises:
        UserError: If the embedding has fewer rows.
    """
    find = getattr(model, "get_input_embeddings", None)
    rows = getattr(find() if find is not None else None, "num_embeddings", None)
    if rows is not None and tokens > rows:
        raise UserError(
            f"data.tokenizer knows {tokens:,} tokens, and the model's embedding has {rows:,} rows, "
            "so the last ones could not be read; give the tokenizer of this model, or a model "
            "that was saved after resize_token_embeddings."
        )
