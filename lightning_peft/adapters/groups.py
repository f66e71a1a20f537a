"""Which heads and channels of a model of LLaMA's layout leave together, and how it is told of it.

A model is known by its structure, not by its name: each layer has an attention (``q_proj``,
``k_proj``, ``v_proj``, ``o_proj``) and an MLP (``gate_proj``, ``up_proj``, ``down_proj``) of the
sizes that its configuration says. A query head is tied to the key/value head that it reads, so
that a group of heads is one key/value head with all its query heads. The configuration holds one
number for all layers: as many leave each layer, which ones is for each to choose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.dense import is_quantized
from lightning_peft.adapters.features import base_of, keep_features
from lightning_peft.errors import UserError

Kind = Literal["heads", "channels"]
LINEARS: dict[Kind, tuple[str, ...]] = {
    "heads": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "channels": ("gate_proj", "up_proj", "down_proj"),
}
KEYS = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


@dataclass(frozen=True)
class Member:
    """A linear of which each group has slices.

    Attributes:
        name: Full name.
        dim: 0 where groups are rows of its weight, 1 where they are columns.
        size: Neighbouring rows or columns of one group.
    """

    name: str
    dim: int
    size: int


@dataclass(frozen=True)
class Groups:
    """The groups of one attention or one MLP.

    Attributes:
        kind: ``heads`` (key/value heads with their query heads) or ``channels``.
        count: How many there are.
        members: The linears that lose slices with them; the last one reads what the others make.
    """

    kind: Kind
    count: int
    members: tuple[Member, ...]


def groups_of(model: nn.Module) -> dict[str, Groups]:
    """The groups of a model as it is now, by the full name of the attention or MLP.

    Args:
        model: Of LLaMA's layout, with adapters or without.

    Raises:
        UserError: If it is of another layout.
    """
    config: Any = getattr(model, "config", None)
    missing = [key for key in KEYS if not isinstance(getattr(config, key, None), int)]
    if missing:
        raise _other_layout(model, f"its configuration has no {missing[0]}")
    found: dict[str, Groups] = {}
    for kind, leaves in LINEARS.items():
        owners = {n: m for n, m in model.named_modules() if _has_linears(m, leaves)}
        if len(owners) != config.num_hidden_layers:
            raise _other_layout(
                model,
                f"{len(owners)} of its {config.num_hidden_layers} layers have {', '.join(leaves)}",
            )
        for name, module in owners.items():
            found[name] = _groups(kind, name, module, config)
            if not _fits(model, name, found[name]):
                raise _other_layout(model, f"{name} is not of the sizes of its configuration")
    return found


def _groups(kind: Kind, name: str, module: Any, config: Any) -> Groups:
    """The groups of one attention or MLP, by the model's configuration."""
    first, *middle, last = LINEARS[kind]
    if kind == "heads":
        count, size = config.num_key_value_heads, getattr(module, "head_dim", 0)
        of_queries = config.num_attention_heads // count * size
    else:
        count, size, of_queries = config.intermediate_size, 1, 1
    rows = [Member(f"{name}.{leaf}", 0, size) for leaf in middle]
    ends = Member(f"{name}.{first}", 0, of_queries), Member(f"{name}.{last}", 1, of_queries)
    return Groups(kind, count, (ends[0], *rows, ends[1]))


def _has_linears(module: nn.Module, leaves: Iterable[str]) -> bool:
    children = dict(module.named_children())
    return all(isinstance(children.get(leaf), (nn.Linear, AdaptedLayer)) for leaf in leaves)


def _fits(model: nn.Module, name: str, groups: Groups) -> bool:
    """Whether the linears hold as many groups, and nothing beside them holds a value for each."""
    layers: list[Any] = [model.get_submodule(member.name) for member in groups.members]
    for member, layer in zip(groups.members, layers, strict=True):
        if (layer.out_features, layer.in_features)[member.dim] != groups.count * member.size:
            return False
    inside = {id(p) for layer in layers for p in layer.parameters()}
    others = [p for p in model.get_submodule(name).parameters() if id(p) not in inside]
    # A norm of each head, which all heads share.
    return all(p.shape == (groups.members[1].size,) for p in others)


def _other_layout(model: nn.Module, reason: str) -> UserError:
    return UserError(
        f"heads and channels can leave a model of LLaMA's layout only, and {type(model).__name__} "
        f"is none ({reason}); give a LLaMA, Mistral or Qwen model, or a method that leaves the "
        "base as it is."
    )


def refuse_fixed(model: nn.Module, groups: Mapping[str, Groups]) -> None:
    """Refuse linears whose rows and columns cannot leave.

    Args:
        model: The model.
        groups: What is to lose some.

    Raises:
        UserError: If one is quantized, or shares its weight with another module.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for member in (member for each in groups.values() for member in each.members):
        base = base_of(model.get_submodule(member.name))
        if is_quantized(base):
            raise UserError(
                f"{member.name} is a {type(base).__name__}, which rows and columns cannot leave: "
                "give model.quantization: null, or a method that leaves the base as it is."
            )
        if uses[id(base.weight)] > 1:
            raise UserError(
                f"{member.name} shares its weight with another module, which would lose rows or "
                "columns too; untie them."
            )


def changes(model: nn.Module, counts: Mapping[Kind, int]) -> dict[str, int]:
    """The entries of a model's configuration that change where so many groups are left.

    Args:
        model: As it is now.
        counts: Groups that are left in each layer.
    """
    config: Any = model.config
    found = {}
    if "channels" in counts:
        found["intermediate_size"] = counts["channels"]
    if "heads" in counts:
        queries = config.num_attention_heads // config.num_key_value_heads
        attention: Any = next(m for m in model.modules() if _has_linears(m, LINEARS["heads"]))
        found |= {
            "num_attention_heads": counts["heads"] * queries,
            "num_key_value_heads": counts["heads"],
            "head_dim": attention.head_dim,  # which follows from the others unless it is said
        }
    return found


def refusal(config: Any, changed: Mapping[str, int] | None = None) -> str | None:
    """Why a configuration could not be saved and loaded with some entries; None where it could.

    LLaMA's wants the hidden size to be a multiple of the number of heads.

    Args:
        config: A model's.
        changed: Entries that replace its own.
    """
    try:
        type(config)(**{**config.to_dict(), **(changed or {})})
    except Exception as error:  # of which class, depends on the version of transformers
        return " ".join(str(error).split()).split(": ")[-1].rstrip(".")
    return None


def shrink(
    model: nn.Module, kept: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> None:
    """Remove groups for real, and change the configuration by as many.

    Args:
        model: Changed in place.
        kept: By the name of each attention or MLP the indices of the groups that stay, increasing;
            as many in each of one kind, and every one of a kind or none.
        optimizer: Whose moments follow.
    """
    groups = groups_of(model)  # of the configuration that changes below
    counts: dict[Kind, int] = {}
    for name, indices in kept.items():
        for member in groups[name].members:
            layer = model.get_submodule(member.name)
            keep_features(layer, member.dim, _slices(indices, member.size), optimizer)
        counts[groups[name].kind] = len(indices)
    config: Any = model.config
    for key, value in changes(model, counts).items():
        setattr(config, key, value)
    for module in model.modules():
        if "channels" in counts and "intermediate_size" in vars(module):
            vars(module)["intermediate_size"] = counts["channels"]  # only shown, but let it be true


def _slices(groups: Tensor, size: int) -> Tensor:
    """Indices of the rows or columns of some groups, (k · size,), from theirs, (k,)."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
