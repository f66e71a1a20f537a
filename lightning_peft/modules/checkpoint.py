"""Which parts of an adapted model go into a checkpoint, and what a checkpoint must agree with."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters import adapter_layers, adapter_state_dict
from lightning_peft.adapters.shrink import living_part
from lightning_peft.adapters.state import fit_ranks, widened
from lightning_peft.errors import UserError
from lightning_peft.strategies import AdapterStrategy


def strategy_state(adapter: AdapterStrategy, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """The strategy's state over all processes, taken out of what Lightning keeps of callbacks."""
    own = checkpoint.get("callbacks", {}).pop(adapter.state_key, None)
    state = adapter.state_dict() if own is None else own
    return adapter.merge_states(distributed.everywhere(state))


def checkpoint_of(
    model: nn.Module, adapter: AdapterStrategy, prefix: str, state: dict[str, Any]
) -> dict[str, Any]:
    """The entries of a checkpoint that describe an adapted model.

    Args:
        model: The adapted model.
        adapter: Its strategy.
        prefix: What stands before the model's names in the module that is saved.
        state: The strategy's.

    Returns:
        ``state_dict`` without the base's tensors, and ``adapter``.
    """
    return {
        "state_dict": {f"{prefix}{k}": v for k, v in adapter_state_dict(model).items()},
        "adapter": {
            "strategy": type(adapter).__name__,
            "base": adapter.base_fingerprint,
            "arguments": _arguments(adapter),
            "layers": list(adapter_layers(model)),
            "state": state,
        },
    }


def optimizer_states(model: nn.Module, optimizers: list[Any]) -> dict[str, Any]:
    """The entries of a checkpoint for the optimizers, alike under every engine.

    Moments are whole and without those of dead components, as one device would have them.

    Returns:
        ``optimizer_states`` in torch's form, and ``optimizer_names``: the parameter's full name for
        each index, by which an engine that keeps sizes makes room again.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    living = living_part(adapter_layers(model).values())
    states, indices = [], []
    for optimizer in optimizers:
        parameters = distributed.parameters_of(optimizer)
        state = distributed.optimizer_state(optimizer)
        for index, parameter in enumerate(parameters):
            dim, rank = living.get(id(parameter), (0, -1))
            size = distributed.shape(parameter)
            entry = state["state"].get(index, {}) if rank >= 0 else {}
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == size:
                    entry[key] = value.narrow(dim, 0, rank).clone()
        states.append(state)
        indices.append([names.get(id(p), "") for p in parameters])
    return {"optimizer_states": states, "optimizer_names": indices}


def widen_optimizer_states(model: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give moments of living components the sizes that an engine keeps; in place."""
    parameters = dict(model.named_parameters())
    living = living_part(adapter_layers(model).values())
    names = checkpoint.get("optimizer_names", [])
    for state, indices in zip(checkpoint.get("optimizer_states", []), names, strict=False):
        for index, name in enumerate(indices):
            parameter = parameters.get(name)
            if parameter is None or id(parameter) not in living:
                continue
            size = distributed.shape(parameter)
            dim, rank = living[id(parameter)]
            front = [rank if i == dim else n for i, n in enumerate(size)]
            for key, value in state["state"].get(index, {}).items():
                if isinstance(value, Tensor) and [*value.shape] == front:
                    state["state"][index][key] = widened(value, size)


def restore_structure(
    model: nn.Module, adapter: AdapterStrategy, checkpoint: dict[str, Any], prefix: str
) -> None:
    """Give a freshly attached model the structure and ranks of a checkpoint.

    Args:
        model: The adapted model.
        adapter: Its strategy.
        checkpoint: The checkpoint, whose tensors are loaded afterwards.
        prefix: As in :func:`checkpoint_of`.

    Raises:
        UserError: If the checkpoint is of another strategy, base model or set of layers.
    """
    saved = checkpoint.get("adapter")
    if saved is None:
        raise UserError(
            "the checkpoint was not written by lightning_peft: it has no entry 'adapter'."
        )
    _check_origin(saved, adapter)
    adapter.restructure(model, saved["state"])
    _same_layers(saved["layers"], list(adapter_layers(model)))
    fit_ranks(model, checkpoint["state_dict"], prefix)
    expected = {f"{prefix}{name}" for name in adapter_state_dict(model)}
    differing = sorted(expected ^ checkpoint["state_dict"].keys())
    if differing:
        raise UserError(
            f"the checkpoint and model.adapter differ in {differing[0]} ({len(differing)} tensors "
            "in all); give the adapter's arguments with which it was trained."
        )


def _check_origin(saved: dict[str, Any], adapter: AdapterStrategy) -> None:
    """Refuse a checkpoint of another strategy, of other arguments, or of another base."""
    given = type(adapter).__name__
    if saved["strategy"] != given:
        raise UserError(
            f"the checkpoint was trained with {saved['strategy']}, model.adapter is {given}; give "
            "the configuration that it was trained with."
        )
    for key, value in _arguments(adapter).items():
        was = saved["arguments"].get(key, {})  # an earlier one knew no patterns
        if _in_order(was) != _in_order(value):
            raise UserError(
                f"the checkpoint was trained with {key} = {was}, "
                f"model.adapter.{key} is {value}; give that of the checkpoint."
            )
    if saved["base"] != adapter.base_fingerprint:
        raise UserError(
            f"the checkpoint's base model has fingerprint {saved['base']}, "
            f"model.model_name_or_path has {adapter.base_fingerprint}: an adapter fits only the "
            "base that it was trained on."
        )


def restore_loader(fit_loop: Any) -> None:
    """Give a resumed run's loader its position, where Lightning has passed it over.

    A schedule over epochs asks for the number of steps before the checkpoint's loops are read; for
    that Lightning makes the loader, and never looks at the saved position again.

    Args:
        fit_loop: The trainer's.
    """
    if fit_loop.restarting and fit_loop._combined_loader_states_to_load:
        fit_loop._load_combined_loader_states()
        iter(fit_loop._data_fetcher)


def _arguments(adapter: AdapterStrategy) -> dict[str, Any]:
    """What no tensor's shape tells: the scaling, and which of the base's modules train."""
    saved = sorted(adapter.modules_to_save or ())
    keys = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")
    scaling = {key: getattr(adapter, key) for key in keys}
    return {**scaling, "modules_to_save": saved}


def _in_order(value: Any) -> Any:
    """Of patterns the first that matches counts, so that their order does."""
    return list(value.items()) if isinstance(value, dict) else value


def _same_layers(saved: list[str], present: list[str]) -> None:
    only_saved = [name for name in saved if name not in set(present)]
    only_here = [name for name in present if name not in set(saved)]
    if only_saved or only_here:
        raise UserError(
            f"the checkpoint adapts other target_modules: only there {_some(only_saved)}; "
            f"only here {_some(only_here)}."
        )


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(names[:limit]) or "none") + more
