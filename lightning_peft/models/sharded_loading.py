"""A base that no process ever holds whole: shapes first, cut, then each share read from its file.

The model is built on the meta device, and each parameter remembers the tensor of a safetensors file
that it stands for (:class:`Stored`). Adapters are attached, the engine cuts what has no values yet,
and every process reads the rows that are its own. Files are mapped into memory, so that what is not
asked for is not read.

Where that would not give the model that ``from_pretrained`` gives, bit for bit, the answer is
:class:`LoadsWhole`, with the reason.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lightning_peft import distributed
from lightning_peft.models.checking import BaseSource, check_causal, check_model, read_config

_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class LoadsWhole(Exception):
    """Why a base has to be loaded whole by every process."""


class Stored:
    """A tensor of a safetensors file, read in parts.

    Args:
        file: The open file (``safetensors.safe_open``).
        key: The tensor's name there.
        dtype: In which values are given.
    """

    def __init__(self, file: Any, key: str, dtype: torch.dtype) -> None:
        self._file, self._key, self.dtype = file, key, dtype
        self.shape = torch.Size(file.get_slice(key).get_shape())

    def rows(self, start: int, stop: int) -> Tensor:
        """A part of the first dimension, in the file's dtype."""
        return self._file.get_slice(self._key)[start:stop]

    def whole(self) -> Tensor:
        """All of it, in the file's dtype; on a CPU a view of the mapped file, not to be changed."""
        return self._file.get_tensor(self._key)

    def at(self, index: Tensor) -> Tensor:
        """Single values of the flattened tensor."""
        return self.whole().view(-1)[index].to(self.dtype)


def stored_parameters(model: nn.Module) -> dict[str, Stored]:
    """By full name what parameters stand for, before they are cut; empty for a loaded model."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: p.stored for name, p in named if hasattr(p, "stored")}


class ValuesMissing(Exception):
    """An operation on a tensor failed, since it has no values yet."""


class NameMissingValues(TorchFunctionMode):
    """Within it, an operation that fails on a meta tensor raises :class:`ValuesMissing`.

    One whose result is a meta tensor again does not fail. The first error is the cause of ours.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call an operation of torch, and look at what it was given where it fails."""
        given = kwargs or {}
        try:
            return func(*args, **given)
        except (NotImplementedError, RuntimeError) as error:
            if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, given))):
                raise ValuesMissing from error
            raise


def stored_causal_lm(source: BaseSource) -> Any:
    """A causal language model whose parameters are on the meta device and know their file.

    Buffers are there, on the device; those of no file are computed as transformers computes them.

    Returns:
        The model, in training mode, with the random stream as it was.

    Raises:
        UserError: If the model cannot be loaded from there at all.
        LoadsWhole: If it is to be quantized, files are none of safetensors', names or shapes in
            them are not the model's, or something else than reading makes the model.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    check_model(source)
    name = source.name
    check_causal(name)
    config = read_config(name)
    dtype = config.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    if dtype is None:
        raise LoadsWhole("its configuration names no dtype")
    if source.quantization is not None or getattr(config, "quantization_config", None) is not None:
        raise LoadsWhole("it is quantized")
    extra: dict[str, Any] = {"dtype": dtype}
    if source.attn_implementation is not None:
        extra["attn_implementation"] = source.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **extra)
    _refuse_conversions(model)
    _attach_sources(model, _tensors_of(name))
    _make_buffers(model, source.device)
    with contextlib.suppress(OSError):  # else the configuration's, which the model has
        model.generation_config = GenerationConfig.from_pretrained(name)
    return model.train()


def _refuse_conversions(model: Any) -> None:
    """Refuse models whose weights transformers changes while it loads them."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        changes = bool(get_model_conversion_mapping(model, add_legacy=False))
    except ImportError:  # before transformers 5, which only renames
        changes = False
    exact = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if changes or any(getattr(model, key, None) for key in exact):
        raise LoadsWhole(f"transformers changes weights of {type(model).__name__} while it loads")


def _tensors_of(name: str) -> dict[str, Any]:
    """The open file that holds each tensor, by the tensor's name."""
    from safetensors import safe_open
    from transformers.utils import cached_file

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    single, index = find(_FILE), find(_INDEX)
    if single is not None:
        paths: Iterable[str | None] = [single]
    elif index is not None:
        parts = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        paths = [find(part) for part in sorted(set(parts))]
    else:
        raise LoadsWhole(f"it has no {_FILE}")
    found: dict[str, Any] = {}
    for path in paths:
        file = safe_open(path, framework="pt")
        found.update(dict.fromkeys(file.keys(), file))
    return found


def _attach_sources(model: nn.Module, files: Mapping[str, Any]) -> None:
    """Tell each parameter, and fill each buffer, by the tensor of its name."""
    names: dict[Tensor, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(tensor, []).append(name)
    for tensor, own in names.items():
        there = [name for name in own if name in files]
        if len(there) != 1:  # tied ones have several names, of which one is saved
            what = "is not in its files" if not there else f"is there as {there[1]} too"
            raise LoadsWhole(f"{own[0]} {what}")
        stored = Stored(files[there[0]], there[0], tensor.dtype)
        if stored.shape != tensor.shape:
            raise LoadsWhole(f"{own[0]} has shape {tuple(stored.shape)} in its files")
        if isinstance(tensor, nn.Parameter):
            tensor.stored = stored  # type: ignore[attr-defined]
        else:
            for name in own:
                owner, _, leaf = name.rpartition(".")
                value = stored.whole().to(tensor.dtype, copy=True)
                model.get_submodule(owner)._buffers[leaf] = value


@torch.no_grad()
def _make_buffers(model: Any, device: torch.device | str) -> None:
    """Compute the buffers that are in no file, as ``from_pretrained`` does for them."""
    empty: dict[tuple[str, str], Tensor] = {}
    for owner, module in model.named_modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                if not buffer.is_floating_point():
                    raise LoadsWhole(f"the buffer {owner}.{leaf} is in no file")
                empty[owner, leaf] = module._buffers[leaf] = torch.full_like(
                    buffer, torch.nan, device="cpu"
                )
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # leaves parameters, and the random stream, alone
    if empty:
        model.initialize_weights()
    for owner, leaf in empty:
        made = model.get_submodule(owner)._buffers[leaf]
        if made.isnan().any():
            raise LoadsWhole(f"the buffer {owner}.{leaf} is in no file")
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)


@torch.no_grad()
def fill(
    model: nn.Module,
    stored: Mapping[str, Stored],
    device: torch.device,
    cut: Callable[[nn.Parameter], None],
) -> None:
    """Give what is still without values its own, once the engine has cut it.

    Args:
        model: The cut model.
        stored: What :func:`stored_parameters` gave before, by the same names.
        device: Where shares are made.
        cut: Is given each parameter that nobody has cut, whole, before the next one is read.
    """
    for name, source in stored.items():
        parameter = model.get_parameter(name)
        if not parameter.is_meta:
            continue  # a tied one, by its other name
        fresh = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
        torch.utils.swap_tensors(parameter, fresh)  # the object stays what others refer to
        if isinstance(parameter, DTensor):
            share = parameter.to_local()
            start = -(-len(parameter) // distributed.world_size()) * distributed.process_index()
            if len(share):  # small ones have no rows for the last processes
                share.copy_(source.rows(start, start + len(share)))
        else:
            parameter.copy_(source.whole())
            cut(parameter)
