"""Which modules PEFT would adapt, and which it would train in full, by a configuration.

The tensors of an adapter say the same a second time. PEFT passes over what one of them says alone:
a layer without tensors stays as it is, and tensors without a layer are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lightning_peft.adapters.attach import ALL_LINEAR, match_targets
from lightning_peft.adapters.peft_config import PeftConfig
from lightning_peft.patterns import Pattern

# Heads that PEFT adds to modules_to_save of a classifier, whether a model has them or not.
HEADS = ("classifier", "score", "qa_outputs")
_NUMBERED = r".*?\.[^.]*\.(?P<idx>\d+)\."


def targets_of(config: PeftConfig, model: nn.Module) -> dict[str, nn.Module]:
    """The modules that a configuration adapts in a model, by full name.

    Args:
        config: The adapter's.
        model: Without adapters.

    Raises:
        UserError: If a pattern is none, or takes too long.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    names = [name for name in modules if name in _matched(config, model, list(modules))]
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        pattern = Pattern(excluded, f"{config.path} has exclude_modules")
        names = [name for name in names if not pattern.fullmatch(name)]
    elif excluded:
        names = [name for name in names if not _ends(name) & set(excluded)]
    for entry in config.modules_to_save:
        saved = Pattern(entry, f"{config.path} has modules_to_save", r"(^|.*\.){}($|\..*)")
        names = [name for name in names if not saved.match(name)]
    return {name: modules[name] for name in names}


def _ends(name: str) -> set[str]:
    """A full name, and what follows each of its dots."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _matched(config: PeftConfig, model: nn.Module, names: list[str]) -> set[str]:
    targets = config.target_modules
    if targets == ALL_LINEAR:
        found = match_targets(model, ALL_LINEAR)
        return {name for group in found.values() for name in group}
    if isinstance(targets, str):
        pattern = Pattern(targets, f"{config.path} has target_modules")
        return {name for name in names if pattern.fullmatch(name)}
    wanted = set(targets)
    numbered = _numbered(config)
    # A full name is taken whatever its layer's number, as in PEFT.
    return {n for n in names if n in wanted or (_ends(n) & wanted and _in_layers(n, *numbered))}


def _numbered(config: PeftConfig) -> tuple[list[int] | None, list[Pattern]]:
    """To which layers targets are limited, and where the number stands in a name."""
    key = f"{config.path} has layers_pattern"
    around = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
    found = [Pattern(text, key, around) for text in config.layers_pattern]
    return config.layers_to_transform, found or [Pattern(_NUMBERED, key)]


def _in_layers(name: str, layers: list[int] | None, patterns: list[Pattern]) -> bool:
    if layers is None:
        return True
    found = next((match for p in patterns if (match := p.match(name))), None)
    return found is not None and int(found["idx"]) in layers


def saved_by(config: PeftConfig, model: nn.Module) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Each entry of ``modules_to_save``, and the modules that PEFT takes it for.

    Args:
        config: The adapter's.
        model: Without adapters.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for entry in config.modules_to_save:
        # The end of a name, whether or not a dot stands before it.
        yield entry, {name: m for name, m in modules.items() if name.endswith(entry)}
