"""``adapter_config.json``: what PEFT says of an adapter, read where it is plain LoRA.

Nothing of it is fetched, imported or run: ``base_model_name_or_path`` and ``auto_mapping`` are not
even looked at.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_peft.adapters.json_file import read_json
from lightning_peft.errors import MissingFile, UserError, shown
from lightning_peft.patterns import Pattern

CONFIG = "adapter_config.json"

# What these must be for an adapter to be plain LoRA; None stands for anything empty.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "bias": "none",
    "lora_bias": False,
    "use_qalora": False,
    "ensure_weight_tying": False,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "megatron_config": None,
    "alora_invocation_tokens": None,
    "use_bdlora": None,
    "arrow_config": None,
    "kasa_config": None,
    "monteclora_config": None,
    "velora_config": None,
}
_READ = {
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "init_lora_weights",
}
# What changes nothing of what an adapter computes on linears.
_BESIDE = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "fan_in_fan_out",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
}
# Starts of A and B that leave the base as it is.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_ON_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# A scaling beyond these is zero or infinite in float32.
_SMALLEST, _LARGEST = 1e-30, 1e30


@dataclass(frozen=True)
class PeftConfig:
    """An adapter's configuration, as far as plain LoRA needs it.

    Attributes:
        path: Its file.
        r: Rank of layers that ``rank_pattern`` does not name.
        lora_alpha: Likewise.
        lora_dropout: Of the layers' inputs.
        use_rslora: Whether the scaling is alpha over the root of the rank.
        rank_pattern: Ranks by pattern.
        alpha_pattern: Alphas by pattern.
        target_modules: Names, ends of names, or one pattern.
        exclude_modules: The same forms, taken away.
        modules_to_save: Names or ends of names of modules that trained in full.
        layers_to_transform: Numbers of the layers to which the targets are limited.
        layers_pattern: What stands before such a number.
    """

    path: Path
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    modules_to_save: list[str]
    layers_to_transform: list[int] | None
    layers_pattern: list[str]


def not_plain(config: Mapping[str, Any]) -> str | None:
    """The first key by which a configuration is not plain LoRA's; None where it is.

    Args:
        config: As the file holds it.
    """
    return next((k for k in _PLAIN if not _is_plain(k, config.get(k))), None)


def _is_plain(key: str, value: Any) -> bool:
    plain = _PLAIN[key]
    return value is None or value == plain or (plain is None and value in ([], {}, "", False))


def read_config(folder: Path) -> PeftConfig:
    """Read and check the configuration of a plain LoRA adapter.

    Args:
        folder: The adapter's.

    Raises:
        MissingFile: If it holds no configuration.
        UserError: Naming the file, the key, what it holds and what would do.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise MissingFile(f"{folder} holds no {CONFIG}, so it is not a PEFT adapter.")
    content = read_json(path)
    if key := not_plain(content):
        plain = _PLAIN[key]
        wanted = "null" if plain is None else repr(plain)
        raise UserError(f"{path} has {key}: {shown(content[key])}; only {wanted} can be loaded.")
    _check_start(path, content.get("init_lora_weights"))
    config = _Reader(path, content).config()
    unknown = sorted(content.keys() - _PLAIN.keys() - _READ - _BESIDE)
    if unknown := [key for key in unknown if content[key]]:  # null, false and {} set nothing
        names = ", ".join(shown(key) for key in unknown[:5])
        warnings.warn(f"{path} has {names}, unknown here and passed over.", stacklevel=3)
    return config


def _check_start(path: Path, start: Any) -> None:
    if isinstance(start, str) and start.lower().startswith(_ON_THE_BASE):
        raise UserError(
            f"{path} has init_lora_weights: {shown(start)}, which changes the base too; "
            "save it as plain LoRA (path_initial_model_for_weight_conversion in PEFT)."
        )
    known = start.lower() if isinstance(start, str) else start
    if not isinstance(known, (str, bool, type(None))) or known not in _STARTS:
        raise UserError(
            f"{path} has init_lora_weights: {shown(start)}; true, false, 'gaussian', 'eva' and "
            "'orthogonal' can be loaded."
        )


class _Reader:
    """Takes one key after the other from a configuration, and says what is wrong with it."""

    def __init__(self, path: Path, content: Mapping[str, Any]) -> None:
        self.path, self.content = path, content

    def config(self) -> PeftConfig:
        layers = self.content.get("layers_to_transform")
        pattern = self.content.get("layers_pattern")
        return PeftConfig(
            path=self.path,
            r=self.rank("r", self.content.get("r")),
            lora_alpha=self.alpha("lora_alpha", self.content.get("lora_alpha")),
            lora_dropout=self.dropout(),
            use_rslora=self.flag("use_rslora"),
            rank_pattern={k: self.rank(n, v) for k, n, v in self.pattern("rank_pattern")},
            alpha_pattern={k: self.alpha(n, v) for k, n, v in self.pattern("alpha_pattern")},
            target_modules=self.targets(),
            exclude_modules=self.names("exclude_modules", or_pattern=True),
            modules_to_save=list(self.names("modules_to_save") or ()),
            layers_to_transform=None if layers in (None, []) else self.numbers(layers),
            layers_pattern=[pattern]
            if isinstance(pattern, str) and pattern
            else list(self.names("layers_pattern") or ()),
        )

    def refuse(self, key: str, value: Any, wanted: str) -> UserError:
        absent = key.isidentifier() and key not in self.content
        given = f"no {key}" if absent else f"{key}: {shown(value)}"
        return UserError(f"{self.path} has {given}; it must be {wanted}.")

    def rank(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 1 << 31:
            raise self.refuse(key, value, "a whole number of at least 1, the rank")
        return value

    def alpha(self, key: str, value: Any) -> float:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not _SMALLEST <= value <= _LARGEST:  # NaN is neither
            raise self.refuse(key, value, "a number above zero (1e-30 to 1e30)")
        return value  # type: ignore[no-any-return]

    def dropout(self) -> float:
        value = self.content.get("lora_dropout")
        value = 0.0 if value is None else value
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not 0 <= value < 1:
            raise self.refuse("lora_dropout", value, "a number in [0, 1)")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.content.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.refuse(key, value, "true or false")
        return bool(value)

    def pattern(self, key: str) -> list[tuple[str, str, Any]]:
        """Each entry of a mapping: its pattern, how errors name it, and its value."""
        value = self.content.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.refuse(key, value, "a mapping from names of layers to numbers")
        for name in value or {}:
            peft_pattern(name, f"{self.path} has {key}")
        return [(name, f"{key} {shown(name)}", number) for name, number in (value or {}).items()]

    def targets(self) -> str | list[str]:
        found = self.names("target_modules", or_pattern=True)
        if not found:
            raise self.refuse("target_modules", found, "the names of the adapted layers")
        return found

    def names(self, key: str, or_pattern: bool = False) -> Any:
        value = self.content.get(key)
        if value is None or (or_pattern and isinstance(value, str)):
            return value or None
        if not isinstance(value, list) or not all(isinstance(n, str) and n for n in value):
            raise self.refuse(key, value, "a list of names" + " or a pattern" * or_pattern)
        return value

    def numbers(self, value: Any) -> list[int]:
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in found):
            raise self.refuse("layers_to_transform", value, "a list of layers' numbers")
        return found


def peft_pattern(text: str, key: str) -> Pattern:
    """A key of ``rank_pattern`` or ``alpha_pattern``, which matches the end of a name.

    Args:
        text: The key.
        key: Where it stands, for errors.

    Raises:
        UserError: If it is no regular expression.
    """
    return Pattern(text, key, r"(.*\.)?({})$")
