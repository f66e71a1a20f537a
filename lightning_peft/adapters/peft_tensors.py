"""``adapter_model.safetensors``: an adapter's tensors, each looked at before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_peft.adapters.finite import broken
from lightning_peft.errors import MissingFile, UserError, named

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
_KEY = re.compile(re.escape(PREFIX) + r"(?P<name>.+)\.lora_(?P<side>[AB])\.weight", re.DOTALL)
_FLOATS = {"F64", "F32", "F16", "BF16"}
# Of modules that train in full: what they count in.
_WHOLE = {"I64", "I32", "I16", "I8", "U8", "BOOL"}


@dataclass(frozen=True)
class Tensors:
    """What an adapter's file holds.

    Attributes:
        path: The file.
        pairs: By full name of a layer, its ``A`` (rank, d_in) and ``B`` (d_out, rank).
        bases: Weights of adapted layers themselves, which PEFT saves of an output layer, by the
            name that they have in the base model.
        others: All else, by the same name.
    """

    path: Path
    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bases: dict[str, Tensor] = field(default_factory=dict)
    others: dict[str, Tensor] = field(default_factory=dict)


def read_tensors(folder: Path) -> Tensors:
    """Read an adapter's tensors.

    Args:
        folder: The adapter's.

    Returns:
        Pairs of factors that are complete, of one rank, and finite; and what stands beside them.

    Raises:
        MissingFile: If there is no such file.
        UserError: Naming the file and the tensor.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (
            f"; it holds {PICKLE}, a pickle, which may run any code when it is read: save the "
            "adapter again with PEFT's save_pretrained, which writes safetensors"
            if (folder / PICKLE).is_file()
            else ""
        )
        raise MissingFile(f"{folder} holds no {WEIGHTS}, so it is not a PEFT adapter{pickled}.")
    found = Tensors(path)
    for key, tensor in _read(path).items():
        if what := broken(tensor):
            raise UserError(
                f"{path} holds {named(key)} with {what}; take an earlier checkpoint, from before "
                "the training went wrong."
            )
        pair = _KEY.fullmatch(key)
        if pair:
            found.pairs.setdefault(pair["name"], {})[pair["side"]] = tensor
        elif key.startswith(PREFIX):
            found.others[key.removeprefix(PREFIX)] = tensor
        else:
            raise UserError(
                f"{path} holds {named(key)}, for which the model has no place, since the names of "
                f"PEFT's tensors begin with {PREFIX!r}."
            )
    if not found.pairs:
        raise UserError(
            f"{path} holds no lora_A and lora_B of any layer, so it is no LoRA adapter."
        )
    for name, tensors in found.pairs.items():
        _check_pair(name, tensors, folder)
    for key in [key for key in found.others if ".base_layer." in key]:
        name, _, rest = key.rpartition(".base_layer.")
        if name in found.pairs:
            found.bases[f"{name}.{rest}"] = found.others.pop(key)
    return found


def _read(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file."""
    try:
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                slice_ = file.get_slice(key)
                dtype, shape = slice_.get_dtype(), slice_.get_shape()
                if max(shape, default=0) >= 1 << 62:
                    raise UserError(f"{path} holds {named(key)} as {shape}, which no tensor can.")
                allowed = _FLOATS if _KEY.fullmatch(key) else _FLOATS | _WHOLE
                if dtype not in allowed:
                    raise UserError(
                        f"{path} holds {named(key)} as {dtype}; one of "
                        f"{', '.join(sorted(allowed))} can be loaded."
                    )
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        reason = named(" ".join(str(error).split()))
        raise UserError(f"{path} is damaged or cut off: {reason}.") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _check_pair(name: str, pair: dict[str, Tensor], folder: Path) -> None:
    if pair.keys() != {"A", "B"}:
        raise UserError(f"{folder} holds only lora_{next(iter(pair))} of {named(name)}.")
    for side, tensor in pair.items():
        if tensor.dim() != 2:
            raise UserError(
                f"{folder} holds lora_{side} of {named(name)} as {tuple(tensor.shape)}, which is "
                "no matrix."
            )
    ranks = pair["A"].shape[0], pair["B"].shape[1]
    if ranks[0] != ranks[1] or not ranks[0]:
        raise UserError(
            f"{folder} holds lora_A of {named(name)} with rank {ranks[0]} and lora_B with rank "
            f"{ranks[1]}; both must have one rank, at least 1."
        )


def as_stored(tensor: Tensor, dtype: torch.dtype) -> str | None:
    """What is no number once a finite tensor is stored in a dtype; None where all is well.

    Args:
        tensor: Of any dtype.
        dtype: Of the place where it goes.
    """
    return broken(tensor.to(dtype))
