"""``lightning-peft estimate``: what a run will take, before anything is downloaded."""

from __future__ import annotations

import argparse
from typing import Any

from lightning_peft.commands.parsing import command_parser
from lightning_peft.errors import UserError

EPILOG = """Everything else is an option of fit: --config FILE, --model.adapter.r 64, …
Of a model on the hub only config.json is read, from the local cache where it is there."""


def main(words: list[str]) -> None:
    """Print parameters, memory and sizes of a run.

    Args:
        words: The command's options, and those of ``fit``.

    Raises:
        UserError: In one sentence, if anything is wrong.
    """
    parser = command_parser(
        __name__,
        __doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--devices", type=int, default=1, help="devices that ZeRO shards among")
    parser.add_argument("--zero_stage", type=int, default=0, choices=range(4), help="of DeepSpeed")
    parser.add_argument("--rows", type=int, help="rows of a micro-batch; data.batch_size if absent")
    parser.add_argument("--tokens", type=int, help="tokens of a row; the data's limit if absent")
    parser.add_argument(
        "--targets", type=int, help="positions of a row with a target; all tokens if absent"
    )
    options, others = parser.parse_known_args(words)
    if options.devices < 1:
        raise UserError(f"--devices: {options.devices} is below 1.")

    from lightning_peft.estimation import estimate
    from lightning_peft.settings.resolve import Resolver

    resolver = Resolver()
    tree = resolver.tree(others)
    module = resolver.module(tree)
    rows, tokens = _batch(tree, options)
    found = estimate(module, rows, tokens, options.targets)
    sizes = found.per_device(options.devices, options.zero_stage)
    print(_text(module, found, sizes, rows, tokens, options))


def _batch(tree: dict[str, Any], options: argparse.Namespace) -> tuple[int, int]:
    """Rows and tokens of a micro-batch."""
    data = (tree.get("data") or {}).get("init_args") or {}
    rows, tokens = options.rows or data.get("batch_size"), options.tokens or data.get("max_length")
    if tokens is None:
        tokens = _protocol_length(tree)
    for key, value in (("rows", rows), ("tokens", tokens)):
        if not isinstance(value, int) or value < 1:
            raise UserError(f"--{key} must be given, above zero: data does not say it.")
    return int(rows), int(tokens)  # type: ignore[arg-type]


def _protocol_length(tree: dict[str, Any]) -> int | None:
    """The limit of the data's protocol, where the configuration names none of its own."""
    import importlib

    data = tree.get("data") or {}
    module, _, name = str(data.get("class_path", "")).rpartition(".")
    protocols = getattr(getattr(importlib.import_module(module), name), "protocols", {})
    chosen = protocols.get((data.get("init_args") or {}).get("protocol"))
    chosen = chosen or next(iter(protocols.values()), None)
    return getattr(chosen, "max_length", None)


def _text(
    module: Any,
    found: Any,
    sizes: dict[str, float],
    rows: int,
    tokens: int,
    options: argparse.Namespace,
) -> str:
    end = "known after its probe" if found.trainable_end is None else f"{found.trainable_end:,}"
    export = end if found.trainable_end is None else "none but the merged model"
    export = export if found.export is None else _size(found.export)
    shared = f"{options.devices} device{'s' if options.devices > 1 else ''}"
    lines = {
        "model": module.model_name_or_path,
        "strategy": type(module.adapter).__name__,
        "parameters": f"{found.total:,}",
        "  that train at the start": f"{found.trainable:,} ({found.trainable / found.total:.2%})",
        "  that train at the end": end,
        f"memory of each device, of {shared} with ZeRO stage {options.zero_stage}": "",
        **{f"  {kind}": _size(size) for kind, size in sizes.items()},
        "  in all": _size(sum(sizes.values())),
        "checkpoint": _size(found.checkpoint),
        "export": export,
    }
    width = max(len(key) for key, value in lines.items() if value)
    shown = [f"{key:{width}}  {value}".rstrip() for key, value in lines.items()]
    recomputed = ", recomputed by block" if module.gradient_checkpointing else ""
    return "\n".join(
        [
            *shown,
            f"Activations are those of {rows} rows of {tokens} tokens{recomputed}. Kernels' own "
            "memory, the allocator's waste and communication buffers come on top.",
        ]
    )


def _size(count: float) -> str:
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if count >= factor:
            return f"{count / factor:,.2f} {unit}"
    return f"{count / 1e3:,.1f} kB"
