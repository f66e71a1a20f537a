"""What is saved of an adapted model, how it is counted, and how its base is recognised."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.attach import adapter_layers, trained_values
from lightning_peft.adapters.growth import match_ranks
from lightning_peft.adapters.shrink import living_part
from lightning_peft.errors import UserError


def _base_prefixes(model: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}.base." for name in adapter_layers(model))


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor but the frozen base's: adapters, gates, and modules that train with them.

    Under an engine that cuts parameters this gathers them, on all processes; what is dead behind
    living components is left out, so that the state is the same under every engine.

    Args:
        model: The adapted model.

    Returns:
        Tensors by full name; a shared parameter stands under each of its names.
    """
    living = living_part(adapter_layers(model).values())
    found: dict[str, Tensor] = {}
    gathered: dict[int, Tensor] = {}
    for name, tensor in _own_tensors(model).items():
        if isinstance(tensor, nn.Parameter):
            if id(tensor) not in gathered:
                full = distributed.value(tensor)
                dim, rank = living.get(id(tensor), (0, -1))
                gathered[id(tensor)] = full if rank < 0 else full.narrow(dim, 0, rank).clone()
            tensor = gathered[id(tensor)]
        found[name] = tensor
    return found


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not the frozen base's, as the model has them."""
    layers, bases = tuple(f"{n}." for n in adapter_layers(model)), _base_prefixes(model)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (isinstance(tensor, nn.Parameter) and tensor.requires_grad)
        or (name.startswith(layers) and not name.startswith(bases))
    }


def gate_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What gates hold beside parameters, by full name: masks, of which each process has its own."""
    return {
        f"{name}.gate.{leaf}": buffer
        for name, layer in adapter_layers(model).items()
        for leaf, buffer in (layer.gate.named_buffers() if layer.gate is not None else ())
    }


@torch.no_grad()
def load_values(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Write saved tensors into a model of the same ranks, whatever engine holds it.

    Args:
        model: The adapted model.
        state: Tensors by full name; where the model's are larger, they fill the front.
    """
    layers = adapter_layers(model)
    for name, layer in layers.items():
        start = f"{name}."
        layer.before_loading({k[len(start) :]: v for k, v in state.items() if k.startswith(start)})
    written: set[int] = set()
    for name, tensor in _own_tensors(model).items():
        if name not in state or id(tensor) in written:
            continue
        written.add(id(tensor))
        if isinstance(tensor, nn.Parameter):
            distributed.write(tensor, widened(state[name], distributed.shape(tensor)))
        else:
            tensor.copy_(state[name])
    for layer in layers.values():
        layer.after_loading()


def widened(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor in the front of zeros of a larger shape; itself where it fits."""
    if tensor.shape == shape:
        return tensor
    wide = tensor.new_zeros(shape)
    wide[tuple(slice(n) for n in tensor.shape)] = tensor
    return wide


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load what :func:`adapter_state_dict` gave, resizing layers whose rank differs first.

    Where a strategy has a structure of its own (shared layers, allotted ranks), call its
    ``restructure(model, strategy_state)`` before.

    Args:
        model: The adapted model.
        state: Tensors by full name.

    Raises:
        UserError: If names are missing from ``state`` or stand there without a place in the model.
    """
    fit_ranks(model, state)
    expected = adapter_state_dict(model)
    differing = sorted(expected.keys() ^ state.keys())
    if differing:
        where = (
            "is not in the saved state" if differing[0] in expected else "has no place in the model"
        )
        raise UserError(
            f"{differing[0]} {where}, nor are {len(differing) - 1} more"
            if len(differing) > 1
            else f"{differing[0]} {where}."
        )
    load_values(model, state)


def fit_ranks(model: nn.Module, state: Mapping[str, Tensor], prefix: str = "") -> None:
    """Shrink each layer to the rank at which it was saved.

    Args:
        model: The adapted model.
        state: Tensors by full name, with ``prefix`` in front.
        prefix: What stands before the names of ``model`` in ``state``.
    """
    pairs = []
    for name, layer in adapter_layers(model).items():
        names = {id(p): leaf for leaf, p in layer.named_parameters()}
        for parameter, dim in layer.components()[:1]:
            saved = state.get(f"{prefix}{name}.{names[id(parameter)]}")
            if saved is not None:
                pairs.append((layer, saved.shape[dim]))
    match_ranks(pairs)


def trainable_parameters(model: nn.Module, include_saved: bool = False) -> int:
    """How many values train, shared ones once, and without those that a fixed mask holds at zero.

    Args:
        model: The adapted model.
        include_saved: Whether modules that train beside the adapters (heads) count. They always do
            where a method trains the model's own weights and there are no adapters.

    Returns:
        The count.
    """
    own = trained_values(model)
    count = sum(values for _, values in own.values())
    if include_saved or not adapter_layers(model):
        others = (p for p in model.parameters() if p.requires_grad and id(p) not in own)
        count += sum(distributed.shape(p).numel() for p in others)
    return count


@torch.no_grad()
def fingerprint(model: nn.Module, samples: int = 512, without: Iterable[nn.Module] = ()) -> str:
    """Recognise a base model: names, shapes, and evenly spread values of every parameter.

    Another checkpoint of the same shapes differs in nearly every value, so a sample tells it apart
    without reading 13 GB.

    Args:
        model: The model before adapters are attached.
        samples: Values read of each parameter.
        without: Modules that are not the base's: those that train in full, and may begin at random.

    Returns:
        16 hexadecimal digits; of names and shapes alone on the meta device, but for parameters
        that know where their values are (``modules/sharded_loading.py``).
    """
    digest = hashlib.sha256()
    left_out = {id(p) for module in without for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        stored = getattr(parameter, "stored", None)  # values that are still in a file
        if stored is not None or not parameter.is_meta:
            size = parameter.numel()
            count = min(samples, size)
            # In integers: float32 rounds the last position of a large matrix up, beyond its end.
            index = torch.arange(count) * (size - 1) // max(count - 1, 1)
            if stored is None:
                values = parameter.detach().reshape(-1)[index.to(parameter.device)]
            else:
                values = stored.at(index)
            digest.update(values.cpu().double().numpy().tobytes())
    return digest.hexdigest()[:16]
