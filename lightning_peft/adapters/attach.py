"""Finding the linears to adapt, replacing them, and reporting what was done."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lightning_peft import distributed
from lightning_peft.adapters.adapted import AdaptedLayer
from lightning_peft.adapters.layer import LoRALinear
from lightning_peft.adapters.reach import computes_otherwise, left_out, output_names, unreached
from lightning_peft.errors import UserError
from lightning_peft.patterns import Pattern

ALL_LINEAR = "all-linear"


def adapter_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The adapted layers of a model by full name, in the model's order. Found by type."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AdaptedLayer)}


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Those adapted layers that are LoRA's or a kind of it, by full name, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}")


def _nothing_matched(pattern: str, names: Sequence[str]) -> UserError:
    tails = sorted({name.rsplit(".", 1)[-1] for name in names})
    if pattern in tails:
        return UserError(
            f"target_modules: as a regex {pattern!r} matches no linear layer's full name; the list "
            f"[{pattern}] names those that end so."
        )
    near = (
        difflib.get_close_matches(pattern.rsplit(".", 1)[-1], tails, n=3, cutoff=0.5) or tails[:8]
    )
    return UserError(
        f"target_modules: {pattern!r} matches no linear layer; near names are {', '.join(near)}."
        if tails
        else f"target_modules: {pattern!r} matches nothing, since the model has no linear layer."
    )


def match_targets(
    model: nn.Module,
    target_modules: str | Sequence[str],
    exclude_modules: str | Sequence[str] | None = None,
    modules_to_save: Sequence[str] | None = None,
) -> dict[str, list[str]]:
    """Which linears each pattern names, as PEFT reads patterns.

    Args:
        model: The model.
        target_modules: A list of names or ends of names; or a regex that full names match whole; or
            ``"all-linear"``: every linear but those of the output layer or classification head,
            and subclasses with a forward of their own, such as routers.
        exclude_modules: The same forms, taken away afterwards.
        modules_to_save: Modules that train in full, so that nothing in them is adapted.

    Returns:
        For each pattern the full names of the linears that it matched first, in the model's order.

    Raises:
        UserError: If a pattern matches nothing (near names are listed), is no regex or one that
            takes too long, or matches only modules that are not linear.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    if isinstance(target_modules, str):
        matched = {
            target_modules: _plain_linears(model)
            if target_modules == ALL_LINEAR
            else _fullmatched(target_modules, linears, "target_modules")
        }
    else:
        taken: set[str] = set()
        matched = {}
        for pattern in target_modules:
            found = [n for n in linears if _matches(n, pattern)]
            matched[pattern] = [n for n in found if n not in taken]
            taken.update(found)
            if not found:
                _refuse_other_types(model, pattern)
                raise _nothing_matched(pattern, linears)
    excluded = _excluded(linears, exclude_modules)
    excluded |= {n for n in linears if any(f".{p}." in f".{n}." for p in modules_to_save or ())}
    result = {p: [n for n in names if n not in excluded] for p, names in matched.items()}
    if not any(result.values()):
        raise _nothing_matched(str(target_modules), linears)
    return result


def _plain_linears(model: nn.Module) -> list[str]:
    """What ``all-linear`` takes."""
    outputs = output_names(model)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return [n for n, m in linears.items() if n not in outputs and not computes_otherwise(m)]


def _fullmatched(pattern: str, names: Sequence[str], key: str) -> list[str]:
    compiled = Pattern(pattern, key)
    return [name for name in names if compiled.fullmatch(name)]


def _refuse_other_types(model: nn.Module, pattern: str) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim > 2 and _matches(name, pattern):
            raise UserError(
                f"target_modules: {pattern!r} names {name}, {parameter.shape[0]} matrices in one "
                "parameter and no module, as experts are kept; only torch.nn.Linear can be adapted."
            )
    for name, module in model.named_modules():
        if name and _matches(name, pattern):
            raise UserError(
                f"target_modules: {pattern!r} names {name}, a {type(module).__name__}; "
                "only torch.nn.Linear and its subclasses can be adapted."
            )


def _excluded(linears: list[str], exclude: str | Sequence[str] | None) -> set[str]:
    if exclude is None:
        return set()
    if isinstance(exclude, str):
        return set(_fullmatched(exclude, linears, "exclude_modules"))
    return {n for n in linears if any(_matches(n, pattern) for pattern in exclude)}


@dataclass
class AttachReport:
    """What attaching did; ``print`` it.

    Attributes:
        strategy: The strategy's class name.
        matched: How many layers each pattern matched.
        parameters: Trained values of the adapters of each module kind (last part of the name),
            shared ones once.
        trainable: All parameters that train, saved modules included.
        total: All parameters of the model, adapters included.
        dtypes: Dtype of the base's and of the adapters' parameters.
        in_full: Parameters of the modules that train in full beside the adapters, by full name.
        left_out: With ``all-linear``, full names of linears with a forward of their own.
        unreached: With ``all-linear``, values of matrices that no adapter changes, by kind.
    """

    strategy: str
    matched: dict[str, int]
    parameters: dict[str, int]
    trainable: int
    total: int
    dtypes: dict[str, str] = field(default_factory=dict)
    in_full: dict[str, int] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    unreached: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        """A few lines for a person."""
        share = 100 * self.trainable / max(self.total, 1)
        counts = f"{self.trainable:,} of {self.total:,} parameters train"
        lines = [f"{self.strategy}: {counts} ({share:.2f} %)"]
        lines += [f"  {pattern}: {count} layers" for pattern, count in self.matched.items()]
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in self.parameters.items())
        if self.in_full:
            in_full: Counter[str] = Counter()
            for name, count in self.in_full.items():
                in_full[kind_of(name) or "the whole model"] += count
            modules = ", ".join(f"{name} {count:,}" for name, count in in_full.items())
            saved = " and saved with the adapter" if self.parameters else ""
            lines.append(f"  trained in full{saved}: {modules}")
        dtypes = ", ".join(f"{part} {dtype}" for part, dtype in self.dtypes.items())
        if kinds:
            lines.append(f"  parameters by kind: {kinds}")
        if self.left_out:
            names = ", ".join(self.left_out[:3]) + (", …" if len(self.left_out) > 3 else "")
            lines.append(f"  left out, since they compute no plain linear: {names}")
        beyond = sum(self.unreached.values())
        if beyond > 0.01 * self.total:
            most = ", ".join(f"{kind} {count:,}" for kind, count in self.unreached.items())
            lines.append(f"  frozen without an adapter: {100 * beyond / self.total:.0f} % ({most})")
        return "\n".join([*lines, f"  dtypes: {dtypes}"])


def kind_of(name: str) -> str:
    """The module kind of a layer: the last part of its full name (``q_proj``)."""
    return name.rsplit(".", 1)[-1]


def make_report(model: nn.Module, strategy: str, matched: dict[str, int]) -> AttachReport:
    """Count what a model holds after attaching.

    Args:
        model: The model, adapters attached.
        strategy: Name to print.
        matched: How many layers each pattern matched.

    Returns:
        The report.
    """
    adapters: Counter[str] = Counter()
    for name, count in trained_values(model).values():
        adapters[kind_of(name)] += count
    layers = adapter_layers(model).values()
    seen = {id(p) for layer in layers for p in layer.own_parameters()}
    trained = sum(
        distributed.shape(p).numel()
        for p in model.parameters()
        if p.requires_grad and id(p) not in seen
    )
    base = Counter(
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if id(p) not in seen
    )
    own = Counter(str(p.dtype).removeprefix("torch.") for p in model.parameters() if id(p) in seen)
    everything = ALL_LINEAR in matched
    return AttachReport(
        strategy=strategy,
        matched=matched,
        left_out=left_out(model) if everything else [],
        unreached=unreached(model, output_names(model)) if everything else {},
        parameters=dict(adapters),
        trainable=trained + sum(adapters.values()),
        total=sum(distributed.shape(p).numel() for p in model.parameters()),
        dtypes={"base": "/".join(base) or "none", "adapters": "/".join(own) or "none"},
        in_full={
            name: sum(distributed.shape(p).numel() for p in module.parameters())
            for name, module in trained_modules(model).items()
        },
    )


def trained_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost modules that train in full beside the adapters, by full name."""
    layers = adapter_layers(model)
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name == n or name.startswith(f"{n}.") for n in (*layers, *found))
        own = list(module.parameters())
        holds_layer = any(n.startswith(f"{name}.") or not name for n in layers)
        if own and not inside and not holds_layer and all(p.requires_grad for p in own):
            found[name] = module
    return found


def trained_values(model: nn.Module) -> dict[int, tuple[str, int]]:
    """By parameter id, the first layer that holds it and how many of its values train."""
    found: dict[int, tuple[str, int]] = {}
    for name, layer in adapter_layers(model).items():
        for parameter in layer.own_parameters():
            if parameter.requires_grad and id(parameter) not in found:
                found[id(parameter)] = (name, layer.trained_values(parameter))
    return found


def find_modules(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    """The modules that train in full beside adapters, by names or ends of names.

    Raises:
        UserError: If a pattern matches nothing.
    """
    found: list[nn.Module] = []
    for pattern in patterns:
        matched = [module for name, module in model.named_modules() if _matches(name, pattern)]
        if not matched:
            raise UserError(f"modules_to_save: {pattern!r} matches no module of the model.")
        found += matched
    return found


def replace_linears(
    model: nn.Module, names: Sequence[str], layer: Callable[[nn.Module, str], nn.Module]
) -> dict[str, AdaptedLayer]:
    """Put an adapted layer in the place of each named linear.

    Args:
        model: The model, changed in place.
        names: Full names of linears.
        layer: Makes what stands in the place of a linear, from the linear and its full name: an
            adapted layer over it, or the linear itself.

    Returns:
        The new adapted layers by name.
    """
    replaced = {}
    for name in names:
        base = model.get_submodule(name)
        made = layer(base, name)
        if isinstance(made, AdaptedLayer):
            replaced[name] = made
            model.set_submodule(name, made.train(model.training))
    return replaced
